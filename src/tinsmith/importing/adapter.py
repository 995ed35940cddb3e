"""A PEFT adapter of anybody's as a run's state: its headers tell what it becomes, its numbers follow one by one.

Layers of a group that the adapter leaves out get factors of zero, which add nothing and never learn. Ranks that differ
are filled up with zeros, which don't either. All modules must be scaled alike, as a run has one scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from tinsmith.checkpoint_file import state_header
from tinsmith.errors import UnsupportedError, UserError, echo
from tinsmith.importing.archive import Stretch
from tinsmith.importing.base_weights import require_base_weight
from tinsmith.importing.experts import Mixture
from tinsmith.importing.names import Places, expert_place, sort_keys
from tinsmith.importing.pairs import Pair, zeros
from tinsmith.importing.peft_config import MAX_BYTES, NAME, PeftConfig, parse_config
from tinsmith.importing.tensor_file import TensorFile
from tinsmith.layer_table import Layer, halves_in_order
from tinsmith.types import BaseInfo, RunSpec, Targets

WEIGHTS = "adapter_model.safetensors"
SAME = 1e-6  # by which scales may differ, relative


@dataclass(frozen=True, slots=True)
class ForeignAdapter:
    """pairs: by layer name. rank: the largest of its modules'. alpha: so that alpha / rank is their scale."""

    layers: Sequence[Layer]
    pairs: Mapping[str, Pair]
    targets: Targets
    rank: int
    alpha: float
    step: int = 0
    has_optimizer: bool = False
    seed: int = 0

    @property
    def num_bytes(self) -> int:
        """Of the tensors of the state that is made of it."""
        return 4 * sum(math.prod(shape) for shape in self._shapes().values())

    def pieces(self, spec: RunSpec) -> Iterator[memoryview]:
        """The state's file, with `spec` in it.

        Raises:
            UserError: a number isn't finite, or a factor can't be shared.
        """
        yield memoryview(state_header(spec, self.step, self._shapes()))
        for layer, half in halves_in_order(self.layers, self.targets):
            pair = self.pairs.get(layer.name)
            found = zeros(layer, half, self.rank) if pair is None else pair.half(layer, half, self.rank)
            yield np.ascontiguousarray(found, "<f4").reshape(-1).view(np.uint8).data

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            f"param/{layer.state_name}.{half}": (layer.a_shape if half == "lora_A" else layer.b_shape)(self.rank)
            for layer, half in halves_in_order(self.layers, self.targets)
        }


def look_at_adapter(
    file: BinaryIO, files: Mapping[str, Stretch], layers: Sequence[Layer], base: BaseInfo
) -> ForeignAdapter:
    """The adapter among the files of an archive.

    Raises:
        UserError: it can't be carried, or doesn't fit the base; the message names the setting or the module.
    """
    config = parse_config(_small(file, files, NAME))
    place = files[WEIGHTS]
    weights = TensorFile(file, WEIGHTS, place.offset, place.size)
    keys = sort_keys(weights.tensors)
    for key in keys.whole:
        require_base_weight(weights, key, base)
    pairs = _pairs(weights, keys.pairs, config, Places(layers))
    rank = max(pair.rank for pair in pairs.values())
    (first, *others) = pairs.items()
    for name, pair in others:
        if not math.isclose(pair.scale, first[1].scale, rel_tol=SAME):
            raise UnsupportedError(
                f"{name} is scaled by {pair.scale:g}, {first[0]} by {first[1].scale:g} (alpha / rank): a run has one "
                "scale for all of its layers, so alpha_pattern has to follow rank_pattern"
            )
    groups = {layer.group for layer in layers if layer.name in pairs}
    targets = Targets(attn="attn" in groups, mlp="mlp" in groups, unembed="unembed" in groups)
    scale = first[1].scale
    alpha = config.alpha if config.alpha / rank == scale else scale * rank
    return ForeignAdapter(layers, pairs, targets, rank, alpha)


def _pairs(
    file: TensorFile, keys: Mapping[str, tuple[str, str]], config: PeftConfig, places: Places
) -> Mapping[str, Pair]:
    pairs: dict[str, Pair] = {}
    mixtures: dict[str, Mixture] = {}
    for module, (a_key, b_key) in keys.items():
        of_experts = expert_place(module)
        if of_experts is not None:
            place, rest = of_experts
            mixture = mixtures.setdefault(place, Mixture(places.of_experts(module, place)))
            mixture.found[rest] = module, a_key, b_key
            continue
        layer = places.plain(module)
        if layer.name in pairs:
            raise UserError(f"the adapter has {echo(module)} twice, under two names")
        pairs[layer.name] = _plain_pair(file, config, module, (a_key, b_key), layer)
    for mixture in mixtures.values():
        pairs |= mixture.pairs(file, config)
    return pairs


def _plain_pair(file: TensorFile, config: PeftConfig, module: str, keys: tuple[str, str], layer: Layer) -> Pair:
    a_key, b_key = keys
    a, b = file.tensors[a_key].shape, file.tensors[b_key].shape
    rank = a[0] if a else 0
    if rank < 1 or (a, b) != (layer.a_shape(rank), layer.b_shape(rank)):
        raise UserError(
            f"{echo(module)} has factors of {list(a)} and {list(b)}; the served base has {layer.inputs} inputs and "
            f"{layer.outputs} outputs there: the adapter is of another model"
        )
    return Pair(rank, config.scale(module, rank), lambda: file.read(a_key), lambda: file.read(b_key))


def _small(file: BinaryIO, files: Mapping[str, Stretch], name: str) -> bytes:
    place = files[name]
    if place.size > MAX_BYTES:
        raise UserError(f"{name} has {place.size} bytes, at most {MAX_BYTES} are read")
    file.seek(place.offset)
    return file.read(place.size)
