"""A LoRA backend that leaves every adapter out: what a pass over the frozen base alone costs.

The walk is the same, forward and backward through every layer and the output head; nothing is added, nothing kept and
no gradient of an adapter made. It is the floor that a pass with adapters is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinsmith.model import BaseModel, load_base
from tinsmith.model.lora import Segment
from tinsmith.types import BaseInfo, Targets

TARGETS = Targets(attn=False, mlp=True, unembed=False)  # what a run has of rank 1, and no pass reads


class NoLora:
    """See `LoraPass`."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        pass

    def add(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        return ()

    def keep(self, group: str, x_TI: Tensor) -> tuple[Tensor, ...]:
        return ()

    def add_grads(self, group: str, x_TI: Tensor, kept: tuple[Tensor, ...], dy_TO: Tensor, dx_TI: Tensor) -> None:
        raise AssertionError("nothing was kept")


def frozen_base(info: BaseInfo) -> BaseModel:
    base = load_base(info, device=torch.device("cpu"), dtype=torch.float32)
    base.lora = NoLora
    return base
