"""The weights of a Hugging Face directory, one at a time, by the names that they have in plain models.

Owns which of a directory's tensors belong together: a weight's codes and their scales. Nothing is read before it is
asked for, and nothing is mapped into memory: what a file held is gone once its tensor is. Refuses to know models.

Read: float32, bfloat16 and float16; fp8 with scales for blocks (`quant_method: fp8`, arXiv 2412.19437, section 3.3),
for rows or for a whole weight (`compressed-tensors`); MXFP4 (`*_blocks` and `*_scales`, as gpt-oss has them).
Scales of activations are left alone: only weights are in fewer bits here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinsmith.bases.weight_headers import WEIGHT_INDEX, weight_files
from tinsmith.errors import ConfigError, UnsupportedError, UserError
from tinsmith.model.stored import Form, Stored

METHODS = ("fp8", "compressed-tensors", "mxfp4")
FP8 = {"F8_E4M3": Form.E4M3, "F8_E5M2": Form.E5M2}
PLAIN = {"F32", "F16", "BF16", "F64"}
SCALES = ("_scale_inv", "_scale")
BLOCKS, BLOCK_SCALES = "_blocks", "_scales"
MXFP4_GROUP = 32
ASIDE = ("input_scale", "activation_scale", "k_scale", "v_scale", "output_scale")  # of what passes don't quantise


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor as its file has it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


class WeightFiles(Mapping[str, "Tensor | Stored"]):
    """By name, each read anew when it is asked for, on the CPU: a tensor as it is stored, or a `Stored`.

    Raises (when it is made, and for a damaged file when a tensor is read):
        UserError: a file is missing or damaged.
        UnsupportedError: the weights are quantised in a way that isn't read; it is named, with the cure.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._quantization = _quantization(directory)
        self._files: dict[Path, Any] = {}
        self._entries = {name: entry for path in _paths(directory) for name, entry in self._open(path)}
        self._scales = dict(self._find_scales())
        belonging = set(self._scales.values())
        self._names = {
            name.removesuffix(BLOCKS) if name in self._scales and name.endswith(BLOCKS) else name: name
            for name in self._entries
            if name not in belonging and name.rpartition(".")[2] not in ASIDE
        }
        self._check()

    def __getitem__(self, name: str) -> Tensor | Stored:
        stored = self._names[name]
        if stored not in self._scales:
            return self._read(stored)
        codes, scales = self._read(stored), self._read(self._scales[stored])
        if stored.endswith(BLOCKS):
            *rows, num_blocks, num_bytes = codes.shape
            codes = codes.reshape(*rows, num_blocks * num_bytes)
            return Stored(Form.MXFP4, codes, scales, group=MXFP4_GROUP, is_flipped=True)
        form = FP8[self._entries[stored].dtype]
        grid, group = _row_scales(scales.float(), tuple(codes.shape), self._block, name)
        return Stored(form, codes.view(torch.uint8), grid, group=group)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def plain(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """One weight in full: dequantised in float32, then rounded once."""
        found = self[name]
        return (found.dequantised() if isinstance(found, Stored) else found).to(dtype)

    def is_quantised(self, name: str) -> bool:
        return self._names[name] in self._scales

    def shape(self, name: str) -> tuple[int, ...]:
        """As `plain` gives it."""
        stored = self._names[name]
        shape = self._entries[stored].shape
        if stored in self._scales and stored.endswith(BLOCKS):
            *leading, rows, num_blocks, num_bytes = shape
            return (*leading, num_blocks * num_bytes * 2, rows)
        return shape

    def path(self, name: str) -> Path:
        """The file that it is in."""
        return self._entries[self._names[name]].path

    def dtype(self, name: str) -> str:
        """Of the numbers in the file, as safetensors calls it."""
        return self._entries[self._names[name]].dtype

    def num_bytes(self, name: str) -> int:
        """In the files."""
        stored = self._names[name]
        scales = self._scales.get(stored)
        return self._entries[stored].num_bytes + (self._entries[scales].num_bytes if scales else 0)

    @property
    def _block(self) -> tuple[int, int] | None:
        """What shares a scale in fp8."""
        found = self._quantization.get("weight_block_size")
        for group in (self._quantization.get("config_groups") or {}).values():
            found = found or (group.get("weights") or {}).get("block_structure")
        return (int(found[0]), int(found[1])) if isinstance(found, (list, tuple)) and len(found) == 2 else None

    def _open(self, path: Path) -> Iterator[tuple[str, _Entry]]:
        try:
            file: Any = safe_open(path, framework="pt", backend="pread")
            self._files[path] = file
            for name in file.keys():  # noqa: SIM118  it is no mapping
                part = file.get_slice(name)
                shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
                bits = 8 if dtype in ("BOOL",) else int("".join(filter(str.isdigit, dtype.partition("_")[0])))
                yield name, _Entry(path, dtype, shape, torch.Size(shape).numel() * bits // 8)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} can't be read ({error}): fetch it again") from error

    def _read(self, stored: str) -> Tensor:
        entry = self._entries[stored]
        try:
            tensor: Tensor = self._files[entry.path].get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{entry.path} can't be read ({error}): fetch it again") from error
        return tensor

    def _find_scales(self) -> Iterator[tuple[str, str]]:
        """Each quantised weight, and its scales."""
        for name, entry in self._entries.items():
            if name.endswith(BLOCKS) and entry.dtype == "U8":
                other = name.removesuffix(BLOCKS) + BLOCK_SCALES
                if other in self._entries:
                    yield name, other
            elif entry.dtype in FP8 and not name.endswith(SCALES):
                found = [name + suffix for suffix in SCALES if name + suffix in self._entries]
                if found:
                    yield name, found[0]

    def _check(self) -> None:
        strange = sorted({
            f"{name} ({self._entries[stored].dtype})"
            for name, stored in self._names.items()
            if stored not in self._scales
            and self._entries[stored].dtype not in PLAIN
            and name.endswith((".weight", "_packed", BLOCKS, "_proj", ".qweight", ".bitmask"))
        })  # fmt: skip
        if strange:
            raise UnsupportedError(
                f"{self.directory}: weights whose form isn't known: {', '.join(strange[:3])}; float32, bfloat16, "
                f"float16, fp8 with scales and MXFP4 are read: {CURE}"
            )


CURE = "fetch the directory that isn't quantised, and start with --base-weights int4 or nf4 if memory is short"


def _quantization(directory: Path) -> Mapping[str, Any]:
    """`quantization_config` of config.json; empty where there is none.

    Raises:
        UnsupportedError: it is of a method that isn't read.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / 'config.json'} can't be read ({error}): fetch it again") from error
    inner = config.get("text_config") or {}
    found = config.get("quantization_config") or config.get("compression_config") or inner.get("quantization_config")
    if not isinstance(found, dict):
        return {}
    method = str(found.get("quant_method"))
    if method not in METHODS:
        raise UnsupportedError(
            f"{directory} is quantised by {method!r}, which isn't read; {', '.join(METHODS)} are: {CURE}"
        )
    sparsity = (found.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise UnsupportedError(f"{directory} keeps its weights as {sparsity!r}, which isn't read: {CURE}")
    return found


def _paths(directory: Path) -> list[Path]:
    """Raises: UserError: the directory has no weights, or an index that can't be read."""
    try:
        found = weight_files(directory)
    except ConfigError as error:
        raise UserError(error.message) from error
    if not found:
        raise UserError(f"{directory} has neither model.safetensors nor {WEIGHT_INDEX}: fetch its files again")
    return found


def _row_scales(scales: Tensor, shape: tuple[int, ...], block: tuple[int, int] | None, name: str) -> tuple[Tensor, int]:
    """A scale for each row and group of its inputs, float32 [..., O, G], and the inputs of a group.

    scales: one for all; [..., O, 1] or [..., O]; or one for each block of [..., O, I]; blocks at the ends may be cut.
    """
    *leading, outputs, inputs = shape
    rows = (*leading, outputs)
    if scales.numel() == 1:
        return scales.reshape(1).expand(*rows, 1).contiguous(), inputs
    if tuple(scales.shape) == rows:
        return scales[..., None].contiguous(), inputs
    if tuple(scales.shape) == (*rows, 1):
        return scales.contiguous(), inputs
    if leading and tuple(scales.shape) == (*leading, 1, 1):
        return scales.expand(*rows, 1).contiguous(), inputs
    if block is not None:
        down, across = block
        if tuple(scales.shape) == (*leading, -(-outputs // down), -(-inputs // across)):
            return scales.repeat_interleave(down, -2)[..., :outputs, :].contiguous(), across
    raise UnsupportedError(
        f"{name}: scales of {list(scales.shape)} for a weight of {list(shape)}, with blocks of "
        f"{list(block) if block else 'no size that the configuration names'}: {CURE}"
    )
