"""What a recipe is here, and the names and arguments that many share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scripts.cookbook.outcome import Judge

MODEL = "Qwen/Qwen3-8B"
PLAIN = "Qwen/Qwen3.5-9B-Base"
STUDENT, TEACHER, GRADER = "Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-9B", "Qwen/Qwen3.6-35B-A3B"
NAMES = (MODEL, PLAIN)
WIDE_NAMES = (STUDENT, TEACHER, GRADER)  # some recipes ask these for more than the shipped model's 2048 positions

RECIPES_PACKAGE, SCRIPTS_PACKAGE = "tinker_cookbook.recipes", "tinker_cookbook.scripts"
OWN = Path(__file__).parent / "client"
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """module: below tinker_cookbook, or a script of ours that uses the cookbook. In `args`, {log} is the recipe's log
    directory, {runs} the one of all, {work} the offline directory; {state} and {sampler} are the last checkpoints of
    the recipe called `after`, and {adapter} what it downloaded, so that it runs first.
    kill_at: kill the process once so many steps are logged, then run it again with `again` added, which wins.
    """

    name: str
    module: str | Path
    args: tuple[str, ...]
    judge: Judge
    stdin: str = ""
    timeout_s: float = TIMEOUT_S
    after: str = ""
    kill_at: int = 0
    again: tuple[str, ...] = ()


def recipe(path: str) -> str:
    return f"{RECIPES_PACKAGE}.{path}"


MODEL_IS = f"model_name={MODEL}"
NO_THOUGHT = "renderer_name=qwen3_disable_thinking"
LOG = ("log_path={log}", "behavior_if_log_dir_exists=delete")
IS = "loss_fn=importance_sampling"
REWARD, NLL = "env/all/reward/total", "train_mean_nll"
