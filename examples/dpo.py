"""Direct preference optimisation with `forward_backward_custom` and a frozen reference.

Greeted by name, the model says "Nice to meet you." or "How can I help you?", about equally often. The preferences say
that the first is better. DPO raises the chosen answer's log-probability against the rejected one's, both measured from
a reference: the base model behind a sampling client of its own, asked once with `compute_logprobs`. The loss is a few
lines of torch on this side; the server computes the log-probabilities and, from the loss's gradient, the weights'.

    -log sigmoid(beta * ((chosen - reference chosen) - (rejected - reference rejected)))     (arXiv 2305.18290, eq. 7)

Only the difference counts there, so a small model soon makes both answers unlikely and says something else. A little
plain likelihood of the chosen answer (arXiv 2404.19733) holds it.

    export TINKER_BASE_URL=... TINKER_API_KEY=...
    python examples/dpo.py
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tinker
import torch
import torch.nn.functional as F
from tinker import types

BASE_MODEL = "tinsmith/tiny"
RANK = 8
STEPS = 20
BATCH_PAIRS = 8
LEARNING_RATE = 2e-3
BETA = 0.2
ANCHOR = 1.0
NUM_HELD_OUT = 16
TARGET = 0.85

NAMES = [
    "Anna", "Ben", "Clara", "David", "Emma", "Finn", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo", "Mia",
    "Noah", "Olive", "Paul", "Rosa", "Sam", "Tara", "Vera", "Will", "Zoe", "Adam", "Bella", "Carl", "Daisy",
    "Eric", "Fiona", "George", "Hana", "Ivan", "Julia", "Kim", "Lucy", "Max", "Nina", "Omar", "Peter", "Ruby",
    "Tom",
]  # fmt: skip


@dataclass(frozen=True)
class Preference:
    question: str
    chosen: str
    rejected: str


PREFERENCES = [
    Preference(f"{hello}, I am {name}.", f"{hello}, {name}! Nice to meet you.", f"{hello}, {name}! How can I help you?")
    for name in NAMES
    for hello in ("Hello", "Hi", "Good morning", "Good evening")
]


@dataclass
class Report:
    """Share of sampled answers to held-out greetings that are the chosen one, to the letter; the loss of each step."""

    before: float = float("nan")
    after: float = float("nan")
    losses: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


def prompt_tokens(tokenizer: Any, question: str) -> list[int]:
    return list(tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"))


def datum(tokenizer: Any, question: str, answer: str) -> types.Datum:
    """Position i predicts token i + 1; the weights mark the answer."""
    prompt = prompt_tokens(tokenizer, question)
    tokens = prompt + tokenizer.encode(answer + "<|im_end|>")
    weights = [0.0] * (len(prompt) - 1) + [1.0] * (len(tokens) - len(prompt))
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": np.array(tokens[1:]), "weights": np.array(weights, dtype=np.float32)},
    )


def answer_logprob(logprobs: torch.Tensor, d: types.Datum) -> torch.Tensor:
    """The log-probability of the whole answer. `logprobs` float32 [num tokens]."""
    return logprobs @ torch.from_numpy(d.loss_fn_inputs["weights"].to_numpy().copy())


def reference_logprobs(reference: tinker.SamplingClient, data: list[types.Datum]) -> torch.Tensor:
    """The answers' log-probabilities under the reference, [len(data)]."""
    inputs = [d.model_input.append_int(int(d.loss_fn_inputs["target_tokens"].to_numpy()[-1])) for d in data]
    futures = [reference.compute_logprobs(tokens) for tokens in inputs]
    # The first token has no log-probability; from the second on they line up with the targets.
    return torch.stack(
        [answer_logprob(torch.tensor(future.result()[1:]), d) for future, d in zip(futures, data, strict=True)]
    )


def dpo_loss(reference: torch.Tensor) -> Callable[..., tuple[torch.Tensor, dict[str, float]]]:
    """The loss of a batch: data alternate chosen, rejected; so does `reference` [2 x pairs]."""

    def loss(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        ratio = torch.stack([answer_logprob(lp, d) for lp, d in zip(logprobs, data, strict=True)]) - reference
        margin = ratio[0::2] - ratio[1::2]
        anchor = -ratio[0::2].mean()
        return -F.logsigmoid(BETA * margin).mean() + ANCHOR * anchor, {"margin": float(margin.mean().detach())}

    return loss


def share_chosen(sampler: tinker.SamplingClient, tokenizer: Any, held_out: list[Preference]) -> tuple[float, list[str]]:
    """Eight samples at temperature 1 for each question."""
    prompts = [types.ModelInput.from_ints(prompt_tokens(tokenizer, p.question)) for p in held_out]
    futures = [sampler.sample(prompt, 8, types.SamplingParams(max_tokens=40, seed=7)) for prompt in prompts]
    answers = [
        [tokenizer.decode(sequence.tokens, skip_special_tokens=True) for sequence in future.result().sequences]
        for future in futures
    ]
    hits = [text == p.chosen for p, texts in zip(held_out, answers, strict=True) for text in texts]
    return float(np.mean(hits)), [texts[0] for texts in answers]


def run(seed: int = 0, on_step: Callable[[int, float, float], None] = lambda step, loss, margin: None) -> Report:
    """Train, and measure before and after on greetings that training never saw."""
    report, rng = Report(), random.Random(seed)
    pairs = rng.sample(PREFERENCES, len(PREFERENCES))
    held_out, training = pairs[:NUM_HELD_OUT], pairs[NUM_HELD_OUT:]
    with tinker.ServiceClient(display_name="dpo") as service:
        client = service.create_lora_training_client(BASE_MODEL, rank=RANK, seed=seed).result()
        reference = service.create_sampling_client(base_model=BASE_MODEL).result()
        tokenizer = client.get_tokenizer()
        report.before, _ = share_chosen(reference, tokenizer, held_out)

        data = [datum(tokenizer, p.question, answer) for p in training for answer in (p.chosen, p.rejected)]
        frozen = reference_logprobs(reference, data)
        for step in range(STEPS):
            chosen = [2 * i for i in rng.sample(range(len(training)), BATCH_PAIRS)]
            batch = [index for first in chosen for index in (first, first + 1)]
            passed = client.forward_backward_custom([data[i] for i in batch], dpo_loss(frozen[batch]))
            client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE * (1 - step / STEPS)))
            output = passed.result()
            report.losses.append(float(output.metrics["loss:sum"]))
            on_step(step + 1, report.losses[-1], float(output.metrics["margin"]))
        sampler = client.save_weights_and_get_sampling_client().result()
        report.after, report.answers = share_chosen(sampler, tokenizer, held_out)
    return report


def main() -> int:
    report = run(
        on_step=lambda step, loss, margin: (
            step % 5 or print(f"step {step:3}  loss {loss:.3f}  margin {margin:+.1f} nats")
        )
    )
    print(f"held-out answers as preferred: {report.before:.0%} -> {report.after:.0%}, e.g. {report.answers[:4]}")
    return 0 if report.after >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
