"""An adapter as `peft` loads it, and vLLM and SGLang as far as `engines.py` says, written tensor by tensor.

The output head is `lm_head`, whatever the base ties. Experts go by how the base has them on disk, which is what those
engines name them by:

* one by one: `experts.3.gate_proj.lora_A` [R, I] (Mixtral: `block_sparse_moe.experts.3.w1`). vLLM and SGLang load them,
  and `peft` 0.21 makes its own of them (`peft.utils.transformers_weight_conversion`). That takes every module of such a
  name for an expert's, also a shared expert's or a dense layer's; those are named as parameters (`target_parameters`),
  which it leaves alone. Of some models it fuses the weights and leaves the configuration as it is: there the fused
  parameters are named, and modules are only modules.
* all of a layer in one parameter: `peft`'s layout of parameters, which vLLM loads for gpt-oss and Qwen3-VL-MoE: A
  [E R, I], B [O, R E]. `experts.base_layer` is of gate and up together, whose A are put one under the other and whose B
  stand on a diagonal, so it has twice the rank and twice the alpha; `experts` is of down. Where the parameter is
  transposed and its module doesn't say so (Llama 4), `peft` takes inputs for outputs, and both factors change places.
Shape letters: E experts, R rank, I inputs, O outputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from tinsmith.errors import ConfigError, UnsupportedError, UserError
from tinsmith.export.adapter import Adapter, Expert
from tinsmith.export.expert_weights import Layout, family_of_base, layouts
from tinsmith.files.adapter_files import CONFIG, PREFIX, WEIGHTS, file_header

Array = npt.NDArray[Any]
_Factor: TypeAlias = "tuple[tuple[int, ...], Callable[[Any], Array]]"  # shape and how it is made
WHOLE = r".*\.experts\.gate_up_proj"
FUSED_PARAMETERS = frozenset({"experts.gate_up_proj", "experts.down_proj"})


@dataclass(frozen=True, slots=True)
class _Out:
    """One tensor that is written, float32."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[Any], Array]  # from the opened file of the adapter


@dataclass(frozen=True, slots=True)
class BaseShapes:
    """Of the base's tensors on disk; model_type: of its configuration."""

    shapes: Mapping[str, tuple[int, ...]]
    model_type: str


def write_peft(adapter: Adapter, directory: Path, base: BaseShapes | None = None) -> None:
    """Write both files into a directory that is there.

    Args:
        base: needed for adapters of experts.

    Raises:
        ConfigError: the adapter is of experts, and no base is given.
        UnsupportedError: `peft` can't load adapters of such experts.
        UserError: the adapter is of another model.
    """
    if adapter.experts and base is None:
        raise ConfigError(
            "the adapter trains experts, which are named as the base has them: name its directory with --base"
        )
    found = {} if base is None else layouts(base.shapes, adapter, base.model_type)
    is_whole = any(expert.module.startswith("model.language_model.") for expert in adapter.experts.values())
    if base is not None and is_whole and any(one.each for one in found.values()) and _is_half_converted(base):
        raise UnsupportedError(
            "peft doesn't put the weights of single experts together for this base as a whole model with vision, and "
            "would leave the adapter of its experts out: merge it with --format hf"
        )
    outs = list(_outs(adapter, found))
    (directory / CONFIG).write_text(json.dumps(_config(adapter, found, outs, base), indent=2) + "\n", encoding="utf-8")
    with safe_open(adapter.path, framework="numpy") as source, (directory / WEIGHTS).open("wb") as target:
        target.write(_header(outs))
        for out in outs:
            made = np.ascontiguousarray(out.make(source), "<f4")
            if made.shape != out.shape:
                raise UserError(f"{out.name} came out as {list(made.shape)}, not {list(out.shape)}")
            target.write(made.reshape(-1).view(np.uint8).data)


def _outs(adapter: Adapter, found: Mapping[str, Layout]) -> Iterator[_Out]:
    of_place: dict[str, dict[str, Expert]] = {}
    for module, pair in adapter.names.items():
        expert = adapter.experts.get(module)
        if expert is not None:
            of_place.setdefault(expert.place, {})[expert.projection] = expert
            continue
        for half, name in zip("AB", pair, strict=True):
            yield _Out(f"{PREFIX}{module}.lora_{half}.weight", adapter.shapes[name], partial(_get, name))
    for place, experts in of_place.items():
        if found[place].whole:
            yield from _wrapped(adapter, experts, found[place])
        else:
            for expert in experts.values():
                yield from _one_by_one(adapter, expert, found[place])


def _one_by_one(adapter: Adapter, expert: Expert, layout: Layout) -> Iterator[_Out]:
    stem = expert.module.partition(f"{expert.place}.")[0] + expert.place
    tensors = layout.each.get(expert.projection, {})
    _require_number(adapter, expert, len(tensors))
    for number in sorted(tensors):
        path = f"{stem}.{tensors[number].removesuffix('.weight').partition(f'{expert.place}.')[2]}"
        for half, name in zip("AB", adapter.names[expert.module], strict=True):
            shape = adapter.shapes[name]
            yield _Out(f"{PREFIX}{path}.lora_{half}.weight", shape[1:], partial(_one, name, number % shape[0]))


def _wrapped(adapter: Adapter, experts: Mapping[str, Expert], layout: Layout) -> Iterator[_Out]:
    if set(experts) != {"w1", "w2", "w3"}:
        raise UserError(f"{next(iter(experts.values())).module}: gate, up and down are trained together or not at all")
    gate, up, down = experts["w1"], experts["w3"], experts["w2"]
    path = f"{PREFIX}{gate.module.rpartition('.')[0]}"
    num = max(adapter.shapes[name][0] for name in adapter.names[gate.module])
    inputs, outputs = adapter.shapes[adapter.names[gate.module][0]][2], adapter.shapes[adapter.names[gate.module][1]][1]
    rank = adapter.rank(gate.module) + adapter.rank(up.module)
    pairs = [adapter.names[expert.module] for expert in (gate, up)]
    a_name, b_name = adapter.names[down.module]
    whole = layout.whole["w1"]
    factors: dict[str, tuple[_Factor, _Factor]] = {
        f"{path}.base_layer": (
            ((num, rank, inputs), partial(_joint_a, pairs, num)),
            ((num, 2 * outputs, rank), partial(_joint_b, pairs, num, whole.is_interleaved)),
        ),
        path: (
            ((num, *adapter.shapes[a_name][1:]), partial(_all, a_name, num)),
            ((num, *adapter.shapes[b_name][1:]), partial(_all, b_name, num)),
        ),
    }
    for name, (a, b) in factors.items():
        first, second = (_turned(b), _turned(a)) if whole.is_untold else (a, b)
        (num, rank, inputs), (_, outputs, _) = first[0], second[0]
        yield _Out(f"{name}.lora_A.weight", (num * rank, inputs), partial(_flat_a, first[1]))
        yield _Out(f"{name}.lora_B.weight", (outputs, rank * num), partial(_flat_b, second[1]))


def _turned(factor: _Factor) -> _Factor:
    """[E, M, N] as [E, N, M]."""
    (num, rows, columns), make = factor
    return (num, columns, rows), lambda file: make(file).transpose(0, 2, 1)


def _joint_a(pairs: list[tuple[str, str]], num: int, file: Any) -> Array:
    """[E, R + R, I]."""
    return np.concatenate([_all(a_name, num, file) for a_name, _ in pairs], axis=1)


def _joint_b(pairs: list[tuple[str, str]], num: int, is_in_turn: bool, file: Any) -> Array:
    """B of gate and of up on a diagonal, [E, O + O, R + R]."""
    gate, up = (_all(b_name, num, file) for _, b_name in pairs)
    both = np.zeros((num, 2 * gate.shape[1], gate.shape[2] + up.shape[2]), np.float32)
    rows = (slice(0, None, 2), slice(1, None, 2)) if is_in_turn else (slice(gate.shape[1]), slice(gate.shape[1], None))
    both[:, rows[0], : gate.shape[2]] = gate
    both[:, rows[1], gate.shape[2] :] = up
    return both


def _flat_a(make: Callable[[Any], Array], file: Any) -> Array:
    """[E, R, I] as [E R, I]."""
    found = make(file)
    return found.reshape(-1, found.shape[2])


def _flat_b(make: Callable[[Any], Array], file: Any) -> Array:
    """[E, O, R] as [O, R E]."""
    found = make(file)
    return found.transpose(1, 2, 0).reshape(found.shape[1], -1)


def _all(name: str, num: int, file: Any) -> Array:
    found = file.get_tensor(name)
    return np.broadcast_to(found, (num, *found.shape[1:]))


def _one(name: str, number: int, file: Any) -> Array:
    found: Array = file.get_slice(name)[number]
    return found


def _get(name: str, file: Any) -> Array:
    found: Array = file.get_tensor(name)
    return found


def _require_number(adapter: Adapter, expert: Expert, number: int) -> None:
    counts = {adapter.shapes[name][0] for name in adapter.names[expert.module]}
    if not counts <= {1, number}:
        raise UserError(f"{expert.module} is of {max(counts)} experts, the base has {number}: it is another model")


def _config(
    adapter: Adapter, found: Mapping[str, Layout], outs: list[_Out], base: BaseShapes | None
) -> Mapping[str, Any]:
    settings = dict(adapter.settings)
    if not adapter.experts or base is None:
        return settings
    ranks, alphas = dict(settings.get("rank_pattern") or {}), dict(settings.get("alpha_pattern") or {})
    _require_plain(adapter, ranks or alphas)
    if adapter.config.is_stabilised:
        settings |= {"use_rslora": False, "lora_alpha": adapter.config.alpha * math.sqrt(adapter.config.rank)}
    modules = [module for module in adapter.names if module not in adapter.experts]
    leaves = {module.rpartition(".")[2] for module in modules}
    own = {out.name.split(".lora_")[0].rpartition(".")[2] for out in outs if ".experts." in out.name}
    parameters: set[str] = set()
    is_whole = any(layout.whole for layout in found.values())
    if is_whole or _is_half_converted(base):
        parameters |= FUSED_PARAMETERS
        ranks[WHOLE] = 2 * adapter.config.rank
        alphas[WHOLE] = 2 * settings["lora_alpha"]
    else:
        parameters |= {
            f"{'.'.join(module.split('.')[-2:])}.weight" for module in modules if module.rpartition(".")[2] in own
        }
    if not is_whole:
        leaves |= own
    if parameters:
        settings["target_parameters"] = sorted(parameters)
    return {**settings, "target_modules": sorted(leaves), "rank_pattern": ranks, "alpha_pattern": alphas}


def _is_half_converted(base: BaseShapes) -> bool:
    family = family_of_base(base.model_type)
    return family is not None and family.peft_half_converts


def _require_plain(adapter: Adapter, patterns: Mapping[str, Any]) -> None:
    """Raises: UnsupportedError: experts have ranks or alphas of their own, which engines don't read for experts."""
    config = adapter.config
    own = [m for m in adapter.experts if adapter.rank(m) != config.rank or config.alpha_of(m) != config.alpha]
    if own or (config.is_stabilised and patterns):
        raise UnsupportedError(
            f"{(own or list(adapter.experts))[0]}: ranks and alphas that differ can't be written so that peft, vLLM "
            "and SGLang read them for experts: merge with --format hf"
        )


def _header(outs: list[_Out]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for out in outs:
        end = at + 4 * math.prod(out.shape)
        entries[out.name] = {"dtype": "F32", "shape": out.shape, "data_offsets": [at, end]}
        at = end
    return file_header(entries)
