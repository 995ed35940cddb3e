from __future__ import annotations

import pytest

from tinsmith.errors import CorruptError
from tinsmith.recovery import Logged, plan_recovery
from tinsmith.types import BlobKey, OpKind, RunId

RUN = RunId("s1:train:0")
STEP = [Logged(1, OpKind.FORWARD_BACKWARD), Logged(2, OpKind.OPTIM_STEP)]


def test_a_run_without_a_snapshot_replays_from_its_creation() -> None:
    recovery = plan_recovery(RUN, -1, None, [Logged(0, OpKind.CREATE), *STEP])
    assert recovery.snapshot is None
    assert recovery.replays == (0, 1, 2)


def test_only_what_lies_above_the_snapshot_is_replayed() -> None:
    recovery = plan_recovery(RUN, 1, BlobKey("tenants/t/x"), STEP)
    assert recovery.snapshot == "tenants/t/x"
    assert recovery.applied_seq == 1
    assert recovery.replays == (2,)


def test_ops_without_an_effect_are_not_replayed() -> None:
    log = [Logged(0, OpKind.CREATE), Logged(1, OpKind.FORWARD), Logged(2, OpKind.SAVE)]
    assert plan_recovery(RUN, -1, None, log).replays == (0,)


def test_a_sampler_whose_file_is_missing_is_made_again() -> None:
    log = [Logged(0, OpKind.CREATE), Logged(1, OpKind.SAVE_SAMPLER), Logged(2, OpKind.OPTIM_STEP)]
    assert plan_recovery(RUN, -1, None, log).replays == (0, 1, 2)


def test_replays_come_in_order() -> None:
    assert plan_recovery(RUN, 0, BlobKey("k"), STEP[::-1]).replays == (1, 2)


def test_a_log_without_a_beginning_is_refused() -> None:
    with pytest.raises(CorruptError, match="created"):
        plan_recovery(RUN, -1, None, STEP)


def test_a_snapshot_without_a_file_is_refused() -> None:
    with pytest.raises(CorruptError, match="has no file"):
        plan_recovery(RUN, 3, None, [])
