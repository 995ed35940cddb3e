"""How much memory a merge takes, each in a process of its own: run by test_merging_memory.py.

python -m tests.numerics.merging_memory DIRECTORY CASE...: as loading_memory.py, with its models and its way to count.
"""

from __future__ import annotations

import json
import re
import sys
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.numerics.loading_memory import WIDE, in_a_fork, status_bytes, write_all
from tinsmith.bases.catalog import weight_shapes
from tinsmith.export.adapter import read_adapter
from tinsmith.export.expert_weights import plain_shapes
from tinsmith.export.merge import merge

CASES = (
    ("dense", "float32"), ("dense", "bfloat16"), ("dense", "fp8"), ("experts", "bfloat16"), ("fused", "bfloat16"),
    ("fused", "mxfp4"),
)  # fmt: skip
RANK = 8
ONE, FUSED = (
    re.compile(r"(.+\.experts\.)0\.(gate|up|down)_proj\.weight"),
    re.compile(r"(.+\.experts\.)(gate_up|down)_proj"),
)
OWN = {"gate": ("w1",), "up": ("w3",), "down": ("w2",), "gate_up": ("w1", "w3")}
Shape = tuple[int, ...]


def write_adapter(base: Path, path: Path) -> None:
    """Of attention, MLP and experts, as an archive has it: with factors that experts share."""
    halves: dict[str, tuple[Shape, Shape]] = {}
    for name, shape in plain_shapes(weight_shapes(base)).items():
        if found := ONE.fullmatch(name):
            halves |= of_experts(found[1], OWN[found[2]], int(WIDE["num_experts"]), shape[1], shape[0])
        elif found := FUSED.fullmatch(name):
            num, inputs, outputs = shape
            halves |= of_experts(found[1], OWN[found[2]], num, inputs, outputs // len(OWN[found[2]]))
        elif name.endswith("_proj.weight") and ".experts." not in name:
            halves[name.removesuffix(".weight")] = ((RANK, shape[1]), (shape[0], RANK))
    tensors = {
        f"base_model.model.{module}.lora_{half}.weight": torch.randn(shape) / 100
        for module, shapes in halves.items()
        for half, shape in zip("AB", shapes, strict=True)
    }
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))


def of_experts(
    path: str, projections: tuple[str, ...], num: int, inputs: int, outputs: int
) -> dict[str, tuple[Shape, Shape]]:
    """A and B of each; the factor on the side of the hidden states is one for all."""
    return {
        f"{path}{own}": ((num, RANK, inputs), (1, outputs, RANK)) if own == "w2"
        else ((1, RANK, inputs), (num, outputs, RANK))
        for own in projections
    }  # fmt: skip


def merged(base: Path, adapter: Path, target: Path) -> dict[str, int]:
    """Bytes: the peak beyond what was there before; of the base's largest tensor, and of all, in float32."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from now
    before = status_bytes("VmRSS")
    changed = merge(base, read_adapter(adapter), target)
    sizes = [4 * prod(shape) for shape in plain_shapes(weight_shapes(base)).values()]
    return {
        "peak": status_bytes("VmHWM") - before,
        "largest": max(sizes),
        "all": sum(sizes),
        "changed": len(changed),
    }


def main(home: Path, *asked: str) -> None:
    cases = [case for case in CASES if " ".join(case) in asked]
    torch.set_num_threads(1)
    write_all(home, set(cases))
    found = {}
    for kind, form in cases:
        paths = {size: home / f"{kind}-{form}-{size}" for size in ("small", "wide")}
        for size, base in paths.items():
            write_adapter(base, home / f"{base.name}-adapter")
            args = base, home / f"{base.name}-adapter", home / f"{base.name}-merged"
            if size == "small":
                merged(*args)  # imports, and what libraries keep for ever
            else:
                found[f"{kind} {form}"] = in_a_fork(merged, *args)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
