"""The page of models is what the battery of today would write, but for the figures; and how it is read and written."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from scripts.make_models_page import (
    CAPTION,
    DIFFERENCES,
    FEATURES,
    FEWER_BITS,
    FORM_COLUMN,
    FORMS,
    HALF_DIFFERENCES,
    HALVES,
    HEAD,
    SEEING_DIFFERENCES,
    TYPE_COLUMN,
    Found,
    page,
    read,
    rows_in,
)
from tests.families.configs import CONFIGS, PROCESSORS, TITLES
from tests.families.hub_configs import HUB_CONFIGS
from tinsmith.model.families import family_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "models.md"
IN_FEWER_BITS = {name for form, name in FORMS.items() if form not in HALVES} - {"MXFP4"}
TYPES = {kind: HUB_CONFIGS.get(kind, config.to_dict())["model_type"] for kind, (_, config) in CONFIGS.items()}


def test_it_names_every_family_and_all_its_features_were_green() -> None:
    assert TITLES.keys() == CONFIGS.keys()
    text = PAGE.read_text(encoding="utf-8")
    features, differences = (rows_in(part, TITLES) for part in text.split(CAPTION[0].partition(":")[0]))
    assert features.keys() == differences.keys() == TITLES.keys()
    has_halves = any("bf16" in row[FORM_COLUMN] for row in features.values())
    for kind, row in features.items():
        own = bool(family_of(CONFIGS[kind][1]).experts), kind in PROCESSORS
        has_experts, sees = (("no", "yes")[is_so] for is_so in own)
        assert [row[feature] for feature in FEATURES] == ["yes", "yes", has_experts, "yes", "yes", "yes", sees], kind
        wanted = IN_FEWER_BITS | ({"MXFP4"} if kind == "gpt_oss" else set())
        assert set(row[FORM_COLUMN].split(", ")) == wanted | ({"bf16", "fp16"} if has_halves else set()), kind
        assert row[TYPE_COLUMN] == f"`{TYPES[kind]}`"


@pytest.mark.parametrize(
    ("columns", "bound"), [(DIFFERENCES, 1e-5), (SEEING_DIFFERENCES, 1e-5), (HALF_DIFFERENCES, 0.2)]
)
def test_every_difference_is_there_and_small(columns: tuple[str, ...], bound: float) -> None:
    """A column that is filled for one family is filled for all: the page was written whole after it was made."""
    rows = rows_in(PAGE.read_text(encoding="utf-8").partition(CAPTION[0].partition(":")[0])[2], TITLES)
    kinds = PROCESSORS if columns is SEEING_DIFFERENCES else TITLES
    for column in columns:
        figures = [rows[kind].get(column, "") for kind in kinds]
        assert all(figures) or not any(figures), column
        assert all(float(figure) <= bound for figure in figures if figure), column


def test_what_is_looked_for_are_names_of_tests() -> None:
    """A test that was renamed is missed, not taken for one that passed."""
    files = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "families").glob("test_*.py")}
    for feature, tests in FEATURES.items():
        code = files["test_vision"] if feature == "vision" else "".join(files.values())
        for test in tests:
            assert re.search(rf"def test_\w*{test}", code), test


def case(name: str, outcome: str = "", file: str = "test_battery", **noted: float) -> ET.Element:
    made = ET.Element("testcase", name=name, classname=f"tests.families.{file}")
    if outcome:
        ET.SubElement(made, outcome)
    for what, value in noted.items():
        ET.SubElement(
            ET.SubElement(made, "properties"),
            "property",
            name=what.replace("torch_", "torch.").replace("_", " "),
            value=str(value),
        )
    return made


def green(kind: str) -> list[ET.Element]:
    return [
        case(f"test_{test}[{kind}]", file="test_vision" if feature == "vision" else "test_battery")
        for feature, tests in FEATURES.items()
        for test in tests
    ]


def test_a_feature_is_green_where_all_its_tests_passed() -> None:
    found = read(green("llama"), ["llama", "qwen3"])
    assert all(found.is_green("llama", feature) for feature in FEATURES)
    assert not any(found.is_green("qwen3", feature) for feature in FEATURES)


@pytest.mark.parametrize(
    ("feature", "test"), [(feature, test) for feature, tests in FEATURES.items() for test in tests]
)
def test_one_that_is_missing_or_bad_is_missed(feature: str, test: str) -> None:
    file = "test_vision" if feature == "vision" else "test_battery"
    name = f"test_{test}[llama]"
    rest = [one for one in green("llama") if one.get("name") != name or not one.get("classname", "").endswith(file)]
    assert not read(rest, ["llama"]).is_green("llama", feature)
    for outcome in ("failure", "error", "skipped"):
        assert not read([*green("llama"), case(name, outcome, file)], ["llama"]).is_green("llama", feature)


def test_what_needs_a_gpu_that_isn_t_there_is_left_out() -> None:
    skipped = case("test_a_step_is_that_of_torchs_adamw[llama-cuda]", "skipped")
    assert read([*green("llama"), skipped], ["llama"]).is_green("llama", "train")


def test_forms_and_their_differences() -> None:
    cases = [
        case("test_packed_is_as_alone[llama-fp8_rows-True]", sampler_and_trainer=2e-6),
        case("test_packed_is_as_alone[llama-int4]", sampler_and_trainer=3e-6),
        case("test_near[llama-bfloat16]", gradients_in_torch_bfloat16=0.1),
        case("test_near[llama-float16]", "failure"),
        case("test_samples[llama]", sampler_and_trainer=1e-6),
        case("test_samples[llama4]", sampler_and_trainer=9e-6),
    ]
    found = read(cases, ["llama"])
    assert found.forms == {
        ("llama", "fp8"): True, ("llama", "int4"): True, ("llama", "bfloat16"): True, ("llama", "float16"): False,
    }  # fmt: skip
    assert found.differences == {
        ("llama", FEWER_BITS): 3e-6,
        ("llama", "sampler and trainer"): 1e-6,
        ("llama", "gradients in bfloat16"): 0.1,
    }


def test_rows_that_were_not_tried_stay_as_they_are() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(TITLES, TYPES, PROCESSORS, [], Found(), text) == text
    assert text.startswith(HEAD)
    found = read([*green("llama"), case("x[llama]", sampler_and_trainer=4.2e-6)], ["llama"])
    changed = page(TITLES, TYPES, PROCESSORS, ["llama"], found, text).splitlines()
    new = [line for line in changed if line not in text.splitlines()]
    assert {line.split("|")[1] for line in new} == {" Llama 3.x "}
    assert "4.2e-06" in new[1]


def test_a_family_that_is_new_has_to_be_tried() -> None:
    with pytest.raises(SystemExit, match="no row of New yet"):
        page({**TITLES, "new": "New"}, {**TYPES, "new": "new"}, PROCESSORS, [], Found(), PAGE.read_text("utf-8"))


def test_the_readme_counts_families_without_their_variants() -> None:
    families = [title for title in TITLES.values() if not title.endswith(("(windows)", "(long)"))]
    assert f"[{len(families)} families](docs/reference/models.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
