"""Which files hold a model directory's weights, and what the files say of them. Nothing is loaded."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tinsmith.errors import ConfigError

WEIGHT_INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_HEADER_BYTES = 100 * 2**20


def weight_files(path: Path) -> list[Path]:
    """Those that transformers reads: what the index names, else the single file; none where there is neither. Others
    beside them, such as `consolidated.safetensors` in Mistral's directories, are the same weights once more.

    Raises:
        ConfigError: the index can't be read.
    """
    index, single = path / WEIGHT_INDEX, path / SINGLE
    if not index.is_file():
        return [single] if single.is_file() else []
    try:
        names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} can't be read ({error}): fetch it again") from None
    return sorted(path / name for name in names)


def file_bytes(path: Path) -> int:
    """Of the files that hold a directory's weights. Raises: ConfigError: the index can't be read."""
    return sum(file.stat().st_size for file in weight_files(path))


def read_header(file: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors: 8 bytes of header length (little-endian), then that much JSON.

    Raises:
        ConfigError: it can't be read, or is no such file.
    """
    try:
        with file.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
            header = json.loads(f.read(length))
        return {name: entry for name, entry in header.items() if name != "__metadata__"}
    except (OSError, struct.error, ValueError, AttributeError) as error:
        raise ConfigError(f"{file} is not a whole safetensors file: {error}") from None
