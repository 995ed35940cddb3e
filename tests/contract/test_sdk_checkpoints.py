"""Checkpoints as the official SDK and peft see them, against a real server with the shipped model."""

from __future__ import annotations

import io
import json
import tarfile
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyrage
import pytest
import tinker
import torch
from peft import PeftModel
from tinker import types
from transformers import AutoModelForCausalLM

from tests.contract.raw import Raw
from tests.service import Service
from tinsmith.bases.catalog import SHIPPED_NAME, SHIPPED_PATH

BOUND = 1e-5  # between our own numbers
FLOAT32 = 3e-5  # from float64: 1.4e-5 at worst was seen here, and plain transformers in float32 is no closer
TEXT = [5, 17, 42, 99, 7, 13, 28, 64, 311, 702, 5, 5]
FILES = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def service(shared_server: Service) -> Service:
    return shared_server


@pytest.fixture(scope="module")
def client(service: Service) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=service.url, api_key=service.key, project_id="home")


@pytest.fixture(scope="module")
def rest(service: Service) -> Any:
    return tinker.RestClient(base_url=service.url, api_key=service.key)


@pytest.fixture(scope="module")
def stranger_key(service: Service) -> str:
    raw = Raw(service.url, service.key)
    key = raw.good("/admin/keys", json={"name": "laptop", "tenant": "stranger"}).json()["secret"]
    raw.close()
    return str(key)


@pytest.fixture(scope="module")
def stranger(service: Service, stranger_key: str) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=service.url, api_key=stranger_key, project_id="abroad")


@pytest.fixture(scope="module")
def stranger_rest(service: Service, stranger_key: str) -> Any:
    return tinker.RestClient(base_url=service.url, api_key=stranger_key)


@pytest.fixture(scope="module")
def run(client: tinker.ServiceClient) -> Any:
    """A run that has learned a little, so that B isn't zero."""
    run = client.create_lora_training_client(SHIPPED_NAME, rank=8, seed=1, user_metadata={"renderer": "plain"}).result()
    train(run)
    return run


def train(run: Any, steps: int = 3) -> None:
    for _ in range(steps):
        run.forward_backward([datum()], "cross_entropy").result()
        run.optim_step(types.AdamParams(learning_rate=1e-3)).result()


def datum() -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(TEXT[:-1]), loss_fn_inputs={"target_tokens": np.array(TEXT[1:])}
    )


def logprobs(run: Any) -> np.ndarray:
    return np.array(run.forward([datum()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy())


def fetch(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
        return bytes(answer.read())


def archive(service: Service, path: str) -> bytes:
    """As SDK releases before 0.36 ask for it."""
    place = path.removeprefix("tinker://").replace("/", "/checkpoints/", 1)
    headers = {"X-API-Key": service.key, "Accept": "application/json"}
    link = json.loads(fetch(f"{service.url}/api/v1/training_runs/{place}/archive", **headers))
    assert set(link) == {"url", "expires"}
    return fetch(link["url"])


def unpack(data: bytes, to: Path) -> Path:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r") as tar:
        assert tar.getnames() == [*FILES, "checkpoint_complete"]
        tar.extractall(to, filter="data")
    return to


def peft_logprobs(directory: Path) -> np.ndarray:
    """In float64."""
    base = AutoModelForCausalLM.from_pretrained(SHIPPED_PATH, dtype=torch.float64, attn_implementation="eager")
    with warnings.catch_warnings():  # others, as of keys that don't fit, are errors
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(base, directory).double()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TEXT[:-1]])).logits[0].log_softmax(-1)
    return logits.gather(1, torch.tensor(TEXT[1:])[:, None])[:, 0].numpy()


class TestFiles:
    """What is downloaded is what was trained."""

    @pytest.mark.parametrize("kind", ["sampler", "training"])
    def test_peft_computes_the_trainers_logprobs(self, service: Service, run: Any, kind: str, tmp_path: Path) -> None:
        save = run.save_weights_for_sampler if kind == "sampler" else run.save_state
        path = save(f"peft-{kind}").result().path
        found = peft_logprobs(unpack(archive(service, path), tmp_path))
        np.testing.assert_allclose(found, logprobs(run), rtol=0, atol=FLOAT32)

    def test_peft_computes_the_samplers_logprobs(self, client: Any, run: Any, service: Service, tmp_path: Path) -> None:
        path = run.save_weights_for_sampler("peft").result().path
        sampler = client.create_sampling_client(model_path=path).result()
        ours = sampler.compute_logprobs(types.ModelInput.from_ints(TEXT)).result()[1:]
        theirs = peft_logprobs(unpack(archive(service, path), tmp_path))
        np.testing.assert_allclose(theirs, np.array(ours), rtol=0, atol=FLOAT32)

    def test_only_what_was_trained_is_in_the_files(self, client: Any, service: Service, tmp_path: Path) -> None:
        run = client.create_lora_training_client(
            SHIPPED_NAME, rank=4, seed=2, train_mlp=False, train_unembed=False
        ).result()
        train(run, 1)
        directory = unpack(archive(service, run.save_weights_for_sampler("attn").result().path), tmp_path)
        config = json.loads((directory / FILES[0]).read_text())
        assert (config["r"], config["lora_alpha"]) == (4, 32)
        assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
        np.testing.assert_allclose(peft_logprobs(directory), logprobs(run), rtol=0, atol=FLOAT32)

    def test_an_external_checkpoint_is_fetched_file_by_file(self, rest: Any, run: Any, tmp_path: Path) -> None:
        path = run.save_weights_external("plain").result().path
        assert path == f"tinker://{run.model_id}/external_weights/plain"
        links = rest.get_external_weights_urls(path).result()
        assert sorted(links.urls) == FILES
        for name, url in links.urls.items():
            (tmp_path / name).write_bytes(fetch(url))
        np.testing.assert_allclose(peft_logprobs(tmp_path), logprobs(run), rtol=0, atol=FLOAT32)

    def test_an_encrypted_export_opens_with_each_of_its_keys(
        self, rest: Any, run: Any, service: Service, tmp_path: Path
    ) -> None:
        ours, other, third = (pyrage.x25519.Identity.generate() for _ in range(3))
        recipients = [str(ours.to_public()), str(other.to_public())]
        path = run.save_weights_external("sealed", age_encryption_recipients=recipients).result().path
        urls = rest.get_external_weights_urls(path).result().urls
        assert sorted(urls) == [f"{name}.age" for name in FILES]
        for name, url in urls.items():
            sealed = fetch(url)
            (tmp_path / name.removesuffix(".age")).write_bytes(pyrage.decrypt(sealed, [ours]))
            assert pyrage.decrypt(sealed, [other]) == pyrage.decrypt(sealed, [ours])
            with pytest.raises(pyrage.DecryptError):
                pyrage.decrypt(sealed, [third])
        np.testing.assert_allclose(peft_logprobs(tmp_path), logprobs(run), rtol=0, atol=FLOAT32)
        secret = str(ours)
        assert secret not in service.log.read_text()

    def test_bad_recipients_fail_the_request_alone(self, run: Any) -> None:
        with pytest.raises(tinker.RequestFailedError, match=r"age_encryption_recipients\[0\] is no public key"):
            run.save_weights_external("x", age_encryption_recipients=["age1nonsense"]).result()
        with pytest.raises(tinker.RequestFailedError, match="at most 10"):
            run.save_weights_external("x", age_encryption_recipients=["age1"] * 11).result()
        with pytest.raises(tinker.RequestFailedError, match="checkpoint name"):
            run.save_weights_external("../x").result()
        assert run.save_weights_external("after").result().path.endswith("/after")

    def test_an_external_checkpoint_is_not_loaded_or_sampled(self, client: Any, run: Any) -> None:
        path = run.save_weights_external("outside").result().path
        with pytest.raises(tinker.RequestFailedError, match="for other programs"):
            client.create_training_client_from_state(path).result()
        with pytest.raises(tinker.BadRequestError, match="no checkpoint to sample from"):
            client.create_sampling_client(model_path=path).result()


class TestSharing:
    def test_a_published_path_is_for_everybody(
        self, run: Any, rest: Any, stranger: Any, stranger_rest: Any, client: Any
    ) -> None:
        training, sampler = run.save_state("shared").result().path, run.save_weights_for_sampler("shared").result().path
        expected = logprobs(run)
        with pytest.raises(tinker.RequestFailedError, match="no checkpoint"):
            stranger.create_training_client_from_state(training).result()
        for path in (training, sampler, training):
            rest.publish_checkpoint_from_tinker_path(path).result()
        assert {c.checkpoint_id for c in rest.list_checkpoints(run.model_id).result().checkpoints if c.public} >= {
            "weights/shared",
            "sampler_weights/shared",
        }
        theirs = stranger.create_training_client_from_state_with_optimizer(training).result()
        np.testing.assert_array_equal(logprobs(theirs), expected)
        sampling = stranger.create_sampling_client(model_path=sampler).result()
        found = sampling.compute_logprobs(types.ModelInput.from_ints(TEXT)).result()[1:]
        np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=BOUND)
        assert stranger_rest.get_weights_info_by_tinker_path(training).result().lora_rank == 8

        for path in (training, sampler, sampler):
            rest.unpublish_checkpoint_from_tinker_path(path).result()
        with pytest.raises(tinker.RequestFailedError, match="no checkpoint"):
            stranger.create_training_client_from_state(training).result()
        assert sampling.compute_logprobs(types.ModelInput.from_ints(TEXT)).result()[1:] == found

    def test_nothing_but_the_path_is_open(self, run: Any, rest: Any, stranger_rest: Any) -> None:
        path = run.save_state("bare").result().path
        rest.publish_checkpoint_from_tinker_path(path).result()
        attempts = [
            lambda: stranger_rest.list_checkpoints(run.model_id),
            lambda: stranger_rest.get_training_run(run.model_id),
            lambda: stranger_rest.delete_checkpoint_from_tinker_path(path),
            lambda: stranger_rest.set_checkpoint_ttl_from_tinker_path(path, 3600),
            lambda: stranger_rest.unpublish_checkpoint_from_tinker_path(path),
        ]
        for attempt in attempts:
            with pytest.raises(tinker.NotFoundError):
                attempt().result()
        assert path not in [c.tinker_path for c in stranger_rest.list_user_checkpoints().result().checkpoints]

    def test_a_token_opens_one_checkpoint(self, service: Service, run: Any, stranger: Any, stranger_rest: Any) -> None:
        path, other = run.save_state("lent").result().path, run.save_state("kept").result().path
        raw = Raw(service.url, service.key)
        made = raw.good(f"/training_runs/{run.model_id}/checkpoints/weights/lent/access_token", json={}).json()
        raw.close()
        token = made["token"]
        copied = stranger_rest.copy_weights(path, "abroad", weights_access_token=token).result()
        np.testing.assert_array_equal(
            logprobs(stranger.create_training_client_from_state(copied).result()), logprobs(run)
        )
        loaded = stranger.create_training_client_from_state(path, weights_access_token=token).result()
        np.testing.assert_array_equal(logprobs(loaded), logprobs(run))
        for bad in (token[:-1] + ("0" if token[-1] != "0" else "1"), "tml-nonsense", token + "x", "tmlw-."):
            with pytest.raises(tinker.NotFoundError):
                stranger_rest.copy_weights(path, "abroad", weights_access_token=bad).result()
        with pytest.raises(tinker.NotFoundError):
            stranger_rest.copy_weights(other, "abroad", weights_access_token=token).result()
        assert token not in service.log.read_text()

    def test_a_key_of_the_owner_is_a_token_too(self, service: Service, run: Any, stranger_rest: Any) -> None:
        path = run.save_state("by-key").result().path
        copied = stranger_rest.copy_weights(path, "abroad", weights_access_token=service.key).result()
        assert copied != path


class TestCopies:
    def test_a_copy_outlives_its_source(self, client: Any, run: Any, rest: Any) -> None:
        path = run.save_state("origin", user_metadata={"step": "7"}).result().path
        expected = logprobs(run)
        copied = client.copy_weights(path, ttl_seconds=7200).result()
        copy_run = copied.removeprefix("tinker://").split("/")[0]
        assert copied == f"tinker://{copy_run}/weights/origin"
        (row,) = rest.list_checkpoints(copy_run).result().checkpoints
        assert row.user_metadata == {"step": "7"}
        assert row.expires_at is not None
        described = rest.get_training_run(copy_run).result()
        assert described.user_metadata == {"renderer": "plain", "copied_from": path}
        rest.delete_checkpoint_from_tinker_path(path).result()
        again = client.create_training_client_from_state_with_optimizer(copied).result()
        np.testing.assert_array_equal(logprobs(again), expected)

    def test_a_copied_sampler_samples(self, client: Any, run: Any) -> None:
        path = run.save_weights_for_sampler("origin").result().path
        copied = client.copy_weights(path).result()
        prompt = types.ModelInput.from_ints(TEXT)
        ours, theirs = (
            client.create_sampling_client(model_path=one).result().compute_logprobs(prompt).result()
            for one in (path, copied)
        )
        assert ours == theirs

    def test_the_run_of_a_copy_is_not_trained(self, service: Service, client: Any, run: Any) -> None:
        copied = client.copy_weights(run.save_state("frozen").result().path).result()
        raw = Raw(service.url, service.key)
        body = {"model_id": copied.removeprefix("tinker://").split("/")[0], "seq_id": 1, "adam_params": {}}
        found = raw.ask("POST", "/optim_step", json=body)
        raw.close()
        assert "can't be trained" in found.message

    def test_a_path_that_leads_nowhere(self, client: Any, run: Any) -> None:
        with pytest.raises(tinker.NotFoundError):
            client.copy_weights(f"tinker://{run.model_id}/weights/nothing").result()


def test_a_link_ends_with_its_checkpoint(run: Any, rest: Any) -> None:
    path = run.save_weights_external("short").result().path
    urls = rest.get_external_weights_urls(path).result().urls
    whole = fetch(urls[FILES[1]])
    assert fetch(urls[FILES[1]], Range="bytes=100-") == whole[100:]
    rest.delete_checkpoint_from_tinker_path(path).result()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(urls[FILES[1]])
