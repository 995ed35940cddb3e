"""Known weaknesses of the pinned dependencies: `pip-audit` over constraints.txt. `make audit`.

Ends with 1 if one is found. Without the service that knows of them, or without an answer for some of the packages, it
says so loudly and ends with 0: what can't be known must not stop a release, and must not pass for a clean bill either.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
WITHIN_S = 600
FLAGS = ("--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "15")
SHOWN = 12


def main() -> int:
    code, lines = audit(CONSTRAINTS)
    loud = Console(stderr=True, highlight=False)
    for line in lines:
        loud.print(line, style="bold red" if line.isupper() or code else "", markup=False)
    return code


def audit(requirements: Path, command: Sequence[str] = (sys.executable, "-m", "pip_audit")) -> tuple[int, list[str]]:
    """(exit status, what to say)."""
    call = [*command, "-r", str(requirements), *FLAGS]
    try:
        done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=WITHIN_S)
    except subprocess.TimeoutExpired:
        return unknown(f"it gave no answer within {WITHIN_S} s")
    try:
        report = json.loads(done.stdout)
    except ValueError:
        return unknown((done.stderr.strip() or "it said nothing").splitlines()[-1])
    return judge(report)


def judge(report: Mapping[str, Any]) -> tuple[int, list[str]]:
    """What pip-audit's JSON report comes to."""
    packages = report["dependencies"]
    weak = [package for package in packages if package.get("vulns")]
    unseen = sorted(package["name"] for package in packages if "skip_reason" in package)
    if len(unseen) == len(packages):
        return unknown("the service knows none of the packages")
    lines = [f"{len(packages) - len(unseen)} packages audited, {len(weak)} with known weaknesses"]
    for package in weak:
        for found in package["vulns"]:
            cure = ", ".join(found.get("fix_versions") or ()) or "no release without it yet"
            lines.append(f"{package['name']} {package['version']}: {found['id']} (mended in: {cure})")
    if unseen:
        more = f" and {len(unseen) - SHOWN} more" if len(unseen) > SHOWN else ""
        lines += ["NOT ALL WAS AUDITED", f"not known to the service: {', '.join(unseen[:SHOWN])}{more}"]
    return (1 if weak else 0), lines


def unknown(why: str) -> tuple[int, list[str]]:
    return 0, [
        "NOT AUDITED",
        f"pip-audit has no service that answers: {why[:300]}",
        "run `make audit` where it has one",
    ]


if __name__ == "__main__":
    sys.exit(main())
