"""A client of the wire itself, for requests that the SDK would never send."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from tinsmith.wire import wire_pb2 as pb

BASE = "tinsmith/tiny"
PROTOBUF = "application/x-protobuf"
WITHIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """status 200: the request was taken and its future failed."""

    status: int
    code: str
    category: str
    message: str


CODES = {
    "model_not_found": "not_found",
    "invalid_api_key": "unauthorized",
    "not_found_error": "not_found",
    "authentication_error": "unauthorized",
}


def ours(problem: dict[str, Any]) -> dict[str, Any]:
    """An error in the shape of OpenAI or Anthropic, as /api/v1 would put it."""
    error = problem.get("error")
    if not isinstance(error, dict):
        return problem
    code = error.get("code", error["type"])
    return {"detail": error["message"], "code": CODES.get(code, code), "category": "user"}


class Raw:
    """One key's calls. `key` None sends none."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"X-API-Key": key} if key else {}
        self._url = url
        self._http = httpx.Client(base_url=f"{url}/api/v1", headers=headers, timeout=20, verify=False)

    def close(self) -> None:
        self._http.close()

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        elsewhere = path.startswith(("/oai/", "/anthropic/"))
        return self._http.request(method, f"{self._url}{path}" if elsewhere else path, **options)

    def ask(self, method: str, path: str, **options: Any) -> Refusal | httpx.Response:
        """The answer of a call, and of its future if it has one."""
        response = self.send(method, path, **options)
        if response.status_code >= 400:
            problem = ours(response.json())
            assert set(problem) == {"detail", "code", "category"}, response.text
            return Refusal(response.status_code, problem["code"], problem["category"], problem["detail"])
        promise = response.json() if response.content else {}
        if not isinstance(promise, dict) or "request_id" not in promise:
            return response
        return self.result(promise["request_id"])

    def result(self, request_id: str) -> Refusal | httpx.Response:
        deadline = time.monotonic() + 20
        response = self.send("POST", "/retrieve_future", json={"request_id": request_id})
        while response.status_code == 408 and time.monotonic() < deadline:
            response = self.send("POST", "/retrieve_future", json={"request_id": request_id})
        assert response.status_code == 200, response.text
        if response.headers["content-type"].startswith("application/json") and "error" in response.json():
            failure = response.json()
            return Refusal(200, failure["code"], failure["category"], failure["error"])
        return response

    def good(self, path: str, **options: Any) -> httpx.Response:
        answer = self.ask("POST", path, **options)
        assert isinstance(answer, httpx.Response), answer
        return answer

    def session(self) -> str:
        return str(self.good("/create_session", json={"tags": [], "sdk_version": "raw"}).json()["session_id"])

    def run(self, session: str, seq: int = 0) -> RawRun:
        body = {"session_id": session, "model_seq_id": seq, "base_model": BASE, "lora_config": {"rank": 2, "seed": 1}}
        return RawRun(self, str(self.good("/create_model", json=body).json()["model_id"]))


class RawRun:
    """A run whose requests are numbered as they are made, whatever becomes of them."""

    def __init__(self, raw: Raw, run_id: str) -> None:
        self.raw = raw
        self.run_id = run_id
        self.seq_id = 0

    def next(self) -> dict[str, Any]:
        self.seq_id += 1
        return {"model_id": self.run_id, "seq_id": self.seq_id}

    def message(self, **fields: Any) -> pb.ForwardBackwardRequest:
        """A good request, for the caller to spoil."""
        message = pb.ForwardBackwardRequest(**self.next(), loss_fn="cross_entropy", **fields)
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.array([1, 2, 3], "<i4").tobytes()
        targets = datum.loss_fn_inputs["target_tokens"]
        targets.dense, targets.dtype = np.array([2, 3, 4], "<i8").tobytes(), pb.DT_I64
        return message

    def train(self, body: bytes, headers: Mapping[str, str] | None = None) -> Refusal | httpx.Response:
        return self.raw.ask(
            "POST", "/forward_backward", content=body, headers={"content-type": PROTOBUF, **(headers or {})}
        )

    def forward(self) -> bytes:
        """The result of a forward, to see whether the run is as it was."""
        message = self.message(forward_only=True)
        answer = self.train(message.SerializeToString())
        assert isinstance(answer, httpx.Response), answer
        output = pb.ForwardBackwardOutput.FromString(answer.content)
        return bytes(output.loss_fn_outputs[0].fields["logprobs"].data)


def refused(call: Callable[[], Any]) -> Refusal:
    """What the call is refused with, within a second; a busy machine gets three tries."""
    elapsed_s = []
    for _ in range(3):
        started = time.monotonic()
        answer = call()
        elapsed_s.append(time.monotonic() - started)
        assert isinstance(answer, Refusal), answer
        if elapsed_s[-1] < WITHIN_S:
            return answer
    raise AssertionError(f"refused, but only after {elapsed_s} s")
