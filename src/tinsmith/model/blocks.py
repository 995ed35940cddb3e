"""Attention, MLP and norms of well-known decoder layers in fewer steps than transformers' own modules.

A module is replaced if its family lists its class, whose code was read, and it is built as usual; any other is
left as it came, with its linear layers and its attention hooked alone. Whether the opened model gives the logits of the
untouched one is checked for both alike.
Shape letters: T rows of the pass, H query heads, G key/value heads, D head size, I inner size of an MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from tinsmith.errors import UnsupportedError
from tinsmith.model.activation import gated_silu
from tinsmith.model.attention import AttentionKind
from tinsmith.model.families import Family
from tinsmith.model.linear import GroupedLinear, LinearGroup, PassHolder
from tinsmith.model.norm import RMSNorm
from tinsmith.model.rotary import rotate


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)), gate and up as one product."""

    def __init__(self, gate_up: LinearGroup, down: GroupedLinear, *, stable: bool) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down_proj = down
        self.stable = stable

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(gated_silu(self.gate_up(x), stable=self.stable))
        return out


class RotaryAttention(nn.Module):
    """q, k and v as one product, normed where the model does so, rotated, and handed to the pass context."""

    def __init__(self, module: nn.Module, qkv: LinearGroup, holder: PassHolder) -> None:
        super().__init__()
        self.qkv = qkv
        self._holder = holder
        self.layer_idx = cast(int, module.layer_idx)
        self.head_dim = cast(int, module.head_dim)
        self.kind = AttentionKind(cast(float, module.scaling), cast(int | None, _window(module)))
        self.o_proj = cast(GroupedLinear, module.o_proj)
        self.q_norm = getattr(module, "q_norm", None)
        self.k_norm = getattr(module, "k_norm", None)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **extras: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None:
            raise UnsupportedError("a mask came to attention, where only plain causal attention is served")
        qkv_TX = self.qkv(hidden_states)[0]
        q_THD, k_TGD, v_TGD = (
            part.view(len(qkv_TX), -1, self.head_dim) for part in torch.split(qkv_TX, self.qkv.widths, 1)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TGD = self.q_norm(q_THD), self.k_norm(k_TGD)
        cos_TD, sin_TD = position_embeddings[0][0], position_embeddings[1][0]
        q_THD, k_TGD = rotate(q_THD, cos_TD, sin_TD), rotate(k_TGD, cos_TD, sin_TD)
        out_THD = self._holder.context.attend(
            self.layer_idx, q_THD.transpose(0, 1), k_TGD.transpose(0, 1), v_TGD.transpose(0, 1), self.kind
        )
        return self.o_proj(out_THD.reshape(1, len(out_THD), -1)), None


def replace_blocks(
    model: nn.Module, family: Family, groups: Mapping[str, LinearGroup], holder: PassHolder, *, stable: bool
) -> None:
    """Replace what can be. groups: by the name of their first layer; their layers are in the model already."""
    for path, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind in family.norms:
            weight, eps = cast(Tensor, module.weight), cast(float, module.variance_epsilon)
            model.set_submodule(path, RMSNorm(weight, eps))
    for path, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind in family.mlps and _is_silu(module):
            group = _group_of(groups, path, ("gate_proj", "up_proj"))
            if group is not None:
                down = cast(GroupedLinear, module.down_proj)
                model.set_submodule(path, GatedMLP(group, down, stable=stable))
        elif kind in family.attentions:
            group = _group_of(groups, path, ("q_proj", "k_proj", "v_proj"))
            if group is not None:
                model.set_submodule(path, RotaryAttention(module, group, holder))


def _window(module: nn.Module) -> object:
    """The sliding window of an attention; where the module doesn't say, its configuration does."""
    config: object = module.config
    return getattr(module, "sliding_window", getattr(config, "sliding_window", None))


def _is_silu(module: nn.Module) -> bool:
    return isinstance(module.act_fn, (nn.SiLU, SiLUActivation))


def _group_of(groups: Mapping[str, LinearGroup], path: str, parts: tuple[str, ...]) -> LinearGroup | None:
    """The group of exactly these layers of a module."""
    names = tuple(f"{path}.{part}" for part in parts)
    group = groups.get(names[0])
    return group if group is not None and group.names == names else None
