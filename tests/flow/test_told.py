"""Requests that a ring tells of are begun without a look at the store, and never before their turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.flow.house import House, settle
from tinsmith.ipc.bell import PLAIN, Bell, Ringer
from tinsmith.ipc.notes import note_of, rows_in
from tinsmith.store.checksums import crc_of
from tinsmith.store.rows import OpRow
from tinsmith.types import OpState
from tinsmith.worker.loop import Worker


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with closing(House(tmp_path, scan_interval_s=3600.0)) as made:
        yield made


def ring(house: House, *rows: OpRow | None) -> None:
    with closing(Ringer(house.root / f"b{len(house._open) - 3}")) as ringer:
        ringer.ring(note_of(rows))


def settled(worker: Worker) -> None:
    while worker.step():
        pass


def looks(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    whole = worker._queue.look

    def look() -> None:
        seen.append("look")
        whole()

    monkeypatch.setattr(worker._queue, "look", look)
    return seen


def test_what_is_told_of_is_run_without_a_look(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    run = house.create_run()
    worker = house.worker()
    settle(worker)
    seen = looks(worker, monkeypatch)
    for seq in (1, 3):
        first = house.forward_backward(run, seq, [1, 2, 3])
        ring(house, first)
        settled(worker)
        second = house.optim_step(run, seq + 1)
        ring(house, second)
        settled(worker)
        assert house.get(first).state is house.get(second).state is OpState.DONE
    assert not seen


def test_what_came_before_is_run_before_though_nobody_told_of_it(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    run = house.create_run()
    worker = house.worker()
    settle(worker)
    seen = looks(worker, monkeypatch)
    first = house.forward_backward(run, 1, [1, 2, 3])
    second = house.optim_step(run, 2)
    ring(house, second)
    settled(worker)
    assert seen, "the first is missing in what was told"
    rows = house.get(first), house.get(second)
    assert [row.state for row in rows] == [OpState.DONE] * 2
    assert (rows[0].started_at or 0) < (rows[1].started_at or 0)


@pytest.mark.parametrize("kind", ["stale", "twice", "of another", "nothing", "rubbish"])
def test_a_note_is_a_hint(house: House, kind: str) -> None:
    run, other = house.create_run(), house.create_run(seed=2)
    worker = house.worker()
    settle(worker)
    done = house.forward_backward(run, 1, [1, 2, 3])
    ring(house, done)
    settled(worker)
    before = house.weights(run)
    waiting = house.optim_step(other, 1)
    match kind:
        case "stale":
            ring(house, done)
        case "twice":
            ring(house, waiting)
            ring(house, waiting)
        case "of another":
            house.enqueue(house.op(waiting.kind, run, 2, payload=b'{"adam_params": {}}'))
            ring(house, waiting)
            settled(worker)
            ring(house, None)
        case "nothing":
            ring(house, None)
        case _:
            with closing(Ringer(house.root / f"b{len(house._open) - 3}")) as ringer:
                ringer.ring(b"rubbish")
    settled(worker)
    assert house.get(waiting).state is OpState.DONE
    assert house.get(done).attempts == 1
    if kind != "of another":
        assert (house.weights(run) == before).all()


def test_the_api_is_told_what_was_recorded(house: House) -> None:
    run = house.create_run()
    worker = house.worker()
    with Bell(house.root / "api") as bell:
        settle(worker)
        bell.wait(0.0)
        assert bell.notes() is None, "that a run was made has to be looked up"
        op = house.forward_backward(run, 1, [1, 2, 3])
        ring(house, op)
        settled(worker)
        assert bell.wait(0.0)
        told = rows_in(bell.notes())
    recorded = house.get(op)
    assert told is not None
    (row,) = told
    fields: list[Any] = [
        name for name in row.__struct_fields__ if name not in ("payload", "payload_blob", "result_crc")
    ]
    assert {name: getattr(row, name) for name in fields} == {name: getattr(recorded, name) for name in fields}
    assert row.result_crc is None, "it lay on no disk"
    assert recorded.result_crc == crc_of(row.result)


def test_many_rings_are_a_plain_one(house: House) -> None:
    run = house.create_run()
    op = house.forward_backward(run, 1, [1])
    with Bell(house.root / "api") as bell, closing(Ringer(house.root / "api")) as ringer:
        for count, is_told in ((3, True), (8, True), (9, False), (40, False), (1, True)):
            for _ in range(count):
                ringer.ring(note_of([op]))
            assert bell.wait(0.0)
            told = rows_in(bell.notes())
            assert (told is not None and len(told) == count) is is_told
    assert note_of([op] * 9) == PLAIN
    assert note_of([op, None]) == PLAIN
    assert note_of([]) != PLAIN
