"""Whose adapter serves which rows of a walk, as the experts of a layer want to know it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from tinsmith.model.lora import Segment
from tinsmith.sampling.lora import Adapter

Owned = tuple[int, int, Adapter | None]  # rows first..last-1 of the walk


def expert_segments(rows: Iterable[Owned]) -> list[Segment]:
    """A segment for each stretch of rows whose adapter has experts."""
    return [
        Segment(first, last, adapter.matrices, None, experts=adapter.experts)
        for first, last, adapter in rows
        if adapter is not None and adapter.experts
    ]


def merged(rows: Iterable[Owned]) -> list[Owned]:
    """Neighbours with one adapter as one stretch."""
    found: list[Owned] = []
    for first, last, adapter in rows:
        if found and found[-1][1] == first and found[-1][2] is adapter:
            found[-1] = found[-1][0], last, adapter
        else:
            found.append((first, last, adapter))
    return found


def shifted(segments: Sequence[Segment], by: int) -> list[Segment]:
    """The same so many rows later."""
    return [replace(segment, start=segment.start + by, end=segment.end + by) for segment in segments]
