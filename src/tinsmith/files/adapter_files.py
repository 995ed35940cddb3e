"""A run's weights as others read them: `adapter_config.json` and `adapter_model.safetensors`, alone or as a tar.

The tensors of an adapter are the same bytes in both formats; only names and headers differ. So a checkpoint is not
converted when it is saved (that would store every checkpoint twice, for the few that are ever downloaded) but when it
is read: the export is a list of pieces, new headers and stretches of the stored file, whose size is known beforehand.
Serving it takes a megabyte of memory however large the checkpoint is, any range of it can be asked for, and equal
checkpoints give equal bytes. External checkpoints are the exception: they are made and, if asked for, encrypted when
saved, and stored as the tar that is served.

Names are those of `tinker_cookbook.weights`, which for a dense model are those of `peft`: `base_model.model.` and the
layer's path. The output head is `lm_head`; where it is tied to the embedding and so has no weights of its own,
`model.unembed_tokens`, which the cookbook maps and `peft` needs renamed. Layers that a model with vision has under
`model.language_model` are under `model`, where the cookbook adds the rest itself; the header says what was left out.

Every tar ends with an empty file `checkpoint_complete`, without which `tinker checkpoint push-hf` of SDK 0.25 and 0.30
takes the adapter for a part of one. It is none of the checkpoint's files.
"""

from __future__ import annotations

import json
import struct
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from tinsmith.bases.catalog import ATTN_PARTS, MLP_PARTS, TOWER_PARTS
from tinsmith.errors import CorruptError
from tinsmith.files.age import SUFFIX, encrypt
from tinsmith.files.checkpoint_file import StoredState, read_state_header, state_pieces
from tinsmith.files.virtual_file import Piece, Pieces, Span, VirtualFile
from tinsmith.lora_options import VISION
from tinsmith.types import BaseInfo, RunSpec, RunState

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FULL = "model.safetensors"
MODEL_CONFIG = "config.json"
COMPLETE = "checkpoint_complete"
PART = "param/"
PREFIX = "base_model.model."
HEAD = "model.unembed_tokens"  # of a state; see model/layout.py
OWN_HEAD = "lm_head"
OWN_HEADS = {"llama4": "language_model.lm_head"}  # of models that have it further in, by BaseInfo.arch
# What follows `model.` in the names of the whole model, by BaseInfo.arch; of the second kind only the language model is
# computed, which goes without it.
INNER = {
    "qwen3_vl": "language_model.", "qwen3_vl_moe": "language_model.",
    "qwen3_5": "language_model.", "qwen3_5_moe": "language_model.",
}  # fmt: skip
ALONE = frozenset({"qwen3_5", "qwen3_5_moe"})
LEFT_OUT = "left_out"  # of the file's metadata, where that is so
BLOCK = 512  # of a tar
MAX_MEMBERS = 64
# layers that may be named as the trained ones, and aren't trained: towers; of a tower what sees pixels, and what makes
# one embedding of a picture; of the language model
TOWERS = r".*\b(vision_tower|vision_model|visual|multi_modal_projector)\..*"
UNTRAINED = r".*\bpatch_embed(ding)?\b.*|.*\bvision_tower\.(.*\.)?head\..*"
OF_LANGUAGE = r".*\blanguage_model\..*\b({})\..*"

Files = Mapping[str, VirtualFile]


def adapter_files(state: StoredState, base: BaseInfo) -> Files:
    """The files by name, in pieces of the stored state; its optimizer moments are left out. Of a full run, all
    weights in one file, and the configuration with which transformers loads them.

    Raises:
        CorruptError: the state holds no weights, or a tensor that is no half of an adapter.
    """
    if state.spec.is_full:
        config = _model_config(Path(base.path))
        return {**({} if config is None else {MODEL_CONFIG: VirtualFile([config])}), FULL: _weights(state)}
    inner = INNER.get(base.arch, "")
    left_out = {LEFT_OUT: inner} if inner else {}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **left_out}}
    spans: list[Piece] = []
    modules: dict[str, int] = {}
    end = 0
    for tensor in state.tensors:
        if not tensor.name.startswith(PART):
            continue
        module, _, half = tensor.name.removeprefix(PART).rpartition(".")
        if half not in ("lora_A", "lora_B"):
            raise CorruptError(f"the checkpoint holds {tensor.name[:200]!r}, which is no half of an adapter")
        if len(tensor.shape) < 2:
            raise CorruptError(f"the checkpoint's {tensor.name[:200]!r} is no matrix")
        name = OWN_HEADS.get(base.arch, OWN_HEAD) if module == HEAD and not base.is_head_tied else module
        if inner and name.startswith(f"model.{inner}"):
            name = name.replace(inner, "", 1)
        if half == "lora_A":
            modules[OWN_HEAD if module == HEAD else module] = tensor.shape[-2]
        offsets = [end, end + tensor.size]
        entries[f"{PREFIX}{name}.{half}.weight"] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": offsets}
        spans.append(Span(tensor.offset, tensor.size))
        end += tensor.size
    if not spans:
        raise CorruptError("the checkpoint holds no weights")
    return {
        CONFIG: VirtualFile([_config(state.spec, modules, _wrapper(base.arch), has_tower=bool(inner))]),
        WEIGHTS: VirtualFile([file_header(entries), *spans]),
    }


def _weights(state: StoredState) -> VirtualFile:
    """Of a full run, under transformers' names."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    spans: list[Piece] = []
    end = 0
    for tensor in state.tensors:
        if tensor.name.startswith(PART):
            offsets = [end, end + tensor.size]
            entries[tensor.name.removeprefix(PART)] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": offsets}
            spans.append(Span(tensor.offset, tensor.size))
            end += tensor.size
    return VirtualFile([file_header(entries), *spans])


def _model_config(base: Path) -> bytes | None:
    """The base's, of weights in float32; None where it is of more than these weights, or can't be read."""
    try:
        config = json.loads((base / MODEL_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or "text_config" in config:
        return None
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    return (json.dumps(config | {"dtype": "float32"}, indent=2) + "\n").encode()


def file_header(entries: Mapping[str, Any]) -> bytes:
    """Of a safetensors file, whose tensors follow it."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def as_tar(files: Files, made_at: float) -> VirtualFile:
    """The files, then `COMPLETE`, as one uncompressed tar, all at its root. `made_at`: unix seconds, of each entry."""
    pieces: list[Piece] = []
    for name, content in {**files, COMPLETE: VirtualFile([])}.items():
        entry = tarfile.TarInfo(name)
        entry.size, entry.mtime, entry.mode = content.size, int(made_at), 0o644
        pieces += [entry.tobuf(tarfile.GNU_FORMAT), *content, bytes(-content.size % BLOCK)]
    return VirtualFile([*pieces, bytes(2 * BLOCK)])


def pack_external(state: RunState, base: BaseInfo, recipients: Sequence[str], made_at: float) -> Iterator[memoryview]:
    """The tar of an external checkpoint, in parts; with recipients, each file is encrypted to them and named `.age`."""
    source = cast(BinaryIO, Pieces(state_pieces(state)))
    files = adapter_files(read_state_header(source), base)
    if recipients:
        files = {
            name + SUFFIX: VirtualFile([encrypt(b"".join(content.read(source)), recipients)])
            for name, content in files.items()
        }
    return map(memoryview, as_tar(files, made_at).read(source))


def external_files(stored: BinaryIO) -> Files:
    """The files in the tar of an external checkpoint, in pieces of it.

    Raises:
        CorruptError: it isn't such a tar.
    """
    files: dict[str, VirtualFile] = {}
    try:
        stored.seek(0)
        with tarfile.open(fileobj=stored, mode="r:") as tar:
            for member in tar:
                if not member.isreg() or "/" in member.name or len(files) >= MAX_MEMBERS:
                    raise CorruptError("not an external checkpoint: it holds something else than a few files")
                if member.name != COMPLETE:
                    files[member.name] = VirtualFile([Span(member.offset_data, member.size)])
    except tarfile.TarError as error:
        raise CorruptError(f"not an external checkpoint: {error}") from error
    if not files:
        raise CorruptError("not an external checkpoint: it holds no files")
    return files


def _wrapper(arch: str) -> str:
    """What a state's names of layers begin with, where a whole model has more or other folders before them."""
    return "" if arch not in INNER else "model." if arch in ALONE else f"model.{INNER[arch]}"


def _config(spec: RunSpec, modules: Mapping[str, int], wrapper: str, *, has_tower: bool) -> bytes:
    """What `peft` reads, for modules of these ranks. They are given by the last parts of their paths, as serving
    engines expect them; in a pattern by the path, where modules of one name differ, without the wrapper that an
    archive's names don't have and `peft`'s have."""
    alphas = {module: _number(spec.options.alpha_of(*_place(module), spec.alpha)) for module in modules}
    config = {
        "base_model_name_or_path": spec.base_model,
        "bias": "none",
        **_excluded(spec, modules, has_tower=has_tower),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "alpha_pattern": _pattern(alphas, _number(spec.alpha), wrapper),
        "lora_alpha": _number(spec.alpha),
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": _pattern(modules, spec.rank, wrapper),
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": spec.options.use_rslora,
    }
    return (json.dumps(config, indent=2) + "\n").encode()


def _excluded(spec: RunSpec, modules: Mapping[str, int], *, has_tower: bool) -> Mapping[str, str]:
    """Of a model with vision, what `peft` is not to take for trained because of the last part of its path."""
    if spec.targets.vision:
        untrained = [*(() if spec.targets.attn else ATTN_PARTS), *(() if spec.targets.mlp else MLP_PARTS)]
        parts = [UNTRAINED, *([OF_LANGUAGE.format("|".join(sorted(untrained)))] if untrained else [])]
        return {"exclude_modules": "|".join(parts)}
    has_tower = has_tower or any("language_model." in module for module in modules)
    return {"exclude_modules": TOWERS} if has_tower else {}


def _place(module: str) -> tuple[str, str]:
    """The group of a module, and the last part of its path."""
    *parents, layer = module.split(".")
    if TOWER_PARTS & set(parents):
        return VISION, layer
    if layer == OWN_HEAD:
        return "unembed", layer
    return "attn" if ATTN_PARTS & set(parents) else "mlp", layer


def _pattern(values: Mapping[str, float], usual: float, wrapper: str) -> dict[str, float]:
    """The modules whose value isn't the usual one."""
    by_layer: dict[str, set[float]] = {}
    for module, value in values.items():
        by_layer.setdefault(module.rpartition(".")[2], set()).add(value)
    names = {module: layer if len(by_layer[layer := module.rpartition(".")[2]]) == 1 else module for module in values}
    return {names[module].removeprefix(wrapper): value for module, value in values.items() if value != usual}


def _number(value: float) -> float:
    """Whole numbers without a point."""
    return int(value) if float(value).is_integer() else value
