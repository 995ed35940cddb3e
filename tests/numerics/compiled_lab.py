"""What the tests of compiled programs share, beside the fixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tinsmith.errors import UnsupportedError
from tinsmith.model.compiled import Program


def assert_is_found_out(
    program: Program[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, right: str, wrong: str
) -> None:
    """The program with `wrong` in the place of `right` is compiled, and isn't taken."""
    text = program.source.read_text(encoding="utf-8")
    assert right in text
    source = tmp_path / program.source.name
    source.write_text(text.replace(right, wrong), encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(program, "source", source)
    with pytest.raises(UnsupportedError, match="gives other numbers than torch"):
        program.load()
    assert list((tmp_path / "cache" / "tinsmith").iterdir())
