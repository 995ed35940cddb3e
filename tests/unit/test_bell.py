from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from tinsmith.errors import ConfigError
from tinsmith.ipc.bell import Bell, Ringer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bell"


def test_a_ring_is_heard_once(path: Path) -> None:
    with Bell(path) as bell:
        ringer = Ringer(path)
        assert not bell.wait(0.0)
        for _ in range(3):
            ringer.ring()
        assert bell.wait(0.0)
        assert not bell.wait(0.0)
        ringer.close()
    assert not path.exists()


def test_wait_ends_at_its_time_or_at_a_ring(path: Path) -> None:
    with Bell(path) as bell:
        ringer = Ringer(path)
        started = time.monotonic()
        assert not bell.wait(0.05)
        assert time.monotonic() - started >= 0.045
        timer = threading.Timer(0.05, ringer.ring)
        timer.start()
        assert bell.wait(10.0)
        assert time.monotonic() - started < 5.0
        timer.join()
        ringer.close()


def test_ringing_needs_no_listener_and_never_blocks(path: Path) -> None:
    ringer = Ringer(path)
    ringer.ring()
    with Bell(path) as bell:
        for _ in range(5000):
            ringer.ring()
        assert bell.wait(0.0)
        assert not bell.wait(0.0)
    ringer.ring()
    ringer.close()


def test_a_restarted_listener_takes_over(path: Path) -> None:
    old = Bell(path)
    ringer = Ringer(path)
    ringer.ring()
    new = Bell(path)
    ringer.ring()
    assert new.wait(0.0)
    old.close()
    ringer.ring()
    assert new.wait(0.0)
    new.close()
    ringer.close()


def test_in_an_event_loop(path: Path) -> None:
    async def listen() -> None:
        with Bell(path) as bell:
            heard = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.add_reader(bell.fileno(), lambda: bell.wait(0.0) and heard.set())
            ringer = Ringer(path)
            ringer.ring()
            await asyncio.wait_for(heard.wait(), 5.0)
            loop.remove_reader(bell.fileno())
            ringer.close()

    asyncio.run(listen())


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    for make in (Bell, Ringer):
        with pytest.raises(ConfigError, match="--data-dir"):
            make(long)
