"""Runs one recipe as a process, or as two with a kill between them, and has its outcome judged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from scripts.cookbook.outcome import BEFORE_KILL, Outcome, Verdict
from scripts.cookbook.recipe import Recipe

LOOK_EVERY_S = 0.02


@dataclass(frozen=True, slots=True)
class Places:
    """python: of the recipes' environment. work: the offline directory, where they run. runs: all log directories."""

    python: Path
    work: Path
    runs: Path
    env: Mapping[str, str]

    def log_path(self, name: str) -> Path:
        return self.runs / name.replace(" ", "_")


def run(recipe: Recipe, places: Places) -> Verdict:
    log_path = places.log_path(recipe.name)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    try:
        args = [fill(arg, recipe, places) for arg in recipe.args]
    except LookupError as error:
        return Verdict(False, f"failed: {error.args[0]}")
    output = log_path.with_suffix(".out")
    if recipe.kill_at:
        kept = run_until(recipe, places, args, output, log_path / "metrics.jsonl")
        args = [*(arg for arg in args if arg.partition("=")[0] not in keys(recipe.again)), *recipe.again]
        shutil.copyfile(kept, log_path / BEFORE_KILL)
    returncode = start(recipe, places, args, output, recipe.timeout_s)
    outcome = Outcome(log_path, output.read_text(errors="replace"), returncode)
    if returncode == -signal.SIGABRT:
        return judged_after_abort(recipe, outcome)
    return recipe.judge(outcome)


def judged_after_abort(recipe: Recipe, outcome: Outcome) -> Verdict:
    """Processes with the SDK abort now and then while they exit, after their work; the verdict then says so.

    The work itself is judged as ever: what was aborted midway lacks its steps or its last words.
    """
    verdict = recipe.judge(replace(outcome, returncode=0))
    return (
        replace(verdict, text=f"{verdict.text}; its process aborted on exit") if verdict.ok else recipe.judge(outcome)
    )


def keys(args: tuple[str, ...]) -> set[str]:
    return {arg.partition("=")[0] for arg in args}


def fill(arg: str, recipe: Recipe, places: Places) -> str:
    """An argument with its places filled in.

    Raises:
        LookupError: the recipe before left no such checkpoint.
    """
    values = {"{log}": places.log_path(recipe.name), "{runs}": places.runs, "{work}": places.work}
    for sign, value in values.items():
        arg = arg.replace(sign, str(value))
    before = places.log_path(recipe.after)
    for sign, key in (("{state}", "state_path"), ("{sampler}", "sampler_path")):
        if sign in arg:
            arg = arg.replace(sign, last_checkpoint(before, key))
    if "{adapter}" in arg:
        found = sorted(before.glob("training/**/adapter_model.safetensors"))
        if not found:
            raise LookupError(f"{recipe.after} downloaded no adapter")
        arg = arg.replace("{adapter}", str(found[0].parent))
    return arg


def last_checkpoint(log_path: Path, key: str) -> str:
    """The last checkpoint of a kind that a recipe has written down.

    Raises:
        LookupError: there is none.
    """
    file = log_path / "checkpoints.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    paths = [row[key] for row in rows if row.get(key)]
    if not paths:
        raise LookupError(f"{log_path.name} left no {key}")
    return str(paths[-1])


def spawn(recipe: Recipe, places: Places, args: list[str], output: Path) -> subprocess.Popen[bytes]:
    what = [str(recipe.module)] if isinstance(recipe.module, Path) else ["-m", recipe.module]
    with output.open("wb") as out:
        process = subprocess.Popen(
            [str(places.python), *what, *args],
            cwd=places.work,
            env=dict(places.env),
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    assert process.stdin is not None
    process.stdin.write(recipe.stdin.encode())
    process.stdin.close()
    return process


def start(recipe: Recipe, places: Places, args: list[str], output: Path, timeout_s: float) -> int | None:
    """Its exit status; None if it had to be stopped."""
    process = spawn(recipe, places, args, output)
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill it with all that it started, if it is still there."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_until(recipe: Recipe, places: Places, args: list[str], output: Path, metrics: Path) -> Path:
    """Run until so many rows are in `metrics`, then kill it. A recipe that ends before is left to its judge.

    Returns the metrics file, for what the second process does to it.
    """
    process = spawn(recipe, places, args, output)
    deadline = time.monotonic() + recipe.timeout_s
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.is_file() and metrics.read_bytes().count(b"\n") >= recipe.kill_at:
                break
            time.sleep(LOOK_EVERY_S)
    finally:
        stop(process)
    metrics.parent.mkdir(parents=True, exist_ok=True)
    metrics.touch()
    return metrics
