"""How training sequences are laid into passes: pure functions of lengths and budgets.

What stays true, since bits depend on it: a pass is cut only between two data, in (run, seq, datum) order; the length
that a sequence is padded to inside attention follows from its own length alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tinsmith.types import TrainItem

MIN_CLASS = 16
CLASSES_PER_OCTAVE = 4


@dataclass(frozen=True, slots=True)
class DatumRef:
    """The `datum`-th datum of the `item`-th item of a pass."""

    item: int
    datum: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of one length class, by index, in order."""

    length: int
    members: tuple[int, ...]


def list_data(items: Sequence[TrainItem]) -> list[DatumRef]:
    """All data of the items, in order."""
    return [DatumRef(i, d, datum.num_tokens) for i, item in enumerate(items) for d, datum in enumerate(item.data)]


def num_fitting(works: Sequence[int], max_work: int) -> int:
    """How many sequences from the front fit into `max_work`; at least one, if there is one."""
    total = 0
    for count, work in enumerate(works):
        total += work
        if total > max_work and count:
            return count
    return len(works)


def length_class(num_tokens: int) -> int:
    """The length that a sequence is padded to inside attention: four classes an octave, at most a quarter too long."""
    octave = (num_tokens - 1).bit_length() - 1
    step = max(MIN_CLASS, (1 << max(octave, 0)) // CLASSES_PER_OCTAVE)
    return -(-num_tokens // step) * step


def bucketed(lengths: Sequence[int]) -> list[Bucket]:
    """The sequences by length class, shortest class first."""
    members: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        members.setdefault(length_class(length), []).append(index)
    return [Bucket(length, tuple(members[length])) for length in sorted(members)]


def pieces(num_tokens: int, chunk_tokens: int) -> Iterator[tuple[int, int]]:
    """A sequence cut on a grid that starts at its own first token: (start, end) within the sequence."""
    for start in range(0, num_tokens, chunk_tokens):
        yield start, min(start + chunk_tokens, num_tokens)
