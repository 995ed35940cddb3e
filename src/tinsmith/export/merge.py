"""A base and an adapter merged into a new Hugging Face directory, tensor by tensor.

W' = W + scale · B A, in float32, rounded once; of experts one after another. Shards stay as they are cut, and nothing
is mapped into memory, so a merge takes a tensor, its merged copy and a product. A base in fp8 or MXFP4 is dequantised:
the merged model isn't quantised. An output head that is tied to the embedding and was trained gets a tensor of its own,
and the configuration says so: the embedding stays as it was. The directory appears when it's complete.
Shape letters: R rank, I inputs, O outputs of a linear layer.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import safe_open
from torch import Tensor

from tinsmith.bases.catalog import HEAD_OF, QUANTISATION, is_of_head, is_quantised, text_model_type
from tinsmith.bases.weight_headers import WEIGHT_INDEX, read_header, weight_files
from tinsmith.errors import ConfigError, UserError
from tinsmith.export.adapter import Adapter
from tinsmith.export.expert_weights import Whole, layouts
from tinsmith.files.adapter_files import OWN_HEAD, file_header
from tinsmith.machine.large_blocks import large_blocks_apart
from tinsmith.model.weight_files import WeightFiles

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: code for code, dtype in CODES.items()}
WEIGHTS = (".safetensors", ".bin", ".pth", ".gguf")
CONFIG = "config.json"
HEAP_BYTES = 32 * 2**20  # where glibc's own threshold ends, which moves with what is freed
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the merged model: where it is stored, what it will be called, and its dtype there, as
    safetensors calls it."""

    shard: Path
    stored: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Change:
    """What is added to a tensor, or to a part of it: expert: the number of the one that the tensor is of. whole: how
    all of a layer's experts lie in it, and part, whose rows of it these are."""

    a_name: str
    b_name: str
    scale: float
    expert: int | None = None
    whole: Whole | None = None
    part: int = 0


def merge(
    base: Path, adapter: Adapter, target: Path, *, dtype: str | None = None, progress: Progress | None = None
) -> list[str]:
    """Write the merged model to `target`, which must not exist.

    Args:
        dtype: of the floating-point weights, one of DTYPES; None: as the base has them.
        progress: is told bytes written and bytes in all.

    Returns:
        The names of the tensors that were changed.

    Raises:
        ConfigError: the base or the target is not as it should be.
        UserError: the adapter doesn't fit the base; the message names the module.
    """
    if target.exists():
        raise ConfigError(f"{target} exists: name a new directory")
    shards = weight_files(base)
    if not shards:
        raise ConfigError(f"{base} has no weights (model.safetensors, or {WEIGHT_INDEX} and its shards)")
    files = WeightFiles(base) if is_quantised(base) else None
    if files is None:
        code = NAMES[DTYPES[dtype]] if dtype else None
        tensors = [tensor for shard in shards for tensor in _tensors(shard, code)]
    else:
        dtype = dtype or _named_dtype(base)
        tensors = list(_dequantised(files, NAMES[DTYPES[dtype]]))
    if OWN_HEAD in adapter.names and not any(is_of_head(tensor.name) for tensor in tensors):
        tensors.append(_untied(tensors, base))
    changes = _changes(tensors, adapter, text_model_type(base))
    making = target.with_name(f".{target.name}.{os.getpid()}.part")
    making.mkdir(parents=True)
    try:
        with large_blocks_apart(HEAP_BYTES):
            _write_shards(making, tensors, changes, adapter, files, progress or (lambda done, total: None))
        _copy_rest(base, making, dtype, has_own_head=OWN_HEAD in adapter.names)
        making.rename(target)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return sorted(changes)


def _tensors(shard: Path, dtype: str | None) -> Iterator[_Tensor]:
    """In the order of the file. dtype: what weights in floating point become; None leaves them."""
    header = read_header(shard)
    try:
        for name, entry in sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
            stored, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            own = dtype if dtype and stored in CODES else stored
            size = end - start if own == stored else math.prod(shape) * CODES[own].itemsize
            yield _Tensor(shard, name, name, shape, own, size)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{shard} is not a whole safetensors file: {error}") from None


def _named_dtype(base: Path) -> str:
    """What the configuration of a quantised base names, else bfloat16."""
    config = json.loads((base / CONFIG).read_text(encoding="utf-8"))
    named = str(config.get("dtype") or config.get("torch_dtype"))
    return named if named in DTYPES else "bfloat16"


def _dequantised(files: WeightFiles, dtype: str) -> Iterator[_Tensor]:
    """Of a quantised base, as its tensors are in full."""
    for name in files:
        shape, stored = files.shape(name), files.dtype(name)
        is_float = files.is_quantised(name) or stored in CODES
        size = math.prod(shape) * CODES[dtype].itemsize if is_float else files.num_bytes(name)
        yield _Tensor(files.path(name), name, name, shape, dtype if is_float else stored, size)


def _untied(tensors: Sequence[_Tensor], base: Path) -> _Tensor:
    """The output head that the base has not: its embedding, under another name."""
    heads = [
        replace(tensor, name=f"{head}.weight")
        for tensor in tensors
        for embedding, head in HEAD_OF.items()
        if _is(tensor.name, f"{embedding}.weight")
    ]
    if len(heads) != 1:
        raise UserError(f"the adapter trains the output head, and {base} has neither a head nor one embedding")
    return heads[0]


def _changes(tensors: Sequence[_Tensor], adapter: Adapter, model_type: str) -> dict[str, list[_Change]]:
    """By the name of the merged tensor, what is added to it."""
    changes = _expert_changes(tensors, adapter, model_type)
    for module, (a_name, b_name) in adapter.names.items():
        if module in adapter.experts:
            continue
        found = [tensor for tensor in tensors if _is(tensor.name, f"{module}.weight")]
        found = found or [tensor for tensor in tensors if _is(tensor.name, f"{module.partition('.')[2]}.weight")]
        inner = f"language_model.model.{module.partition('language_model.')[2]}.weight"  # Gemma 3's, as it is stored
        found = found or [tensor for tensor in tensors if _is(tensor.name, inner)]
        found = found or [tensor for tensor in tensors if module == OWN_HEAD and is_of_head(tensor.name)]
        older = f"vision_tower.vision_model.{module.partition('vision_tower.')[2]}.weight"  # its tower's, on the hub
        found = found or [tensor for tensor in tensors if _is(tensor.name, older)]
        if len(found) != 1:
            raise UserError(f"the base has {len(found) or 'no'} weights for {module}: the adapter is of another model")
        (tensor,) = found
        if tensor.dtype not in CODES:
            raise UserError(f"{tensor.name} is {tensor.dtype}: merge into a base in float32, bfloat16 or float16")
        changes[tensor.name] = [_Change(a_name, b_name, adapter.scale(module))]
    return changes


def _expert_changes(tensors: Sequence[_Tensor], adapter: Adapter, model_type: str) -> dict[str, list[_Change]]:
    changes: dict[str, list[_Change]] = {}
    found = layouts({tensor.name: tensor.shape for tensor in tensors}, adapter, model_type)
    for module, expert in adapter.experts.items():
        pair, scale, layout = adapter.names[module], adapter.scale(module), found[expert.place]
        whole = layout.whole.get(expert.projection)
        if whole is not None:
            part = whole.projections.index(expert.projection)
            changes.setdefault(whole.name, []).append(_Change(*pair, scale, None, whole, part))
            continue
        names = layout.each.get(expert.projection, {})
        if not {adapter.shapes[name][0] for name in pair} <= {1, len(names)}:
            raise UserError(f"{module} and the base have other numbers of experts: the adapter is of another model")
        for number, name in names.items():
            changes[name] = [_Change(*pair, scale, number)]
    return changes


def _is(name: str, wanted: str) -> bool:
    """The same under any prefix: a model inside another one has its name before those of its layers."""
    return name == wanted or name.endswith(f".{wanted}")


def _write_shards(
    making: Path,
    tensors: Sequence[_Tensor],
    changes: Mapping[str, Sequence[_Change]],
    adapter: Adapter,
    files: WeightFiles | None,
    progress: Progress,
) -> None:
    total, done = sum(tensor.num_bytes for tensor in tensors), 0
    weight_map: dict[str, str] = {}
    with safe_open(adapter.path, framework="pt", backend="pread") as factors:
        for shard in dict.fromkeys(tensor.shard for tensor in tensors):
            own = [tensor for tensor in tensors if tensor.shard == shard]
            weight_map |= {tensor.name: shard.name for tensor in own}
            with (making / shard.name).open("wb") as file, safe_open(shard, framework="pt", backend="pread") as source:
                file.write(_header(own))
                for tensor in own:
                    is_coded = files is not None and files.is_quantised(tensor.stored)
                    weight = files.plain(tensor.stored) if files and is_coded else source.get_tensor(tensor.stored)
                    if tensor.name in changes:
                        weight = _merged(weight, changes[tensor.name], factors, tensor)
                    _write(file, weight.to(CODES[tensor.dtype]) if tensor.dtype in CODES else weight)
                    done += tensor.num_bytes
                    progress(done, total)
                file.flush()
                os.fsync(file.fileno())
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (making / WEIGHT_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _merged(weight: Tensor, changes: Sequence[_Change], factors: Any, tensor: _Tensor) -> Tensor:
    """W + scale · B A, computed in float32 and rounded to the merged tensor's dtype."""
    merged = weight.to(CODES[tensor.dtype], copy=True)
    for change in changes:
        if change.whole is None:
            _add(weight, merged, change, factors, change.expert, tensor.name)
            continue
        for expert in range(len(weight)):
            old, new = (_rows(each[expert], change) for each in (weight, merged))
            _add(old, new, change, factors, expert, tensor.name)
    return merged


def _rows(expert: Tensor, change: _Change) -> Tensor:
    """Of one expert's weights those that the change is of, as a view [O, I]."""
    assert change.whole is not None
    rows = expert.T if change.whole.is_transposed else expert
    num = len(change.whole.projections)
    if change.whole.is_interleaved:
        return rows[change.part :: num]
    return rows.chunk(num)[change.part]


def _add(old: Tensor, new: Tensor, change: _Change, factors: Any, expert: int | None, name: str) -> None:
    a_RI, b_OR = (_factor(factors, each, expert) for each in (change.a_name, change.b_name))
    if a_RI.ndim != 2 or b_OR.ndim != 2 or old.shape != (b_OR.shape[0], a_RI.shape[1]):
        raise UserError(
            f"{name} has shape {list(old.shape)}, the adapter's halves {list(a_RI.shape)} and {list(b_OR.shape)}: "
            "the adapter is of another model"
        )
    new.copy_(torch.addmm(old.float(), b_OR, a_RI, alpha=change.scale))


def _factor(factors: Any, name: str, expert: int | None) -> Tensor:
    """Of one expert: its own, or the one that all share."""
    if expert is None:
        return cast(Tensor, factors.get_tensor(name)).float()
    stored = factors.get_slice(name)
    num = stored.get_shape()[0]
    if 1 < num <= expert:
        raise UserError(f"{name} is of {num} experts, the base has more: the adapter is of another model")
    return cast(Tensor, stored[expert if num > 1 else 0]).float()


def _header(tensors: Sequence[_Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.num_bytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        at += tensor.num_bytes
    return file_header(entries)


def _write(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _copy_rest(base: Path, making: Path, dtype: str | None, *, has_own_head: bool) -> None:
    """Tokenizer, templates and configuration; nothing in folders, and no other weights or indexes of such.

    has_own_head: the head was trained, so it isn't the embedding, whatever the base's configuration says: some
        directories of tied bases hold it all the same.
    """
    for path in sorted(base.iterdir()):
        if path.is_file() and path.suffix not in WEIGHTS and not path.name.endswith(".index.json"):
            shutil.copyfile(path, making / path.name)
    path = making / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    inner = config.get("text_config")
    for part in [config, *([inner] if isinstance(inner, dict) else [])]:
        for name in QUANTISATION:
            part.pop(name, None)
        if has_own_head:
            part["tie_word_embeddings"] = False
        if dtype is not None:
            part.pop("torch_dtype", None)
            part["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
