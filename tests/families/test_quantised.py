"""The battery of the families over weights in fewer bits.

The reference has the plain, dequantised weights, so all bounds are those of the battery: what a base computes with is
exactly what its codes and scales mean, in training, its gradients and sampling alike.
"""

from __future__ import annotations

import dataclasses
import os
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.families import quantised
from tests.families.configs import CONFIGS
from tests.families.conftest import MakeBase
from tests.families.test_battery import (  # noqa: F401  collected here a second time, over the bases below
    test_a_prompt_in_chunks_is_as_the_whole,
    test_a_sample_among_others_has_the_bits_of_one_alone,
    test_computing_layers_twice_changes_nothing,
    test_logprobs_and_gradients_are_those_of_peft,
    test_logprobs_without_an_adapter_are_those_of_transformers,
    test_packed_is_as_alone,
    test_samples_have_the_logprobs_of_the_trainer,
)
from tinsmith.model import BaseModel, load_base

FEW = ("qwen3-fp8", "gpt_oss-mxfp4", "llama-int4")
REST = (
    "qwen3_moe-fp8_rows",
    "deepseek_v3-fp8",
    "llama-fp8_rows",
    "gemma2-fp8_whole",
    "gpt_oss-int4",
    "qwen3-nf4",
    "mixtral-nf4",
)
IS_ALL = bool(os.environ.get("TINSMITH_TEST_ALL_FORMS"))  # `make forms`
BASES = (*FEW, *REST) if IS_ALL else FEW
FORMS = {"fp8": "fp8", "fp8_rows": "fp8", "fp8_whole": "fp8", "int4": "int4", "nf4": "NF4"}  # MXFP4 is gpt-oss's own
OTHERS = [f"{family}-{form}" for form in FORMS for family in CONFIGS if f"{family}-{form}" not in (*FEW, *REST)]
THIN = ("granite-fp8_rows", "cohere2-nf4")


@pytest.fixture(params=BASES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def make_base(make_base: MakeBase, tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """Bases whose `info` names their plain twin, for the references."""
    twins: dict[str, tuple[Path, Path]] = {}

    @cache
    def make(kind: str, *, deterministic: bool = False, weights: str | None = None) -> BaseModel:
        family, form = kind.split("-")
        plain = make_base(family).info
        if kind not in twins:
            home = tmp_path_factory.mktemp(kind)
            twins[kind] = home / "quantised", home / "twin"
            quantised.write(Path(plain.path), form, *twins[kind])
        path, twin = twins[kind]
        base = load_base(
            dataclasses.replace(plain, path=str(path)),
            device=torch.device("cpu"),
            dtype=torch.float32,
            deterministic=deterministic,
            weights=weights or (form if form in quantised.MADE else "stored"),
        )
        base.info = dataclasses.replace(plain, path=str(twin))
        return base

    return make


@pytest.mark.parametrize("kind", OTHERS if IS_ALL else THIN)
def test_every_family_computes_with_what_its_weights_mean(kind: str, make_base: MakeBase, plain, within) -> None:
    """In training, its gradients and sampling; and matrices are kept in that form."""
    base = make_base(kind)
    assert FORMS[kind.partition("-")[2]] in base.bytes_by_form()
    test_logprobs_without_an_adapter_are_those_of_transformers(kind, make_base, plain, within)
    test_logprobs_and_gradients_are_those_of_peft(kind, make_base, within)
    test_samples_have_the_logprobs_of_the_trainer(kind, make_base, within)
