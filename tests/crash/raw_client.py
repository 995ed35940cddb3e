"""A client over plain HTTP that keeps every acknowledgement in a journal, and may be killed at any moment itself.

What it asks for follows from its number alone, so two servers can be compared. It sends a request again until that is
acknowledged, as any client does, and then asks for its result until that is there. Started again on the same journal
it goes on where it was. `python -m tests.crash.raw_client URL KEY DIRECTORY FIRST LAST` runs one thread a client until
`DIRECTORY/stop` names how many steps each is to take, or is empty: as many as it has begun.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tinsmith.wire import wire_pb2 as pb

JSON, PROTOBUF = "application/json", "application/x-protobuf"
PAUSE_S = 0.05
DEPTH = 4  # requests that may be under way
POLL_S = 40.0


@dataclass(slots=True)
class Ask:
    """One request of a client's list. number: its place there; seq: in its run or sampler."""

    number: int
    kind: str
    seq: int
    step: int


def asks(steps: Iterator[int], begin: int = 1) -> Iterator[Ask]:
    """All that a client asks for, without end while there are steps; the last save is `final`."""
    number, seq = 0, begin

    def one(kind: str, step: int) -> Ask:
        nonlocal number, seq
        made = Ask(number, kind, 0 if kind == "sample" else seq, step)
        number += 1
        seq += kind != "sample"
        return made

    step = -1
    for step in steps:
        yield one("forward_backward", step)
        yield one("optim_step", step)
        if step % 4 == 3:
            yield one("save_weights_for_sampler", step)
            yield one("sample", step)
        if step % 9 == 8:
            yield one("save_weights", step)
    yield one("final", step + 1)


@dataclass(slots=True)
class Journal:
    """Append-only; each line is one write, so a killed writer leaves whole lines."""

    path: Path
    names: dict[str, str] = field(default_factory=dict)
    acks: dict[int, str] = field(default_factory=dict)
    results: dict[int, bytes] = field(default_factory=dict)
    steps: int = 0
    is_over: bool = False

    @classmethod
    def read(cls, path: Path) -> Journal:
        journal = cls(path)
        for line in path.read_text().splitlines() if path.exists() else ():
            journal._take(json.loads(line))
        return journal

    def note(self, **entry: Any) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(fd, json.dumps(entry).encode() + b"\n")
        finally:
            os.close(fd)
        self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        if "ack" in entry:
            before = self.acks.setdefault(entry["ack"], entry["id"])
            assert before == entry["id"], f"request {entry['ack']} was acknowledged as {before} and as {entry['id']}"
        elif "result" in entry:
            self.results[entry["result"]] = base64.b64decode(entry["body"])
        elif "step" in entry:
            self.steps = max(self.steps, entry["step"] + 1)
        elif "over" in entry:
            self.is_over = True
        else:
            self.names.update(entry)


class Line:
    """One kept-alive connection; what is lost on the way is asked for again."""

    def __init__(self, url: str, key: str) -> None:
        self._address, self._key = urlsplit(url), key
        self._connection: http.client.HTTPConnection | None = None
        self.num_lost = 0

    def ask(self, path: str, body: bytes, media: str = JSON) -> tuple[int, bytes]:
        """Status and body of the first answer that is one."""
        while True:
            try:
                status, answer = self.try_once(path, body, media)
            except (OSError, http.client.HTTPException):
                self.num_lost += 1
                self.close()
                time.sleep(PAUSE_S)
                continue
            if status in (429, 500, 502, 503):
                time.sleep(PAUSE_S)
                continue
            return status, answer

    def try_once(self, path: str, body: bytes, media: str = JSON) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(
                self._address.hostname or "", self._address.port, timeout=POLL_S
            )
        headers = {"X-API-Key": self._key, "Content-Type": media}
        self._connection.request("POST", f"/api/v1/{path}", body, headers)
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Client:
    def __init__(self, number: int, url: str, key: str, directory: Path) -> None:
        self.number = number
        self.journal = Journal.read(directory / f"client-{number}.jsonl")
        self._line = Line(url, key)
        self._stop = directory / "stop"

    def run(self) -> None:
        self._begin()
        waiting: list[Ask] = []
        for ask in asks(self._steps()):
            self._send(ask)
            waiting.append(ask)
            is_awaited = ask.kind in ("save_weights_for_sampler", "final")  # what comes next needs its result
            while len(waiting) > (0 if is_awaited else DEPTH):
                self._await(waiting.pop(0))
        self.journal.note(over=True)

    def _steps(self) -> Iterator[int]:
        step = 0
        while step < self.journal.steps or not self._is_enough(step):
            self.journal.note(step=step)
            yield step
            step += 1

    def _is_enough(self, step: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            limits = self._stop.read_text()
            return not limits or step >= json.loads(limits)[str(self.number)]
        return False

    def _begin(self) -> None:
        names = self.journal.names
        if "session" not in names:
            self.journal.note(session=self._json("create_session", tags=[], sdk_version="0.38.0")["session_id"])
        if "run" not in names:
            lora = {"rank": 2 + self.number % 3, "seed": self.number}
            made = self._json(
                "create_model",
                session_id=names["session"],
                model_seq_id=0,
                base_model="tinsmith/tiny",
                lora_config=lora,
            )
            self.journal.note(run=made["model_id"], create=made["request_id"])
        if "created" not in names:
            self.journal.note(created=self.fetch(names["create"]).decode())

    def _send(self, ask: Ask) -> None:
        if ask.number in self.journal.acks:
            return
        run, names = self.journal.names["run"], self.journal.names
        if ask.kind == "forward_backward":
            status, answer = self._line.ask("forward_backward", training(run, ask, self.number), PROTOBUF)
            assert status == 200, answer
            made = json.loads(answer)
        elif ask.kind == "optim_step":
            made = self._json(ask.kind, model_id=run, seq_id=ask.seq, adam_params={"learning_rate": 1e-3})
        elif ask.kind == "save_weights_for_sampler":
            made = self._json(ask.kind, model_id=run, seq_id=ask.seq, sampling_session_seq_id=ask.step)
        elif ask.kind == "sample":
            sampler = json.loads(self.journal.results[ask.number - 1])["sampling_session_id"]
            self.journal.note(sampler=sampler)
            made = self._json(
                "asample", sampling_session_id=names["sampler"], seq_id=0, num_samples=2,
                prompt={"chunks": [{"type": "encoded_text", "tokens": [3, 5, 7, 11]}]},
                sampling_params={"max_tokens": 24, "seed": ask.step, "temperature": 1.0},
            )  # fmt: skip
        else:
            path = "final" if ask.kind == "final" else f"step{ask.step}"
            made = self._json("save_weights", model_id=run, seq_id=ask.seq, path=path)
        self.journal.note(ack=ask.number, id=made["request_id"])

    def _await(self, ask: Ask) -> None:
        if ask.number not in self.journal.results:
            body = base64.b64encode(self.fetch(self.journal.acks[ask.number])).decode()
            self.journal.note(result=ask.number, body=body)

    def fetch(self, request_id: str) -> bytes:
        """The result, however long that takes."""
        body = json.dumps({"request_id": request_id}).encode()
        while True:
            status, answer = self._line.ask("retrieve_future", body)
            if status == 200:
                return answer
            assert status == 408, f"{request_id}: {status} {answer!r}"

    def _json(self, path: str, /, **body: Any) -> Any:
        status, answer = self._line.ask(path, json.dumps(body).encode())
        assert status == 200, f"{path} {body}: {status} {answer!r}"
        return json.loads(answer)


def training(run: str, ask: Ask, number: int) -> bytes:
    """One to three ragged data."""
    rng = random.Random(f"{number} {ask.step}")
    request = pb.ForwardBackwardRequest(model_id=run, seq_id=ask.seq, loss_fn="cross_entropy")
    for _ in range(rng.randint(1, 3)):
        tokens = [rng.randrange(3, 256) for _ in range(rng.randint(5, 40))]
        datum = request.data.add()
        datum.model_input.add().encoded_text.tokens = b"".join(t.to_bytes(4, "little") for t in tokens[:-1])
        target = datum.loss_fn_inputs["target_tokens"]
        target.dense = b"".join(t.to_bytes(8, "little") for t in tokens[1:])
        target.dtype = pb.DT_I64
        target.shape.append(len(tokens) - 1)
    return request.SerializeToString()


def main() -> None:
    url, key, directory, first, last = sys.argv[1:]
    clients = [Client(number, url, key, Path(directory)) for number in range(int(first), int(last))]
    failures: list[BaseException] = []

    def run(client: Client) -> None:
        try:
            client.run()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=run, args=(client,)) for client in clients if not client.journal.is_over]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
