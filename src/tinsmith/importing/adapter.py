"""A PEFT adapter of anybody's as a run's state: its headers tell what it becomes, its numbers follow one by one.

Layers of a group that the adapter leaves out get factors of zero, which add nothing and never learn. Layers of one name
have one rank and one scale in a run: where their ranks differ they are filled up with zeros, which don't learn either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from tinsmith.bases.layer_table import Layer, halves_in_order, rank_of, shapes_of
from tinsmith.errors import UnsupportedError, UserError, echo
from tinsmith.files.checkpoint_file import state_header
from tinsmith.importing.archive import Stretch
from tinsmith.importing.base_weights import require_base_weight
from tinsmith.importing.experts import Mixture
from tinsmith.importing.names import Places, expert_place, sort_keys
from tinsmith.importing.pairs import Pair, zeros
from tinsmith.importing.peft_config import MAX_BYTES, NAME, PeftConfig, parse_config
from tinsmith.importing.tensor_file import TensorFile
from tinsmith.lora_options import GROUPS, LoraOptions, Targets
from tinsmith.types import BaseInfo, RunId, RunSpec

WEIGHTS = "adapter_model.safetensors"
SAME = 1e-6  # by which scales may differ, relative


@dataclass(frozen=True, slots=True)
class ForeignAdapter:
    """pairs: by layer name. spec: of a run like it."""

    layers: Sequence[Layer]
    pairs: Mapping[str, Pair]
    spec: RunSpec
    step: int = 0
    has_optimizer: bool = False

    @property
    def num_bytes(self) -> int:
        """Of the tensors of the state that is made of it."""
        return 4 * sum(math.prod(shape) for shape in shapes_of(self.layers, self.spec).values())

    def pieces(self, spec: RunSpec) -> Iterator[memoryview]:
        """The state's file, with `spec` in it.

        Raises:
            UserError: a number isn't finite, or a factor can't be shared.
        """
        shapes = {f"param/{name}": shape for name, shape in shapes_of(self.layers, spec).items()}
        yield memoryview(state_header(spec, self.step, shapes))
        for layer, half in halves_in_order(self.layers, spec.targets):
            pair, rank = self.pairs.get(layer.name), rank_of(layer, spec)
            found = zeros(layer, half, rank) if pair is None else pair.half(layer, half, rank)
            yield np.ascontiguousarray(found, "<f4").reshape(-1).view(np.uint8).data


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
    return ForeignAdapter(layers, pairs, _spec(layers, pairs, config, base))


def _spec(layers: Sequence[Layer], pairs: Mapping[str, Pair], config: PeftConfig, base: BaseInfo) -> RunSpec:
    """Of a run whose layers have the ranks and scales of the adapter's."""
    by_name: dict[str, list[tuple[str, Pair]]] = {}
    groups: set[str] = set()
    for layer in layers:
        if layer.name in pairs:
            by_name.setdefault(layer.layer, []).append((layer.name, pairs[layer.name]))
            groups.add(layer.group)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, found in by_name.items():
        (first, pair), *others = found
        for other, its in others:
            if not math.isclose(its.scale, pair.scale, rel_tol=SAME):
                raise UnsupportedError(
                    f"{other} is scaled by {its.scale:g}, {first} by {pair.scale:g}: layers of one name have one scale "
                    "in a run, so alpha_pattern has to follow rank_pattern"
                )
        rank = max(its.rank for _, its in found)
        exact = {its.alpha for _, its in found if its.rank == rank and its.alpha / config.divisor(rank) == its.scale}
        alpha = exact.pop() if len(exact) == 1 else pair.scale * config.divisor(rank)
        if rank != config.rank:
            ranks[name] = rank
        if alpha != config.alpha:
            alphas[name] = alpha
    return RunSpec(
        RunId(""),
        base.name,
        config.rank,
        targets=Targets(**{group: group in groups for group in GROUPS}),
        alpha=config.alpha,
        options=LoraOptions(config.is_stabilised, tuple(sorted(ranks.items())), tuple(sorted(alphas.items()))),
    )


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
    scale, alpha = config.scale(module, rank), config.alpha_of(module)
    return Pair(rank, scale, alpha, lambda: file.read(a_key), lambda: file.read(b_key))


def _small(file: BinaryIO, files: Mapping[str, Stretch], name: str) -> bytes:
    place = files[name]
    if place.size > MAX_BYTES:
        raise UserError(f"{name} has {place.size} bytes, at most {MAX_BYTES} are read")
    file.seek(place.offset)
    return file.read(place.size)
