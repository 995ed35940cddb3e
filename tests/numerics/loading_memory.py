"""How much memory a base takes while it is loaded, each in a process of its own: run by test_loading_memory.py.

python -m tests.numerics.loading_memory DIRECTORY CASE...: writes models there and prints what was found as JSON. Each
load is in a fork of a process that has everything imported and little else, whose peak is counted from there.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3Config, Qwen3MoeConfig

from tinsmith.model import load_base
from tinsmith.types import BaseInfo
from tinsmith.worker.slim import leave_out_unused

WIDE: dict[str, Any] = {
    "vocab_size": 2000, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 5, "head_dim": 64,
    "num_attention_heads": 16, "num_key_value_heads": 8, "num_experts": 16, "num_experts_per_tok": 2,
    "moe_intermediate_size": 256, "tie_word_embeddings": True, "max_position_embeddings": 512,
}  # fmt: skip
SMALL = {**WIDE, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
CONFIGS = {"dense": Qwen3Config, "experts": Qwen3MoeConfig, "fused": GptOssConfig}  # the last: a layer's in one tensor
TOLD: dict[str, Any] = {
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4"}},
}
CASES = (
    ("dense", "float32", "float32", "stored"), ("dense", "bfloat16", "float32", "stored"),
    ("dense", "bfloat16", "bfloat16", "stored"), ("dense", "fp8", "float32", "stored"),
    ("dense", "bfloat16", "float32", "int4"), ("dense", "bfloat16", "float32", "nf4"),
    ("experts", "float32", "float32", "stored"), ("experts", "fp8", "float32", "stored"),
    ("experts", "fp8", "float32", "dequantised"), ("experts", "bfloat16", "float32", "int4"),
)  # fmt: skip
PER_EXPERT = re.compile(r"(.+\.experts\.)(gate_up|down)_proj")


def write(kind: str, form: str, sizes: dict[str, Any], path: Path) -> None:
    """A random model, a shard a layer, as files of the family have it."""
    path.mkdir()
    if kind == "fused":
        sizes = {
            **sizes,
            "intermediate_size": sizes["moe_intermediate_size"],
            "num_local_experts": sizes["num_experts"],
        }
    config = CONFIGS[kind](**sizes)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config).state_dict()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in empty.items():
        found = re.search(r"\.layers\.(\d+)\.", name)
        shard = shards.setdefault(f"model-{found[1] if found else 'rest'}.safetensors", {})
        if not name.startswith("lm_head"):
            split = names if kind == "experts" else lambda *whole: [whole]
            for own, shape in split(name, tuple(weight.shape)):
                shard |= stored(own, shape, form)
    index = {name: file for file, shard in shards.items() for name in shard}
    for file, shard in shards.items():
        save_file(shard, path / file, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (path / "config.json").write_text(json.dumps({**config.to_dict(), **TOLD.get(form, {})}))


def names(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    found = PER_EXPERT.fullmatch(name)
    if found is None:
        return [(name, shape)]
    parts = ("gate", "up") if found[2] == "gate_up" else ("down",)
    each = (shape[1] // len(parts), shape[2])
    return [(f"{found[1]}{expert}.{part}_proj.weight", each) for expert in range(shape[0]) for part in parts]


def stored(name: str, shape: tuple[int, ...], form: str) -> dict[str, torch.Tensor]:
    if form == "mxfp4" and len(shape) == 3:  # [E, I, O]
        num, inputs, outputs = shape
        blocks = torch.randint(256, (num, outputs, inputs // 32, 16), dtype=torch.uint8)
        return {f"{name}_blocks": blocks, f"{name}_scales": torch.full(blocks.shape[:3], 120, dtype=torch.uint8)}
    weight = torch.empty(shape).uniform_(-0.05, 0.05) if len(shape) > 1 else torch.ones(shape)
    if form != "fp8":
        return {name: weight.to(getattr(torch, form, torch.bfloat16))}
    if len(shape) == 1 or "embed" in name or name.endswith("mlp.gate.weight"):
        return {name: weight.bfloat16()}
    grid = torch.full((-(-shape[0] // 128), -(-shape[1] // 128)), 1e-4)
    return {name: (weight / 1e-4).clamp(-448, 448).to(torch.float8_e4m3fn), f"{name}_scale_inv": grid}


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024


def load(path: Path, dtype: str, weights: str) -> dict[str, int]:
    """Bytes: the peak beyond what was there before, and what the base keeps."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from now
    before = status_bytes("VmRSS")
    info = BaseInfo("x", str(path), "x", WIDE["vocab_size"], 512, ())
    base = load_base(info, device=torch.device("cpu"), dtype=getattr(torch, dtype), weights=weights)
    embedding = next(iter(base.backbone.parameters()))
    loaded = status_bytes("VmHWM") - before
    kept = sum(base.bytes_by_form().values()) + embedding.nbytes
    for matrix in base.matrices():
        matrix.times_transpose(torch.zeros(4, matrix.out_features, dtype=matrix.dtype))
    return {
        "peak": loaded,
        "kept": kept,
        "trained_peak": status_bytes("VmHWM") - before,
        "trained": sum(base.bytes_by_form().values()) + embedding.nbytes,
    }


def in_a_fork(measure: Callable[..., dict[str, int]], *args: Any) -> dict[str, int]:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        os.write(writer, json.dumps(measure(*args)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        text = told.read()
    os.waitpid(child, 0)
    found: dict[str, int] = json.loads(text)
    return found


def write_all(home: Path, forms: set[tuple[str, str]]) -> None:
    """Of each kind and form a small and a wide model, in forks, so that what writing takes and frees isn't there to
    load into."""
    for kind, form, sizes in {(*one, sizes) for one in forms for sizes in ("small", "wide")}:
        if not os.fork():
            write(kind, form, SMALL if sizes == "small" else WIDE, home / f"{kind}-{form}-{sizes}")
            os._exit(0)
        os.wait()


def main(home: Path, *asked: str) -> None:
    cases = [case for case in CASES if " ".join(case) in asked]
    leave_out_unused("cpu")
    torch.set_num_threads(1)
    write_all(home, {(kind, form) for kind, form, *_ in cases})
    for kind, form, dtype, weights in cases:  # imports, and what libraries keep for ever
        load(home / f"{kind}-{form}-small", dtype, weights)
    found = {" ".join(case): in_a_fork(load, home / f"{case[0]}-{case[1]}-wide", *case[2:]) for case in cases}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
