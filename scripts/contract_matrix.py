"""Runs the SDK contract suite with every supported SDK release, side by side, and says what each of them called.

`python -m scripts.contract_matrix [VERSION ...]` starts two servers (one that computes with the shipped model, one that
exchanges keys for tokens and computes without), runs `tests/contract/sdk` with each release in its own environment, as
a tenant of its own, and prints two tables by version: the calls that were made, and the endpoints that they reached.
It fails if a test does, or if a release has a public method, a parameter, a command or an option that no test uses.
With all releases, the tables are written to docs/reference/sdk-versions.md as well.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.contract_envs import ROOT, VERSIONS, environment
from tests.service import Service, running

SUITE = ROOT / "tests" / "contract" / "sdk"
PAGE = ROOT / "docs" / "reference" / "sdk-versions.md"
BEGIN_TABLES = "<!-- from here on written by `make contract` -->\n"
SUITE_TIMEOUT_S = 900.0
VERBOSE = ("--log-level", "debug", "--log-format", "json")
TOKENS = ("--jwt-auth", "--device", "fake")
ABSENT = "-"

SESSION = re.compile(r"s[0-9a-f]{24}")
IDS = (
    (re.compile(r"s[0-9a-f]{24}:train:\d+"), "{run}"),
    (re.compile(r"s[0-9a-f]{24}:sample:\d+"), "{sampler}"),
    (SESSION, "{session}"),
    (re.compile(r"(checkpoints/\w+)/[^/]+"), r"\1/{name}"),
    (re.compile(r"(downloads/\{run\}/\w+)/[^/]+/[^/]+"), r"\1/{name}/{file}"),
    (re.compile(r"/hf/(api/models/)?[\w-]+/[\w.-]+(?:/(\w+)/.*)?"), r"/hf/\1{base}/\2"),
)


@dataclass(frozen=True, slots=True)
class Servers:
    """plain: computes with the shipped model. tokens: has clients exchange their keys for tokens."""

    plain: Service
    tokens: Service


@dataclass(frozen=True, slots=True)
class Report:
    """One run of the suite. calls, skipped, unable: see `Ledger` in calls.py."""

    version: str
    returncode: int
    output: str
    seconds: float
    calls: Mapping[str, Mapping[str, Any]]
    skipped: Mapping[str, str]
    unable: Mapping[str, str]

    @property
    def problems(self) -> list[str]:
        """What went wrong, in words; empty: every test passed, and left nothing out."""
        found = [
            f"tinker {self.version}: no test calls {name}" for row in self.calls.values() for name in row["missing"]
        ]
        if self.returncode or not self.calls:
            found.insert(0, f"tinker {self.version}: the suite ended with status {self.returncode}")
        return found

    def cell(self, name: str) -> str:
        """How often something was called, and how that went."""
        row = self.calls.get(name)
        if row is None:
            return ABSENT
        verdict = "FAILED" if row["failed"] else "UNUSED" if row["missing"] else "passed"
        return f"{row['calls']} {verdict}"


@contextmanager
def servers(directory: Path) -> Iterator[Servers]:
    """Both, started at the same time, with logs that tell what was called by whom."""
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        contexts = [running(directory / "plain", *VERBOSE), running(directory / "tokens", *VERBOSE, *TOKENS)]
        yield Servers(*pool.map(stack.enter_context, contexts))


def run_all(versions: Sequence[str], servers: Servers) -> list[Report]:
    """The suite with each of the releases, at the same time."""
    with ThreadPoolExecutor(len(versions)) as pool:
        pythons = list(pool.map(environment, versions))
        return list(pool.map(lambda version, python: run_suite(version, python, servers), versions, pythons))


def run_suite(version: str, python: Path, servers: Servers) -> Report:
    ours = ("TINKER_", "PYTEST_", "PYTHON", "HF_", "TRANSFORMERS_", "TOKENS_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    env |= {
        "TINKER_BASE_URL": servers.plain.url,
        "TINKER_API_KEY": tenant_key(servers.plain, tenant_of(version)),
        "STRANGERS_API_KEY": tenant_key(servers.plain, f"strangers-of-{version}"),
        "TOKENS_BASE_URL": servers.tokens.url,
        "TOKENS_API_KEY": tenant_key(servers.tokens, tenant_of(version)),
        "TINKER_TELEMETRY": "0",
        "HF_ENDPOINT": f"{servers.plain.url}/hf",
        "PYTHONPATH": str(SUITE),
    }
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        env["TORCH_FROM"] = str(Path(torch.origin).parents[1])
    with tempfile.TemporaryDirectory() as scratch:
        counted = Path(scratch) / "calls.json"
        env |= {"CALLS_TO": str(counted), "HF_HOME": scratch}
        started = time.monotonic()
        done = subprocess.run(
            [
                str(python),
                "-m",
                "pytest",
                "-q",
                "-c",
                str(SUITE / "pytest.ini"),
                "--basetemp",
                f"{scratch}/t",
                str(SUITE),
            ],
            cwd=SUITE,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SUITE_TIMEOUT_S,
            check=False,
        )
        seconds = time.monotonic() - started
        report = json.loads(counted.read_text()) if counted.exists() else {"calls": {}, "skipped": {}, "unable": {}}
    return Report(version, done.returncode, done.stdout, seconds, report["calls"], report["skipped"], report["unable"])


def tenant_key(service: Service, tenant: str) -> str:
    """A key of a tenant, which comes to be with it."""
    request = urllib.request.Request(
        f"{service.url}/api/v1/admin/keys",
        data=json.dumps({"name": "suite", "tenant": tenant}).encode(),
        headers={"X-API-Key": service.key, "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return str(json.load(answer)["secret"])


def tenant_of(version: str) -> str:
    """The tenant that stands for a release."""
    return f"sdk-{version}"


def requests_by_tenant(logs: Iterable[Path]) -> dict[str, Counter[str]]:
    """How often each endpoint was asked, as "METHOD /path" with ids replaced by their kind.

    Signed links are followed without a key: those requests are the tenant's whose session stands in their path.
    """
    entries = [entry for log in logs for entry in _requests(log)]
    owners = {
        session: entry["tenant"] for entry in entries if "tenant" in entry for session in SESSION.findall(entry["path"])
    }
    calls: dict[str, Counter[str]] = {}
    for entry in entries:
        sessions = SESSION.findall(entry["path"])
        tenant = entry.get("tenant") or (owners.get(sessions[0]) if sessions else None)
        if tenant is not None:
            calls.setdefault(tenant, Counter())[endpoint(entry["method"], entry["path"])] += 1
    return calls


def _requests(log: Path) -> Iterator[dict[str, Any]]:
    with log.open("rb") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.get("event") == "request":
                yield entry


def endpoint(method: str, path: str) -> str:
    path = path.removeprefix("/api/v1")
    for pattern, name in IDS:
        path = pattern.sub(name, path)
    return f"{method} {path}"


def call_table(reports: Sequence[Report]) -> list[list[str]]:
    """Calls down, releases across. The class methods first, then the commands."""
    names = {name for report in reports for name in report.calls}
    ordered = sorted(names, key=lambda name: (name.startswith("tinker "), name))
    return [
        ["call", *(report.version for report in reports)],
        *([name, *(report.cell(name) for report in reports)] for name in ordered),
    ]


def endpoint_table(versions: Sequence[str], requests: Mapping[str, Counter[str]]) -> list[list[str]]:
    """Endpoints down, releases across."""
    counts = [requests.get(tenant_of(version), Counter[str]()) for version in versions]
    endpoints = sorted({each for count in counts for each in count}, key=lambda each: each.split()[::-1])
    return [
        ["endpoint", *versions],
        *([each, *(str(count[each] or ABSENT) for count in counts)] for each in endpoints),
    ]


def unable_table(reports: Sequence[Report]) -> list[list[str]]:
    """Calls that a release has and can't make, whatever the server does."""
    return [["call", "releases", "because"], *_by_reason((report.version, report.unable) for report in reports)]


def skip_table(reports: Sequence[Report]) -> list[list[str]]:
    """Tests that a release can't run."""
    left_out = (
        (report.version, {test.partition("::")[2]: why for test, why in report.skipped.items()}) for report in reports
    )
    return [["test", "left out with", "because"], *_by_reason(left_out)]


def _by_reason(reasons: Iterable[tuple[str, Mapping[str, str]]]) -> list[list[str]]:
    versions: dict[tuple[str, str], list[str]] = {}
    for version, found in reasons:
        for name, why in found.items():
            versions.setdefault((name, why.removeprefix("Skipped: ")), []).append(version)
    return [[name, ", ".join(among), why] for (name, why), among in sorted(versions.items())]


def plain_text(table: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)


def markdown(table: Sequence[Sequence[str]]) -> str:
    head, *rows = table
    lines = [head, ["---"] * len(head), *([f"`{row[0]}`", *row[1:]] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(prose: str, reports: Sequence[Report], requests: Mapping[str, Counter[str]]) -> str:
    """The reference page: what stands before the mark, then the tables."""
    versions = [report.version for report in reports]
    reached = [[each, *("yes" if count != ABSENT else ABSENT for count in row)] for each, *row in
               endpoint_table(versions, requests)[1:]]  # fmt: skip
    return (
        prose.partition(BEGIN_TABLES)[0] + BEGIN_TABLES
        + f"\n## Calls\n\n{markdown(call_table(reports))}"
        + f"\n## Calls that a release has and can't make\n\n{markdown(unable_table(reports))}"
        + f"\n## Tests that a release can't run\n\n{markdown(skip_table(reports))}"
        + f"\n## Endpoints\n\n{markdown([['endpoint', *versions], *reached])}"
    )  # fmt: skip


def main(versions: Sequence[str]) -> int:
    chosen = versions or VERSIONS
    with tempfile.TemporaryDirectory() as directory, servers(Path(directory)) as both:
        reports = run_all(chosen, both)
        requests = requests_by_tenant([both.plain.log, both.tokens.log])
    for report in reports:
        print(f"\ntinker {report.version}, {report.seconds:.0f} s\n{report.output}")
    tables = call_table(reports), unable_table(reports), skip_table(reports), endpoint_table(chosen, requests)
    for table in tables:
        print(f"\n{plain_text(table)}")
    problems = [problem for report in reports for problem in report.problems]
    print("\n" + "\n".join(problems or ["every call of every release was made and answered"]))
    if tuple(chosen) == VERSIONS and not problems:
        PAGE.write_text(page(PAGE.read_text(), reports, requests))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
