"""What a key may be used for. Each scope holds those before it."""

from __future__ import annotations

from enum import StrEnum


class Scope(StrEnum):
    READ = "read"  # look at what the tenant has and did
    SAMPLE = "sample"  # and sample from it
    FULL = "full"  # and train, save, share, hand out and delete
    ADMIN = "admin"  # and manage keys, and see every tenant's usage and audit log

    def allows(self, needed: Scope) -> bool:
        return ORDER.index(self) >= ORDER.index(needed)


ORDER = tuple(Scope)
