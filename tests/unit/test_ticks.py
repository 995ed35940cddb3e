"""Times that come due together: each call once, none that was called off, and one timer for all."""

from __future__ import annotations

import asyncio
from unittest.mock import patch

from tinsmith.api.ticks import GRID_S, Ticks, ticks_of


def test_each_is_called_when_it_is_due_and_none_that_was_called_off() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        ticks, began = Ticks(loop), loop.time()
        called: list[tuple[str, float]] = []

        def note(name: str) -> None:
            called.append((name, loop.time() - began))

        def fail() -> None:
            note("fails")
            raise ValueError

        loop.set_exception_handler(lambda *_: None)
        ticks.later(0.05, fail)
        ticks.later(0.05, lambda: note("after one that fails"))
        ticks.later(0.35, lambda: note("later"))
        ticks.later(0.05, lambda: note("never")).cancel()
        at_the_last = ticks.later(0.05, lambda: note("never"))
        loop.call_at(min(ticks._due) * GRID_S, at_the_last.cancel)
        while len(called) < 3:
            await asyncio.sleep(0.01)
        assert {name for name, _ in called[:2]} == {"fails", "after one that fails"}
        assert called[2][0] == "later"
        assert called[0][1] >= 0.05
        assert called[2][1] >= 0.35
        assert not ticks._due

    asyncio.run(scenario())


def test_thousands_take_a_timer_for_each_tenth_of_a_second() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with patch.object(loop, "call_at", wraps=loop.call_at) as call_at:
            ticks = Ticks(loop)
            made = [ticks.later(40.0, list) for _ in range(5000)]
            assert call_at.call_count <= 5
        for tick in made:
            tick.cancel()
        assert not any(ticks._due.values()), "what was called off is forgotten"
        assert ticks_of(loop) is ticks_of(loop)

    asyncio.run(scenario())
