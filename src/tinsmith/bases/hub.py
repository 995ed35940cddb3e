"""The Hugging Face hub: base models are fetched from it, once, before anything else starts; exports are pushed to it.

Owns both transfers and what is said about them. Nothing here runs in the API or in a worker: they are given
directories. Tokens are the library's own matter (`hf auth login`, HF_TOKEN): they are never read here, nor repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # of whichever HTTP library it uses

from tinsmith.bases.catalog import BaseRef, parse
from tinsmith.bases.tokenizer_files import check_tokenizer, lack_of
from tinsmith.errors import ConfigError

SMALL = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "tiktoken.model"]
WANTED = [*SMALL, "*.safetensors"]
UNWANTED = ["*/*.safetensors", "consolidated*"]  # the same weights in other layouts


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
        listed = snapshot_download(ref.name, allow_patterns=WANTED, ignore_patterns=UNWANTED, dry_run=True)
        files = [file for file in listed if not isinstance(file, str)]
        lack = lack_of([file.filename for file in files])
        if lack is not None:
            raise ConfigError(f"--base-model {ref.name}: its repository {lack}{_beside(ref.name)}")
        _check(ref.name, snapshot_download(ref.name, allow_patterns=SMALL))  # before the weights, which are large
        num_bytes = sum(file.file_size or 0 for file in files if file.will_download)
        say(f"downloading {ref.name} from the Hugging Face hub: {num_bytes / 1e9:.2f} GB")
        path = snapshot_download(ref.name, allow_patterns=WANTED, ignore_patterns=UNWANTED)
    except OSError as error:
        raise ConfigError(
            f"--base-model {ref.name}: the Hugging Face hub did not give it ({_reason(error)}); "
            f"check the name and the connection, or serve a local directory with {ref.name}=PATH"
        ) from None
    return parse(f"{ref.name}={path}")


def push(directory: Path, repo: str, *, is_public: bool) -> str:
    """Upload a directory's files as one commit to a repository, which is made if it isn't there.

    Returns:
        Where it can be looked at.

    Raises:
        ConfigError: the hub can't be reached, or doesn't take it: no token, no right, no such organisation.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo, private=not is_public, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=directory, commit_message="tinsmith export")
    except (OSError, HTTPError, HFValidationError) as error:
        raise ConfigError(
            f"--push-to-hub {repo}: the Hugging Face hub did not take it ({_reason(error)}); check the "
            f"connection, the name and your token (`hf auth login`). The files are there: `hf upload {repo} "
            f"{directory}` tries again"
        ) from None
    return str(url)


def _check(name: str, path: str) -> None:
    """Raises: ConfigError: its tokenizer can't be read."""
    try:
        check_tokenizer(Path(path))
    except ConfigError as error:
        raise ConfigError(f"--base-model {name}: {error.message}{_beside(name)}") from None


def _beside(name: str) -> str:
    """How files are put beside those of a repository."""
    return f". (`hf download {name} --local-dir DIR` gives a directory to put it in; serve that as {name}=DIR)"


def _reason(error: Exception) -> str:
    """The first line of what the library says."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _cached(name: str) -> BaseRef | None:
    """The whole model in the hub's cache; None if there is none, or only a part of one."""
    try:
        path = snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED, local_files_only=True)
        return parse(f"{name}={path}")
    except (OSError, ConfigError):
        return None
