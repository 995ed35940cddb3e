"""The table of verdicts as text: a row a recipe, the lines of a long verdict below each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HEAD = ("recipe", "steps", "seconds", "verdict")


@dataclass(frozen=True, slots=True)
class Row:
    """steps None: it doesn't train. seconds None: it was not run."""

    name: str
    steps: int | None
    seconds: float | None
    ok: bool
    text: str


def render(rows: Sequence[Row]) -> str:
    """All rows, then the count of good ones, of those that can't run here, and the names of bad ones."""
    cells = [
        (
            row.name,
            "-" if row.steps is None else str(row.steps),
            "-" if row.seconds is None else f"{row.seconds:.0f}",
            row.text.splitlines() or [""],
        )
        for row in rows
    ]
    width = max([len(HEAD[0]), *(len(name) for name, *_ in cells)])
    lines = [f"{HEAD[0]:{width}}  {HEAD[1]:>5}  {HEAD[2]:>7}  {HEAD[3]}"]
    for name, steps, seconds, texts in cells:
        lines.append(f"{name:{width}}  {steps:>5}  {seconds:>7}  {texts[0]}")
        lines += [f"{'':{width}}  {'':>5}  {'':>7}    {text}" for text in texts[1:]]
    bad = [row.name for row in rows if not row.ok]
    run = [row for row in rows if row.seconds is not None]
    lines.append(f"{sum(row.ok for row in run)} of {len(run)} ended well, {len(rows) - len(run)} were not run")
    return "\n".join([*lines, *([f"bad: {', '.join(bad)}"] if bad else [])])
