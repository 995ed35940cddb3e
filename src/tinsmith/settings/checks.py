"""What values settings may have, but for their kinds: bounds, choices, and what goes together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tinsmith.errors import ConfigError
from tinsmith.settings.values import flag

DEVICE = re.compile(r"auto|cpu|fake|cuda(:\d+)?")
PICTURE_LOCATION = re.compile(r"https://[^/?#@\s]+(/[^?#\s]*)?|/\S.*|[0-9a-fA-F.:]+/\d{1,3}")
POSITIVE = (
    "lora_max_rank", "max_body_bytes", "max_request_tokens", "workers_per_base", "max_resident_runs",
    "max_resident_adapters", "resident_runs_mib", "resident_adapters_mib", "host_cache_mib", "max_resident_samples",
    "kv_cache_mib", "prefill_chunk_tokens", "poll_hold_s", "answer_hold_s", "gap_timeout_s", "scan_interval_s",
    "lease_s", "hang_timeout_s", "pass_cap_ms", "download_ttl_s", "chunk_max_datums", "chunk_max_bytes", "jwt_ttl_s",
    "unknown_keys_per_minute", "max_sessions", "max_queued_samples", "max_queued_training",
    "max_queued_training_mib", "max_sample_numbers", "min_ttl_s", "sampling_share",
    "full_snapshots", "max_pictures", "max_picture_bytes", "max_picture_pixels", "picture_fetch_s",
)  # fmt: skip
MAY_BE_ZERO = (
    "prefix_cache_mib", "picture_cache_mib", "max_context_tokens", "pass_max_tokens", "loss_chunk_tokens",
    "price_training", "price_prefill", "price_prefill_cached", "price_sample", "unpolled_sample_s", "max_disk_mib",
    "max_tenant_disk_mib", "min_free_disk_mib", "pass_timeout_s", "metrics_tenants", "run_ttl_s", "audit_ttl_s",
    "usage_hours_s",
)  # fmt: skip
DAY_S = 86400.0
AT_LEAST = {"run_ttl_s": DAY_S, "audit_ttl_s": 30 * DAY_S, "usage_hours_s": 31 * DAY_S}  # unless 0
CHOICES = {
    "sqlite_synchronous": ("FULL", "NORMAL"),
    "log_level": ("debug", "info", "warning", "error"),
    "log_format": ("auto", "json", "text"),
    "tokenizer_id": ("auto", "path", "name"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "base_weights": ("stored", "dequantised", "int4", "nf4"),
    "activation_checkpointing": ("auto", "always", "never"),
    "expert_adapters": ("shared", "own"),
    "cuda_graphs": ("auto", "on", "off"),
}


def check(values: Mapping[str, Any]) -> None:
    """`values`: of all settings, by name.

    Raises:
        ConfigError: one lies out of range; the message names it.
    """
    for name in POSITIVE:
        if values[name] <= 0:
            raise ConfigError(f"{flag(name)} must be greater than 0, not {values[name]}")
    for name in MAY_BE_ZERO:
        if values[name] < 0:
            raise ConfigError(f"{flag(name)} must be 0 or more, not {values[name]}")
    for name, least in AT_LEAST.items():
        if 0 < values[name] < least:
            raise ConfigError(
                f"{flag(name)} is 0 or at least {least:.0f} s ({least / DAY_S:.0f} days), not {values[name]}"
            )
    if 0 < values["run_ttl_s"] < values["result_ttl_s"]:
        raise ConfigError("--run-ttl-s must not be less than --result-ttl-s: a run's results are kept with its log")
    for name, value in (("device", values["device"]), ("sampler_device", values["sampler_device"] or values["device"])):
        if not DEVICE.fullmatch(value):
            raise ConfigError(f"{flag(name)} is one of auto, cpu, cuda, cuda:N, fake, not {value!r}")
    if not 0 <= values["trace_share"] <= 1:
        raise ConfigError(f"--trace-share must lie between 0 and 1, not {values['trace_share']:g}")
    if not 0 <= values["port"] <= 65535:
        raise ConfigError(f"--port must lie between 0 and 65535, not {values['port']}")
    if bool(values["tls_certificate"]) != bool(values["tls_key"]):
        raise ConfigError("--tls-certificate and --tls-key go together: give both, or none to serve http")
    for location in values["picture_locations"]:
        if not PICTURE_LOCATION.fullmatch(location):
            raise ConfigError(
                f"--picture-locations holds a URL that begins with https://, an absolute path of a directory, or a "
                f"network such as 10.0.0.0/8, not {location!r}"
            )
    if not values["base_model"]:
        raise ConfigError("--base-model: name at least one model to serve")
    for name, allowed in CHOICES.items():
        if values[name] not in allowed:
            raise ConfigError(f"{flag(name)} is one of {', '.join(allowed)}, not {values[name]!r}")
