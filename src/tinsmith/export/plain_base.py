"""A base whose weights are in fewer bits, written out in full: what an adapter is merged into.

Shard by shard: memory is that of one. The directory is temporary, beside the one that is being made.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from tinsmith.model.weight_files import INDEX, WeightFiles

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 2**30
CONFIG = "config.json"
QUANTISED = {"quantization_config", "compression_config"}


def is_quantised(base: Path) -> bool:
    """Whether its configuration says so."""
    path = base / CONFIG
    return path.is_file() and not QUANTISED.isdisjoint(json.loads(path.read_text(encoding="utf-8")))


@contextmanager
def plain_base(base: Path, beside: Path, dtype: str | None = None) -> Iterator[Path]:
    """A directory with the same weights in full, for as long as the block runs. It takes the disk space of the model in
    that dtype.

    dtype: of what was quantised; None: what its configuration names, else bfloat16.

    Raises:
        UserError, UnsupportedError: as `WeightFiles`.
    """
    config = json.loads((base / CONFIG).read_text(encoding="utf-8"))
    files = WeightFiles(base)
    beside.mkdir(parents=True, exist_ok=True)
    named = str(dtype or config.get("dtype") or config.get("torch_dtype"))
    with tempfile.TemporaryDirectory(prefix=".plain-", dir=beside) as made:
        directory = Path(made)
        _write(files, DTYPES.get(named, torch.bfloat16), directory)
        for path in base.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX:
                shutil.copyfile(path, directory / path.name)
        told = {name: value for name, value in config.items() if name not in QUANTISED}
        (directory / CONFIG).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        yield directory


def _write(files: WeightFiles, dtype: torch.dtype, directory: Path) -> None:
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}

    def end_shard() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, directory / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    total = 0
    for name in files:
        found = files.plain(name, dtype) if files.is_quantised(name) else files[name]
        if shard and sum(each.nbytes for each in shard.values()) + found.nbytes > SHARD_BYTES:
            end_shard()
        shard[name] = found.contiguous()
        total += found.nbytes
    end_shard()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index), encoding="utf-8")
