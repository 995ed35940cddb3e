"""Reinforcement learning with a verifiable reward: GRPO on single-digit addition.

`tinsmith/tiny` answers "What is 3 + 4?" right about every second time. Each step samples a group of answers to some
sums from a fresh snapshot, gives 1 to a right answer and 0 to a wrong one, and turns each group's rewards into
advantages by taking off the group's mean (a group that is all right or all wrong teaches nothing and is left out).
`importance_sampling` weighs each token's advantage by the ratio of its probability now and when it was sampled.

    export TINKER_BASE_URL=... TINKER_API_KEY=...
    python examples/grpo.py
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tinker
from tinker import types

BASE_MODEL = "tinsmith/tiny"
RANK = 16
STEPS = 16
QUESTIONS_PER_STEP = 16
GROUP_SIZE = 8
PEAK_LEARNING_RATE = 2e-3
EARLY_STEP = 2
TARGET = 0.9

SUMS = list(itertools.product(range(10), repeat=2))


@dataclass
class Report:
    """Mean rewards: on fresh samples before and after, and of each step's groups; the same sums answered twice."""

    before: float = float("nan")
    after: float = float("nan")
    rewards: list[float] = field(default_factory=list)
    answers: list[tuple[str, str, str]] = field(
        default_factory=list
    )  # question, from the early snapshot, from the last


def question(left: int, right: int) -> str:
    return f"What is {left} + {right}?"


def encode(tokenizer: Any, text: str) -> types.ModelInput:
    prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return types.ModelInput.from_ints(tokenizer.encode(prompt))


def reward(tokenizer: Any, sums: tuple[int, int], sequence: types.SampledSequence) -> float:
    """1 for an answer that is the sum, nothing else, and comes to an end."""
    answer = tokenizer.decode(sequence.tokens, skip_special_tokens=True).strip()
    return float(sequence.stop_reason == "stop" and answer == str(sum(sums)))


def rollouts(sampler: tinker.SamplingClient, tokenizer: Any, sums: list[tuple[int, int]], size: int, seed: int) -> Any:
    """A group of `size` answers to each sum. All requests are under way before the first is waited for."""
    futures = [
        sampler.sample(
            encode(tokenizer, question(*pair)),
            num_samples=size,
            sampling_params=types.SamplingParams(max_tokens=6, temperature=1.0, seed=seed * 1000 + index),
        )
        for index, pair in enumerate(sums)
    ]
    groups = [future.result().sequences for future in futures]
    return [
        (pair, group, np.array([reward(tokenizer, pair, s) for s in group]))
        for pair, group in zip(sums, groups, strict=True)
    ]


def datum(prompt: list[int], sequence: types.SampledSequence, advantage: float) -> types.Datum:
    """Position i predicts token i + 1; the prompt's positions have no advantage."""
    tokens = prompt + list(sequence.tokens)
    pad = [0.0] * (len(prompt) - 1)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": np.array(tokens[1:]),
            "logprobs": np.array(pad + list(sequence.logprobs), dtype=np.float32),
            "advantages": np.array(pad + [advantage] * len(sequence.tokens), dtype=np.float32),
        },
    )


def mean_reward(sampler: tinker.SamplingClient, tokenizer: Any, seed: int) -> float:
    """Over all hundred sums, four fresh samples each."""
    return float(np.mean([rewards for _, _, rewards in rollouts(sampler, tokenizer, SUMS, 4, seed)]))


def side_by_side(
    early: tinker.SamplingClient, last: tinker.SamplingClient, tokenizer: Any, seed: int
) -> list[tuple[str, str, str]]:
    """Six answers each to the same eight sums. A snapshot stays as it was, however far the run has gone since."""
    sums = random.Random(seed).sample(SUMS, 8)

    def answers(sampler: tinker.SamplingClient) -> list[str]:
        groups = [group for _, group, _ in rollouts(sampler, tokenizer, sums, 6, seed)]
        return ["  ".join(tokenizer.decode(s.tokens, skip_special_tokens=True) for s in group) for group in groups]

    return list(zip([question(*pair) for pair in sums], answers(early), answers(last), strict=True))


def run(seed: int = 0, on_step: Callable[[int, float], None] = lambda step, reward: None) -> Report:
    """Train, and measure before and after with samples that training never saw."""
    report, rng = Report(), random.Random(seed)
    with tinker.ServiceClient(display_name="grpo") as service:
        client = service.create_lora_training_client(BASE_MODEL, rank=RANK, seed=seed).result()
        tokenizer = client.get_tokenizer()
        snapshots = [client.save_weights_and_get_sampling_client().result()]
        report.before = mean_reward(snapshots[0], tokenizer, seed=10_000 + seed)
        for step in range(STEPS):
            sums = rng.sample(SUMS, QUESTIONS_PER_STEP)
            groups = rollouts(snapshots[-1], tokenizer, sums, GROUP_SIZE, seed * STEPS + step)
            data = [
                datum(encode(tokenizer, question(*pair)).to_ints(), sequence, advantage)
                for pair, group, rewards in groups
                for sequence, advantage in zip(group, rewards - rewards.mean(), strict=True)
                if advantage
            ]
            if data:
                client.forward_backward(data, "importance_sampling")
                client.optim_step(types.AdamParams(learning_rate=PEAK_LEARNING_RATE * (1 - step / STEPS)))
            snapshots.append(client.save_weights_and_get_sampling_client().result())
            report.rewards.append(float(np.mean([rewards for _, _, rewards in groups])))
            on_step(step + 1, report.rewards[-1])
        report.after = mean_reward(snapshots[-1], tokenizer, seed=20_000 + seed)
        report.answers = side_by_side(snapshots[EARLY_STEP], snapshots[-1], tokenizer, seed=30_000 + seed)
    return report


def main() -> int:
    report = run(on_step=lambda step, reward: print(f"step {step:3}  mean reward {reward:.3f}", flush=True))
    for text, early, last in report.answers:
        print(f"{text:16} after step {EARLY_STEP}: {early:24} at the end: {last}")
    print(f"fresh samples: mean reward {report.before:.3f} before, {report.after:.3f} after (wanted: {TARGET})")
    return 0 if report.after >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
