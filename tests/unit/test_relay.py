from __future__ import annotations

import threading

from tinsmith.ipc.relay import Relay, RelayStream


def test_lines_come_out_in_order() -> None:
    out: list[str] = []
    relay = Relay(out.append)
    RelayStream(relay, is_terminal=False).write("one\ntwo\n")
    relay.put("three")
    relay.close()
    assert out == ["one", "two", "three"]


def test_a_stuck_reader_blocks_nobody() -> None:
    out: list[str] = []
    gate = threading.Event()

    def write(line: str) -> None:
        gate.wait(10)
        out.append(line)

    relay = Relay(write, max_lines=2)
    for i in range(50):
        relay.put(str(i))
    gate.set()
    relay.close()
    assert out[0] == "0"
    assert "lines were dropped" in out[-1]
    assert len(out) < 10


def test_a_reader_that_has_gone_is_survived() -> None:
    seen: list[str] = []

    def write(line: str) -> None:
        seen.append(line)
        raise BrokenPipeError

    relay = Relay(write)
    relay.put("a")
    relay.put("b")
    relay.close()
    assert seen == ["a", "b"]
