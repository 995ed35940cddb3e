"""The second half of the demonstration: GRPO on single-digit addition, judged by fresh samples of the last snapshot."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.live import Live

from tinsmith.demo import show

YLABEL = "mean reward"
TITLE = "mean reward of each step's answers, single-digit addition"


def reinforcement(console: Console, out_dir: Path, example: ModuleType) -> int:
    """Run `examples/grpo.py`; the curve goes to `out_dir`. 0 if the target was reached, else 1."""
    console.print("\n[bold]reinforcement learning[/bold]: GRPO on single-digit addition, a fresh snapshot each step")
    report, seconds = _train(console, example)
    path = out_dir / "reward.png"
    show.save_png({YLABEL: report.rewards}, path, TITLE, YLABEL)
    console.print(show.answers_table(report.answers, example.EARLY_STEP, example.STEPS))
    console.print(
        f"mean reward on fresh samples of all {len(example.SUMS)} sums: {report.before:.3f} before, "
        f"{report.after:.3f} after {len(report.rewards)} steps, in {seconds:.1f} s"
    )
    console.print(f"curve: {path}")
    if report.after >= example.TARGET:
        return 0
    console.print(f"[red]failed[/red] the mean reward after the last step is below {example.TARGET:g}")
    return 1


def _train(console: Console, example: ModuleType) -> tuple[Any, float]:
    rewards: list[float] = []
    bar = show.progress_bar(console, example.STEPS)
    started = time.monotonic()

    def view() -> Any:
        return show.live_view({YLABEL: rewards}, bar, console, TITLE)

    with Live(view(), console=console, refresh_per_second=4, transient=False) as live:

        def on_step(step: int, reward: float) -> None:
            rewards.append(reward)
            bar.update(bar.task_ids[0], completed=step)
            live.update(view())

        report = example.run(on_step=on_step)
    return report, time.monotonic() - started
