"""Sampling from full runs: each snapshot is a model of its own, with a sampler and caches of its own.

A snapshot is opened like a base: its weights are laid out anew for the products that a step makes, so nothing of an
earlier one is left in any form of them, and keys and values of one are never seen by another. What stays true: a
snapshot never changes once it is open; those that requests sample from stay. Beside these at most `full_snapshots` are
open, and only as many as there is memory for.
Weights are float32, as the trainer's are: logprobs are those that it gives.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

import structlog
import torch
from torch import Tensor

from tinsmith.config import Settings
from tinsmith.errors import NoMemoryError, TinsmithError, UnsupportedError
from tinsmith.model import BaseModel, open_base
from tinsmith.model.row_probe import uneven_products, uneven_routers
from tinsmith.sampling.sampler import Ended, Sampler
from tinsmith.sampling.stop import Detokenizer
from tinsmith.training.full_model import GIB, NO_PICTURES, WEIGHT_BYTES, FullModel
from tinsmith.training.runs import Weights
from tinsmith.training.shortage import memory_for, reclaim
from tinsmith.types import OpId, RunState, SampleCost, SampleItem, SamplePiece

log = structlog.get_logger("tinsmith.worker")

MIB = 2**20


class FullSamplers:
    """See `engine.Engine`, of which this is what samples from full runs."""

    def __init__(self, full: FullModel, settings: Settings, tokenizer: Detokenizer) -> None:
        self._full = full
        self._settings = replace(settings, cuda_graphs="off")  # captures would take longer than most snapshots live
        self._tokenizer = tokenizer
        self._snapshots: OrderedDict[str, Sampler] = OrderedDict()  # the longest unused first
        self._keys: dict[OpId, str] = {}  # of the requests under way
        self._is_tried = not settings.deterministic

    def __contains__(self, key: str) -> bool:
        return key in self._snapshots

    @property
    def open_keys(self) -> Mapping[str, bool]:
        """The snapshots that are open, and whether requests sample from them."""
        return {key: sampler.num_samples > 0 for key, sampler in self._snapshots.items()}

    @property
    def needed_bytes(self) -> int:
        """Of one snapshot: its weights; on a GPU, where keys and values are taken at once, these too."""
        kv_bytes = self._settings.kv_cache_mib * MIB if self._full.device.type == "cuda" else 0
        return self._full.num_params * WEIGHT_BYTES + kv_bytes

    @property
    def num_places(self) -> int:
        """How many can be opened now, if all go that nobody samples from; at least one where none is in use, since
        there is nothing to wait for."""
        num_busy = sum(self.open_keys.values())
        places = max(0, self._settings.full_snapshots - num_busy)
        free = self._full.free_bytes()
        if free is not None and places:
            room = free + (len(self._snapshots) - num_busy) * self.needed_bytes
            places = min(places, room // max(1, self.needed_bytes))
        return max(places, int(not num_busy))

    def add(self, key: str, state: RunState) -> None:
        """Open a snapshot of the state's weights.

        Raises:
            UserError: they aren't those of this base.
            NoMemoryError: there isn't any; the message names what it needs and what is free.
        """
        if key not in self._snapshots:
            self._make_room()
            layout = self._full.layout()
            row_P = layout.tensors_to_row("param", state.tensors, torch.device("cpu"), may_keep=True)
            self._open(key, row_P)

    def publish(self, key: str, weights: Weights) -> None:
        """Open a snapshot of a copy that the trainer made, where there is a place. Else its first request brings it, or
        is told why that can't be: the run goes on in any case."""
        if key in self._snapshots or not self.num_places:
            return
        try:
            self._make_room()
            self._open(key, weights.row_P)
        except TinsmithError as error:
            log.warning(
                "a snapshot of a full run can't be opened yet", run_id=weights.spec.run_id, because=error.message
            )

    def let_go(self) -> None:
        """Of all that nobody samples from."""
        for key, is_busy in self.open_keys.items():
            if not is_busy:
                del self._snapshots[key]
        reclaim()

    def submit(self, item: SampleItem) -> None:
        """Queue a request. Raises: UserError: as `Sampler.submit`, and for pictures."""
        assert item.adapter is not None, "a request of a full run names its snapshot"
        if item.pictures:
            raise UnsupportedError(NO_PICTURES)
        sampler = self._snapshots[item.adapter]
        self._snapshots.move_to_end(item.adapter)
        sampler.submit(replace(item, adapter=None))
        self._keys[item.op_id] = item.adapter

    def holds(self, op_id: OpId) -> bool:
        return op_id in self._keys

    def cancel(self, op_id: OpId) -> SampleCost:
        return self._snapshots[self._keys.pop(op_id)].cancel(op_id)

    @property
    def num_samples(self) -> int:
        return len(self._keys)

    def step(self) -> tuple[Ended, list[OpId]]:
        """A step of each that has requests: (what ended, who got a first token)."""
        ended: Ended = []
        begun: list[OpId] = []
        for sampler in self._busy():
            ended += sampler.step()
            begun += sampler.begun
        for op_id, _ in ended:
            del self._keys[op_id]
        return ended, begun

    @property
    def seats(self) -> tuple[int, int]:
        """(sequences that are decoded, the most that may be), of all that are open."""
        found = [sampler.seats for sampler in self._snapshots.values()]
        return sum(taken for taken, _ in found), sum(most for _, most in found)

    @property
    def kv_bytes(self) -> tuple[int, int]:
        """(held by requests, all), of all that are open."""
        found = [sampler.kv_bytes for sampler in self._snapshots.values()]
        return sum(held for held, _ in found), sum(most for _, most in found)

    def progress(self, since: Mapping[OpId, Mapping[int, int]]) -> list[SamplePiece]:
        return [piece for sampler in self._busy() for piece in sampler.progress(since)]

    def _busy(self) -> Seq[Sampler]:
        return [sampler for sampler in self._snapshots.values() if sampler.num_samples]

    def _make_room(self) -> None:
        """Let go of snapshots that nobody samples from, the longest unused first, until one more has its place.

        Raises:
            NoMemoryError: even so there is no memory.
        """
        for key, is_busy in self.open_keys.items():
            if len(self._snapshots) < self._settings.full_snapshots and not self._lacking():
                return
            if not is_busy:
                del self._snapshots[key]
                reclaim()
        lacking = self._lacking()
        if lacking:
            raise NoMemoryError(
                f"{lacking}, and the request had no effect: send it again when others have ended, have the server "
                "given more memory, or export the checkpoint and serve it as a base of its own"
            )

    def _lacking(self) -> str:
        """What is said where one more doesn't fit; empty where it does."""
        free, needed = self._full.free_bytes(), self.needed_bytes
        if free is None or needed <= free:
            return ""
        return (
            f"sampling from a full run of {self._full.info.name} needs {needed / GIB:,.2f} GiB for a copy of its "
            f"weights in float32, and {free / GIB:,.2f} GiB are free"
        )

    def _open(self, key: str, row_P: Tensor) -> None:
        settings = self._settings
        with memory_for("a snapshot of a full run"):
            base = open_base(
                self._full.copy_with(row_P),
                replace(self._full.info, vision=None),
                deterministic=settings.deterministic,
                shares_factors=settings.expert_adapters == "shared",
                is_known=True,
            )
            self._try_rows(base)
            self._snapshots[key] = Sampler(base, settings, self._tokenizer)

    def _try_rows(self, base: BaseModel) -> None:
        """Whether a row of its products has the same bits in a crowd, where that is promised; asked once."""
        if self._is_tried:
            return
        uneven = uneven_products(base.matrices()) + uneven_routers(base.router_weights)
        if uneven:
            raise UnsupportedError(
                "--deterministic: in float32 products of this machine round differently in a crowd, so full runs can't "
                "be sampled from: try another number of --threads, or start without --deterministic"
            )
        self._is_tried = True
