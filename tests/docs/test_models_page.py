"""The page of models is what the battery of today would write, but for the figures."""

from __future__ import annotations

import re
from pathlib import Path

from tests.families.configs import CONFIGS, PROCESSORS, TITLES
from tinsmith.model.families import family_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "models.md"


def test_it_names_every_family_and_all_its_features_were_green() -> None:
    assert TITLES.keys() == CONFIGS.keys()
    features, differences = (part.splitlines() for part in PAGE.read_text().split("The largest differences"))
    for kind, title in TITLES.items():
        family = family_of(CONFIGS[kind][1])
        (row,) = [line for line in features if line.startswith(f"| {title} |")]
        cells = row.removesuffix(" |").split(" | ")[1:]
        has_experts, sees = (("no", "yes")[is_so] for is_so in (bool(family.experts), kind in PROCESSORS))
        assert cells[:7] == ["yes", "yes", has_experts, "yes", "yes", "yes", sees], row
        forms = cells[7].split(", ")
        assert forms == ["no"] or set(forms) <= {"fp8", "MXFP4", "int4", "NF4"}, row
        (figures,) = [line for line in differences if line.startswith(f"| {title} |")]
        assert all(float(figure) <= 1e-5 for figure in re.findall(r"[\d.]+e-\d+", figures)), figures
