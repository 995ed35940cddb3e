"""`tinsmith doctor`: looks at this machine with the eyes of `serve` and says what to do about each trouble.

Each check is a function of what it needs to know and returns rows; none changes anything. Torch is looked at from
another process.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.table import Table

from tinsmith.bases import catalog
from tinsmith.config import Settings, child_env
from tinsmith.errors import ConfigError
from tinsmith.files.datadir import DataDir
from tinsmith.machine.cpu import OPENMP, math_env
from tinsmith.serve.main import bind
from tinsmith.serve.supervisor import available_cores
from tinsmith.store import CURE, DATABASE_FILE, damage
from tinsmith.tls import valid_until

PROBE_TIMEOUT_S = 120.0
MIN_DISK_BYTES = 2 * 10**9
LITTLE_DISK_BYTES = 10 * 10**9
BYTES_PER_PARAM = 8  # float32, laid out once for each side it is multiplied from
WORKER_BYTES = 600 * 2**20  # torch and transformers themselves
GIB = 2**30
MOST_SPINS = 1000
CERTIFICATE_ENDS_SOON_S = 14 * 86400.0


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One row. `cure` says what to do; empty if nothing need be done."""

    name: str
    level: Level
    found: str
    cure: str = ""


def examine(settings: Settings) -> list[Check]:
    """All checks, in the order in which they matter."""
    torch = probe_torch(settings)
    refs, rows = check_bases(settings)
    data_dir = DataDir(settings.data_dir)
    return [
        check_python(sys.version_info[:2]),
        *check_torch(torch),
        *check_accelerator(torch, settings.device, may_compile=settings.compiled_adapters),
        *check_threads(child_env(settings, math_env()), settings.threads, available_cores()),
        *rows,
        *check_memory(refs, settings),
        check_disk(settings.data_dir),
        check_data_dir(data_dir),
        check_database(settings.data_dir / DATABASE_FILE),
        check_port(settings, data_dir),
        *check_tls(settings, time.time()),
        check_sdk(),
        check_watching(settings),
    ]


def table(checks: Sequence[Check]) -> Table:
    colors = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red"}
    made = Table("check", "", "found")
    for check in checks:
        made.add_row(check.name, f"[{colors[check.level]}]{check.level}[/]", check.found)
    return made


def probe_torch(settings: Settings) -> dict[str, Any] | str:
    """What `torch_probe` prints, or why it doesn't."""
    command = [sys.executable, "-m", "tinsmith.torch_probe"]
    threads = str(settings.threads or available_cores())
    env = child_env(settings, math_env(), OMP_NUM_THREADS=threads)
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except subprocess.TimeoutExpired:
        return f"no answer within {PROBE_TIMEOUT_S:.0f} s"
    except (ValueError, IndexError):
        found = None
    if isinstance(found, dict):
        return found
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def check_python(version: tuple[int, ...]) -> Check:
    text = ".".join(map(str, version)) + f" on {platform.system()} {platform.machine()}"
    if version < (3, 11):
        return Check("Python", Level.FAIL, text, "install Python 3.11 or newer and make the environment anew")
    return Check("Python", Level.OK, text)


def check_torch(torch: dict[str, Any] | str) -> list[Check]:
    if isinstance(torch, str):
        cure = "install it again: pip install --force-reinstall torch"
        return [Check("torch", Level.FAIL, torch, cure)]
    found = f"torch {torch['torch']}, transformers {torch['transformers']}, {torch['gflops']:g} GFLOP/s on the CPU"
    rows = [Check("torch", Level.OK, found)]
    if torch["uneven"]:
        cure = "unset MKL_CBWR, or try another number of --threads: results would depend on what else is computed"
        rows.append(Check("rounding", Level.WARN, f"rows of products {torch['uneven']} depend on the others", cure))
    else:
        rows.append(Check("rounding", Level.OK, "a row of a product has the same bits among any others"))
    return rows


def check_accelerator(torch: dict[str, Any] | str, device: str, *, may_compile: bool = True) -> list[Check]:
    """What a worker will compute on, and whether its kernels are there. device, may_compile: as in the settings."""
    if isinstance(torch, str):
        return []
    gpus = torch["gpus"]
    names = ", ".join(
        f"{g['name']} ({g['free_bytes'] / GIB:.0f} of {g['total_bytes'] / GIB:.0f} GiB free)" for g in gpus
    )
    index = int(device.partition(":")[2] or 0)
    if device.startswith("cuda") and index >= len(gpus):
        cure = "`nvidia-smi` lists the GPUs of this machine; docs/how-to/gpu.md has the torch that sees them"
        return [Check("accelerator", Level.FAIL, f"--device {device}, and torch sees {len(gpus)}", cure)]
    if gpus and device not in ("cpu", "fake"):
        cure = "pip install 'tinsmith[gpu]': adapters go through torch's grouped product, which is slower"
        kernels = Check("kernels", Level.WARN, torch["triton"], cure) if torch["triton"] else None
        return [Check("accelerator", Level.OK, names), *([kernels] if kernels else [])]
    if gpus:
        return [Check("accelerator", Level.OK, f"{names}: left unused (--device {device})")]
    rows = [Check("accelerator", Level.OK, "none; computing on the CPU")]
    if not may_compile:
        rows.append(Check("compiled adapters", Level.OK, "off (--no-compiled-adapters)"))
    elif torch["compiled"]:
        cure = "without it, training and samples of many runs are slower; or say --no-compiled-adapters"
        rows.append(Check("compiled adapters", Level.WARN, torch["compiled"], cure))
    else:
        rows.append(Check("compiled adapters", Level.OK, "the C programs for adapters and optimizer steps are there"))
    return rows


def check_threads(env: dict[str, str], threads: int, num_cores: int) -> list[Check]:
    """`env`: what a worker would get."""
    wanted = threads or num_cores
    if wanted > num_cores:
        cure = f"use --threads {num_cores} or less; more threads than cores wait for one another"
        rows = [Check("threads", Level.WARN, f"{wanted} on {num_cores} cores", cure)]
    else:
        rows = [Check("threads", Level.OK, f"{wanted} on {num_cores} cores")]
    found = ", ".join(f"{name}={env.get(name)}" for name in OPENMP)
    spins = env.get("GOMP_SPINCOUNT", "")
    if env.get("OMP_WAIT_POLICY") != "PASSIVE" or not spins.isdigit() or int(spins) > MOST_SPINS:
        cure = "unset these: OpenMP threads that wait actively are 11 to 17 times slower on shared cores"
        rows.append(Check("waiting threads", Level.WARN, found, cure))
    else:
        rows.append(Check("waiting threads", Level.OK, f"they go to sleep ({found})"))
    return rows


def check_bases(settings: Settings) -> tuple[list[catalog.BaseRef], list[Check]]:
    """The bases that are on this machine, and a row for each one named."""
    good: list[catalog.BaseRef] = []
    rows: list[Check] = []
    try:
        refs = catalog.parse_all(settings.base_model)
    except ConfigError as error:
        return [], [Check("base model", Level.FAIL, error.message, "correct --base-model")]
    for ref in refs:
        if ref.path is None:
            rows.append(Check("base model", Level.OK, f"{ref.name}: fetched from the hub at the first start"))
            continue
        try:
            info = catalog.describe(ref, max_context=settings.max_context_tokens)
            params = catalog.num_params(ref.path)
        except ConfigError as error:
            rows.append(Check("base model", Level.FAIL, error.message, f"repair or replace {ref.path}"))
        else:
            good.append(ref)
            found = f"{ref.name}: {info.arch}, {params / 1e6:,.1f} M parameters, context {info.max_context}"
            rows.append(Check("base model", Level.OK, found))
    return good, rows


def check_memory(refs: Sequence[catalog.BaseRef], settings: Settings) -> list[Check]:
    """Weights, sampler cache and the process itself, against what is free. Training needs some more on top."""
    if not refs:
        return []
    free = free_memory_bytes()
    weights = sum(catalog.weight_bytes(ref.directory, settings.base_weights, BYTES_PER_PARAM) for ref in refs)
    needed = weights + len(refs) * ((settings.kv_cache_mib + settings.prefix_cache_mib) * 2**20 + WORKER_BYTES)
    found = f"{needed / GIB:.1f} GiB needed for {len(refs)} base model(s) before training, {free / GIB:.1f} GiB free"
    if weights > free:
        cure = "serve fewer or smaller models, or use a machine with more memory"
        return [Check("memory", Level.FAIL, found, cure)]
    if needed > free:
        cure = "lower --kv-cache-mib, or serve fewer or smaller models"
        return [Check("memory", Level.WARN, found, cure)]
    return [Check("memory", Level.OK, found)]


def free_memory_bytes() -> int:
    """Memory that can be had without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_disk(path: Path) -> Check:
    existing = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    found = f"{free / 1e9:.1f} GB free for {path}"
    cure = "free some space, or name a directory on another disk with --data-dir"
    if free < MIN_DISK_BYTES:
        return Check("disk", Level.FAIL, found, cure)
    if free < LITTLE_DISK_BYTES:
        return Check("disk", Level.WARN, found, cure)
    return Check("disk", Level.OK, found)


def check_data_dir(data_dir: DataDir) -> Check:
    path = data_dir.path
    if not path.exists():
        parent = next(p for p in path.parents if p.exists())
        if os.access(parent, os.W_OK | os.X_OK):
            return Check("data directory", Level.OK, f"{path}: is made at the first start")
        return Check("data directory", Level.FAIL, f"{parent} can't be written", "name another with --data-dir")
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        return Check("data directory", Level.FAIL, f"{path} can't be written", "name another with --data-dir")
    holder = data_dir.holder()
    if holder is not None:
        return Check("data directory", Level.OK, f"{path}: served now by pid {holder.pid}")
    if data_dir.left_info() is not None:
        return Check("data directory", Level.OK, f"{path}: its last server was killed; the next one takes over")
    return Check("data directory", Level.OK, f"{path}: free")


def check_database(path: Path) -> Check:
    if not path.exists():
        return Check("database", Level.OK, "none yet: it is made at the first start")
    found = damage(path)
    if found is not None:
        return Check("database", Level.FAIL, f"{path}: {found}", CURE)
    return Check("database", Level.OK, f"{path}: sound, {path.stat().st_size / 1e6:,.1f} MB")


def check_port(settings: Settings, data_dir: DataDir) -> Check:
    info = data_dir.info()
    if info is not None and settings.port in (0, info.port):
        return Check("port", Level.OK, f"{info.port}: {info.url} is this directory's server")
    try:
        sock: socket.socket = bind(settings.host, settings.port, may_be_left=False)
    except ConfigError as error:
        return Check("port", Level.FAIL, f"{settings.host}:{settings.port}", error.message)
    sock.close()
    return Check("port", Level.OK, f"{settings.host}:{settings.port} is free")


def check_tls(settings: Settings, now: float) -> list[Check]:
    """The certificate and its key, as `serve` would load them and clients would look at them. now: unix seconds."""
    if not settings.has_tls:
        if settings.is_loopback or settings.public_url.startswith("https://"):
            return [Check("TLS", Level.OK, "off: http")]
        cure = "give --tls-certificate and --tls-key, or let a proxy speak https and name it with --public-url"
        return [Check("TLS", Level.WARN, f"off: keys and prompts cross the network to {settings.host} readable", cure)]
    certificate, key = Path(settings.tls_certificate), Path(settings.tls_key)
    try:
        until = valid_until(certificate, key)
    except ConfigError as error:
        return [Check("TLS", Level.FAIL, error.message, "give a certificate and its key that clients can take")]
    days = f"valid until {time.strftime('%Y-%m-%d', time.gmtime(until))}"
    if until - now < CERTIFICATE_ENDS_SOON_S:
        cure = f"renew {certificate}: a server that runs takes the new one up by itself"
        rows = [Check("TLS", Level.WARN, f"{certificate}: {days}", cure)]
    else:
        rows = [Check("TLS", Level.OK, f"{certificate}: {days}")]
    if key.stat().st_mode & 0o077:
        cure = f"chmod 600 {key}"
        rows.append(Check("TLS key", Level.WARN, f"{key}: others on this machine may read or change it", cure))
    return rows


def check_sdk() -> Check:
    try:
        return Check("SDK", Level.OK, f"tinker {importlib.metadata.version('tinker')}")
    except importlib.metadata.PackageNotFoundError:
        return Check(
            "SDK", Level.OK, "tinker is not installed here; clients need it (pip install tinker), the server doesn't"
        )


def check_watching(settings: Settings) -> Check:
    """What of figures and traces is on."""
    figures = "/metrics for administrators' keys"
    if settings.metrics_address:
        figures += f", without a key on {settings.metrics_address}"
    if not settings.otlp_endpoint:
        return Check("watching", Level.OK, f"{figures}; no traces (--otlp-endpoint)")
    try:
        importlib.metadata.version("opentelemetry-exporter-otlp-proto-http")
    except importlib.metadata.PackageNotFoundError:
        return Check("watching", Level.FAIL, "traces need OpenTelemetry", "pip install 'tinsmith[otel]'")
    return Check("watching", Level.OK, f"{figures}; traces to {settings.otlp_endpoint}")
