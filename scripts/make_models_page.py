"""Runs the battery of the families and writes what it found to docs/reference/models.md.

python scripts/make_models_page.py [KIND ...]

With names of `tests/families/configs.py` those alone are run, and the other rows stay as they are.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "models.md"
# what a test's name has in it, without its file; a feature is green where each of them has tests that passed
FEATURES = {
    "train": ("logprobs_and_gradients", "a_step_is_that", "packed_is_as_alone", "computing_layers_twice"),
    "sample": ("logprobs_without_an_adapter", "samples_have", "a_prompt_in_chunks", "a_sample_among_others"),
    "experts": ("what_was_sampled_is_trained_on_the_same_routes", "replayed_numbers_are_those_of"),
    "export": ("the_exported_adapter",),
    "import": ("a_state_comes_back", "what_is_exported_comes_back"),
    "merge": ("the_merged_model",),
    "vision": (
        "logprobs_are_those", "logprobs_and_gradients", "packed_is_as_alone", "computing_layers_twice", "samples_have",
    ),
}  # fmt: skip
FORMS = {"bfloat16": "bf16", "float16": "fp16", "fp8": "fp8", "mxfp4": "MXFP4", "int4": "int4", "nf4": "NF4"}
HALVES = frozenset({"bfloat16", "float16"})
VISION = "test_vision"
FORM_COLUMN, TYPE_COLUMN = "forms of weights", "`model_type`"
FEWER_BITS = "in fewer bits"
DIFFERENCES = (
    "logprobs of the base", "logprobs with adapters", "gradients, relative", "weights after a step, relative",
    "packed and alone", "gradients, packed and alone, relative", "sampler and trainer", "chunks and whole",
    "exported, in peft", "merged, in transformers", FEWER_BITS,
)  # fmt: skip
SEEING_DIFFERENCES = (
    "logprobs with pictures", "gradients with pictures, relative", "logprobs with the tower's adapters",
    "gradients with the tower's, relative", "sampler and trainer, with the tower's adapters",
    "exported with the tower's, in peft", "merged with the tower's, in transformers",
)  # fmt: skip
HALF_DIFFERENCES = (
    "gradients in bfloat16", "sampler from trainer in bfloat16", "gradients in float16",
    "sampler from trainer in float16",
)  # fmt: skip
HEAD = """# Models

Written by `python scripts/make_models_page.py`, which runs `tests/families`: each family on a small random
configuration of its real architecture with all its features switched on, in float32 on a CPU. A cell says `yes` where
all tests of that feature passed. `experts`: it has them, they are trained, and [their routes are
replayed](../explain/experts.md). `export`: the adapter gives the same in `peft`. `import`: what was exported comes back
to the bit. `merge`: [a whole model](../how-to/export.md) of base and adapter. `vision`:
[pictures](../how-to/pictures.md) in training and sampling. `forms of weights`: the [forms](../how-to/weights.md)
in which the family itself was trained and sampled: in fewer bits within the same bounds (`make forms`; MXFP4 is
gpt-oss's own form), in bf16 and fp16 as near float32 as such numbers are.
[How to add a family](../how-to/add-a-family.md).

A row is of an architecture, which `model_type` in a directory's `config.json` names. So SmolLM2 and Yi are `llama`,
Mistral Nemo is `mistral`, QwQ is `qwen2`, DeepSeek-R1 is `deepseek_v3`, and GLM-4.6 is `glm4_moe`.

Two things are not as in every directory of a family. The norms of Qwen3.5 and Qwen3-Next have an epsilon of 1e-4
here: with their own 1e-6, random weights make outcomes that nearly vanish, and a norm of those magnifies the last bits
(their delta rule has tests of its own, with 1e-6). Phi-2 and Phi-3.5-MoE are refused by name.
The text of Mistral Small 3 and Ministral 3 is served from directories with vision (`mistral3`), without pictures.
The rows of Qwen named `windows` have `use_sliding_window` set, and layers without windows before `max_window_layers`.
Latent attention (DeepSeek-V3, Moonlight, Kimi-K2, GLM-4.7-Flash) is sampled with keys and values of every head in its
cache, which [takes more memory](../explain/experts.md#what-it-doesnt-do-yet) than latents would.

Phi-3.5-mini, Phi-4-mini and the 128k forms of Phi-3 scale rope by `longrope`: there are factors for sequences up to
the length that a model was first trained at (`original_max_position_embeddings`), and others for longer ones.
`transformers` takes the one or the other for each call, and computes the keys of a sampled sequence anew once it
crosses that length, so that its first tokens were drawn with other numbers than it ends with. A server of tinsmith
takes one for all sequences, as vLLM does with its `max_model_len`: the long factors, unless `--max-context-tokens` is
at most that length. So what is sampled has the trainer's log-probabilities on both sides of it. A sequence has those
of `transformers` where that would take the same factors: with `--max-context-tokens 4096` every one of Phi-4-mini,
without it those longer than 4096 tokens (the rows named `long`). Train and serve an adapter with the same setting,
and for short sequences with `--max-context-tokens 4096` if it is to run in `transformers`; another engine's own limit
should be likewise.

An architecture that isn't named here is served if it is made of parts that are known: `nn.Linear` layers in attention
and MLP, and transformers' attention interface. The server checks at its start that the opened model gives the logits of
the untouched one, and refuses it with the names of the parts that it can't carry.

"""
CAPTION = (
    "The largest differences: log-probabilities from `transformers` and `peft` in float64, gradients by the norm",
    "of each tensor, the sampler from the trainer, a request in a pass with others from one alone, a prompt in chunks",
    "from a whole one; in fewer bits all of these. Of mixtures of experts, adapters are merged into the weights",
    "of `transformers` in place of `peft`, which has no adapters of which experts share a factor.",
)
SEEING_CAPTION = (
    "The same with pictures; the tower's are [adapters that pictures go through]"
    "(../how-to/lora-options.md#the-vision-tower).",
)
HALF_CAPTION = (
    "In bf16 and fp16: gradients of a run from those in float32, relative, and the sampler's log-probabilities from",
    "the trainer's on average, with the same routes of mixtures.",
)
Row = dict[str, str]  # by column


@dataclass
class Found:
    """outcomes: by kind and feature, of each name in FEATURES that has tests, whether all passed. forms: by kind and
    form likewise. differences: by kind and name the largest."""

    outcomes: dict[tuple[str, str], dict[str, bool]] = field(default_factory=dict)
    forms: dict[tuple[str, str], bool] = field(default_factory=dict)
    differences: dict[tuple[str, str], float] = field(default_factory=dict)

    def is_green(self, kind: str, feature: str) -> bool:
        outcomes = self.outcomes.get((kind, feature), {})
        return outcomes.keys() == set(FEATURES[feature]) and all(outcomes.values())


def main(kinds: list[str]) -> int:
    sys.path.insert(0, str(ROOT))
    from tests.families.configs import CONFIGS, PROCESSORS, TITLES  # noqa: PLC0415  the path is only known here
    from tests.families.hub_configs import HUB_CONFIGS  # noqa: PLC0415

    if unknown := set(kinds) - TITLES.keys():
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; tests/families/configs.py names them all")
    tried = [kind for kind in TITLES if not kinds or kind in kinds]
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "tests/families", f"--junitxml={report}"]
        command += ["-k", " or ".join(kinds)] if kinds else []
        env = {**os.environ, "TINSMITH_TEST_ALL_FORMS": "1", "TINSMITH_TEST_TOWER": "1"}
        done = subprocess.run([*command, "-o", "junit_family=xunit1"], cwd=ROOT, check=False, env=env)
        found = read(ET.parse(report).getroot().iter("testcase"), tried)
    types = {kind: HUB_CONFIGS.get(kind, CONFIGS[kind][1].to_dict())["model_type"] for kind in TITLES}
    PAGE.write_text(page(TITLES, types, list(PROCESSORS), tried, found, PAGE.read_text("utf-8")), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return done.returncode


def read(cases: Iterable[ET.Element], kinds: Iterable[str]) -> Found:
    """Of the tests of these kinds, whose parameters begin with a kind."""
    found, known = Found(), set(kinds)
    for case in cases:
        name, _, parameters = case.get("name", "").partition("[")
        kind, _, form = parameters.removesuffix("]").partition("-")
        is_elsewhere = form == "cuda" and case.find("skipped") is not None
        if kind not in known or is_elsewhere:
            continue
        is_good = all(case.find(bad) is None for bad in ("failure", "error", "skipped"))
        form = next((known_form for known_form in FORMS if re.match(rf"{known_form}\b|{known_form}_", form)), "")
        if form:
            found.forms[kind, form] = found.forms.get((kind, form), True) and is_good
        else:
            _note(found, kind, name, is_good=is_good, is_seeing=case.get("classname", "").endswith(VISION))
        for entry in case.iter("property"):
            what = entry.get("name", "").replace(" torch.", " ")
            key = kind, FEWER_BITS if form and form not in HALVES else what
            found.differences[key] = max(found.differences.get(key, 0.0), float(entry.get("value", "nan")))
    return found


def _note(found: Found, kind: str, name: str, *, is_good: bool, is_seeing: bool) -> None:
    for feature, tests in FEATURES.items():
        for test in tests if (feature == "vision") == is_seeing else ():
            if test in name:
                outcomes = found.outcomes.setdefault((kind, feature), {})
                outcomes[test] = outcomes.get(test, True) and is_good


def page(
    titles: Mapping[str, str],
    types: Mapping[str, str],
    seeing: Iterable[str],
    tried: Iterable[str],
    found: Found,
    old: str,
) -> str:
    """old: the page as it is, whose rows stay for kinds that weren't tried, with empty cells in columns that it
    doesn't have. types: `model_type` by kind. seeing: kinds with vision."""
    features: dict[str, Row] = {}
    differences: dict[str, Row] = {}
    with_pictures: dict[str, Row] = {}
    in_halves: dict[str, Row] = {}
    for kind in tried:
        features[kind] = {feature: "yes" if found.is_green(kind, feature) else "no" for feature in FEATURES}
        forms = [name for form, name in FORMS.items() if found.forms.get((kind, form))]
        features[kind][FORM_COLUMN] = ", ".join(forms) or "no"
        for rows, columns in (
            (differences, DIFFERENCES), (with_pictures, SEEING_DIFFERENCES), (in_halves, HALF_DIFFERENCES),
        ):  # fmt: skip
            known = {what: found.differences.get((kind, what)) for what in columns}
            rows[kind] = {
                what: "" if value is None else f"{value:.1e}" if value else "0" for what, value in known.items()
            }
    before, _, after = old.partition(CAPTION[0].partition(":")[0])
    all_types = {kind: {TYPE_COLUMN: f"`{types[kind]}`"} for kind in titles}
    seen, known = {kind: titles[kind] for kind in seeing}, rows_in(after, titles)
    lines = table(titles, (TYPE_COLUMN, *FEATURES, FORM_COLUMN), [rows_in(before, titles), features, all_types])
    for caption, own, columns, rows in (
        (CAPTION, titles, DIFFERENCES, differences),
        (SEEING_CAPTION, seen, SEEING_DIFFERENCES, with_pictures),
        (HALF_CAPTION, titles, HALF_DIFFERENCES, in_halves),
    ):
        made = table(own, columns, [known, rows])
        lines += ["", *caption, "", *made] if made else []
    return HEAD + "\n".join(lines) + "\n"


def table(titles: Mapping[str, str], columns: tuple[str, ...], rows: list[dict[str, Row]]) -> list[str]:
    """Without columns that are empty for all; no lines where all are. rows: by kind; those that come later replace the
    cells of earlier ones."""
    cells: dict[str, Row] = {kind: {} for kind in titles}
    for kind, row in cells.items():
        for some in rows:
            row |= some.get(kind, {})
        if not row:
            sys.exit(f"the page has no row of {titles[kind]} yet: name it too")
    filled = [column for column in columns if any(row.get(column) for row in cells.values())]
    if not filled:
        return []
    lines = [f"| family | {' | '.join(filled)} |", "|---" * (len(filled) + 1) + "|"]
    return lines + [
        f"| {title} | {' | '.join(cells[kind].get(column, '') for column in filled)} |"
        for kind, title in titles.items()
    ]


def rows_in(text: str, titles: Mapping[str, str]) -> dict[str, Row]:
    """By kind the cells of all tables in it."""
    kinds = {title: kind for kind, title in titles.items()}
    rows: dict[str, Row] = {}
    columns: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]
        if line.startswith("| family |"):
            columns = cells[1:]
        elif line.startswith("| ") and cells[0] in kinds:
            rows.setdefault(kinds[cells[0]], {}).update(zip(columns, cells[1:], strict=True))
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
