"""Full fine-tuning through the official SDK, beside an adapter of somebody else, and out as a model directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.service import Service, running
from tinsmith.bases import SHIPPED_PATH
from tinsmith.export_command import Format, export_command

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


def test_what_a_full_run_cannot_do_is_refused_by_name(service: Service, client: tinker.ServiceClient) -> None:
    full = client.create_lora_training_client(BASE, rank=0).result()
    with pytest.raises(tinker.RequestFailedError, match=r"trains all weights .*can't be sampled from"):
        full.save_weights_for_sampler("s").result()
    with pytest.raises(tinker.RequestFailedError, match=r"trains all weights .*can't be saved as an adapter"):
        full.save_weights_external("e").result()
    with pytest.raises(tinker.RequestFailedError, match="leave out train_attn"):
        client.create_lora_training_client(BASE, rank=0, train_mlp=False).result()
    with pytest.raises(tinker.RequestFailedError, match=r"tinsmith\.lora_alpha is of adapters"):
        client.create_lora_training_client(BASE, rank=0, user_metadata={"tinsmith.lora_alpha": "8"}).result()


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
