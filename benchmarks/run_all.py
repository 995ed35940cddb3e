"""Runs the CPU benchmarks one after another, prints one table and writes it to docs/benchmarks.md.

Every script runs in a process of its own, with the environment that `tinsmith serve` gives its workers. About ten
minutes on two cores that are otherwise idle.

    python benchmarks/run_all.py [--out docs/benchmarks.md] [--only service]
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
from importlib.metadata import version
from pathlib import Path

import rows

from tinsmith.cpu import math_env
from tinsmith.serve import WORKER_DEFAULTS
from tinsmith.supervisor import available_cores

HERE = Path(__file__).parent
COMMANDS = (
    "train_vs_peft.py --runs 16 64 --data 1 --tokens 32-64 --repeats 3",
    "train_vs_peft.py --runs 1 4 --data 4 --tokens 128 --repeats 5",
    "sample_vs_generate.py --cases 1:1 8:8 32:32 --repeats 3",
    "custom_loss.py --layers 4 --cases 16x64 4x512 --repeats 3",
    "service.py",
    "store_ops.py",
)
PAGE = """# Benchmarks

<!-- Made by `make bench`; run it again instead of editing. -->

Ours and the peer were measured in the same run, interleaved, on the same weights. Where a row says so it is CPU time of
one thread, since other work shared the machine; the figures of the service are wall time. Absolute figures are worth
little elsewhere: read the ratios, and run `make bench` on your machine.

{machine}

{table}

## What was run

{details}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    parser.add_argument("--only", default="", help="run only the commands that contain this; writes no page")
    args = parser.parse_args()
    before = machine()
    started = time.monotonic()
    details = []
    with tempfile.TemporaryDirectory() as scratch:
        rows_file = Path(scratch, "rows")
        for command in [c for c in COMMANDS if args.only in c]:
            print(f"== python benchmarks/{command}", flush=True)
            output = run(command, rows_file)
            details.append(f"`python benchmarks/{command}`\n\n{as_markdown(output)}")
        found = rows.load(rows_file)
    table = "\n".join([rows.HEAD, *map(str, found)])
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    minutes = (time.monotonic() - started) / 60
    facts = f"{before} Load average at the end {load}; the whole took {minutes:.0f} minutes."
    print(f"\n{facts}\n\n{table}")
    if not args.only:
        args.out.write_text(PAGE.format(machine=facts, table=table, details="\n\n".join(details)))
        print(f"\nwritten to {args.out}")
    return 0


def run(command: str, rows_file: Path) -> str:
    """Its standard output, shown as it comes."""
    script, *flags = command.split()
    argv = [sys.executable, str(HERE / script), *flags, "--rows", str(rows_file)]
    env = {**os.environ, **math_env(), **WORKER_DEFAULTS, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    lines = []
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise SystemExit(f"{script} ended with status {process.returncode}; run it alone to see why")
    return "".join(lines)


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
