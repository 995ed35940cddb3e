"""Kills at random while sixteen clients train and sample (chaos.py); `make chaos` does the same five hundred times."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.chaos import run


@pytest.mark.timeout(420)
def test_nothing_is_lost_doubled_or_changed_by_twenty_kills(tmp_path: Path) -> None:
    assert sum(run(tmp_path, 20, 7, "--device", "fake").values()) == 20


@pytest.mark.timeout(420)
def test_nor_are_real_numbers(tmp_path: Path) -> None:
    assert sum(run(tmp_path, 4, 3, "--threads", "1").values()) == 4
