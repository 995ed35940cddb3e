"""A run's weights as others read them: `adapter_config.json` and `adapter_model.safetensors`, alone or as a tar.

The tensors of an adapter are the same bytes in both formats; only names and headers differ. So a checkpoint is not
converted when it is saved (that would store every checkpoint twice, for the few that are ever downloaded) but when it
is read: the export is a list of pieces, new headers and stretches of the stored file, whose size is known beforehand.
Serving it takes a megabyte of memory however large the checkpoint is, any range of it can be asked for, and equal
checkpoints give equal bytes. External checkpoints are the exception: they are made and, if asked for, encrypted when
saved, and stored as the tar that is served.

Names are those of `tinker_cookbook.weights`, which for a dense model are those of `peft`: `base_model.model.` and the
layer's path. The output head is `lm_head`; where it is tied to the embedding and so has no weights of its own,
`model.unembed_tokens`, which the cookbook maps and `peft` needs renamed.

Every tar ends with an empty file `checkpoint_complete`, without which `tinker checkpoint push-hf` of SDK 0.25 and 0.30
takes the adapter for a part of one. It is none of the checkpoint's files.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from tinsmith.age import SUFFIX, encrypt
from tinsmith.bases import ATTN_PARTS
from tinsmith.checkpoint_file import StoredState, dump_state, read_state_header
from tinsmith.errors import CorruptError
from tinsmith.types import BaseInfo, RunSpec, RunState
from tinsmith.virtual_file import Piece, Span, VirtualFile

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FULL = "model.safetensors"
COMPLETE = "checkpoint_complete"
PART = "param/"
PREFIX = "base_model.model."
HEAD = "model.unembed_tokens"  # of a state; see model/layout.py
OWN_HEAD = "lm_head"
BLOCK = 512  # of a tar
MAX_MEMBERS = 64
TOWERS = r".*\b(vision_tower|vision_model|visual|multi_modal_projector)\..*"  # whose layers may be named as the trained

Files = Mapping[str, VirtualFile]


def adapter_files(state: StoredState, base: BaseInfo) -> Files:
    """The files by name, in pieces of the stored state; its optimizer moments are left out. Of a full run, all
    weights in one file.

    Raises:
        CorruptError: the state holds no weights, or a tensor that is no half of an adapter.
    """
    if state.spec.is_full:
        return {FULL: _weights(state)}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
        name = OWN_HEAD if module == HEAD and not base.is_head_tied else module
        if half == "lora_A":
            modules[OWN_HEAD if module == HEAD else module] = tensor.shape[-2]
        offsets = [end, end + tensor.size]
        entries[f"{PREFIX}{name}.{half}.weight"] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": offsets}
        spans.append(Span(tensor.offset, tensor.size))
        end += tensor.size
    if not spans:
        raise CorruptError("the checkpoint holds no weights")
    return {
        CONFIG: VirtualFile([_config(state.spec, modules)]),
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
    source = io.BytesIO(dump_state(state))
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


def _config(spec: RunSpec, modules: Mapping[str, int]) -> bytes:
    """What `peft` reads, for modules of these ranks. They are given by the last parts of their paths, as serving
    engines expect them; in a pattern by the whole path, where modules of one name differ."""
    alphas = {module: _number(spec.options.alpha_of(*_place(module), spec.alpha)) for module in modules}
    config = {
        "base_model_name_or_path": spec.base_model,
        "bias": "none",
        **({"exclude_modules": TOWERS} if any("language_model." in module for module in modules) else {}),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "alpha_pattern": _pattern(alphas, _number(spec.alpha)),
        "lora_alpha": _number(spec.alpha),
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": _pattern(modules, spec.rank),
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": spec.options.use_rslora,
    }
    return (json.dumps(config, indent=2) + "\n").encode()


def _place(module: str) -> tuple[str, str]:
    """The group of a module, and the last part of its path."""
    *parents, layer = module.split(".")
    if layer == OWN_HEAD:
        return "unembed", layer
    return "attn" if ATTN_PARTS & set(parents) else "mlp", layer


def _pattern(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """The modules whose value isn't the usual one."""
    by_layer: dict[str, set[float]] = {}
    for module, value in values.items():
        by_layer.setdefault(module.rpartition(".")[2], set()).add(value)
    names = {module: layer if len(by_layer[layer := module.rpartition(".")[2]]) == 1 else module for module in values}
    return {names[module]: value for module, value in values.items() if value != usual}


def _number(value: float) -> float:
    """Whole numbers without a point."""
    return int(value) if float(value).is_integer() else value
