"""What a LoRA backend has to do: the adapters of many runs, forward and backward, in one group of linear layers.

A group is one or more linear layers with the same input (q, k and v; gate and up; o and down are groups of one). The
base computes their outputs as one product, so y holds them side by side: [T, O] with O = O1 + O2 + .... An adapter has
for a group one matrix A, whose rows are those of its L layers one after another, and L matrices B. With u = x Aᵀ

    forward    y[:, o_l] += s_l · u[:, l] B_lᵀ                             for each layer l
    backward   g[:, l] = s_l · dy[:, o_l] B_l,     dx += g A
               dA += gᵀ x,   dB_l += s_l · dy[:, o_l]ᵀ u[:, l]

where s_l is the layer's scale, o_l are its columns in y, and l, as an index of u and g, stands for the R columns
l·R .. (l+1)·R.

What stays true: rows outside of all segments are left alone; gradients of one segment are added in the order of its
`live` ranges, and those of a run in the order of its segments; nothing is averaged or scaled but by the
scales.
Shape letters: T rows of the pass, N rows of a segment, I inputs, O outputs of a group and O_l of a layer, R rank,
L layers of a group, K = L · R.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from tinsmith.model.lora.masks import RowMask


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """An adapter's matrices for one group, or their gradients: contiguous views of the run's row.

    a_KI: A of the L layers one below the other. bs: of each layer, B [O_l, R]. scales: of each layer, alpha / rank as a
        rule; not needed of gradients.
    """

    a_KI: Tensor
    bs: tuple[Tensor, ...]
    scales: tuple[float, ...] = ()

    @property
    def scale(self) -> float | None:
        """That of all layers, if they have the same."""
        first, *others = self.scales
        return None if any(other != first for other in others) else first

    @property
    def rank(self) -> int:
        return self.bs[0].shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a_KI, *self.bs)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """An adapter's matrices for one group of all experts of a layer, or their gradients: contiguous views of the row.

    a_EKI: as in `LoraWeights`, of each expert, or one of all. bs: of each layer, [E, O_l, R], or [1, O_l, R]. scales:
        as there.
    """

    a_EKI: Tensor
    bs: tuple[Tensor, ...]
    scales: tuple[float, ...] = ()

    def of(self, expert: int) -> LoraWeights:
        a_KI, *bs = (matrices[expert % len(matrices)] for matrices in self.tensors)
        return LoraWeights(a_KI, tuple(bs), self.scales)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a_EKI, *self.bs)


@dataclass(slots=True)
class Segment:
    """Rows start..end of the pass belong to one adapter. Segments are disjoint, in the order of their rows.

    Args:
        weights, grads: by group (its name is that of its first layer). A group that isn't in `weights` has no adapter
            here. grads is None if the rows want no backward; else it has the keys of `weights`.
        live: the ranges of rows, ascending and within start..end, whose dy may differ from zero; all others must not
            be touched in the backward pass, as their x may be infinite. Set after the forward pass, before the first
            `add_grads`.
        experts, expert_grads: the same as weights and grads for groups of experts; see `lora.experts`.
        mask: what is left out of its rows' inputs; `masked.masked` minds it, backends needn't.
        shares_grads: other segments may add to some of the same gradients, though not to all.
    """

    start: int
    end: int
    weights: Mapping[str, LoraWeights]
    grads: Mapping[str, LoraWeights] | None
    live: Sequence[tuple[int, int]] = field(default_factory=list)
    experts: Mapping[str, ExpertWeights] = field(default_factory=dict)
    expert_grads: Mapping[str, ExpertWeights] | None = None
    shares_grads: bool = False
    mask: RowMask | None = None


class LoraPass(Protocol):
    """The adapters of one pass over the base. Holds no activations, so that a group may be computed twice."""

    def add(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        """Add the adapters' part to y, in place. Called without autograd; x is contiguous, y as well.

        Returns:
            What `add_grads` will want beside x: tensors of the backend's own choosing, in its own shapes. Empty if no
            segment has gradients in this group; then neither they nor x are kept, and `add_grads` isn't called.
        """
        ...

    def keep(self, group: str, x_TI: Tensor) -> tuple[Tensor, ...]:
        """What `add` would return, made anew: for rows that are differentiated apart from their forward pass."""
        ...

    def add_grads(self, group: str, x_TI: Tensor, kept: tuple[Tensor, ...], dy_TO: Tensor, dx_TI: Tensor) -> None:
        """Add to dx and to the segments' gradients, in place. x and kept as in a call of `add`; all contiguous."""
        ...


class LoraBackend(Protocol):
    """Makes the `LoraPass` of one pass. Work that depends on segments alone belongs here, or in a first call."""

    def __call__(self, segments: Sequence[Segment]) -> LoraPass: ...
