"""What a tenant's rows take is known closely enough, at little cost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flow.house import House
from tinsmith.store import files
from tinsmith.store.rows import NewOp
from tinsmith.types import Failure, OpId, OpKind, SamplerId, TenantId


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with contextlib.closing(House(tmp_path)) as house:
        yield house


def fill(house: House, sampler: SamplerId, count: int, size: int = 0) -> None:
    """Requests that were refused, or wait with a body of so many bytes."""
    failure = None if size else Failure("invalid_request", "user", "bad")
    news = [
        NewOp(
            tenant_id=house.tenant, kind=OpKind.SAMPLE, base_model="fake/base", id=OpId(f"{sampler}-{seq}"),
            seq_id=seq, sampler_id=sampler, payload=b"x" * size if size else None, payload_bytes=size, failure=failure,
        )
        for seq in range(count)
    ]  # fmt: skip
    house.store.ops.enqueue_all(news, time.time())


def test_rows_of_requests_count_with_what_is_stored_in_them(house: House) -> None:
    before = house.store.files.row_bytes()[house.tenant]
    fill(house, house.sampler(), 100)
    refused = house.store.files.row_bytes()[house.tenant] - before
    assert 100 * files.ROW_BYTES <= refused <= 110 * files.ROW_BYTES
    fill(house, house.sampler(number=1), 100, size=5000)
    assert house.store.files.row_bytes()[house.tenant] - before - refused >= 100 * 5000


def test_many_are_estimated_from_some(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where many have gone in between."""
    monkeypatch.setattr(files, "SAMPLE", 400)
    alice = house.tenant
    fill(house, house.sampler(), 3000)
    house.be("bob")
    fill(house, house.sampler(), 1000)
    with house.store._database.write() as conn:
        conn.exec_driver_sql("DELETE FROM ops WHERE num % 2 = 0 AND tenant_id = ?", (alice,))
    for tenant, rows in ((alice, 1500), (house.tenant, 1000)):
        found = house.store.files.row_bytes()[TenantId(tenant)]
        assert 0.75 * rows * files.ROW_BYTES < found < 1.3 * rows * files.ROW_BYTES


def test_an_empty_database_is_no_trouble(house: House) -> None:
    assert house.store.files.row_bytes()[house.tenant] < 4096
