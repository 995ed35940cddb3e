"""Kills at random while sixteen clients train and sample (chaos.py); `make chaos` does the same five hundred times."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.crash.chaos import KINDS, POLITE, run

MORE = [*["worker"] * 7, *["api"] * 2, *["clients"] * 5]


@pytest.mark.timeout(420)
def test_nothing_is_lost_doubled_or_changed_by_twenty_kills(tmp_path: Path) -> None:
    rng = random.Random(7)
    strikes = [*KINDS, *MORE]
    count = run(tmp_path, rng.sample(strikes, len(strikes)), rng, "--device", "fake")
    assert count.keys() == KINDS.keys()
    assert sum(number for kind, number in count.items() if kind not in POLITE) == 20
