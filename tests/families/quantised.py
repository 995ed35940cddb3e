"""Directories whose weights are in fewer bits, written by the rules of their formats, each beside its plain twin.

Nothing here uses what reads them: numbers are rounded to codes and scales by these few lines, or by torchao, and the
twin holds in float32 what the format says that they mean.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchao.quantization import IntxUnpackedToInt8Tensor, to_nf4
from torchao.quantization.quant_primitives import MappingType

Coded = tuple[dict[str, Tensor], Tensor]  # what the file holds, by suffix of the name, and what it means
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
BLOCK = (32, 48)  # neither divides all widths of the configurations
MOST = 448.0  # of E4M3
LEFT = (
    "vision", "visual", "multi_modal", "embed_tokens", "lm_head", "norm", "router", ".gate.weight", "bias", "conv1d",
)  # fmt: skip
MIN_OUTPUTS = 32  # of what is quantised while it is read
FLIPPED = ("gpt_oss", "llama4")  # model types whose joint experts are stored as [E, I, O]


def fp8_blocks(weight: Tensor) -> Coded:
    down, across = BLOCK
    codes, meant = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    grid = torch.empty(-(-weight.shape[0] // down), -(-weight.shape[1] // across))
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            at = slice(i * down, (i + 1) * down), slice(j * across, (j + 1) * across)
            grid[i, j] = weight[at].abs().max() / MOST
            codes[at] = (weight[at] / grid[i, j]).to(codes.dtype)
            meant[at] = codes[at].float() * grid[i, j]
    return {"": codes, "_scale_inv": grid}, meant


def fp8_rows(weight: Tensor) -> Coded:
    scales = (weight.abs().amax(1, keepdim=True) / MOST).bfloat16()
    codes = (weight / scales.float()).clamp(-MOST, MOST).to(torch.float8_e4m3fn)
    return {"": codes, "_scale": scales}, codes.float() * scales.float()


def fp8_whole(weight: Tensor) -> Coded:
    scale = weight.abs().max().reshape(1) / MOST
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"": codes, "_scale": scale}, codes.float() * scale


def mxfp4(weight: Tensor) -> Coded:
    """Of experts [E, I, O]: blocks [E, O, I / 32, 16], of 32 inputs each, and their exponents [E, O, I / 32]."""
    groups = weight.transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).clamp(min=1e-20).log2().ceil()
    codes = (groups / exponents.exp2()[..., None])[..., None].sub(E2M1).abs().argmin(-1).to(torch.uint8)
    meant = E2M1[codes.long()] * exponents.exp2()[..., None]
    blocks = codes[..., ::2] + codes[..., 1::2] * 16
    stored = {"_blocks": blocks, "_scales": (exponents + 127).to(torch.uint8)}
    return stored, meant.flatten(-2).transpose(1, 2).contiguous()


def int4(weight: Tensor) -> Tensor:
    group = next((size for size in (128, 64, 32) if weight.shape[1] % size == 0), None)
    if group is None:
        return weight
    made = IntxUnpackedToInt8Tensor.from_hp(weight, (1, group), torch.int4, mapping_type=MappingType.ASYMMETRIC)
    return made.dequantize()


def nf4(weight: Tensor) -> Tensor:
    if weight.shape[1] % 64:
        return weight
    groups = weight.numel() // 64
    return to_nf4(weight, 64, next(256 >> n for n in range(9) if groups % (256 >> n) == 0)).get_original_weight()


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}


def compressed(strategy: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


FORMS: dict[str, tuple[Callable[[Tensor], Coded], dict[str, Any]]] = {
    "fp8": (fp8_blocks, FP8),
    "fp8_rows": (fp8_rows, compressed("channel")),
    "fp8_whole": (fp8_whole, compressed("tensor")),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}),
}
MADE = {"int4": int4, "nf4": nf4}  # while they are read


def write(plain: Path, form: str, quantised: Path, twin: Path) -> None:
    """The directory `plain` in a form, and what that means in float32."""
    for target in (quantised, twin):
        shutil.copytree(plain, target)
    tensors = load_file(plain / "model.safetensors")
    stored, meant = dict(tensors), dict(tensors)
    config = json.loads((plain / "config.json").read_text())
    is_flipped = config["model_type"].startswith(FLIPPED)
    for name, weight in tensors.items():
        if any(part in name for part in LEFT) or weight.ndim < 2 or weight.shape[0] < 2:
            continue
        if form in MADE:
            if weight.ndim == 2 and len(weight) < MIN_OUTPUTS:
                continue
            meant[name] = _each(MADE[form], weight, is_flipped=is_flipped)
        elif (weight.ndim == 3) == (form == "mxfp4"):
            parts, meant[name] = FORMS[form][0](weight)
            del stored[name]
            stored |= {name + suffix: part.contiguous() for suffix, part in parts.items()}
    save_file(meant, twin / "model.safetensors", {"format": "pt"})
    if form in FORMS:
        save_file(stored, quantised / "model.safetensors", {"format": "pt"})
        (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": FORMS[form][1]}))


def _each(make: Callable[[Tensor], Tensor], weight: Tensor, *, is_flipped: bool) -> Tensor:
    """Of each expert, along its inputs."""
    if weight.ndim == 2:
        return make(weight).contiguous()
    if not is_flipped:
        return torch.stack([make(expert) for expert in weight]).contiguous()
    return torch.stack([make(expert.T.contiguous()).T for expert in weight]).contiguous()
