"""What computes the LoRA of a decode batch, and which of its kinds a base gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tinsmith.model import BaseModel
from tinsmith.model.lora.choice import has_triton
from tinsmith.sampling.compiled_lora import compiled_lora_for
from tinsmith.sampling.lora import Adapter, DecodeLora
from tinsmith.sampling.tiled_lora import TiledLora


class RowLora(Protocol):
    """The adapters of a batch's rows."""

    def arrange(self, adapters_B: Sequence[Adapter | None]) -> None:
        """Take a new batch: the adapter of each row. Rows past the end are padding."""
        ...

    def add(self, group: str, x_TI: Tensor, y_TO: Tensor) -> None:
        """y += the adapters' part, in place, on the rows they serve."""
        ...


def row_lora_for(base: BaseModel, is_exact: bool, *, may_compile: bool = True) -> RowLora:
    """Tiles on a GPU with Triton; on the CPU in float32 a compiled program, if it may and can be had; elsewhere stacked
    copies."""
    if base.device.type == "cuda" and has_triton():
        return TiledLora(base.linears, base.device, base.dtype)
    if may_compile and base.device.type == "cpu" and base.dtype == torch.float32:
        made = compiled_lora_for(base.linears, is_exact=is_exact)
        if made is not None:
            return made
    return DecodeLora(base.device, is_exact)
