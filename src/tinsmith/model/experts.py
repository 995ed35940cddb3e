"""Mixtures of experts: a layer's experts as two products over rows sorted by expert, with adapters in both.

Owns the base's products and their order; routes come from `model.routers`. Refuses to know adapters: the pass context
adds them. As in `model.linear`, no gradient is made for any weight. Layers are named
as `tinker_cookbook.weights` names them: w1 is the gate, w3 what it gates, w2 the way back.
Shape letters: T rows of the pass, K experts of a row, E experts, N slots (see `model.routes`), D hidden size, I inputs
and O outputs of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.errors import UnsupportedError
from tinsmith.model.context import ExpertAdapters
from tinsmith.model.families import Family
from tinsmith.model.families.family import ExpertLayout
from tinsmith.model.frozen import FrozenMatrix, can_pack, plain_values
from tinsmith.model.inspect import LinearInfo
from tinsmith.model.linear import PassHolder
from tinsmith.model.routes import Routes, gather, spread, to_slots
from tinsmith.model.stored import Stored

_grouped_mm: Callable[..., Tensor] = getattr(F, "grouped_mm", None) or torch._grouped_mm


class StackedMatrices:
    """W [E, O, I] and biases, with their products with slots. Not thread-safe."""

    def __init__(self, weight_EOI: Tensor, bias_EO: Tensor | None, *, is_grouped: bool) -> None:
        """is_grouped: one product for all experts, which torch has on GPUs in bfloat16."""
        self.bias_EO = bias_EO
        self.weight_EOI = weight_EOI if is_grouped else None
        copies = not is_grouped and can_pack(weight_EOI)  # else one expert's weights would keep all of them in memory
        self.matrices = (
            ()
            if is_grouped
            else tuple(
                FrozenMatrix(w_OI.clone(memory_format=torch.contiguous_format) if copies else w_OI)
                for w_OI in weight_EOI
            )
        )

    def times(self, x_NI: Tensor, routes: Routes) -> Tensor:
        """x Wᵀ + b with the expert of each slot, a new tensor [N, O]."""
        if self.weight_EOI is not None:
            y_NO = _grouped_mm(x_NI, plain_values(self.weight_EOI).transpose(1, 2), offs=routes.ends_E)
            if self.bias_EO is not None:
                slots_N = torch.arange(len(x_NI), device=x_NI.device, dtype=torch.int32)
                y_NO += self.bias_EO[torch.searchsorted(routes.ends_E, slots_N, right=True)]
            return y_NO
        parts = [
            matrix.times(x, None if self.bias_EO is None else self.bias_EO[expert])
            for expert, matrix, x in self._of_experts(x_NI, routes)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def times_transpose(self, y_NO: Tensor, routes: Routes) -> Tensor:
        """y W, a new tensor [N, I]."""
        if self.weight_EOI is not None:
            return _grouped_mm(y_NO, plain_values(self.weight_EOI), offs=routes.ends_E)
        parts = [matrix.times_transpose(y) for _, matrix, y in self._of_experts(y_NO, routes)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _of_experts(self, x_NI: Tensor, routes: Routes) -> Iterator[tuple[int, FrozenMatrix, Tensor]]:
        """Those that have slots."""
        slots = torch.split(x_NI, routes.sizes())
        for expert, (matrix, x) in enumerate(zip(self.matrices, slots, strict=True)):
            if len(x):
                yield expert, matrix, x


class ExpertProduct:
    """y = x Wᵀ + b for each slot, plus what the pass's adapters add.

    groups: of layers, by the name of their first; each has an equal share of the outputs, side by side.
    """

    def __init__(self, groups: Sequence[str], matrices: StackedMatrices, holder: PassHolder) -> None:
        self.groups = groups
        self.matrices = matrices
        self._holder = holder

    def __call__(self, x_NI: Tensor, routes: Routes, adapters: ExpertAdapters) -> Tensor:
        if torch.is_grad_enabled():
            anchor = self._holder.anchor
            return cast(Tensor, _Product.apply(x_NI, anchor, self, routes, adapters))  # type: ignore[no-untyped-call]
        y_NO = self.matrices.times(x_NI, routes)
        self.add(x_NI, y_NO, adapters)
        return y_NO

    def add(self, x_NI: Tensor, y_NO: Tensor, adapters: ExpertAdapters) -> list[tuple[Tensor, ...]]:
        """What each group keeps for backward."""
        if len(self.groups) == 1:
            return [adapters.add(self.groups[0], x_NI, y_NO)]
        kept = []
        for group, y in zip(self.groups, y_NO.chunk(len(self.groups), 1), strict=True):
            own = y.contiguous()
            kept.append(adapters.add(group, x_NI, own))
            y.copy_(own)
        return kept


class Experts(nn.Module):
    """In the place of a model's own experts: Σ over a row's experts of weight · w2(gate(w1 x, w3 x)), or where weights
    are of inputs, of w2(gate(weight · w1 x, weight · w3 x))."""

    def __init__(
        self,
        path: str,
        module: nn.Module,
        family: Family,
        holder: PassHolder,
        leads: Mapping[str, str],
        *,
        stable: bool,
    ) -> None:
        super().__init__()
        self.name = path
        self._holder = holder
        self._gate = family.expert_gate(module, stable)
        self.num_experts = cast(int, module.num_experts)
        self._weighs_inputs = family.weighs_inputs
        layout = layout_of(module, family)
        gate_up_EOI, down_EOI = (
            w.transpose(1, 2) if layout.is_transposed else w
            for w in (cast(Tensor, module.gate_up_proj).detach(), cast(Tensor, module.down_proj).detach())
        )
        gate_up_bias, down_bias = (
            cast(Tensor, getattr(module, f"{name}_bias")).detach() if layout.has_bias else None
            for name in ("gate_up_proj", "down_proj")
        )
        if not layout.is_concatenated:
            gate_up_EOI = _side_by_side(gate_up_EOI)
            gate_up_bias = None if gate_up_bias is None else _side_by_side(gate_up_bias)
        self.is_grouped = can_group(gate_up_EOI)
        gate_up, down = (
            StackedMatrices(weight, bias, is_grouped=self.is_grouped)
            for weight, bias in ((gate_up_EOI, gate_up_bias), (down_EOI, down_bias))
        )
        groups = tuple(dict.fromkeys(leads[f"{path}.{name}"] for name in ("w1", "w3")))
        self.gate_up = ExpertProduct(groups, gate_up, holder)
        self.down = ExpertProduct((leads[f"{path}.w2"],), down, holder)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, D], int64 [T, K] and [T, K] -> [T, D]."""
        routes = Routes.of(top_k_index, self.num_experts, may_fill=not self.is_grouped)
        adapters = self._holder.context.experts(self.name, routes)
        x_ND = spread(hidden_states, routes)
        if self._weighs_inputs:
            x_ND = x_ND * to_slots(top_k_weights, routes)[:, None]
            top_k_weights = torch.ones_like(top_k_weights)
        inner_NI = self._gate(self.gate_up(x_ND, routes, adapters))
        return gather(self.down(inner_NI, routes, adapters), top_k_weights, routes)

    @property
    def is_static(self) -> bool:
        """Nothing waits for how many rows an expert has, and no weight is made anew in each walk."""
        products = (self.gate_up.matrices, self.down.matrices)
        return self.is_grouped and not any(isinstance(matrices.weight_EOI, Stored) for matrices in products)

    @property
    def joint_bytes(self) -> int:
        """What is held of experts that are one product, which `matrices` leaves out."""
        joint = [product.matrices.weight_EOI for product in (self.gate_up, self.down)]
        return sum(w.num_bytes if isinstance(w, Stored) else w.nbytes for w in joint if w is not None)

    def matrices(self) -> Iterator[FrozenMatrix]:
        yield from self.gate_up.matrices.matrices
        yield from self.down.matrices.matrices


class _Product(torch.autograd.Function):
    """See `linear._Product`."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, anchor: Tensor, product: ExpertProduct, routes: Routes, adapters: ExpertAdapters
    ) -> Tensor:
        y_NO = product.matrices.times(x_NI, routes)
        kept = product.add(x_NI, y_NO, adapters)
        ctx.product, ctx.routes, ctx.adapters = product, routes, adapters
        ctx.num_kept = [len(of_group) for of_group in kept]
        if any(kept):
            ctx.save_for_backward(x_NI, *(tensor for of_group in kept for tensor in of_group))
        return y_NO

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        product = cast(ExpertProduct, ctx.product)
        dy_NO = dy_NO.contiguous()
        dx_NI = product.matrices.times_transpose(dy_NO, ctx.routes) if ctx.needs_input_grad[0] else None
        if ctx.saved_tensors:
            x_NI, *kept = ctx.saved_tensors
            sum_NI = torch.zeros_like(x_NI) if dx_NI is None else dx_NI
            parts = dy_NO.chunk(len(product.groups), 1)
            for group, num, dy in zip(product.groups, ctx.num_kept, parts, strict=True):
                own, kept = tuple(kept[:num]), kept[num:]
                if own:
                    cast(ExpertAdapters, ctx.adapters).add_grads(group, x_NI, own, dy.contiguous(), sum_NI)
        return dx_NI, None, None, None, None


def can_group(weight_EOI: Tensor) -> bool:
    """Whether all experts of a layer are one product on the weight's device."""
    return weight_EOI.device.type == "cuda" and weight_EOI.dtype == torch.bfloat16


def find_experts(model: nn.Module, family: Family) -> dict[str, nn.Module]:
    """The experts of each layer by path, in the model's order."""
    return {path: module for path, module in model.named_modules() if type(module).__name__ in family.experts}


def frozen_parts(model: nn.Module, family: Family) -> list[nn.Module]:
    """Modules whose weights aren't in nn.Linear layers and are known all the same."""
    known = {*family.experts, *family.routers}
    others = [module for module in model.modules() if type(module).__name__ in family.stand_ins]
    own = [child for module in others for child in module.children() if isinstance(child, nn.Conv1d)]
    return own + [module for module in model.modules() if type(module).__name__ in known]


def layout_of(module: nn.Module, family: Family) -> ExpertLayout:
    if family.expert_layout is not None:
        return family.expert_layout
    return ExpertLayout(bool(module.is_transposed), bool(module.is_concatenated), bool(module.has_bias))


def describe_experts(experts: Mapping[str, nn.Module], family: Family, *, shares_factors: bool) -> Iterator[LinearInfo]:
    """The layers of each. Where factors are shared, the one on the side of the hidden states is one for all experts,
    and the other each expert's own; else both are its own."""
    for path, module in experts.items():
        num = cast(int, module.num_experts)
        gate_up, down = cast(Tensor, module.gate_up_proj), cast(Tensor, module.down_proj)
        hidden, inner = down.shape[:0:-1] if layout_of(module, family).is_transposed else down.shape[1:]
        if gate_up.numel() != num * 2 * inner * hidden:
            raise UnsupportedError(f"{path}: experts of {list(gate_up.shape)} and {list(down.shape)} can't be carried")
        outer, in_turn = 1 if shares_factors else num, not layout_of(module, family).is_concatenated
        for name in ("w1", "w3"):
            lead = f"{path}.w1" if shares_factors else f"{path}.{name}"
            yield LinearInfo(f"{path}.{name}", "mlp", hidden, inner, lead, outer, num, in_turn)
        yield LinearInfo(f"{path}.w2", "mlp", inner, hidden, f"{path}.w2", num, outer, in_turn)


def replace_experts(
    model: nn.Module,
    experts: dict[str, nn.Module],
    family: Family,
    holder: PassHolder,
    leads: Mapping[str, str],
    *,
    stable: bool,
) -> list[Experts]:
    """Put `Experts` in their places, and empty the dictionary: a layer's weights aren't held twice for long.

    leads: the group of each of their layers. stable: no row's bits depend on how many rows there are.
    """
    replaced = []
    while experts:
        path = next(iter(experts))
        replaced.append(Experts(path, experts.pop(path), family, holder, leads, stable=stable))
        model.set_submodule(path, replaced[-1])
    return replaced


def _side_by_side(interleaved: Tensor) -> Tensor:
    """Outputs gate, up, gate, up, ... in dimension 1 as all of gate, then all of up."""
    return torch.cat([interleaved[:, ::2], interleaved[:, 1::2]], 1)
