"""Thousands of requests on a mixture, in small: the benchmark's own code seats all of them and counts experts' rows."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

REQUESTS, SEATS, PREFILL_TOKENS = 512, 640, 512  # a sixteenth of the benchmark's
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def crowd() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("expert_crowd")


@pytest.fixture(scope="module")
def base(crowd: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return crowd.make_base(tmp_path_factory.mktemp("mixture"))


@pytest.mark.parametrize("adapter", [None, "a"])
def test_all_are_decoded_together_and_every_expert_has_rows(crowd: Any, base: Any, adapter: str | None) -> None:
    sampler = crowd.make_sampler(base, SEATS, PREFILL_TOKENS)
    rate = crowd.run(sampler, crowd.Loads(base), (REQUESTS, adapter), 24, 1)
    assert 0 < rate.least < rate.mean == REQUESTS * crowd.CHOSEN / crowd.EXPERTS


def test_a_level_that_is_never_decoded_together_fails(crowd: Any, base: Any) -> None:
    sampler = crowd.make_sampler(base, 64)
    with pytest.raises(SystemExit, match="of 80 requests at most 56 were decoded together"):
        crowd.run(sampler, crowd.Loads(base), (80, None), 4, 1)
