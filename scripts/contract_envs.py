"""Runs the SDK contract suite with every supported SDK release, each in an environment of its own.

`python -m scripts.contract_envs [VERSION ...]` makes `.venv-sdk-VERSION` beside the checkout's own environment (the SDK
and pytest, no torch, no tinsmith), starts one server, runs `tests/contract/sdk` once a version against it, and prints
which endpoints each version called, and how often. An environment is kept and used again until constraints.txt changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.service import Service, running

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "tests" / "contract" / "sdk"
CONSTRAINTS = ROOT / "constraints.txt"
VERSIONS = ("0.25.0", "0.38.0")
DOWNLOAD_MB, DISK_MB = 60, 350
SUITE_TIMEOUT_S = 300.0
VERBOSE = ("--log-level", "debug", "--log-format", "json")

IDS = (
    (re.compile(r"s[0-9a-f]{24}:train:\d+"), "{run}"),
    (re.compile(r"s[0-9a-f]{24}:sample:\d+"), "{sampler}"),
    (re.compile(r"s[0-9a-f]{24}"), "{session}"),
    (re.compile(r"(checkpoints/\w+)/[^/]+"), r"\1/{name}"),
)


@dataclass(frozen=True, slots=True)
class Report:
    """One run of the suite. calls: how often each endpoint was asked, as "METHOD /path"."""

    version: str
    returncode: int
    output: str
    seconds: float
    calls: Counter[str]


def environment(version: str) -> Path:
    """The interpreter of `.venv-sdk-VERSION`; makes the environment if it isn't there or is out of date.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    directory = ROOT / f".venv-sdk-{version}"
    python = directory / "bin" / "python"
    stamp = directory / ".installed"
    pins = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith(("tinker==", "torch=="))]
    state = hashlib.sha256("\n".join([version, *pins]).encode()).hexdigest()
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == state:
            return python
        print(
            f"making {directory.name}: tinker {version}, pytest and what they need, no torch; "
            f"about {DOWNLOAD_MB} MB to download, unless pip has it cached, and {DISK_MB} MB on disk",
            flush=True,
        )
        venv.create(directory, with_pip=True, clear=True)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write("\n".join(pins))
            constraints.flush()
            pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "on"]
            subprocess.run([*pip, "-c", constraints.name, f"tinker=={version}", "pytest"], check=True)
        stamp.write_text(state)
    return python


def run_suite(version: str, python: Path, service: Service) -> Report:
    """The suite with one SDK, against a server started with VERBOSE flags, whose log tells what was called."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TINKER_", "PYTEST_", "PYTHON"))}
    env |= {
        "TINKER_BASE_URL": service.url,
        "TINKER_API_KEY": service.key,
        "TINKER_TELEMETRY": "0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        env["TORCH_FROM"] = str(Path(torch.origin).parents[1])
    offset = service.log.stat().st_size
    started = time.monotonic()
    done = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-c", str(SUITE / "pytest.ini"), str(SUITE)],
        cwd=SUITE,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=SUITE_TIMEOUT_S,
        check=False,
    )
    seconds = time.monotonic() - started
    return Report(version, done.returncode, done.stdout, seconds, calls_since(service.log, offset))


def calls_since(log: Path, offset: int) -> Counter[str]:
    """The requests in a server's log from a byte offset on, with ids replaced by their kind."""
    calls: Counter[str] = Counter()
    with log.open("rb") as lines:
        lines.seek(offset)
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.get("event") == "request":
                path = str(entry["path"]).removeprefix("/api/v1")
                for pattern, name in IDS:
                    path = pattern.sub(name, path)
                calls[f"{entry['method']} {path}"] += 1
    del calls["GET /healthz"]
    return calls


def table(reports: Sequence[Report]) -> str:
    """Endpoints down, versions across."""
    endpoints = sorted({call for report in reports for call in report.calls}, key=lambda call: call.split()[::-1])
    width = max(map(len, endpoints), default=0)
    head = " " * width + "".join(f"{report.version:>10}" for report in reports)
    rows = [f"{call:{width}}" + "".join(f"{report.calls[call] or '-':>10}" for report in reports) for call in endpoints]
    return "\n".join([head, *rows])


def main(versions: Sequence[str]) -> int:
    pythons = {version: environment(version) for version in versions or VERSIONS}
    reports = []
    with tempfile.TemporaryDirectory() as directory, running(Path(directory) / "data", *VERBOSE) as service:
        for version, python in pythons.items():
            print(f"tinker {version}", flush=True)
            report = run_suite(version, python, service)
            print(report.output, flush=True)
            reports.append(report)
    print(table(reports))
    return max(report.returncode for report in reports)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
