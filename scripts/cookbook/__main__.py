"""Runs the recipes of tinker-cookbook, offline, against a fresh server, and prints a table of verdicts.

`python -m scripts.cookbook [NAME ...]`; without names, all of them. `--list` prints the names. Exit status 1 if any
verdict is bad. The logs of each recipe stay in `.cookbook/` beside the checkout's own files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.cookbook import environment, fixture
from scripts.cookbook.recipe import NAMES, RECIPES_PACKAGE, SCRIPTS_PACKAGE, WIDE_NAMES, Recipe
from scripts.cookbook.recipes import ABSENT, RECIPES, missing, unlisted
from scripts.cookbook.runner import Places, run
from scripts.cookbook.table import Row, render
from tests.service import Service, running

DIRECTORY = environment.ROOT / ".cookbook"
SHIPPED = environment.ROOT / "src" / "tinsmith" / "assets" / "tiny"
KV_CACHE_MIB = 256
READY_WITHIN_S = 300.0  # a worker for each name, each with a torch to import


def select(names: Sequence[str]) -> list[Recipe]:
    """The recipes of these names, each after the one whose checkpoints it reads. A name may be the first words of many.

    Raises:
        SystemExit: no recipe has that name.
    """
    chosen: dict[str, Recipe] = {}

    def add(recipe: Recipe) -> None:
        for needed in RECIPES:
            if needed.name == recipe.after:
                add(needed)
        chosen.setdefault(recipe.name, recipe)

    for name in names or [recipe.name for recipe in RECIPES]:
        found = [recipe for recipe in RECIPES if recipe.name == name]
        found = found or [recipe for recipe in RECIPES if recipe.name.startswith(f"{name} ")]
        if not found:
            sys.exit(f"no recipe is called {name!r}; --list names them all")
        for recipe in found:
            add(recipe)
    return list(chosen.values())


def absent_rows() -> list[Row]:
    return [
        Row(name.removeprefix(f"{RECIPES_PACKAGE}.").replace(f"{SCRIPTS_PACKAGE}.", "scripts."), None, None, True, why)
        for name, why in ((name, f"cannot run offline: {why}") for name, why in ABSENT.items())
    ]


def client_environment(service: Service, runs: Path) -> dict[str, str]:
    """Of a recipe: the server's address and key, no hub, nothing of the caller's settings for either."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("TINKER_", "PYTHON", "HF_"))}
    return ours | {
        "TINKER_BASE_URL": service.url,
        "TINKER_API_KEY": service.key,
        "TINKER_TELEMETRY": "0",
        "TINKER_COOKBOOK_RUNS_DIR": str(runs),
        "HF_HOME": str(DIRECTORY / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
    }


def main(names: Sequence[str]) -> int:
    if names == ["--list"]:
        print("\n".join(recipe.name for recipe in RECIPES))
        return 0
    chosen = select(names)
    python = environment.python()
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    work, runs = DIRECTORY / "work", DIRECTORY / "runs"
    served = fixture.build(work, SHIPPED, NAMES, WIDE_NAMES)
    subprocess.run([python, environment.ROOT / "scripts/cookbook/client/arrow.py", work / "arrow"], check=True)
    shutil.copytree(SHIPPED, runs / "weights" / "base")
    fixture.copy_examples(environment.package() / "example_data", work / "tinker_cookbook" / "example_data")
    flags = [part for name, path in served.items() for part in ("--base-model", f"{name}={path}")]
    rows: list[Row] = []
    print(f"starting a server with {len(served)} names for {SHIPPED.name}; logs are in {DIRECTORY}", flush=True)
    flags += ["--kv-cache-mib", str(KV_CACHE_MIB)]
    with running(DIRECTORY / "data", *flags, ready_within_s=READY_WITHIN_S) as service:
        places = Places(python, work, runs, client_environment(service, runs))
        for index, recipe in enumerate(chosen, start=1):
            print(f"[{index}/{len(chosen)}] {recipe.name} ...", end=" ", flush=True)
            started = time.monotonic()
            verdict = run(recipe, places)
            seconds = time.monotonic() - started
            print(f"{seconds:.0f} s: {verdict.text}", flush=True)
            rows.append(Row(recipe.name, verdict.steps, seconds, verdict.ok, verdict.text))
    rows += [Row(name, None, None, False, "failed: not in the tables") for name in unlisted(environment.package())]
    rows += [Row(name, None, None, False, "failed: not in the package") for name in missing(environment.package())]
    print(render(rows if names else [*rows, *absent_rows()]))
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
