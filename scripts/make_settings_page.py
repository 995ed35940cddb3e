"""Writes docs/reference/settings.md from the settings table: `python scripts/make_settings_page.py`."""

from __future__ import annotations

from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import get_type_hints

from tinsmith.cli.flags import flag_of, show_default
from tinsmith.config import Settings, env_name

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "settings.md"
HEAD = """# Settings

<!-- Made by `make docs` from the table in src/tinsmith/config.py and settings/door.py; edit that. -->

Every setting is a flag of `tinsmith serve` and an environment variable. A flag wins over the environment, which wins
over the default. Settings are read once, at start. On the command line a yes-or-no setting is `--NAME` or `--no-NAME`;
in the environment it is `true` or `false`, and a list is separated by commas.
"""


def page() -> str:
    """The whole page, as Markdown."""
    types = get_type_hints(Settings)
    parts = [HEAD]
    for group, members in groupby(fields(Settings), key=lambda f: f.metadata["group"]):
        rows = ["| flag | environment | default | unit | |", "|---|---|---|---|---|"]
        for f in members:
            flag = f"`{flag_of(f)}`" if types[f.name] is not bool else f"`{flag_of(f)}`, `--no-{flag_of(f)[2:]}`"
            cells = (flag, f"`{env_name(f)}`", f"`{show_default(f)}`", f.metadata["unit"], f.metadata["help"])
            rows.append("| " + " | ".join(cells) + " |")
        parts.append(f"## {group.capitalize()}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
