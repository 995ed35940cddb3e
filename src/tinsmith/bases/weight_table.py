"""What a full run's weights are called on a base, and their shapes: written by a worker that has loaded it, read by the
API, which has to check states that come from elsewhere and knows no model. In the order in which they lie in a row."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import msgspec

from tinsmith.bases.layer_table import DIRECTORY
from tinsmith.errors import BusyError

Shapes = Mapping[str, tuple[int, ...]]


def write_weights(data_dir: Path, base_model: str, shapes: Shapes) -> None:
    """Raises: OSError: the disk is full, or can't be written."""
    path = _path(data_dir, base_model)
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        part.write_bytes(msgspec.json.encode(list(shapes.items())))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_weights(data_dir: Path, base_model: str) -> Shapes:
    """Raises: BusyError: no worker has told them yet."""
    try:
        return dict(
            msgspec.json.decode(_path(data_dir, base_model).read_bytes(), type=list[tuple[str, tuple[int, ...]]])
        )
    except (OSError, msgspec.MsgspecError):
        raise BusyError(f"{base_model} is being loaded, and its weights are not known yet: try again later") from None


def _path(data_dir: Path, base_model: str) -> Path:
    return data_dir / DIRECTORY / f"{hashlib.sha256(base_model.encode()).hexdigest()[:32]}.weights.json"
