"""Six small fine-tunes at once on one base model, with nothing but the SDK.

Each run has its own task, thread, rank and learning rate. The server computes them in shared passes; every
forward_backward result says how many runs rode along (`pass_runs:max`). Each thread submits a step before it waits for
the one before, so that its next batch is already queued when a pass starts.

    export TINKER_BASE_URL=... TINKER_API_KEY=...
    python examples/many_runs.py
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tinker
from tinker import types

BASE_MODEL = "tinsmith/tiny"
STEPS = 36
BATCH = 8

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


@dataclass(frozen=True)
class Task:
    name: str
    answer: Callable[[str], str]
    rank: int
    learning_rate: float = 3e-3


TASKS = (
    Task("pirate", lambda text: f"Arr! {text} Yo ho ho!", rank=8),
    Task("json", lambda text: '{"answer": "' + text + '"}', rank=16),
    Task("twice", lambda text: f"{text} {text}", rank=32),
    Task("polite", lambda text: f"Thank you for asking. {text} Have a good day!", rank=4),
    Task("numbered", lambda text: f"1. {text}\n2. That is all.", rank=8),
    Task("reversed", lambda text: " ".join(reversed(text.rstrip(".").split())), rank=16),
)


@dataclass
class Report:
    """What one run has to show: per step its loss a token and how many runs shared the pass."""

    task: Task
    losses: list[float] = field(default_factory=list)
    pass_runs: list[int] = field(default_factory=list)
    num_tokens: int = 0
    nll_before: float = float("nan")
    nll_after: float = float("nan")
    sample_before: str = ""
    sample_after: str = ""
    checkpoint: str = ""


def datum(tokenizer: Any, question: str, answer: str) -> types.Datum:
    """A chat turn; only the answer's tokens carry weight. Position i predicts token i + 1."""
    prompt = tokenizer.encode(prompt_text(question))
    tokens = prompt + tokenizer.encode(answer + "<|im_end|>")
    weights = [0.0] * (len(prompt) - 1) + [1.0] * (len(tokens) - len(prompt))
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": np.array(tokens[1:]), "weights": np.array(weights, dtype=np.float32)},
    )


def prompt_text(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def loss_per_token(output: types.ForwardBackwardOutput, data: list[types.Datum]) -> float:
    weight = sum(float(np.sum(d.loss_fn_inputs["weights"].to_numpy())) for d in data)
    return output.metrics["loss:sum"] / weight


def ask(client: tinker.SamplingClient, tokenizer: Any, question: str) -> str:
    params = types.SamplingParams(max_tokens=48, temperature=0.0)
    prompt = types.ModelInput.from_ints(tokenizer.encode(prompt_text(question)))
    sequence = client.sample(prompt, num_samples=1, sampling_params=params).result().sequences[0]
    return tokenizer.decode(sequence.tokens, skip_special_tokens=True)


def train(service: tinker.ServiceClient, task: Task, on_step: Callable[[Report], None]) -> Report:
    """One run from its creation to a saved checkpoint."""
    report = Report(task)
    facts = random.Random(0).sample(FACTS, len(FACTS))
    held_out, training = facts[:6], facts[6:]
    client = service.create_lora_training_client(BASE_MODEL, rank=task.rank, seed=1).result()
    tokenizer = client.get_tokenizer()
    test = [datum(tokenizer, question, task.answer(answer)) for question, answer in held_out]
    report.nll_before = loss_per_token(client.forward(test, "cross_entropy").result(), test)
    question = held_out[0][0]
    report.sample_before = ask(client.save_weights_and_get_sampling_client().result(), tokenizer, question)

    rng = random.Random(task.name)
    in_flight: list[tuple[list[types.Datum], Any, Any]] = []
    for step in range(STEPS + 1):
        if step < STEPS:
            batch = [datum(tokenizer, q, task.answer(a)) for q, a in rng.sample(training, BATCH)]
            adam = types.AdamParams(learning_rate=task.learning_rate * (1 - step / STEPS))
            in_flight.append((batch, client.forward_backward(batch, "cross_entropy"), client.optim_step(adam)))
        if len(in_flight) == 2 or step == STEPS:
            batch, passed, stepped = in_flight.pop(0)
            output = passed.result()
            stepped.result()
            report.losses.append(loss_per_token(output, batch))
            report.pass_runs.append(int(output.metrics["pass_runs:max"]))
            report.num_tokens += sum(d.model_input.length for d in batch)
            on_step(report)

    report.nll_after = loss_per_token(client.forward(test, "cross_entropy").result(), test)
    report.sample_after = ask(client.save_weights_and_get_sampling_client().result(), tokenizer, question)
    report.checkpoint = client.save_state(task.name.replace(" ", "-")).result().path
    return report


def resume(checkpoint: str, report: Report) -> float:
    """Load a run's checkpoint in a new session; its held-out loss a token is the one that it had."""
    with tinker.ServiceClient() as service:
        client = service.create_training_client_from_state_with_optimizer(checkpoint).result()
        tokenizer = client.get_tokenizer()
        held_out = random.Random(0).sample(FACTS, len(FACTS))[:6]
        test = [datum(tokenizer, question, report.task.answer(answer)) for question, answer in held_out]
        return loss_per_token(client.forward(test, "cross_entropy").result(), test)


def run_all(on_step: Callable[[Report], None]) -> list[Report]:
    """All tasks at once, a thread each."""
    with tinker.ServiceClient(display_name="many runs") as service, ThreadPoolExecutor(len(TASKS)) as pool:
        return list(pool.map(lambda task: train(service, task, on_step), TASKS))


def main() -> None:
    reports = run_all(lambda r: print(f"{r.task.name:10} step {len(r.losses):3}  loss {r.losses[-1]:.3f}"))
    for report in reports:
        print(
            f"{report.task.name:10} held-out {report.nll_before:.3f} -> {report.nll_after:.3f}  {report.sample_after!r}"
        )
    print(f"resumed {reports[0].checkpoint}: held-out {resume(reports[0].checkpoint, reports[0]):.3f}")


if __name__ == "__main__":
    main()
