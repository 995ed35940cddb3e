"""Settings of the door: where the server is, and how much its clients may ask for.

The first part of the settings table, which `config.py` completes; this file knows no environment and no checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinsmith.settings.values import setting


@dataclass(frozen=True, slots=True)
class DoorSettings:
    """The groups `server` and `limits` of `Settings`."""

    base_model: tuple[str, ...] = setting(
        ("tinsmith/tiny",), "A base model to serve: NAME, PATH or NAME=PATH. May be given several times."
    )
    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(8000, "Port to listen on; 0 takes a free one.")
    data_dir: Path = setting(Path("~/.tinsmith"), "Where the database, payloads, snapshots and checkpoints live.")
    public_url: str = setting("", "The URL under which clients reach this server, if not http://HOST:PORT.")

    lora_max_rank: int = setting(128, "Largest LoRA rank a run may ask for.", group="limits")
    full_fine_tuning: bool = setting(
        False, "Let runs of rank 0 train all weights of a base, in a float32 copy of their own.", group="limits"
    )
    full_snapshots: int = setting(
        2,
        "Snapshots of full runs that may be sampled from at one time; each takes a copy of the base's weights in "
        "float32, and keys and values of its own (--kv-cache-mib).",
        group="limits",
    )
    max_body_bytes: int = setting(
        256 * 2**20,
        "Largest body of a training request, as sent and decompressed; other requests are smaller.",
        unit="bytes",
        group="limits",
    )
    max_request_tokens: int = setting(1_000_000, "Most tokens in one training request.", unit="tokens", group="limits")
    max_queued_samples: int = setting(
        10_000, "Sample requests of one tenant that may wait; beyond it, clients are answered 429.", group="limits"
    )
    max_queued_training: int = setting(
        20_000, "Training requests of one tenant that may wait; beyond it, clients are answered 429.", group="limits"
    )
    max_queued_training_mib: int = setting(
        8192, "Room that their bodies may take; the last one may reach beyond it.", unit="MiB", group="limits"
    )
    max_samples_per_request: int = setting(1024, "Largest num_samples of one sample request.", group="limits")
    max_sample_numbers: int = setting(
        2**22,
        "Most tokens in the answer to one sample request, each counted once and again for all that is asked beside it: "
        "num_samples x max_tokens x (1 + topk_sample_logprobs), and likewise for the prompt.",
        group="limits",
    )
    max_pictures: int = setting(256, "Most pictures in one request.", group="limits")
    max_picture_bytes: int = setting(20 * 2**20, "Largest file of one picture.", unit="bytes", group="limits")
    max_picture_pixels: int = setting(
        2**25, "Most pixels of one picture; those of a request together have eight times as many.", group="limits"
    )
    picture_locations: tuple[str, ...] = setting(
        (),
        "Where pictures may be fetched from that clients name instead of sending them: URLs that begin with https://, "
        "directories, and networks such as 10.0.0.0/8 to whose private addresses these URLs may lead.",
        group="limits",
    )
    picture_fetch_s: float = setting(
        10.0, "How long the pictures that one request names may take to be fetched.", unit="s", group="limits"
    )
    custom_losses: bool = setting(
        True, "Evaluate losses that clients upload; without it the clients evaluate them.", group="limits"
    )
    chunk_max_datums: int = setting(
        1024, "Most datums that clients put into one training request; they send more as several.", group="limits"
    )
    chunk_max_bytes: int = setting(
        5_000_000,
        "Largest training request that clients make up, before compression; one datum may be larger.",
        unit="bytes",
        group="limits",
    )
    price_training: float = setting(
        0.0, "Price of a million tokens of training, for quotas of money.", unit="USD", group="limits"
    )
    price_prefill: float = setting(0.0, "The same of prompts that are sampled from.", unit="USD", group="limits")
    price_prefill_cached: float = setting(
        0.0, "The same of their tokens that were there already.", unit="USD", group="limits"
    )
    price_sample: float = setting(0.0, "The same of sampled tokens.", unit="USD", group="limits")
    session_timeout_s: float = setting(
        600.0, "A session that has not sent a heartbeat for this long has ended.", unit="s", group="limits"
    )
    max_sessions: int = setting(
        1000,
        "Sessions of one tenant that may live at one time; ten times as many may be opened in an hour.",
        group="limits",
    )
    unpolled_sample_s: float = setting(
        600.0,
        "A sample whose result nobody has asked for so long is cancelled, whether it waits or runs; 0: never.",
        unit="s",
        group="limits",
    )
    result_ttl_s: float = setting(
        24 * 3600.0,
        "How long results can be fetched again, and how long samplers stay after their session has ended.",
        unit="s",
        group="limits",
    )
    run_ttl_s: float = setting(
        0.0,
        "A run that nobody has asked for anything for so long, whose session has ended and of which no checkpoint has "
        "lived since, is let go: its state and its log are deleted. At least a day, and result_ttl_s; 0: never.",
        unit="s",
        group="limits",
    )
    audit_ttl_s: float = setting(
        0.0,
        "Entries of the audit log that are older are deleted. At least 30 days; 0: never.",
        unit="s",
        group="limits",
    )
    usage_hours_s: float = setting(
        0.0,
        "How long usage is kept by the hour; older usage is kept by the day, for good. At least 31 days; 0: for good.",
        unit="s",
        group="limits",
    )
    max_disk_mib: int = setting(
        0,
        "Most that the data directory may take; at it new requests are refused (503), and what was accepted is carried "
        "out. 0: no bound.",
        unit="MiB",
        group="limits",
    )
    max_tenant_disk_mib: int = setting(
        0,
        "Most of it that the files of one tenant may take; at it that tenant's new requests are refused (503). 0: nine "
        "tenths of what all may.",
        unit="MiB",
        group="limits",
    )
    min_free_disk_mib: int = setting(
        512, "The same once less than this is free on its disk. 0: until the disk is full.", unit="MiB", group="limits"
    )
    min_ttl_s: int = setting(
        3600, "Shortest lifetime that a checkpoint may be given; the longest is ten years.", unit="s", group="limits"
    )
