"""The adapters in one layer's experts: the segments of a pass, cut by expert and handed to a LoRA backend.

Rows of a segment that chose one expert lie together among the slots of the routes, so each (segment, expert) is a
segment of its own for the backend, with that expert's matrices; a factor that experts share is the same view in all.
What stays true: gradients are added part by part, so where a part is one datum, those of a shared factor are added in
the order of the data and, within one, of the experts.
Shape letters: N slots, I inputs and O outputs of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tinsmith.model.lora.backend import LoraBackend, LoraPass, Segment
from tinsmith.model.lora.masked import masked
from tinsmith.model.routes import Routes

BeforeGrads = Callable[[str, int], None]


class NoAdapters:
    """See `model.ExpertAdapters`."""

    def add(self, group: str, x_NI: Tensor, y_NO: Tensor) -> tuple[Tensor, ...]:
        return ()

    def add_grads(self, group: str, x_NI: Tensor, kept: tuple[Tensor, ...], dy_NO: Tensor, dx_NI: Tensor) -> None:
        raise AssertionError("nothing was kept")


NO_ADAPTERS = NoAdapters()


@dataclass(slots=True)
class _Part:
    """own: the pass's segments. cut: (index of the own segment, expert, segment among the slots)."""

    own: Sequence[Segment]
    cut: Sequence[tuple[int, int, Segment]]
    lora: LoraPass
    num_kept: dict[str, int] = field(default_factory=dict)
    is_live: bool = False


class ExpertLora:
    """See `model.ExpertAdapters`.

    Args:
        parts: the segments of the pass, in the order in which their gradients are added.
        name: of the layer.
        before_grads: called with the group and the number of a part before gradients of it are added; from then on its
            segments' `live` ranges hold.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[Segment]],
        name: str,
        routes: Routes,
        backend: LoraBackend,
        before_grads: BeforeGrads | None = None,
    ) -> None:
        self._routes = routes
        self._before_grads = before_grads
        groups = (f"{name}.w1", f"{name}.w3", f"{name}.w2")
        self._parts = [_cut(part, groups, routes, backend) for part in parts]

    def add(self, group: str, x_NI: Tensor, y_NO: Tensor) -> tuple[Tensor, ...]:
        kept: tuple[Tensor, ...] = ()
        for part in self._parts:
            own = part.lora.add(group, x_NI, y_NO)
            part.num_kept[group] = len(own)
            kept += own
        return kept

    def add_grads(self, group: str, x_NI: Tensor, kept: tuple[Tensor, ...], dy_NO: Tensor, dx_NI: Tensor) -> None:
        for number, part in enumerate(self._parts):
            own, kept = kept[: part.num_kept[group]], kept[part.num_kept[group] :]
            if not own:
                continue
            if self._before_grads is not None:
                self._before_grads(group, number)
            if not part.is_live:
                part.is_live = True
                _find_live(part, self._routes)
            part.lora.add_grads(group, x_NI, own, dy_NO, dx_NI)


def _cut(own: Sequence[Segment], groups: Sequence[str], routes: Routes, backend: LoraBackend) -> _Part:
    with_experts = [index for index, segment in enumerate(own) if any(group in segment.experts for group in groups)]
    ranges = routes.ranges([(own[index].start, own[index].end) for index in with_experts])
    cut = [
        (with_experts[which], expert, _segment(own[with_experts[which]], groups, expert, first, end, routes))
        for which, expert, first, end in ranges.tolist()
    ]
    cut.sort(key=lambda each: each[2].start)
    return _Part(own, cut, masked([segment for _, _, segment in cut], backend))


def _segment(own: Segment, groups: Sequence[str], expert: int, first: int, end: int, routes: Routes) -> Segment:
    weights = {group: own.experts[group].of(expert) for group in groups if group in own.experts}
    grads = None if own.expert_grads is None else {group: own.expert_grads[group].of(expert) for group in weights}
    mask = None if own.mask is None else own.mask.at(routes.rows_N[first:end] - own.start).of_expert(expert)
    return Segment(first, end, weights, grads, shares_grads=True, mask=mask)


def _find_live(part: _Part, routes: Routes) -> None:
    live = [(index, span) for index, segment in enumerate(part.own) for span in segment.live]
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for which, expert, first, end in routes.ranges([span for _, span in live]).tolist():
        found.setdefault((live[which][0], expert), []).append((first, end))
    for index, expert, segment in part.cut:
        segment.live = found.get((index, expert), [])
