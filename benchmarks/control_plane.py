"""What do the API, the store and the worker's bookkeeping cost? A real server whose engine computes nothing.

One SDK client trains step by step (each call awaited), on our server with its durable store, on a server that answers
from memory (the SDK's own time is the limit), and on one that does so once it has written to a file and that is on disk
(what acknowledging what is durable leaves of the limit). Then 64 raw connections, each with a run and each awaiting
every request, count the processor time of all server processes for one op: POST, queue, claim, finish, poll.

    python benchmarks/control_plane.py [--blocks 7] [--steps 30] [--connections 64] [--ops 30]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rows
import tinker
from raw_load import Requests, Setup, drive
from served import Server, serving
from tinker import types

from tinsmith.config import point_sdk_at

BASE = "tinsmith/tiny"
NUM_TOKENS = 64


def main() -> None:
    args = parse_args()
    print(rows.HEAD)
    with tempfile.TemporaryDirectory() as root, serving(Path(root, "data"), "--device", "fake") as server:
        for row in (*through_sdk(server, args), *raw(server, args)):
            print(row, flush=True)
            rows.save(args.rows, [row])


def through_sdk(server: Server, args: argparse.Namespace) -> list[rows.Row]:
    file = server.data_dir.parent / "synced"
    with answering_from_memory(server) as from_memory, answering_from_memory(server, "--sync", str(file)) as synced:
        urls = {"ours": server.url, "memory": from_memory, "synced": synced}
        steps = {name: stepper(url, server.key) for name, url in urls.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for block in range(args.blocks + 1):
            for name, step in steps.items():
                started = time.perf_counter()
                for _ in range(args.steps):
                    step()
                if block:
                    seconds[name].append((time.perf_counter() - started) / args.steps)
    rates = {name: 1 / statistics.median(values) for name, values in seconds.items()}
    label = "control plane, one SDK client, serial forward_backward + optim_step"
    return [
        rows.Row(f"{label}: from memory", rates["memory"], "steps/s", "", args.blocks),
        rows.Row(f"{label}: from memory, each POST synced", rates["synced"], "steps/s", "", args.blocks),
        rows.Row(f"{label}: ours, durable", rates["ours"], "steps/s", "", args.blocks),
        rows.Row(f"{label}: ours / from memory", rates["ours"] / rates["memory"], "x", ">= 0.8", args.blocks),
        rows.Row(f"{label}: ours / from memory, synced", rates["ours"] / rates["synced"], "x", "", args.blocks),
    ]


def raw(server: Server, args: argparse.Namespace) -> list[rows.Row]:
    runs = Setup(server.url, server.key).create_runs(BASE, args.connections)
    requests = Requests(server.url, server.key)
    rates, costs, shares = [], [], []
    num_ops = args.ops * args.connections
    for block in range(args.blocks + 1):
        loads = [requests.steps(run, args.ops, NUM_TOKENS, 1 + block * args.ops) for run in runs]
        before = [server.cpu_s(pid) for pid in (server.api_pid, *server.worker_pids)]
        seconds = drive(server.url, server.key, loads)
        after = [server.cpu_s(pid) for pid in (server.api_pid, *server.worker_pids)]
        if block:
            spent = [(b - a) / num_ops * 1e3 for a, b in zip(before, after, strict=True)]
            rates.append(num_ops / seconds)
            costs.append(sum(spent))
            shares.append(spent[0])
    label = f"control plane, {args.connections} raw connections"
    return [
        rows.Row(f"{label}: processor time of API and worker", statistics.median(costs), "ms/op", "< 1.5", args.blocks),
        rows.Row(f"{label}: of that the API", statistics.median(shares), "ms/op", "", args.blocks),
        rows.Row(f"{label}: throughput", statistics.median(rates), "ops/s", ">= 1000", args.blocks),
    ]


@contextlib.contextmanager
def answering_from_memory(server: Server, *flags: str) -> Iterator[str]:
    """The URL of a memory server with our server's own results."""
    setup = Setup(server.url, server.key)
    (run,) = setup.create_runs(BASE, 1)
    requests = Requests(server.url, server.key)
    results = {}
    for letter, whole, seq in (
        ("p", requests.forward_backward(run, 1, NUM_TOKENS), 1),
        ("o", requests.optim_step(run, 2), 2),
    ):
        path = "forward_backward" if seq == 1 else "optim_step"
        promise = json.loads(fetch(server, path, whole.partition(b"\r\n\r\n")[2])[1])
        media, body = fetch(server, "retrieve_future", json.dumps({"request_id": promise["request_id"]}).encode())
        results[letter] = [media, body.hex()]
    here = Path(__file__).parent / "memory_server.py"
    command = [sys.executable, str(here), server.url, json.dumps(results), run, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            if child.stdout is None:
                raise SystemExit("the memory server has no output")
            yield f"http://127.0.0.1:{child.stdout.readline().strip()}"
        finally:
            child.terminate()


def fetch(server: Server, path: str, body: bytes) -> tuple[str, bytes]:
    media = "application/x-protobuf" if path == "forward_backward" else "application/json"
    headers = {"X-API-Key": server.key, "Content-Type": media}
    request = urllib.request.Request(f"{server.url}/api/v1/{path}", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.headers["content-type"], answer.read()


def stepper(url: str, key: str) -> Callable[[], None]:
    """One step of a new run: two calls, each awaited."""
    point_sdk_at(url, key)
    made = tinker.ServiceClient().create_lora_training_client(BASE, rank=8)
    run: Any = made.result() if hasattr(made, "result") else made  # a future of the client since SDK 0.38
    tokens = np.arange(NUM_TOKENS + 1) % 100
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1].tolist()),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": np.ones(NUM_TOKENS, np.float32)},
        )
    ]

    def step() -> None:
        run.forward_backward(data, "cross_entropy").result()
        run.optim_step(types.AdamParams(learning_rate=1e-4)).result()

    return step


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--ops", type=int, default=30, help="of each connection in a block")
    rows.add_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
