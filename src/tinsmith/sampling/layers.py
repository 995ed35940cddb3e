"""The layers of a model of the Llama family, walked without its modules.

With a few rows a step's time goes into calls, not into arithmetic: norms in six kernels each, views, a module's entry
and exit for each of them. Here a layer is some twenty calls over the same weights and the same pass context. It is used
where the model has just these parts, and where it gives the numbers of the model's own modules (`lean_layers` compares
them); any other model is walked through its modules.
Shape letters: T rows, D hidden size, E size of a head, H query heads, G key/value heads, N = H + G, I inner size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import structlog
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.model import MIN_ROWS, BaseModel, ExpertAdapters, OwnRoutes, PassContext, Routes
from tinsmith.model.activation import gated_silu
from tinsmith.model.attention import AttentionKind, block_attention
from tinsmith.model.blocks import GatedMLP, RotaryAttention
from tinsmith.model.delta import DeltaKind
from tinsmith.model.linear import LinearGroup
from tinsmith.model.lora import NO_ADAPTERS
from tinsmith.model.norm import RMSNorm
from tinsmith.model.vision import Sights

log = structlog.get_logger("tinsmith.worker")

OWN_MODULES = "samples are computed through the model's own modules, which is slower for few sequences"
MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # of the largest hidden state
LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


@dataclass(frozen=True, slots=True)
class Layer:
    """qk_NE: weights of the norms of each head of queries and keys; None where there are none."""

    qkv: LinearGroup
    out: LinearGroup
    gate_up: LinearGroup
    down: LinearGroup
    before: RMSNorm
    after: RMSNorm
    qk_NE: Tensor | None
    qk_eps: float
    head_size: int
    kind: AttentionKind
    is_stable: bool

    def __call__(self, index: int, x_TD: Tensor, cos_T1E: Tensor, sin_T1E: Tensor, context: PassContext) -> Tensor:
        """sin is negative in its first half, so that halves needn't be negated."""
        rows, size = len(x_TD), self.head_size
        num_values = self.qkv.widths[2]
        qkv_TO = _product(self.qkv, _normed(self.before, x_TD), context)
        qk_TNE = qkv_TO[:, :-num_values].view(rows, -1, size)
        v_TGE = qkv_TO[:, -num_values:].view(rows, -1, size)
        if self.qk_NE is not None:
            qk_TNE = F.rms_norm(qk_TNE, (size,), None, self.qk_eps) * self.qk_NE
        swapped_TNE = torch.cat((qk_TNE[..., size // 2 :], qk_TNE[..., : size // 2]), -1)
        qk_NTE = (qk_TNE * cos_T1E).addcmul_(swapped_TNE, sin_T1E).transpose(0, 1)
        num_heads = self.qkv.widths[0] // size
        out_THE = context.attend(index, qk_NTE[:num_heads], qk_NTE[num_heads:], v_TGE.transpose(0, 1), self.kind)
        x_TD = _product(self.out, out_THE.reshape(rows, -1), context).add_(x_TD)
        inner_TI = gated_silu(_product(self.gate_up, _normed(self.after, x_TD), context), stable=self.is_stable)
        return _product(self.down, inner_TI, context).add_(x_TD)


class LeanLayers:
    """`hidden` is that of `BaseModel`."""

    def __init__(self, base: BaseModel, layers: list[Layer], rotary: nn.Module, norm: RMSNorm) -> None:
        self._base = base
        self._layers = layers
        self._rotary = rotary
        self._norm = norm

    def hidden(
        self, tokens_T: Tensor, positions_T: Tensor, context: PassContext, *, sights: Sights | None = None
    ) -> Tensor:
        self._base.num_forwards += 1
        x_TD = self._base.embed(tokens_T, sights)
        cos_1TE, sin_1TE = self._rotary(x_TD[None], positions_T[..., None, :])
        cos_T1E, sin_T1E = cos_1TE[0, :, None], sin_1TE[0, :, None].clone()
        sin_T1E[..., : sin_T1E.shape[-1] // 2].neg_()
        for index, layer in enumerate(self._layers):
            x_TD = layer(index, x_TD, cos_T1E, sin_T1E, context)
            if sights is not None and index < len(sights.deeper):
                x_TD.index_add_(0, sights.rows_M, sights.deeper[index])
        return _normed(self._norm, x_TD)


def lean_layers(base: BaseModel) -> LeanLayers | None:
    """None if the model isn't made of these parts alone, or computes something else with them; the log says so then."""
    layers = getattr(base.backbone, "layers", None)
    rotary, norm = getattr(base.backbone, "rotary_emb", None), getattr(base.backbone, "norm", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(rotary, nn.Module) or not isinstance(norm, RMSNorm):
        log.info(OWN_MODULES, base=base.info.name, because="it has other parts")
        return None
    made = [_layer(module) for module in layers]
    if len(made) != base.num_layers or any(layer is None for layer in made):
        log.info(OWN_MODULES, base=base.info.name, because="its layers have other parts")
        return None
    lean = LeanLayers(base, cast(list[Layer], made), rotary, norm)
    if not _agrees(base, lean):
        log.warning(OWN_MODULES, base=base.info.name, because="the faster walk gives other numbers")
        return None
    return lean


def _product(group: LinearGroup, x_TI: Tensor, context: PassContext) -> Tensor:
    y_TO = group.matrix.times(x_TI, group.bias_O)
    context.add_lora(group.name, x_TI, y_TO)
    return y_TO


def _layer(module: nn.Module) -> Layer | None:
    parts = dict(module.named_children())
    if set(parts) != LAYER_PARTS:
        return None
    attention, mlp = parts["self_attn"], parts["mlp"]
    before, after = parts["input_layernorm"], parts["post_attention_layernorm"]
    if not isinstance(attention, RotaryAttention) or not isinstance(mlp, GatedMLP):
        return None
    if not isinstance(before, RMSNorm) or not isinstance(after, RMSNorm):
        return None
    size, qk_NE, qk_eps = attention.head_dim, None, 0.0
    q, k = attention.q_norm, attention.k_norm
    if q is not None or k is not None:
        if not isinstance(q, RMSNorm) or not isinstance(k, RMSNorm) or q.eps != k.eps:
            return None
        heads = [(norm, width // size) for norm, width in zip((q, k), attention.qkv.widths, strict=False)]
        qk_NE, qk_eps = torch.cat([norm.weight_D.expand(num, size) for norm, num in heads]), q.eps
    return Layer(
        qkv=attention.qkv,
        out=attention.o_proj.group,
        gate_up=mlp.gate_up,
        down=mlp.down_proj.group,
        before=before,
        after=after,
        qk_NE=qk_NE,
        qk_eps=qk_eps,
        head_size=size,
        kind=attention.kind,
        is_stable=mlp.stable,
    )


def _normed(norm: RMSNorm, x_TD: Tensor) -> Tensor:
    return F.rms_norm(x_TD, norm.weight_D.shape, norm.weight_D, norm.eps)


class _Causal(OwnRoutes):
    """One sequence over all rows."""

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, kind: AttentionKind) -> Tensor:
        return block_attention(q_HTD[None], k_GTD[None], v_GTD[None], 0, kind)[0].transpose(0, 1)

    def add_lora(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        return ()

    def mix(self, layer: int, mixed_TC: Tensor, g_TH: Tensor, beta_TH: Tensor, kind: DeltaKind) -> Tensor:
        raise AssertionError("a model with states has other parts")

    def experts(self, name: str, routes: Routes) -> ExpertAdapters:
        return NO_ADAPTERS


def _agrees(base: BaseModel, lean: LeanLayers) -> bool:
    """Whether both ways give the same hidden states. Not counted in `num_forwards`."""
    counted = base.num_forwards
    tokens_T = torch.arange(MIN_ROWS, device=base.device) * 7919 % base.info.vocab_size
    positions_T = torch.arange(MIN_ROWS, device=base.device) + 3
    try:
        expected_TD, found_TD = (way.hidden(tokens_T, positions_T, _Causal()) for way in (base, lean))
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False  # its parts have the names, and other shapes or calls
    finally:
        base.num_forwards = counted
    return bool((expected_TD - found_TD).abs().max() <= MAX_ERROR[base.dtype] * expected_TD.abs().max())
