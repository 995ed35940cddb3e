"""A tokenizer given as `tiktoken.model` (tokens and their ranks) as the `tokenizers` one that gives the same ids.

Reads the ranks and `added_tokens_decoder` of tokenizer_config.json. How text is split lies in code of the directory,
which is never run: it is known here by the name of that code (`SPLITS`).

tiktoken joins, of all neighbours that together are a token, those of the lowest rank, leftmost first. Within the bytes
of one token that goes as it goes for these bytes alone, so a token has one pair that it is ever joined from: the two
that are left when its own bytes are joined so far. These pairs, in the order of ranks, are the merges.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from tinsmith.bases.tokenizer import BYTE_OF_LETTER
from tinsmith.errors import ConfigError

FILE, CONFIG = "tiktoken.model", "tokenizer_config.json"
MAX_TOKEN_BYTES, MAX_IDS = 1024, 1 << 24  # more would take minutes to join, or memory without end
LETTER_OF_BYTE = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE, _AFTER = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI = "|".join(
    (
        r"[\p{Han}]+",
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_AFTER}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_AFTER}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""Of Moonshot's models, as in tokenization_kimi.py."""

SPLITS = {"tokenization_kimi.TikTokenTokenizer": KIMI, "tokenization_moonshot.TikTokenTokenizer": KIMI}
"""By the class that a directory names in `auto_map`."""


def split_of(config: Mapping[str, Any]) -> str:
    """How a directory with this tokenizer_config.json splits text.

    Raises:
        ConfigError: its code isn't known.
    """
    mapped = config.get("auto_map")
    named = mapped.get("AutoTokenizer") if isinstance(mapped, dict) else mapped
    name = str(named[0] if isinstance(named, list) and named else named or config.get("tokenizer_class"))
    try:
        return SPLITS[name.rpartition("--")[2]]
    except KeyError:
        raise ConfigError(
            f"its tokenizer is a {FILE}, which the code {name!r} reads; known are {', '.join(SPLITS)}. Convert it to "
            "tokenizer.json (`transformers.integrations.tiktoken.convert_tiktoken_to_fast`) and put that beside it"
        ) from None


def read_tokenizer(path: Path, config: Mapping[str, Any], vocab_size: int) -> Tokenizer:
    """The tokenizer of a directory with such a file. Ids between the ranks and vocab_size that have no name get that
    of Moonshot's code.

    Args:
        config: the directory's tokenizer_config.json.

    Raises:
        ConfigError: the file is broken, the ids leave gaps, or the way text is split isn't known.
    """
    split = split_of(config)
    ranks = _read_ranks(path / FILE)
    tokenizer = byte_pairs(ranks, split)
    added = _added(path, config, len(ranks), vocab_size)
    tokenizer.add_tokens([token for _, token in sorted(added.items())])
    if max(ranks.values()) >= len(ranks) or any(tokenizer.token_to_id(t.content) != id for id, t in added.items()):
        raise ConfigError(f"{path}: the ids of {FILE} and of added_tokens_decoder in {CONFIG} leave gaps or clash")
    return tokenizer


def byte_pairs(ranks: Mapping[bytes, int], split: str, named: Mapping[str, int] | None = None) -> Tokenizer:
    """The tokenizer that joins bytes as tiktoken does with these ranks, after cutting text by the pattern `split`.

    Args:
        named: tokens that aren't bytes, and their ids; the others' ids are their ranks and the number of these.

    Raises:
        ValueError: `split` is no regular expression.
    """
    named = named or {}
    merges = {rank: pair for token, rank in ranks.items() if (pair := _joined_from(token, ranks)) is not None}
    model = BPE(
        {_letters(token): rank + len(named) for token, rank in ranks.items()} | dict(named),
        [(_letters(left), _letters(right)) for _, (left, right) in sorted(merges.items())],
        ignore_merges=True,
    )
    tokenizer = Tokenizer(model)
    try:
        regex = Regex(split)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{split!r} is no regular expression: {error}") from None
    tokenizer.pre_tokenizer = Sequence(
        [Split(regex, behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


def check_ranks(path: Path, ranks: Mapping[bytes, int]) -> None:
    """Raises: ConfigError: a byte has no rank, two tokens have one, or what they are would cost without end."""
    if any(len(token) > MAX_TOKEN_BYTES for token in ranks) or any(not 0 <= rank < MAX_IDS for rank in ranks.values()):
        raise ConfigError(
            f"{path}: a token has {MAX_TOKEN_BYTES} bytes at most, and its rank is from 0 to {MAX_IDS - 1}"
        )
    lacking = [byte for byte in range(256) if bytes((byte,)) not in ranks]
    if lacking or len(set(ranks.values())) < len(ranks):
        raise ConfigError(f"{path} must give each of the 256 bytes a rank, and no rank twice: fetch it again")


def _added(path: Path, config: Mapping[str, Any], start: int, vocab_size: int) -> dict[int, AddedToken]:
    """What follows the ranks, by id: tokens that are never split. Those without a name are special."""
    named: dict[int, AddedToken] = {}
    try:
        for key, entry in dict(config.get("added_tokens_decoder", {})).items():
            is_special = bool(entry.get("special", False))
            if int(key) >= start:  # as in Moonshot's code; what has a rank is no token of this kind
                named[int(key)] = AddedToken(str(entry["content"]), normalized=False, special=is_special)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ConfigError(f"{path / CONFIG}: added_tokens_decoder must give a content for each id") from None
    end = max(vocab_size, *(id + 1 for id in named)) if named else vocab_size
    if end > MAX_IDS:
        raise ConfigError(
            f"{path / CONFIG}, config.json: ids go up to {end - 1}, and {MAX_IDS - 1} is the most that can be"
        )
    reserved = {id: AddedToken(f"<|reserved_token_{id}|>", normalized=False, special=True) for id in range(start, end)}
    return reserved | named


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (OSError, ValueError, binascii.Error) as error:
        raise ConfigError(f"{path} can't be read: {error}; each line must be a token in base64 and its rank") from None
    check_ranks(path, ranks)
    return ranks


def _joined_from(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that tiktoken joins to this one; None: it never does, or it is one byte."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right) for left, right in pairwise(parts)]
        known = [rank for rank in joined if rank is not None]
        if not known:
            return None
        at = joined.index(min(known))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _letters(token: bytes) -> str:
    return "".join(LETTER_OF_BYTE[byte] for byte in token)
