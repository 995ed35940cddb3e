"""An exported adapter on disk: `adapter_config.json` and `adapter_model.safetensors`, in a directory or a tar.

Looks at names and the configuration; it computes nothing and needs no torch.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tinsmith.errors import UserError
from tinsmith.files.adapter_files import CONFIG, FULL, HEAD, INNER, LEFT_OUT, OWN_HEAD, WEIGHTS
from tinsmith.importing.names import expert_place, sort_keys
from tinsmith.importing.peft_config import MAX_BYTES, PeftConfig, parse_config

MAX_MEMBERS = 16
LAYERS = "model.layers."
PROJECTIONS = ("w1", "w3", "w2")  # gate, up and down of experts, as adapters name them


@dataclass(frozen=True, slots=True)
class Expert:
    """An adapter of a layer's experts: A [E or 1, R, I] and B [E or 1, O, R]. place: see `names.expert_place`."""

    module: str
    place: str
    projection: str


@dataclass(frozen=True, slots=True)
class Adapter:
    """path: of the safetensors file. names: by module, as the base calls it (`lm_head` for the output head), those of
    its two halves in the file. shapes: by those names. experts: those of the modules that are of experts, all of them
    stacked. settings: the configuration as it was read."""

    path: Path
    names: Mapping[str, tuple[str, str]]
    shapes: Mapping[str, tuple[int, ...]]
    experts: Mapping[str, Expert]
    config: PeftConfig
    settings: Mapping[str, Any]

    def rank(self, module: str) -> int:
        return self.shapes[self.names[module][0]][-2]

    def scale(self, module: str) -> float:
        return self.config.scale(module, self.rank(module))


def read_adapter(directory: Path) -> Adapter:
    """Look at an adapter, without its numbers.

    Raises:
        UserError: a file is missing or isn't what it should be; the message says which.
    """
    settings, config = _read_config(directory / CONFIG)
    path = directory / WEIGHTS
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            told = (file.metadata() or {}).get(LEFT_OUT)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None
    found = sort_keys(shapes)
    if found.whole:
        raise UserError(f"{path} holds {found.whole[0]}, a whole weight beside the adapter: merge it with peft itself")
    first = f"model.{told}layers." if told in INNER.values() else LAYERS
    names = {
        OWN_HEAD if module == HEAD else module.replace(LAYERS, first, 1) if module.startswith(LAYERS) else module: pair
        for module, pair in found.pairs.items()
    }
    return Adapter(path, names, shapes, _experts(names, shapes), config, settings)


def unpack(tar_path: Path, directory: Path) -> None:
    """The two files of an adapter's tar, and nothing else, into a directory.

    Raises:
        UserError: it isn't such a tar, or that of a full run.
    """
    wanted = {CONFIG, WEIGHTS}
    try:
        with tarfile.open(tar_path, mode="r:") as tar:
            for index, member in enumerate(tar):
                if index >= MAX_MEMBERS:
                    raise UserError(f"{tar_path} holds more than an adapter")
                if member.name == FULL:
                    raise UserError("the run trains all weights, so it has no adapter: export it with --format hf")
                source = tar.extractfile(member) if member.isreg() and member.name in wanted else None
                if source is not None:
                    with source, (directory / member.name).open("wb") as target:
                        shutil.copyfileobj(source, target)
                    wanted.discard(member.name)
    except tarfile.TarError as error:
        raise UserError(f"{tar_path} is not a tar: {error}") from None
    if wanted:
        raise UserError(f"{tar_path} lacks {' and '.join(sorted(wanted))}: it's not an exported adapter")


def _experts(names: Mapping[str, tuple[str, str]], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Expert]:
    found: dict[str, Expert] = {}
    for module, pair in names.items():
        place = expert_place(module)
        dimensions = {len(shapes[name]) for name in pair}
        if place is not None and place[1] in PROJECTIONS and dimensions == {3}:
            found[module] = Expert(module, *place)
        elif dimensions != {2} or (place is not None and not place[1].partition(".")[0].isdigit()):
            raise UserError(
                f"{module} has factors of {[list(shapes[name]) for name in pair]}, a layout of experts that isn't "
                "written here: `tinsmith import` takes it, and what is exported from there can be merged"
            )
    return found


def _read_config(path: Path) -> tuple[Mapping[str, Any], PeftConfig]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: an adapter is a directory with {CONFIG} and {WEIGHTS}") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error}") from None
    config = parse_config(data)
    return json.loads(data), config
