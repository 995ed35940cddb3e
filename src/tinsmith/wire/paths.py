"""The grammar of tinker paths and of checkpoint names."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tinsmith.errors import UserError, echo
from tinsmith.types import CheckpointKind, RunId

SCHEME = "tinker://"
MAX_ID = 256
NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True, slots=True)
class TinkerPath:
    run_id: RunId
    kind: CheckpointKind
    name: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.run_id}/{self.kind.value}/{self.name}"


def parse_path(path: str) -> TinkerPath:
    """`tinker://<run>/<weights|sampler_weights|external_weights>/<name>`.

    Raises:
        UserError: anything else.
    """
    run_id, kind, name = [*path.removeprefix(SCHEME).split("/"), "", "", ""][:3]
    known = {member.value: member for member in CheckpointKind}
    is_path = path.startswith(SCHEME) and path.count("/") == 4 and kind in known
    if not is_path or not 1 <= len(run_id) <= MAX_ID:
        raise UserError(
            f"{echo(path)} is no checkpoint path: give tinker://<run>/weights/<name>, .../sampler_weights/<name> or "
            ".../external_weights/<name>"
        )
    return TinkerPath(RunId(run_id), known[kind], check_name(name))


def parse_kind(text: str) -> CheckpointKind:
    """Raises: UserError: it isn't the middle part of a checkpoint path."""
    try:
        return CheckpointKind(text)
    except ValueError:
        kinds = ", ".join(f"{kind}/<name>" for kind in CheckpointKind)
        raise UserError(f"a checkpoint is one of {kinds}, not {text[:50]!r}/...") from None


def check_name(name: str) -> str:
    """The name of a checkpoint, if it is a good one.

    Raises:
        UserError: it is empty, too long, or holds other characters than letters, digits, '.', '_' and '-'.
    """
    if not NAME.fullmatch(name) or ".." in name or name == ".":
        raise UserError(
            f"{echo(name)} is no checkpoint name: use 1 to 128 letters, digits, '.', '_' and '-', without '..'"
        )
    return name
