"""A request's trace through both processes of a real server, as a collector gets it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tinker
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from tinker import types

from tests.contract.streams import Stream
from tests.contract.test_express import training
from tests.service import running

TRACE, ABOVE = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CLIENT = {"traceparent": f"00-{TRACE}-{ABOVE}-01"}
DATUM = types.Datum(
    model_input=types.ModelInput.from_ints([5, 17, 42]),
    loss_fn_inputs={"target_tokens": [17, 42, 99], "weights": [1.0] * 3},
)


@dataclass(frozen=True, slots=True)
class Kept:
    """A span, and the process that sent it."""

    process: str
    span: Span
    about: dict[str, Any] = field(hash=False)

    @property
    def trace(self) -> str:
        return self.span.trace_id.hex()


class Collector(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.kept: list[Kept] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def take(self, body: bytes) -> None:
        for batch in ExportTraceServiceRequest.FromString(body).resource_spans:
            process = _about(batch.resource.attributes)["service.instance.id"]
            spans = [span for scope in batch.scope_spans for span in scope.spans]
            self.kept += [Kept(process, span, _about(span.attributes)) for span in spans]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        self.server.take(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def _about(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield collector
    finally:
        collector.shutdown()
        thread.join()
        collector.server_close()


def test_a_step_of_the_sdk_is_one_trace_through_both_processes(tmp_path: Path) -> None:
    """All of it has been sent when the server has ended."""
    flags = ("--device", "fake", "--no-deterministic")
    with collecting() as collector:
        with running(tmp_path / "data", *flags, "--otlp-endpoint", collector.url) as service:
            client = tinker.ServiceClient(base_url=service.url, api_key=service.key, default_headers_overrides=CLIENT)
            run = client.create_lora_training_client("tinsmith/tiny", rank=4).result()
            run.forward_backward([DATUM], "cross_entropy").result()
            run.optim_step(types.AdamParams(learning_rate=0.1)).result()
            with Stream(service.url) as stream:
                for request_id in ("known-from-now-on", "handed-on"):
                    assert ask(stream, service.key, request_id, training("nobody", 1, loss="custom")) == 404
            client.holder.close()
        kept = collector.kept
    asked = [each for each in kept if each.span.kind == Span.SPAN_KIND_SERVER]
    assert {each.process for each in asked} == {"api"}
    assert all(each.trace == TRACE and each.span.parent_span_id.hex() == ABOVE for each in asked if is_clients(each))
    assert not [each.span.name for each in asked if "http.route" not in each.about], (
        "one began and was answered elsewhere"
    )
    ids = [each.about["tinsmith.request_id"] for each in asked]
    assert len(set(ids)) == len(ids)
    assert ids.count("handed-on") == 1
    for kind in ("forward_backward", "optim_step"):
        (post,) = [
            each for each in asked
            if each.span.name == f"POST /api/v1/{kind}" and each.about["http.response.status_code"] == 200
        ]  # fmt: skip
        below = [each for each in kept if each.span.parent_span_id == post.span.span_id]
        assert [(each.process, each.trace) for each in below] == [("worker 0", TRACE)] * 2
        assert sorted(each.span.name for each in below) == sorted(["queue", kind])
    (shared,) = [each for each in kept if each.span.name == "pass"]
    assert (shared.process, shared.about["tinsmith.runs"]) == ("worker 0", 1)
    assert [link.trace_id.hex() for link in shared.span.links] == [TRACE]


def ask(stream: Stream, key: str, request_id: str, body: bytes) -> int:
    """The status of a pass that the express lane begins to look at, once its key is known, if it doesn't answer it."""
    marks = {**CLIENT, "Host": "x", "X-API-Key": key, "X-Request-Id": request_id}
    marks |= {"Content-Type": "application/x-protobuf", "Content-Length": str(len(body))}
    head = "".join(f"{name}: {value}\r\n" for name, value in marks.items())
    stream.send(f"POST /api/v1/forward_backward HTTP/1.1\r\n{head}\r\n".encode() + body)
    answer = stream.answer(30)
    assert answer is not None
    return answer.status


def is_clients(kept: Kept) -> bool:
    """Not one of the server's own, which asks itself whether it is ready."""
    return kept.about["url.path"] != "/api/v1/healthz"
