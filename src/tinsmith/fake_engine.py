"""An engine without a model: arithmetic in place of a transformer, exact and reproducible.

It obeys the whole protocol (atomic passes, accumulated gradients, frozen snapshots, seeded samples), so that the
worker, the store, the API and clients can be tested fast and to the bit. Its numbers mean nothing, but those of a
sequence with pictures depend on each of their bytes. A run's state is one vector of `rank` numbers, of a full run one
number; every op that has an effect changes it in a way that shows if it happened twice or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinsmith.bases.layer_table import Layer
from tinsmith.crashpoints import crash_point
from tinsmith.engine import PassStats
from tinsmith.errors import UserError
from tinsmith.pictures import Picture
from tinsmith.route_tape import RouteArray, RouteTape, num_known
from tinsmith.types import (
    BaseInfo,
    Failure,
    FloatArray,
    OpId,
    OptimItem,
    OptimResult,
    RunId,
    RunSpec,
    RunState,
    SampleCost,
    SampledSequence,
    SampleItem,
    SamplePiece,
    SampleResult,
    TokenArray,
    TrainItem,
    TrainResult,
)
from tinsmith.wire.pieces import cut_sequence

MODULE = "fake.lora_A"
PARTS = ("param", "grad", "m", "v")
TOKENS_PER_STEP = 8
USEFUL_TOKENS = 8192
FULL_PLACES = 2  # snapshots of full runs that are kept


@dataclass(slots=True)
class _Run:
    spec: RunSpec
    step: int
    parts: dict[str, FloatArray]


class FakePass:
    """See `engine.TrainingPass`."""

    def __init__(self, engine: FakeEngine, items: Sequence[TrainItem]) -> None:
        self._engine = engine
        self._items = tuple(items)
        self._left = [(item, datum.num_tokens) for item in items for datum in item.data]
        self._num_tokens = 0

    def advance(self, max_work: int) -> PassStats | None:
        if not self._left:
            return None
        runs: set[RunId] = set()
        tokens = 0
        while self._left and (tokens == 0 or tokens + self._left[0][1] <= max_work):
            item, count = self._left.pop(0)
            runs.add(item.run_id)
            tokens += count
        self._engine.num_forwards += 1
        self._num_tokens = max(self._num_tokens, tokens)
        return PassStats(num_runs=len(runs), num_tokens=tokens, work=tokens)

    @property
    def is_computed(self) -> bool:
        return not self._left

    def commit(self) -> list[TrainResult | Failure]:
        runs = len({item.run_id for item in self._items})
        outcomes: list[TrainResult | Failure] = []
        for item in self._items:
            outcomes.append(self._engine.apply(item, runs, self._num_tokens))
            crash_point("pass.half_merged")
        return outcomes


class FakeEngine:
    """See `engine.Engine`. `num_forwards` counts packs, as the torch engine's base counts its forward calls."""

    def __init__(self, info: BaseInfo, pass_max_tokens: int = 0) -> None:
        """`pass_max_tokens`: 0 stands for as much as is of use, since nothing here takes memory."""
        self._info = info
        self._runs: dict[RunId, _Run] = {}
        self._runs_bytes = 0
        self._adapters: dict[str, FloatArray] = {}
        self._full: dict[str, None] = {}  # of these those of full runs, the longest unused first
        self._samples: dict[OpId, tuple[SampleItem, int]] = {}
        self._begun: list[OpId] = []
        self.num_forwards = 0
        self.pass_max_tokens = pass_max_tokens or USEFUL_TOKENS

    @property
    def info(self) -> BaseInfo:
        return self._info

    @property
    def layers(self) -> Sequence[Layer]:
        """None: its adapters are nobody else's."""
        return ()

    def has_run(self, run_id: RunId) -> bool:
        return run_id in self._runs

    def create_run(self, spec: RunSpec) -> None:
        rng = np.random.default_rng(spec.seed)
        parts = {part: np.zeros(_shape(spec), np.float32) for part in PARTS}
        parts["param"] = rng.standard_normal(_shape(spec), dtype=np.float32)
        self._put(_Run(spec, 0, parts))

    def run_bytes(self, spec: RunSpec) -> int:
        return 4 * len(PARTS) * _shape(spec)[0]

    @property
    def runs_bytes(self) -> int:
        return self._runs_bytes

    @property
    def is_on_host(self) -> bool:
        return True

    def host_row(self, count: int) -> FloatArray:
        return np.empty(count, np.float32)

    def import_run(self, spec: RunSpec, state: RunState, *, may_keep: bool = False) -> None:
        param = state.tensors[f"param/{MODULE}"]
        if param.shape != _shape(spec) or state.spec.targets != spec.targets:
            raise UserError(
                f"the checkpoint has rank {state.spec.rank}, the run rank {spec.rank}: create a run of its rank"
            )
        zero = np.zeros(_shape(spec), np.float32)
        parts = {part: state.tensors.get(f"{part}/{MODULE}", zero).copy() for part in PARTS}
        self._put(_Run(spec, state.step if state.has_optimizer else 0, parts))

    def export_run(self, run_id: RunId, parts: Sequence[str] = PARTS, *, copy: bool = True) -> RunState:
        run = self._runs[run_id]
        return RunState(run.spec, run.step, {f"{part}/{MODULE}": run.parts[part].copy() for part in parts})

    def drop_run(self, run_id: RunId) -> None:
        run = self._runs.pop(run_id, None)
        self._runs_bytes -= 0 if run is None else self.run_bytes(run.spec)

    def _put(self, run: _Run) -> None:
        self.drop_run(run.spec.run_id)
        self._runs[run.spec.run_id] = run
        self._runs_bytes += self.run_bytes(run.spec)

    def start_pass(self, items: Sequence[TrainItem]) -> FakePass:
        return FakePass(self, items)

    def apply(self, item: TrainItem, num_runs: int, num_tokens: int) -> TrainResult | Failure:
        """The effect and result of one training item: the mean token moves the gradient."""
        run = self._runs[item.run_id]
        logprobs: list[FloatArray] = []
        total = 0.0
        for datum in item.data:
            shape = datum.inputs["target_tokens"].shape
            level = np.float32(-1.0 - np.abs(run.parts["param"]).mean() - _look(datum.pictures))
            logprobs.append(np.full(shape, level, np.float32))
            total -= float(level) * float(np.prod(shape))
        if not np.isfinite(total):
            return Failure("non_finite_loss", "user", "the loss is not finite: lower the learning rate")
        if item.backward:
            for datum in item.data:
                run.parts["grad"] += np.float32(datum.tokens.mean() / self._info.vocab_size + _look(datum.pictures))
        metrics = {"loss:sum": total, "pass_runs:max": float(num_runs), "pass_tokens:max": float(num_tokens)}
        num_replayed = sum(num_known(datum.routes) for datum in item.data)
        if num_replayed:
            metrics["routes_replayed:sum"] = float(num_replayed)
        return TrainResult(tuple(logprobs), metrics)

    def optim_step(self, items: Sequence[OptimItem]) -> list[OptimResult | Failure]:
        results: list[OptimResult | Failure] = []
        for item in items:
            run = self._runs[item.run_id]
            grad = run.parts["grad"]
            run.parts["m"] = np.float32(0.5) * run.parts["m"] + grad
            run.parts["v"] = run.parts["v"] + np.float32(1)
            run.parts["param"] = run.parts["param"] - np.float32(item.params.learning_rate) * run.parts["m"]
            run.step += 1
            results.append(OptimResult({"grad_norm": float(np.linalg.norm(grad)), "optimizer_step": float(run.step)}))
            run.parts["grad"] = np.zeros_like(grad)
            crash_point("optim.half_done")
        return results

    def has_adapter(self, key: str) -> bool:
        return key in self._adapters

    def add_adapter(self, key: str, state: RunState, *, may_keep: bool = False) -> None:
        if state.spec.is_full and key not in self._adapters:
            for idle in [idle for idle, is_busy in self.full_snapshots.items() if not is_busy]:
                if len(self._full) >= FULL_PLACES:
                    del self._full[idle], self._adapters[idle]
            self._full[key] = None
        self._adapters[key] = state.tensors[f"param/{MODULE}"].copy()

    def publish_run(self, run_id: RunId, key: str) -> Callable[[], RunState]:
        state = self.export_run(run_id, ("param",))
        if not state.spec.is_full or self.num_full_places:
            self.add_adapter(key, state)
        return lambda: state

    def has_adapter_room(self, num_bytes: int) -> bool:
        return True

    @property
    def full_snapshots(self) -> Mapping[str, bool]:
        busy = {item.adapter for item, _ in self._samples.values()}
        return {key: key in busy for key in self._full}

    @property
    def num_full_places(self) -> int:
        return FULL_PLACES - sum(self.full_snapshots.values())

    @property
    def full_weights(self) -> Mapping[str, tuple[int, ...]]:
        return {MODULE: (1, 1)}

    def submit_sample(self, item: SampleItem) -> None:
        if item.adapter in self._full:
            self._full[item.adapter] = self._full.pop(item.adapter)
        self._samples[item.op_id] = (item, self._length(item))

    def cancel_sample(self, op_id: OpId) -> SampleCost:
        item, left = self._samples.pop(op_id, (None, 0))
        if item is None:
            return SampleCost()
        return SampleCost(len(item.prompt), num_sampled=item.num_samples * (self._length(item) - left))

    @property
    def num_samples(self) -> int:
        return len(self._samples)

    def step_samples(self) -> list[tuple[OpId, SampleResult | Failure]]:
        ended: list[tuple[OpId, SampleResult | Failure]] = []
        self._begun = []
        for op_id, (item, left) in list(self._samples.items()):
            if left == self._length(item):
                self._begun.append(op_id)
            if left > TOKENS_PER_STEP:
                self._samples[op_id] = (item, left - TOKENS_PER_STEP)
                continue
            del self._samples[op_id]
            ended.append((op_id, self._sample(item)))
        return ended

    def begun_samples(self) -> list[OpId]:
        return self._begun

    @property
    def base_bytes(self) -> int:
        return 0

    @property
    def seats(self) -> tuple[int, int]:
        """All that it has; there is no bound."""
        num = sum(item.num_samples for item, _ in self._samples.values())
        return num, num

    @property
    def kv_bytes(self) -> tuple[int, int]:
        return 0, 0

    def progress(self, since: Mapping[OpId, Mapping[int, int]]) -> list[SamplePiece]:
        pieces: list[SamplePiece] = []
        for op_id, (item, left) in self._samples.items():
            whole = self._sample(item).sequences if op_id in since else ()
            for index, sequence in enumerate(whole):
                start, end = since[op_id].get(index, 0), len(sequence.tokens) - left
                if start < end:
                    pieces.append(SamplePiece(op_id, index, start, cut_sequence(sequence, start, end)))
        return pieces

    def _length(self, item: SampleItem) -> int:
        room = self._info.max_context - len(item.prompt)
        return room if item.params.max_tokens is None else min(room, item.params.max_tokens)

    def _sample(self, item: SampleItem) -> SampleResult:
        weight = float(self._adapters[item.adapter].sum()) if item.adapter else 0.0
        length = self._length(item)
        sequences = []
        for index in range(item.num_samples):
            seen = [int.from_bytes(picture.digest[:8], "little") for picture in item.pictures]
            rng = np.random.default_rng([item.seed & 0x7FFFFFFF, index, abs(int(weight * 1e6)), *seen])
            tokens = rng.integers(0, self._info.vocab_size, length).astype(np.int32)
            sequence = SampledSequence(tokens, np.full(length, -1.0, np.float32), stopped=False)
            if item.topk_sample_logprobs:
                ids, logprobs = _likeliest(length, item.topk_sample_logprobs)
                sequence = replace(sequence, topk_tokens=ids, topk_logprobs=logprobs)
            sequences.append(sequence)
        routes = None if not item.records_routes else RouteTape(_routes(item.prompt), tuple(map(_routes_of, sequences)))
        return _with_scores(SampleResult(tuple(sequences), routes=routes), item)


def _with_scores(result: SampleResult, item: SampleItem) -> SampleResult:
    """Every logprob is -1 less what the pictures add, every likely or drawn token the lowest."""
    num_prompt, k = len(item.prompt), item.prompt_alt_tokens_k
    start = num_prompt - min(item.prompt_logprobs_last_n or num_prompt, num_prompt - 1)
    if item.prompt_logprobs:
        logprobs = np.full(num_prompt, -1.0 - _look(item.pictures), np.float32)
        logprobs[:start] = np.nan
        result = replace(result, prompt_logprobs=logprobs)
    if item.topk_prompt_logprobs:
        ids, top = _likeliest(num_prompt, item.topk_prompt_logprobs)
        ids[:start], top[:start] = 0, -99999.0
        result = replace(result, topk_prompt_tokens=ids, topk_prompt_logprobs=top)
    if item.prompt_targets is not None:
        scored = np.where(item.prompt_targets.ids >= 0, -1.0, 0.0).astype(np.float32)
        result = replace(result, prompt_targets=item.prompt_targets, prompt_target_logprobs=scored)
    if k:
        ids, drawn = _likeliest(num_prompt - 1, k)
        result = replace(result, prompt_alt_tokens=ids.astype(np.int64), prompt_alt_logprobs=drawn)
    return result


def _routes(tokens: TokenArray) -> RouteArray:
    """As if a token's number chose one of 8 experts in two layers: [N, 2, 1]."""
    return np.stack([tokens % 8, tokens // 8 % 8], 1).astype(np.int16)[..., None]


def _routes_of(sequence: SampledSequence) -> RouteArray:
    return _routes(sequence.tokens[:-1])


def _look(pictures: Sequence[Picture]) -> float:
    """0 without pictures, below 1 with them; another picture or another order gives another number."""
    seen = hashlib.sha256(b"".join(picture.digest for picture in pictures)).digest()
    return int.from_bytes(seen[:4], "little") / 2**32 if pictures else 0.0


def _likeliest(length: int, k: int) -> tuple[TokenArray, FloatArray]:
    return np.tile(np.arange(k, dtype=np.int32), (length, 1)), np.full((length, k), -1.0, np.float32)


def _shape(spec: RunSpec) -> tuple[int, int]:
    return max(1, spec.rank), 1
