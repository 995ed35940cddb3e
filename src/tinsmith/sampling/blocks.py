"""Who may hold how much KV memory, in blocks of 64 tokens. Pure counting; the tensors are `kv`'s business.

A claim says how many blocks something holds and how many it may need in the end. A change is granted only if the
state stays safe in the sense of the banker's algorithm (Dijkstra 1965, EWD108): some order exists in which every
claim can get all it needs, finish and give everything back. So memory is handed out as sequences grow, not reserved
for their longest possible length, and still nothing is ever preempted and no two wait for each other.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
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
    """The ledger of `total` blocks.

    owner_total: what the claims of one owner may come to, at least what any one of them can need; within that, too, its
    state stays safe. So the blocks above it are there for others at any time.
    """

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

    def try_update(self, changes: Mapping[Hashable, Claim | None], owner: str = "") -> bool:
        """Replace the named claims of `owner` together (None removes one) if the state stays safe; else change nothing.

        The order that lets all finish takes the smallest lack first, of all owners and so of each: what is safe for
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
        """Give back everything that `key` of `owner` holds; unknown keys hold nothing."""
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
