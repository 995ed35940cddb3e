"""A sample whose result can't be written fails alone and at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.message import EncodeError

from tests.flow.house import House, settle
from tinsmith.types import SampleResult
from tinsmith.wire.sampling import encode_sample_result
from tinsmith.worker import samples

BAD_TOKENS = 17


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with contextlib.closing(House(tmp_path / "house")) as house:
        yield house


@pytest.mark.parametrize("error", [EncodeError("too large"), ValueError("too large"), MemoryError()])
def test_a_result_that_can_not_be_written_fails_alone(
    house: House, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def encode(result: SampleResult) -> bytes:
        if len(result.sequences[0].tokens) == BAD_TOKENS:
            raise error
        return encode_sample_result(result)

    monkeypatch.setattr(samples, "encode_sample_result", encode)
    worker, sampler = house.worker(), house.sampler()
    bad = house.sample(sampler, 0, max_tokens=BAD_TOKENS)
    neighbours = [house.sample(sampler, seq, max_tokens=40) for seq in (1, 2)]
    settle(worker)
    row = house.get(bad)
    assert (row.state, row.attempts) == ("failed", 1)
    assert row.failure is not None
    assert (row.failure.code, row.failure.category) == ("internal", "server")
    assert "several smaller ones" in row.failure.message
    assert [(house.get(op).state, house.get(op).attempts) for op in neighbours] == [("done", 1)] * 2
    assert house.engine.num_samples == 0
    assert not worker._samples.resident
