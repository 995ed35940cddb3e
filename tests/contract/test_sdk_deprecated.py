"""Every call that the SDK has deprecated is still served; the list is the SDK's own."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.service import Service, running

pytestmark = pytest.mark.filterwarnings(
    "ignore:DEPRECATED:FutureWarning",
    "ignore:.*is experimental:Warning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
BASE = "tinsmith/tiny"
PROMPT = types.ModelInput.from_ints([1, 2, 3])
DATUM = types.Datum(PROMPT, loss_fn_inputs={"target_tokens": np.array([2, 3, 4])})
CLIENTS = {
    "rest": tinker.RestClient,
    "admin": tinker.AdminClient,
    "service": tinker.ServiceClient,
    "training": tinker.TrainingClient,
    "sampling": tinker.SamplingClient,
}
FILES_AND_SHARING = {  # of checkpoints: their own tests call these
    "rest.copy_weights_async",
    "rest.get_external_weights_urls_async",
    "rest.publish_checkpoint_from_tinker_path_async",
    "rest.unpublish_checkpoint_from_tinker_path_async",
    "training.save_weights_external_async",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("deprecated") / "data", "--device", "fake") as server:
        yield server


def deprecated() -> set[str]:
    return {
        f"{name}.{method}"
        for name, kind in CLIENTS.items()
        for method in dir(kind)
        if hasattr(getattr(kind, method), "__deprecated__")
    }


def half_squares(data: Any, logprobs: Any) -> tuple[Any, dict[str, float]]:
    return sum((row**2).sum() for row in logprobs) / 2, {"mine": 1.0}


async def call_all(server: Service) -> dict[str, Any]:
    """What each answered, by client and method."""
    where = {"base_url": server.url, "api_key": server.key}
    clients: dict[str, Any] = {
        "service": tinker.ServiceClient(**where),
        "rest": tinker.RestClient(**where),
        "admin": tinker.AdminClient(**where),
    }
    answers: dict[str, Any] = {}

    async def call(name: str, *args: Any) -> Any:
        client, _, method = name.partition(".")
        answer = getattr(clients[client], method)(*args)
        while inspect.isawaitable(answer):
            answer = await answer
        answers[name] = answer
        return answer

    run = clients["training"] = await call("service.create_lora_training_client_async", BASE, 4)
    session = run.model_id.partition(":")[0]
    await call("training.forward_async", [DATUM], "cross_entropy")
    await call("training.forward_backward_async", [DATUM], "cross_entropy")
    await call("training.forward_backward_custom_async", [DATUM], half_squares)
    await call("training.optim_step_async", types.AdamParams())
    await call("training.get_info_async")
    path = (await call("training.save_state_async", "a")).path
    await call("training.load_state", path)
    await call("training.load_state_async", path)
    await call("training.load_state_with_optimizer", path)
    await call("training.load_state_with_optimizer_async", path)
    sampler_path = (await call("training.save_weights_for_sampler_async", "a")).path
    await call("training.save_weights_and_get_sampling_client_async")
    await call("training.create_sampling_client_async", sampler_path)
    await call("service.create_training_client_from_state_async", path)
    await call("service.create_training_client_from_state_with_optimizer_async", path)
    await call("service.get_server_capabilities")
    await call("service.get_server_capabilities_async")
    await call("service.create_rest_client")
    clients["sampling"] = await call("service.create_sampling_client_async", None, BASE)
    await call("sampling.sample_async", PROMPT, 1, types.SamplingParams(max_tokens=2))
    await call("sampling.compute_logprobs_async", PROMPT)
    await call("sampling.get_base_model_async")
    await call("rest.get_sampler_async", f"{session}:sample:0")
    await call("rest.assign_session_project_async", session, "p")
    await call("rest.get_session_async", session)
    await call("rest.list_sessions_async")
    await call("rest.search_sessions", types.SessionSearchRequest())
    await call("rest.export_session_trace_async", session)
    await call("rest.list_training_runs_async")
    await call("rest.get_training_run_async", run.model_id)
    await call("rest.get_training_run_by_tinker_path_async", path)
    await call("rest.list_checkpoints_async", run.model_id)
    await call("rest.list_user_checkpoints_async")
    await call("rest.set_checkpoint_ttl_from_tinker_path_async", path, 3600)
    await call("rest.delete_checkpoint_async", run.model_id, "weights/a")
    await call("rest.delete_checkpoint_from_tinker_path_async", sampler_path)
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    for client in ("rest", "admin"):
        await call(f"{client}.get_billing_usage_async", now, now + timedelta(hours=1))
        await call(f"{client}.get_current_checkpoint_storage_usage_async")
        await call(f"{client}.get_audit_log_async")
    await call("rest.get_billing_usage", now, now + timedelta(hours=1))
    await call("rest.get_current_checkpoint_storage_usage")
    await call("rest.get_audit_log")
    return answers


def test_every_deprecated_call_is_served(server: Service) -> None:
    answers = asyncio.run(call_all(server))
    assert set(answers) | FILES_AND_SHARING == deprecated()
    assert not set(answers) & FILES_AND_SHARING
    run = answers["rest.get_training_run_async"]
    assert run.last_checkpoint.checkpoint_id == "weights/a"
    assert [session.project_id for session in answers["rest.search_sessions"].sessions] == ["p"]
    assert answers["rest.get_audit_log"].entries[-1].event == "checkpoint_delete"
