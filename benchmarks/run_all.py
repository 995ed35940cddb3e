"""Runs the CPU benchmarks, prints one table and writes it to a page of the documentation.

    python benchmarks/run_all.py [--table engine] [--out docs/benchmarks.md] [--only sampler]
    python benchmarks/run_all.py --table operation [--only overload]

Two tables: the engine and the way to it (docs/benchmarks.md, under twenty minutes on two cores that do nothing else),
and what holds in operation: durability, fairness, overload, forms of weights (docs/benchmarks-operation.md,
about ten). Every script runs in a process of its own, with the environment that `tinsmith serve` gives its workers.
Those that measure the CPU time of one thread run two at a time, those that measure wall time alone, and so do those
where the two would share the memory's bandwidth, of which one arm needs more than the other.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import rows

from tinsmith.machine.cpu import math_env
from tinsmith.serve.main import WORKER_DEFAULTS
from tinsmith.serve.supervisor import available_cores

HERE = Path(__file__).parent
SMALL = "--layers 2 --vocab 4000"  # what would take minutes a round on the larger model
SMALLEST = "--layers 1 --vocab 2000"
PEFT = "--no-frozen --peft-runs 16"  # the floor has rows of its own; the peer's runs take turns
GENERATE = "--generate-requests 8"  # likewise
BESIDE = (  # the longest first
    "sampler.py --only runs group deterministic memory --repeats 5",
    "training_rows.py --case 64x1x32-64 --repeats 5 --defaults --layers 1",
    f"train_vs_peft.py --runs 16 64 --data 4 --tokens 128 --repeats 5 --defaults {SMALLEST} {PEFT}",
    f"train_vs_peft.py --runs 16 64 --data 4 --tokens 128 --repeats 5 {SMALLEST} {PEFT}",
    "training_rows.py --short --repeats 5 --layers 1",
    "custom_loss.py --layers 2 --cases 16x64 --repeats 5",
    f"train_vs_peft.py --runs 16 --data 1 --tokens 32-64 --repeats 5 {PEFT}",
    f"sample_vs_generate.py --cases 1:1 32:32 --repeats 5 --rank 32 {GENERATE}",
    f"train_vs_peft.py --runs 16 64 --data 1 --tokens 32-64 --repeats 5 --defaults {SMALL} {PEFT}",
    f"sample_vs_generate.py --cases 1:1 32:32 --repeats 5 {GENERATE}",
    f"train_vs_peft.py --runs 1 4 --data 4 --tokens 128 --repeats 5 {SMALL} {PEFT}",
    f"train_vs_peft.py --runs 1 4 --data 4 --tokens 128 --repeats 5 --defaults {SMALL} {PEFT}",
)
ALONE = (
    "training_rows.py --case 64x1x32-64 --repeats 5 --layers 8",
    f"train_vs_peft.py --runs 64 --data 1 --tokens 32-64 --repeats 5 {PEFT}",
    "optimizer.py",
    "optimizer.py --defaults --runs 16",
    "many_runs.py",
    "many_samplers.py",
    "whole_service.py",
    "whole_service.py --defaults --steps 2",
    "overlap.py",
    "latency.py",
    "control_plane.py",
    "service.py",
    "store_ops.py",
)
OPERATION = (
    "durability.py",
    "restart.py",
    "beside_floods.py",
    "overload.py",
    "long_polls.py",
    "quotas.py",
    "watching.py",
    "weight_forms.py",
    "router_replay.py",
    "expert_crowd.py",
)
TABLES = {"engine": (*BESIDE, *ALONE), "operation": OPERATION}
PAGES = {"engine": "benchmarks.md", "operation": "benchmarks-operation.md"}
MAKES = {"engine": "make bench", "operation": "make bench-operation"}
PAGE = """# Benchmarks{title}

<!-- Made by `{make}`; run it again instead of editing. -->

Ours and the peer were measured in the same run, interleaved, on the same weights. Where a row says so it is CPU time of
one thread, since other work shared the machine; the figures of the service are wall time. Absolute figures are worth
little elsewhere: read the ratios, and run `{make}` on your machine.

{machine}

{table}

## What was run

{details}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=tuple(TABLES), default="engine")
    parser.add_argument("--out", type=Path, default=None, help="the page; by default the table's own")
    parser.add_argument("--only", default="", help="run only the commands that contain this; writes no page")
    args = parser.parse_args()
    before = machine()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        jobs = [
            (command, Path(scratch, f"rows{number}"))
            for number, command in enumerate(TABLES[args.table])
            if args.only in command
        ]
        beside = [job for job in jobs if job[0] in BESIDE]
        with ThreadPoolExecutor(min(2, available_cores())) as pool:
            outputs = list(pool.map(run, *zip(*beside, strict=True))) if beside else []
        outputs += [run(*job) for job in jobs if job not in beside]
        found = [row for _, rows_file in jobs for row in rows.load(rows_file)]
    details = [
        f"`python benchmarks/{command}`\n\n{as_markdown(output)}"
        for (command, _), output in zip(jobs, outputs, strict=True)
    ]
    table = "\n".join([rows.HEAD, *map(str, found)])
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    minutes = (time.monotonic() - started) / 60
    facts = f"{before} Load average at the end {load}; the whole took {minutes:.0f} minutes."
    print(f"\n{facts}\n\n{table}")
    if not args.only:
        page = args.out or HERE.parent / "docs" / PAGES[args.table]
        title = "" if args.table == "engine" else " of operation"
        texts = {"machine": facts, "table": table, "details": "\n\n".join(details)}
        page.write_text(PAGE.format(title=title, make=MAKES[args.table], **texts))
        print(f"\nwritten to {page}")
    return 0


def run(command: str, rows_file: Path) -> str:
    """Its standard output, which is shown at its end."""
    script, *flags = command.split()
    argv = [sys.executable, str(HERE / script), *flags, "--rows", str(rows_file)]
    env = {**os.environ, **math_env(), **WORKER_DEFAULTS, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(HERE.parent))))
    started = time.monotonic()
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    print(f"== python benchmarks/{command} ({seconds:.0f} s)\n{done.stdout}", flush=True)
    if done.returncode:
        raise SystemExit(f"{script} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def as_markdown(output: str) -> str:
    """Tables as they are, anything else as it was printed."""
    return output.strip() if "|---" in output else f"```\n{output.rstrip()}\n```"


def machine() -> str:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "tinker"))
    return (
        f"{dt.date.today()}: {cpu_model()}, {available_cores()} cores; {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, {packages}. Load average at the start {load}{priority()}."
    )


def priority() -> str:
    """Whether this run was put before the other work of the machine."""
    level = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(OSError):
        level = min(level, int(Path("/proc/self/autogroup").read_text().split()[-1]))
    return f"; run at priority {level} beside that load" if level else ""


def cpu_model() -> str:
    """Name, family and instruction sets that matter for matrix products."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    flags = facts.get("flags", "").split()
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{facts.get('model name', 'unknown').strip()} ({', '.join(sets)})"


if __name__ == "__main__":
    sys.exit(main())
