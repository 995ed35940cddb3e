"""Adapters of experts as others lay them out.

1. Stacked, as `tinker_cookbook.weights` has them and this server writes them: `experts.w1.lora_A` [E or 1, R, I],
   `lora_B` [E or 1, O, R].
2. One by one, as vLLM and SGLang load them: `experts.3.gate_proj.lora_A` [R, I], or Mixtral's `experts.3.w1`.
3. `peft`'s of whole parameters (`target_parameters`): A [E R, I] with each expert's rows together, B [O, R E] with each
   rank's columns together; the parameter that was wrapped first is `experts.base_layer`, the second `experts`, and
   which is which follows from the shapes. Gate and up are one parameter: they share an A, unless that has the rows of
   two and B is zero where they cross (what `peft` itself makes of two adapters, and what is exported here).
Shape letters: E experts, R rank, I inputs, O outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from tinsmith.bases.layer_table import Layer
from tinsmith.errors import UnsupportedError, UserError, echo
from tinsmith.importing.names import OWN_NAMES
from tinsmith.importing.pairs import Pair
from tinsmith.importing.peft_config import PeftConfig
from tinsmith.importing.tensor_file import TensorFile
from tinsmith.types import FloatArray

ONE = re.compile(r"(\d{1,6})\.(\w+)")
WRAPPED = re.compile(r"(base_layer(\.base_layer)*)?")


@dataclass(slots=True)
class Mixture:
    """What the file has for one layer's experts: by what follows `experts` in the name, (module, lora_A, lora_B)."""

    layers: Mapping[str, Layer]
    found: dict[str, tuple[str, str, str]] = field(default_factory=dict)

    def pairs(self, file: TensorFile, config: PeftConfig) -> Mapping[str, Pair]:
        """By layer name.

        Raises:
            UserError: the layouts are mixed or unknown, or shapes don't fit; the message names the module.
        """
        rests = list(self.found)
        if all(rest in self.layers for rest in rests):
            made: Mapping[str, Pair] = {rest: self._stacked(file, config, rest) for rest in rests}
        elif all(ONE.fullmatch(rest) for rest in rests):
            made = self._one_by_one(file, config)
        elif all(WRAPPED.fullmatch(rest) for rest in rests):
            made = self._wrapped(file, config)
        else:
            module = next(iter(self.found.values()))[0]
            raise UserError(f"{echo(module)}: this is no layout of experts' adapters that is known here")
        return {self.layers[name].name: pair for name, pair in made.items()}

    def _stacked(self, file: TensorFile, config: PeftConfig, rest: str) -> Pair:
        module, a_key, b_key = self.found[rest]
        layer = self.layers[rest]
        a, b = file.tensors[a_key].shape, file.tensors[b_key].shape
        rank = a[1] if len(a) == 3 else 0
        counts = (1, layer.num_experts)
        is_fit = len(a) == len(b) == 3 and a[0] in counts and b[0] in counts
        if not is_fit or (a[1:], b[1:]) != ((rank, layer.inputs), (layer.outputs, rank)) or rank < 1:
            raise _misfit(module, a, b, layer)
        scale, alpha = config.scale(module, rank), config.alpha_of(module)
        return Pair(rank, scale, alpha, partial(file.read, a_key), partial(file.read, b_key))

    def _one_by_one(self, file: TensorFile, config: PeftConfig) -> Mapping[str, Pair]:
        of_layer: dict[str, dict[int, tuple[str, str, str]]] = {}
        for rest, keys in self.found.items():
            number, name = rest.split(".")
            own = OWN_NAMES.get(name, "")
            if own not in self.layers or int(number) >= self.layers[own].num_experts:
                raise UserError(f"the served base has no layer {echo(keys[0])}: the adapter is of another model")
            if int(number) in of_layer.setdefault(own, {}):
                raise UserError(f"the adapter has {echo(keys[0])} twice, under two names")
            of_layer[own][int(number)] = keys
        return {own: self._stack(file, config, self.layers[own], of_layer[own]) for own in of_layer}

    def _stack(
        self, file: TensorFile, config: PeftConfig, layer: Layer, experts: Mapping[int, tuple[str, str, str]]
    ) -> Pair:
        if len(experts) != layer.num_experts:
            lacking = next(number for number in range(layer.num_experts) if number not in experts)
            raise UserError(f"{layer.name}: expert {lacking} has no adapter, and others have")
        ordered = [experts[number] for number in range(layer.num_experts)]
        rank = file.tensors[ordered[0][1]].shape[0] if file.tensors[ordered[0][1]].shape else 0
        for module, a_key, b_key in ordered:
            a, b = file.tensors[a_key].shape, file.tensors[b_key].shape
            if (a, b) != ((rank, layer.inputs), (layer.outputs, rank)) or rank < 1:
                raise _misfit(module, a, b, layer)
        module = ordered[0][0]
        scale = config.scale(module, rank)
        for other, _, _ in ordered:
            if config.scale(other, rank) != scale:
                raise UnsupportedError(
                    f"{echo(other)} is scaled by {config.scale(other, rank):g}, {echo(module)} by {scale:g}: a layer's "
                    "experts have one scale in a run, so alpha_pattern has to name all of them or none"
                )

        def stack(half: int) -> FloatArray:
            return np.stack([file.read(keys[half]) for keys in ordered])

        return Pair(rank, scale, config.alpha_of(module), partial(stack, 1), partial(stack, 2))

    def _wrapped(self, file: TensorFile, config: PeftConfig) -> Mapping[str, Pair]:
        made: dict[str, Pair] = {}
        gate, down = self.layers["w1"], self.layers["w2"]
        num = gate.num_experts
        for module, a_key, b_key in self.found.values():
            a, b = file.tensors[a_key].shape, file.tensors[b_key].shape
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] % num or not a[0]:
                raise _misfit(module, a, b, gate)
            rank = a[0] // num
            read_a, read_b = partial(_experts_a, file, a_key, num), partial(_experts_b, file, b_key, num)
            straight = (down.inputs, down.outputs), (gate.inputs, 2 * gate.outputs)
            if (a[1], b[0]) not in straight and (b[0], a[1]) in straight:
                read_a, read_b = partial(_turned, read_b), partial(_turned, read_a)
                a, b = (a[0], b[0]), (a[1], b[1])
            path = re.sub(r"(\.base_layer)+$", "", module)
            if (a[1], b[0]) == (down.inputs, down.outputs) and "w2" not in made:
                own = f"{path}.down_proj"
                made["w2"] = Pair(rank, config.scale(own, rank), config.alpha_of(own), read_a, read_b)
            elif (a[1], b[0]) == (gate.inputs, 2 * gate.outputs) and "w1" not in made:
                own = f"{path}.gate_up_proj"
                joint = Pair(rank, config.scale(own, rank), config.alpha_of(own), read_a, read_b)
                made |= _gate_and_up(joint, interleaves=gate.interleaves)
            else:
                raise _misfit(module, a, b, gate)
        return made


def _turned(read: Callable[[], FloatArray]) -> FloatArray:
    """The factors of a parameter that is transposed, and whose module doesn't say so, stand in each other's place."""
    return read().transpose(0, 2, 1)


def _gate_and_up(joint: Pair, *, interleaves: bool) -> Mapping[str, Pair]:
    def rows(index: int) -> FloatArray:
        b_EOR = joint.b()
        return b_EOR[:, index::2] if interleaves else np.split(b_EOR, 2, axis=1)[index]

    half = joint.rank // 2
    if joint.rank % 2 or rows(0)[..., half:].any() or rows(1)[..., :half].any():
        return {name: replace(joint, b=partial(rows, index)) for index, name in enumerate(("w1", "w3"))}
    first, second = slice(half), slice(half, None)
    return {
        name: Pair(
            half, joint.scale, joint.alpha / 2, partial(_part_a, joint, part), partial(_part_b, rows, index, part)
        )
        for index, (name, part) in enumerate((("w1", first), ("w3", second)))
    }


def _part_a(joint: Pair, part: slice) -> FloatArray:
    return joint.a()[:, part]


def _part_b(rows: Callable[[int], FloatArray], index: int, part: slice) -> FloatArray:
    return rows(index)[..., part]


def _experts_a(file: TensorFile, key: str, num: int) -> FloatArray:
    found = file.read(key)
    return found.reshape(num, -1, found.shape[1])


def _experts_b(file: TensorFile, key: str, num: int) -> FloatArray:
    found = file.read(key)
    return found.reshape(len(found), -1, num).transpose(2, 0, 1)


def _misfit(module: str, a: tuple[int, ...], b: tuple[int, ...], layer: Layer) -> UserError:
    return UserError(
        f"{echo(module)} has factors of {list(a)} and {list(b)}; the served base has {layer.num_experts} experts there "
        f"with {layer.inputs} inputs and {layer.outputs} outputs: the adapter is of another model"
    )
