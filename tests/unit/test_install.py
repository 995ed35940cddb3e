"""What `make quickstart` says when pip fails: a build that isn't there, and an index that can't be reached, differ."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts import install

ABSENT = (
    "ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu (from versions: 2.12.0, 2.13.0)\n"
    "ERROR: No matching distribution found for torch==2.13.0+cpu\n"
)
NO_ANSWER = (
    "WARNING: Retrying (Retry(total=4, connect=None, read=None, redirect=None, status=None)) after connection broken\n"
    "ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu (from versions: none)\n"
    "ERROR: No matching distribution found for torch==2.13.0+cpu\n"
)
FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in that fails for the CPU build with what `said` holds, and notes what it was asked."""
    script = tmp_path / "pip.py"
    script.write_text(
        "import pathlib, sys\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "with (here / 'asked').open('a') as asked: asked.write(sys.argv[-1] + '\\n')\n"
        "if sys.argv[-1].endswith('+cpu'):\n"
        "    said = (here / 'said').read_text()\n"
        "    sys.stderr.write(said)\n"
        "    sys.exit(1 if said else 0)\n"
    )
    monkeypatch.setattr(install.platform, "system", lambda: "Linux")
    monkeypatch.setattr(install, "has_gpu", lambda: False)
    monkeypatch.setattr(install, "PAUSE_S", 0.0)
    return [sys.executable, str(script)]


def asked(tmp_path: Path) -> list[str]:
    return (tmp_path / "asked").read_text().splitlines()


def test_a_build_that_is_not_there_is_replaced_by_the_default(
    pip: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "said").write_text(ABSENT)
    install.install_torch(pip)
    assert len(asked(tmp_path)) == 2
    out, err = capfd.readouterr()
    assert "has no CPU build" in out
    assert "PIP_EXTRA_INDEX_URL" in out
    assert err == ""


@pytest.mark.parametrize("said", [NO_ANSWER, FULL])
def test_another_failure_is_shown_and_ends_the_installation(
    pip: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], said: str
) -> None:
    (tmp_path / "said").write_text(said)
    with pytest.raises(SystemExit) as ended:
        install.install_torch(pip)
    assert ended.value.code == 1
    assert len(asked(tmp_path)) == 1, "no larger build is fetched"
    out, err = capfd.readouterr()
    assert said in err
    assert "has no CPU build" not in out


def test_a_build_that_is_there_is_taken(pip: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "said").write_text("")
    install.install_torch(pip)
    assert len(asked(tmp_path)) == 1
    assert "MB to download" in capfd.readouterr().out
