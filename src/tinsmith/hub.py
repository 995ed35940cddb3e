"""Fetching base models from the Hugging Face hub, once, before anything else starts.

Owns the download and what is said about it. Nothing here runs in the API or in a worker: they are given directories.
"""

from __future__ import annotations

from collections.abc import Callable

from huggingface_hub import snapshot_download

from tinsmith.bases import BaseRef, parse
from tinsmith.errors import ConfigError

WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]


def fetch(ref: BaseRef, say: Callable[[str], None]) -> BaseRef:
    """The base with its directory: as it is, from the hub's cache on this machine, or downloaded with a progress bar.

    `say` is told what is about to be downloaded and how much it weighs.

    Raises:
        ConfigError: the hub can't be reached, doesn't have it, or what it has is not a model that can be served.
    """
    if ref.path is not None:
        return ref
    cached = _cached(ref.name)
    if cached is not None:
        return cached
    try:
        files = snapshot_download(ref.name, allow_patterns=WANTED, dry_run=True)
        num_bytes = sum(f.file_size or 0 for f in files if not isinstance(f, str) and f.will_download)
        say(f"downloading {ref.name} from the Hugging Face hub: {num_bytes / 1e9:.2f} GB")
        path = snapshot_download(ref.name, allow_patterns=WANTED)
    except OSError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"--base-model {ref.name}: the Hugging Face hub did not give it ({reason}); "
            f"check the name and the connection, or serve a local directory with {ref.name}=PATH"
        ) from None
    return parse(f"{ref.name}={path}")


def _cached(name: str) -> BaseRef | None:
    """The whole model in the hub's cache; None if there is none, or only a part of one."""
    try:
        return parse(f"{name}={snapshot_download(name, allow_patterns=WANTED, local_files_only=True)}")
    except (OSError, ConfigError):
        return None
