"""The training pass as the base sees it: packed attention, and each run's own adapter in every linear layer.

Which rows are computed as one segment of an adapter is decided here. In deterministic mode a segment is one datum: a
product over several would have bits that depend on where a pass was cut. Otherwise neighbouring data of one run are one
segment. Gradients are added straight into the runs' staging rows in (run, seq, datum) order.
Shape letters: T rows of the pass, I inputs, O outputs, H and G heads, D head size, C channels of a convolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from tinsmith.model import ExpertAdapters, Routes
from tinsmith.model.attention import AttentionKind
from tinsmith.model.delta import Chunks, DeltaKind, mix
from tinsmith.model.lora import ExpertLora, LoraBackend, Segment, masked
from tinsmith.training.dropout import mask_of
from tinsmith.training.expert_loads import ExpertLoads
from tinsmith.training.lanes import Lane, OpProgress
from tinsmith.training.replay import Replay
from tinsmith.training.varlen import Attention


class LaneAdapters:
    """The adapters of the lanes' rows in linear layers; see `model.context.LinearGradContext`.

    An op that is not complete in this pack may yet fail and be taken back, so its staging row is marked before its
    first gradient; it is the pack's last op, and its adapters are a pass of their own.
    """

    def __init__(self, lanes: Sequence[Lane], backend: LoraBackend, *, deterministic: bool) -> None:
        num_settled = next((i for i, lane in enumerate(lanes) if lane.op.num_left), len(lanes))
        self._unfinished: OpProgress | None = lanes[num_settled].op if num_settled < len(lanes) else None
        assert all(lane.op is self._unfinished for lane in lanes[num_settled:]), "a pack goes on after an op it cuts"
        self._spans = [
            span
            for part in (lanes[:num_settled], lanes[num_settled:])
            for span in _spans(part, may_merge=not deterministic)
        ]
        self._segments = [_segment(span) for span in self._spans]
        num_first = sum(span[-1].end <= lanes[num_settled].start for span in self._spans) if self._unfinished else None
        self._backend = backend
        self._settled = masked(self._segments[:num_first], backend)
        self._cut = masked(self._segments[num_first:], backend) if num_first is not None else None
        whole = [self._segments[:num_first]] + ([self._segments[num_first:]] if num_first is not None else [])
        self._parts = [[segment] for segment in self._segments] if deterministic else whole
        self._first_cut = len(self._parts) if num_first is None else num_first if deterministic else 1
        self._num_kept: dict[str, int] = {}
        self._is_backward = False

    def add_lora(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        kept = self._settled.add(group, x_TI, y_TO)
        if self._cut is None:
            return kept
        self._num_kept[group] = len(kept)
        return kept + self._cut.add(group, x_TI, y_TO)

    def add_lora_grad(self, group: str, x_TI: Tensor, kept: tuple[Tensor, ...], dy_TO: Tensor, dx_TI: Tensor) -> None:
        self._begin_backward()
        if self._cut is None:
            self._settled.add_grads(group, x_TI, kept, dy_TO, dx_TI)
            return
        first, rest = kept[: self._num_kept[group]], kept[self._num_kept[group] :]
        if first:
            self._settled.add_grads(group, x_TI, first, dy_TO, dx_TI)
        if rest:
            assert self._unfinished is not None
            assert self._unfinished.staging is not None
            self._unfinished.staging.mark(group)
            self._cut.add_grads(group, x_TI, rest, dy_TO, dx_TI)

    def _before_expert_grads(self, group: str, part: int) -> None:
        self._begin_backward()
        if part >= self._first_cut:
            assert self._unfinished is not None
            assert self._unfinished.staging is not None
            self._unfinished.staging.mark(group)

    def _begin_backward(self) -> None:
        if not self._is_backward:
            self._is_backward = True
            for span, segment in zip(self._spans, self._segments, strict=True):
                segment.live = _live_ranges(span)


class TrainingContext(LaneAdapters):
    """See `model.GradContext`."""

    def __init__(
        self, lanes: Sequence[Lane], attention: Attention, backend: LoraBackend, *, deterministic: bool
    ) -> None:
        super().__init__(lanes, backend, deterministic=deterministic)
        self._attention = attention
        self._lengths = [(lane.end - lane.start, 0) for lane in lanes]
        self._chunks: Chunks | None = None  # of layers that mix, made for the first
        self._loads = ExpertLoads(lanes)
        self._replay = Replay(lanes)

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, kind: AttentionKind) -> Tensor:
        return self._attention.attend(q_HTD, k_GTD, v_GTD, kind)

    def mix(self, layer: int, mixed_TC: Tensor, g_TH: Tensor, beta_TH: Tensor, kind: DeltaKind) -> Tensor:
        if self._chunks is None:
            self._chunks = Chunks(self._lengths, mixed_TC.device)
        return mix(mixed_TC, g_TH, beta_TH, kind, self._chunks)

    def experts(self, name: str, routes: Routes) -> ExpertAdapters:
        self._loads.see(name, routes)
        return ExpertLora(self._parts, name, routes, self._backend, self._before_expert_grads)

    def choose(self, router: int, experts_TK: Tensor) -> Tensor:
        return self._replay.choose(router, experts_TK)

    def book_loads(self) -> None:
        """After the walk: tell each op how many of its tokens went to which experts."""
        self._loads.book()


def _spans(lanes: Iterable[Lane], *, may_merge: bool) -> list[list[Lane]]:
    """The lanes by segment: neighbours of one run that all want gradients, or all none."""
    spans: list[list[Lane]] = []
    for lane in lanes:
        before = spans[-1][-1].op if spans else None
        is_alike = (
            before is not None and before.slot is lane.op.slot and (before.staging is None) == (lane.op.staging is None)
        )
        if may_merge and is_alike:
            spans[-1].append(lane)
        else:
            spans.append([lane])
    return spans


def _segment(span: Sequence[Lane]) -> Segment:
    op = span[0].op
    grads = None if op.staging is None else op.staging.views
    expert_grads = None if op.staging is None else op.staging.expert_views
    return Segment(
        span[0].start,
        span[-1].end,
        op.slot.views,
        grads,
        experts=op.slot.expert_views,
        expert_grads=expert_grads,
        mask=mask_of(span),
    )


def _live_ranges(span: Iterable[Lane]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for lane in span:
        if not lane.is_live:
            continue
        if ranges and ranges[-1][1] == lane.start:
            ranges[-1] = ranges[-1][0], lane.end
        else:
            ranges.append((lane.start, lane.end))
    return ranges
