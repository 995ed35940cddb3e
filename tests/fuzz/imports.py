"""Weights from elsewhere, as the fuzzer sends them: adapters in each layout, configurations, states, and what is near
them."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from typing import Any

import numpy as np
from safetensors.numpy import save

from tinsmith.bases.catalog import SHIPPED_PATH, BaseRef, describe
from tinsmith.bases.layer_table import Layer
from tinsmith.files.checkpoint_file import dump_state
from tinsmith.importing.look import look
from tinsmith.lora_options import Targets
from tinsmith.types import RunId, RunSpec, RunState

QUERY, EXPERTS = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts"
LAYERS = (
    Layer(QUERY, "attn", 4, 4, QUERY),
    Layer(f"{EXPERTS}.w1", "mlp", 4, 3, f"{EXPERTS}.w1", 1, 2),
    Layer(f"{EXPERTS}.w3", "mlp", 4, 3, f"{EXPERTS}.w1", 1, 2),
    Layer(f"{EXPERTS}.w2", "mlp", 3, 4, f"{EXPERTS}.w2", 2, 1),
    Layer("lm_head", "unembed", 4, 9, "lm_head"),
)
WEIGHTS = {f"{QUERY}.weight": (4, 4)}
INFO = describe(BaseRef("tinsmith/tiny", SHIPPED_PATH))
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "alpha_pattern": {"q_proj": 4}}
MOST = 10  # times what came in: factors that are left out are zero, and shared ones are repeated


def imports(data: bytes) -> None:
    found = look(io.BytesIO(data), len(data), LAYERS, INFO, lambda: WEIGHTS)
    if found.num_bytes > 1 << 24:  # a rank that the server refuses
        return
    made = sum(len(piece) for piece in found.pieces(replace(found.spec, run_id=RunId("r"))))
    assert made <= MOST * len(data) + (1 << 16)


def _tar(tensors: dict[str, tuple[int, ...]], **config: Any) -> bytes:
    weights = save({f"base_model.model.{name}.weight": np.ones(shape, np.float32) for name, shape in tensors.items()})
    files = {"adapter_config.json": json.dumps({**CONFIG, **config}).encode(), "adapter_model.safetensors": weights}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def _state() -> bytes:
    spec = RunSpec(RunId("r"), "b", 2, targets=Targets(attn=True, mlp=False, unembed=False))
    shapes = {"lora_A": (2, 4), "lora_B": (4, 2)}
    return dump_state(RunState(spec, 3, {f"param/{QUERY}.{h}": np.ones(s, np.float32) for h, s in shapes.items()}))


_PLAIN = {f"{QUERY}.lora_A": (2, 4), f"{QUERY}.lora_B": (4, 2)}
_EACH = {
    f"{EXPERTS}.{number}.gate_proj.{half}": shape
    for number in range(2)
    for half, shape in (("lora_A", (2, 4)), ("lora_B", (3, 2)))
}
_WHOLE = {
    f"{EXPERTS}.base_layer.lora_A": (4, 4), f"{EXPERTS}.base_layer.lora_B": (6, 4),
    f"{EXPERTS}.lora_A": (4, 3), f"{EXPERTS}.lora_B": (4, 4),
}  # fmt: skip
SEEDS = (_tar(_PLAIN), _tar(_EACH, use_rslora=True), _tar({**_PLAIN, **_WHOLE}, lora_dropout=0.1), _state())
WORDS = (
    b'"shape":[',
    b'"data_offsets":[0,',
    b"lora_A",
    b"experts.",
    b".base_layer",
    b'"r": 0',
    b"BF16",
    b"1e999",
    b"../",
)
