"""Asynchronous off-policy reinforcement learning: sampling goes on while training does.

Two actor threads sample answers to single-digit sums, always from the newest snapshot that there is, and put them into
a queue. The learner takes whatever comes first, trains on it and publishes a snapshot. Nobody waits for anybody, so a
batch is some steps old when it is trained on. That is what the ratio in `importance_sampling` is for: the sampler's
log-probabilities travel with the tokens, and the gradient is that of the policy as it is now.

    export TINKER_BASE_URL=... TINKER_API_KEY=...
    python examples/async_rl.py
"""

from __future__ import annotations

import itertools
import queue
import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tinker
from tinker import types

BASE_MODEL = "tinsmith/tiny"
RANK = 16
STEPS = 18
QUESTIONS_PER_BATCH = 12
GROUP_SIZE = 8
LEARNING_RATE = 1.5e-3
NUM_ACTORS = 2
MAX_LAG = 5
TARGET = 0.9

SUMS = list(itertools.product(range(10), repeat=2))


@dataclass
class Report:
    """Mean reward before and after; of each step its batch's mean reward, and how many steps old its snapshot was."""

    before: float = float("nan")
    after: float = float("nan")
    rewards: list[float] = field(default_factory=list)
    lags: list[int] = field(default_factory=list)
    num_dropped: int = 0


@dataclass(frozen=True)
class Snapshot:
    """What the learner last published."""

    step: int
    sampler: tinker.SamplingClient


@dataclass(frozen=True)
class Batch:
    """Groups of answers, and the step of the snapshot that gave them."""

    step: int
    groups: list[tuple[list[int], list[types.SampledSequence], np.ndarray]]  # prompt, answers, rewards [group]

    @property
    def mean_reward(self) -> float:
        return float(np.mean([rewards for _, _, rewards in self.groups]))


def rollout(snapshot: Snapshot, tokenizer: Any, sums: list[tuple[int, int]], size: int) -> Batch:
    """`size` answers to each sum, rewarded with 1 if right."""
    prompts = [
        tokenizer.encode(f"<|im_start|>user\nWhat is {a} + {b}?<|im_end|>\n<|im_start|>assistant\n") for a, b in sums
    ]
    params = types.SamplingParams(max_tokens=6, temperature=1.0)
    futures = [snapshot.sampler.sample(types.ModelInput.from_ints(prompt), size, params) for prompt in prompts]
    groups = []
    for pair, prompt, future in zip(sums, prompts, futures, strict=True):
        answers = future.result().sequences
        texts = [tokenizer.decode(answer.tokens, skip_special_tokens=True).strip() for answer in answers]
        groups.append((prompt, answers, np.array([float(text == str(sum(pair))) for text in texts])))
    return Batch(snapshot.step, groups)


def datum(prompt: list[int], answer: types.SampledSequence, advantage: float) -> types.Datum:
    tokens = prompt + list(answer.tokens)
    pad = [0.0] * (len(prompt) - 1)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": np.array(tokens[1:]),
            "logprobs": np.array(pad + list(answer.logprobs), dtype=np.float32),
            "advantages": np.array(pad + [advantage] * len(answer.tokens), dtype=np.float32),
        },
    )


def training_data(batch: Batch) -> list[types.Datum]:
    return [
        datum(prompt, answer, advantage)
        for prompt, answers, rewards in batch.groups
        for answer, advantage in zip(answers, rewards - rewards.mean(), strict=True)
        if advantage
    ]


class Actors:
    """Threads that sample from `newest` until the block ends. `batches` holds one, so that they can't run far ahead."""

    def __init__(self, first: Snapshot, tokenizer: Any, seed: int) -> None:
        self.newest = first
        self.batches: queue.Queue[Batch] = queue.Queue(maxsize=1)
        self._tokenizer = tokenizer
        self._is_over = threading.Event()
        self._pool = ThreadPoolExecutor(NUM_ACTORS)
        self._threads = [self._pool.submit(self._act, random.Random(f"{seed}/{n}")) for n in range(NUM_ACTORS)]

    def _act(self, rng: random.Random) -> None:
        while not self._is_over.is_set():
            batch = rollout(self.newest, self._tokenizer, rng.sample(SUMS, QUESTIONS_PER_BATCH), GROUP_SIZE)
            while not self._is_over.is_set():
                try:
                    self.batches.put(batch, timeout=0.1)
                    break
                except queue.Full:
                    continue

    def __enter__(self) -> Actors:
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_over.set()
        self._pool.shutdown()
        for thread in self._threads:
            thread.result()


def run(seed: int = 0, on_step: Callable[[int, float, int], None] = lambda step, reward, lag: None) -> Report:
    """Train, and measure before and after with fresh samples of all hundred sums."""
    report = Report()
    with tinker.ServiceClient(display_name="async rl") as service:
        client = service.create_lora_training_client(BASE_MODEL, rank=RANK, seed=seed).result()
        tokenizer = client.get_tokenizer()
        snapshot = Snapshot(0, client.save_weights_and_get_sampling_client().result())
        report.before = rollout(snapshot, tokenizer, SUMS, 4).mean_reward
        with Actors(snapshot, tokenizer, seed) as actors:
            while snapshot.step < STEPS:
                batch = actors.batches.get(timeout=60)
                lag = snapshot.step - batch.step
                data = training_data(batch)
                if lag > MAX_LAG or not data:
                    report.num_dropped += 1
                    continue
                adam = types.AdamParams(learning_rate=LEARNING_RATE * (1 - snapshot.step / STEPS))
                client.forward_backward(data, "importance_sampling")
                client.optim_step(adam)
                snapshot = Snapshot(snapshot.step + 1, client.save_weights_and_get_sampling_client().result())
                actors.newest = snapshot
                report.rewards.append(batch.mean_reward)
                report.lags.append(lag)
                on_step(snapshot.step, batch.mean_reward, lag)
        report.after = rollout(snapshot, tokenizer, SUMS, 4).mean_reward
    return report


def main() -> int:
    report = run(
        on_step=lambda step, reward, lag: print(f"step {step:3}  mean reward {reward:.3f}  {lag} steps old", flush=True)
    )
    print(f"mean reward {report.before:.3f} before, {report.after:.3f} after (wanted: {TARGET})")
    print(f"batches were {np.mean(report.lags):.1f} steps old on average; {report.num_dropped} not used")
    return 0 if report.after >= TARGET and max(report.lags) > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
