"""Does memory stay flat? Many runs train and sample on a real server for as long as you like.

Starts `tinsmith serve` of the shipped model with small caches, so that they are full soon and runs come and go between
memory and disk, and small passes, since what one frees is kept for the next; and drives it through the SDK: each run
trains on ragged sequences, steps, and now and then publishes its weights and samples from them. Prints the memory of
each process over time, and a verdict: after a warm-up of the first third, in which caches fill, the median slope
between all pairs of readings (Sen, "Estimates of the Regression Coefficient Based on Kendall's Tau", 1968), times the
time that was observed, must stay below 3 % of the process's memory, or below 8 MiB. The medians of three equal parts of
that time tell one from the other where it grows: what fills up slows down, a leak doesn't. Ends with 1 if memory grew
or a request failed. `--flag=--device=fake` shows the service alone, with many more requests.

With `--tenants` (`make soak`) they come and go, each with a key, a session and a run of its own for a while, and every
minute a process is killed: the API process, a worker, both. All together they make `--steps` training steps a minute,
fewer than they could: what is in memory and in files for a minute follows the pace, and on a machine that does other
work as well the pace would change. How much of it was kept is printed; below `MIN_KEPT` the readings say little, and
the verdict is that. Memory counts once a process is a while old, and as one reading for each process, the median of its
own; as these depend on what it did, it is the lower end of the slope's 95 % interval that must stay below. Besides,
files that have an end (payloads, results, samplers' weights) must be flat, and so must the database: a minute after a
request has ended nobody can ask for it, and its row goes, with the logs of runs that rest. No request may be open for
longer than `STUCK_S`, and clients without any retries of their own must see no error. What stays for good is allowed
for: some rows a tenant, of which an hour with 16 of them at a time makes about 5 MB, and two snapshots a run, no part
of these files.

    python benchmarks/soak.py --minutes 60 --runs 64
    python benchmarks/soak.py --minutes 60 --runs 16 --tenants
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import signal
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from itertools import combinations, count
from pathlib import Path
from typing import Any

import numpy as np
import tinker
from served import Server, serving
from tinker import types

from tinsmith.config import point_sdk_at

BASE = "tinsmith/tiny"
VOCAB = 256
READINGS = 60  # in all
OFTEN = 6  # times as many are read where processes are killed
WARM_UP = 1 / 3
MAX_GROWTH_SHARE = 0.03
MAX_GROWTH_MIB = 8.0
PARTS = 3  # of the time after the warm-up, shown one by one
SAMPLE_EVERY = 8  # steps
KILL_EVERY_S = 60.0
VISIT_S = (10.0, 60.0)
SETTLE_S = 15.0  # before the memory of a new process counts
STUCK_S = 60.0
MIN_KEPT = 0.8
CATCH_UP_S = 30.0  # what a client is behind by that much, it makes good
ENDING = ("payloads", "results", "checkpoints")  # areas of files that have an end, as nothing is saved by name
FLAGS = (
    "--max-resident-runs", "48", "--max-resident-adapters", "24", "--prefix-cache-mib", "4", "--kv-cache-mib", "64",
    "--result-ttl-s", "60", "--pass-max-tokens", "1024",
    "--threads", "1",  # two wait for each other where other work shares the machine
    "--snapshot-debt-bytes", "262144",  # else the database holds the payloads of all that live, as many as are sent
)  # fmt: skip


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as root, serving(Path(root, "data"), *FLAGS, *args.flag) as server:
        point_sdk_at(server.url, server.key)
        stop = threading.Event()
        done: Counter[str] = Counter()
        client = tinker.ServiceClient()
        drivers = [
            threading.Thread(
                target=visits if args.tenants else drive,
                args=(server, seed, stop, done, 60 * args.runs / args.steps)
                if args.tenants
                else (client, seed, stop, done),
                name=f"run {seed}",
                daemon=True,
            )
            for seed in range(args.runs)
        ]
        if args.tenants:
            drivers.append(threading.Thread(target=kill, args=(server, stop, done), name="killer", daemon=True))
        for driver in drivers:
            driver.start()
        try:
            readings = (watch_all if args.tenants else watch)(server, args.minutes * 60, done)
        except (ProcessLookupError, FileNotFoundError):
            log = Path(root, "server.log").read_text(errors="replace").splitlines()
            raise SystemExit("\n".join([line for line in log if '"level": "debug"' not in line][-30:])) from None
        stop.set()
        for driver in drivers:
            driver.join(4 * STUCK_S)
            done["stuck clients"] += driver.is_alive()
        if args.tenants:
            done["stuck at the end"] += num_open(server.data_dir, 0.0)
        print(f"\n{dict(done)}\n")
        verdicts = [report(name, values, is_one=not args.tenants) for name, values in readings.items()]
        is_flat = all(verdicts)
        if args.tenants:
            kept = done["steps"] / (args.steps * args.minutes)
            print(f"{kept:.2f} of the steps that were due{'' if kept >= MIN_KEPT else ': **too few to tell**'}")
            is_flat = is_flat and kept >= MIN_KEPT
        trouble = {what: n for what, n in done.items() if n and (what == "errors" or what.startswith("stuck"))}
        print(f"\nmemory, files and database are {'flat' if is_flat else '**not flat**'}; trouble: {trouble or 'none'}")
    raise SystemExit(0 if is_flat and not trouble else 1)


def drive(client: Any, seed: int, stop: threading.Event, done: Counter[str]) -> None:
    """One run, from its creation until `stop`."""
    rng = np.random.default_rng(seed)
    run = client.create_lora_training_client(BASE, rank=int(rng.choice([2, 4, 8])))
    step = 0
    while not stop.is_set():
        try:
            train(run, rng)
            step += 1
            done["steps"] += 1
            if step % SAMPLE_EVERY == seed % SAMPLE_EVERY:
                sample(run, rng, f"step{step}")
                done["samples"] += 1
        except tinker.TinkerError as error:
            done["errors"] += 1
            print(f"run {seed}: {error!r}", flush=True)


def visits(server: Server, seed: int, stop: threading.Event, done: Counter[str], interval_s: float) -> None:
    """One tenant after another, until `stop`: each has a key, trains and samples for a while, a step every `interval_s`
    as far as it can, and ends its session."""
    rng = np.random.default_rng(seed)
    due = time.monotonic() + rng.uniform(0, interval_s)
    for number in count():
        if stop.is_set():
            return
        try:
            with tinker.ServiceClient(
                base_url=server.url, api_key=new_key(server, f"tenant-{seed}-{number}")
            ) as client:
                run = client.create_lora_training_client(BASE, rank=int(rng.choice([2, 4, 8])))
                run = run.result() if hasattr(run, "result") else run
                until = time.monotonic() + rng.uniform(*VISIT_S)
                for step in count(1):
                    train(run, rng)
                    done["steps"] += 1
                    if step % SAMPLE_EVERY == 0:
                        sample(run, rng, None)
                        done["samples"] += 1
                    due = max(due + interval_s, time.monotonic() - CATCH_UP_S)
                    if stop.wait(max(0.0, due - time.monotonic())) or time.monotonic() > until:
                        break
            done["tenants"] += 1
        except tinker.TinkerError as error:
            done["errors"] += 1
            print(f"tenant {seed}-{number}: {error!r}", flush=True)


def new_key(server: Server, tenant: str) -> str:
    """By the administrator, who asks again where the server is just being restarted."""
    body = json.dumps({"name": "soak", "tenant": tenant}).encode()
    headers = {"X-API-Key": server.key, "Content-Type": "application/json"}
    while True:
        with contextlib.suppress(OSError):
            request = urllib.request.Request(f"{server.url}/api/v1/admin/keys", body, headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                return str(json.loads(answer.read())["secret"])
        time.sleep(0.2)


def kill(server: Server, stop: threading.Event, done: Counter[str]) -> None:
    rng = random.Random(1)
    while not stop.wait(KILL_EVERY_S):
        server.look()
        kind = rng.choice(["api", "worker", "worker", "both"])
        for pid in [server.api_pid] * (kind != "worker") + server.worker_pids * (kind != "api"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        done[f"kills of {kind}"] += 1


def watch_all(server: Server, seconds: float, done: Counter[str]) -> dict[str, list[tuple[float, float]]]:
    """(minutes, MiB) by kind of process, of those that are a while old, of the files that have an end, and of the
    database."""
    readings: dict[str, list[tuple[float, float]]] = {"api": [], "worker": [], "files": [], "database": []}
    heads = ("minute", "tenants", "steps", *(f"{name}, MiB" for name in readings), "in it, bytes a request", "open, s")
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    started, born = time.monotonic(), {}
    lives: defaultdict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for number in count():
        sys.stdout.flush()
        if (passed := time.monotonic() - started) >= seconds:
            break
        server.look()
        for name, pid in (("api", server.api_pid), ("worker", server.worker_pids[0])):
            if time.monotonic() - born.setdefault(pid, time.monotonic()) > min(SETTLE_S, seconds / 10):
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                    readings[name].append((passed / 60, resident_mib(pid)))
                    lives[name, pid].append(readings[name][-1])
        readings["files"].append((passed / 60, files_mib(server.data_dir)))
        readings["database"].append((passed / 60, (server.data_dir / "tinsmith.db").stat().st_size / 2**20))
        num_requests, oldest_s = ages(server.data_dir)
        per_request = used_bytes(server.data_dir) / max(1, num_requests)
        done["stuck for a minute"] += num_open(server.data_dir, STUCK_S) if number % OFTEN == 0 else 0
        now = " | ".join(f"{values[-1][1]:.1f}" if values else "" for values in readings.values())
        line = (
            f"| {passed / 60:.1f} | {done['tenants']} | {done['steps']} | {now} | {per_request:.0f} | {oldest_s:.1f} |"
        )
        print(line if number % OFTEN == 0 else "", end="\n" if number % OFTEN == 0 else "", flush=True)
        time.sleep(seconds / READINGS / OFTEN)
    for name in ("api", "worker"):
        readings[name] = [middle(values) for (of, _), values in lives.items() if of == name]
    enough = {name: values for name, values in readings.items() if len(values) > 3 * PARTS}
    for name in readings.keys() - enough.keys():
        print(f"\n{name}: {len(readings[name])} readings are too few to tell")
    return enough


def middle(values: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(minute for minute, _ in values), statistics.median(mib for _, mib in values)


def files_mib(data_dir: Path) -> float:
    total = 0
    for path in (data_dir / "blobs").rglob("*"):
        if any(part in ENDING for part in path.parts):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size if path.is_file() else 0
    return total / 2**20


def ages(data_dir: Path) -> tuple[int, float]:
    """How many requests there were, and how long the oldest of those that are open has waited."""
    with contextlib.closing(sqlite3.connect(f"file:{data_dir / 'tinsmith.db'}?mode=ro", uri=True)) as database:
        query = "SELECT (SELECT max(num) FROM ops), min(created_at) FROM ops WHERE state IN ('queued', 'running')"
        newest, oldest = database.execute(query).fetchone()
    return newest or 0, 0.0 if oldest is None else time.time() - oldest


def used_bytes(data_dir: Path) -> int:
    """Of the database's file, without the pages that are free for what comes next."""
    with contextlib.closing(sqlite3.connect(f"file:{data_dir / 'tinsmith.db'}?mode=ro", uri=True)) as database:
        size, pages, free = (
            int(database.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_size", "page_count", "freelist_count")
        )
    return size * (pages - free)


def num_open(data_dir: Path, for_s: float) -> int:
    with contextlib.closing(sqlite3.connect(f"file:{data_dir / 'tinsmith.db'}?mode=ro", uri=True)) as database:
        query = "SELECT count(*) FROM ops WHERE state IN ('queued', 'running') AND created_at < ?"
        return int(database.execute(query, (time.time() - for_s,)).fetchone()[0])


def train(run: Any, rng: np.random.Generator) -> None:
    data = []
    for length in rng.integers(8, 160, 3):
        tokens = rng.integers(0, VOCAB, length + 1)
        inputs = {"target_tokens": tokens[1:], "weights": np.ones(length, np.float32)}
        data.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs))
    passed = run.forward_backward(data, "cross_entropy")
    stepped = run.optim_step(types.AdamParams(learning_rate=1e-4))
    passed.result()
    stepped.result()


def sample(run: Any, rng: np.random.Generator, name: str | None) -> None:
    sampler = run.save_weights_and_get_sampling_client(name)
    sampler = sampler.result() if hasattr(sampler, "result") else sampler
    prompt = types.ModelInput.from_ints(rng.integers(0, VOCAB, int(rng.integers(4, 200))).tolist())
    params = types.SamplingParams(max_tokens=16, temperature=1.0)
    sampler.sample(prompt, num_samples=2, sampling_params=params).result()


def watch(server: Server, seconds: float, done: Counter[str]) -> dict[str, list[tuple[float, float]]]:
    """(minutes, MiB) by process."""
    pids = {"api": server.api_pid} | {f"worker {i}": pid for i, pid in enumerate(server.worker_pids)}
    readings: dict[str, list[tuple[float, float]]] = {name: [] for name in pids}
    print(f"| minute | steps | {' | '.join(f'{name}, MiB' for name in pids)} |")
    print("|---|---|" + "---|" * len(pids))
    started = time.monotonic()
    while (passed := time.monotonic() - started) < seconds:
        for name, pid in pids.items():
            readings[name].append((passed / 60, resident_mib(pid)))
        now = " | ".join(f"{values[-1][1]:.1f}" for values in readings.values())
        print(f"| {passed / 60:.1f} | {done['steps']} | {now} |", flush=True)
        time.sleep(seconds / READINGS)
    return readings


def resident_mib(pid: int) -> float:
    """Memory of its own: files that are mapped, such as weights and libraries, come and go as the system likes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    for line in lines:
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)  # it ended and was not waited for


def report(name: str, values: list[tuple[float, float]], *, is_one: bool) -> bool:
    """Prints what became of one process (is_one), or of one kind; whether it stayed flat."""
    settled = values[int(len(values) * WARM_UP) :]
    least, slope, most = slopes(settled)
    level = statistics.median(mib for _, mib in settled)
    minutes = settled[-1][0] - settled[0][0]
    bound = max(MAX_GROWTH_MIB, MAX_GROWTH_SHARE * level)
    is_flat = (slope if is_one else least) * minutes < bound
    part = max(1, len(settled) // PARTS)
    parts = [statistics.median(mib for _, mib in settled[i * part : (i + 1) * part]) for i in range(PARTS)]
    print(
        f"{name}: {level:.0f} MiB, most {max(mib for _, mib in settled):.0f}, "
        f"by thirds {' / '.join(f'{mib:.0f}' for mib in parts)}; {slope:+.3f} MiB a minute ({least:+.3f} to "
        f"{most:+.3f}, {len(settled)} readings), {slope * minutes:+.1f} MiB in {minutes:.1f} minutes, of {bound:.1f} "
        f"allowed: {'flat' if is_flat else '**not flat**'}"
    )
    return is_flat


def slopes(values: list[tuple[float, float]]) -> tuple[float, float, float]:
    """(lower end, median, upper end) of the slope between readings, with Sen's interval of 95 %."""
    found = sorted((y - x) / (b - a) for (a, x), (b, y) in combinations(values, 2))
    num = len(values)
    width = 1.96 * math.sqrt(num * (num - 1) * (2 * num + 5) / 18)
    low, high = int((len(found) - width) / 2), math.ceil((len(found) + width) / 2)
    return found[max(0, low)], statistics.median(found), found[min(len(found) - 1, high)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--steps", type=float, default=160.0, help="a minute, of all tenants together")
    parser.add_argument("--tenants", action="store_true", help="tenants that come and go, and a kill every minute")
    parser.add_argument(
        "--flag", action="append", default=[], help="one more flag of the server, such as --flag=--threads=1"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
