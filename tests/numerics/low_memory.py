"""A process whose address space ends: `python -m tests.numerics.low_memory DIR`, with the checks as assertions.

The same requests are computed with little memory and then with plenty. Run by test_low_memory.py.
"""

from __future__ import annotations

import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from structlog.testing import capture_logs

from tests.numerics.lab import assert_same_bits, assert_same_result, datum, grads, item, make_base, make_trainer, spec
from tinsmith.config import Settings
from tinsmith.machine import host_memory
from tinsmith.model import BaseModel
from tinsmith.training import Trainer
from tinsmith.training.budget import Budget
from tinsmith.training.footprint import measure
from tinsmith.types import Failure, TrainItem

ROOM_BYTES = 192 * 2**20
CHUNK = 64
RUNS = (spec("a", rank=8, seed=1), spec("b", rank=16, seed=2))


def main() -> None:
    torch.set_num_threads(1)
    base = make_base("thick", Path(sys.argv[1]))
    footprint = measure(base, CHUNK)
    fits, recomputes = 256, int(1.5 * ROOM_BYTES / footprint.kept)
    too_long = int(1.6 * ROOM_BYTES / footprint.recomputed)
    assert recomputes * footprint.recomputed < 0.6 * ROOM_BYTES
    cases = {
        "many": ([[fits] * 6, [fits] * 4], ""),
        "long": ([[fits, recomputes], [fits]], ""),
        "hopeless": ([[fits], [fits, too_long]], "b"),
    }
    for name, (lengths, failing) in cases.items():
        for is_measured in (False, True):
            print(f"{name}, {lengths}, {is_measured=}", file=sys.stderr, flush=True)
            items = [item(run.run_id, one_request(own)) for run, own in zip(RUNS, lengths, strict=True)]
            in_a_fork(lambda: check(base, items, is_measured=is_measured, failing=failing))  # noqa: B023
    print("all well")


def in_a_fork(work: Callable[[], None]) -> None:
    """Each case with a heap in which nothing was freed yet."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def one_request(lengths: list[int]) -> list[Any]:
    rng = np.random.default_rng(lengths[-1])
    return [datum(rng, length) for length in lengths]


def check(base: BaseModel, items: list[TrainItem], *, is_measured: bool, failing: str) -> None:
    """Measured, nothing runs out; otherwise packs are as large as the request, and all that fits runs over several."""
    trainer, reference = make_trainer(base, *RUNS), make_trainer(base, *RUNS)
    trainer.budget = Budget(Settings(pass_max_tokens=0 if is_measured else 10**6), base.device)
    limit = host_memory._status_bytes(host_memory.ROOT, "VmSize") + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    with capture_logs() as logs:
        if is_measured:
            trainer.budget.start(measure(base, CHUNK))
        outcomes = run(trainer, items)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(logs, file=sys.stderr)
    assert any(line["event"].startswith("out of memory") for line in logs) is not is_measured
    expected = run(reference, [one for one in items if one.run_id != failing])
    for one, outcome in zip(items, outcomes, strict=True):
        if one.run_id == failing:
            assert isinstance(outcome, Failure), outcome
            assert outcome.code == "out_of_memory"
            print(outcome.message, file=sys.stderr)
            assert not any(grad.any() for grad in grads(trainer, failing).values())
        else:
            assert_same_result(outcome, expected.pop(0))
            assert_same_bits(grads(trainer, one.run_id), grads(reference, one.run_id))


def run(trainer: Trainer, items: list[TrainItem]) -> list[Any]:
    training_pass = trainer.start_pass(items)
    while training_pass.advance(trainer.budget.tokens) is not None:
        pass
    return training_pass.commit()


if __name__ == "__main__":
    main()
