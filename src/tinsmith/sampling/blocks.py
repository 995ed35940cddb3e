"""Who may hold how much KV memory, in blocks of 64 tokens. Pure counting; the tensors are `kv`'s business.

A claim says how many blocks something holds and how many it may need in the end. A change is granted only if the
state stays safe in the sense of the banker's algorithm (Dijkstra 1965, EWD108): some order exists in which every
claim can get all it needs, finish and give everything back. So memory is handed out as sequences grow, not reserved
for their longest possible length, and still nothing is ever preempted and no two wait for each other.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

BLOCK_TOKENS = 64


def num_blocks(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` positions."""
    return -(-num_tokens // BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class Claim:
    """held: blocks taken now; need: the most it will ever hold, itself included."""

    held: int
    need: int


class BlockManager:
    """The ledger of `total` blocks."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._claims: dict[Hashable, Claim] = {}
        self._held = 0

    @property
    def num_held(self) -> int:
        return self._held

    def can_ever_hold(self, need: int) -> bool:
        return need <= self.total

    def try_update(self, changes: Mapping[Hashable, Claim | None]) -> bool:
        """Replace the named claims together (None removes one) if the state stays safe; else change nothing."""
        after = {**self._claims, **changes}
        claims = {key: claim for key, claim in after.items() if claim is not None}
        held = sum(claim.held for claim in claims.values())
        if not is_safe(self.total - held, claims):
            return False
        self._claims, self._held = claims, held
        return True

    def release(self, key: Hashable) -> None:
        """Give back everything that `key` holds; unknown keys hold nothing."""
        claim = self._claims.pop(key, None)
        if claim is not None:
            self._held -= claim.held


def is_safe(free: int, claims: Mapping[Hashable, Claim]) -> bool:
    """Whether, with `free` blocks left, all claims can be satisfied one after another in some order."""
    if free < 0:
        return False
    lacking = sorted((claim.need - claim.held, claim.held) for claim in claims.values())
    if not lacking or lacking[-1][0] <= free:
        return True
    for lack, held in lacking:
        if lack > free:
            return False
        free += held
    return True
