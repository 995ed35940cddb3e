"""A custom loss as plain data: the calls of a traced function, in order, and what it returns.

Every value of a loss has a number: its inputs come first (`logprobs` is 0), then one for each call. A call refers to
values before it alone, so there are no loops. Nothing here can be executed; `training.graph` does that.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import EllipsisType
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Ref:
    """A value that was computed before."""

    value: int


@dataclass(frozen=True, slots=True)
class Dtype:
    """float32, float64, int64, int32 or bool."""

    name: str


@dataclass(frozen=True, slots=True)
class Span:
    """A slice of an index."""

    start: Arg
    stop: Arg
    step: Arg


Scalar: TypeAlias = bool | int | float | str | None
Arg: TypeAlias = "Ref | Dtype | Span | Scalar | EllipsisType | tuple[Arg, ...]"


@dataclass(frozen=True, slots=True)
class LossInput:
    """rank 0: a scalar, 1: [T], 2: [T, K]."""

    name: str
    rank: int


@dataclass(frozen=True, slots=True)
class LossCall:
    """`target`: a key of `wire.loss_ops.CALLS`. `node`: what the client calls it, for messages."""

    node: str
    target: str
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...]


@dataclass(frozen=True, slots=True)
class LossGraph:
    """`inputs`: logprobs, then the `loss_fn_inputs` that the loss reads. `loss`, `metrics`: numbers of values."""

    name: str
    inputs: tuple[LossInput, ...]
    calls: tuple[LossCall, ...]
    loss: int
    metrics: tuple[tuple[str, int], ...]
