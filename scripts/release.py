"""What a release consists of, in dist/: sdist, wheel, bill of materials (CycloneDX, JSON) and SHA-256 sums.

The audit of dependencies comes first and stops it. Nothing is downloaded (the build takes what is installed) and
nothing is uploaded.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from scripts.audit import main as audit
from tinsmith import __version__

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
SUMS = "SHA256SUMS"
ROOT_REF = "root-component"


def main() -> int:
    code = audit()
    if code:
        return code
    shutil.rmtree(DIST, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(DIST), str(ROOT)], check=True)
    bill = DIST / f"tinsmith-{__version__}.cdx.json"
    bill.write_text(json.dumps(of_the_package(bill_of_environment()), indent=2) + "\n", encoding="utf-8")
    write_sums(DIST)
    for path in sorted(DIST.iterdir()):
        print(f"{path.stat().st_size:>10} {path.relative_to(ROOT)}")
    return 0


def bill_of_environment() -> dict[str, Any]:
    """The CycloneDX bill of all that is installed here."""
    with tempfile.TemporaryDirectory() as made:
        out = Path(made) / "bill.json"
        command = [sys.executable, "-m", "cyclonedx_py", "environment", sys.executable]
        flags = ["--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible", "--of", "JSON", "-o", str(out)]
        subprocess.run([*command, *flags], check=True)
        return dict(json.loads(out.read_text(encoding="utf-8")))


def of_the_package(bill: Mapping[str, Any], needed: set[str] | None = None) -> dict[str, Any]:
    """The part of a bill that `pip install tinsmith` brings (`needed`: by name), and nothing of the tools beside it."""
    wanted = needs_of(direct_requirements()) if needed is None else needed
    kept = {one["bom-ref"]: normal(one["name"]) for one in bill["components"] if normal(one["name"]) in wanted}
    missing = wanted - set(kept.values())
    if missing:
        raise LookupError(f"not in the bill: {', '.join(sorted(missing))}")
    component = {**bill["metadata"]["component"], "version": __version__}
    return {
        **bill,
        "metadata": {**bill["metadata"], "component": component},
        "components": [one for one in bill["components"] if one["bom-ref"] in kept],
        "dependencies": [
            {**one, "dependsOn": [ref for ref in one.get("dependsOn", []) if ref in kept]}
            for one in bill["dependencies"]
            if one["ref"] in {ROOT_REF, *kept}
        ],
    }


def needs_of(requirements: Sequence[str]) -> set[str]:
    """Names of what these requirements bring on this machine, and what that brings in turn; extras only where they are
    asked for."""
    found: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        asked, of_extra = waiting.pop()
        if asked.marker is not None and not asked.marker.evaluate({"extra": of_extra}):
            continue
        name = normal(asked.name)
        for extra in ("", *asked.extras):
            if (name, extra) not in found:
                found.add((name, extra))
                waiting += [(Requirement(text), extra) for text in metadata.requires(name) or ()]
    return {name for name, _ in found}


def direct_requirements() -> list[str]:
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"])


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def write_sums(folder: Path) -> None:
    """In the form that `sha256sum --check` reads."""
    files = sorted(path for path in folder.iterdir() if path.name != SUMS)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in files]
    (folder / SUMS).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
