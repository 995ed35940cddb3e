"""Who gives its memory back when none is left. Pure: a function of who holds how much, and since when.

The youngest of the tenant that holds most gives way, and the oldest of all never does: it can always have what the
others hold, so it ends, and then the next one is the oldest. What gave way keeps its age. So it comes back before
anything younger, and gives way again only to what is older still.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from tinsmith.sampling.sequence import Recompute, Request, Sequence

Holder = Request | Recompute | Sequence  # a prompt in memory, or a sequence that is decoded

SPARE_SHARE = 8  # at most so large a part of the memory is left free for sequences that grow
GROWERS_SHARE = 4  # sequences for each of which one block is left free when others come in


@dataclass(slots=True)
class PreemptionCounts:
    """num_preempted: how often a sequence or a prompt gave its memory back. num_recomputed: tokens computed again."""

    num_preempted: int = 0
    num_recomputed: int = 0


def choose_victim(
    holders: Collection[Holder], held_by: Callable[[str], int], tenant: str | None = None
) -> Holder | None:
    """Who has to give back. None: there is nobody but the oldest.

    Args:
        held_by: blocks of a tenant.
        tenant: only this one's, since it is at its own bound.
    """
    oldest = min(holders, key=lambda holder: holder.age, default=None)
    others = [h for h in holders if h is not oldest and (tenant is None or h.tenant == tenant)]
    if not others:
        return None
    youngest = {holder.tenant: holder for holder in sorted(others, key=lambda holder: holder.age)}
    return max(youngest.values(), key=lambda holder: (held_by(holder.tenant), holder.age))


def spare_blocks(total: int, num_running: int, num_preempted: int = 0) -> int:
    """Blocks to leave free when something comes in: for those that run, to grow into for a while.

    num_preempted: how often the one that comes in had to leave; each time more has to be free.
    """
    return min(total // SPARE_SHARE, -(-num_running // GROWERS_SHARE) * (1 + num_preempted))
