"""Full fine-tuning: runs whose parameters are all weights of a base, in a copy of their own.

The copy is the plain transformers model in float32; the served base is another model, which is never touched. A run's
row holds the weights themselves: the same parts, files and optimizer steps as an adapter's, see `runs` and `optimizer`.
What stays true: the one model that all full runs are computed with has weights only while one of them is computed.
Shape letter: P numbers of a row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby, pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tinsmith.bases.catalog import TOWER_PARTS, num_params
from tinsmith.errors import NoMemoryError, TooLargeError
from tinsmith.model import RowLayout, load_model
from tinsmith.training.runs import BYTES_PER_PARAM, RunSlot
from tinsmith.types import BaseInfo, FloatArray, RunSpec, Targets

WEIGHT_BYTES = 4  # of a parameter in float32
STAGING_BYTES = 4  # of a parameter's gradient in the making
GIB = 2**30
NO_PICTURES = (
    "full fine-tuning takes no pictures: send tokens alone, or create the run with a rank of 1 or more, whose adapters "
    "are trained and sampled with pictures"
)


class FullLayout(RowLayout):
    """Where each weight lies in a full run's row; tensors are named `<part>/<weight>`, as in transformers.

    Weights of a vision tower have a place, and no step goes over them: full runs take no pictures, so their gradients
    are none, which torch.optim.AdamW leaves alone where it decays what has a gradient of zero.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__([], Targets(), 1)
        self._shapes = shapes
        self.num_params = self.num_own = sum(map(prod, shapes.values()))

    def split(self, row_P: Tensor) -> dict[str, Tensor]:
        """Views of the row by weight."""
        parts = torch.split(row_P, [prod(shape) for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def learned(self, row_P: Tensor) -> list[Tensor]:
        """Weights that lie side by side are in one piece."""
        found: list[Tensor] = []
        at = 0
        for is_of_tower, own in groupby(self._shapes.items(), lambda item: _is_of_tower(item[0])):
            end = at + sum(prod(shape) for _, shape in own)
            if not is_of_tower:
                found.append(row_P[at:end])
            at = end
        return found

    def _named(self, part: str, host_P: FloatArray) -> dict[str, FloatArray]:
        ends = [0]
        for shape in self._shapes.values():
            ends.append(ends[-1] + prod(shape))
        spans = zip(self._shapes.items(), pairwise(ends), strict=True)
        return {f"{part}/{name}": host_P[start:end].reshape(shape) for (name, shape), (start, end) in spans}


def _is_of_tower(weight: str) -> bool:
    return not TOWER_PARTS.isdisjoint(weight.split("."))


class FullModel:
    """The plain model of a base in float32, whose weights are those of the run that is computed.

    free_bytes: memory that is left, None where it isn't known. make_room: lets go of what may go for a run.
    """

    def __init__(self, info: BaseInfo, device: torch.device, free_bytes: Callable[[], int | None]) -> None:
        self.info = info
        self.device = device
        self.free_bytes = free_bytes
        self.make_room: Callable[[], None] = lambda: None
        self._model: PreTrainedModel | None = None
        self._layout: FullLayout | None = None

    @cached_property
    def num_params(self) -> int:
        """From the headers of the weights' files."""
        return num_params(Path(self.info.path))

    @property
    def needed_bytes(self) -> int:
        """Of one run: weights, gradients, both moments, and gradients in the making; activations aren't counted."""
        return self.num_params * (BYTES_PER_PARAM + STAGING_BYTES)

    def fresh(self, spec: RunSpec) -> RunSlot:
        """A run that begins with the base's weights.

        Raises:
            TooLargeError: there is not enough memory; the message names what it needs and what is free.
        """
        lacking = self._lacking()
        if lacking:
            raise TooLargeError(f"{lacking}: train an adapter (rank 1 or more), or have the server given more memory")
        model = load_model(self.info, self.device, torch.float32)
        row_P = torch.cat([weight.detach().reshape(-1) for weight in model.parameters()])
        layout = self._take(model)
        return RunSlot(spec, layout, {"param": row_P}, step=0)

    def require_room(self, held_bytes: int) -> None:
        """For the state of a run that comes back. held_bytes: what of it is in this memory already.

        Raises:
            NoMemoryError: there isn't any; the message names it.
        """
        lacking = self._lacking(held_bytes)
        if lacking:
            raise NoMemoryError(f"{lacking}, and the request had no effect: have the server given more memory")

    def require_copy(self) -> None:
        """For a copy of a run's weights. Raises: NoMemoryError: there is no memory for it."""
        free, needed = self.free_bytes(), self.num_params * WEIGHT_BYTES
        if free is not None and needed > free:
            self.make_room()
            free = self.free_bytes()
        if free is not None and needed > free:
            raise NoMemoryError(
                f"a copy of the weights of a full run of {self.info.name} needs {needed / GIB:,.2f} GiB, and "
                f"{free / GIB:,.2f} GiB are free, and the request had no effect: send it again later, or have the "
                "server given more memory"
            )

    def layout(self) -> FullLayout:
        if self._layout is None:
            self._take(load_model(self.info, self.device, torch.float32))
        assert self._layout is not None
        return self._layout

    @contextmanager
    def bound(self, slot: RunSlot, staging_P: Tensor | None) -> Iterator[nn.Module]:
        """The model with the run's weights, views of its row, while the context lasts; gradients are added to
        `staging_P`, if it is given."""
        try:
            yield self.bind(slot, staging_P)
        finally:
            self._release()

    def bind(self, slot: RunSlot, staging_P: Tensor | None) -> nn.Module:
        """The same where the context has begun."""
        layout = self.layout()
        assert self._model is not None
        weights = layout.split(slot.rows["param"])
        grads = {} if staging_P is None else layout.split(staging_P)
        for name, parameter in self._model.named_parameters():
            parameter.grad = None
            parameter.data = weights[name]
            parameter.grad = grads.get(name)
        return self._model

    def copy_with(self, row_P: Tensor) -> PreTrainedModel:
        """Another plain model, which has these weights as its own. row_P: on any device."""
        weights = self.layout().split(row_P)
        model: PreTrainedModel = copy.deepcopy(self._model)  # type: ignore[assignment]
        for name, parameter in model.named_parameters():
            parameter.data = weights[name].to(self.device, copy=True)
        return model

    def _take(self, model: PreTrainedModel) -> FullLayout:
        """Keep the model without its weights."""
        layout = FullLayout({name: tuple(weight.shape) for name, weight in model.named_parameters()})
        self._model, self._layout = model, layout
        self._release()
        return layout

    def _release(self) -> None:
        assert self._model is not None
        for parameter in self._model.parameters():
            parameter.grad = None
            parameter.data = torch.empty(0, device=self.device)

    def _lacking(self, held_bytes: int = 0) -> str:
        """What is said where a run doesn't fit; empty where it does."""
        free, needed = self.free_bytes(), self.needed_bytes
        if free is not None and needed - held_bytes > free:
            self.make_room()
            free = self.free_bytes()
        if free is None or needed - held_bytes <= free:
            return ""
        return (
            f"full fine-tuning of {self.info.name} needs {needed / GIB:,.2f} GiB beside activations (weights, "
            f"gradients and two moments in float32), and {(free + held_bytes) / GIB:,.2f} GiB are free"
        )
