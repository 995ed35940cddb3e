"""Where the tokenizer of a base lies, and what of it clients may fetch.

Owns the list of those files, which forms of a tokenizer can be read, and the data directory's copies of those that had
to be converted: a directory of tokenizer files each, under `tokenizers/`, named by what it was made from. A copy
appears when it is complete, so any process may make it; it may be removed at any time while no server runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tinsmith.bases import tekken_file, tiktoken_file
from tinsmith.errors import ConfigError
from tinsmith.types import BaseInfo

DIRECTORY = "tokenizers"
FORM = b"1"  # of what is written here: another one makes new copies
TOKENIZER, TOKENIZER_CONFIG, MODEL_CONFIG = "tokenizer.json", tiktoken_file.CONFIG, "config.json"
TEMPLATES = "additional_chat_templates"
TOKENIZER_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    MODEL_CONFIG,
    "generation_config.json",
)
# code, which isn't there, and scaled positions, which transformers 5 fails on in a config.json of a type unknown to it
LEFT_OUT = ("auto_map", "rope_scaling", "rope_parameters")
SAVE = "`AutoTokenizer.from_pretrained(PATH).save_pretrained(PATH)` of transformers writes one"
OTHER_FORMS = (tiktoken_file.FILE, tekken_file.FILE)
"""What is converted where there is no tokenizer.json; the first that is there."""
CURES = {
    "tokenizer.model": SAVE,
    "vocab.json": SAVE,
    "vocab.txt": SAVE,
}
"""By a file that holds a tokenizer in another form, what to do."""


def tokenizer_files(path: Path) -> list[Path]:
    """The files that a client needs to load the tokenizer, those that are there; never weights."""
    return [path / name for name in TOKENIZER_FILES if (path / name).is_file()]


def lack_of(names: Collection[str]) -> str | None:
    """Why a directory that holds these files has no tokenizer that can be read, and the cure; None: it may have one."""
    if {TOKENIZER, *OTHER_FORMS} & set(names):
        return None
    for name, cure in CURES.items():
        if name in names:
            return f"has no {TOKENIZER}, only {name}: {cure}"
    return f"has no {TOKENIZER}; it must be a Hugging Face model directory"


def check_tokenizer(path: Path) -> None:
    """Raises: ConfigError: the directory has no tokenizer that can be read; the message follows its name."""
    lack = lack_of([file.name for file in path.iterdir()])
    if lack is not None:
        raise ConfigError(f"{path} {lack}")
    if not (path / TOKENIZER).is_file() and _other_form(path) == tiktoken_file.FILE:
        tiktoken_file.split_of(read_json(path / TOKENIZER_CONFIG))


def tokenizer_bytes(path: Path) -> bytes:
    """What the ids of a directory's tokenizer follow from."""
    if (path / TOKENIZER).is_file():
        return (path / TOKENIZER).read_bytes()
    form = (path / _other_form(path)).read_bytes()
    return form + (path / TOKENIZER_CONFIG).read_bytes() if _other_form(path) == tiktoken_file.FILE else form


def directory_of(info: BaseInfo) -> Path:
    """Where the tokenizer.json of a base is."""
    return Path(info.tokenizer_path or info.path)


def converted(path: Path, data_dir: Path) -> Path:
    """A directory that holds the tokenizer of the model in `path` with a tokenizer.json: this one, or the copy in the
    data directory, made if it isn't there.

    Raises:
        ConfigError: the tokenizer can't be converted, or the copy not be written.
    """
    if (path / TOKENIZER).is_file():
        return path
    digest = hashlib.sha256(FORM)
    for file in (path / _other_form(path), *tokenizer_files(path), *_templates(path)):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    made = data_dir / DIRECTORY / digest.hexdigest()[:32]
    if not made.is_dir():
        part = made.with_name(f".{made.name}.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            part.mkdir(parents=True)
            write_converted(path, part)
            _appear(part, made)
        except OSError as error:
            raise ConfigError(f"{made}: the converted tokenizer can't be written: {error.strerror}") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return made


def write_converted(path: Path, target: Path) -> None:
    """The tokenizer files of `path` in `target`, with a tokenizer.json and without the names of code.

    Raises:
        ConfigError: the tokenizer can't be converted.
        OSError: the files can't be written.
    """
    model = read_json(path / MODEL_CONFIG)
    text = model.get("text_config")
    vocab_size = {**model, **(text if isinstance(text, dict) else {})}.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ConfigError(f"{path / MODEL_CONFIG}: vocab_size is needed, as in a causal language model")
    for file in tokenizer_files(path):
        shutil.copyfile(file, target / file.name)
    for file in _templates(path):
        (target / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(file, target / TEMPLATES / file.name)
    if _other_form(path) == tekken_file.FILE:
        file = path / tekken_file.FILE
        tokenizer = tekken_file.read_tekken(file, read_json(file), vocab_size)
        config = tekken_file.SPECIAL | (
            read_json(path / TOKENIZER_CONFIG) if (path / TOKENIZER_CONFIG).is_file() else {}
        )
    else:
        config = read_json(path / TOKENIZER_CONFIG)
        tokenizer = tiktoken_file.read_tokenizer(path, config, vocab_size)
    (target / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
    fast = {**_plain(config), "tokenizer_class": "PreTrainedTokenizerFast"}
    for name, value in ((TOKENIZER_CONFIG, fast), (MODEL_CONFIG, _plain(model))):
        (target / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _other_form(path: Path) -> str:
    """The file that a directory without a tokenizer.json has its tokenizer in.

    Raises:
        ConfigError: there is none.
    """
    for name in OTHER_FORMS:
        if (path / name).is_file():
            return name
    raise ConfigError(f"{path} {lack_of([file.name for file in path.iterdir()])}")


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Without what keeps transformers from reading it."""
    return {name: value for name, value in config.items() if name not in LEFT_OUT}


def _appear(part: Path, made: Path) -> None:
    """Raises: OSError: it can't be moved, and no other process has made it meanwhile."""
    try:
        part.rename(made)
    except OSError:
        if not made.is_dir():
            raise


def _templates(path: Path) -> list[Path]:
    return sorted((path / TEMPLATES).glob("*.jinja"))


def read_json(path: Path) -> dict[str, Any]:
    """Raises: ConfigError: the file is missing, or holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; the directory must hold a Hugging Face model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value
