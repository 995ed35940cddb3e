"""Writes the table of metrics in docs/how-to/observe.md: `python scripts/make_metrics_table.py`."""

from __future__ import annotations

from pathlib import Path

from tinsmith.observe import series

PAGE = Path(__file__).resolve().parents[1] / "docs" / "how-to" / "observe.md"
BEGIN, END = "<!-- metrics: made by scripts/make_metrics_table.py -->\n", "<!-- end of metrics -->\n"


def table() -> str:
    lines = ["| name | kind | labels | what it says |", "|---|---|---|---|"]
    for one in series.TABLE:
        labels = ", ".join(f"`{label}`" for label in one.labels)
        lines.append(f"| `{one.name}` | {one.kind} | {labels} | {one.help} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with the table of today."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2]


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
