"""Decode steps replayed from recorded ones give what plain steps give, whoever is in the batch and whatever moves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from tests.numerics.graph_lab import Recorder, tables_in_use
from tests.numerics.sampling_lab import Letters, mixed_states, prompt, run_all, sample
from tinsmith.config import Settings
from tinsmith.errors import ConfigError, UnsupportedError
from tinsmith.model import BaseModel
from tinsmith.sampling import Sampler, graphs, tiled_lora
from tinsmith.sampling.graphs import Captured, DecodeGraphs, bucket_of
from tinsmith.types import SampleItem, SampleResult

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with tables_in_use(monkeypatch):
        yield


def sampler_of(base: BaseModel, num_adapters: int, capture: Any = None, kv_blocks: int | None = None) -> Sampler:
    sampler = Sampler(base, Settings(), Letters(), kv_blocks=kv_blocks, is_paged=True, capture=capture)
    for key, state in mixed_states(base, num_adapters).items():
        sampler.add_adapter(key, state)
    return sampler


def graphs_of(sampler: Sampler) -> DecodeGraphs:
    found = sampler._walker.graphs
    assert found is not None
    return found


def requests(count: int, num_adapters: int, first: int = 0) -> list[SampleItem]:
    """Ragged prompts of several snapshots, some of none, some of several samples; they end one after another."""
    return [
        sample(
            f"r{i}", prompt(i, (1, 20, 63, 64, 150)[i % 5]), None if i % 6 == 5 else f"a{i % num_adapters}",
            num_samples=1 + i % 2, seed=i, max_tokens=3 + 5 * (i % 5),
        )
        for i in range(first, first + count)
    ]  # fmt: skip


def assert_like(found: dict[str, SampleResult], expected: dict[str, SampleResult]) -> None:
    assert found.keys() == expected.keys()
    for name, result in found.items():
        for one, other in zip(result.sequences, expected[name].sequences, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kv_blocks", [None, 14])
def test_replayed_steps_give_what_plain_steps_give(base: BaseModel, kv_blocks: int | None) -> None:
    """Batches of many sizes, all ranks and target sets; in little memory some are preempted and come back."""
    items = requests(12, 8)
    expected = run_all(sampler_of(base, 8, kv_blocks=kv_blocks), items)
    recorder = Recorder()
    sampler = sampler_of(base, 8, recorder, kv_blocks)
    assert_like(run_all(sampler, items), expected)
    kept = graphs_of(sampler)
    assert len(kept) == kept.num_captured >= 4
    assert recorder.num_replays > kept.num_captured
    assert kept.num_bytes == len(kept) * recorder.num_bytes
    assert (sampler.preemptions.num_preempted > 0) == (kv_blocks is not None)


def test_a_replayed_step_is_one_walk(base: BaseModel) -> None:
    items = [sample("one", prompt(1, 20), "a0", seed=1, max_tokens=9)]
    counts = []
    for capture in (None, Recorder()):
        sampler = sampler_of(base, 1, capture)
        before = base.num_forwards
        run_all(sampler, items)
        counts.append(base.num_forwards - before)
    assert counts[0] == counts[1]


def test_other_adapters_need_no_other_graph(base: BaseModel) -> None:
    """Snapshots that come later lie elsewhere, and are found."""
    recorder = Recorder()
    sampler, plain = sampler_of(base, 1, recorder), sampler_of(base, 4)
    first = sample("r0", prompt(1, 20), "a0", seed=1, max_tokens=6)
    found = run_all(sampler, [first])
    num_captured = graphs_of(sampler).num_captured
    later = [sample(f"r{i}", prompt(i, 90), f"a{i}", seed=i, max_tokens=6) for i in (1, 2)]
    states = mixed_states(base, 4)
    for asked in later:
        sampler.add_adapter(asked.adapter or "", states[asked.adapter or ""])
        found |= run_all(sampler, [asked])
    assert_like(found, run_all(plain, [first, *later]))
    assert graphs_of(sampler).num_captured == num_captured == 1


def test_moved_tables_are_captured_anew(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_lora, "FIRST_CAPACITY", 2)
    sampler, plain = sampler_of(base, 4, Recorder()), sampler_of(base, 4)
    items = [sample(f"r{i}", prompt(i, 20), f"a{i % 4}", seed=i, max_tokens=6) for i in range(7)]
    with capture_logs() as logs:
        found = run_all(sampler, items[:2]) | run_all(sampler, items[2:6]) | run_all(sampler, items[6:])
    assert_like(found, run_all(plain, items))
    assert [line["dropped"] for line in logs if "captured anew" in line["event"]] == [1]
    assert graphs_of(sampler).num_captured > len(graphs_of(sampler))


def test_a_capture_that_fails_is_said_and_done_without(base: BaseModel) -> None:
    def failing(step: Any) -> Captured:
        step()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    sampler, items = sampler_of(base, 4, failing), requests(6, 4)
    with capture_logs() as logs:
        found = run_all(sampler, items)
    assert_like(found, run_all(sampler_of(base, 4), items))
    (said,) = [line for line in logs if line["log_level"] == "warning"]
    assert "without CUDA graphs" in said["event"]
    assert "not permitted when stream is capturing" in said["because"]
    assert len(graphs_of(sampler)) == graphs_of(sampler).num_captured == 0


def test_the_number_of_graphs_and_their_memory_are_bounded(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    items = requests(12, 8)
    expected = run_all(sampler_of(base, 8), items)
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    few = sampler_of(base, 8, Recorder())
    assert_like(run_all(few, items), expected)
    assert len(graphs_of(few)) == 2 < graphs_of(few).num_captured
    large = sampler_of(base, 8, Recorder(num_bytes=graphs.MAX_BYTES))
    with capture_logs() as logs:
        assert_like(run_all(large, items), expected)
    assert graphs_of(large).num_captured == 1
    assert sum("no more CUDA graphs" in line["event"] for line in logs) == 1


def test_a_step_that_asks_for_a_number_cannot_be_recorded(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above rest on: the recorder refuses what CUDA refuses."""
    sampler = sampler_of(base, 1, Recorder())
    step = graphs_of(sampler)._step
    compute = type(step).compute
    monkeypatch.setattr(type(step), "compute", lambda self, n: (compute(self, n), self.hidden_ND.sum().item()))
    with capture_logs() as logs:
        run_all(sampler, [sample("r", prompt(1, 9), "a0", max_tokens=4)])
    assert any("not permitted" in str(line.get("because")) for line in logs)


def test_buckets() -> None:
    assert [bucket_of(n) for n in (1, 2, 3, 4, 5, 8, 9, 17, 256)] == [1, 2, 4, 4, 8, 8, 16, 24, 256]


def test_without_a_gpu_there_are_none(base: BaseModel) -> None:
    assert Sampler(base, Settings(), Letters())._walker.graphs is None
    assert Sampler(base, Settings(cuda_graphs="off"), Letters())._walker.graphs is None
    with pytest.raises(UnsupportedError, match="isn't on a GPU"):
        Sampler(base, Settings(cuda_graphs="on"), Letters())
    with pytest.raises(ConfigError, match="cuda-graphs"):
        Settings.load({}, cuda_graphs="always")
