"""The settings table: one field a setting, with its default, unit and help; its first part is in `settings/door.py`.

Command-line flags (`--pass-max-tokens`), environment names (`TINSMITH_PASS_MAX_TOKENS`) and the reference page derive
from it. This is the only module that reads the environment. Settings are frozen once made; a child process gets them
back from `as_env()`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self, get_type_hints

from tinsmith.settings.checks import check
from tinsmith.settings.door import DoorSettings
from tinsmith.settings.values import ENV_PREFIX, absolute, parse, setting, show

METRICS_DIR = "PROMETHEUS_MULTIPROC_DIR"  # the name that prometheus_client reads
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Settings(DoorSettings):
    """All settings of a server, its API process and its workers; those of its door come first."""

    threads: int = setting(0, "Compute threads of a worker; 0 takes all cores.", group="engine")
    device: str = setting(
        "auto",
        "Where the base model lives: cpu, cuda, cuda:N, or auto (a GPU if there is one); fake computes nothing real, "
        "for tests of clients.",
        group="engine",
    )
    dtype: str = setting(
        "auto",
        "What the base model computes in: float32, bfloat16, float16, or auto (bfloat16 on a GPU, float32 on the CPU). "
        "Losses, gradients and optimizer states are float32.",
        group="engine",
    )
    base_weights: str = setting(
        "stored", "How its weights are kept: stored (as the files have them), dequantised, int4 or nf4.", group="engine"
    )
    deterministic: bool = setting(
        False,
        "Promise that a run's results have the same bits whatever shares its passes, however they are cut, and after "
        "a restart, on the same hardware, versions and number of threads; a worker that can't keep this doesn't start.",
        group="engine",
    )
    max_context_tokens: int = setting(
        0,
        "Longest sequence of a base model, prompt and answer together; 0: what its config.json says, which is also "
        "the most. Where rope is scaled by longrope, it decides which factors all sequences get.",
        unit="tokens",
        group="engine",
    )
    pass_max_tokens: int = setting(
        0,
        "Most tokens in one forward and backward; 0 finds it from the memory that is free.",
        unit="tokens",
        group="engine",
    )
    activation_checkpointing: str = setting(
        "auto",
        "Compute layers a second time in place of keeping what backward needs of them: auto (for sequences that don't "
        "fit otherwise), always or never.",
        group="engine",
    )
    expert_adapters: str = setting(
        "shared",
        "Adapters of a mixture of experts: shared (the factor on the side of the hidden states is one for all experts "
        "of a layer) or own (each expert has both factors). States of one kind don't fit the other.",
        group="engine",
    )
    router_replay: bool = setting(
        False,
        "Sample requests with record_stability_info record which experts their tokens went to, and training requests "
        "whose provenance names them send the tokens there again. Costs two bytes for each token, layer and chosen "
        "expert, in memory and on disk, as long as the sample's result is kept.",
        group="engine",
    )
    pass_cap_ms: float = setting(
        250.0,
        "Longest stretch of training between two sampler steps while samples are running.",
        unit="ms",
        group="engine",
    )
    loss_chunk_tokens: int = setting(
        0,
        "Tokens whose logits are held at once by losses; 0 means 512 on the CPU, and on a GPU what its memory allows.",
        unit="tokens",
        group="engine",
    )
    sampling_share: float = setting(
        1.0,
        "Time that a worker gives to sampling for each second of training, while there is work of both.",
        group="engine",
    )
    workers_per_base: int = setting(
        1,
        "Worker processes of each base model. Each holds the base in memory and runs of its own; samples are shared.",
        group="engine",
    )
    separate_sampler: bool = setting(
        False,
        "Sample in a process of its own beside the one that trains a base model; each holds the base in memory.",
        group="engine",
    )
    sampler_device: str = setting("", "The device of that process; empty: the same as --device.", group="engine")
    max_resident_runs: int = setting(64, "Runs kept in a worker's memory; the rest wait on disk.", group="engine")
    resident_runs_mib: int = setting(
        8192,
        "Memory for these runs: weights, gradients and moments; a single one may be larger.",
        unit="MiB",
        group="engine",
    )
    max_resident_adapters: int = setting(64, "Sampler snapshots kept in a worker's memory.", group="engine")
    resident_adapters_mib: int = setting(
        4096, "Memory for these snapshots; a single one may be larger.", unit="MiB", group="engine"
    )
    host_cache_mib: int = setting(
        2048,
        "Host memory for runs and snapshots that are read ahead of their requests, or have left the accelerator.",
        unit="MiB",
        group="engine",
    )
    max_resident_samples: int = setting(
        256, "Sequences that are decoded together; a tenant alone gets 7/8 of them.", group="engine"
    )
    kv_cache_mib: int = setting(1024, "Memory for the sampler's keys and values.", unit="MiB", group="engine")
    prefix_cache_mib: int = setting(
        128,
        "Memory for keys and values of prompts that later prompts may begin with; 0 keeps none.",
        unit="MiB",
        group="engine",
    )
    picture_cache_mib: int = setting(
        256,
        "Memory for what the base model's vision made of pictures, so that each is looked at once; at least the last "
        "is kept.",
        unit="MiB",
        group="engine",
    )
    prefill_chunk_tokens: int = setting(
        512, "Prompt tokens computed in one sampler step.", unit="tokens", group="engine"
    )

    cuda_graphs: str = setting(
        "auto",
        "Replay decode steps on a GPU as CUDA graphs, one for each size of the batch: auto (where it can be done), on "
        "(a worker that can't doesn't start) or off.",
        group="engine",
    )

    compiled_adapters: bool = setting(
        True,
        "On the CPU let adapters be computed, and optimizer steps be taken, in small C programs, compiled at the first "
        "start and kept in ~/.cache/tinsmith: 1.4 and 1.6 times as fast as torch, which serves where no C compiler is.",
        group="engine",
    )

    poll_hold_s: float = setting(
        40.0,
        "How long a poll for a result is held open; less than proxies between allow, and the 45 s of clients.",
        unit="s",
        group="durability",
    )
    answer_hold_s: float = setting(
        600.0,
        "How long the OpenAI- and Anthropic-compatible endpoints wait for an answer, or for the next part of one.",
        unit="s",
        group="durability",
    )
    gap_timeout_s: float = setting(
        60.0,
        "How long a run waits for a request that later ones have overtaken, once nothing more of it arrives.",
        unit="s",
        group="durability",
    )
    scan_interval_s: float = setting(
        1.0, "How often a lost wake-up is made good by looking.", unit="s", group="durability"
    )
    lease_s: float = setting(10.0, "How long a worker that fell silent keeps its runs.", unit="s", group="durability")
    hang_timeout_s: float = setting(
        60.0,
        "A process that shows no sign of life for this long is killed and started again.",
        unit="s",
        group="durability",
    )
    pass_timeout_s: float = setting(
        0.0,
        "A worker that is at one piece of a pass for this long ends itself, and what it was at is tried again one by "
        "one; 0: thirty times what was measured, five minutes at least, half an hour for the first.",
        unit="s",
        group="durability",
    )
    snapshot_debt_bytes: int = setting(
        64 * 2**20,
        "A run is snapshotted once this much payload would have to be replayed.",
        unit="bytes",
        group="durability",
    )
    snapshot_debt_s: float = setting(
        10.0,
        "A run is snapshotted once its part of this much computing would have to be repeated; runs in memory share it.",
        unit="s",
        group="durability",
    )
    inline_bytes: int = setting(
        8192,
        "Payloads and results up to this size are kept in the database, larger ones in files.",
        unit="bytes",
        group="durability",
    )
    sqlite_synchronous: str = setting("FULL", "SQLite's synchronous pragma: FULL or NORMAL.", group="durability")

    cancel_future: bool = setting(True, "Let clients cancel sample requests that they gave up.", group="clients")
    retrieve_futures: bool = setting(
        True, "Let clients wait for all samples of a sampler with one poll, instead of one each.", group="clients"
    )
    join_sampling_session: bool = setting(
        True, "Number the copies of a sampling client, instead of letting them draw their numbers.", group="clients"
    )

    compress_requests: bool = setting(True, "Have clients compress their training requests (zstd).", group="access")
    rust_transport: bool = setting(
        True,
        "Let clients use the SDK's faster transport (pyqwest); without it they use httpx, which asks again for an "
        "answer that is lost.",
        group="access",
    )
    jwt_auth: bool = setting(
        False, "Have clients exchange their key for short-lived tokens (JWT); keys work as well.", group="access"
    )
    jwt_ttl_s: float = setting(
        900.0,
        "How long such a token works. Clients renew it after half of that, and in the last minute before each request.",
        unit="s",
        group="access",
    )
    unknown_keys_per_minute: int = setting(
        300,
        "Unknown keys that one address may send a minute; beyond it, it is told to come back later (429). Keys that "
        "were good within the hour go on.",
        group="access",
    )
    tls_certificate: str = setting(
        "", "Certificate (PEM, with its chain): serve https. Read again when the file changes.", group="access"
    )
    tls_key: str = setting("", "The certificate's key (PEM, without a password).", group="access")
    serve_tokenizers: bool = setting(True, "Serve tokenizer files (never weights) without a key.", group="access")
    download_ttl_s: float = setting(
        3600.0, "How long a signed link to a file of a checkpoint works.", unit="s", group="access"
    )
    tokenizer_id: str = setting(
        "auto",
        "What clients are told to load the tokenizer from: path, name, or auto (path if host and public URL are "
        "loopback).",
        group="access",
    )

    log_level: str = setting("info", "debug, info, warning or error.", group="logging")
    log_prompts: bool = setting(
        False, "Log the prompt of every sample request, as token ids. Else no prompt is in any log.", group="logging"
    )
    log_format: str = setting("auto", "json, text, or auto (text on a terminal).", group="logging")

    metrics_address: str = setting(
        "", "HOST:PORT where /metrics asks for no key; on the server's port it asks for an admin's.", group="watching"
    )
    metrics_tenants: int = setting(
        20, "Tenants that figures name; those after them are counted together as `other`.", group="watching"
    )
    otlp_endpoint: str = setting(
        "", "URL of an OpenTelemetry collector (OTLP over HTTP) for traces; needs tinsmith[otel].", group="watching"
    )
    trace_share: float = setting(
        1.0, "Share of requests that are traced, 0 to 1; one with a traceparent as its client says.", group="watching"
    )

    crash_point: str = setting(
        "", "For tests: NAME or NAME:N; a process that comes past it the Nth time dies by SIGKILL.", group="tests"
    )

    @classmethod
    def load(cls, env: Mapping[str, str] | None = None, **overrides: Any) -> Self:
        """Defaults, then the environment, then `overrides` whose value is not None.

        Raises:
            ConfigError: a value that doesn't parse or lies out of range; the message names the setting.
        """
        source = os.environ if env is None else env
        types = get_type_hints(cls)
        values: dict[str, Any] = {}
        for f in fields(cls):
            raw = source.get(env_name(f))
            if raw is not None:
                values[f.name] = parse(f.name, types[f.name], raw)
        for name, value in overrides.items():
            if value is not None:
                values[name] = value
        made = cls(**values)
        made = replace(
            made,
            data_dir=Path(made.data_dir).expanduser().absolute(),
            tls_certificate=absolute(made.tls_certificate),
            tls_key=absolute(made.tls_key),
        )
        check({f.name: getattr(made, f.name) for f in fields(made)})
        return made

    def as_env(self) -> dict[str, str]:
        """The settings as environment variables, for a child process."""
        return {ENV_PREFIX + name.upper(): show(value) for name, value in asdict(self).items()}

    @property
    def has_tls(self) -> bool:
        return bool(self.tls_certificate)

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK


def env_name(f: Field[Any]) -> str:
    return ENV_PREFIX + f.name.upper()


def client_address(env: Mapping[str, str] | None = None) -> tuple[str, str] | None:
    """The server and key that the SDK's own variables name; None if TINKER_BASE_URL is not set."""
    source = os.environ if env is None else env
    url = source.get("TINKER_BASE_URL")
    return (url.rstrip("/"), source.get("TINKER_API_KEY", "")) if url else None


def client_key(env: Mapping[str, str] | None = None) -> str:
    """The key that the SDK's own variable holds; empty if it is not set."""
    return (os.environ if env is None else env).get("TINKER_API_KEY", "")


def point_sdk_at(url: str, key: str) -> None:
    """Make SDK clients of this process talk to `url`, and load tokenizers from disk alone."""
    os.environ.update(TINKER_BASE_URL=url, TINKER_API_KEY=key, HF_HUB_OFFLINE="1", TINKER_TELEMETRY="0")


def read_weights_in_turn() -> None:
    """Tell transformers to read a model's weights one after another, unless somebody said otherwise: its threads each
    have memory of their own, in which what was freed stays."""
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")


def heap_block_bytes(env: Mapping[str, str] | None = None) -> int | None:
    """Up to which size glibc was told at the start of this process to keep blocks in its heap; None if it wasn't."""
    told = (os.environ if env is None else env).get("MALLOC_MMAP_THRESHOLD_", "")
    return int(told) if told.isdecimal() else None


def cache_dir(env: Mapping[str, str] | None = None) -> Path | None:
    """Where what can be made again is kept for the next start; None where nobody says and there is no home."""
    source = os.environ if env is None else env
    folder = Path(source.get("XDG_CACHE_HOME") or Path(source.get("HOME", ""), ".cache"))
    return folder / "tinsmith" if folder.is_absolute() else None


def metrics_dir(env: Mapping[str, str] | None = None) -> Path | None:
    """Where the processes of this server count; None for one that was started alone."""
    named = (os.environ if env is None else env).get(METRICS_DIR)
    return Path(named) if named else None


def child_env(settings: Settings, defaults: Mapping[str, str], **forced: str) -> dict[str, str]:
    """A child process's environment: this one's, with the settings in it; `defaults` yield to what is set already."""
    return {**defaults, **os.environ, **settings.as_env(), **forced}
