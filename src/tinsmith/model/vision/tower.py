"""The linear layers of a vision tower, opened to adapters, and where each picture's rows are in them.

A look takes some pictures end to end. In each layer a picture has rows in proportion to its features (four patches for
each of them, or a tile's patches and one more), so its rows follow from a layer's number of rows.
Shape letters: T rows of a layer, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from tinsmith.bases.catalog import is_of_tower
from tinsmith.errors import UnsupportedError
from tinsmith.lora_options import VISION
from tinsmith.model.context import LinearContext, LinearGradContext
from tinsmith.model.inspect import LinearInfo
from tinsmith.model.linear import LinearGroup, group_linears
from tinsmith.model.lora.backend import LoraBackend, LoraPass, LoraWeights, Segment

Bounds = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True, eq=False)
class Lens:
    """An adapter of the tower. weights: by group. number: another one for each, by which what is seen through it is
    kept: nobody changes it."""

    weights: Mapping[str, LoraWeights]
    number: int


class TowerHolder:
    """Where the tower's layers find the context of the look that is going on. anchor: see `linear.Holder`."""

    def __init__(self) -> None:
        self._context: LinearContext | None = None
        self.anchor = torch.zeros((), requires_grad=True)

    @property
    def context(self) -> LinearContext:
        return NO_LENS if self._context is None else self._context

    def enter(self, context: LinearContext) -> None:
        assert self._context is None, "a look is going on in this tower"
        self._context = context

    def leave(self) -> None:
        self._context = None


class NoLens:
    """The tower as it came. counts: how often each group was called."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def add_lora(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        self.counts[group] = self.counts.get(group, 0) + 1
        return ()

    def add_lora_grad(self, group: str, x_TI: Tensor, kept: tuple[Tensor, ...], dy_TO: Tensor, dx_TI: Tensor) -> None:
        raise AssertionError("what kept nothing has no gradients")


NO_LENS = NoLens()


class Shares:
    """The adapters of several pictures in one look. make: a context for rows of these bounds, one for each picture."""

    def __init__(self, num_features: Sequence[int], make: Callable[[Bounds], LinearGradContext]) -> None:
        self._ends = list(accumulate(num_features, initial=0))
        self._make = make
        self._made: dict[int, LinearGradContext] = {}

    def add_lora(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        return self._of(len(x_TI)).add_lora(group, x_TI, y_TO)

    def add_lora_grad(self, group: str, x_TI: Tensor, kept: tuple[Tensor, ...], dy_TO: Tensor, dx_TI: Tensor) -> None:
        self._of(len(x_TI)).add_lora_grad(group, x_TI, kept, dy_TO, dx_TI)

    def _of(self, num_rows: int) -> LinearGradContext:
        if num_rows not in self._made:
            total = self._ends[-1]
            self._made[num_rows] = self._make(list(pairwise(num_rows * end // total for end in self._ends)))
        return self._made[num_rows]


class Lenses:
    """A look through lenses without gradients: some pictures, each through its own."""

    def __init__(self, lenses: Sequence[Lens], backend: LoraBackend, bounds: Bounds) -> None:
        segments = [Segment(*span, lens.weights, None) for lens, span in zip(lenses, bounds, strict=True)]
        self._pass: LoraPass = backend(segments)

    def add_lora(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        return self._pass.add(group, x_TI, y_TO)

    def add_lora_grad(self, group: str, x_TI: Tensor, kept: tuple[Tensor, ...], dy_TO: Tensor, dx_TI: Tensor) -> None:
        raise AssertionError("a look without gradients is not differentiated")


class Rehearsal:
    """Keeps as much as adapters of a rank on every layer would, and adds nothing."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def add_lora(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        return (x_TI.new_empty(len(x_TI), self._rank),)

    def add_lora_grad(self, group: str, x_TI: Tensor, kept: tuple[Tensor, ...], dy_TO: Tensor, dx_TI: Tensor) -> None:
        pass


def tower_linears(model: nn.Module, towers: Sequence[str]) -> dict[str, nn.Linear]:
    """The layers that may carry adapters, by path, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and is_of_tower(name) and any(name.startswith(f"{path}.") for path in towers)
    }


def open_tower(
    model: nn.Module, linears: dict[str, nn.Linear], seen: Mapping[str, str], holder: TowerHolder
) -> tuple[tuple[LinearInfo, ...], list[LinearGroup]]:
    """Put grouped layers in the places of `linears`, which is emptied. seen: of each layer, the first that was called
    with its input."""
    firsts: dict[str, str] = {}
    for name in linears:
        firsts.setdefault(seen[name], name)  # a group goes by its first layer in the model's order
    leads = {name: firsts[seen[name]] for name in linears}
    infos = tuple(LinearInfo(name, VISION, m.in_features, m.out_features, leads[name]) for name, m in linears.items())
    return infos, group_linears(model, linears, leads, holder)


def check_looked_through(model: nn.Module, groups: Sequence[LinearGroup], look: NoLens) -> None:
    """Raises: UnsupportedError: a layer wasn't called exactly once in a look."""
    wrong = {name for group in groups if look.counts.get(group.name) != 1 for name in group.names}
    wrong |= {name for group in groups for name in group.drop_parts()}
    if wrong:
        raise UnsupportedError(
            f"{type(model).__name__}: layers of its vision tower not called exactly once for a picture: "
            f"{', '.join(sorted(wrong)[:6])}"
        )
