"""One training pass: items of any number of runs, computed in packs, each one forward and backward over the base.

Owns the order of things and what becomes of each item; the arithmetic is in the context and the head. Running out of
memory fails nothing that could be computed: the pack is made smaller, and if gradients of it were added already, the
pass begins again from its runs' accumulators. Packs are cut between data alone, so numbers don't change by it. A datum
that is alone in its pack is computed with activation checkpointing; only what doesn't fit even so fails its request.
Shape letters: T rows of a pack (padded), D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tinsmith.crashpoints import crash_point
from tinsmith.engine import PassStats
from tinsmith.errors import UserError
from tinsmith.model import BaseModel
from tinsmith.model.vision import Scene, UnseenError
from tinsmith.pictures import tokens_of
from tinsmith.training.budget import Budget
from tinsmith.training.head import Head
from tinsmith.training.lanes import Lane, OpProgress, load_inputs
from tinsmith.training.losses import loss_of
from tinsmith.training.packing import DatumRef, list_data, num_fitting
from tinsmith.training.replay import misfit
from tinsmith.training.runs import RunSlot, Staging
from tinsmith.training.shortage import is_out_of_memory, reclaim
from tinsmith.training.tower import look_back
from tinsmith.training.walk import walk
from tinsmith.types import Failure, RunId, TrainItem, TrainResult

MIB = 2**20


class TorchPass:
    """See `engine.TrainingPass`."""

    def __init__(
        self,
        base: BaseModel,
        head: Head,
        budget: Budget,
        slots: Mapping[RunId, RunSlot],
        items: Sequence[TrainItem],
        *,
        deterministic: bool,
    ) -> None:
        self._base = base
        self._head = head
        self._budget = budget
        self._items = items
        self._deterministic = deterministic
        self._slots = [slots[item.run_id] for item in items]
        self._stagings = {item.run_id: Staging(slots[item.run_id]) for item in items if item.backward}
        self._data = list_data(items)
        self._most: int | None = None  # work of a pack, once memory ran out
        self._recomputed: set[DatumRef] = set()
        self._scenes: dict[DatumRef, Scene | None] = {}
        faults = ((index, misfit(base, item)) for index, item in enumerate(items))
        self._unfit: dict[int, Failure] = {index: fault for index, fault in faults if fault is not None}
        self._find_pictures()
        self._has_added = False
        self._ops: list[OpProgress] = []
        self._begin()

    def advance(self, max_work: int) -> PassStats | None:
        while True:
            refs = self._choose(max_work if self._most is None else min(max_work, self._most))
            if not refs:
                self._next = len(self._data)
                return None
            unfit = self._unfit_alone(refs)
            if unfit is not None:
                self._refuse(refs[0], unfit)
                continue
            begun_at = self._next
            self._has_added = False
            try:
                stats = self._compute(refs)
            except UnseenError as error:
                self._unfit[refs[error.span].item] = _named(refs[error.span], error)
                self._go_back(begun_at, refs)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                self._budget.went_well(stats.work)
                return stats
            reclaim()
            self._make_smaller(refs)
            self._go_back(begun_at, refs)

    @property
    def is_computed(self) -> bool:
        return self._next == len(self._data)

    def commit(self) -> list[TrainResult | Failure]:
        assert self._next == len(self._data), "a pass was committed before all of it was computed"
        for staging in self._stagings.values():
            staging.commit()
            crash_point("pass.half_merged")
        return [op.outcome() for op in self._ops]

    def _go_back(self, begun_at: int, refs: Sequence[DatumRef]) -> None:
        """To where the pack began, or to the beginning if it may have added something already."""
        if self._has_added:
            for staging in self._stagings.values():
                staging.restart()
            self._begin()
            return
        if self._next != begun_at:
            self._next = begun_at
            for ref in refs:
                self._ops[ref.item].num_left += 1
        for item, failure in self._unfit.items():
            self._ops[item].fail(failure)

    def _begin(self) -> None:
        """From the first datum; the staging rows are as the runs' accumulators."""
        self._ops = [
            OpProgress(
                item=item,
                slot=slot,
                staging=self._stagings[item.run_id] if item.backward else None,
                num_left=len(item.data),
                loss_fn=loss_of(item.loss),
                failure=self._unfit.get(index),
            )
            for index, (item, slot) in enumerate(zip(self._items, self._slots, strict=True))
        ]
        self._next = 0

    def _find_pictures(self) -> None:
        """Of all data; an item whose pictures can't be where it says fails alone."""
        for ref in self._data:
            datum = self._items[ref.item].data[ref.datum]
            if datum.pictures:
                try:
                    self._scenes[ref] = self._base.scene(datum.tokens, datum.pictures)
                except UserError as error:
                    self._unfit.setdefault(ref.item, _named(ref, error))

    def _choose(self, max_work: int) -> list[DatumRef]:
        """The data of the next pack, in order. Those of an op that failed already are passed over."""
        left = [ref for ref in self._data[self._next :] if self._ops[ref.item].failure is None]
        return left[: num_fitting([self._work(ref) for ref in left], max_work)]

    def _work(self, ref: DatumRef) -> int:
        """Counted as in `TrainItem.work`."""
        op = self._ops[ref.item]
        return op.loss_fn.work(ref.num_tokens + tokens_of(op.item.data[ref.datum].pictures))

    def _wants_grad(self, refs: Sequence[DatumRef]) -> bool:
        return any(self._items[ref.item].backward for ref in refs)

    def _recomputes(self, refs: Sequence[DatumRef]) -> bool:
        """Whether the pack is computed with activation checkpointing; unless always, only what can't be cut."""
        if self._budget.always_recomputes:
            return True
        if len(refs) > 1 or not self._wants_grad(refs) or not self._budget.may_recompute:
            return False
        return refs[0] in self._recomputed or not self._budget.can_keep(refs[0].num_tokens)

    def _unfit_alone(self, refs: Sequence[DatumRef]) -> Failure | None:
        """Why a single datum isn't even tried, if it is known that the memory can't hold it."""
        if len(refs) > 1 or not self._wants_grad(refs) or self._budget.can_keep(refs[0].num_tokens):
            return None
        lacking = self._budget.shortfall(refs[0].num_tokens, recompute=self._budget.may_recompute)
        return None if lacking is None else _does_not_fit(refs[0], *lacking)

    def _refuse(self, ref: DatumRef, failure: Failure) -> None:
        self._unfit[ref.item] = failure
        self._ops[ref.item].fail(failure)

    def _make_smaller(self, refs: Sequence[DatumRef]) -> None:
        """After there was no memory for this pack: what will be different at the next try."""
        if len(refs) > 1:
            self._most = self._budget.ran_out(sum(self._work(ref) for ref in refs))
            return
        ref = refs[0]
        can_recompute = self._wants_grad(refs) and self._budget.may_recompute and not self._budget.always_recomputes
        if can_recompute and ref not in self._recomputed:
            self._recomputed.add(ref)
        else:
            needed = self._budget.needed(ref.num_tokens, recompute=can_recompute)
            self._unfit[ref.item] = _does_not_fit(ref, needed, self._budget.free_bytes())

    def _compute(self, refs: Sequence[DatumRef]) -> PassStats:
        lanes = self._take(refs)
        num_tokens = lanes[-1].end
        stats = PassStats(
            num_runs=len({lane.op.item.run_id for lane in lanes}),
            num_tokens=num_tokens,
            work=sum(self._work(ref) for ref in refs),
        )
        h_TD = walk(
            self._base,
            lanes,
            backward=self._wants_grad(refs),
            recompute=self._recomputes(refs),
            deterministic=self._deterministic,
        )
        self._has_added = True
        for lane in lanes:
            lane.op.max_runs = max(lane.op.max_runs, stats.num_runs)
            lane.op.max_tokens = max(lane.op.max_tokens, num_tokens)
        with torch.no_grad():
            dh_TD = self._head.run(h_TD.detach(), lanes)
        if any(lane.is_live for lane in lanes):
            torch.autograd.backward(h_TD, dh_TD)
            if self._base.eyes is not None:
                look_back(self._base.eyes, lanes, deterministic=self._deterministic)
        return stats

    def _take(self, refs: Sequence[DatumRef]) -> list[Lane]:
        """The lanes of the chosen data."""
        lanes: list[Lane] = []
        for ref in refs:
            start = lanes[-1].end if lanes else 0
            lane = Lane(self._ops[ref.item], ref, start, start + ref.num_tokens, scene=self._scenes.get(ref))
            lanes.append(lane)
        load_inputs(lanes, self._base.device)
        for lane in lanes:
            lane.op.num_left -= 1
        after = self._data.index(refs[-1], self._next) + 1
        is_end = all(self._ops[ref.item].failure is not None for ref in self._data[after:])
        self._next = len(self._data) if is_end else after
        return lanes


def _named(ref: DatumRef, error: UserError) -> Failure:
    return Failure(error.code, error.category, f"datum {ref.datum}: {error.message}")


def _does_not_fit(ref: DatumRef, needed: int | None, free: int | None) -> Failure:
    sizes = "" if needed is None else f" (about {needed / MIB:,.0f} MiB needed"
    sizes += "" if not sizes else (")" if free is None else f", {free / MIB:,.0f} MiB free)")
    return Failure(
        code="out_of_memory",
        category="user",
        message=f"datum {ref.datum}: there is not enough memory for a sequence of {ref.num_tokens} tokens{sizes}, and "
        "the request had no effect: send shorter sequences, or have the server given more memory",
    )
