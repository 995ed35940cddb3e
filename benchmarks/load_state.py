"""How fast is an adapter read from disk into a slot, and what does that make of a rank-32 adapter of an 8B model?

    python benchmarks/load_state.py [--directory DIR]

A state of 350 MB (the weights of rank 32 on the shapes of Qwen3-8B) and one four times as large (with gradients and
moments) are written as snapshots are, and read as they are: file, checksum and decoding to rows by the reading thread,
then what is left for the loop: on the CPU it takes the rows over as they are; a copy of them is timed beside it. Files
are in the page cache (`warm`), or are dropped from it before (`cold`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import rows
import torch

from tinsmith.files.blobs import Blobs
from tinsmith.files.checkpoint_file import aligned_row, read_state, state_pieces
from tinsmith.model.inspect import LinearInfo
from tinsmith.model.layout import RowLayout
from tinsmith.training.runs import PARTS, RunSlot
from tinsmith.types import BlobKey, RunId, RunSpec, RunState, Targets

LAYERS, HIDDEN, INTER, KV = 36, 4096, 12288, 1024
SHAPES = {"q": (HIDDEN, 4096), "k": (HIDDEN, KV), "v": (HIDDEN, KV), "o": (4096, HIDDEN), "gate": (HIDDEN, INTER),
          "up": (HIDDEN, INTER), "down": (INTER, HIDDEN)}  # fmt: skip
SPEC = RunSpec(RunId("bench"), "bench", 32, 0, Targets(unembed=False))
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", default=None)
    rows.add_flag(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    linears = [
        LinearInfo(f"model.layers.{layer}.{name}", "mlp", *shape, f"model.layers.{layer}.{name}")
        for layer in range(LAYERS)
        for name, shape in SHAPES.items()
    ]
    layout = RowLayout.of(linears, SPEC)
    print("| state | MB | what | ms | GB/s |\n|---|---|---|---|---|")
    table = []
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        blobs = Blobs(Path(directory) / "blobs")
        for name, parts in (("weights", PARTS[:1]), ("all four parts", PARTS)):
            state = make_state(layout, parts)
            size = sum(tensor.nbytes for tensor in state.tensors.values())
            for what, seconds in measure(blobs, layout, state, args.repeats).items():
                print(f"| {name} | {size / 1e6:.0f} | {what} | {seconds * 1e3:.1f} | {size / seconds / 1e9:.2f} |")
                if name == "weights" and what in TARGETS:
                    label = f"rank-32 adapter of an 8B shape ({size / 1e6:.0f} MB), {what}"
                    table.append(rows.Row(label, seconds * 1e3, "ms", TARGETS[what], args.repeats))
    rows.save(args.rows, table)


TARGETS = {"read, warm": "", "read, cold": "< 500", "into the slot, taken over": "< 50"}


def make_state(layout: RowLayout, parts: tuple[str, ...]) -> RunState:
    tensors = {}
    for part in parts:
        row = aligned_row(layout.num_params)
        row[:] = np.random.default_rng(0).random(2**20, np.float32)[np.arange(len(row)) % 2**20]
        tensors |= layout.row_to_tensors(part, torch.from_numpy(row), copy=False)
    return RunState(SPEC, 1, tensors)


def measure(blobs: Blobs, layout: RowLayout, state: RunState, repeats: int) -> dict[str, float]:
    """Seconds, medians."""
    key = blobs.put(BlobKey("tenants/t/snapshots/s"), state_pieces(state)).key
    seconds: dict[str, list[float]] = {}

    def timed(what: str, call: Callable[[], object]) -> object:
        started = time.perf_counter()
        made = call()
        seconds.setdefault(what, []).append(time.perf_counter() - started)
        return made

    for _ in range(repeats):
        timed("written (fsync)", lambda: blobs.put(BlobKey("tenants/t/snapshots/w"), state_pieces(state)))
        with blobs.open(key) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        timed("read, cold", lambda: blobs.load(key, read_state))
        made = timed("read, warm", lambda: blobs.load(key, read_state))
        assert isinstance(made, RunState)
        timed("into the slot, by a copy", partial(restored, layout, made, may_keep=False))
        timed("into the slot, taken over", partial(restored, layout, made, may_keep=True))
    return {what: statistics.median(values) for what, values in seconds.items()}


def restored(layout: RowLayout, state: RunState, *, may_keep: bool) -> RunSlot:
    return RunSlot.restored(SPEC, layout, state, CPU, may_keep=may_keep)


if __name__ == "__main__":
    main()
