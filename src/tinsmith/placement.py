"""Which worker processes a server has, and what each of them does: one a base model, or two of them.

Two compute at the same time, where one takes turns between training and sampling; each holds the base in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tinsmith.bases import BaseRef
from tinsmith.config import Settings
from tinsmith.types import Role


@dataclass(frozen=True, slots=True)
class Place:
    """Where one worker process works. slot: its lasting name in the store."""

    ref: BaseRef
    role: Role
    slot: str

    @property
    def child_name(self) -> str:
        return f"sampler {self.ref.name}" if self.role is Role.SAMPLE else f"worker {self.ref.name}"

    def bell(self, sockets: Path) -> Path:
        return sockets / f"worker-{self.slot}.sock"

    def settings(self, settings: Settings) -> Settings:
        """The server's settings as this process gets them."""
        if self.role is Role.SAMPLE and settings.sampler_device:
            return replace(settings, device=settings.sampler_device)
        return settings


def places(settings: Settings, refs: Sequence[BaseRef]) -> list[Place]:
    """In the order of `refs`; of each base the one that trains first."""
    if not settings.separate_sampler:
        return [Place(ref, Role.ALL, str(number)) for number, ref in enumerate(refs)]
    return [
        Place(ref, role, slot)
        for number, ref in enumerate(refs)
        for role, slot in ((Role.TRAIN, str(number)), (Role.SAMPLE, f"{number}-sample"))
    ]


def num_threads(settings: Settings, num_cores: int) -> int:
    """Compute threads of each worker: as set, or all cores, which a trainer and a sampler on them share."""
    return settings.threads or max(1, num_cores // (2 if settings.separate_sampler else 1))
