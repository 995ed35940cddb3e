"""Kills at random while sixteen clients train and sample (chaos.py); `make chaos` does the same five hundred times."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.crash.chaos import KINDS, run

TWENTY = [*KINDS, *["worker"] * 6, *["clients"] * 6]


@pytest.mark.timeout(420)
def test_nothing_is_lost_doubled_or_changed_by_twenty_kills(tmp_path: Path) -> None:
    rng = random.Random(7)
    count = run(tmp_path, rng.sample(TWENTY, len(TWENTY)), rng, "--device", "fake")
    assert count.keys() == KINDS.keys()
    assert sum(count.values()) == 20
