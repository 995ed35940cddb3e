"""Who may hold how much KV memory, in blocks of 64 tokens. Pure counting; the tensors are `kv`'s business.

Whatever is free is granted. Nobody knows how long an answer will be, so sequences start on what they hold now; when
none is left, somebody has to give back (`preemption` says who).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping

BLOCK_TOKENS = 64


def num_blocks(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` positions."""
    return -(-num_tokens // BLOCK_TOKENS)


class FreeBlocks:
    """Of `total` blocks; one owner holds at most `owner_total`, so the blocks above it are there for others at any
    time."""

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
        """Whether it is its own bound that keeps the owner from one more block."""
        return self._by_owner[owner] >= self._owner_total

    def try_update(self, changes: Mapping[Hashable, int | None], owner: str = "", spare: int = 0) -> bool:
        """Have the named things of `owner` hold so many blocks (None: nothing) if there are as many; else change
        nothing.

        spare: blocks that have to stay free while anything else is held.
        """
        before = sum(self._held.get(key, 0) for key in changes)
        more = sum(held for held in changes.values() if held is not None) - before
        if more > 0:
            kept_free = spare if self._num_held > before else 0
            if self._num_held + more + kept_free > self.total or self._by_owner[owner] + more > self._owner_total:
                return False
        for key, held in changes.items():
            self._held.pop(key, None)
            if held is not None:
                self._held[key] = held
        self._add(owner, more)
        return True

    def release(self, key: Hashable, owner: str = "") -> None:
        """Give back everything that `key` of `owner` holds; unknown keys hold nothing."""
        if key in self._held:
            self._add(owner, -self._held.pop(key))

    def _add(self, owner: str, blocks: int) -> None:
        self._num_held += blocks
        self._by_owner[owner] += blocks
        if not self._by_owner[owner]:
            del self._by_owner[owner]
