"""An HTTP load that costs little: raw sockets, requests whose bytes are made before the clock starts.

Each connection has a run of its own and awaits every request: POST, then retrieve_future until the result is there.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from tinsmith.wire import wire_pb2 as pb

END = b"\r\n\r\n"
LENGTH = b"content-length: "
ID_BYTES = 36  # req- and 32 hexadecimal digits
MARK = b'"request_id":"'


class Setup:
    """Sessions and runs, made over the wire one by one."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._key = url, key

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(f"{self._url}/api/v1/{path}", json.dumps(body).encode(), self.headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            read: dict[str, Any] = json.loads(answer.read())
        return read

    @property
    def headers(self) -> dict[str, str]:
        return {"X-API-Key": self._key, "Content-Type": "application/json"}

    def create_runs(self, base: str, count: int) -> list[str]:
        session = self.ask("create_session", {"tags": [], "sdk_version": "0.38.0"})["session_id"]
        lora = {"rank": 8, "seed": 1}
        promises = [
            self.ask(
                "create_model",
                {"session_id": session, "model_seq_id": number, "base_model": base, "lora_config": lora},
            )
            for number in range(count)
        ]
        for promise in promises:
            made = self.ask("retrieve_future", {"request_id": promise["request_id"]})
            if made.get("type") != "create_model":
                raise SystemExit(f"no run was made: {made}")
        return [promise["model_id"] for promise in promises]


class Requests:
    """Whole requests as bytes, for one server and key."""

    def __init__(self, url: str, key: str) -> None:
        self._head = f"host: {urlsplit(url).netloc}\r\nx-api-key: {key}\r\n"

    def post(self, path: str, body: bytes, media: str = "application/json") -> bytes:
        head = f"POST /api/v1/{path} HTTP/1.1\r\n{self._head}content-type: {media}\r\ncontent-length: {len(body)}"
        return head.encode() + END + body

    def forward_backward(self, run: str, seq: int, num_tokens: int) -> bytes:
        tokens = np.arange(num_tokens + 1, dtype=np.int64) % 100
        request = pb.ForwardBackwardRequest(model_id=run, seq_id=seq, loss_fn="cross_entropy")
        datum = request.data.add()
        datum.model_input.add().encoded_text.tokens = tokens[:-1].astype("<i4").tobytes()
        target = datum.loss_fn_inputs["target_tokens"]
        target.dense, target.dtype = tokens[1:].astype("<i8").tobytes(), pb.DT_I64
        target.shape.append(num_tokens)
        weights = datum.loss_fn_inputs["weights"]
        weights.dense, weights.dtype = np.ones(num_tokens, "<f4").tobytes(), pb.DT_F32
        weights.shape.append(num_tokens)
        return self.post("forward_backward", request.SerializeToString(), "application/x-protobuf")

    def create_model(self, session: str, number: int) -> bytes:
        lora = {"rank": 8, "seed": 1}
        body = {"session_id": session, "model_seq_id": number, "base_model": "tinsmith/tiny", "lora_config": lora}
        return self.post("create_model", json.dumps(body).encode())

    def optim_step(self, run: str, seq: int) -> bytes:
        body = {"model_id": run, "seq_id": seq, "adam_params": {"learning_rate": 1e-4}}
        return self.post("optim_step", json.dumps(body).encode())

    def steps(self, run: str, count: int, num_tokens: int, first_seq: int = 1) -> list[bytes]:
        """`count` requests, forward_backward and optim_step in turn."""
        seqs = range(first_seq, first_seq + count)
        return [
            self.optim_step(run, seq) if (seq - first_seq) % 2 else self.forward_backward(run, seq, num_tokens)
            for seq in seqs
        ]

    def poll_head(self) -> bytes:
        """All of a retrieve_future request but the id and the closing `"}`."""
        whole = self.post("retrieve_future", b'{"request_id":"' + b"x" * ID_BYTES + b'"}')
        return whole[: -ID_BYTES - 2]


@dataclass(slots=True)
class Line:
    """One connection and what it still has to send; `waits_for` is the request whose result it polls for."""

    sock: socket.socket
    requests: Sequence[bytes]
    at: int = 0
    waits_for: bytes = b""
    answer: bytearray = field(default_factory=bytearray)


def drive(url: str, key: str, loads: Sequence[Sequence[bytes]]) -> float:
    """Send each of `loads` over a connection of its own, every request awaited; the seconds until all have ended."""
    poll_head = Requests(url, key).poll_head()
    address = urlsplit(url)
    if address.hostname is None or address.port is None:
        raise SystemExit(f"no address: {url}")
    selector = selectors.DefaultSelector()
    for requests in loads:
        sock = socket.create_connection((address.hostname, address.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(sock, selectors.EVENT_READ, Line(sock, requests))
    started = time.perf_counter()
    for key_ in list(selector.get_map().values()):
        key_.data.sock.sendall(key_.data.requests[0])
    left = len(loads)
    while left:
        for key_, _ in selector.select():
            line: Line = key_.data
            piece = line.sock.recv(65536)
            if not piece:
                raise SystemExit("the server closed a connection")
            line.answer += piece
            if not _is_whole(line.answer):
                continue
            status = line.answer[9:12]
            if line.waits_for:
                if status == b"408":
                    line.sock.sendall(poll_head + line.waits_for + b'"}')
                elif status != b"200" or b'"error"' in line.answer:
                    raise SystemExit(f"a request failed: {bytes(line.answer)!r}")
                else:
                    line.waits_for = b""
                    line.at += 1
                    if line.at == len(line.requests):
                        selector.unregister(line.sock)
                        line.sock.close()
                        left -= 1
                    else:
                        line.sock.sendall(line.requests[line.at])
            else:
                if status != b"200":
                    raise SystemExit(f"a request was refused: {bytes(line.answer)!r}")
                begin = line.answer.index(MARK) + len(MARK)
                line.waits_for = bytes(line.answer[begin : begin + ID_BYTES])
                line.sock.sendall(poll_head + line.waits_for + b'"}')
            line.answer.clear()
    return time.perf_counter() - started


def _is_whole(answer: bytearray) -> bool:
    end = answer.find(END)
    if end < 0:
        return False
    begin = answer.find(LENGTH) + len(LENGTH)
    return len(answer) >= end + len(END) + int(answer[begin : answer.index(b"\r", begin)])
