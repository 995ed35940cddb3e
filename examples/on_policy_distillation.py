"""On-policy distillation: the student writes, the teacher says of every token how likely it finds it.

The teacher is a run that was taught single-digit addition with right answers (with a larger model of its own, any
sampling client will do). The student is a fresh adapter that is right about every second time and never sees an answer:
it samples, the teacher's `compute_logprobs` looks at the sampled tokens, and the negative reverse KL of each token,
teacher's minus student's log-probability, is that token's advantage in `importance_sampling`.

    export TINKER_BASE_URL=... TINKER_API_KEY=...
    python examples/on_policy_distillation.py
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
TEACHER_STEPS = 16
STEPS = 10
BATCH = 16
GROUP_SIZE = 4
LEARNING_RATE = 2e-3
TARGET = 0.85

SUMS = list(itertools.product(range(10), repeat=2))


@dataclass
class Report:
    """Of teacher and student on fresh samples: share of right sums; of the student: reverse KL in nats a token."""

    teacher: float = float("nan")
    before: float = float("nan")
    after: float = float("nan")
    kl_before: float = float("nan")
    kl_after: float = float("nan")
    kls: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Rollout:
    """One sampled answer with both models' log-probabilities of its tokens, [tokens of the answer]."""

    sums: tuple[int, int]
    prompt: list[int]
    tokens: list[int]
    student: np.ndarray
    teacher: np.ndarray

    @property
    def reverse_kl(self) -> np.ndarray:
        """The one-sample estimate of each token's KL(student || teacher)."""
        return self.student - self.teacher


def prompt_tokens(tokenizer: Any, sums: tuple[int, int]) -> list[int]:
    text = f"<|im_start|>user\nWhat is {sums[0]} + {sums[1]}?<|im_end|>\n<|im_start|>assistant\n"
    return list(tokenizer.encode(text))


def is_right(tokenizer: Any, sums: tuple[int, int], tokens: list[int]) -> bool:
    return bool(tokenizer.decode(tokens, skip_special_tokens=True).strip() == str(sum(sums)))


def train_teacher(service: tinker.ServiceClient, rng: random.Random) -> tinker.SamplingClient:
    """Plain supervised training on right answers; all steps are submitted before the first is waited for."""
    client = service.create_lora_training_client(BASE_MODEL, rank=16, seed=1).result()
    tokenizer = client.get_tokenizer()
    for step in range(TEACHER_STEPS):
        batch = []
        for sums in rng.sample(SUMS, 32):
            prompt = prompt_tokens(tokenizer, sums)
            tokens = prompt + tokenizer.encode(f"{sum(sums)}<|im_end|>")
            weights = [0.0] * (len(prompt) - 1) + [1.0] * (len(tokens) - len(prompt))
            batch.append(
                types.Datum(
                    model_input=types.ModelInput.from_ints(tokens[:-1]),
                    loss_fn_inputs={
                        "target_tokens": np.array(tokens[1:]),
                        "weights": np.array(weights, dtype=np.float32),
                    },
                )
            )
        client.forward_backward(batch, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=2e-3 * (1 - step / TEACHER_STEPS)))
    return client.save_weights_and_get_sampling_client().result()


def rollouts(
    student: tinker.SamplingClient,
    teacher: tinker.SamplingClient,
    tokenizer: Any,
    sums: list[tuple[int, int]],
    size: int,
    rng: random.Random,
) -> list[Rollout]:
    """`size` answers of the student to each sum, every token judged by the teacher; the same answer only once."""
    prompts = [prompt_tokens(tokenizer, pair) for pair in sums]
    sampled = [
        student.sample(
            types.ModelInput.from_ints(prompt),
            num_samples=size,
            sampling_params=types.SamplingParams(max_tokens=6, temperature=1.0, seed=rng.randrange(2**31)),
        )
        for prompt in prompts
    ]
    answers = [
        (pair, prompt, answer)
        for pair, prompt, future in zip(sums, prompts, sampled, strict=True)
        for answer in future.result().sequences
    ]
    distinct = {(*prompt, *answer.tokens) for _, prompt, answer in answers}
    futures = {tokens: teacher.compute_logprobs(types.ModelInput.from_ints(tokens)) for tokens in distinct}
    judged = {tokens: np.array(future.result()[1:]) for tokens, future in futures.items()}
    return [
        Rollout(
            pair, prompt, list(answer.tokens), np.array(answer.logprobs),
            judged[*prompt, *answer.tokens][len(prompt) - 1 :],
        )
        for pair, prompt, answer in answers
    ]  # fmt: skip


def datum(rollout: Rollout) -> types.Datum:
    tokens, pad = rollout.prompt + rollout.tokens, [0.0] * (len(rollout.prompt) - 1)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": np.array(tokens[1:]),
            "logprobs": np.concatenate([pad, rollout.student]).astype(np.float32),
            "advantages": np.concatenate([pad, -rollout.reverse_kl]).astype(np.float32),
        },
    )


def mean_kl(batch: list[Rollout]) -> float:
    return float(np.mean(np.concatenate([rollout.reverse_kl for rollout in batch])))


def run(seed: int = 0, on_step: Callable[[int, float], None] = lambda step, kl: None) -> Report:
    """Train both, and measure the student before and after with fresh samples of all hundred sums."""
    report, rng = Report(), random.Random(seed)
    with tinker.ServiceClient(display_name="on-policy distillation") as service:
        teacher = train_teacher(service, rng)
        client = service.create_lora_training_client(BASE_MODEL, rank=16, seed=2 + seed).result()
        tokenizer = client.get_tokenizer()

        def measure(sampler: tinker.SamplingClient) -> tuple[float, float]:
            fresh = rollouts(sampler, teacher, tokenizer, SUMS, 2, rng)
            return float(np.mean([is_right(tokenizer, r.sums, r.tokens) for r in fresh])), mean_kl(fresh)

        student = client.save_weights_and_get_sampling_client().result()
        report.teacher = measure(teacher)[0]
        report.before, report.kl_before = measure(student)
        for step in range(STEPS):
            batch = rollouts(student, teacher, tokenizer, rng.sample(SUMS, BATCH), GROUP_SIZE, rng)
            client.forward_backward([datum(rollout) for rollout in batch], "importance_sampling")
            client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE * (1 - step / STEPS)))
            student = client.save_weights_and_get_sampling_client().result()
            report.kls.append(mean_kl(batch))
            on_step(step + 1, report.kls[-1])
        report.after, report.kl_after = measure(student)
    return report


def main() -> int:
    report = run(on_step=lambda step, kl: step % 4 or print(f"step {step:3}  reverse KL {kl:.3f} nats a token"))
    print(f"teacher {report.teacher:.0%} right; student {report.before:.0%} -> {report.after:.0%}")
    print(f"reverse KL on fresh samples: {report.kl_before:.3f} -> {report.kl_after:.3f} nats a token")
    return 0 if report.after >= TARGET and report.kl_after < report.kl_before / 2 else 1


if __name__ == "__main__":
    sys.exit(main())
