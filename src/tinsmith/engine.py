"""The protocol at which the worker and an engine meet: runs, training passes, optimizer steps, sampling.

An engine owns tensors and knows nothing of rows, files, sockets or clocks. Two engines implement it: the torch engine
and the fake one, which tests of everything else use. All calls come from one thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tinsmith.types import (
    BaseInfo,
    Failure,
    OpId,
    OptimItem,
    OptimResult,
    RunId,
    RunSpec,
    RunState,
    SampleCost,
    SampleItem,
    SamplePiece,
    SampleResult,
    TrainItem,
    TrainResult,
)


@dataclass(frozen=True, slots=True)
class PassStats:
    """What one forward over the base carried. work: its tokens, and what losses cost beside them."""

    num_runs: int
    num_tokens: int
    work: int


class TrainingPass(Protocol):
    """One atomic piece of training over any number of runs, computed in packs of bounded size.

    Gradients go to staging rows; nothing of a run changes before `commit`, and nothing at all without it. Running out
    of memory fails no item that could be computed in smaller packs.
    """

    def advance(self, max_work: int) -> PassStats | None:
        """Compute the next pack, of at most `max_work` (see `TrainItem.work`; at least one datum). None once all are
        computed."""
        ...

    @property
    def is_computed(self) -> bool:
        """Nothing is left to compute: `advance` would return None."""
        ...

    def commit(self) -> list[TrainResult | Failure]:
        """Merge staged gradients of the ops that succeeded; one outcome an item, in the items' order."""
        ...


class Engine(Protocol):
    """All tensors of one base model: the frozen base, the runs' adapters, the sampler's snapshots and caches."""

    @property
    def info(self) -> BaseInfo: ...

    @property
    def pass_max_tokens(self) -> int:
        """How much work a pack may have at present; it follows the memory that is free."""
        ...

    def has_run(self, run_id: RunId) -> bool: ...

    def create_run(self, spec: RunSpec) -> None:
        """A fresh adapter from the spec's seed: A random, B zero, no gradients, no moments."""
        ...

    def import_run(self, spec: RunSpec, state: RunState) -> None:
        """Put `state` into the run `spec.run_id`, replacing what is there. Parts it lacks (grad, m, v) become zero.

        Raises:
            UserError: the state's rank, targets or shapes don't fit the spec or this base.
        """
        ...

    def export_run(self, run_id: RunId, parts: Sequence[str] = ("param", "grad", "m", "v")) -> RunState:
        """A copy on the host of the named parts; later training doesn't change it."""
        ...

    def drop_run(self, run_id: RunId) -> None: ...

    def start_pass(self, items: Sequence[TrainItem]) -> TrainingPass:
        """Items come ordered by (run, seq); their runs are present."""
        ...

    def optim_step(self, items: Sequence[OptimItem]) -> list[OptimResult | Failure]:
        """Apply and zero each run's accumulated gradients; at most one item a run."""
        ...

    def has_adapter(self, key: str) -> bool: ...

    def add_adapter(self, key: str, state: RunState) -> None:
        """Weights to sample from, frozen under `key`. The engine may drop the least recently used that nobody needs."""
        ...

    def submit_sample(self, item: SampleItem) -> None:
        """Queue a request for admission; its adapter is present and stays until it ends."""
        ...

    def cancel_sample(self, op_id: OpId) -> SampleCost:
        """Forget a submitted request; it never shows up in `step_samples`. What was computed for it until now; unknown
        ids are ignored."""
        ...

    @property
    def num_samples(self) -> int:
        """Submitted sample requests that have not come back yet."""
        ...

    def step_samples(self) -> list[tuple[OpId, SampleResult | Failure]]:
        """Admit what fits, prefill some, advance each decoding sequence by one token; return what ended."""
        ...

    def progress(self, since: Mapping[OpId, Mapping[int, int]]) -> list[SamplePiece]:
        """What the unfinished sequences of some requests have got by now.

        Args:
            since: by request and sequence, how many tokens the caller knows already; 0 where it isn't named.
        """
        ...
