"""Who may hold how much KV memory, in blocks of 64 tokens. Pure counting; the tensors are `kv`'s business.

A claim says how many blocks something holds and how many it may need in the end. There are two ledgers.

`FreeBlocks` grants whatever is free. Nobody knows how long an answer will be, so sequences start on what they hold now;
when none is left, somebody has to give back (`preemption` says who).

`BlockManager` grants a change only if the state stays safe in the sense of the banker's algorithm (Dijkstra 1965,
EWD108): some order exists in which every claim can get all it needs, finish and give everything back. So nothing ever
gives back before it ends, and no two wait for each other; where each may need all, one at a time is decoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

BLOCK_TOKENS = 64


def num_blocks(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` positions."""
    return -(-num_tokens // BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class Claim:
    """held: blocks taken now; need: the most it will ever hold, itself included."""

    held: int
    need: int


class Ledger(Protocol):
    """Of `total` blocks; the claims of one owner may come to `owner_total`, at least what any one of them can need. So
    the blocks above it are there for others at any time."""

    @property
    def num_held(self) -> int: ...

    def held_by(self, owner: str) -> int: ...

    def is_at_bound(self, owner: str) -> bool:
        """Whether it is its own bound that keeps the owner from one more block."""
        ...

    def try_update(self, changes: Mapping[Hashable, Claim | None], owner: str = "", spare: int = 0) -> bool:
        """Replace the named claims of `owner` together (None removes one) if that is granted; else change nothing.

        spare: blocks that have to stay free while anything else is held.
        """
        ...

    def release(self, key: Hashable, owner: str = "") -> None:
        """Give back everything that `key` of `owner` holds; unknown keys hold nothing."""
        ...


class FreeBlocks:
    """A `Ledger` that looks at what is held, never at what may be needed."""

    def __init__(self, total: int, owner_total: int | None = None) -> None:
        self.total = total
        self._owner_total = total if owner_total is None else owner_total
        self._held: dict[Hashable, int] = {}
        self._by_owner: Counter[str] = Counter()
        self._num_held = 0

    @property
    def num_held(self) -> int:
        return self._num_held

    def held_by(self, owner: str) -> int:
        return self._by_owner[owner]

    def is_at_bound(self, owner: str) -> bool:
        return self._by_owner[owner] >= self._owner_total

    def try_update(self, changes: Mapping[Hashable, Claim | None], owner: str = "", spare: int = 0) -> bool:
        before = sum(self._held.get(key, 0) for key in changes)
        more = sum(claim.held for claim in changes.values() if claim is not None) - before
        if more > 0:
            kept_free = spare if self._num_held > before else 0
            if self._num_held + more + kept_free > self.total or self._by_owner[owner] + more > self._owner_total:
                return False
        for key, claim in changes.items():
            self._held.pop(key, None)
            if claim is not None:
                self._held[key] = claim.held
        self._add(owner, more)
        return True

    def release(self, key: Hashable, owner: str = "") -> None:
        if key in self._held:
            self._add(owner, -self._held.pop(key))

    def _add(self, owner: str, blocks: int) -> None:
        self._num_held += blocks
        self._by_owner[owner] += blocks
        if not self._by_owner[owner]:
            del self._by_owner[owner]


class BlockManager:
    """A `Ledger` whose state is safe at any time, within each owner's bound too. Needs no spare blocks."""

    def __init__(self, total: int, owner_total: int | None = None) -> None:
        self.total = total
        self._owner_total = total if owner_total is None else owner_total
        self._claims: dict[Hashable, Claim] = {}
        self._by_owner: dict[str, dict[Hashable, Claim]] = {}
        self._held = 0

    @property
    def num_held(self) -> int:
        return self._held

    def held_by(self, owner: str) -> int:
        return _held(self._by_owner.get(owner, {}).values())

    def is_at_bound(self, owner: str) -> bool:
        return self.held_by(owner) >= self._owner_total

    def try_update(self, changes: Mapping[Hashable, Claim | None], owner: str = "", spare: int = 0) -> bool:
        """The order that lets all finish takes the smallest lack first, of all owners and so of each: what is safe for
        each within its own total and for all within theirs is safe in both at once.
        """
        own = _changed(self._by_owner.get(owner, {}), changes)
        if not is_safe(self._owner_total - _held(own.values()), own.values()):
            return False
        claims = _changed(self._claims, changes)
        held = _held(claims.values())
        if not is_safe(self.total - held, claims.values()):
            return False
        self._claims, self._held, self._by_owner[owner] = claims, held, own
        return True

    def release(self, key: Hashable, owner: str = "") -> None:
        claim = self._claims.pop(key, None)
        if claim is not None:
            self._held -= claim.held
            own = self._by_owner[owner]
            del own[key]
            if not own:
                del self._by_owner[owner]


def is_safe(free: int, claims: Collection[Claim]) -> bool:
    """Whether, with `free` blocks left, all claims can be satisfied one after another in some order."""
    if free < 0:
        return False
    lacking = sorted((claim.need - claim.held, claim.held) for claim in claims)
    if not lacking or lacking[-1][0] <= free:
        return True
    for lack, held in lacking:
        if lack > free:
            return False
        free += held
    return True


def _held(claims: Collection[Claim]) -> int:
    return sum(claim.held for claim in claims)


def _changed(claims: Mapping[Hashable, Claim], changes: Mapping[Hashable, Claim | None]) -> dict[Hashable, Claim]:
    return {key: claim for key, claim in {**claims, **changes}.items() if claim is not None}
