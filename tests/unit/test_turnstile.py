"""Who waits to write holds the turnstile; who has just written has to pass it first."""

from __future__ import annotations

from pathlib import Path

from tinsmith.store.turnstile import Turnstile


def test_processes_take_turns(tmp_path: Path) -> None:
    waiting, writing = Turnstile(tmp_path / "turn"), Turnstile(tmp_path / "turn")
    assert waiting.enter()
    assert not writing.enter(), "somebody waits"
    waiting.leave()
    assert writing.enter()
    writing.close()
    assert waiting.enter(), "it is free once its holder is gone"
    waiting.close()
