"""Which worker processes a server has, and what each of them does: one a base model, or several of them.

Several compute at the same time; each holds the base in memory. They share the base's queue, each with runs of its own,
or one of them samples while the others train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tinsmith.bases.catalog import BaseRef
from tinsmith.config import Settings
from tinsmith.types import Role


@dataclass(frozen=True, slots=True)
class Place:
    """Where one worker process works. slot: its lasting name in the store; nth: of its base and role, from 1."""

    ref: BaseRef
    role: Role
    slot: str
    nth: int = 1

    @property
    def child_name(self) -> str:
        kind = "sampler" if self.role is Role.SAMPLE else "worker"
        return f"{kind} {self.ref.name}" + (f" {self.nth}" if self.nth > 1 else "")

    def bell(self, sockets: Path) -> Path:
        return sockets / f"worker-{self.slot}.sock"

    def settings(self, settings: Settings) -> Settings:
        """The server's settings as this process gets them."""
        if self.role is Role.SAMPLE and settings.sampler_device:
            return replace(settings, device=settings.sampler_device)
        return settings


def places(settings: Settings, refs: Sequence[BaseRef]) -> list[Place]:
    """In the order of `refs`; of each base those that train first."""
    found = []
    for number, ref in enumerate(refs):
        role = Role.TRAIN if settings.separate_sampler else Role.ALL
        for nth in range(1, settings.workers_per_base + 1):
            found.append(Place(ref, role, str(number) if nth == 1 else f"{number}-{nth}", nth))
        if settings.separate_sampler:
            found.append(Place(ref, Role.SAMPLE, f"{number}-sample"))
    return found


def num_threads(settings: Settings, num_cores: int) -> int:
    """Compute threads of each worker: as set, or all cores, which the workers of a base share."""
    return settings.threads or max(1, num_cores // (settings.workers_per_base + settings.separate_sampler))
