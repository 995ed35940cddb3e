"""Peak memory by length: `python -m tests.numerics.long_memory DIR`, run by test_long_context.py.

Prints a line for each mode: its name, and the peak of a process after one sequence of each length, in bytes, beginning
with what it had before. Each is a fork of this one, which has everything loaded.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch

from tests.numerics.lab import CPU, datum, item, make_base, make_trainer, run_pass, spec
from tests.numerics.sampling_lab import make_sampler, prompt, run_all, sample
from tinsmith.config import Settings
from tinsmith.machine import host_memory
from tinsmith.model import BaseModel
from tinsmith.training.budget import Budget
from tinsmith.types import TrainResult

LENGTHS = (2048, 4096, 8192)
MODES = {"train": "long", "recompute": "long", "sample": "long", "words": "words"}  # and the base that each is for


def main() -> None:
    torch.set_num_threads(1)
    bases = {kind: make_base(kind, Path(sys.argv[1], kind)) for kind in sorted(set(MODES.values()))}
    for mode, kind in MODES.items():
        child = os.fork()
        if child == 0:
            measure(bases[kind], mode)
            sys.exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"{mode} failed")


def measure(base: BaseModel, mode: str) -> None:
    trainer = make_trainer(base, spec("a"))
    trainer.budget = Budget(Settings(activation_checkpointing="always" if mode == "recompute" else "never"), CPU)
    peaks = []
    for length in (64, *LENGTHS):
        if mode == "sample":
            run_all(make_sampler(base, prefix_cache_mib=0), [sample("s", prompt(1, length), max_tokens=2)])
        else:
            (result,) = run_pass(trainer, [item("a", [datum(np.random.default_rng(0), length)])])
            assert isinstance(result, TrainResult)
        peaks.append(host_memory._status_bytes(host_memory.ROOT, "VmHWM"))
    print(mode, *peaks, flush=True)


if __name__ == "__main__":
    main()
