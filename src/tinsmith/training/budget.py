"""How many tokens a pack may have: what the free memory holds, but no more than is of use.

Owns the figure and how it moves. Running out of memory lowers it, packs that went well raise it again, slowly. What is
free is looked at now and then, since runs and samples come and go. Nothing here waits or computes.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
import torch

from tinsmith.config import Settings
from tinsmith.model.device import free_bytes
from tinsmith.training.footprint import Footprint
from tinsmith.training.shortage import reclaim

log = structlog.get_logger("tinsmith.worker")

USEFUL_TOKENS = {"cpu": 2048, "cuda": 65536}  # more at once computes no faster, and on a CPU leaves the caches
MIN_TOKENS = 64
MARGIN = 1.2  # padding inside attention, and what an operation needs for itself
RESERVE_SHARE = 1 / 8  # of what is free
RESERVE_BYTES = 128 * 2**20
LOOK_EVERY = 32  # asks
GROWTH = 1 / 16
EVERYTHING = 1 << 60


class Budget:
    """The bounds of packs on one device. Until `start` nothing is known of memory, and everything fits."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self._device = device
        self._number = settings.pass_max_tokens
        self._useful = USEFUL_TOKENS[device.type]
        self._num_workers = len(settings.base_model) * settings.workers_per_base
        self._checkpointing = settings.activation_checkpointing
        self._footprint: Footprint | None = None
        self._reserved: Callable[[], int] = lambda: 0
        self._held = EVERYTHING  # tokens whose activations the free memory holds
        self._learnt = EVERYTHING  # tokens that didn't run out of memory
        self._asked = 0

    def start(self, footprint: Footprint, reserved: Callable[[], int] = lambda: 0) -> None:
        """Go by memory from now on. reserved: bytes that others will yet take of what is free."""
        self._footprint = footprint
        self._reserved = reserved
        self._look()
        free = self.free_bytes()
        log.info(
            "pass budget",
            tokens=self.tokens,
            free_mib=None if free is None else free >> 20,
            token_bytes=round(footprint.kept),
            checkpointed_token_bytes=round(footprint.recomputed),
        )

    @property
    def tokens(self) -> int:
        """The bound of the next pack."""
        self._asked += 1
        if self._asked % LOOK_EVERY == 0:
            self._look()
        by_memory = max(MIN_TOKENS, min(self._useful, self._held))
        return min(self._number or by_memory, self._learnt)

    @property
    def always_recomputes(self) -> bool:
        return self._checkpointing == "always"

    @property
    def may_recompute(self) -> bool:
        return self._checkpointing != "never"

    def free_bytes(self) -> int | None:
        """What passes can take here; None if it isn't known. Workers of other bases have equal shares of it."""
        free = free_bytes(self._device)
        return free if free is None or self._device.type == "cuda" else free // self._num_workers

    def can_keep(self, num_tokens: int) -> bool:
        """Whether the activations of a sequence of so many tokens fit, with room to spare."""
        if num_tokens <= self._held:
            return True
        self._look()
        return num_tokens <= self._held

    def shortfall(self, num_tokens: int, *, recompute: bool) -> tuple[int, int] | None:
        """(needed, free) in bytes, if a sequence of so many tokens can't be computed at all."""
        if self._footprint is None:
            return None
        needed = self._footprint.needed(num_tokens, recompute=recompute)
        free = self.free_bytes()
        if free is not None and needed > free:
            reclaim()
            free = self.free_bytes()
        return (needed, free) if free is not None and needed > free else None

    def needed(self, num_tokens: int, *, recompute: bool) -> int | None:
        """Bytes for a sequence of so many tokens; None before `start`."""
        return None if self._footprint is None else self._footprint.needed(num_tokens, recompute=recompute)

    def ran_out(self, num_tokens: int) -> int:
        """There was no memory for a pack of so many. The bound that follows from it."""
        bound = max(1, num_tokens // 2)
        self._learnt = min(self._learnt, bound)
        log.warning("out of memory: the pass begins again in smaller packs", pack_tokens=num_tokens, budget=bound)
        return bound

    def went_well(self, num_tokens: int) -> None:
        """A pack of so many was computed; one that filled half of a lowered bound raises it."""
        if self._learnt == EVERYTHING or 2 * num_tokens < self._learnt:
            return
        self._learnt += max(1, int(self._learnt * GROWTH))
        if self._learnt >= (self._number or self._useful):
            self._learnt = EVERYTHING
            log.info("pass budget", tokens=self.tokens)

    def _look(self) -> None:
        free = self.free_bytes()
        if self._footprint is None or free is None:
            return
        reserve = max(RESERVE_BYTES, int(free * RESERVE_SHARE)) + self._reserved()
        usable = free - reserve - self._footprint.head
        per_token = self._footprint.recomputed if self.always_recomputes else self._footprint.kept
        self._held = max(0, int(usable / (per_token * MARGIN)))
