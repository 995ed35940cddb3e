"""Checkpoints as any supported SDK manages and downloads them; see suite.py."""

from __future__ import annotations

import datetime as dt
import io
import json
import tarfile
import urllib.request
from typing import Any

import numpy as np
import pytest
import tinker
from common import BASE, current, done, step
from tinker.lib.public_interfaces.rest_client import RestClient


@pytest.fixture(scope="module")
def client() -> tinker.ServiceClient:
    return tinker.ServiceClient()


@pytest.fixture
def run(client: Any) -> Any:
    return done(client.create_lora_training_client(BASE, rank=8, seed=3))


@pytest.fixture
def rest(client: Any) -> Any:
    return client.create_rest_client()


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        return bytes(answer.read())


def test_publishing(run: Any, rest: Any) -> None:
    path = run.save_state("shown").result().path
    for call, expected in (
        (rest.publish_checkpoint_from_tinker_path, True),
        (rest.publish_checkpoint_from_tinker_path, True),
        (rest.unpublish_checkpoint_from_tinker_path, False),
        (rest.unpublish_checkpoint_from_tinker_path, False),
    ):
        call(path).result()
        (row,) = rest.list_checkpoints(run.model_id).result().checkpoints
        assert row.public is expected


@pytest.mark.skipif(
    not hasattr(RestClient, "get_checkpoint_archive_url_from_tinker_path"), reason="later releases fetch file by file"
)
def test_an_archive_is_a_tar_behind_a_link(run: Any, rest: Any) -> None:
    for path in (run.save_state("packed").result().path, run.save_weights_for_sampler("packed").result().path):
        link = rest.get_checkpoint_archive_url_from_tinker_path(path).result()
        assert link.expires > dt.datetime.now(dt.UTC)
        with tarfile.open(fileobj=io.BytesIO(fetch(link.url))) as tar:
            assert tar.getnames() == ["adapter_config.json", "adapter_model.safetensors", "checkpoint_complete"]


@pytest.mark.skipif(
    not hasattr(tinker.TrainingClient, "save_weights_external"), reason="earlier releases fetch an archive"
)
def test_external_weights_are_fetched_file_by_file(run: Any, rest: Any) -> None:
    path = run.save_weights_external("out", ttl_seconds=3600).result().path
    links = rest.get_external_weights_urls(path).result()
    assert links.expires > dt.datetime.now(dt.UTC)
    config = json.loads(fetch(links.urls["adapter_config.json"]))
    assert (config["r"], config["lora_alpha"]) == (8, 32)
    assert len(fetch(links.urls["adapter_model.safetensors"])) > 1000
    (row,) = rest.list_checkpoints(run.model_id).result().checkpoints
    assert (row.checkpoint_type, row.expires_at is not None) == ("external", True)
    rest.delete_checkpoint_from_tinker_path(path).result()


@pytest.mark.skipif(not hasattr(RestClient, "copy_weights"), reason="earlier releases have no RestClient.copy_weights")
def test_a_copy_is_a_checkpoint_of_its_own(client: Any, run: Any, rest: Any) -> None:
    step(run)
    path = run.save_state("origin").result().path
    copied = rest.copy_weights(path, "elsewhere").result()
    rest.delete_checkpoint_from_tinker_path(path).result()
    np.testing.assert_array_equal(current(done(client.create_training_client_from_state(copied))), current(run))
