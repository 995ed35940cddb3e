"""What the fork server of forks.py imports before its first fork: the SDK, without the torch that tests are lent."""

from __future__ import annotations

import contextlib
import os
import sys

with contextlib.suppress(ValueError):
    sys.path.remove(os.environ.get("TORCH_FROM", ""))

import click
import tinker  # noqa: F401
from tinker.cli.__main__ import main_cli

for group in main_cli.list_commands(click.Context(main_cli)):
    main_cli.get_command(click.Context(main_cli), group)
