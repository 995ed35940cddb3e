"""Every example learns: run one after another against one real server, each judged by what it measures itself.

Those that take longest run a few steps here, which shows that they still run; `make examples` has all of them learn.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from tests.service import Service, running
from tinsmith.demo import main as demo
from tinsmith.demo.reinforcement import reinforcement

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
HOW_TO = EXAMPLES.parent / "docs" / "how-to"
ALL_LEARN = bool(os.environ.get("TINSMITH_TEST_EXAMPLES_LEARN"))
whole = pytest.mark.skipif(not ALL_LEARN, reason="make examples")
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "many_runs")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with (
        running(tmp_path_factory.mktemp("examples") / "data", "--no-deterministic") as service,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TINKER_BASE_URL", service.url)
        patch.setenv("TINKER_API_KEY", service.key)
        yield service


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def learn(name: str, **shorter: int) -> Any:
    """`shorter`: constants of the example in place of its own, where less is enough to judge it."""
    example = load(name)
    for constant, value in shorter.items():
        assert hasattr(example, constant)
        setattr(example, constant, value)
    return example.run(seed=0)


@pytest.mark.usefixtures("service")
class TestLearns:
    def test_supervised(self) -> None:
        report = learn("supervised")
        assert report.before == 0
        assert report.after >= 0.7
        assert report.nll_after < 0.1 * report.nll_before

    def test_grpo_as_the_demonstration_shows_it(self, tmp_path: Path) -> None:
        out = io.StringIO()
        example = load("grpo")
        assert reinforcement(Console(file=out, width=120), tmp_path, example) == 0
        assert (tmp_path / "reward.png").stat().st_size > 10_000
        assert f"answers after step {example.EARLY_STEP}" in out.getvalue()
        assert "What is" in out.getvalue()

    @whole
    def test_async_rl(self) -> None:
        report = learn("async_rl", STEPS=14)
        assert report.before < 0.7
        assert report.after >= 0.9
        assert max(report.lags) > 0, "no batch was older than the weights: not off-policy"

    @whole
    def test_dpo(self) -> None:
        report = learn("dpo")
        assert report.before < 0.6
        assert report.after >= 0.85
        assert report.losses[0] == pytest.approx(0.6931, abs=1e-3), "policy and reference start equal: log 2"

    @whole
    def test_on_policy_distillation(self) -> None:
        report = learn("on_policy_distillation")
        assert report.teacher >= 0.95
        assert report.before < 0.7
        assert report.after >= 0.85
        assert report.kl_after < 0.5 * report.kl_before

    @whole
    def test_prompt_distillation(self) -> None:
        report = learn("prompt_distillation")
        assert report.before <= 0.3
        assert report.after >= 0.7
        assert report.prompt_tokens_saved > 50

    def test_custom_loss(self) -> None:
        report = learn("custom_loss", STEPS=9)
        assert report.after <= 0.5 * report.before

    @whole
    def test_tool_use(self) -> None:
        report = learn("tool_use", STEPS=8)
        assert report.base < 0.5
        assert report.before < report.after
        assert report.after >= 0.8
        assert report.calls_after > report.calls_before

    @whole
    def test_self_play(self) -> None:
        report = learn("self_play", STEPS=8)
        assert report.before < 0.7
        assert report.after >= 0.8
        assert report.best_after > report.best_before


@pytest.mark.skipif(ALL_LEARN, reason="they learn")
@pytest.mark.usefixtures("service")
class TestRuns:
    """Two steps each of those that take longest to learn: what they report is there and finite."""

    def test_async_rl(self) -> None:
        report = learn("async_rl", STEPS=2)
        assert len(report.rewards) == len(report.lags) == 2
        assert 0 <= report.after <= 1

    def test_dpo(self) -> None:
        report = learn("dpo", STEPS=2, NUM_HELD_OUT=4)
        assert report.losses[0] == pytest.approx(0.6931, abs=1e-3), "policy and reference start equal: log 2"
        assert report.losses[1] < report.losses[0]

    def test_prompt_distillation(self) -> None:
        report = learn("prompt_distillation", TEACHER_STEPS=2, STEPS=2, NUM_HELD_OUT=2)
        assert len(report.losses) == 2
        assert report.prompt_tokens_saved > 0
        assert 0 <= report.after <= 1

    def test_on_policy_distillation(self) -> None:
        report = learn("on_policy_distillation", TEACHER_STEPS=2, STEPS=2, BATCH=4)
        assert all(math.isfinite(kl) for kl in [*report.kls, report.kl_before, report.kl_after])
        assert len(report.kls) == 2

    def test_tool_use(self) -> None:
        report = learn("tool_use", WARM_UP_STEPS=12, STEPS=1, GROUP_SIZE=4)
        assert len(report.rewards) == 1
        assert report.calls_after > 0, "twelve steps are enough to learn to call the tool"
        assert report.transcript

    def test_self_play(self) -> None:
        report = learn("self_play", WARM_UP_STEPS=6, STEPS=1)
        assert len(report.best_moves) == 1
        assert 0 <= report.after <= 1


@pytest.mark.usefixtures("service")
class TestDemonstration:
    """Its first half with a quarter of the steps: six tasks at once through the SDK, judged as the command does."""

    @pytest.mark.alone
    def test_six_runs_learn_in_shared_passes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        example = demo.load_example("many_runs")
        reports: list[Any] = []
        run_all = example.run_all
        monkeypatch.setattr(example, "STEPS", 9)
        monkeypatch.setattr(example, "run_all", lambda on_step: reports.extend(run_all(on_step)) or reports)
        out = io.StringIO()
        assert demo.supervised(Console(file=out, width=120), tmp_path, example) == 0, out.getvalue()
        assert [len(report.losses) for report in reports] == [9] * 6
        assert all(report.losses[-1] < 0.6 * report.losses[0] for report in reports)
        assert (tmp_path / "losses.png").stat().st_size > 10_000
        printed = " ".join(out.getvalue().split())
        sharing = re.search(r"([\d.]+) of 6 runs shared a pass \(median of 54 steps\); .* ([\d.]+) tokens/s", printed)
        assert sharing is not None, printed
        assert float(sharing[1]) >= 4
        assert float(sharing[2]) > 0
        assert "resumed tinker://" in printed
        assert "Held-out negative log-likelihood" in printed
        assert all(report.task.name in printed and report.sample_after for report in reports)

    def test_it_fails_when_no_loss_falls(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        example = demo.load_example("many_runs")
        still = tuple(dataclasses.replace(task, learning_rate=0.0) for task in example.TASKS)
        monkeypatch.setattr(example, "STEPS", 3)
        monkeypatch.setattr(example, "TASKS", still)
        out = io.StringIO()
        assert demo.supervised(Console(file=out, width=120), tmp_path, example) == 1
        assert out.getvalue().count("the held-out loss did not fall") == len(still)


class TestFailureShows:
    @pytest.mark.usefixtures("service")
    def test_demonstration_fails_when_nothing_is_learned(self, tmp_path: Path) -> None:
        example = load("grpo")
        example.STEPS, example.QUESTIONS_PER_STEP, example.PEAK_LEARNING_RATE = 2, 2, 0.0  # type: ignore[attr-defined]
        out = io.StringIO()
        assert reinforcement(Console(file=out, width=120), tmp_path, example) == 1
        assert "failed" in out.getvalue()


@pytest.mark.usefixtures("service")
def test_the_first_fine_tune_of_the_quickstart_prints_what_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    """Its first loss and its answer to the letter; the losses between depend on the adapter's random numbers."""
    page = (HOW_TO.parent / "quickstart.md").read_text()
    code, rest = page.partition("```python\n")[2].split("```", 1)
    shown = rest.partition("```\n")[2].partition("```")[0].splitlines()
    exec(compile(code, "quickstart", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert [printed[0], printed[-1]] == [shown[0], shown[-1]]
    assert [line.partition(":")[0] for line in printed[-3:-1]] == [line.partition(":")[0] for line in shown[-3:-1]]
    assert float(printed[-2].split()[-1]) < 1


@pytest.mark.parametrize("name", NAMES)
def test_has_a_how_to_page(name: str) -> None:
    page = (HOW_TO / f"{name.replace('_', '-')}.md").read_text()
    assert f"examples/{name}.py" in page


@pytest.mark.parametrize("name", NAMES)
def test_is_short_and_uses_only_the_sdk(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text()
    assert "tinsmith." not in source.replace("tinsmith/tiny", "")
    assert source.count("\n") <= 260
    assert source.startswith('"""')
