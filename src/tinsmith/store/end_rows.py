"""Ends of sample requests, as a sampler's clients ask for them."""

from __future__ import annotations

from dataclasses import dataclass

from tinsmith.types import OpId, OpState, SamplerId


@dataclass(frozen=True, slots=True)
class Ended:
    """A sample request that has ended; `num` is its place among its sampler's."""

    num: int
    op_id: OpId
    state: OpState
    result_bytes: int


@dataclass(frozen=True, slots=True)
class EndsAfter:
    """Any end of a request of this sampler after its `num`th."""

    sampler_id: SamplerId
    num: int
