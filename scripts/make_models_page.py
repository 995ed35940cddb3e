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
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "models.md"
FEATURES = {
    "train": ("logprobs_and_gradients", "a_step_is_that", "packed_is_as_alone", "computing_layers_twice"),
    "sample": ("logprobs_without_an_adapter", "samples_have", "a_prompt_in_chunks", "a_sample_among_others"),
    "experts": ("what_was_sampled_is_trained_on_the_same_routes", "replayed_numbers_are_those_of"),
    "export": ("the_exported_adapter",),
    "import": ("a_state_comes_back", "what_is_exported_comes_back"),
    "merge": ("the_merged_model",),
    "vision": (),  # all of its own file
}
FORMS = {"fp8": "fp8", "mxfp4": "MXFP4", "int4": "int4", "nf4": "NF4"}
VISION = "test_vision"
DIFFERENCES = (
    "logprobs of the base", "logprobs with adapters", "gradients, relative", "sampler and trainer", "exported, in peft",
    "merged, in transformers", "logprobs with pictures", "gradients with the tower's, relative",
)  # fmt: skip
HEAD = """# Models

Written by `python scripts/make_models_page.py`, which runs `tests/families`: each family on a small random
configuration of its real architecture with all its features switched on, in float32 on a CPU. A cell says `yes` where
all tests of that feature passed. `experts`: it has them, they are trained, and [their routes are
replayed](../explain/experts.md). `export`: the adapter gives the same in `peft`. `import`: what was exported comes back
to the bit. `merge`: [a whole model](../how-to/export.md) of base and adapter. `vision`:
[pictures](../how-to/pictures.md) in training and sampling. `quantised`: the [forms of weights](../how-to/weights.md)
in which the family itself was trained and sampled, within the same bounds (`make forms`; MXFP4 is gpt-oss's own form).
[How to add a family](../how-to/add-a-family.md).

Two things are not as in every directory of a family. The norms of Qwen3.5 and Qwen3-Next have an epsilon of 1e-4
here: with their own 1e-6, random weights make outcomes that nearly vanish, and a norm of those magnifies the last bits
(their delta rule has tests of its own, with 1e-6). Phi-2 and Phi-3.5-MoE are refused by name.
The text of Mistral Small 3 and Ministral 3 is served from directories with vision (`mistral3`), without pictures.
The rows of Qwen named `windows` have `use_sliding_window` set, and layers without windows before `max_window_layers`.

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
    "of each tensor, the sampler from the trainer. Of mixtures of experts, adapters are merged into the weights",
    "of `transformers` in place of `peft`, which has no adapters of which experts share a factor. The tower's are",
    "[adapters that pictures go through](../how-to/lora-options.md#the-vision-tower).",
)


def main(kinds: list[str]) -> int:
    sys.path.insert(0, str(ROOT))
    from tests.families.configs import TITLES  # noqa: PLC0415  the path is only known here

    if unknown := set(kinds) - TITLES.keys():
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; tests/families/configs.py names them all")
    tried = {kind: title for kind, title in TITLES.items() if not kinds or kind in kinds}
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "tests/families", f"--junitxml={report}"]
        command += ["-k", " or ".join(kinds)] if kinds else []
        env = {**os.environ, "TINSMITH_TEST_ALL_FORMS": "1", "TINSMITH_TEST_TOWER": "1"}
        done = subprocess.run([*command, "-o", "junit_family=xunit1"], cwd=ROOT, check=False, env=env)
        cases = ET.parse(report).getroot().iter("testcase")
        passed, noted = read(cases, tuple(tried))
    known = PAGE.read_text(encoding="utf-8").split(CAPTION[0]) if kinds else ["", ""]
    PAGE.write_text(HEAD + page(TITLES, rows_of(tried, passed, noted), known), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return done.returncode


def read(cases: object, kinds: tuple[str, ...]) -> tuple[dict[tuple[str, str], bool], dict[tuple[str, str], float]]:
    """By kind and feature whether all of its tests passed; by kind and name the largest difference."""
    passed: dict[tuple[str, str], bool] = {}
    noted: dict[tuple[str, str], float] = defaultdict(float)
    for case in cases:  # type: ignore[attr-defined]
        name = case.get("name", "")
        own = [kind for kind in kinds if f"[{kind}]" in name or f"[{kind}-" in name]
        is_elsewhere = name.endswith("-cuda]") and case.find("skipped") is not None
        if not own or is_elsewhere:
            continue
        is_good = case.find("failure") is None and case.find("error") is None and case.find("skipped") is None
        is_seeing = case.get("classname", "").endswith(VISION)
        form = re.search(rf"\[{own[0]}-(fp8|mxfp4|int4|nf4)", name)
        if form is not None:
            passed[own[0], form[1]] = passed.get((own[0], form[1]), True) and is_good
            continue
        for feature, tests in FEATURES.items():
            if feature == "vision" if is_seeing else any(test in name for test in tests):
                passed[own[0], feature] = passed.get((own[0], feature), True) and is_good
        for entry in case.iter("property"):
            key = (own[0], entry.get("name", ""))
            noted[key] = max(noted[key], float(entry.get("value", "nan")))
    return passed, noted


def rows_of(
    titles: dict[str, str], passed: dict[tuple[str, str], bool], noted: dict[tuple[str, str], float]
) -> tuple[dict[str, str], dict[str, str]]:
    """By kind the rows of both tables, from the second cell on."""
    features, differences = {}, {}
    for kind in titles:
        cells = ["yes" if passed.get((kind, feature)) else "no" for feature in FEATURES]
        cells.append(", ".join(name for form, name in FORMS.items() if passed.get((kind, form))) or "no")
        features[kind] = " | ".join(cells)
        differences[kind] = " | ".join(
            f"{noted[kind, what]:.1e}" if (kind, what) in noted else "" for what in DIFFERENCES
        )
    return features, differences


def page(titles: dict[str, str], rows: tuple[dict[str, str], dict[str, str]], known: list[str]) -> str:
    """known: the page as it is, before and after the caption: its rows stay where `rows` has none."""
    features, differences = (
        [f"| {title} | {own[kind]} |" if kind in own else row_in(old, title) for kind, title in titles.items()]
        for own, old in zip(rows, known, strict=True)
    )
    lines = [f"| family | {' | '.join(FEATURES)} | quantised |", "|---" * (len(FEATURES) + 2) + "|", *features]
    lines += ["", *CAPTION, ""]
    lines += [f"| family | {' | '.join(DIFFERENCES)} |", "|---" * (len(DIFFERENCES) + 1) + "|", *differences]
    return "\n".join(lines) + "\n"


def row_in(old: str, title: str) -> str:
    found = [line for line in old.splitlines() if line.startswith(f"| {title} |")]
    return found[0] if found else sys.exit(f"the page has no row of {title} yet: name it too")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
