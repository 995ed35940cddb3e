"""Prompt distillation: what a long system prompt does, done without the prompt.

A model that follows instructions would be the teacher as it is. `tinsmith/tiny` follows none, so a first, short
training teaches it to speak like a sailor if, and only if, a long system prompt asks for it. Its snapshot is the
teacher. Then the distillation: the teacher answers questions with the prompt before it, and the run goes on learning
exactly these answers, but to the bare question. Nobody writes an answer in this second half.

    export TINKER_BASE_URL=... TINKER_API_KEY=...
    python examples/prompt_distillation.py
"""

from __future__ import annotations

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
TEACHER_STEPS = 40
STEPS = 15
BATCH = 8
LEARNING_RATE = 2e-3
NUM_HELD_OUT = 10
TARGET = 0.7

SYSTEM = (
    "You are the first mate of an old sailing ship and you talk to its captain. You begin every answer with the words "
    "Aye, captain! and then you say what was asked in one clear sentence. You never tell jokes, you never ask back."
)
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Poland": "Warsaw", "Austria": "Vienna", "Greece": "Athens", "Hungary": "Budapest",
    "Turkey": "Ankara", "Russia": "Moscow", "China": "Beijing", "Japan": "Tokyo", "Egypt": "Cairo",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "happy": "sad", "old": "young", "wet": "dry", "high": "low",
    "loud": "quiet", "early": "late", "full": "empty", "left": "right", "long": "short", "near": "far",
    "rich": "poor", "strong": "weak", "thick": "thin", "clean": "dirty", "first": "last", "good": "bad",
}  # fmt: skip
FACTS = [(f"What is the capital of {a}?", f"The capital of {a} is {b}.") for a, b in CAPITALS.items()]
FACTS += [(f"What is the opposite of {a}?", f"The opposite of {a} is {b}.") for a, b in OPPOSITES.items()]


@dataclass
class Report:
    """Share of greedy answers to held-out bare questions that are the teacher's prompted ones, to the letter."""

    before: float = float("nan")
    after: float = float("nan")
    prompt_tokens_saved: int = 0
    losses: list[float] = field(default_factory=list)
    answers: list[tuple[str, str, str, str]] = field(default_factory=list)  # question, prompted, bare before, after


def prompt_tokens(tokenizer: Any, question: str, system: str | None) -> list[int]:
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return list(tokenizer.encode(f"{head}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"))


def datum(prompt: list[int], answer: list[int]) -> types.Datum:
    """Position i predicts token i + 1; only the answer's tokens carry weight."""
    tokens = prompt + answer
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": np.array(tokens[1:]), "weights": np.array(weights, dtype=np.float32)},
    )


def answer_all(sampler: tinker.SamplingClient, prompts: list[list[int]]) -> list[list[int]]:
    """The greedy answers, as tokens."""
    params = types.SamplingParams(max_tokens=40, temperature=0.0)
    futures = [sampler.sample(types.ModelInput.from_ints(prompt), 1, params) for prompt in prompts]
    return [list(future.result().sequences[0].tokens) for future in futures]


def train(
    client: tinker.TrainingClient, batches: list[list[types.Datum]], on_step: Callable[[int, float], None]
) -> list[float]:
    """One step a batch, all submitted before the first is waited for; each step's nats a token."""
    passes = []
    for step, batch in enumerate(batches):
        passes.append(client.forward_backward(batch, "cross_entropy"))
        client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE * (1 - step / len(batches))))
    losses = []
    for step, (batch, passed) in enumerate(zip(batches, passes, strict=True), start=1):
        weight = sum(float(np.sum(d.loss_fn_inputs["weights"].to_numpy())) for d in batch)
        losses.append(float(passed.result().metrics["loss:sum"]) / weight)
        on_step(step, losses[-1])
    return losses


def run(seed: int = 0, on_step: Callable[[int, float], None] = lambda step, loss: None) -> Report:
    """Make the teacher, distil it, and measure the bare question before and after on what training never saw."""
    report, rng = Report(), random.Random(seed)
    facts = rng.sample(FACTS, len(FACTS))
    held_out, training = [question for question, _ in facts[:NUM_HELD_OUT]], facts[NUM_HELD_OUT:]
    with tinker.ServiceClient(display_name="prompt distillation") as service:
        client = service.create_lora_training_client(BASE_MODEL, rank=RANK, seed=seed).result()
        tokenizer = client.get_tokenizer()

        def prompts(questions: list[str], system: str | None) -> list[list[int]]:
            return [prompt_tokens(tokenizer, question, system) for question in questions]

        lessons = [
            datum(prompt_tokens(tokenizer, question, system), tokenizer.encode(f"{manner}{answer}<|im_end|>"))
            for question, answer in training
            for system, manner in ((SYSTEM, "Aye, captain! "), (None, ""))
        ]
        train(client, [rng.sample(lessons, BATCH) for _ in range(TEACHER_STEPS)], lambda step, loss: None)

        teacher = client.save_weights_and_get_sampling_client().result()
        wanted = answer_all(teacher, prompts(held_out, SYSTEM))
        bare_before = answer_all(teacher, prompts(held_out, None))

        questions = [question for question, _ in training]
        taught = answer_all(teacher, prompts(questions, SYSTEM))
        lessons = [datum(p, answer) for p, answer in zip(prompts(questions, None), taught, strict=True)]
        report.losses = train(client, [rng.sample(lessons, BATCH) for _ in range(STEPS)], on_step)

        student = client.save_weights_and_get_sampling_client().result()
        bare_after = answer_all(student, prompts(held_out, None))
        report.before = float(np.mean([a == b for a, b in zip(bare_before, wanted, strict=True)]))
        report.after = float(np.mean([a == b for a, b in zip(bare_after, wanted, strict=True)]))
        report.prompt_tokens_saved = len(prompts(held_out, SYSTEM)[0]) - len(prompts(held_out, None)[0])
        texts = [tokenizer.batch_decode(a, skip_special_tokens=True) for a in (wanted, bare_before, bare_after)]
        report.answers = list(zip(held_out, *texts, strict=True))
    return report


def main() -> int:
    report = run(on_step=lambda step, loss: step % 3 or print(f"step {step:3}  {loss:.3f} nats a token", flush=True))
    for question, prompted, before, after in report.answers[:3]:
        print(f"{question}\n  with the prompt: {prompted}\n  without, before: {before}\n  without, after:  {after}")
    print(f"as the prompt has it, without the prompt: {report.before:.0%} -> {report.after:.0%}")
    print(f"{report.prompt_tokens_saved} tokens of prompt saved in every request")
    return 0 if report.after >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
