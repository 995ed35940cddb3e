"""An exported adapter on disk: `adapter_config.json` and `adapter_model.safetensors`, in a directory or a tar.

Shape letters: R rank, I inputs, O outputs of a linear layer.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinsmith.adapter_files import CONFIG, HEAD, OWN_HEAD, PREFIX, WEIGHTS
from tinsmith.errors import UserError

HALVES = (".lora_A.weight", ".lora_B.weight")
MAX_CONFIG_BYTES = 2**20
MAX_MEMBERS = 16


@dataclass(frozen=True, slots=True)
class Adapter:
    """path: of the safetensors file. names: by module, as the base calls it (`lm_head` for the output head), those of
    its two halves in the file. scale: alpha / rank, or alpha / √rank for rsLoRA (arXiv 2312.03732)."""

    path: Path
    names: Mapping[str, tuple[str, str]]
    scale: float
    config: Mapping[str, object]

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """module, A [R, I], B [O, R], as they are stored; one module at a time."""
        with safe_open(self.path, framework="pt") as file:
            for module, (a, b) in self.names.items():
                yield module, file.get_tensor(a), file.get_tensor(b)


def read_adapter(directory: Path) -> Adapter:
    """Look at an adapter, without its numbers.

    Raises:
        UserError: a file is missing or isn't what it should be; the message says which.
    """
    config = _read_config(directory / CONFIG)
    path = directory / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None
    names: dict[str, tuple[str, str]] = {}
    for name in sorted(stored):
        module, half = _split(name, path)
        if half == HALVES[0]:
            other = name.removesuffix(HALVES[0]) + HALVES[1]
            if other not in stored:
                raise UserError(f"{path} has {name} without its other half, {other}")
            names[module] = name, other
        elif name.removesuffix(HALVES[1]) + HALVES[0] not in stored:
            raise UserError(f"{path} has {name} without its other half")
    if not names:
        raise UserError(f"{path} holds no adapter")
    return Adapter(path, names, _scale(config, directory / CONFIG), config)


def unpack(tar_path: Path, directory: Path) -> None:
    """The two files of an adapter's tar, and nothing else, into a directory.

    Raises:
        UserError: it isn't such a tar.
    """
    wanted = {CONFIG, WEIGHTS}
    try:
        with tarfile.open(tar_path, mode="r:") as tar:
            for index, member in enumerate(tar):
                if index >= MAX_MEMBERS:
                    raise UserError(f"{tar_path} holds more than an adapter")
                source = tar.extractfile(member) if member.isreg() and member.name in wanted else None
                if source is not None:
                    with source, (directory / member.name).open("wb") as target:
                        shutil.copyfileobj(source, target)
                    wanted.discard(member.name)
    except tarfile.TarError as error:
        raise UserError(f"{tar_path} is not a tar: {error}") from None
    if wanted:
        raise UserError(f"{tar_path} lacks {' and '.join(sorted(wanted))}: it's not an exported adapter")


def _split(name: str, path: Path) -> tuple[str, str]:
    for half in HALVES:
        if name.endswith(half) and name.startswith(PREFIX):
            module = name.removeprefix(PREFIX).removesuffix(half)
            return OWN_HEAD if module == HEAD else module, half
    raise UserError(f"{path} holds {name[:200]!r}, which is no half of a LoRA adapter")


def _read_config(path: Path) -> Mapping[str, object]:
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(MAX_CONFIG_BYTES))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: an adapter is a directory with {CONFIG} and {WEIGHTS}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}") from None
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise UserError(f"{path} does not describe a LoRA adapter")
    strange = [name for name in ("use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern")
               if found.get(name)]  # fmt: skip
    if found.get("bias", "none") != "none":
        strange.append("bias")
    if strange:
        raise UserError(f"{path} sets {', '.join(strange)}, which is not supported; merge it with peft itself")
    return found


def _scale(config: Mapping[str, object], path: Path) -> float:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{path}: r and lora_alpha must be numbers, r at least 1")
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
