"""Named places at which a test can make the process die as if the power had failed.

Owns nothing but a name and a countdown, set by `arm` from the code that starts a process; it reads no environment.
Unarmed, which is always outside of tests, a crash point costs one look at a variable. SIGKILL runs no handlers and
flushes nothing: what is on disk then is what a real crash leaves.
"""

from __future__ import annotations

import os
import signal

from tinsmith.errors import ConfigError

NAMES = frozenset(
    {
        "api.after_payload_file",
        "audit.before_trim_commit",
        "backup.before_manifest",
        "backup.half_copied",
        "blob.after_rename",
        "blob.before_rename",
        "give.after_choice",
        "give.after_release",
        "give.on_disk",
        "gone.after_mark",
        "gone.after_state",
        "gone.before_clear_commit",
        "gone.before_mark_commit",
        "gone.half_cleared",
        "janitor.after_spare",
        "janitor.before_delete",
        "janitor.half_deleted",
        "load.after_import",
        "migrate.after_commit",
        "migrate.before_commit",
        "optim.after_step",
        "optim.half_done",
        "pass.after_merge",
        "pass.after_pack",
        "pass.half_merged",
        "recorder.after_result_files",
        "recorder.before_ring",
        "repair.half_done",
        "restore.half_moved",
        "run.after_eviction",
        "run.after_fallback",
        "run.after_lease",
        "run.after_restore",
        "run.before_release",
        "sample.before_record",
        "sampler.after_file",
        "sampler.after_row",
        "sampler.before_file",
        "sampler.published",
        "save.after_file",
        "save.before_file",
        "snapshot.after_file",
        "snapshot.after_prune",
        "snapshot.after_row",
        "snapshot.before_file",
        "snapshot.half_deleted",
        "store.after_claim",
        "store.after_enqueue_commit",
        "store.after_finish_commit",
        "store.before_claim_commit",
        "store.before_enqueue_commit",
        "store.before_finish_commit",
        "store.before_lease_commit",
        "store.before_prune_commit",
        "store.before_release_commit",
        "store.before_snapshot_commit",
        "usage.before_move_commit",
    }
)

_armed: str | None = None
_remaining = 0


def arm(name: str, after: int = 0) -> None:
    """Die at the point `name`, once it has been passed `after` times.

    Raises:
        ConfigError: no such point.
    """
    global _armed, _remaining
    if name not in NAMES:
        raise ConfigError(f"no crash point {name!r}; there are {', '.join(sorted(NAMES))}")
    _armed, _remaining = name, after


def arm_from(text: str) -> None:
    """`arm` from the setting's text: empty for none, NAME, or NAME:N for the Nth time (from 1).

    Raises:
        ConfigError: no such point, or no such number.
    """
    if not text:
        return
    name, _, nth = text.partition(":")
    if nth and not (nth.isdecimal() and int(nth) > 0):
        raise ConfigError(f"--crash-point {text!r}: the part after the colon is a number from 1")
    arm(name, int(nth or 1) - 1)


def disarm() -> None:
    global _armed  # noqa: PLW0603
    _armed = None


def crash_point(name: str) -> None:
    """Die here if this point is armed and its count is used up."""
    global _remaining  # noqa: PLW0603
    if _armed is None or _armed != name:
        return
    if _remaining > 0:
        _remaining -= 1
        return
    os.kill(os.getpid(), signal.SIGKILL)
