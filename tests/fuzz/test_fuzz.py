"""The first inputs of every target of `make fuzz`, and that the hunt finds, goes on where it stopped and can repeat."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import __main__ as fuzz
from tests.fuzz import targets as room
from tests.fuzz.app import Api
from tests.fuzz.mutate import draw

NUM_INPUTS = 250
NUM_REQUESTS = 60


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    made = Api()
    yield made
    made.close()


@pytest.mark.parametrize("name", room.targets())
def test_nothing_is_raised_but_refusals(name: str) -> None:
    target = room.targets()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(NUM_INPUTS):
            target.run(draw(name, number, target.seeds, target.words))


def test_no_request_is_answered_with_a_fault(api: Api) -> None:
    said = [api.send(name, number) for name in fuzz.APP_SHARES for number in range(NUM_REQUESTS)]
    assert not any(said), next(filter(None, said))


def test_an_input_follows_from_its_number() -> None:
    target = room.targets()["json"]
    drawn = [draw("json", number, target.seeds, target.words) for number in range(200)]
    assert drawn == [draw("json", number, target.seeds, target.words) for number in range(200)]
    assert len(set(drawn)) > 150


def test_a_hunt_finds_goes_on_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(data: bytes) -> None:
        if data.startswith(b"!"):
            raise KeyError("found it")
        if data.startswith(b"~"):
            while True:
                time.sleep(0)

    broken = {"one": room.Target(3, breaks, (b"abc", b"!bc", b"~")), "two": room.Target(1, lambda data: None, (b"x",))}
    monkeypatch.setattr(room, "targets", lambda: broken)
    monkeypatch.setattr(fuzz, "shares", lambda: {"one": 3, "two": 1})
    monkeypatch.setattr(fuzz, "HANG_CPU_S", 0.01)
    file, said = tmp_path / "state.json", list[str]()
    first = fuzz.State()
    fuzz.hunt(40, first, file, said.append)
    assert first.num_done == 40
    assert any("KeyError: 'found it'" in line for line in said)
    assert any("HangError" in line for line in said)
    assert "inputs a second" in said[-1]
    again = fuzz.State.load(file)
    assert again == first
    fuzz.hunt(60, again, file, said.append)
    assert again.num_done == 60
    assert again.next["one"] > first.next["one"] > first.next["two"]
    name, _, number = first.found[0].partition(":")
    with pytest.raises((KeyError, fuzz.HangError)):
        breaks_at(name, int(number))


def breaks_at(name: str, number: int) -> None:
    target = room.targets()[name]
    data = draw(name, number, target.seeds, target.words)
    if data.startswith(b"~"):
        raise fuzz.HangError
    target.run(data)
