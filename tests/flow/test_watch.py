"""What a worker counts of its work: the figures of a known load, and of what comes after a crash."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.flow.house import House, settle, train
from tests.service import until
from tests.unit.test_metrics import samples
from tinsmith.config import METRICS_DIR
from tinsmith.observe import series
from tinsmith.observe.metrics import Counting

LEVELS = (
    "resident_runs", "resident_runs_max", "resident_runs_bytes", "resident_runs_max_bytes", "resident_samples",
    "seated_sequences", "sample_seats",
)  # fmt: skip


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path / "data", snapshot_debt_s=1e9, snapshot_debt_bytes=10**12, metrics_tenants=2)
    yield made
    made.close()


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    monkeypatch.setenv(METRICS_DIR, str(tmp_path / "metrics"))
    monkeypatch.setattr("tinsmith.worker.watch.LEVELS_EVERY_S", 0.0)
    (tmp_path / "metrics").mkdir()
    made = Counting(series.TABLE, "worker-0", tmp_path / "metrics")
    made.start()
    yield made
    made.stop()


def test_a_known_load(house: House, counting: Counting) -> None:
    worker = house.worker()
    train(house, house.create_run(), range(2))
    house.be("bob")
    second = house.create_run()
    train(house, second, range(2))
    sampler = house.sampler()
    house.sample(sampler, 0, max_tokens=40)
    bad = house.load(second, 5, "tenants/nobody/checkpoints/x.0")  # type: ignore[arg-type]
    settle(worker)
    house.be("carol")
    third = house.create_run()
    train(house, third, range(1))
    settle(worker)
    assert house.get(bad).failure is not None
    worker.close()
    found = samples(counting.text())
    assert found[("tinsmith_ops_total", ("forward_backward", "done"))] == 5
    assert found[("tinsmith_ops_total", ("optim_step", "done"))] == 5
    assert found[("tinsmith_ops_total", ("load", "failed"))] == 1
    assert found[("tinsmith_failed_ops_total", (house.get(bad).failure.code,))] == 1
    assert found[("tinsmith_tokens_total", ("trained",))] == 15
    assert found[("tinsmith_tokens_total", ("prefilled",))] == 3
    assert found[("tinsmith_tokens_total", ("sampled",))] == 80
    assert found[("tinsmith_tenant_tokens_total", ("trained", "alice"))] == 6
    assert found[("tinsmith_tenant_tokens_total", ("trained", "bob"))] == 6
    assert found[("tinsmith_tenant_tokens_total", ("trained", "other"))] == 3
    assert found[("tinsmith_queue_wait_seconds_count", ("sample",))] == 1
    assert found[("tinsmith_sample_first_token_seconds_count", ())] == 1
    assert found[("tinsmith_sample_step_seconds_count", ())] >= 5
    assert found[("tinsmith_pass_tokens_sum", ())] == 15
    assert found[("tinsmith_pass_tenants_sum", ())] >= found[("tinsmith_pass_seconds_count", ())]
    assert found[("tinsmith_optim_seconds_count", ())] >= 2
    assert found[("tinsmith_snapshot_seconds_count", ())] == 3  # of the clean stop
    assert found[("tinsmith_snapshot_written_bytes_total", ())] > 0
    assert found[("tinsmith_fsync_seconds_count", ())] >= 3
    assert found[("tinsmith_commit_seconds_count", ())] > 5
    assert found[("tinsmith_resident_runs", ("fake/base#0",))] == 3


def test_who_shares_a_pass(house: House, counting: Counting) -> None:
    worker = house.worker()
    house.forward_backward(house.create_run(), 1, [1, 2, 3])
    house.be("bob")
    for run in [house.create_run(), house.create_run()]:
        house.forward_backward(run, 1, [1, 2, 3])
    settle(worker)
    found = samples(counting.text())
    assert found[("tinsmith_pass_seconds_count", ())] == 1
    assert found[("tinsmith_pass_runs_sum", ())] == 3
    assert found[("tinsmith_pass_tenants_sum", ())] == 2


def test_what_is_computed_again_counts_as_replayed_and_nowhere_else(house: House, counting: Counting) -> None:
    worker = house.worker()
    run = house.create_run()
    train(house, run, range(2))
    settle(worker)
    before = samples(counting.text())
    successor = house.worker()
    train(house, run, range(2, 3))
    settle(successor)
    found = samples(counting.text())
    assert before[("tinsmith_tokens_total", ("trained",))] == 6
    assert found[("tinsmith_tokens_total", ("trained",))] == 9
    assert found[("tinsmith_replayed_ops_total", ("forward_backward",))] == 2
    assert found[("tinsmith_replayed_ops_total", ("optim_step",))] == 2
    assert found[("tinsmith_ops_total", ("forward_backward", "done"))] == 3


def test_how_full_a_worker_is(tmp_path: Path, counting: Counting) -> None:
    """Beside what is used stands what there is of it."""
    made = House(tmp_path / "small", max_resident_runs=3, resident_runs_mib=2)
    with closing(made) as house:
        worker, sampler = house.worker(), house.sampler()
        house.create_run()
        settle(worker)
        for seq in range(2):
            house.sample(sampler, seq, max_tokens=200)
        worker._must_look = True
        worker._queue.distrust()
        until(lambda: worker.step() and house.engine.num_samples == 2, 20)
        found = samples(counting.text())
        used = house.engine.runs_bytes
        settle(worker)
        after = samples(counting.text())
    level = {name: found[f"tinsmith_{name}", ("fake/base#0",)] for name in LEVELS}
    assert level == {
        "resident_runs": 1, "resident_runs_max": 3, "resident_runs_bytes": used, "resident_runs_max_bytes": 2 * 2**20,
        "resident_samples": 2, "seated_sequences": 4, "sample_seats": 4,
    }  # fmt: skip
    assert used > 0
    assert after["tinsmith_resident_samples", ("fake/base#0",)] == 0
    assert after["tinsmith_seated_sequences", ("fake/base#0",)] == 0
