"""What `bench_gpu.py` times of adapters on the move: from the host, from disk, from training to sampling."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from gpu_arms import NO_HEAD, NoText, make_trainer
from gpu_shapes import Machine

from tinsmith.config import Settings
from tinsmith.files.blobs import Blobs
from tinsmith.files.checkpoint_file import read_state, state_pieces
from tinsmith.model import BaseModel
from tinsmith.sampling import Sampler
from tinsmith.types import BlobKey, FloatArray, RunState


def loading_arm(machine: Machine, base: BaseModel, rank: int) -> Callable[[], None]:
    """The weights of a run from the host's memory, where they lie as the worker reads them, into a slot."""
    trainer, (run,) = make_trainer(base, 1, rank, NO_HEAD)
    made = trainer.export_run(run, ("param",))
    row = _host_row(machine, sum(tensor.size for tensor in made.tensors.values()))
    tensors, at = {}, 0
    for name, tensor in made.tensors.items():
        row[at : at + tensor.size] = tensor.reshape(-1)
        tensors[name] = row[at : at + tensor.size].reshape(tensor.shape)
        at += tensor.size
    state = RunState(made.spec, made.step, tensors)
    return lambda: trainer.import_run(state.spec, state)


def publishing_arm(base: BaseModel, rank: int) -> Callable[[], None]:
    """A run's weights to where samples can be asked for; no file, and nothing through the host."""
    trainer, (run,) = make_trainer(base, 1, rank, NO_HEAD)
    sampler = Sampler(base, Settings(kv_cache_mib=64), NoText())

    def publish() -> None:
        sampler.add_weights("published", trainer.copy_weights(run))

    return publish


@contextmanager
def disk_arm(machine: Machine, base: BaseModel, rank: int) -> Iterator[Callable[[], None]]:
    """A snapshot from a file that isn't in the page cache, checked as it is read, to where samples can be asked for."""
    trainer, (run,) = make_trainer(base, 1, rank, NO_HEAD)
    sampler = Sampler(base, Settings(kv_cache_mib=64), NoText())
    read = partial(read_state, make_row=partial(_host_row, machine))
    with tempfile.TemporaryDirectory(prefix="tinsmith-gpu-") as directory:
        blobs = Blobs(Path(directory))
        key = blobs.put(BlobKey("tenants/t/snapshots/s"), state_pieces(trainer.export_run(run, ("param",)))).key

        def load() -> None:
            with blobs.open(key) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            sampler.add_adapter("loaded", blobs.load(key, read))

        yield load


def _host_row(machine: Machine, count: int) -> FloatArray:
    """Pinned, where there is a GPU, as `TorchEngine.host_row` makes it."""
    row: FloatArray = torch.empty(count, pin_memory=machine.device.type == "cuda").numpy()
    return row
