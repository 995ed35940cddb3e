"""The torch engine: one base model, its training runs and its sampler, behind the protocol of `engine`.

Owns nothing but the three parts and their start; each part has the substance.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog
import torch

from tinsmith.config import Settings
from tinsmith.model import load_base
from tinsmith.model.row_probe import uneven_products
from tinsmith.sampling import Sampler
from tinsmith.tokenizer import ChatTokenizer
from tinsmith.training import Trainer
from tinsmith.training.training_pass import TorchPass
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
)

log = structlog.get_logger("tinsmith.worker")

RESULTS_DEPEND = (
    "on this machine the last bits of a run's numbers depend on what shares its passes; "
    "`tinsmith doctor` says what can be done"
)


class TorchEngine:
    """See `engine.Engine`.

    Raises:
        UserError: the base's directory lacks weights.
        UnsupportedError: a part of the architecture isn't one that can be served.
    """

    def __init__(self, info: BaseInfo, settings: Settings) -> None:
        torch.set_num_threads(settings.threads or os.cpu_count() or 1)
        self._base = load_base(info, device=torch.device("cpu"), dtype=torch.float32)
        uneven = uneven_products(self._base.matrices())
        if uneven:
            log.warning(RESULTS_DEPEND, base=info.name, products=uneven, threads=torch.get_num_threads())
        self._trainer = Trainer(self._base, settings)
        self._trainer.start()
        self._sampler = Sampler(self._base, settings, ChatTokenizer.from_dir(Path(info.path)))

    @property
    def info(self) -> BaseInfo:
        return self._base.info

    @property
    def num_forwards(self) -> int:
        """Walks through the base so far, as `FakeEngine` counts them."""
        return self._base.num_forwards

    @property
    def pass_max_tokens(self) -> int:
        return self._trainer.budget.tokens

    def has_run(self, run_id: RunId) -> bool:
        return self._trainer.has_run(run_id)

    def create_run(self, spec: RunSpec) -> None:
        self._trainer.create_run(spec)

    def import_run(self, spec: RunSpec, state: RunState) -> None:
        self._trainer.import_run(spec, state)

    def export_run(self, run_id: RunId, parts: Sequence[str] = ("param", "grad", "m", "v")) -> RunState:
        return self._trainer.export_run(run_id, parts)

    def drop_run(self, run_id: RunId) -> None:
        self._trainer.drop_run(run_id)

    def start_pass(self, items: Sequence[TrainItem]) -> TorchPass:
        return self._trainer.start_pass(items)

    def optim_step(self, items: Sequence[OptimItem]) -> list[OptimResult | Failure]:
        return self._trainer.optim_step(items)

    def has_adapter(self, key: str) -> bool:
        return self._sampler.has_adapter(key)

    def add_adapter(self, key: str, state: RunState) -> None:
        self._sampler.add_adapter(key, state)

    def submit_sample(self, item: SampleItem) -> None:
        self._sampler.submit(item)

    def cancel_sample(self, op_id: OpId) -> SampleCost:
        return self._sampler.cancel(op_id)

    @property
    def num_samples(self) -> int:
        return self._sampler.num_samples

    def step_samples(self) -> list[tuple[OpId, SampleResult | Failure]]:
        return self._sampler.step()

    def progress(self, since: Mapping[OpId, Mapping[int, int]]) -> list[SamplePiece]:
        return self._sampler.progress(since)
