"""Peak memory by length: `python -m tests.numerics.long_memory DIR MODE`, run by test_long_context.py.

MODE is train, recompute or sample. Prints the peak of this process after one sequence of each length, in bytes,
beginning with what it had before.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from tests.numerics.lab import CPU, datum, item, make_base, make_trainer, run_pass, spec
from tests.numerics.sampling_lab import make_sampler, prompt, run_all, sample
from tinsmith import host_memory
from tinsmith.config import Settings
from tinsmith.training.budget import Budget
from tinsmith.types import TrainResult

LENGTHS = (4096, 8192, 16_384)


def main() -> None:
    torch.set_num_threads(1)
    base = make_base("long", Path(sys.argv[1]))
    mode = sys.argv[2]
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
    print(*peaks)


if __name__ == "__main__":
    main()
