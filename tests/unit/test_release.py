"""The audit and what a release consists of."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import audit, release

CLEAN = {"name": "a", "version": "1", "vulns": []}
WEAK = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}, {"id": "GHSA-x"}]}
UNSEEN = {"name": "c", "skip_reason": "not found"}
ROOT = Path(__file__).resolve().parents[2]


def stand_in(tmp_path: Path, code: str) -> tuple[str, ...]:
    script = tmp_path / "pip_audit.py"
    script.write_text(code)
    return sys.executable, str(script)


def test_a_known_weakness_fails_the_audit() -> None:
    code, lines = audit.judge({"dependencies": [CLEAN, WEAK]})
    assert code == 1
    assert "b 2: PYSEC-1 (mended in: 3)" in lines
    assert any("no release without it yet" in line for line in lines)
    assert audit.judge({"dependencies": [CLEAN]}) == (0, ["1 packages audited, 0 with known weaknesses"])


def test_what_is_not_known_is_said_and_fails_nothing(tmp_path: Path) -> None:
    code, lines = audit.judge({"dependencies": [CLEAN, UNSEEN]})
    assert code == 0
    assert "NOT ALL WAS AUDITED" in lines
    for stands_in in (
        "import sys; sys.exit('ERROR: Connection refused')",
        f"print({json.dumps(json.dumps({'dependencies': [UNSEEN]}))})",
        "print('no report')",
    ):
        code, lines = audit.audit(tmp_path / "none", stand_in(tmp_path, stands_in))
        assert (code, lines[0]) == (0, "NOT AUDITED")


def test_without_a_service_it_says_so_for_real(tmp_path: Path) -> None:
    """pip-audit itself, whose way out leads to a port where nobody listens."""
    (tmp_path / "pins.txt").write_text("h11==0.16.0\n")
    code = "import sys; from pip_audit._cli import audit; sys.exit(audit())"
    env = ("env", "HTTPS_PROXY=http://127.0.0.1:9", "https_proxy=http://127.0.0.1:9", "NO_PROXY=", "no_proxy=")
    status, lines = audit.audit(tmp_path / "pins.txt", (*env, sys.executable, "-c", code))
    assert (status, lines[0]) == (0, "NOT AUDITED")


def test_the_bill_holds_what_the_package_brings_and_no_tool() -> None:
    parts = {"A_lib": ["shared", "tool"], "shared": [], "tool": ["shared"]}
    bill = {
        "metadata": {"component": {"bom-ref": release.ROOT_REF, "name": "tinsmith"}},
        "components": [{"bom-ref": f"{name}-1", "name": name} for name in parts],
        "dependencies": [
            {"ref": release.ROOT_REF, "dependsOn": ["A_lib-1", "tool-1"]},
            *({"ref": f"{name}-1", "dependsOn": [f"{need}-1" for need in needs]} for name, needs in parts.items()),
        ],
    }
    made = release.of_the_package(bill, {"a-lib", "shared"})
    assert [one["name"] for one in made["components"]] == ["A_lib", "shared"]
    assert {one["ref"]: one["dependsOn"] for one in made["dependencies"]} == {
        release.ROOT_REF: ["A_lib-1"], "A_lib-1": ["shared-1"], "shared-1": [],
    }  # fmt: skip
    assert made["metadata"]["component"]["version"]
    with pytest.raises(LookupError, match="gone"):
        release.of_the_package(bill, {"gone"})


def test_what_the_package_brings() -> None:
    needs = release.needs_of(release.direct_requirements())
    assert {"torch", "litestar", "anyio", "markupsafe"} <= needs
    assert not {"pytest", "ruff", "hypothesis", "pip-audit", "tinker"} & needs


def test_sums_are_what_sha256sum_reads(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"a")
    (tmp_path / "b.tar.gz").write_bytes(b"b")
    release.write_sums(tmp_path)
    done = subprocess.run(["sha256sum", "--check", release.SUMS], cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stdout.count(b": OK")) == (0, 2)


def test_no_file_names_a_registry() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    hosts = re.compile(r"(files\.)?python" + r"hosted\.org|py" + r"pi\.org|download\.py" + r"torch\.org")
    naming = [
        name
        for name in listed
        if Path(ROOT, name).is_file() and hosts.search(Path(ROOT, name).read_text(encoding="utf-8", errors="replace"))
    ]
    assert not naming
