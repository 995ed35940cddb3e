"""What serving engines read of each family's adapter: the table in docs/how-to/export.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.families.configs import CONFIGS, TITLES
from tests.families.test_battery import write_adapter
from tests.numerics.lab import make_trainer, spec
from tinsmith.bases.catalog import text_model_type, weight_shapes
from tinsmith.export.adapter import read_adapter
from tinsmith.export.engines import SGLANG, VLLM, remarks
from tinsmith.export.peft_files import BaseShapes, write_peft

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "export.md"


def rows() -> dict[str, tuple[str, str]]:
    """By title, the cells of both engines."""
    head, _, below = PAGE.read_text(encoding="utf-8").partition(f"| family | {VLLM} | {SGLANG} |\n")
    assert head
    found = [re.fullmatch(r"\| (.+) \| (.+) \| (.+) \|", line) for line in below.partition("\n\n")[0].splitlines()[1:]]
    return {title: (row[2], row[3]) for row in found if row is not None for title in row[1].split("; ")}


def test_the_table_is_of_every_family() -> None:
    assert rows().keys() == set(TITLES.values())


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_table_says_what_engines_leave_out(kind: str, make_base, tmp_path: Path) -> None:
    """Of an adapter of rank 8 in all layers, as it is written with the base at hand."""
    base = make_base(kind)
    own, out = tmp_path / "own", tmp_path / "peft"
    own.mkdir()
    out.mkdir()
    write_adapter(base, make_trainer(base, spec("a", 8), deterministic=False), own)
    path = Path(base.info.path)
    model_type = text_model_type(path)
    write_peft(read_adapter(own), out, BaseShapes(weight_shapes(path), model_type))
    found = remarks(out, model_type)
    for engine, cell in zip((VLLM, SGLANG), rows()[TITLES[kind]], strict=True):
        missing = [remark.missing for remark in found if remark.engine == engine and remark.missing]
        assert cell == (f"not {', '.join(missing)}" if missing else "all")
