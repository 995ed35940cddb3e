"""Full fine-tuning through the official SDK, beside an adapter of somebody else, and out as a model directory."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyrage
import pytest
import tinker
import torch
from tinker import types
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.contract.test_sdk_checkpoints import archive, fetch
from tests.service import Service, running
from tinsmith.bases.catalog import SHIPPED_PATH
from tinsmith.cli.export import Format, export_command
from tinsmith.cli.importing import import_command

BASE = "tinsmith/tiny"
TEXT = [5, 17, 42, 99, 7, 13, 250, 31]
DATUM = types.Datum(types.ModelInput.from_ints(TEXT[:-1]), loss_fn_inputs={"target_tokens": np.array(TEXT[1:])})
STEP = types.AdamParams(learning_rate=1e-3)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("full") / "data", "--full-fine-tuning") as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=service.url, api_key=service.key)


def logprobs(run: Any) -> list[float]:
    return list(run.forward([DATUM], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].tolist())


def train(run: Any) -> list[float]:
    run.forward_backward([DATUM], "cross_entropy")
    run.optim_step(STEP)
    return logprobs(run)


def test_it_is_trained_saved_and_gone_on_with(
    service: Service, client: tinker.ServiceClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = client.create_lora_training_client(BASE, rank=4, seed=1).result()
    before = logprobs(adapter)
    full = client.create_lora_training_client(BASE, rank=0).result()
    assert logprobs(full) == pytest.approx(before, abs=2e-2)  # the base's weights, which are served in their own dtype
    begun = logprobs(full)
    assert sum(train(full)) > sum(begun)
    assert logprobs(adapter) == before
    info = full.get_info()
    assert (info.is_lora, info.lora_rank) == (False, None)
    path = full.save_state("w").result().path
    again = client.create_training_client_from_state_with_optimizer(path).result()
    assert logprobs(again) == logprobs(full)
    assert train(again) == train(full)
    rest = tinker.RestClient(base_url=service.url, api_key=service.key)
    assert not rest.get_training_run(again.model_id).result().is_lora
    assert not rest.get_weights_info_by_tinker_path(path).result().is_lora

    monkeypatch.setenv("TINKER_BASE_URL", service.url)
    monkeypatch.setenv("TINKER_API_KEY", service.key)
    path = full.save_state("v").result().path
    out = tmp_path / "model"
    export(path, out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    AutoTokenizer.from_pretrained(out)
    with torch.no_grad():
        found = model(input_ids=torch.tensor([TEXT[:-1]])).logits[0].log_softmax(-1)
    theirs = found.gather(1, torch.tensor(TEXT[1:])[:, None])[:, 0]
    np.testing.assert_allclose(logprobs(full), theirs.numpy(), atol=1e-5, rtol=0)


def export(path: str, out: Path) -> None:
    export_command(path, out, Format.HF, base=SHIPPED_PATH)


def test_what_a_full_run_cannot_do_is_refused_by_name(client: tinker.ServiceClient) -> None:
    with pytest.raises(tinker.RequestFailedError, match="leave out train_attn"):
        client.create_lora_training_client(BASE, rank=0, train_mlp=False).result()
    with pytest.raises(tinker.RequestFailedError, match=r"tinsmith\.lora_alpha is of adapters"):
        client.create_lora_training_client(BASE, rank=0, user_metadata={"tinsmith.lora_alpha": "8"}).result()


def drawn(sampler: tinker.SamplingClient) -> tuple[list[int], list[float]]:
    params = types.SamplingParams(max_tokens=12, seed=7)
    found = sampler.sample(types.ModelInput.from_ints(TEXT), 1, params).result().sequences[0]
    assert found.logprobs is not None
    return list(found.tokens), list(found.logprobs)


def as_trained(run: Any, tokens: list[int]) -> list[float]:
    """The trainer's logprobs of tokens that follow the text."""
    whole = TEXT + tokens
    inputs = {"target_tokens": np.array(whole[1:])}
    datum = types.Datum(types.ModelInput.from_ints(whole[:-1]), loss_fn_inputs=inputs)
    result = run.forward([datum], "cross_entropy").result()
    return list(result.loss_fn_outputs[0]["logprobs"].tolist())[len(TEXT) - 1 :]


def test_it_is_sampled_from_after_every_step(service: Service, client: tinker.ServiceClient) -> None:
    """Three snapshots where two have a place, the base and an adapter beside them; all the same once a worker died."""
    plain = client.create_sampling_client(base_model=BASE).result()
    adapter = client.create_lora_training_client(BASE, rank=4, seed=1).result()
    others = [plain, adapter.save_weights_and_get_sampling_client().result()]
    of_others = [drawn(sampler) for sampler in others]
    full = client.create_lora_training_client(BASE, rank=0).result()
    samplers: list[tinker.SamplingClient] = []
    found: list[tuple[list[int], list[float]]] = []
    for _ in range(2):
        train(full)
        samplers.append(full.save_weights_and_get_sampling_client().result())
        tokens, lp = drawn(samplers[-1])
        np.testing.assert_allclose(lp, as_trained(full, tokens), atol=1e-5, rtol=0)
        found.append((tokens, lp))
    train(full)
    path = full.save_weights_for_sampler("named").result().path
    samplers.append(client.create_sampling_client(model_path=path).result())
    found.append(drawn(samplers[-1]))
    np.testing.assert_allclose(found[-1][1], as_trained(full, found[-1][0]), atol=1e-5, rtol=0)
    assert len({tuple(lp) for _, lp in found}) == 3
    assert [drawn(sampler) for sampler in samplers] == found
    late = full.save_weights_and_get_sampling_client().result()
    service.kill_worker()
    assert [drawn(sampler) for sampler in [*samplers, late]] == [*found, found[-1]]
    assert [drawn(sampler) for sampler in others] == of_others


def test_its_checkpoints_go_out_and_come_in(
    service: Service, client: tinker.ServiceClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model, as an archive, encrypted, and as a state that another server would take."""
    monkeypatch.setenv("TINKER_BASE_URL", service.url)
    monkeypatch.setenv("TINKER_API_KEY", service.key)
    rest = tinker.RestClient(base_url=service.url, api_key=service.key)
    full = client.create_lora_training_client(BASE, rank=0).result()
    train(full)
    path = full.save_weights_for_sampler("s").result().path
    want = drawn(client.create_sampling_client(model_path=path).result())
    export(path, tmp_path / "model")
    with tarfile.open(fileobj=io.BytesIO(archive(service, path))) as tar:
        tar.extractall(tmp_path / "archive", filter="data")
    external = full.save_weights_external("e").result().path
    urls = rest.get_external_weights_urls(external).result().urls
    (tmp_path / "external").mkdir()
    for name, url in urls.items():
        (tmp_path / "external" / name).write_bytes(fetch(url))
    for place in ("model", "archive", "external"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / place)
        assert model.dtype == torch.float32
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([TEXT + want[0][:-1]])).logits[0]
        theirs = logits.log_softmax(-1)[len(TEXT) - 1 :].gather(1, torch.tensor(want[0])[:, None])[:, 0]
        np.testing.assert_allclose(want[1], theirs.numpy(), atol=1e-5, rtol=0)
    key = pyrage.x25519.Identity.generate()
    sealed = full.save_weights_external("x", age_encryption_recipients=[str(key.to_public())]).result().path
    sealed_url = rest.get_external_weights_urls(sealed).result().urls["model.safetensors.age"]
    opened = pyrage.decrypt(fetch(sealed_url), [key])
    assert opened == (tmp_path / "external" / "model.safetensors").read_bytes()

    state = full.save_state("v").result().path
    export_command(state, tmp_path / "state.tar", Format.STATE)
    import_command(tmp_path / "state.tar", name="in")
    (imported,) = [
        c for c in rest.list_user_checkpoints().result().checkpoints if c.tinker_path.endswith("/weights/in")
    ]
    again = client.create_training_client_from_state_with_optimizer(imported.tinker_path).result()
    assert [train(again), train(again)] == [train(full), train(full)]
    into = client.create_lora_training_client(BASE, rank=0).result()
    with pytest.warns(FutureWarning, match="load_state"):
        into.load_state(imported.tinker_path).result()
    path = imported.tinker_path.replace("/weights/", "/sampler_weights/")
    there = client.create_sampling_client(model_path=path).result()
    assert drawn(there) == want
    assert drawn(into.save_weights_and_get_sampling_client().result()) == want


def test_a_killed_worker_changes_no_bit_of_what_is_learned(service: Service, client: tinker.ServiceClient) -> None:
    """Of a full run, and of one with dropout: gradients that were accumulated are computed again."""
    dropping = {"tinsmith.lora_dropout": "0.3", "tinsmith.rank_pattern": '{"k_proj": 3}'}
    makings: list[dict[str, Any]] = [{"rank": 0}, {"rank": 8, "seed": 3, "user_metadata": dropping}]
    undisturbed, disturbed = (
        [client.create_lora_training_client(BASE, **making).result() for making in makings] for _ in range(2)
    )
    want = [[train(run), train(run)] for run in undisturbed]
    first = [train(run) for run in disturbed]
    for run in disturbed:
        run.forward_backward([DATUM], "cross_entropy").result()
    service.kill_worker()
    for run in disturbed:
        run.optim_step(STEP)
    assert [[one, logprobs(run)] for one, run in zip(first, disturbed, strict=True)] == want
