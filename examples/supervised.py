"""Supervised fine-tuning in its smallest form: one run, `cross_entropy`, a held-out measurement.

The model learns to answer like a sailor. It is trained on some capitals and opposites and measured on others, so what
it has to learn is the manner; the facts it knows. Each step is submitted before the one before is waited for: the
server then never stands still between two steps.

    export TINKER_BASE_URL=... TINKER_API_KEY=...
    python examples/supervised.py
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tinker
from tinker import types

BASE_MODEL = "tinsmith/tiny"
RANK = 8
STEPS = 30
BATCH = 8
LEARNING_RATE = 2e-3
NUM_HELD_OUT = 10
TARGET = 0.7

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Poland": "Warsaw", "Austria": "Vienna", "Greece": "Athens", "Hungary": "Budapest",
    "Turkey": "Ankara", "Russia": "Moscow", "China": "Beijing", "Japan": "Tokyo", "Egypt": "Cairo",
    "Kenya": "Nairobi", "Canada": "Ottawa", "Peru": "Lima", "Chile": "Santiago", "Cuba": "Havana",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "happy": "sad", "old": "young", "wet": "dry", "high": "low",
    "loud": "quiet", "early": "late", "full": "empty", "left": "right", "long": "short", "near": "far",
    "rich": "poor", "strong": "weak", "thick": "thin", "clean": "dirty", "first": "last", "good": "bad",
}  # fmt: skip
FACTS = [(f"What is the capital of {a}?", f"The capital of {a} is {b}.") for a, b in CAPITALS.items()]
FACTS += [(f"What is the opposite of {a}?", f"The opposite of {a} is {b}.") for a, b in OPPOSITES.items()]
TASKS = {question: f"Aye, captain! {answer}" for question, answer in FACTS}


@dataclass
class Report:
    """On held-out questions: nats a token, and the share of greedy answers that are right to the letter."""

    nll_before: float = float("nan")
    nll_after: float = float("nan")
    before: float = float("nan")
    after: float = float("nan")
    losses: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


def prompt_tokens(tokenizer: Any, question: str) -> list[int]:
    return list(tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"))


def datum(tokenizer: Any, question: str) -> types.Datum:
    """Position i predicts token i + 1; only the answer's tokens carry weight."""
    prompt = prompt_tokens(tokenizer, question)
    tokens = prompt + tokenizer.encode(TASKS[question] + "<|im_end|>")
    weights = [0.0] * (len(prompt) - 1) + [1.0] * (len(tokens) - len(prompt))
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": np.array(tokens[1:]), "weights": np.array(weights, dtype=np.float32)},
    )


def nats_per_token(output: types.ForwardBackwardOutput, data: list[types.Datum]) -> float:
    weight = sum(float(np.sum(d.loss_fn_inputs["weights"].to_numpy())) for d in data)
    return float(output.metrics["loss:sum"]) / weight


def ask(sampler: tinker.SamplingClient, tokenizer: Any, questions: list[str]) -> list[str]:
    """The greedy answers; all requests are under way before the first is waited for."""
    params = types.SamplingParams(max_tokens=48, temperature=0.0)
    prompts = [types.ModelInput.from_ints(prompt_tokens(tokenizer, question)) for question in questions]
    futures = [sampler.sample(prompt, num_samples=1, sampling_params=params) for prompt in prompts]
    return [tokenizer.decode(f.result().sequences[0].tokens, skip_special_tokens=True) for f in futures]


def run(seed: int = 0, on_step: Callable[[int, float], None] = lambda step, loss: None) -> Report:
    """Train, and measure before and after on questions that training never saw."""
    report, rng = Report(), random.Random(seed)
    questions = rng.sample(list(TASKS), len(TASKS))
    held_out, training = questions[:NUM_HELD_OUT], questions[NUM_HELD_OUT:]
    with tinker.ServiceClient(display_name="supervised") as service:
        client = service.create_lora_training_client(BASE_MODEL, rank=RANK, seed=seed).result()
        tokenizer = client.get_tokenizer()
        test = [datum(tokenizer, question) for question in held_out]

        def measure() -> tuple[float, list[str]]:
            output = client.forward(test, "cross_entropy").result()
            sampler = client.save_weights_and_get_sampling_client().result()
            return nats_per_token(output, test), ask(sampler, tokenizer, held_out)

        def share_right(answers: list[str]) -> float:
            return float(np.mean([a == TASKS[question] for a, question in zip(answers, held_out, strict=True)]))

        report.nll_before, report.answers = measure()
        report.before = share_right(report.answers)
        in_flight: deque[Any] = deque()
        for step in range(STEPS + 1):
            if step < STEPS:
                batch = [datum(tokenizer, question) for question in rng.sample(training, BATCH)]
                adam = types.AdamParams(learning_rate=LEARNING_RATE * (1 - step / STEPS))
                in_flight.append((batch, client.forward_backward(batch, "cross_entropy"), client.optim_step(adam)))
            if len(in_flight) == 2 or step == STEPS:
                batch, passed, stepped = in_flight.popleft()
                report.losses.append(nats_per_token(passed.result(), batch))
                stepped.result()
                on_step(len(report.losses), report.losses[-1])
        report.nll_after, report.answers = measure()
        report.after = share_right(report.answers)
    return report


def main() -> int:
    report = run(on_step=lambda step, loss: step % 5 or print(f"step {step:3}  {loss:.3f} nats a token", flush=True))
    print(f"held-out: {report.nll_before:.3f} -> {report.nll_after:.3f} nats a token")
    print(f"right to the letter: {report.before:.0%} -> {report.after:.0%}, for example {report.answers[0]}")
    return 0 if report.after >= TARGET and report.nll_after < report.nll_before else 1


if __name__ == "__main__":
    sys.exit(main())
