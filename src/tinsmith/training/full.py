"""Passes of full runs, each computed by itself: by the plain transformers model under autograd, a datum at a time.

So its bits depend on nothing else. What stays true: nothing of the run changes before a pass commits. If a request
fails after some of its data were added, the pass begins again without it. Passes of several runs may be open at one
time: the model has a run's weights only while that run is computed.
Shape letters: P numbers of a row, N tokens of a datum, K targets a position, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tinsmith.engine import PassStats, TrainingPass
from tinsmith.errors import UserError
from tinsmith.training.full_model import NO_PICTURES, FullModel
from tinsmith.training.head import not_finite
from tinsmith.training.losses import TARGETS, Evaluation, loss_of
from tinsmith.training.packing import DatumRef, list_data
from tinsmith.training.runs import RunSlot
from tinsmith.training.shortage import is_out_of_memory, reclaim
from tinsmith.types import Datum, Failure, FloatArray, TrainItem, TrainResult


class FullPass:
    """See `engine.TrainingPass`. Items of one full run."""

    def __init__(self, model: FullModel, slot: RunSlot, items: Sequence[TrainItem]) -> None:
        self._owner = model
        self._slot = slot
        self._items = items
        self._losses = [loss_of(item.loss) for item in items]
        self._failures: dict[int, Failure] = {}
        self._data = list_data(items)
        self._begin()

    def advance(self, max_work: int) -> PassStats | None:
        with self._owner.bound(self._slot, self._staging_P) as model:
            return self._advance(model, max_work)

    def _advance(self, model: nn.Module, max_work: int) -> PassStats | None:
        num_tokens = work = 0
        while self._next < len(self._data):
            ref = self._data[self._next]
            own = self._losses[ref.item].work(ref.num_tokens)
            if num_tokens and work + own > max_work:
                break
            if ref.item in self._failures:
                self._next += 1
                continue
            failure = self._compute(model, ref)
            if failure is not None:
                self._failures[ref.item] = failure
                self._begin()
                self._owner.bind(self._slot, self._staging_P)
                continue
            self._next += 1
            num_tokens += ref.num_tokens
            work += own
        return PassStats(num_runs=1, num_tokens=num_tokens, work=work) if num_tokens else None

    @property
    def is_computed(self) -> bool:
        return self._next == len(self._data)

    def commit(self) -> list[TrainResult | Failure]:
        assert self.is_computed, "a pass was committed before all of it was computed"
        if self._staging_P is not None:
            self._slot.rows["grad"] = self._staging_P
        return [self._failures.get(index) or self._result(index) for index in range(len(self._items))]

    def _begin(self) -> None:
        """From the first datum, with what the run has accumulated."""
        self._next = 0
        self._found: dict[int, list[tuple[Evaluation, FloatArray]]] = {}
        self._staging_P: Tensor | None = None
        if any(item.backward for index, item in enumerate(self._items) if index not in self._failures):
            accumulated_P = self._slot.rows.get("grad")
            param_P = self._slot.rows["param"]
            self._staging_P = torch.zeros_like(param_P) if accumulated_P is None else accumulated_P.clone()

    def _compute(self, model: nn.Module, ref: DatumRef) -> Failure | None:
        item = self._items[ref.item]
        datum = item.data[ref.datum]
        if datum.pictures:
            return Failure("unsupported", "user", f"datum {ref.datum}: {NO_PICTURES}")
        if datum.routes is not None:
            message = f"datum {ref.datum}: full fine-tuning replays no routes: leave out where its tokens come from"
            return Failure("unsupported", "user", message)
        try:
            with torch.set_grad_enabled(item.backward):
                lp = self._logprobs(model, datum)
                found = self._losses[ref.item].evaluate(lp.detach(), _inputs(datum, lp.device))
            if not (torch.isfinite(lp).all() and torch.isfinite(found.coef).all()):
                return not_finite(ref.datum, item.loss.name)
            if item.backward:
                torch.autograd.backward(lp, found.coef.to(lp.dtype).view(lp.shape))
        except UserError as error:
            return Failure(error.code, error.category, f"datum {ref.datum}: {error.message}")
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reclaim()
            return Failure(
                "out_of_memory",
                "user",
                f"datum {ref.datum}: there is not enough memory for a sequence of {ref.num_tokens} tokens in full "
                "fine-tuning, and the request had no effect: send shorter sequences",
            )
        self._found.setdefault(ref.item, []).append((found, lp.detach().cpu().numpy()))
        return None

    def _logprobs(self, model: nn.Module, datum: Datum) -> Tensor:
        """Of the datum's targets, float32 [N] or [N, K]."""
        device = self._slot.rows["param"].device
        tokens = torch.from_numpy(datum.tokens).to(device, torch.int64)[None]
        logits_NV: Tensor = model(input_ids=tokens, use_cache=False).logits[0].float()
        targets = torch.from_numpy(datum.inputs[TARGETS]).to(device)
        lp_NK = logits_NV.log_softmax(-1).gather(1, targets.view(len(targets), -1))
        return lp_NK.view(targets.shape)

    def _result(self, index: int) -> TrainResult:
        item, found = self._items[index], self._found[index]
        metrics = {
            "loss:sum": sum(evaluation.loss for evaluation, _ in found),
            "tokens:sum": float(item.num_tokens),
            "pass_runs:max": 1.0,
            "pass_tokens:max": float(max(datum.num_tokens for datum in item.data)),
        }
        for evaluation, _ in found:
            for key, value in evaluation.metrics.items():
                share = value / len(item.data) if key.endswith(":mean") else value
                metrics[key] = metrics.get(key, 0.0) + share
        return TrainResult(tuple(lp for _, lp in found), metrics)


class JointPass:
    """See `engine.TrainingPass`. Passes one after another that are committed together.

    order: of each item, the pass it is in and its place there.
    """

    def __init__(self, passes: Sequence[TrainingPass], order: Sequence[tuple[int, int]]) -> None:
        self._passes = passes
        self._order = order

    def advance(self, max_work: int) -> PassStats | None:
        for one in self._passes:
            stats = None if one.is_computed else one.advance(max_work)
            if stats is not None:
                return stats
        return None

    @property
    def is_computed(self) -> bool:
        return all(one.is_computed for one in self._passes)

    def commit(self) -> list[TrainResult | Failure]:
        outcomes = [one.commit() for one in self._passes]
        return [outcomes[number][place] for number, place in self._order]


def _inputs(datum: Datum, device: torch.device) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array).to(device) for name, array in datum.inputs.items()}
