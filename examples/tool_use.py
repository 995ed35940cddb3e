"""Multi-turn tool use: a model that adds badly learns to ask a calculator.

Sums of numbers up to 100 are too hard for `tinsmith/tiny`. Some supervised steps show it the form of a tool call, two
times out of three; then reinforcement learning finds out whether calling pays. An episode is a small conversation:

    user       What is 38 + 25?
    assistant  <tool_call>38+25</tool_call>
    user       <tool_response>63</tool_response>        by the calculator on this machine
    assistant  63

The whole episode is one datum. Only what the model wrote carries an advantage; the tool's tokens are context.

    export TINKER_BASE_URL=... TINKER_API_KEY=...
    python examples/tool_use.py
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tinker
from tinker import types

BASE_MODEL = "tinsmith/tiny"
RANK = 16
WARM_UP_STEPS = 60
WARM_UP_LEARNING_RATE = 6e-3
STEPS = 14
QUESTIONS_PER_STEP = 8
GROUP_SIZE = 8
LEARNING_RATE = 1.5e-3
TARGET = 0.8

CALL = re.compile(r"<tool_call>(\d+)\+(\d+)</tool_call>")


@dataclass
class Episode:
    """A conversation as tokens. `logprobs` is 0 and `is_own` false where the model did not write."""

    sums: tuple[int, int]
    tokens: list[int]
    logprobs: list[float]
    is_own: list[bool]
    answer: str = ""
    has_called: bool = False

    @property
    def reward(self) -> float:
        return float(self.answer == str(sum(self.sums)))

    def read(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens)
        self.is_own += [False] * len(tokens)

    def write(self, sequence: types.SampledSequence) -> None:
        self.tokens += list(sequence.tokens)
        self.logprobs += list(sequence.logprobs)
        self.is_own += [True] * len(sequence.tokens)


@dataclass
class Report:
    """Shares of right answers on fresh sums: base model, after the warm-up, after RL; and shares of tool calls."""

    base: float = float("nan")
    before: float = float("nan")
    after: float = float("nan")
    calls_before: float = float("nan")
    calls_after: float = float("nan")
    rewards: list[float] = field(default_factory=list)
    transcript: str = ""


def calculator(call: re.Match[str]) -> str:
    return str(int(call[1]) + int(call[2]))


def user_turn(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def some_sums(rng: random.Random, count: int) -> list[tuple[int, int]]:
    return [(rng.randint(10, 99), rng.randint(10, 99)) for _ in range(count)]


def demonstration(tokenizer: Any, sums: tuple[int, int], total: int, with_call: bool) -> types.Datum:
    """An episode written by hand; the weights mark the assistant's turns."""
    asked = user_turn(f"What is {sums[0]} + {sums[1]}?")
    turns = [(asked, 0.0), (f"{total}<|im_end|>", 1.0)]
    if with_call:
        call = f"<tool_call>{sums[0]}+{sums[1]}</tool_call><|im_end|>"
        response = "\n" + user_turn(f"<tool_response>{total}</tool_response>")
        turns = [(asked, 0.0), (call, 1.0), (response, 0.0), (f"{total}<|im_end|>", 1.0)]
    pieces = [(tokenizer.encode(text), weight) for text, weight in turns]
    tokens = [token for piece, _ in pieces for token in piece]
    weights = [weight for piece, weight in pieces for _ in piece]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": np.array(tokens[1:]),
            "weights": np.array(weights[1:], dtype=np.float32),
        },
    )


def play(
    sampler: tinker.SamplingClient, tokenizer: Any, sums: list[tuple[int, int]], size: int, rng: random.Random
) -> list[list[Episode]]:
    """A group of `size` episodes for each sum; all first turns are sampled at once, then all second turns."""

    def sample(tokens: list[int], count: int) -> Any:
        params = types.SamplingParams(max_tokens=24, temperature=1.0, seed=rng.randrange(2**31))
        return sampler.sample(types.ModelInput.from_ints(tokens), num_samples=count, sampling_params=params)

    prompts = [tokenizer.encode(user_turn(f"What is {a} + {b}?")) for a, b in sums]
    first = [sample(prompt, size) for prompt in prompts]
    groups, second = [], []
    for pair, prompt, future in zip(sums, prompts, first, strict=True):
        groups.append([Episode(pair, [], [], []) for _ in range(size)])
        for episode, sequence in zip(groups[-1], future.result().sequences, strict=True):
            episode.read(prompt)
            episode.write(sequence)
            episode.answer = tokenizer.decode(sequence.tokens).removesuffix("<|im_end|>").strip()
            call = CALL.fullmatch(episode.answer)
            if call:
                episode.has_called = True
                episode.read(tokenizer.encode("\n" + user_turn(f"<tool_response>{calculator(call)}</tool_response>")))
                second.append((episode, sample(episode.tokens, 1)))
    for episode, future in second:
        (sequence,) = future.result().sequences
        episode.write(sequence)
        episode.answer = tokenizer.decode(sequence.tokens).removesuffix("<|im_end|>").strip()
    return groups


def datum(episode: Episode, advantage: float) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(episode.tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": np.array(episode.tokens[1:]),
            "logprobs": np.array(episode.logprobs[1:], dtype=np.float32),
            "advantages": advantage * np.array(episode.is_own[1:], dtype=np.float32),
        },
    )


def run(seed: int = 0, on_step: Callable[[int, float], None] = lambda step, reward: None) -> Report:
    """Warm up, reinforce, and measure each stage on eighty sums; two episodes each."""
    report, rng = Report(), random.Random(seed)
    test = some_sums(random.Random(1000 + seed), 80)
    with tinker.ServiceClient(display_name="tool use") as service:
        client = service.create_lora_training_client(BASE_MODEL, rank=RANK, seed=seed).result()
        tokenizer = client.get_tokenizer()

        def measure(sampler: tinker.SamplingClient) -> tuple[float, float, Episode]:
            episodes = [episode for group in play(sampler, tokenizer, test, 2, rng) for episode in group]
            reward, calls = np.mean([(e.reward, e.has_called) for e in episodes], axis=0)
            return float(reward), float(calls), episodes[0]

        sampler = client.save_weights_and_get_sampling_client().result()
        report.base, _, _ = measure(sampler)
        for step in range(WARM_UP_STEPS):
            batch = [demonstration(tokenizer, s, sum(s), with_call=i % 3 > 0) for i, s in enumerate(some_sums(rng, 12))]
            client.forward_backward(batch, "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=WARM_UP_LEARNING_RATE * (1 - step / WARM_UP_STEPS)))
        sampler = client.save_weights_and_get_sampling_client().result()
        report.before, report.calls_before, _ = measure(sampler)

        for step in range(STEPS):
            data, rewards = [], []
            for group in play(sampler, tokenizer, some_sums(rng, QUESTIONS_PER_STEP), GROUP_SIZE, rng):
                rewards += [episode.reward for episode in group]
                mean = float(np.mean(rewards[-GROUP_SIZE:]))
                data += [datum(episode, episode.reward - mean) for episode in group if episode.reward != mean]
            if data:
                client.forward_backward(data, "importance_sampling")
                client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE * (1 - step / STEPS)))
            sampler = client.save_weights_and_get_sampling_client().result()
            report.rewards.append(float(np.mean(rewards)))
            on_step(step + 1, report.rewards[-1])
        report.after, report.calls_after, episode = measure(sampler)
        report.transcript = tokenizer.decode(episode.tokens)
    return report


def main() -> int:
    report = run(on_step=lambda step, reward: print(f"step {step:3}  mean reward {reward:.3f}", flush=True))
    print(f"right answers: base {report.base:.0%}, warmed up {report.before:.0%}, after RL {report.after:.0%}")
    print(f"tool calls: warmed up {report.calls_before:.0%}, after RL {report.calls_after:.0%}\n{report.transcript}")
    return 0 if report.after >= TARGET and report.after > report.before else 1


if __name__ == "__main__":
    sys.exit(main())
