"""Runs the examples against a server and judges them: the exit code says whether anything failed to learn."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
import time
from importlib import resources
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.live import Live

from tinsmith.config import point_sdk_at
from tinsmith.demo import show
from tinsmith.demo.reinforcement import reinforcement
from tinsmith.demo.server import server
from tinsmith.errors import ConfigError

TITLE = "loss a token, six runs on one base"
MIN_SHARED_RUNS = 2  # of six: a busy machine makes clients slow to come back, and then passes are cut in parts
RESUME_TOLERANCE = 1e-4


def main(out_dir: Path) -> int:
    """Run the demonstration; curves go to `out_dir`. 0 if everything learned, else 1."""
    console = Console()
    out_dir.mkdir(parents=True, exist_ok=True)
    console.print("[bold]tinsmith demo[/bold]: six fine-tunes at once, then reinforcement learning, through the SDK")
    with contextlib.ExitStack() as held:
        with console.status("starting the server"):
            url, key = held.enter_context(server())
        console.print(f"server: {url}")
        point_sdk_at(url, key)
        supervised_failed = supervised(console, out_dir, load_example("many_runs"))
        return reinforcement(console, out_dir, load_example("grpo")) or supervised_failed


def supervised(console: Console, out_dir: Path, example: ModuleType) -> int:
    """Run `examples/many_runs.py`: six runs, their table, one of them resumed in a new session.

    0 if every loss fell, the runs shared their passes, and the resumed run is the one that was saved; else 1.
    """
    reports, seconds = _train(console, example)
    curves = {r.task.name: r.losses for r in reports}
    show.save_png(curves, out_dir / "losses.png", "six runs on one base", "loss a token")
    console.print()
    console.print(show.result_table(reports))
    median, line = show.sharing_line(reports, seconds)
    console.print(line)

    first = reports[0]
    resumed = example.resume(first.checkpoint, first)
    console.print(f"resumed {first.checkpoint} in a new session: held-out {first.nll_after:.4f} -> {resumed:.4f}")
    console.print(f"curves: {out_dir / 'losses.png'}")

    troubles = [f"{r.task.name}: the held-out loss did not fall" for r in reports if not r.nll_after < r.nll_before]
    if median < MIN_SHARED_RUNS:
        troubles.append(f"only {median:g} runs shared a pass (median); at least {MIN_SHARED_RUNS} were expected")
    if not abs(resumed - first.nll_after) <= RESUME_TOLERANCE:
        troubles.append("the resumed run does not have the loss that it was saved with")
    for trouble in troubles:
        console.print(f"[red]failed[/red] {trouble}")
    return 1 if troubles else 0


def _train(console: Console, example: ModuleType) -> tuple[list, float]:  # type: ignore[type-arg]
    curves: dict[str, list[float]] = {task.name: [] for task in example.TASKS}
    bar = show.progress_bar(console, example.STEPS * len(example.TASKS))
    lock = threading.Lock()
    started = time.monotonic()
    with Live(
        show.live_view(curves, bar, console, TITLE), console=console, refresh_per_second=4, transient=False
    ) as live:

        def on_step(report) -> None:  # type: ignore[no-untyped-def]
            with lock:
                curves[report.task.name] = report.losses
                bar.advance(bar.task_ids[0])
                live.update(show.live_view(curves, bar, console, TITLE))

        reports = example.run_all(on_step)
    return reports, time.monotonic() - started


def load_example(name: str) -> ModuleType:
    """A script of the examples folder, from the package or from the checkout beside it.

    Raises:
        ConfigError: neither has it.
    """
    packaged = Path(str(resources.files("tinsmith"))) / "_examples" / f"{name}.py"
    checkout = Path(str(resources.files("tinsmith"))).parents[1] / "examples" / f"{name}.py"
    for path in (packaged, checkout):
        if path.is_file():
            spec = importlib.util.spec_from_file_location(f"tinsmith_example_{name}", path)
            if spec is None or spec.loader is None:
                break
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            return module
    raise ConfigError(f"the example {name}.py is missing from this installation: install tinsmith again")
