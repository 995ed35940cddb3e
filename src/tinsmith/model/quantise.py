"""Weights in 4 bits, made by torchao as they are read.

Owns which weights of a directory are matrices that can be kept in fewer bits, and in which groups they are quantised.
torchao decides the codes; how they are kept is `model.stored`'s. Embedding, output head, routers, norms and what looks
at pictures stay as they are. torchao is an extra and is imported only when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from tinsmith.bases.catalog import ATTN_PARTS, MLP_PARTS, OF_EXPERTS, ROUTERS, TOWER_PARTS
from tinsmith.errors import ConfigError, UnsupportedError
from tinsmith.model.stored import Form, Stored, pack
from tinsmith.model.weight_files import WeightFiles

Quantise = Callable[[Tensor], Tensor]

VISION = {"visual", "vision_tower", "vision_model", "multi_modal_projector"}  # which passes don't quantise
MIN_OUTPUTS = 32  # of a matrix that is worth it
INT4_GROUPS = (128, 64, 32)  # the largest that divides the inputs
NF4_GROUP = 64
NF4_SCALE_GROUPS = 256
CHUNK_NUMBERS = 2**16
CURE = "install it with `pip install 'tinsmith[quantise]'`, or start without --base-weights"


class Matrices:
    """Which of a directory's weights are matrices of attention, MLP and experts."""

    def __init__(self, config: PretrainedConfig, files: WeightFiles) -> None:
        self._files = files
        self._hidden = int(config.get_text_config().hidden_size)
        self._wide = {  # whether the joint gate and up of a layer's experts have their outputs last
            name.rpartition(".")[0]: files.shape(name)[1] == self._hidden != files.shape(name)[2]
            for name in files
            if name.endswith(".gate_up_proj") and len(files.shape(name)) == 3
        }

    def has(self, name: str) -> bool:
        shape = self._files.shape(name)
        if len(shape) == 3:
            return name.rpartition(".")[0] in self._wide
        parts = name.removesuffix(".weight").split(".")
        if VISION & {*parts}:
            return False
        if len(shape) != 2 or not name.endswith(".weight") or parts[-1] in ROUTERS or shape[0] < MIN_OUTPUTS:
            return False
        if {*parts} & TOWER_PARTS:
            return False
        return bool(OF_EXPERTS.match(name) or {*parts} & (ATTN_PARTS | MLP_PARTS))

    def is_flipped(self, name: str) -> bool:
        """Whether it is stored as [..., I, O]."""
        return self._wide.get(name.rpartition(".")[0], False)


def quantiser(weights: str, files: WeightFiles) -> Quantise:
    """weights: int4 or nf4.

    Raises:
        ConfigError: torchao isn't there.
        UnsupportedError: the directory is quantised already.
    """
    if any(map(files.is_quantised, files)):
        raise UnsupportedError(
            f"--base-weights {weights}: {files.directory} is quantised already: leave the setting out, or name a "
            "directory in bfloat16, float16 or float32"
        )
    return {"int4": _int4, "nf4": _nf4}[weights]()


def _row_chunks(weight: Tensor) -> Iterator[Tensor]:
    """[O, I] each: what quantising needs beside a weight is many times its own size, so it is done in parts, each of
    one expert."""
    rows = max(1, CHUNK_NUMBERS // weight.shape[-1])
    for matrix in weight.flatten(0, -3) if weight.ndim > 2 else weight[None]:
        yield from matrix.split(rows)


def _torchao(module: str, wanted_for: str) -> Any:
    try:
        return importlib.import_module(f"torchao.{module}")
    except ImportError as error:
        raise ConfigError(f"--base-weights {wanted_for} needs torchao ({error}): {CURE}") from error


def _int4() -> Quantise:
    """Asymmetric in groups, as torchao's weight-only int4: (code - zero) · scale."""
    tensors, int4 = _torchao("quantization", "int4").IntxUnpackedToInt8Tensor, getattr(torch, "int4")  # noqa: B009  untyped
    mapping = _torchao("quantization.quant_primitives", "int4").MappingType.ASYMMETRIC

    def quantise(weight: Tensor) -> Tensor:
        *leading, outputs, inputs = weight.shape
        group = next((each for each in INT4_GROUPS if inputs % each == 0), None)
        if group is None:
            return weight
        parts = []
        for rows in _row_chunks(weight):
            found = tensors.from_hp(rows.float(), (1, group), int4, mapping_type=mapping)
            parts.append(
                (pack(found.qdata.view(torch.uint8) & 15), found.scale.float(), found.zero_point.to(torch.int8))
            )
        codes, scales, zeros = (torch.cat(part).view(*leading, outputs, -1) for part in zip(*parts, strict=True))
        return Stored(Form.INT4, codes, scales, zeros, group=group)

    return quantise


def _nf4() -> Quantise:
    """In groups of 64, whose scales torchao quantises once more; here they are kept in float32."""
    to_nf4 = _torchao("quantization", "nf4").to_nf4

    def quantise(weight: Tensor) -> Tensor:
        *leading, outputs, inputs = weight.shape
        if inputs % NF4_GROUP:
            return weight
        parts = [one(rows.float()) for rows in _row_chunks(weight)]
        codes, scales = (torch.cat(part).view(*leading, outputs, -1) for part in zip(*parts, strict=True))
        if not scales.isfinite().all():
            return weight  # torchao's second quantisation divides by nothing where a tensor's scales are all the same
        return Stored(Form.NF4, codes, scales, group=NF4_GROUP)

    def one(weight: Tensor) -> tuple[Tensor, Tensor]:
        groups = weight.numel() // NF4_GROUP
        scale_groups = next(size for size in (NF4_SCALE_GROUPS >> n for n in range(9)) if groups % size == 0)
        found = to_nf4(weight.contiguous(), NF4_GROUP, scale_groups)
        pairs = found.quantized_data  # the first of two numbers has the high half
        scales = found.dequantize_scalers(found.quantized_scalers, found.quantization_factor, scale_groups)
        codes = ((pairs >> 4) | (pairs << 4)).view(len(weight), -1)
        return codes, scales.float().view(len(weight), -1)

    return quantise
