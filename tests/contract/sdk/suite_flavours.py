"""Every public call of a release in each of its flavours: plain, `_async`, and on the future of a client.

Against a server that has clients exchange their keys for tokens, and that computes without a model. What there is to
call is counted by calls.py; what the calls mean is tested by the other suites.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import inspect
import os
import urllib.request
from typing import Any

import pytest
import tinker
from calls import Ledger
from common import BASE, TEXT, VERSION, datum, done
from tinker import types
from tinker.lib.api_future_impl import QueueState
from tinker.lib.public_interfaces.rest_client import RestClient

PROMPT = types.ModelInput.from_ints(TEXT)
PARAMS = types.SamplingParams(max_tokens=3, seed=1)


@pytest.fixture(scope="module")
def where() -> dict[str, str]:
    return {"base_url": os.environ["TOKENS_BASE_URL"], "api_key": os.environ["TOKENS_API_KEY"]}


@pytest.fixture(scope="module")
def client(where: dict[str, str]) -> Any:
    return tinker.ServiceClient(**where, user_metadata={"team": "a"}, project_id="flavours")


@pytest.fixture(scope="module")
def run(client: Any) -> Any:
    return done(client.create_lora_training_client(BASE, rank=4, user_metadata={"renderer": "plain"}))


@pytest.fixture(scope="module")
def rest(client: Any) -> Any:
    return client.create_rest_client()


def flavours(thing: Any, name: str, *args: Any, **options: Any) -> list[Any]:
    """What each flavour of a call answers, the plain one first. A callable argument is called anew for each."""

    def given() -> list[Any]:
        return [arg() if inspect.isfunction(arg) else arg for arg in args]

    answers = [done(getattr(thing, name)(*given(), **options))]
    if hasattr(type(thing), f"{name}_async"):
        answers.append(asyncio.run(_resolved(getattr(thing, f"{name}_async"), given(), options)))
    return answers


async def _resolved(call: Any, args: list[Any], options: dict[str, Any]) -> Any:
    value = call(*args, **options)
    while inspect.isawaitable(value):
        value = await value
    return value


def same(thing: Any, name: str, *args: Any, **options: Any) -> Any:
    """The one answer that all flavours of a question give."""
    first, *others = flavours(thing, name, *args, **options)
    assert all(other == first for other in others), name
    return first


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        return bytes(answer.read())


class Half:
    """Half the sum of squares, as a loss of the caller's own; not a function, which `flavours` would call."""

    def __call__(self, data: Any, logprobs: Any) -> Any:
        return sum((row**2).sum() for row in logprobs) / 2, {"mine": 1.0}


def train(run: Any) -> None:
    """Each call of a training client."""
    data = [datum()]
    first, *others = (answer.metrics for answer in flavours(run, "forward", data, "cross_entropy"))
    assert all(other == first for other in others)
    assert all(answer.loss_fn_outputs for answer in flavours(run, "forward_backward", data, "cross_entropy"))
    assert all(answer.metrics["mine"] == 1 for answer in flavours(run, "forward_backward_custom", data, Half()))
    assert all(answer.metrics for answer in flavours(run, "optim_step", types.AdamParams(learning_rate=1e-3)))
    assert {info.model_id for info in flavours(run, "get_info")} == {run.model_id}
    assert run.get_tokenizer().decode(TEXT)
    run.get_telemetry()
    if hasattr(run, "get_console_url"):
        assert run.model_id in run.get_console_url()

    path = same(run, "save_state", "flavour", overwrite=True).path
    assert {answer.path for answer in flavours(run, "load_state", path)} == {path}
    assert {answer.path for answer in flavours(run, "load_state_with_optimizer", path)} == {path}
    names = iter("abcd")
    paths = [answer.path for answer in flavours(run, "save_weights_for_sampler", lambda: next(names))]
    samplers = flavours(run, "create_sampling_client", paths[0])
    samplers += flavours(run, "save_weights_and_get_sampling_client")
    assert {sampler.get_base_model() for sampler in samplers} == {BASE}
    if hasattr(run, "save_weights_external"):
        answers = flavours(run, "save_weights_external", lambda: next(names))
        assert all("/external_weights/" in answer.path for answer in answers)


def draw(sampler: Any) -> None:
    """Each call of a sampling client."""
    first, *others = (answer.sequences for answer in flavours(sampler, "sample", PROMPT, 2, PARAMS))
    assert all([s.tokens for s in other] == [s.tokens for s in first] for other in others)
    assert len(same(sampler, "compute_logprobs", PROMPT)) == len(TEXT)
    assert same(sampler, "get_base_model") == BASE
    assert sampler.get_tokenizer().decode(TEXT)
    sampler.get_telemetry()
    sampler.on_queue_state_change(QueueState.ACTIVE, None)


def test_training(run: Any) -> None:
    pytest.importorskip("torch")
    train(run)


def test_sampling(client: Any, where: dict[str, str]) -> None:
    for sampler in flavours(client, "create_sampling_client", None, BASE):
        draw(sampler)
    made = tinker.SamplingClient.create(client.holder, base_model=BASE).result()
    assert made.get_base_model() == BASE
    if hasattr(made, "get_sampler_handle"):
        again = tinker.SamplingClient.from_sampler_handle(made.get_sampler_handle(), api_key=where["api_key"])
        draw(again)


@pytest.mark.skipif(
    not hasattr(tinker, "BackcompatTrainingClientFuture"), reason="this release hands out clients, not futures of them"
)
def test_futures_used_as_their_clients(client: Any) -> None:
    train(client.create_lora_training_client(BASE, rank=4))
    sampler = client.create_sampling_client(base_model=BASE)
    draw(sampler)
    assert sampler.get_sampler_handle()


def test_making_clients(client: Any, run: Any) -> None:
    made = flavours(client, "create_lora_training_client", BASE, 4)
    path = run.save_state("made", overwrite=True).result().path
    made += flavours(client, "create_training_client_from_state", path)
    made += flavours(client, "create_training_client_from_state_with_optimizer", path)
    assert len({one.model_id for one in made}) == 6
    assert BASE in [model.model_name for model in same(client, "get_server_capabilities").supported_models]
    assert isinstance(client.create_rest_client(), RestClient)
    client.get_telemetry()
    if hasattr(client, "get_console_url"):
        assert run.model_id.partition(":")[0] in client.get_console_url()
    if hasattr(client, "copy_weights"):
        copied = client.copy_weights(path, ttl_seconds=7200).result()
        assert copied.endswith("/weights/made")


@pytest.mark.skipif(not hasattr(tinker.ServiceClient, "close"), reason="earlier releases never end a session")
def test_ending_a_session(where: dict[str, str]) -> None:
    client = tinker.ServiceClient(**where)
    done(client.create_lora_training_client(BASE, rank=4))
    done(client.close("errored", "on purpose"))
    with pytest.raises(Exception, match=r"closed|finished|ended"):
        done(client.create_lora_training_client(BASE, rank=4))


def test_questions(client: Any, run: Any, rest: Any) -> None:
    run.save_state("asked", overwrite=True).result()
    path = f"tinker://{run.model_id}/weights/asked"
    session_id = run.model_id.partition(":")[0]
    sampler = done(client.create_sampling_client(base_model=BASE))

    assert same(rest, "get_training_run", run.model_id).user_metadata == {"renderer": "plain"}
    assert same(rest, "get_training_run_by_tinker_path", path).training_run_id == run.model_id
    assert same(rest, "get_weights_info_by_tinker_path", path).lora_rank == 4
    assert run.model_id in [row.training_run_id for row in same(rest, "list_training_runs", 100).training_runs]
    assert path in [row.tinker_path for row in same(rest, "list_checkpoints", run.model_id).checkpoints]
    assert path in [row.tinker_path for row in same(rest, "list_user_checkpoints", 1000).checkpoints]
    assert session_id in same(rest, "list_sessions", 100).sessions
    session = same(rest, "get_session", session_id)
    assert run.model_id in session.training_run_ids
    assert getattr(session, "user_metadata", {"team": "a"}) == {"team": "a"}
    assert same(rest, "get_sampler", sampler._sampling_session_id).base_model == BASE
    assert same(rest, "whoami").user_urn.startswith("tml:organization_user:t")
    rest.get_telemetry()
    for url in flavours(rest, "export_session_trace", session_id):
        assert len(fetch(url)) > 100
    if hasattr(rest, "get_server_capabilities"):
        assert BASE in [model.model_name for model in same(rest, "get_server_capabilities").supported_models]
    if hasattr(rest, "search_sessions"):
        found = same(rest, "search_sessions", types.SessionSearchRequest(session_id=session_id)).sessions
        assert [(one.session_id, one.project_id) for one in found] == [(session_id, "flavours")]
    if hasattr(rest, "get_checkpoint_archive_url"):
        for call, args in (
            ("get_checkpoint_archive_url", (run.model_id, "weights/asked")),
            ("get_checkpoint_archive_url_from_tinker_path", (path,)),
        ):
            assert all(link.expires > dt.datetime.now(dt.UTC) for link in flavours(rest, call, *args))
    if hasattr(rest, "get_external_weights_urls"):
        outside = run.save_weights_external("asked").result().path
        assert all("adapter_config.json" in each.urls for each in flavours(rest, "get_external_weights_urls", outside))


def test_the_audit_log(run: Any, rest: Any, where: dict[str, str], ledger: Ledger) -> None:
    """`get_audit_log_async` of early releases runs in the SDK's own event loop alone, where nobody can await it."""
    run.save_state("logged", overwrite=True).result()
    rest.delete_checkpoint(run.model_id, "weights/logged").result()
    today = dt.datetime.now(dt.UTC).date()
    askers = [rest]
    if hasattr(tinker, "AdminClient"):
        askers.append(tinker.AdminClient(**where))
    for asker in askers:
        everything = done(asker.get_audit_log()).entries
        made = [entry for entry in everything if entry.event.startswith("checkpoint_")]
        assert made
        assert done(asker.get_audit_log("checkpoints", today)).entries == made
        if VERSION >= (0, 38):
            assert asyncio.run(asker.get_audit_log_async("checkpoints", today)).entries == made
        else:
            with pytest.raises(AssertionError, match="incorrect event loop"):
                asyncio.run(asker.get_audit_log_async())
            ledger.unable["RestClient.get_audit_log_async"] = "it refuses every event loop but the SDK's own"
            found = asker.holder.run_coroutine_threadsafe(asker.get_audit_log_async("checkpoints", today)).result()
            assert found.entries == made


def test_usage(client: Any, run: Any, rest: Any, where: dict[str, str]) -> None:
    run.save_state("metered", overwrite=True).result()
    now = dt.datetime.now(dt.UTC).replace(minute=0, second=0, microsecond=0)
    askers = [rest]
    if hasattr(tinker, "AdminClient"):
        askers.append(tinker.AdminClient(**where))
        askers[-1].get_telemetry()
    for asker in askers:
        for usage in flavours(asker, "get_billing_usage", now, now + dt.timedelta(hours=1)):
            mine = [event.event_info.type for event in usage.data if event.session_id == run.model_id.partition(":")[0]]
            assert {"checkpoint", "storage"} <= set(mine)
        if hasattr(asker, "get_current_checkpoint_storage_usage"):
            (item,) = same(asker, "get_current_checkpoint_storage_usage", "flavours").data
            assert item.checkpoint_count > 0


def test_changes(client: Any, run: Any, rest: Any) -> None:
    path = run.save_state("changed", overwrite=True).result().path

    def row() -> Any:
        return next(row for row in rest.list_checkpoints(run.model_id).result().checkpoints if row.tinker_path == path)

    flavours(rest, "publish_checkpoint_from_tinker_path", path)
    assert row().public
    flavours(rest, "unpublish_checkpoint_from_tinker_path", path)
    assert not row().public
    flavours(rest, "set_checkpoint_ttl_from_tinker_path", path, 3600)
    assert row().expires_at is not None
    other = done(client.create_lora_training_client(BASE, rank=4))
    flavours(rest, "assign_session_project", other.model_id.partition(":")[0], "elsewhere")
    assert run.model_id in [
        row.training_run_id for row in rest.list_training_runs(project_id="elsewhere").result().training_runs
    ]
    flavours(rest, "assign_session_project", other.model_id.partition(":")[0], "flavours")
    if hasattr(rest, "copy_weights"):
        copies = flavours(rest, "copy_weights", path, "flavours")
        assert len(set(copies)) == len(copies)

    gone = iter("abcd")
    for name in "abcd":
        run.save_state(name).result()
    flavours(rest, "delete_checkpoint", run.model_id, lambda: f"weights/{next(gone)}")
    flavours(rest, "delete_checkpoint_from_tinker_path", lambda: f"tinker://{run.model_id}/weights/{next(gone)}")
    left = {row.checkpoint_id for row in rest.list_checkpoints(run.model_id).result().checkpoints}
    assert not left & {"weights/a", "weights/b", "weights/c", "weights/d"}
