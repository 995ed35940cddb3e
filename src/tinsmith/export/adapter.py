"""An exported adapter on disk: `adapter_config.json` and `adapter_model.safetensors`, in a directory or a tar.

Looks at names and the configuration, and copies; it computes nothing and needs no torch.
"""

from __future__ import annotations

import json
import shutil
import struct
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tinsmith.adapter_files import CONFIG, HEAD, OWN_HEAD, PREFIX, WEIGHTS
from tinsmith.errors import UserError

HALVES = (".lora_A.weight", ".lora_B.weight")
MAX_CONFIG_BYTES = 2**20
MAX_MEMBERS = 16
EXPERTS = ".experts."


@dataclass(frozen=True, slots=True)
class Adapter:
    """path: of the safetensors file. names: by module, as the base calls it (`lm_head` for the output head), those of
    its two halves in the file. scale: alpha / rank, or alpha / √rank for rsLoRA (arXiv 2312.03732)."""

    path: Path
    names: Mapping[str, tuple[str, str]]
    scale: float
    config: Mapping[str, object]


def read_adapter(directory: Path) -> Adapter:
    """Look at an adapter, without its numbers.

    Raises:
        UserError: a file is missing or isn't what it should be; the message says which.
    """
    config = _read_config(directory / CONFIG)
    path = directory / WEIGHTS
    try:
        with safe_open(path, framework="numpy") as file:
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
    of_experts = next((module for module in names if EXPERTS in f"{module}."), None)
    if of_experts is not None:
        raise UserError(
            f"{path} trains experts ({of_experts}), whose adapters share a factor: this can't be written yet; "
            "tinker_cookbook.weights.build_hf_model merges them"
        )
    return Adapter(path, names, _scale(config, directory / CONFIG), config)


def write_peft(adapter: Adapter, directory: Path) -> None:
    """The adapter as `peft`, vLLM and SGLang read it: the output head is called `lm_head` whatever the base ties."""
    (directory / CONFIG).write_text(json.dumps(adapter.config, indent=2) + "\n", encoding="utf-8")
    with adapter.path.open("rb") as source, (directory / WEIGHTS).open("wb") as target:
        (length,) = struct.unpack("<Q", source.read(8))
        header = json.loads(source.read(length))
        old, new = f"{PREFIX}{HEAD}.", f"{PREFIX}{OWN_HEAD}."
        renamed = {new + name.removeprefix(old) if name.startswith(old) else name: e for name, e in header.items()}
        text = json.dumps(renamed, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        target.write(struct.pack("<Q", len(text)) + text)
        shutil.copyfileobj(source, target)


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
