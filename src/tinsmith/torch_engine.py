"""The torch engine: one base model, its training runs and its sampler, behind the protocol of `engine`.

Owns nothing but the three parts and their start; each part has the substance.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import structlog
import torch

from tinsmith.bases.layer_table import Layer
from tinsmith.bases.tokenizer import ChatTokenizer
from tinsmith.bases.tokenizer_files import directory_of
from tinsmith.config import Settings
from tinsmith.engine import TrainingPass
from tinsmith.errors import UnsupportedError
from tinsmith.files.checkpoint_file import aligned_row
from tinsmith.model import BaseModel, load_base, plain_shapes
from tinsmith.model.device import choose_device, choose_dtype
from tinsmith.model.row_probe import uneven_products, uneven_routers
from tinsmith.sampling import FullSamplers, Sampler
from tinsmith.training import Trainer
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
)

log = structlog.get_logger("tinsmith.worker")

RESULTS_DEPEND = "on this machine the last bits of a run's numbers depend on what shares its passes"
CURE = "try another number of --threads (1 is the likeliest), or unset MKL_CBWR; `tinsmith doctor` looks for more"


class TorchEngine:
    """See `engine.Engine`.

    Raises:
        UserError: the base's directory lacks weights.
        UnsupportedError: a part of the architecture isn't one that can be served, or the settings ask for deterministic
            results and products round differently in a crowd.
    """

    def __init__(
        self,
        info: BaseInfo,
        settings: Settings,
        *,
        trains: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """`trains`: whether passes will come, for which the memory is measured now. `progress`: see `load_base`."""
        torch.set_num_threads(settings.threads or os.cpu_count() or 1)
        device = choose_device(settings.device)
        if settings.deterministic and device.type != "cpu":
            raise UnsupportedError(
                "--deterministic is kept on the CPU alone: on a GPU torch's products and its attention pick kernels by "
                "the number of rows; start with --device cpu, or without --deterministic"
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches on the thread's current device, wherever the tensors are
        dtype = choose_dtype(settings.dtype, device)
        self._base = load_base(
            info,
            device=device,
            dtype=dtype,
            deterministic=settings.deterministic,
            shares_factors=settings.expert_adapters == "shared",
            weights=settings.base_weights,
            may_compile=settings.compiled_adapters,
            progress=progress,
        )
        if self._base.eyes is not None:
            self._base.eyes.max_bytes = settings.picture_cache_mib * 2**20
        forms = self._base.bytes_by_form()
        mib = {form: round(num_bytes / 2**20) for form, num_bytes in forms.items()}
        log.info("base model loaded", base=info.name, device=str(device), dtype=str(dtype), weights_mib=mib)
        self._look_at_rows(is_promised=settings.deterministic)
        self._trainer = Trainer(self._base, settings)
        if trains:
            self._trainer.start()
        tokenizer = ChatTokenizer.from_dir(directory_of(info))
        self._sampler = Sampler(self._base, settings, tokenizer)
        self._full = FullSamplers(self._trainer.full, settings, tokenizer)
        self._trainer.full.make_room = self._full.let_go
        self._begun: list[OpId] = []

    def _look_at_rows(self, *, is_promised: bool) -> None:
        """Try whether a row of the base's products has the same bits in a crowd; on a GPU that isn't promised."""
        if self._base.device.type != "cpu":
            return
        uneven = uneven_products(self._base.matrices()) + uneven_routers(self._base.router_weights)
        threads = torch.get_num_threads()
        if uneven and is_promised:
            shapes = ", ".join(f"{o} x {i}" for o, i in uneven[:6])
            raise UnsupportedError(
                f"--deterministic: {RESULTS_DEPEND}: products of shape {shapes} round differently in a crowd "
                f"with {threads} thread(s); {CURE}, or start without --deterministic"
            )
        if uneven:
            log.warning(f"{RESULTS_DEPEND}; {CURE}", base=self.info.name, products=uneven, threads=threads)

    @property
    def info(self) -> BaseInfo:
        return self._base.info

    @property
    def layers(self) -> Sequence[Layer]:
        return layers_of(self._base)

    @property
    def base_bytes(self) -> int:
        """What the base's matrices take now."""
        return sum(self._base.bytes_by_form().values())

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

    def run_bytes(self, spec: RunSpec) -> int:
        return self._trainer.run_bytes(spec)

    @property
    def runs_bytes(self) -> int:
        return self._trainer.num_bytes

    @property
    def is_on_host(self) -> bool:
        return self._base.device.type == "cpu"

    def host_row(self, count: int) -> FloatArray:
        if self.is_on_host:
            return aligned_row(count)
        row: FloatArray = torch.empty(count, pin_memory=True).numpy()
        return row

    def import_run(self, spec: RunSpec, state: RunState, *, may_keep: bool = False) -> None:
        self._trainer.import_run(spec, state, may_keep=may_keep)

    def export_run(
        self, run_id: RunId, parts: Sequence[str] = ("param", "grad", "m", "v"), *, copy: bool = True
    ) -> RunState:
        return self._trainer.export_run(run_id, parts, copy=copy)

    def drop_run(self, run_id: RunId) -> None:
        self._trainer.drop_run(run_id)

    def start_pass(self, items: Sequence[TrainItem]) -> TrainingPass:
        return self._trainer.start_pass(items)

    def optim_step(self, items: Sequence[OptimItem]) -> list[OptimResult | Failure]:
        return self._trainer.optim_step(items)

    def has_adapter(self, key: str) -> bool:
        return self._sampler.has_adapter(key) or key in self._full

    def add_adapter(self, key: str, state: RunState, *, may_keep: bool = False) -> None:
        if state.spec.is_full:
            self._full.add(key, state)
        else:
            self._sampler.add_adapter(key, state, may_keep=may_keep)

    def publish_run(self, run_id: RunId, key: str) -> Callable[[], RunState]:
        weights = self._trainer.copy_weights(run_id)
        (self._full.publish if weights.spec.is_full else self._sampler.add_weights)(key, weights)
        return weights.on_host

    def has_adapter_room(self, num_bytes: int) -> bool:
        return self._sampler.has_adapter_room(num_bytes)

    @property
    def full_snapshots(self) -> Mapping[str, bool]:
        return self._full.open_keys

    @property
    def num_full_places(self) -> int:
        return self._full.num_places

    @property
    def full_weights(self) -> Mapping[str, tuple[int, ...]]:
        return plain_shapes(self.info)

    def submit_sample(self, item: SampleItem) -> None:
        is_full = item.adapter is not None and item.adapter in self._full
        (self._full if is_full else self._sampler).submit(item)

    def cancel_sample(self, op_id: OpId) -> SampleCost:
        return (self._full if self._full.holds(op_id) else self._sampler).cancel(op_id)

    @property
    def num_samples(self) -> int:
        return self._sampler.num_samples + self._full.num_samples

    def step_samples(self) -> list[tuple[OpId, SampleResult | Failure]]:
        ended = self._sampler.step()
        own, begun = self._full.step()
        self._begun = [*self._sampler.begun, *begun]
        return ended + own

    def begun_samples(self) -> list[OpId]:
        return self._begun

    @property
    def seats(self) -> tuple[int, int]:
        (taken, most), (full_taken, full_most) = self._sampler.seats, self._full.seats
        return taken + full_taken, most + full_most

    @property
    def kv_bytes(self) -> tuple[int, int]:
        (held, most), (full_held, full_most) = self._sampler.kv_bytes, self._full.kv_bytes
        return held + full_held, most + full_most

    def progress(self, since: Mapping[OpId, Mapping[int, int]]) -> list[SamplePiece]:
        return self._sampler.progress(since) + self._full.progress(since)


def layers_of(base: BaseModel) -> Sequence[Layer]:
    """What the API is told of the base's layers."""
    return [
        Layer(i.name, i.group, i.in_features, i.out_features, i.lead, i.num_a, i.num_b, i.interleaves)
        for i in base.linears
    ]
