"""`tinker` as the tests call it: with a server's address and key, counted, several at the same time."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import forks
from calls import Ledger


class Commands:
    """Runs `tinker` with a server's address and key, nothing else of the environment, in a directory of its own."""

    def __init__(self, server: str, directory: Path, ledger: Ledger, pool: ThreadPoolExecutor) -> None:
        self.directory, self._ledger, self._pool = directory, ledger, pool
        self.key = os.environ[f"{server}_API_KEY"]
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "TINKER_BASE_URL": os.environ[f"{server}_BASE_URL"],
            "TINKER_API_KEY": self.key,
            "TINKER_TELEMETRY": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "COLUMNS": "250",
        }

    def __call__(self, *args: str, status: int = 0, stdin: str = "", **env: str | None) -> str:
        """What it writes; with its complaints, if a status other than 0 is expected."""
        chosen = {name: value for name, value in {**self.env, **env}.items() if value is not None}
        call = self._ledger.begin_command(args)
        ended, said, complained = forks.run(args, chosen, self.directory, stdin)
        assert ended == status, f"{args}: {said}{complained}"
        call.answered = status == 0
        return said + (complained if status else "")

    def json(self, *args: str) -> Any:
        return json.loads(self("--format", "json", *args))

    def at_once(self, *calls: tuple[str, ...]) -> list[str]:
        return list(self._pool.map(lambda args: self(*args), calls))
