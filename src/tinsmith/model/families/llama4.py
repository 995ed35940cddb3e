"""Llama 4: attention in chunks in most layers, without positions in every fourth; experts chosen by sigmoids that weigh
what goes in, beside an MLP for all tokens, in all or in every second layer. It sees a picture as tiles, and as a whole.

Shape letters: T rows of the pass, H and G query and key/value heads, E head size, D hidden size, K experts of a row.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tinsmith.errors import UnsupportedError
from tinsmith.model.activation import stable_sigmoid
from tinsmith.model.attention import AttentionKind
from tinsmith.model.families.family import ExpertLayout, Family
from tinsmith.model.linear import PassHolder
from tinsmith.model.vision.kind import Pixels, Sight, VisionKind
from tinsmith.model.vision.tiles import Tiles


class Llama4Attention(nn.Module):
    """Rotated, normed and in chunks; or, in layers without rotary embedding, with queries that grow with the position
    (arXiv 2501.19399, equation 5, in steps)."""

    def __init__(self, module: nn.Module, holder: PassHolder) -> None:
        super().__init__()
        self._holder = holder
        config: Any = module.config
        self.layer_idx = cast(int, module.layer_idx)
        self.head_dim = cast(int, module.head_dim)
        self.use_rope = bool(module.use_rope)
        self.tuning = None if self.use_rope or not module.attn_temperature_tuning else config
        is_chunked = config.layer_types[self.layer_idx] == "chunked_attention"
        chunk = cast(int, config.attention_chunk_size) if is_chunked else None
        self.kind = AttentionKind(cast(float, module.scaling), chunk=chunk)
        self.qk_norm: Any = getattr(module, "qk_norm", None)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            cast(Any, getattr(module, f"{name}_proj")) for name in "qkvo"
        )

    def forward(
        self, hidden_states: Tensor, position_embeddings: Tensor, attention_mask: Tensor | None = None, **extras: Any
    ) -> tuple[Tensor, None]:
        if attention_mask is not None:
            raise UnsupportedError("a mask came to attention, where only attention in chunks is served")
        q_THE, k_TGE, v_TGE = (
            project(hidden_states)[0].unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.use_rope:
            turns_T1 = position_embeddings[0][:, None]
            q_THE, k_TGE = _turned(q_THE, turns_T1), _turned(k_TGE, turns_T1)
        if self.qk_norm is not None:
            q_THE, k_TGE = self.qk_norm(q_THE), self.qk_norm(k_TGE)
        if self.tuning is not None:
            steps_T = torch.floor((self._holder.positions_T.double() + 1.0) / self.tuning.floor_scale)
            factor_T = (torch.log1p(steps_T) * self.tuning.attn_scale + 1.0).float()  # rounds alike wherever it stands
            q_THE = (q_THE * factor_T[:, None, None]).to(q_THE.dtype)
        out_THE = self._holder.context.attend(
            self.layer_idx, q_THE.transpose(0, 1), k_TGE.transpose(0, 1), v_TGE.transpose(0, 1), self.kind
        )
        return self.o_proj(out_THE.reshape(1, len(out_THE), -1)), None


class Llama4Mixture(nn.Module):
    """shared(x) + Σ over a row's experts of expert(sigmoid(score) · x)."""

    def __init__(self, module: nn.Module, holder: PassHolder) -> None:
        super().__init__()
        self._holder = holder
        self.top_k = cast(int, module.top_k)
        self.router, self.experts, self.shared_expert = (
            cast(Any, getattr(module, name)) for name in ("router", "experts", "shared_expert")
        )

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, logits_TE = self.router(x_TD)
        chosen_TK = self._holder.context.choose(self.router.number, logits_TE.topk(self.top_k, dim=1).indices)
        weights_TK = stable_sigmoid(logits_TE.gather(1, chosen_TK).float()).to(x_TD.dtype)
        out_TD: Tensor = self.shared_expert(x_TD) + self.experts(x_TD, chosen_TK, weights_TK)
        return out_TD, logits_TE


def _turned(x_THE: Tensor, turns_T1: Tensor) -> Tensor:
    """Neighbours in a head are the parts of a complex number. In real ones, whose products round alike everywhere."""
    re, im = x_THE.float().view(*x_THE.shape[:-1], -1, 2).unbind(-1)
    cos, sin = turns_T1.real, turns_T1.imag
    return torch.stack([re * cos - im * sin, re * sin + im * cos], -1).flatten(-2).type_as(x_THE)


def look(model: nn.Module, pixels: Pixels) -> Sight:
    """Tile by tile; four neighbouring patches become one embedding."""
    own = cast(Any, model)
    pixel_values = pixels["pixel_values"].to(own.vision_model.dtype)
    found = own.get_image_features(pixel_values, return_dict=True)
    return Sight(own.multi_modal_projector(found.last_hidden_state.flatten(0, 1)))


def inputs(tokens: Tensor, is_picture: Tensor, pixels: Pixels) -> dict[str, Any]:
    return {"input_ids": tokens, "pixel_values": pixels["pixel_values"]}


VISION = VisionKind(
    model_types=("llama4",),
    towers=("vision_model", "multi_modal_projector"),
    look=look,
    inputs=inputs,
    processor=Tiles,
)

FAMILY = Family(
    title="Llama 4",
    model_types=("llama4_text",),
    experts=("Llama4TextExperts",),
    expert_layout=ExpertLayout(is_transposed=True, is_concatenated=True, has_bias=False, is_told=False),
    weighs_inputs=True,
    routers=("Llama4Router",),
    routers_choose=False,
    stand_ins={"Llama4TextAttention": Llama4Attention, "Llama4TextMoe": Llama4Mixture},
    vision=VISION,
)
