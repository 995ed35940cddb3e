"""Making runs with every flag through the official SDK, on the real model."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.service import Service

BASE = "tinsmith/tiny"
TEXT = [5, 17, 42, 99, 7, 13]
DATUM = types.Datum(types.ModelInput.from_ints(TEXT[:-1]), loss_fn_inputs={"target_tokens": np.array(TEXT[1:])})


@pytest.fixture(scope="module")
def service(shared_server: Service) -> Service:
    return shared_server


@pytest.fixture(scope="module")
def rest(service: Service) -> tinker.RestClient:
    return tinker.RestClient(base_url=service.url, api_key=service.key)


def make(service: Service, **flags: Any) -> Any:
    client = tinker.ServiceClient(base_url=service.url, api_key=service.key)
    return client.create_lora_training_client(BASE, **flags).result()


def after_a_step(run: Any) -> list[float]:
    """Log-probabilities that depend on how the adapter began and on what was trained of it."""
    run.forward_backward([DATUM], "cross_entropy")
    run.optim_step(types.AdamParams(learning_rate=1e-2))
    return list(run.forward([DATUM], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].tolist())


def test_a_seed_gives_the_same_adapter_to_the_bit(service: Service) -> None:
    first, again, other, drawn = (after_a_step(make(service, rank=8, **seed)) for seed in (
        {"seed": 11}, {"seed": 11}, {"seed": 12}, {},
    ))  # fmt: skip
    assert first == again
    assert first != other
    assert drawn not in (first, other)


def test_each_set_of_targets_is_trained_and_no_other(service: Service, rest: tinker.RestClient) -> None:
    seen: dict[tuple[bool, ...], list[float]] = {}
    sizes: dict[tuple[bool, ...], int] = {}
    for attn, mlp, unembed in product((True, False), repeat=3):
        if not (attn or mlp or unembed):
            continue
        run = make(service, rank=4, seed=1, train_attn=attn, train_mlp=mlp, train_unembed=unembed)
        seen[attn, mlp, unembed] = after_a_step(run)
        info = rest.get_weights_info_by_tinker_path(run.save_state("w").result().path).result()
        assert (info.train_attn, info.train_mlp, info.train_unembed, info.lora_rank) == (attn, mlp, unembed, 4)
        (row,) = rest.list_checkpoints(run.model_id).result().checkpoints
        assert row.size_bytes is not None
        sizes[attn, mlp, unembed] = row.size_bytes
    assert len({tuple(logprobs) for logprobs in seen.values()}) == 7
    everything, parts = sizes[True, True, True], [(True, False, False), (False, True, False), (False, False, True)]
    assert all(sizes[part] < everything for part in parts)
    assert sum(sizes[part] for part in parts) == pytest.approx(everything, rel=0.05)


def test_another_optimizer_is_refused_with_its_alternative(service: Service) -> None:
    with pytest.raises(tinker.RequestFailedError, match="use adamw") as caught:
        make(service, rank=4, optimizer=types.DimuonOptimizerConfig())
    assert caught.value.category == types.RequestErrorCategory.User


def test_metadata_comes_back_as_strings(service: Service, rest: tinker.RestClient) -> None:
    run = make(service, rank=4, user_metadata={"renderer": "plain", "step": 3, "list": [1, None], "deep": {"a": 1.5}})
    metadata = rest.get_training_run(run.model_id).result().user_metadata
    assert metadata == {"renderer": "plain", "step": "3", "list": "[1, null]", "deep": '{"a": 1.5}'}


OPTIONS = {
    "tinsmith.lora_alpha": "16",
    "tinsmith.use_rslora": "true",
    "tinsmith.rank_pattern": '{"k_proj":3,"mlp":12}',
    "tinsmith.alpha_pattern": '{"q_proj":4.5}',
    "tinsmith.lora_dropout": "0.25",
}


def test_each_field_of_an_adapter_changes_what_is_learned(service: Service) -> None:
    plain = after_a_step(make(service, rank=8, seed=1))
    assert after_a_step(make(service, rank=8, seed=1, user_metadata={"tinsmith.lora_alpha": "32"})) == plain
    each = [after_a_step(make(service, rank=8, seed=1, user_metadata={name: value})) for name, value in OPTIONS.items()]
    assert len({tuple(logprobs) for logprobs in [plain, *each]}) == 1 + len(OPTIONS)


def test_a_run_made_from_a_checkpoint_keeps_the_options_and_shows_them(
    service: Service, rest: tinker.RestClient
) -> None:
    client = tinker.ServiceClient(base_url=service.url, api_key=service.key)
    run = make(service, rank=8, seed=2, user_metadata={**OPTIONS, "note": "mine"})
    before = after_a_step(run)
    path = run.save_state("w").result().path
    again = client.create_training_client_from_state_with_optimizer(path).result()
    assert list(again.forward([DATUM], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].tolist()) == before
    assert rest.get_training_run(run.model_id).result().user_metadata == {**OPTIONS, "note": "mine"}
    assert rest.get_training_run(again.model_id).result().user_metadata == OPTIONS
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(TEXT)
    assert sampler.compute_logprobs(prompt).result()[1:] == pytest.approx(
        run.forward([DATUM], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].tolist(), abs=1e-5
    )
    other = make(service, rank=8)
    with (
        pytest.warns(FutureWarning, match="DEPRECATED"),
        pytest.raises(tinker.RequestFailedError, match=r"rank_pattern.*make a run with"),
    ):
        other.load_state(path).result()
    with pytest.raises(tinker.RequestFailedError, match="lora_alpha doesn't change"):
        client.create_training_client_from_state(path, user_metadata={"tinsmith.lora_alpha": "8"}).result()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tinsmith.alpha": "8"}, "there is no field 'tinsmith.alpha'"),
        ({"tinsmith.lora_alpha": "x"}, "tinsmith.lora_alpha must be a number"),
        ({"tinsmith.rank_pattern": '{"x_proj": 3}'}, "'x_proj', which this run doesn't train"),
    ],
)
def test_fields_that_cannot_be_are_refused_by_name(service: Service, fields: dict[str, str], message: str) -> None:
    with pytest.raises(tinker.RequestFailedError, match=message) as caught:
        make(service, rank=8, user_metadata=fields)
    assert caught.value.category == types.RequestErrorCategory.User


def test_full_fine_tuning_is_off_unless_it_is_set(service: Service) -> None:
    with pytest.raises(tinker.RequestFailedError, match=r"full fine-tuning, which .*1\.\.128"):
        make(service, rank=0)
