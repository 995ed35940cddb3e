"""Ten losses as users write them, for tests of uploaded losses: per datum, (logprobs, *inputs) -> (loss, metrics)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tinker.lib.public_interfaces.custom_loss import LossHandle, encode_graph, trace_loss
from torch import Tensor

from tinsmith.wire.media import encode_json

Result = tuple[Tensor, Mapping[str, Tensor]]


def cross_entropy(logprobs: Tensor, weights: Tensor) -> Result:
    loss = -(logprobs * weights).sum()
    return loss, {"custom/nll:sum": loss.detach(), "custom/weight:mean": weights.mean()}


def dpo(logprobs: Tensor, ref: Tensor, chosen: Tensor, rejected: Tensor, beta: Tensor) -> Result:
    """A pair in one datum, marked by two masks. arXiv 2305.18290, eq. 7."""
    log_ratio = logprobs - ref
    margin = beta * ((log_ratio * chosen).sum() - (log_ratio * rejected).sum())
    loss = -F.logsigmoid(margin)
    return loss, {"custom/margin:mean": margin, "custom/accuracy:mean": (margin > 0).float()}


def gspo(logprobs: Tensor, q: Tensor, advantages: Tensor, mask: Tensor) -> Result:
    fixed = logprobs.detach()
    ratio = torch.exp(((fixed - q) * mask).sum() / mask.sum()) * torch.exp(logprobs - fixed)
    clipped = ratio.clamp(0.8, 1.2)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).sum()
    return loss, {"custom/ratio:mean": ratio.mean(), "custom/clipped:sum": (ratio != clipped).sum()}


def ppo_with_kl(logprobs: Tensor, q: Tensor, advantages: Tensor) -> Result:
    delta = logprobs - q
    ratio = delta.exp()
    surrogate = torch.min(ratio * advantages, torch.clamp(ratio, min=0.8, max=1.2) * advantages)
    kl = torch.expm1(-delta) + delta
    return -(surrogate - 0.1 * kl).sum(), {"custom/kl:sum": kl.sum()}


def ipo(logprobs: Tensor, ref: Tensor, chosen: Tensor, rejected: Tensor) -> Result:
    log_ratio = logprobs - ref
    gap = (log_ratio * chosen).sum() / chosen.sum() - (log_ratio * rejected).sum() / rejected.sum()
    return (gap - 1 / (2 * 0.1)) ** 2, {"custom/gap:mean": gap}


def simpo(logprobs: Tensor, chosen: Tensor, rejected: Tensor) -> Result:
    mean_chosen = torch.where(chosen > 0, logprobs, torch.zeros_like(logprobs)).sum() / chosen.sum()
    mean_rejected = logprobs.masked_fill(rejected == 0, 0.0).sum() / rejected.sum().clamp_min(1.0)
    return F.softplus(-(2.0 * (mean_chosen - mean_rejected) - 0.5)), {}


def focal(logprobs: Tensor, weights: Tensor) -> Result:
    p = logprobs.exp()
    loss = -(weights * (1 - p) ** 2 * logprobs).sum()
    return loss, {"custom/confident:sum": (p > 0.5).sum()}


def quantile_of_tokens(logprobs: Tensor) -> Result:
    """The mean of the worse half: sorting, slicing, sizes."""
    worst = torch.sort(logprobs)[0][: logprobs.shape[0] // 2 + 1]
    return -worst.mean() * logprobs.shape[0], {"custom/worst:mean": worst[0]}


def answers(logprobs: Tensor, truth: Tensor) -> Result:
    """Targets [T, K]: the expected answer among K, against the right one."""
    p = logprobs.softmax(dim=-1)
    values = torch.arange(logprobs.size(1), device=logprobs.device, dtype=logprobs.dtype)
    error = p @ values - truth
    return F.huber_loss(error, torch.zeros_like(error), reduction="sum"), {
        "custom/rms:mean": error.square().mean().sqrt()
    }


def pairwise(logprobs: Tensor, rewards: Tensor) -> Result:
    """Every two tokens against each other: broadcasting, masks, logsumexp."""
    gaps = logprobs[:, None] - logprobs[None, :]
    better = (rewards[:, None] > rewards.unsqueeze(0)).float()
    loss = (F.softplus(-gaps) * better).sum() / better.sum() + 0.01 * torch.logsumexp(logprobs, dim=0)
    return loss, {"custom/pairs:sum": better.sum(), "custom/loss:mean": loss}


RANKS: dict[Callable[..., Result], dict[str, int]] = {
    cross_entropy: {"logprobs": 1, "weights": 1},
    dpo: {"logprobs": 1, "ref": 1, "chosen": 1, "rejected": 1, "beta": 0},
    gspo: {"logprobs": 1, "q": 1, "advantages": 1, "mask": 1},
    ppo_with_kl: {"logprobs": 1, "q": 1, "advantages": 1},
    ipo: {"logprobs": 1, "ref": 1, "chosen": 1, "rejected": 1},
    simpo: {"logprobs": 1, "chosen": 1, "rejected": 1},
    focal: {"logprobs": 1, "weights": 1},
    quantile_of_tokens: {"logprobs": 1},
    answers: {"logprobs": 2, "truth": 1},
    pairwise: {"logprobs": 1, "rewards": 1},
}
NUM_ANSWERS = 5


def make_inputs(rng: np.random.Generator, fn: Callable[..., Result], length: int, lp: Any = None) -> dict[str, Any]:
    """The loss_fn_inputs that the loss reads, beside target_tokens. lp: log-probabilities that ratios lie around."""
    marks = rng.integers(0, 2, length).astype(np.float32)
    marks[:2] = (0, 1)
    around = np.full(length, -5.0) if lp is None else lp
    made: dict[str, Any] = {
        "weights": rng.normal(size=length),
        "advantages": rng.normal(size=length),
        "rewards": rng.normal(size=length),
        "truth": rng.uniform(0, NUM_ANSWERS - 1, length),
        "mask": marks,
        "chosen": marks,
        "rejected": 1 - marks,
        "beta": np.array(0.3),
    }
    if around.ndim == 1:
        made["q"] = made["ref"] = around + rng.normal(0, 0.3, length)
    return {name: np.asarray(made[name], np.float32) for name in RANKS[fn] if name != "logprobs"}


def trace(fn: Callable[..., Result], ranks: dict[str, int] | None = None) -> LossHandle:
    return trace_loss(fn, ranks or RANKS[fn], "session")  # type: ignore[arg-type]


def upload(handle: LossHandle) -> bytes:
    """The body of the request with which the SDK uploads a loss."""
    inputs = [loss_input.model_dump() for loss_input in handle.inputs]
    body = {"session_id": "session", "custom_loss_seq_id": 0, "type": "create_custom_loss"}
    return encode_json(
        {**body, "name": handle.name, "inputs": inputs, "graph": encode_graph(handle).model_dump(mode="json")}
    )
