"""How an adapter lies in memory: one flat float32 row, of which every A and B is a view, as are those of all experts.

Knows names, offsets and shapes, and how a row becomes named tensors and back. Parameters, gradients and moments of a
run have the same layout, so saving, clipping and stepping work on whole rows.
Layers with the same input may have different ranks. In the row all of them have the greatest; what is beyond a layer's
own rank is zero and stays so, since the gradient of a row of A is a product with a column of B, and the other way
round. Named tensors have the layers' own ranks.
Shape letters: P numbers of a row, R rank, I inputs and O outputs of a linear layer, K rows of A of a group's layers,
E experts, or 1 where they share a factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tinsmith.errors import UserError
from tinsmith.files.checkpoint_file import one_piece
from tinsmith.lora_options import DEFAULT_ALPHA, PLAIN, LoraOptions
from tinsmith.model.inspect import HEAD, LinearInfo
from tinsmith.model.lora.backend import ExpertWeights, LoraWeights
from tinsmith.types import FloatArray, RunId, RunSpec, Targets

HEAD_STATE_NAME = "model.unembed_tokens"

Array = TypeVar("Array", Tensor, FloatArray)  # a row, on a device or on the host


@dataclass(frozen=True, slots=True)
class Place:
    """Where A [R, I] and B [O, R] of one layer begin in the row; of experts A [E, R, I] and B [E, O, R].

    rank: in the row; own_rank: the layer's. scale: of what its adapter computes.
    """

    linear: LinearInfo
    rank: int
    own_rank: int
    scale: float
    a_offset: int
    b_offset: int

    @property
    def state_name(self) -> str:
        """The layer's name in a RunState."""
        return HEAD_STATE_NAME if self.linear.name == HEAD else self.linear.name

    @property
    def a_shape(self) -> tuple[int, ...]:
        one = (self.rank, self.linear.in_features)
        return (self.linear.num_a, *one) if self.linear.is_of_experts else one

    @property
    def b_shape(self) -> tuple[int, ...]:
        one = (self.linear.out_features, self.rank)
        return (self.linear.num_b, *one) if self.linear.is_of_experts else one

    def views(self, row_P: Array) -> tuple[Array, Array]:
        a, b = (
            row_P[offset : offset + math.prod(shape)].reshape(shape)
            for offset, shape in ((self.a_offset, self.a_shape), (self.b_offset, self.b_shape))
        )
        return a, b

    def own(self, a: Array, b: Array) -> tuple[Array, Array]:
        """What of A and B is the layer's own: views."""
        return a[..., : self.own_rank, :], b[..., : self.own_rank]

    @property
    def num_own(self) -> int:
        """Numbers of A and B that are the layer's own."""
        return (math.prod(self.a_shape) + math.prod(self.b_shape)) // self.rank * self.own_rank


@dataclass(frozen=True, slots=True)
class _Pieces:
    """What of a row is a group's, in its order: the shapes of A of all layers and of B of each; their scales."""

    shapes: tuple[tuple[int, ...], ...]
    scales: tuple[float, ...]
    is_of_experts: bool


class RowLayout:
    """The places of one adapter's matrices in its row, for the layers that `targets` choose.

    Layers with the same input lie together, first the A of all, then the B of each, so that their A is one matrix.
    Rows are float32; `compute_dtype` is what passes compute in. `num_own`: numbers of the row that may differ from
    zero.

    Raises:
        UserError: the options name a layer that isn't among the chosen ones.
    """

    def __init__(
        self,
        linears: Iterable[LinearInfo],
        targets: Targets,
        rank: int,
        compute_dtype: torch.dtype = torch.float32,
        *,
        alpha: float = DEFAULT_ALPHA,
        options: LoraOptions = PLAIN,
    ) -> None:
        self.compute_dtype = compute_dtype
        chosen = [linear for linear in linears if linear.is_targeted(targets)]
        unknown = options.names - {name for linear in chosen for name in (linear.group, linear.layer)}
        if unknown:
            raise UserError(f"this run trains no {', '.join(sorted(unknown))}: name layers that it trains")
        groups: dict[str, list[LinearInfo]] = {}
        for linear in chosen:
            groups.setdefault(linear.lead, []).append(linear)
        places: dict[str, Place] = {}
        offset = 0
        for group in groups.values():
            own_ranks = {linear.name: options.rank_of(linear.group, linear.layer, rank) for linear in group}
            for linear in group:
                own_rank, scale = own_ranks[linear.name], options.scale_of(linear.group, linear.layer, rank, alpha)
                place = Place(linear, max(own_ranks.values()), own_rank, scale, offset, 0)
                places[linear.name] = place
                offset += math.prod(place.a_shape)
            for linear in group:
                places[linear.name] = place = replace(places[linear.name], b_offset=offset)
                offset += math.prod(place.b_shape)
        self.places: Mapping[str, Place] = {linear.name: places[linear.name] for linear in chosen}
        self.groups: Mapping[str, Sequence[Place]] = {
            lead: [places[linear.name] for linear in group] for lead, group in groups.items()
        }
        self._pieces = {lead: _pieces_of(places) for lead, places in self.groups.items()}
        self._sizes = [math.prod(shape) for pieces in self._pieces.values() for shape in pieces.shapes]
        self.num_params = offset
        self.num_own = sum(place.num_own for place in places.values())

    @classmethod
    def of(cls, linears: Iterable[LinearInfo], spec: RunSpec, compute_dtype: torch.dtype = torch.float32) -> RowLayout:
        return cls(linears, spec.targets, spec.rank, compute_dtype, alpha=spec.alpha, options=spec.options)

    def views(self, row_P: Tensor) -> dict[str, LoraWeights]:
        """By group, which is named for its first layer (`lm_head` for the head): views of the row. Without experts."""
        return {
            lead: LoraWeights(matrices[0], matrices[1:], self._pieces[lead].scales)
            for lead, matrices in self._matrices(row_P, of_experts=False)
        }

    def expert_views(self, row_P: Tensor) -> dict[str, ExpertWeights]:
        """The same for groups of experts."""
        return {
            lead: ExpertWeights(matrices[0], matrices[1:], self._pieces[lead].scales)
            for lead, matrices in self._matrices(row_P, of_experts=True)
        }

    def _matrices(self, row_P: Tensor, *, of_experts: bool) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        """Of each group A of all its layers and B of each. A row is cut at once: a pass makes views of many rows."""
        if of_experts not in (pieces.is_of_experts for pieces in self._pieces.values()):
            return
        flat = iter(row_P.split_with_sizes(self._sizes))
        for lead, pieces in self._pieces.items():
            matrices = tuple(next(flat).view(shape) for shape in pieces.shapes)
            if pieces.is_of_experts == of_experts:
                yield lead, matrices

    def learned(self, row_P: Tensor) -> list[Tensor]:
        """The pieces of the row that optimizer steps go over: views."""
        return [row_P]

    def row_to_tensors(self, part: str, row_P: Tensor, *, copy: bool = True) -> dict[str, FloatArray]:
        """On the host, named `<part>/<layer>.lora_A` and `.lora_B`: views of one flat array, in the row's order.

        What is beyond a layer's own rank is left out.

        copy: without it they share the row's memory if that is on the host.
        """
        host_P: FloatArray = row_P.detach().to("cpu", torch.float32, copy=copy).numpy()
        return self._named(part, host_P)

    def tensors_to_row(
        self, part: str, tensors: Mapping[str, FloatArray], device: torch.device, *, may_keep: bool = False
    ) -> Tensor:
        """The row of a part; all zero if no tensor of that part is there.

        may_keep: the row may be the tensors' own memory, which it is if they lie there in one piece, in its order.

        Raises:
            UserError: a tensor is missing, is one too many, or has another shape; the message names it.
        """
        given = {name: tensor for name, tensor in tensors.items() if name.startswith(part + "/")}
        if not given:
            return torch.zeros(self.num_params, device=device)
        is_padded = self.num_own < self.num_params
        room_P: FloatArray = np.zeros(self.num_params if is_padded else 1, np.float32)
        wanted = self._named(part, room_P if is_padded else np.broadcast_to(room_P, self.num_params))
        for name, place in wanted.items():
            if name not in given:
                raise UserError(f"the weights lack {name}: they were made for other layers or another base model")
            if given[name].shape != place.shape:
                raise UserError(
                    f"{name} has shape {list(given[name].shape)}, this run needs {list(place.shape)}: "
                    "the weights were made with another rank or another base model"
                )
        surplus = given.keys() - wanted.keys()
        if surplus:
            raise UserError(
                f"the weights hold {min(surplus)}, for which this run has no layer: create a run that trains it"
            )
        if is_padded:
            for name, place in wanted.items():
                place[...] = given[name]
            return torch.from_numpy(room_P).to(device)
        flat_P = one_piece([given[name] for name in wanted])
        if flat_P is None:
            row_P = torch.empty(self.num_params)
            np.concatenate([given[name].reshape(-1) for name in wanted], out=row_P.numpy(), casting="unsafe")
            return row_P.to(device)
        if not flat_P.flags.writeable:
            return torch.from_numpy(flat_P.copy()).to(device)
        return torch.from_numpy(flat_P).to(device, copy=not may_keep or device.type != "cpu")

    def _named(self, part: str, host_P: FloatArray) -> dict[str, FloatArray]:
        """The layers' own numbers in a row by name, in the row's order: views."""
        named: dict[str, FloatArray] = {}
        for places in self.groups.values():
            own = [(place.state_name, *place.own(*place.views(host_P))) for place in places]
            named |= {f"{part}/{name}.lora_A": a for name, a, _ in own}
            named |= {f"{part}/{name}.lora_B": b for name, _, b in own}
        return named


def _pieces_of(places: Sequence[Place]) -> _Pieces:
    first, scales = places[0], tuple(place.scale for place in places)
    a_shape: tuple[int, ...] = (len(places) * first.rank, first.linear.in_features)
    if first.linear.is_of_experts:
        assert first.linear.num_a == 1 or len(places) == 1, "layers side by side share their A among all experts"
        a_shape = (first.linear.num_a, *a_shape)
    return _Pieces((a_shape, *(place.b_shape for place in places)), scales, first.linear.is_of_experts)


def shape_of(spec: RunSpec) -> RunSpec:
    """Equal for runs that have the same layout on the same base."""
    return replace(spec, run_id=RunId(""), base_model="", seed=0)


def init_row(layout: RowLayout, spec: RunSpec) -> Tensor:
    """A fresh adapter [P] on the host: A uniform in ±1/sqrt(in), B zero.

    The distribution is that of peft, kaiming_uniform(a=sqrt(5)) (He et al. 2015, equation 10 with gain sqrt(1/3)).
    The same spec gives the same bits, whatever the thread count.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    row_P = torch.zeros(layout.num_params)
    for place in layout.places.values():
        a, _ = place.own(*place.views(row_P))
        bound = place.linear.in_features**-0.5
        a.uniform_(-bound, bound, generator=generator)
    return row_P
