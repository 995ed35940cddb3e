"""What the demonstration draws: a live plot in the terminal, tables, and the same curves as a PNG."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
import plotext
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

COLOURS = ("blue", "orange", "green", "red", "magenta", "cyan")


def curve_plot(curves: Mapping[str, Sequence[float]], width: int, height: int, title: str) -> Text:
    """Curves by name, drawn with block characters over the steps."""
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(width, height)
    plotext.title(title)
    for (name, values), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
        if len(values) > 1:
            plotext.plot(list(range(1, len(values) + 1)), list(values), label=name, color=colour)
    return Text.from_ansi(plotext.build())


def save_png(curves: Mapping[str, Sequence[float]], path: Path, title: str, ylabel: str) -> None:
    drawing, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, label=name, linewidth=1.6)
    axes.set(title=title, xlabel="step", ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, ncols=2)
    drawing.tight_layout()
    drawing.savefig(path)
    plt.close(drawing)


def progress_bar(console: Console, total: int) -> Progress:
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip
    bar.add_task("training", total=total)
    return bar


def live_view(curves: Mapping[str, Sequence[float]], bar: Progress, console: Console, title: str) -> Group:
    return Group(curve_plot(curves, min(console.width, 100), 18, title), bar, Text())


def result_table(reports: Sequence[Any]) -> Table:
    table = Table(title="Held-out negative log-likelihood a token, and an answer", title_justify="left")
    for name, kind in (("task", "left"), ("rank", "right"), ("before", "right"), ("after", "right")):
        table.add_column(name, justify=kind)  # type: ignore[arg-type]
    table.add_column("answered before", overflow="fold")
    table.add_column("answers now", overflow="fold")
    for r in reports:
        table.add_row(
            r.task.name, str(r.task.rank), f"{r.nll_before:.3f}", f"{r.nll_after:.3f}",
            Text(r.sample_before), Text(r.sample_after),
        )  # fmt: skip
    return table


def answers_table(answers: Sequence[tuple[str, str, str]], early: int, last: int) -> Table:
    """Samples of two frozen snapshots, side by side."""
    table = Table(title="The same questions to two frozen snapshots", title_justify="left")
    for name in ("question", f"answers after step {early}", f"answers after step {last}"):
        table.add_column(name)
    for row in answers:
        table.add_row(*map(Text, row))
    return table


def sharing_line(reports: Sequence[Any], seconds: float) -> tuple[float, str]:
    """The median number of runs in a pass, and the line that says so."""
    shared = [count for report in reports for count in report.pass_runs]
    median = statistics.median(shared)
    tokens = sum(report.num_tokens for report in reports)
    line = (
        f"{median:g} of {len(reports)} runs shared a pass (median of {len(shared)} steps); "
        f"{tokens} training tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s"
    )
    return median, line
