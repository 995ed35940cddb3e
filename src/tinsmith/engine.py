"""The protocol at which the worker and an engine meet: runs, training passes, optimizer steps, sampling.

An engine owns tensors and knows nothing of rows, files, sockets or clocks. Two engines implement it: the torch engine
and the fake one, which tests of everything else use. All calls come from one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tinsmith.bases.layer_table import Layer
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
    def layers(self) -> Sequence[Layer]:
        """Those that adapters may have, in the order in which they lie in a row."""
        ...

    @property
    def pass_max_tokens(self) -> int:
        """How much work a pack may have at present; it follows the memory that is free."""
        ...

    def has_run(self, run_id: RunId) -> bool: ...

    def create_run(self, spec: RunSpec) -> None:
        """A fresh adapter from the spec's seed: A random, B zero, no gradients, no moments.

        This, `import_run`, `start_pass` and `optim_step` raise NoMemoryError if there is no memory for it now; after
        a step that raised, the runs that it was for are to be dropped.
        """
        ...

    def run_bytes(self, spec: RunSpec) -> int:
        """What such a run may take of the engine's memory between passes, at most."""
        ...

    @property
    def runs_bytes(self) -> int:
        """The same of all runs that are present."""
        ...

    @property
    def is_on_host(self) -> bool:
        """Its memory is the host's: what it imports it may hold without a copy."""
        ...

    def host_row(self, count: int) -> FloatArray:
        """Room on the host for so many numbers, from where `import_run` takes them fastest. From any thread."""
        ...

    def import_run(self, spec: RunSpec, state: RunState, *, may_keep: bool = False) -> None:
        """Put `state` into the run `spec.run_id`, replacing what is there. Parts it lacks (grad, m, v) become zero.

        may_keep: nobody else uses the state's arrays from now on, so they may become the run's own.

        Raises:
            UserError: the state's rank, targets or shapes don't fit the spec or this base.
        """
        ...

    def export_run(
        self, run_id: RunId, parts: Sequence[str] = ("param", "grad", "m", "v"), *, copy: bool = True
    ) -> RunState:
        """A copy on the host of the named parts; later training doesn't change it. A part that is all zero may be
        left out.

        copy: without it, good for as long as the run isn't touched.
        """
        ...

    def drop_run(self, run_id: RunId) -> None: ...

    def start_pass(self, items: Sequence[TrainItem]) -> TrainingPass:
        """Items come ordered by (run, seq); their runs are present."""
        ...

    def optim_step(self, items: Sequence[OptimItem]) -> list[OptimResult | Failure]:
        """Apply and zero each run's accumulated gradients; at most one item a run."""
        ...

    def has_adapter(self, key: str) -> bool: ...

    def add_adapter(self, key: str, state: RunState, *, may_keep: bool = False) -> None:
        """Weights to sample from, frozen under `key`. The engine may drop the least recently used that nobody needs.

        may_keep: as in `import_run`.
        """
        ...

    def publish_run(self, run_id: RunId, key: str) -> Callable[[], RunState]:
        """`add_adapter` of the run's weights as they are now, without a way round by the host; those of a full run only
        where there is a place for them.

        Returns:
            What gives these weights (`param`) on the host; for any thread, at any time.
        """
        ...

    def has_adapter_room(self, num_bytes: int) -> bool:
        """Whether an adapter whose file is so large can be added within the memory for adapters."""
        ...

    @property
    def full_snapshots(self) -> Mapping[str, bool]:
        """Those of full runs among the adapters that are present, by key: whether requests sample from them."""
        ...

    @property
    def num_full_places(self) -> int:
        """How many more of these can be added now, if all go that nobody samples from."""
        ...

    @property
    def full_weights(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of a full run's weights by name, in the order in which they lie in a row."""
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

    def begun_samples(self) -> list[OpId]:
        """The requests that got their first token in the last `step_samples`, those that ended with it too."""
        ...

    @property
    def base_bytes(self) -> int:
        """What the base's matrices take."""
        ...

    @property
    def seats(self) -> tuple[int, int]:
        """Sequences that are decoded together: (now, at most)."""
        ...

    @property
    def kv_bytes(self) -> tuple[int, int]:
        """Memory for keys and values: (what samples hold, all)."""
        ...

    def progress(self, since: Mapping[OpId, Mapping[int, int]]) -> list[SamplePiece]:
        """What the unfinished sequences of some requests have got by now.

        Args:
            since: by request and sequence, how many tokens the caller knows already; 0 where it isn't named.
        """
        ...
