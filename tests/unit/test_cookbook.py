"""The parts of `make cookbook`, without the cookbook."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from scripts.cookbook import fixture
from scripts.cookbook.__main__ import absent_rows, select
from scripts.cookbook.outcome import (
    AGREEMENT,
    BEFORE_KILL,
    Outcome,
    agreeing,
    both,
    falls,
    learned,
    refused,
    resumed,
    rises,
    said,
    trained,
)
from scripts.cookbook.recipe import Recipe
from scripts.cookbook.recipes import ABSENT, RECIPES, missing, unlisted
from scripts.cookbook.runner import Places, fill, run
from scripts.cookbook.table import Row, render
from tinsmith.bases.catalog import SHIPPED_PATH, describe, parse


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("work")
    fixture.build(directory, SHIPPED_PATH, ["Qwen/Qwen3-8B"], ["Qwen/Qwen3.5-4B"])
    return directory


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path


def write(log_path: Path, values: list[float], name: str = "metrics.jsonl", time: float = 0.0, first: int = 0) -> None:
    rows = [{"step": first + i, "nll": value, "time/step": time} for i, value in enumerate(values)]
    (log_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def outcome(log_path: Path, output: str = "", returncode: int | None = 0) -> Outcome:
    return Outcome(log_path, output, returncode)


class TestFixture:
    def test_tokenizers_are_those_of_the_model_that_is_served(self, work: Path) -> None:
        ours = Tokenizer.from_file(str(SHIPPED_PATH / "tokenizer.json"))
        for name in ("Qwen/Qwen3-8B", "Qwen/Qwen3.5-4B"):
            theirs = Tokenizer.from_file(str(work / name / "tokenizer.json"))
            assert theirs.encode("What is 3 + 4?").ids == ours.encode("What is 3 + 4?").ids

    def test_both_models_can_be_served(self, work: Path) -> None:
        served = fixture.build(work, SHIPPED_PATH, ["Qwen/Qwen3-8B"], ["Qwen/Qwen3.5-4B"])
        infos = {name: describe(parse(f"{name}={path}")) for name, path in served.items()}
        assert infos["Qwen/Qwen3-8B"].max_context == 2048
        assert infos["Qwen/Qwen3.5-4B"].max_context == fixture.WIDE_CONTEXT_TOKENS
        weights = work / "models" / "wide" / "model.safetensors"
        assert weights.is_symlink()
        assert weights.read_bytes() == (SHIPPED_PATH / "model.safetensors").read_bytes()

    def test_every_dataset_names_its_files(self, work: Path) -> None:
        for name, config, splits in fixture.datasets():
            readme = (work / name / "README.md").read_text()
            assert f"config_name: {config}" in readme
            for split, rows in splits.items():
                assert f"path: {split}.jsonl" in readme
                lines = (work / name / f"{split}.jsonl").read_text().splitlines()
                assert [json.loads(line) for line in lines] == rows
                assert rows

    def test_rows_are_the_same_each_time(self) -> None:
        assert fixture.datasets() == fixture.datasets()


class TestVerdicts:
    def test_a_process_that_failed_shows_its_last_lines(self, log_path: Path) -> None:
        write(log_path, [1.0])
        verdict = trained(1, "nll")(outcome(log_path, "first\n" + "x\n" * 9 + "the cause\n", 3))
        assert not verdict.ok
        assert verdict.text.startswith("failed, exit 3:\n")
        assert verdict.text.endswith("the cause")
        assert "first" not in verdict.text
        assert "out of time" in trained(1, "nll")(outcome(log_path, "", None)).text

    def test_steps_are_counted_in_the_metrics(self, log_path: Path) -> None:
        write(log_path, [1.0, 2.0])
        assert trained(2, "nll")(outcome(log_path)).steps == 2
        assert not trained(3, "nll")(outcome(log_path)).ok
        assert not trained(2, "reward")(outcome(log_path)).ok

    def test_a_recipe_may_log_beside_its_own_directory(self, log_path: Path) -> None:
        (log_path / "stage").mkdir()
        write(log_path / "stage", [1.0])
        assert trained(1, "nll", ("../stage",))(outcome(log_path / "never-made")).ok

    def test_a_metric_has_to_move_far_enough(self, log_path: Path) -> None:
        write(log_path, [0.1, 0.1, 0.5, 0.5])
        assert rises(4, "nll", 2, 0.3)(outcome(log_path)).ok
        assert not rises(4, "nll", 2, 0.5)(outcome(log_path)).ok
        assert not falls(4, "nll", 2, 0.1)(outcome(log_path)).ok
        write(log_path, [0.5, 0.5, 0.1, 0.1])
        assert falls(4, "nll", 2, 0.3)(outcome(log_path)).ok

    def test_a_resumption_goes_on_with_the_same_bits(self, log_path: Path) -> None:
        judge = resumed(trained(4, "nll"), "nll", 2)
        write(log_path, [4.0, 3.0, 2.0, 1.5], BEFORE_KILL)
        write(log_path, [3.0, 2.0, 1.5, 1.0], time=9.0)
        verdict = judge(outcome(log_path))
        assert verdict.ok
        assert "3 steps again" in verdict.text

    @pytest.mark.parametrize(
        ("after", "message"),
        [
            ([3.0, 2.0, 1.5000001, 1.0], "differs"),
            ([2.9, 2.0, 1.5, 1.0], "never was at"),
            ([1.5, 1.0, 0.5, 0.2], "only 1 steps"),
        ],
    )
    def test_a_resumption_that_is_not_exact_fails(self, log_path: Path, after: list[float], message: str) -> None:
        write(log_path, [4.0, 3.0, 2.0, 1.5], BEFORE_KILL)
        write(log_path, after, time=9.0)
        verdict = resumed(trained(4, "nll"), "nll", 2)(outcome(log_path))
        assert not verdict.ok
        assert message in verdict.text

    def test_the_sampler_has_to_agree_with_the_trainer(self, log_path: Path) -> None:
        judge = agreeing(trained(1, "step"))
        for value, ok in ((1e-13, True), (1e-6, False)):
            (log_path / "metrics.jsonl").write_text(json.dumps({"step": 0, AGREEMENT: value}) + "\n")
            assert judge(outcome(log_path)).ok is ok
        write(log_path, [1.0])
        assert not judge(outcome(log_path)).ok

    def test_a_run_that_learns_nothing_is_bad(self, log_path: Path) -> None:
        for name, norm in (("a", 0.5), ("b", 0.0)):
            (log_path / name).mkdir()
            row = json.dumps({"step": 0, "grad_norm": norm}) + "\n"
            (log_path / name / "metrics.jsonl").write_text(json.dumps({"step": 1, "grad_norm": 0.0}) + "\n" + row)
        verdict = learned(2)(outcome(log_path))
        assert not verdict.ok
        assert "['b']" in verdict.text
        (log_path / "b" / "metrics.jsonl").unlink()
        assert learned(1)(outcome(log_path)).ok
        assert not learned(2)(outcome(log_path)).ok

    def test_two_verdicts_are_one(self, log_path: Path) -> None:
        write(log_path, [1.0, 2.0])
        assert both(trained(2, "nll"), trained(1, "nll"))(outcome(log_path)).steps == 4
        assert not both(trained(3, "nll"), trained(1, "nll"))(outcome(log_path)).ok
        assert not both(trained(1, "nll"), trained(3, "nll"))(outcome(log_path)).ok

    def test_a_refusal_has_to_fail_and_to_say_why(self, log_path: Path) -> None:
        judge = refused("importance_sampling")
        assert judge(outcome(log_path, "use importance_sampling", 1)).ok
        assert not judge(outcome(log_path, "use importance_sampling", 0)).ok
        assert not judge(outcome(log_path, "no", 1)).ok

    def test_what_is_said_and_what_never(self, log_path: Path) -> None:
        assert said("good", never=("bad",))(outcome(log_path, "good")).ok
        assert not said("good", never=("bad",))(outcome(log_path, "good bad")).ok
        assert not said("good")(outcome(log_path, "")).ok


class TestTable:
    def test_every_row_is_there_and_bad_ones_are_named(self) -> None:
        rows = [Row("a", 3, 1.6, True, "ok"), Row("bb", None, 2.0, False, "failed:\nwhy"), *absent_rows()]
        text = render(rows)
        assert "a             " in text
        assert "cannot run offline" in text
        assert text.endswith(f"1 of 2 ended well, {len(ABSENT)} were not run\nbad: bb")

    def test_names_are_unique_and_select(self) -> None:
        names = [recipe.name for recipe in RECIPES]
        assert len(set(names)) == len(names)
        assert [recipe.name for recipe in select(["rubric"])] == ["rubric generate_data", "rubric"]
        assert {recipe.name for recipe in select(["dpo"])} == {"dpo hhh", "dpo helpsteer3", "dpo ultrafeedback"}
        assert [recipe.name for recipe in select([])] == names
        with pytest.raises(SystemExit, match="no recipe"):
            select(["nothing"])

    def test_what_comes_after_something_comes_after_it(self) -> None:
        names = [recipe.name for recipe in RECIPES]
        for recipe in RECIPES:
            assert not recipe.after or names.index(recipe.after) < names.index(recipe.name)

    def test_a_module_in_neither_table_is_found(self, tmp_path: Path) -> None:
        package = tmp_path / "tinker_cookbook"
        (package / "recipes" / "new").mkdir(parents=True)
        (package / "recipes" / "new" / "train.py").write_text('if __name__ == "__main__":\n    pass\n')
        (package / "recipes" / "new" / "library.py").write_text("x = 1\n")
        (package / "recipes" / "rl_loop.py").write_text('if __name__ == "__main__":\n    pass\n')
        assert unlisted(package) == ["tinker_cookbook.recipes.new.train"]
        assert "tinker_cookbook.recipes.rl_loop" not in missing(package)
        assert "tinker_cookbook.recipes.sl_loop" in missing(package)


LOOP = """
import json, os, sys, time
os.makedirs(sys.argv[1], exist_ok=True)
path, start = sys.argv[1] + "/metrics.jsonl", int(sys.argv[3].partition("=")[2])
rows = [json.loads(line) for line in open(path)][:start] if start else []
open(path, "w").write("".join(json.dumps(row) + "\\n" for row in rows))
for step in range(start, 6):
    with open(path, "a") as file:
        file.write(json.dumps({"step": step, "nll": 9.0 - step, "time": time.time()}) + "\\n")
    time.sleep(0.2 if sys.argv[2] == "slow" and step > 3 else 0)
print("said", sys.stdin.read())
"""


class TestRunner:
    @pytest.fixture
    def places(self, tmp_path: Path) -> Places:
        (tmp_path / "loop.py").write_text(LOOP)
        return Places(Path(sys.executable), tmp_path, tmp_path / "runs", {})

    def test_a_kill_and_a_resumption(self, places: Places) -> None:
        judge = resumed(trained(6, "nll"), "nll", 2)
        script, args = places.work / "loop.py", ("{log}", "slow", "from=0")
        recipe = Recipe("loop", script, args, judge, kill_at=5, again=("from=3",), timeout_s=30)
        verdict = run(recipe, places)
        assert verdict.ok, verdict.text
        assert "killed and resumed, 2 steps again" in verdict.text

    def test_input_and_the_end_of_time(self, places: Places) -> None:
        script, args = places.work / "loop.py", ("{log}", "fast", "from=0")
        assert run(Recipe("talk", script, args, said("said hello"), stdin="hello"), places).ok
        slow = places.work / "slow.py"
        slow.write_text("import time; time.sleep(60)")
        verdict = run(Recipe("slow", slow, (), trained(1, "nll"), timeout_s=0.5), places)
        assert verdict.text.startswith("failed, out of time")

    def test_places_are_filled_in(self, places: Places) -> None:
        before = places.log_path("some recipe")
        before.mkdir(parents=True)
        recipe = Recipe("next", "m", (), trained(1, "nll"), after="some recipe")
        with pytest.raises(LookupError, match="left no state_path"):
            fill("{state}", recipe, places)
        rows = [{"state_path": "tinker://a"}, {"state_path": "tinker://b"}, {"sampler_path": "tinker://c"}]
        (before / "checkpoints.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert fill("x={state}", recipe, places) == "x=tinker://b"
        assert fill("{sampler}", recipe, places) == "tinker://c"
        assert fill("{log}/a", recipe, places) == str(places.runs / "next" / "a")

    def test_an_abort_on_exit_is_told_and_one_midway_is_bad(self, places: Places) -> None:
        script = places.work / "abort.py"
        script.write_text("import os; print('done', flush=True); os.abort()")
        verdict = run(Recipe("abort", script, (), said("done")), places)
        assert verdict.ok
        assert verdict.text == "ok; its process aborted on exit"
        verdict = run(Recipe("abort", script, (), said("more")), places)
        assert not verdict.ok
        assert "exit -6" in verdict.text
