from __future__ import annotations

from pathlib import Path

import pytest

from tinsmith.machine.cpu import HUGE_PAGES, OPENMP, math_env


@pytest.mark.parametrize(
    ("text", "is_strict"),
    [
        ("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Xeon\n", True),
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: not GenuineIntel\n", False),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", False),
        (None, False),
    ],
)
def test_strict_products_on_intel_alone(tmp_path: Path, text: str | None, is_strict: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if text is not None:
        cpuinfo.write_text(text)
    env = math_env(cpuinfo)
    assert env.items() >= (OPENMP | HUGE_PAGES).items()
    assert (env.get("MKL_CBWR") == "AUTO,STRICT") is is_strict
