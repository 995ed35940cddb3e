"""A loss of your own: `forward_backward_custom` with squared error in place of likelihood.

To cross-entropy an answer that is off by one is as wrong as one that is off by ten. Here the loss looks at numbers: of
each sum the log-probabilities of all ten possible answers are computed, a softmax over them gives the answer that the
model expects, and the loss is the squared distance to the right one. Ten sequences meet in one term, which no loss of
the server does; torch on this side finds the gradient for each log-probability, the server takes it from there.

    export TINKER_BASE_URL=... TINKER_API_KEY=...
    python examples/custom_loss.py
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
from tinker import types

BASE_MODEL = "tinsmith/tiny"
RANK = 8
STEPS = 16
BATCH = 8
LEARNING_RATE = 1e-3
NUM_HELD_OUT = 15
TARGET = 0.5

NUM_ANSWERS = 10
SUMS = [(a, b) for a in range(NUM_ANSWERS) for b in range(NUM_ANSWERS - a)]


@dataclass
class Report:
    """Root mean square distance from the expected answer to the right one: held-out before and after; each batch."""

    before: float = float("nan")
    after: float = float("nan")
    errors: list[float] = field(default_factory=list)


def candidates(tokenizer: Any, sums: tuple[int, int]) -> list[types.Datum]:
    """The ten possible answers to one sum, a datum each. Position i predicts token i + 1."""
    text = f"<|im_start|>user\nWhat is {sums[0]} + {sums[1]}?<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer.encode(text)
    data = []
    for answer in range(NUM_ANSWERS):
        tokens = prompt + tokenizer.encode(f"{answer}<|im_end|>")
        weights = [0.0] * (len(prompt) - 1) + [1.0] * (len(tokens) - len(prompt))
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={"target_tokens": np.array(tokens[1:]), "weights": np.array(weights, dtype=np.float32)},
            )
        )
    return data


def expected_answers(data: list[types.Datum], logprobs: list[torch.Tensor]) -> torch.Tensor:
    """[len(data) / 10]. `logprobs` holds one float32 [num tokens] for each datum."""
    answers = torch.stack(
        [
            lp @ torch.from_numpy(d.loss_fn_inputs["weights"].to_numpy().copy())
            for lp, d in zip(logprobs, data, strict=True)
        ]
    )
    probabilities = answers.reshape(-1, NUM_ANSWERS).softmax(dim=1)
    return probabilities @ torch.arange(NUM_ANSWERS, dtype=torch.float32)


def squared_error(sums: list[tuple[int, int]]) -> Callable[..., tuple[torch.Tensor, dict[str, float]]]:
    """The loss of the ten candidates of each of `sums`."""
    truth = torch.tensor([float(a + b) for a, b in sums])

    def loss(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        error = ((expected_answers(data, logprobs) - truth) ** 2).mean()
        return error, {"rms": float(error.detach().sqrt())}

    return loss


def batch_of(tokenizer: Any, sums: list[tuple[int, int]]) -> list[types.Datum]:
    return [datum for pair in sums for datum in candidates(tokenizer, pair)]


def rms_error(client: tinker.TrainingClient, tokenizer: Any, sums: list[tuple[int, int]]) -> float:
    """The same number without a gradient: `forward` returns the log-probabilities."""
    data = batch_of(tokenizer, sums)
    outputs = client.forward(data, "cross_entropy").result().loss_fn_outputs
    logprobs = [torch.from_numpy(output["logprobs"].to_numpy().copy()) for output in outputs]
    return squared_error(sums)(data, logprobs)[1]["rms"]


def run(seed: int = 0, on_step: Callable[[int, float], None] = lambda step, rms: None) -> Report:
    """Train, and measure before and after on sums that training never saw."""
    report, rng = Report(), random.Random(seed)
    sums = rng.sample(SUMS, len(SUMS))
    held_out, training = sums[:NUM_HELD_OUT], sums[NUM_HELD_OUT:]
    with tinker.ServiceClient(display_name="custom loss") as service:
        client = service.create_lora_training_client(BASE_MODEL, rank=RANK, seed=seed).result()
        tokenizer = client.get_tokenizer()
        report.before = rms_error(client, tokenizer, held_out)
        for step in range(STEPS):
            batch = rng.sample(training, BATCH)
            passed = client.forward_backward_custom(batch_of(tokenizer, batch), squared_error(batch))
            client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE * (1 - step / STEPS)))
            report.errors.append(float(passed.result().metrics["rms"]))
            on_step(step + 1, report.errors[-1])
        report.after = rms_error(client, tokenizer, held_out)
    return report


def main() -> int:
    report = run(on_step=lambda step, rms: step % 5 or print(f"step {step:3}  off by {rms:.2f}", flush=True))
    print(f"held-out sums: off by {report.before:.2f} -> {report.after:.2f} (root mean square)")
    return 0 if report.after <= TARGET * report.before else 1


if __name__ == "__main__":
    sys.exit(main())
