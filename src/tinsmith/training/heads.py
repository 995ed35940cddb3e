"""The head that suits a base's device and dtype."""

from __future__ import annotations

import importlib
from functools import partial

import torch

from tinsmith.model import BaseModel
from tinsmith.model.lora.choice import has_triton
from tinsmith.training.batched_head import BatchedChunk
from tinsmith.training.head import Head
from tinsmith.training.logits import LogitOps, PlainLogits

CPU_CHUNK = 512
MEMORY_SHARE = 32  # of a GPU's memory, one part for logits and their gradient
MAX_CHUNK = 8192
LOGIT_BYTES = 6  # float32, and a gradient in bfloat16


def make_head(base: BaseModel, chunk: int, *, deterministic: bool) -> Head:
    """Datum by datum on the CPU in float32, where bits are promised; else all data of a chunk of rows at once."""
    if base.device.type == "cpu" and base.dtype == torch.float32:
        return Head(base.head, base.final, chunk, deterministic=deterministic)
    make_pass = partial(BatchedChunk, base.head, base.final, base.lora, _logit_ops(base.device))
    return Head(base.head, base.final, chunk, deterministic=deterministic, make_pass=make_pass)


def chunk_tokens(base: BaseModel, setting: int) -> int:
    """Rows whose logits are held at once; a setting of 0 stands for what suits the device."""
    if setting or base.device.type == "cpu":
        return setting or CPU_CHUNK
    _, total = torch.cuda.mem_get_info(base.device)
    fitting = total // MEMORY_SHARE // (LOGIT_BYTES * base.head.out_features)
    return max(CPU_CHUNK, min(MAX_CHUNK, fitting))


def _logit_ops(device: torch.device) -> LogitOps:
    if device.type != "cuda" or not has_triton():
        return PlainLogits()
    made: LogitOps = importlib.import_module("tinsmith.training.logit_kernels").FusedLogits()
    return made
