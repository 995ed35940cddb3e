"""The fields of user_metadata that a run is made by: what they mean, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tinsmith.errors import UserError
from tinsmith.lora_options import DEFAULT_ALPHA, PLAIN, LoraOptions
from tinsmith.types import BaseInfo, RunId, RunSpec, Targets
from tinsmith.validate.lora_fields import FIELDS, check_extras, extra_fields, read_extras, shape_text
from tinsmith.validate.requests import check_metadata

SPEC = RunSpec(RunId("r"), "base", rank=8)
WIDTHS = (("attn", "q_proj", 10), ("attn", "k_proj", 4), ("mlp", "up_proj", 20), ("unembed", "lm_head", 30))
INFO = BaseInfo("base", "/", "llama", 100, 16, (), layer_widths=WIDTHS)


def spec_of(**fields: str) -> RunSpec:
    return read_extras({f"tinsmith.{name}": value for name, value in fields.items()}, 64).of_new_run(SPEC)


def test_without_a_field_a_run_is_as_ever() -> None:
    assert read_extras({"alpha": "3", "note": "tinsmith.x"}, 64).of_new_run(SPEC) == SPEC
    assert (SPEC.alpha, SPEC.options) == (DEFAULT_ALPHA, PLAIN)
    assert extra_fields(SPEC) == {}


def test_each_field_says_its_part_and_is_shown_again() -> None:
    given = {
        "lora_alpha": "16", "use_rslora": "true", "rank_pattern": '{"q_proj": 3, "mlp": 12}',
        "alpha_pattern": '{"k_proj": 2.5}', "lora_dropout": "0.25", "train_vision": "true",
    }  # fmt: skip
    spec = spec_of(**given)
    ranks, alphas = (("mlp", 12), ("q_proj", 3)), (("k_proj", 2.5),)
    options = LoraOptions(True, ranks, alphas, 0.25)
    assert spec == replace(SPEC, alpha=16.0, targets=Targets(vision=True), options=options)
    assert read_extras(extra_fields(spec), 64).of_new_run(SPEC) == spec
    assert all(name.removeprefix("tinsmith.").removeprefix("train_") in shape_text(spec) for name in FIELDS)


def test_a_layer_goes_before_its_group() -> None:
    options = spec_of(rank_pattern='{"attn": 2, "q_proj": 4}', alpha_pattern='{"attn": 6}').options
    assert [options.rank_of("attn", name, 8) for name in ("q_proj", "k_proj")] == [4, 2]
    assert options.rank_of("mlp", "up_proj", 8) == 8
    assert options.scale_of("attn", "q_proj", 8, 32.0) == 6 / 4
    assert options.scale_of("mlp", "up_proj", 8, 32.0) == 4
    assert replace(options, use_rslora=True).scale_of("attn", "k_proj", 8, 32.0) == 6 / 2**0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_alpha", "0"), ("lora_alpha", "-1"), ("lora_alpha", "nan"), ("lora_alpha", "inf"), ("lora_alpha", "much"),
        ("use_rslora", "1"), ("use_rslora", ""), ("lora_dropout", "1"), ("lora_dropout", "-0.1"), ("lora_dropout", "x"),
        ("train_vision", "yes"),
        ("rank_pattern", "8"), ("rank_pattern", "{"), ("rank_pattern", '{"q_proj": 0}'), ("rank_pattern", "[" * 5000),
        ("rank_pattern", '{"q_proj": 65}'), ("rank_pattern", '{"q_proj": 2.5}'), ("rank_pattern", '{"q_proj": true}'),
        ("alpha_pattern", '{"q_proj": 0}'), ("alpha_pattern", '{"q_proj": "3"}'), ("alpha_pattern", '{"a": 1e999}'),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_with_its_field(field: str, value: str) -> None:
    with pytest.raises(UserError, match=f"tinsmith.{field} must be"):
        spec_of(**{field: value})


def test_an_unknown_field_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"tinsmith\.lora_alhpa.*tinsmith\.lora_alpha"):
        spec_of(lora_alhpa="16")


def test_json_values_are_read_as_their_text() -> None:
    given = {"tinsmith.use_rslora": True, "tinsmith.lora_alpha": 8, "tinsmith.rank_pattern": {"attn": 4}}
    spec = read_extras(check_metadata(given), 64).of_new_run(SPEC)
    assert (spec.alpha, spec.options) == (8.0, LoraOptions(use_rslora=True, ranks=(("attn", 4),)))


def test_layers_that_are_not_trained_are_refused() -> None:
    check_extras(replace(SPEC, options=LoraOptions(ranks=(("q_proj", 2), ("mlp", 3)))), INFO)
    for name, targets in (("o_proj", Targets()), ("q_proj", Targets(attn=False)), ("mlp", Targets(mlp=False))):
        with pytest.raises(UserError, match=f"{name}.*doesn't train on base; it trains"):
            check_extras(replace(SPEC, targets=targets, options=LoraOptions(alphas=((name, 2.0),))), INFO)


def test_a_tower_is_trained_where_there_is_one() -> None:
    seeing = replace(INFO, layer_widths=(*INFO.layer_widths, ("vision", "fc1", 30)))
    spec = spec_of(train_vision="true", rank_pattern='{"vision": 2, "fc1": 4}')
    check_extras(spec, seeing)
    assert seeing.adapter_bytes(spec) - seeing.adapter_bytes(SPEC) == 4 * 4 * 30
    with pytest.raises(UserError, match=r"tinsmith\.train_vision: base has no vision tower"):
        check_extras(spec, INFO)
    with pytest.raises(UserError, match="'fc1', which this run doesn't train on base"):
        check_extras(replace(spec, targets=Targets()), seeing)
    assert spec_of(train_vision="false") == SPEC
    alone = spec_of(train_vision="only")
    assert alone.targets == Targets(attn=False, mlp=False, unembed=False, vision=True)
    assert read_extras(extra_fields(alone), 64).of_new_run(SPEC) == alone
    with pytest.raises(UserError, match=r"on vision, which tinsmith\.train_vision doesn't change"):
        read_extras({"tinsmith.train_vision": "true"}, 64).require_same(alone, "tinker://x")


def test_a_run_from_a_checkpoint_is_like_it() -> None:
    spec = spec_of(lora_alpha="16")
    read_extras({"tinsmith.lora_alpha": "16.0", "note": "x"}, 64).require_same(spec, "tinker://x")
    for field, value in (
        ("lora_alpha", "8"),
        ("use_rslora", "true"),
        ("lora_dropout", "0.1"),
        ("train_vision", "true"),
    ):
        with pytest.raises(UserError, match=f"tinker://x was made with rank 8.*lora_alpha 16.*tinsmith.{field}"):
            read_extras({f"tinsmith.{field}": value}, 64).require_same(spec, "tinker://x")


def test_the_size_of_an_adapter_goes_by_its_ranks() -> None:
    spec = replace(SPEC, targets=Targets(unembed=False), options=LoraOptions(ranks=(("attn", 2), ("q_proj", 4))))
    assert INFO.adapter_bytes(spec) == 4 * (4 * 10 + 2 * 4 + 8 * 20)


def test_a_full_run_takes_no_fields_of_adapters() -> None:
    check_extras(replace(SPEC, rank=0), INFO)
    for fields in (
        {"lora_alpha": "8"}, {"lora_dropout": "0.1"}, {"rank_pattern": '{"mlp": 2}'}, {"train_vision": "true"},
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{next(iter(fields))} is of adapters"):
            check_extras(replace(spec_of(**fields), rank=0), INFO)
    assert replace(INFO, num_params=7).adapter_bytes(replace(SPEC, rank=0)) == 28
