"""Compiles the kernels for an H200 and prints what instructions they have, as JSON. Run by `test_compiled`."""

from __future__ import annotations

import json
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tinsmith.model.lora import kernels
from tinsmith.sampling import paged_kernel, slot_kernel, tiled_kernel
from tinsmith.training import adamw_kernels, logit_kernels

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    "wide": "*bf16", "weights": "*bf16", "narrow": "*bf16", "tiles": "*i32", "at": "*i64", "bands": "*i32",
    "blocks": "*i32", "scales": "*fp32", "grads": "*fp32", "pieces": "*i32", "spans": "*i32",
    "anchor": "*fp32", "copies": "*bf16", "copy_at": "*i64", "sizes": "*i64", "numbers": "*fp32", "factors": "*fp32",
    "takes_step": "*i32", "sums": "*fp32", "logits": "*fp32", "lse": "*fp32", "first": "*i32", "targets": "*i64",
    "coefs": "*fp32", "rows": "*i64",
}  # fmt: skip
PATTERNS = {
    "wgmma": r"wgmma\.mma", "mma.sync": r"mma\.sync", "cp.async": r"cp\.async\.c[ag]",
    "vector loads": r"ld\.global(\.\w+)*\.v[24]", "single bf16 loads": r"ld\.global\.b16",
    "vector stores": r"st\.global(\.\w+)*\.v[24]", "single bf16 stores": r"st\.global\.b16",
}  # fmt: skip


def compile_kernel(
    kernel: Any, constants: dict[str, Any], num_warps: int, num_stages: int, pointers: dict[str, str] | None = None
) -> dict[str, int]:
    """As the launchers call it: pointers, strides and the vocabulary are multiples of 16."""
    known = {**POINTERS, **(pointers or {})}
    types, values, hints = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name], values[(index,)] = "constexpr", constants[name]
            continue
        types[name] = known.get(name, "i32")
        if (name in known and known[name].startswith("*")) or name.endswith(("stride", "width")):
            hints[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constexprs=values, attrs=hints)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    ptx = triton.compile(source, target=HOPPER, options=options).asm["ptx"]
    return {name: len(re.findall(pattern, ptx)) for name, pattern in PATTERNS.items()}


def decode_kernels() -> dict[str, dict[str, int]]:
    """Adapters of decode rows, and attention over pages, in the shapes of an 8B model."""
    found: dict[str, dict[str, int]] = {}
    tables = {
        "x": "*bf16", "y": "*bf16", "anchor": "*bf16", "rows_at": "*i32", "count": "*i32",
        "places": "*i64", "blocks": "*i32",
    }  # fmt: skip
    common = {"PROGRAMS": tiled_kernel.TILE_PROGRAMS, "UNIT": 8, "PRECISION": "tf32", "BT": tiled_kernel.TILE_ROWS}
    shrink = {**common, "INPUTS": 4096, "LAYERS": 3, "BW": tiled_kernel.SUM_BLOCK, "BN": tiled_kernel.SHRINK_BLOCK}
    found["_shrink_tiles"] = compile_kernel(tiled_kernel._shrink_tiles, shrink, 4, 4, tables)
    for block in (16, 32, 64):
        expand = {**common, "ALIGNED": True, "BW": tiled_kernel.EXPAND_BLOCK, "BN": block}
        found[f"_expand_tiles {block}"] = compile_kernel(tiled_kernel._expand_tiles, expand, 4, 2, tables)
    exact = {**common, "ALIGNED": False, "UNIT": 1, "PRECISION": "ieee", "BW": tiled_kernel.EXPAND_BLOCK, "BN": 16}
    found["odd _expand_tiles"] = compile_kernel(
        tiled_kernel._expand_tiles, exact, 4, 2, {**tables, "narrow": "*fp32", "anchor": "*fp32", "y": "*fp32"}
    )
    slots = {**tables, "owners": "*i32", "keys": "*i64"}
    for shares in (True, False):
        shrink = {"UNIT": 8, "INPUTS": 2048, "LAYERS": 2 if shares else 1, "SHARES": shares}
        shrink |= {"BW": slot_kernel.SUM_BLOCK, "BN": slot_kernel.SHRINK_BLOCK}
        label = "shared" if shares else "own"
        found[f"_shrink_slots {label}"] = compile_kernel(slot_kernel._shrink_slots, shrink, 4, 4, slots)
        expand = {"UNIT": 8, "ALIGNED": True, "SHARES": shares, "BW": slot_kernel.EXPAND_BLOCK, "BN": 32}
        found[f"_expand_slots {label}"] = compile_kernel(slot_kernel._expand_slots, expand, 4, 2, slots)
    odd = {"UNIT": 1, "ALIGNED": False, "SHARES": False, "BW": slot_kernel.EXPAND_BLOCK, "BN": 16}
    found["odd _expand_slots"] = compile_kernel(
        slot_kernel._expand_slots, odd, 4, 2, {**slots, "narrow": "*fp32", "anchor": "*fp32", "y": "*fp32"}
    )
    pages = {"q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "out_ptr": "*bf16", "table_ptr": "*i64",
             "length_ptr": "*i64", "sink_ptr": "*fp32", "scale": "fp32", "cap": "fp32"}  # fmt: skip
    attend = {"SIZE": 128, "BLOCK_K": 64, "BLOCK_Q": paged_kernel.MIN_QUERIES, "BLOCK_D": 128, "BY_HAND": False}
    for name, has in (("_attend", False), ("_attend with windows, caps and sinks", True)):
        own = {**attend, "HAS_WINDOW": has, "HAS_CHUNK": has, "HAS_CAP": has, "HAS_SINKS": has}
        found[name] = compile_kernel(paged_kernel._attend, own, 4, 3, pages)
    return found


def main() -> None:
    found: dict[str, dict[str, int]] = {}
    common = {"UNIT": 16, "ALIGNED": True, "PRECISION": "tf32", "BT": kernels.BLOCK_ROWS}
    for rank in (8, 32, 128):
        sides = {
            "A": {"STRIDE_W": 1, "STRIDE_N": 4096, "NUM_NARROW": 3 * rank},
            "B": {"STRIDE_W": rank, "STRIDE_N": 1, "NUM_NARROW": rank},
        }
        for name, side in sides.items():
            narrow = kernels.narrow_block(side["NUM_NARROW"])
            cases = {
                kernels._shrink: ({"EVEN": True, "BW": kernels.BLOCK_SUM, "BN": narrow}, 3),
                kernels._expand: ({"BW": kernels.BLOCK_WIDE, "BN": min(64, narrow)}, 2),
                kernels._outer: ({"SOLE": False, "BW": kernels.BLOCK_WIDE, "BN": min(64, narrow)}, 3),
            }
            for kernel, (own, stages) in cases.items():
                label = f"{kernel.__name__} {name} rank {rank}"
                found[label] = compile_kernel(kernel, {**common, **side, **own}, 4, stages)
    norm = {"UNIT": 16, "EVEN": True, "BLOCK": adamw_kernels.NORM_BLOCK, "BLOCKS": adamw_kernels.BLOCKS_A_PROGRAM}
    found["_square_sums"] = compile_kernel(adamw_kernels._square_sums, norm, 8, 3)
    step = {"UNIT": 16, "COPY_UNIT": 16, "EVEN": True, "HAS_COPY": True, "BLOCK": adamw_kernels.STEP_BLOCK}
    found["_adamw"] = compile_kernel(adamw_kernels._adamw, step, 4, 3)
    block = {"BLOCK": logit_kernels.BLOCK}
    found["_logsumexp"] = compile_kernel(logit_kernels._logsumexp, block, 8, 3, {"out": "*fp32"})
    found["_gradient"] = compile_kernel(logit_kernels._gradient, block, 8, 3, {"out": "*bf16"})
    found |= decode_kernels()
    odd = {**common, "UNIT": 1, "ALIGNED": False, "PRECISION": "ieee", "SOLE": True, "BW": kernels.BLOCK_WIDE, "BN": 16}
    exact = dict.fromkeys(("wide", "narrow"), "*fp32")
    found["odd _outer"] = compile_kernel(
        kernels._outer, {**odd, "STRIDE_W": 3, "STRIDE_N": 1, "NUM_NARROW": 3}, 4, 3, exact
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
