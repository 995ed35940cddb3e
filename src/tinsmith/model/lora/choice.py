"""Which LoRA backend computes on which device, and in which dtype."""

from __future__ import annotations

import importlib
import importlib.util

import structlog
import torch

from tinsmith.model.lora.backend import LoraBackend
from tinsmith.model.lora.compiled_segments import compiled_segments
from tinsmith.model.lora.grouped import GroupedLora
from tinsmith.model.lora.loop import LoopLora
from tinsmith.model.lora.segments import SegmentsLora

log = structlog.get_logger("tinsmith.worker")


def lora_for(device: torch.device, dtype: torch.dtype) -> LoraBackend:
    """Triton's kernels on a GPU; where triton isn't installed torch's grouped product, and the log says so. On the CPU
    segments in place; in another dtype than float32 the plain loop, whose gradients are float32 all the same."""
    if device.type != "cuda":
        return SegmentsLora if dtype == torch.float32 else LoopLora
    if has_triton():
        made: LoraBackend = importlib.import_module("tinsmith.model.lora.triton_lora").TritonLora
        return made
    log.warning("triton is not installed: adapters go through torch's grouped product; install tinsmith[gpu]")
    return GroupedLora


def compiled(lora: LoraBackend) -> LoraBackend:
    """What computes the same by a compiled program, where there is one and it can be had; else `lora`."""
    return compiled_segments() or lora if lora is SegmentsLora else lora


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
