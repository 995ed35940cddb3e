"""Full fine-tuning: runs whose parameters are all weights of a base, in a copy of their own.

Such a run shares no pass. It is computed by the plain transformers model under autograd, in float32 and a datum at a
time, so that its bits depend on nothing else; the served base is another model, which is never touched. Its row holds
the weights themselves: the same parts, files and optimizer steps as an adapter's, see `runs` and `optimizer`.
What stays true: nothing of the run changes before a pass commits. If a request fails after some of its data were added,
the pass begins again without it.
Shape letters: P numbers of a row, N tokens of a datum, K targets a position, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from tinsmith.bases import num_params
from tinsmith.engine import PassStats, TrainingPass
from tinsmith.errors import NoMemoryError, TooLargeError, UserError
from tinsmith.model import RowLayout, load_model
from tinsmith.training.head import not_finite
from tinsmith.training.losses import TARGETS, Evaluation, loss_of
from tinsmith.training.packing import DatumRef, list_data
from tinsmith.training.runs import BYTES_PER_PARAM, RunSlot
from tinsmith.training.shortage import is_out_of_memory, reclaim
from tinsmith.types import BaseInfo, Datum, Failure, FloatArray, RunSpec, Targets, TrainItem, TrainResult

STAGING_BYTES = 4  # of a parameter's gradient in the making
GIB = 2**30


class FullLayout(RowLayout):
    """Where each weight lies in a full run's row; tensors are named `<part>/<weight>`, as in transformers."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__([], Targets(), 1)
        self._shapes = shapes
        self.num_params = self.num_own = sum(map(prod, shapes.values()))

    def split(self, row_P: Tensor) -> dict[str, Tensor]:
        """Views of the row by weight."""
        parts = torch.split(row_P, [prod(shape) for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def _named(self, part: str, host_P: FloatArray) -> dict[str, FloatArray]:
        ends = [0]
        for shape in self._shapes.values():
            ends.append(ends[-1] + prod(shape))
        spans = zip(self._shapes.items(), pairwise(ends), strict=True)
        return {f"{part}/{name}": host_P[start:end].reshape(shape) for (name, shape), (start, end) in spans}


class FullModel:
    """The plain model of a base in float32, whose weights are those of the run that is computed.

    free_bytes: memory that is left, None where it isn't known.
    """

    def __init__(self, info: BaseInfo, device: torch.device, free_bytes: Callable[[], int | None]) -> None:
        self._info = info
        self._device = device
        self._free_bytes = free_bytes
        self._model: nn.Module | None = None
        self._layout: FullLayout | None = None

    @cached_property
    def needed_bytes(self) -> int:
        """Of one run: weights, gradients, both moments, and gradients in the making; activations aren't counted."""
        return num_params(Path(self._info.path)) * (BYTES_PER_PARAM + STAGING_BYTES)

    def fresh(self, spec: RunSpec) -> RunSlot:
        """A run that begins with the base's weights.

        Raises:
            TooLargeError: there is not enough memory; the message names what it needs and what is free.
        """
        lacking = self._lacking()
        if lacking:
            raise TooLargeError(f"{lacking}: train an adapter (rank 1 or more), or have the server given more memory")
        model = load_model(self._info, self._device, torch.float32)
        row_P = torch.cat([weight.detach().reshape(-1) for weight in model.parameters()])
        layout = self._take(model)
        return RunSlot(spec, layout, {"param": row_P}, step=0)

    def layout(self) -> FullLayout:
        """Raises: NoMemoryError: there is no memory for a run's state; the message names it."""
        if self._layout is None:
            lacking = self._lacking()
            if lacking:
                raise NoMemoryError(f"{lacking}, and the request had no effect: have the server given more memory")
            self._take(load_model(self._info, self._device, torch.float32))
        assert self._layout is not None
        return self._layout

    def bind(self, slot: RunSlot) -> nn.Module:
        """The model with the run's weights, views of its row."""
        layout = self.layout()
        assert self._model is not None
        weights = layout.split(slot.rows["param"])
        for name, parameter in self._model.named_parameters():
            parameter.data = weights[name]
            parameter.grad = None
        return self._model

    def _take(self, model: nn.Module) -> FullLayout:
        """Keep the model without its weights."""
        layout = FullLayout({name: tuple(weight.shape) for name, weight in model.named_parameters()})
        for parameter in model.parameters():
            parameter.data = torch.empty(0, device=self._device)
        self._model, self._layout = model, layout
        return layout

    def _lacking(self) -> str:
        """What is said where a run doesn't fit; empty where it does."""
        free, needed = self._free_bytes(), self.needed_bytes
        if free is None or needed <= free:
            return ""
        return (
            f"full fine-tuning of {self._info.name} needs {needed / GIB:,.2f} GiB beside activations (weights, "
            f"gradients and two moments in float32), and {free / GIB:,.2f} GiB are free"
        )


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
        num_tokens = work = 0
        while self._next < len(self._data):
            ref = self._data[self._next]
            own = self._losses[ref.item].work(ref.num_tokens)
            if num_tokens and work + own > max_work:
                break
            if ref.item in self._failures:
                self._next += 1
                continue
            failure = self._compute(ref)
            if failure is not None:
                self._failures[ref.item] = failure
                self._begin()
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
        model = self._owner.bind(self._slot)
        self._model = model
        self._staging_P: Tensor | None = None
        if any(item.backward for index, item in enumerate(self._items) if index not in self._failures):
            accumulated_P = self._slot.rows.get("grad")
            param_P = self._slot.rows["param"]
            self._staging_P = torch.zeros_like(param_P) if accumulated_P is None else accumulated_P.clone()
            grads = self._owner.layout().split(self._staging_P)
            for name, parameter in model.named_parameters():
                parameter.grad = grads[name]

    def _compute(self, ref: DatumRef) -> Failure | None:
        item = self._items[ref.item]
        datum = item.data[ref.datum]
        if datum.pictures:
            return Failure("unsupported", "user", f"datum {ref.datum}: full fine-tuning takes no pictures: send tokens")
        try:
            with torch.set_grad_enabled(item.backward):
                lp = self._logprobs(datum)
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

    def _logprobs(self, datum: Datum) -> Tensor:
        """Of the datum's targets, float32 [N] or [N, K]."""
        device = self._slot.rows["param"].device
        tokens = torch.from_numpy(datum.tokens).to(device, torch.int64)[None]
        logits_NV: Tensor = self._model(input_ids=tokens, use_cache=False).logits[0].float()
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
