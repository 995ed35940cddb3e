"""How a base has its experts on disk, and which of its tensors an adapter of experts changes.

One by one: `...experts.3.gate_proj.weight` [O, I], in Mixtral's files `...experts.3.w1.weight`. All of a layer in one:
`...experts.gate_up_proj` [E, 2 O, I] with the gate's rows first, or, in gpt-oss and Llama 4, transposed, [E, I, 2 O],
and in gpt-oss with gate and up in turn; `...experts.down_proj` likewise.
Shape letters: E experts, I inputs, O outputs of an expert's layer.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinsmith.bases.catalog import BLOCKS, SCALES
from tinsmith.errors import UnsupportedError, UserError
from tinsmith.export.adapter import Adapter, Expert
from tinsmith.importing.names import OWN_NAMES, expert_place

if TYPE_CHECKING:
    from tinsmith.model.families.family import ExpertLayout, Family

FUSED = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
PACKED = ("_blocks", "_packed", ".qweight")  # as nothing here reads them


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor with all of a layer's experts. projections: whose rows it holds. is_untold: `peft` takes its inputs for
    outputs, as the module doesn't say that it is transposed."""

    name: str
    projections: tuple[str, ...]
    is_transposed: bool
    is_interleaved: bool
    is_untold: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """Of one layer's experts on disk: exactly one of both. each: by projection, the tensors' names by expert."""

    each: Mapping[str, Mapping[int, str]]
    whole: Mapping[str, Whole]  # by projection


def family_of_base(model_type: str) -> Family | None:
    """What is known of the base's family. Loads torch, for which commands that don't need it don't wait."""
    found: Family | None = importlib.import_module("tinsmith.model.families").family_of_type(model_type)
    return found


def plain_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
    """Of a base's tensors as they are when they aren't quantised: without scales, and MXFP4's blocks of 32 inputs
    ([E, O, I / 32, 16] for [E, I, O]) in full."""
    plain: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name.endswith(BLOCKS) and len(shape) == 4:
            plain[name.removesuffix(BLOCKS)] = (shape[0], shape[2] * shape[3] * 2, shape[1])
        elif not name.endswith(SCALES):
            plain[name] = shape
    return plain


def layouts(shapes: Mapping[str, tuple[int, ...]], adapter: Adapter, model_type: str) -> Mapping[str, Layout]:
    """By place, for the places of the adapter's experts. shapes: of the base's tensors.

    Raises:
        UserError: the base has no experts there, or they are quantised.
    """
    on_disk: dict[str, dict[str, str]] = {}
    for name in shapes:
        found = expert_place(name.removesuffix(".weight"))
        if found is not None:
            on_disk.setdefault(found[0], {})[found[1]] = name
    return {
        expert.place: _layout(expert, on_disk.get(expert.place, {}), shapes, adapter, model_type)
        for expert in adapter.experts.values()
    }


def _layout(
    expert: Expert, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], adapter: Adapter, model_type: str
) -> Layout:
    packed = next((name for rest, name in names.items() if rest.endswith(PACKED)), None)
    if packed is not None:
        raise UnsupportedError(f"the base's experts are quantised ({packed}): merge into its dequantised weights")
    if "gate_up_proj" in names and "down_proj" in names:
        family = family_of_base(model_type)
        stored = None if family is None else family.expert_layout
        is_transposed = _is_transposed(expert, shapes[names["gate_up_proj"]], adapter, stored)
        is_interleaved = stored is not None and not stored.is_concatenated
        is_untold = stored is not None and not stored.is_told
        return Layout(
            {},
            {
                projection: Whole(names[name], projections, is_transposed, is_interleaved, is_untold)
                for name, projections in FUSED.items()
                for projection in projections
            },
        )
    each: dict[str, dict[int, str]] = {}
    for rest, name in names.items():
        number, _, own = rest.partition(".")
        if number.isdigit() and own in OWN_NAMES:
            each.setdefault(OWN_NAMES[own], {})[int(number)] = name
    if not each:
        raise UserError(f"the base has no experts for {expert.module}: the adapter is of another model")
    return Layout(each, {})


def _is_transposed(expert: Expert, shape: tuple[int, ...], adapter: Adapter, stored: ExpertLayout | None) -> bool:
    """[E, I, 2 O] and not [E, 2 O, I], by the hidden size, which gate and up take and down gives; where both fit, by
    what the family says."""
    a_name, b_name = adapter.names[expert.module]
    hidden = adapter.shapes[b_name][1] if expert.projection == "w2" else adapter.shapes[a_name][2]
    inner = adapter.shapes[a_name][2] if expert.projection == "w2" else adapter.shapes[b_name][1]
    fits = [shape[1:] == (hidden, 2 * inner), shape[1:] == (2 * inner, hidden)]
    if not any(fits):
        raise UserError(
            f"the base's experts at {expert.place} are {list(shape)}, the adapter's have {hidden} inputs and {inner} "
            "inner numbers: the adapter is of another model"
        )
    return (stored is not None and stored.is_transposed) if all(fits) else fits[0]
