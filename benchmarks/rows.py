"""The lines of the one table that `run_all.py` makes: figures with their targets, handed on as lines of JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. target: such as "< 0.2" or ">= 1.5"; empty for a figure that stands there for comparison."""

    what: str
    value: float
    unit: str
    target: str
    repeats: int

    @property
    def verdict(self) -> str:
        """Whether the target is met, in words."""
        if not self.target:
            return ""
        sense, bound = self.target.split()
        is_met = self.value < float(bound) if sense == "<" else self.value >= float(bound)
        return "met" if is_met else "**missed**"

    def __str__(self) -> str:
        """As a line of a table."""
        return f"| {self.what} | {self.value:.3g} {self.unit} | {self.target} | {self.verdict} | {self.repeats} |"


HEAD = "| what | median | target | | repeats |\n|---|---|---|---|---|"


def add_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=Path, default=None, help="file to which the rows of the table are added")


def save(path: Path | None, rows: Iterable[Row]) -> None:
    if path is not None:
        with path.open("a") as out:
            out.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def load(path: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
