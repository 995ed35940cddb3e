"""The official SDK on tokens, sessions, runs, usage and audit."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as perfetto_pb
from tinker import types
from tinker.types import AccessibleSearchOwner, SessionSearchRequest

from tests.service import Service, running, until

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::tinker.lib.experimental.ExperimentalWarning",
)
BASE = "tinsmith/tiny"
TEXT = [5, 17, 42, 99, 7]
CHUNK = 3


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    flags = ("--device", "fake", "--jwt-auth", "--chunk-max-datums", str(CHUNK))
    with running(tmp_path_factory.mktemp("usage") / "data", *flags) as service:
        yield service


@pytest.fixture(scope="module")
def rest(service: Service) -> tinker.RestClient:
    return tinker.RestClient(base_url=service.url, api_key=service.key)


@pytest.fixture(scope="module")
def admin(service: Service) -> tinker.AdminClient:
    return tinker.AdminClient(base_url=service.url, api_key=service.key)


@pytest.fixture(scope="module")
def run(service: Service) -> Any:
    """Trained on 15 tokens, saved, sampled; its session is called "nightly"."""
    client = tinker.ServiceClient(
        base_url=service.url, api_key=service.key, display_name="nightly", user_metadata={"team": "a"}
    )
    run = client.create_lora_training_client(BASE, rank=4, seed=3, user_metadata={"renderer": "plain"}).result()
    data = types.Datum(types.ModelInput.from_ints(TEXT), loss_fn_inputs={"target_tokens": np.array(TEXT)})
    run.forward_backward([data, data], "cross_entropy").result()
    run.forward([data], "cross_entropy").result()
    run.optim_step(types.AdamParams()).result()
    run.save_state("kept").result()
    path = run.save_weights_for_sampler("kept").result().path
    sampler = client.create_sampling_client(model_path=path).result()
    params = types.SamplingParams(max_tokens=4, stop=[])
    sampler.sample(types.ModelInput.from_ints(TEXT), 2, params).result()
    return run


def window() -> tuple[datetime, datetime]:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    return hour - timedelta(hours=1), hour + timedelta(hours=1)


def session_of(run: Any) -> str:
    return str(run.model_id.partition(":")[0])


def test_settings_reach_the_client(service: Service, run: Any) -> None:
    """More datums than a chunk holds: several requests, one answer."""
    holder = run.holder
    assert holder._client_config.fwdbwd_max_chunk_len == CHUNK
    assert holder._client_config.pjwt_auth_enabled
    data = types.Datum(types.ModelInput.from_ints(TEXT), loss_fn_inputs={"target_tokens": np.array(TEXT)})
    before = run._request_id_counter
    assert len(run.forward([data] * (2 * CHUNK + 1), "cross_entropy").result().loss_fn_outputs) == 2 * CHUNK + 1
    assert run._request_id_counter == before + 3


def test_whoami(rest: tinker.RestClient) -> None:
    who = rest.whoami().result()
    assert who.user_urn.startswith("tml:organization_user:t")
    assert who.org_urn.startswith("tml:organization:t")
    assert who.email is None


def test_a_token_that_the_server_no_longer_knows_is_replaced(tmp_path: Path) -> None:
    """A new secret ends all tokens; the client exchanges its key once more and goes on."""
    with running(tmp_path / "data", "--device", "fake", "--jwt-auth") as service:
        rest = tinker.RestClient(base_url=service.url, api_key=service.key)
        rest.list_sessions().result()
        token = rest.holder._default_auth._token
        (service.data_dir / "signing.key").unlink()
        old = service.kill_api()
        until(lambda: service.info()["api_pid"] != old and service.is_ready(), 30)
        assert rest.list_sessions().result().sessions == []
        assert rest.holder._default_auth._token != token


def test_short_tokens_are_renewed(tmp_path: Path) -> None:
    with running(tmp_path / "data", "--device", "fake", "--jwt-auth", "--jwt-ttl-s", "1") as service:
        rest = tinker.RestClient(base_url=service.url, api_key=service.key)
        for _ in range(3):
            assert rest.list_sessions().result().sessions == []
            time.sleep(1.1)


def test_usage_is_what_was_computed(admin: tinker.AdminClient, run: Any) -> None:
    usage = admin.get_billing_usage(*window()).result()
    mine = [event for event in usage.data if event.session_id == session_of(run)]
    assert {event.base_model for event in mine} == {BASE}
    infos = [event.event_info for event in mine]
    assert sum(info.token_count for info in infos if isinstance(info, types.SamplingPrefillBillingEvent)) == len(TEXT)
    assert sum(info.token_count for info in infos if isinstance(info, types.SamplingSampleBillingEvent)) == 2 * 4
    assert sum(info.token_count for info in infos if isinstance(info, types.TrainingBillingEvent)) % len(TEXT) == 0
    assert sum(info.count for info in infos if isinstance(info, types.CheckpointBillingEvent)) == 2
    assert sum(info.gigabyte_hours for info in infos if isinstance(info, types.StorageBillingEvent)) > 0
    assert usage.sessions[session_of(run)].user_metadata == {"team": "a"}
    assert [event.bucket_start for event in usage.data] == sorted(event.bucket_start for event in usage.data)


def test_storage_now(admin: tinker.AdminClient, run: Any) -> None:
    (item,) = admin.get_current_checkpoint_storage_usage().result().data
    assert item.checkpoint_count == 2
    assert item.size_bytes > 0
    assert admin.get_current_checkpoint_storage_usage(project_id="nothing").result().data == []


def test_audit(admin: tinker.AdminClient, run: Any) -> None:
    entries = admin.get_audit_log().result().entries
    assert [entry.event for entry in entries][:2] == ["organization_create", "organization_key_create"]
    assert admin.get_audit_log("checkpoints", datetime.now(UTC).date()).result().entries == []


def test_sessions_and_projects(rest: tinker.RestClient, run: Any) -> None:
    session_id = session_of(run)
    assert session_id in rest.list_sessions(access_scope="accessible").result().sessions
    session = rest.get_session(session_id).result()
    assert session.training_run_ids == [run.model_id]
    assert session.sampler_ids == [f"{session_id}:sample:0"]
    assert (session.display_name, session.user_metadata) == ("nightly", {"team": "a"})
    rest.assign_session_project(session_id, "alpha").result()
    assert [r.training_run_id for r in rest.list_training_runs(project_id="alpha").result().training_runs] == [
        run.model_id
    ]
    assert rest.list_training_runs(project_id="beta").result().cursor.total_count == 0
    request = SessionSearchRequest(display_name="NIGHT", owner=AccessibleSearchOwner(), project_ids=["alpha"], limit=1)
    page = rest.search_sessions(request).result()
    (summary,) = page.sessions
    assert summary.session_id == session_id
    assert summary.checkpoints_count == 2
    assert isinstance(summary.status, types.SessionActive)
    assert page.next_cursor is None
    everything = rest.search_sessions(SessionSearchRequest(limit=1)).result()
    if everything.next_cursor is not None:
        following = rest.search_sessions(SessionSearchRequest(limit=1, cursor=everything.next_cursor)).result()
        assert following.sessions[0].session_id != everything.sessions[0].session_id


def test_a_run_tells_all_about_itself(rest: tinker.RestClient, run: Any) -> None:
    info = run.get_info()
    assert info.model_data.model_name == info.model_name == BASE
    assert info.model_data.arch
    assert info.model_data.tokenizer_id
    assert run.get_tokenizer().decode(TEXT)
    assert (info.is_lora, info.lora_rank) == (True, 4)
    row = rest.get_training_run(run.model_id).result()
    assert row.user_metadata == {"renderer": "plain"}
    assert row.last_checkpoint is not None
    assert row.last_sampler_checkpoint is not None
    assert row.last_checkpoint.checkpoint_id == "weights/kept"
    assert row.last_sampler_checkpoint.checkpoint_id == "sampler_weights/kept"
    assert abs(row.last_request_time - datetime.now(UTC)) < timedelta(minutes=3)
    assert row.corrupted is False


def test_a_trace_of_the_session(rest: tinker.RestClient, run: Any) -> None:
    session_id = session_of(run)
    with urllib.request.urlopen(rest.export_session_trace(session_id).result(), timeout=10) as response:
        trace = perfetto_pb.Trace.FromString(response.read())
    names = {packet.track_descriptor.name for packet in trace.packet}
    assert {"session nightly", run.model_id, f"{session_id}:sample:0"} <= names
    events = {packet.track_event.name for packet in trace.packet}
    assert {"create 0", "forward_backward 1", "optim_step 3", "sample 0", "queued", "running"} <= events
