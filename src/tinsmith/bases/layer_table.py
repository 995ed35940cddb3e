"""Which layers of a base carry adapters, and of what shape: written by a worker that has loaded it, read by the API.

An adapter that comes from elsewhere has to be checked in a process that knows no model. What stays true: the layers
stand in the order in which an adapter lies in a row (see `model.layout`), so that a file written in that order is read
in one piece; the table of a base is that of the worker that loaded it last.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from tinsmith.errors import BusyError
from tinsmith.lora_options import Targets
from tinsmith.types import RunSpec

DIRECTORY = "layers"  # in the data directory
HEAD = "lm_head"  # as layers name it
HEAD_STATE_NAME = "model.unembed_tokens"  # as states name it


class Layer(Struct, frozen=True):
    """A layer that can carry an adapter; see `model.inspect.LinearInfo`. inputs, outputs: numbers of a row.

    num_a, num_b: how many As and Bs it has; 0 for one of each, which isn't of experts. interleaves: of experts whose
    base has gate and up row by row in turn, as gpt-oss does.
    """

    name: str
    group: str
    inputs: int
    outputs: int
    lead: str
    num_a: int = 0
    num_b: int = 0
    interleaves: bool = False

    @property
    def is_of_experts(self) -> bool:
        return self.num_a > 0

    @property
    def num_experts(self) -> int:
        return max(self.num_a, self.num_b)

    @property
    def state_name(self) -> str:
        return HEAD_STATE_NAME if self.name == HEAD else self.name

    def is_targeted(self, targets: Targets) -> bool:
        return self.group in targets.groups

    @property
    def layer(self) -> str:
        """The last part of its path, by which options name it."""
        return self.name.rpartition(".")[2]

    def a_shape(self, rank: int) -> tuple[int, ...]:
        return (self.num_a, rank, self.inputs) if self.is_of_experts else (rank, self.inputs)

    def b_shape(self, rank: int) -> tuple[int, ...]:
        return (self.num_b, self.outputs, rank) if self.is_of_experts else (self.outputs, rank)


def halves_in_order(layers: Sequence[Layer], targets: Targets) -> Iterator[tuple[Layer, str]]:
    """(layer, "lora_A" or "lora_B") as they lie in a row: of layers with one input first all As, then the Bs."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.is_targeted(targets):
            groups.setdefault(layer.lead, []).append(layer)
    for group in groups.values():
        for half in ("lora_A", "lora_B"):
            yield from ((layer, half) for layer in group)


def shapes_of(layers: Sequence[Layer], spec: RunSpec) -> Mapping[str, tuple[int, ...]]:
    """Of a run's tensors, by `<layer>.lora_A` and `.lora_B` as states name them, in the order of `halves_in_order`."""
    return {
        f"{layer.state_name}.{half}": (layer.a_shape if half == "lora_A" else layer.b_shape)(rank_of(layer, spec))
        for layer, half in halves_in_order(layers, spec.targets)
    }


def rank_of(layer: Layer, spec: RunSpec) -> int:
    return spec.options.rank_of(layer.group, layer.layer, spec.rank)


def write_layers(data_dir: Path, base_model: str, layers: Sequence[Layer]) -> None:
    """Raises: OSError: the disk is full, or can't be written."""
    path = _path(data_dir, base_model)
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        part.write_bytes(msgspec.json.encode(list(layers)))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_layers(data_dir: Path, base_model: str) -> tuple[Layer, ...]:
    """Raises: BusyError: no worker has told them yet."""
    try:
        return tuple(msgspec.json.decode(_path(data_dir, base_model).read_bytes(), type=list[Layer]))
    except (OSError, msgspec.MsgspecError):
        raise BusyError(f"{base_model} is being loaded, and its layers are not known yet: try again later") from None


def _path(data_dir: Path, base_model: str) -> Path:
    return data_dir / DIRECTORY / f"{hashlib.sha256(base_model.encode()).hexdigest()[:32]}.json"
