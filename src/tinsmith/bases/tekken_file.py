"""A tokenizer given as Mistral's `tekken.json` as the `tokenizers` one that gives the same ids.

The file has tokens with their ranks, the pattern by which text is split, and names of control tokens. Control tokens
have the first ids (1,000 of them; those without a name are called `<SPECIAL_20>`), then come as many ranks as the
vocabulary has room for, as in `mistral_common`. Older files don't name control tokens: theirs are `OLDER`.

Where `mistral_common` takes a control token that is written out in a text for plain letters, it becomes its id here,
as in every tokenizer.json: chat templates write them.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from tinsmith.bases.tiktoken_file import MAX_IDS, byte_pairs, check_ranks
from tinsmith.errors import ConfigError

FILE = "tekken.json"
BOS, EOS = "<s>", "</s>"
SPECIAL = {"bos_token": BOS, "eos_token": EOS, "unk_token": "<unk>", "pad_token": "<pad>"}
"""What tokenizer_config.json would say of it."""
OLDER = [
    "<unk>", BOS, EOS, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
]  # fmt: skip
OLDER_VERSIONS = ("v1", "v2", "v3", "v7")  # later files name their control tokens


def read_tekken(path: Path, data: dict[str, Any], vocab_size: int) -> Tokenizer:
    """The tokenizer of such a file.

    Args:
        path: the file, for messages; data: what it holds.
        vocab_size: the model's.

    Raises:
        ConfigError: the file is broken, or has more ids than the model.
    """
    try:
        config = data["config"]
        num_ids, num_special = int(config["default_vocab_size"]), int(config["default_num_special_tokens"])
        names = _names(data, num_special)
        if not 0 < num_special < num_ids <= MAX_IDS:
            raise ValueError(f"{num_special} control tokens of {num_ids} ids can't be")
        ranks = {
            base64.b64decode(entry["token_bytes"], validate=True): int(entry["rank"])
            for entry in data["vocab"][: num_ids - num_special]
        }
        if sorted(ranks.values()) != list(range(num_ids - num_special)):
            raise ValueError(f"{num_ids - num_special} tokens must have the ranks from 0 on")
        clashing = sorted(name for name in names if name.encode() in ranks)
        if clashing:
            raise ValueError(f"{', '.join(clashing)} are control tokens and others too")
        check_ranks(path, ranks)
        tokenizer = byte_pairs(ranks, str(config["pattern"]), names)
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise ConfigError(f"{path} can't be read as one of Mistral's: {error or type(error).__name__}") from None
    if num_ids > vocab_size:
        raise ConfigError(f"{path} has {num_ids} ids, and the model's vocab_size is {vocab_size}")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, names[BOS])]
    )
    return tokenizer


def _names(data: dict[str, Any], num_special: int) -> dict[str, int]:
    """All control tokens and their ids.

    Raises:
        ValueError: they are not there, or clash.
    """
    given = data.get("special_tokens")
    if given is None and data["config"].get("version") not in OLDER_VERSIONS:
        raise ValueError("special_tokens are missing")
    if given is None:
        names = {name: at for at, name in enumerate(OLDER)}
    else:
        names = {str(entry["token_str"]): int(entry["rank"]) for entry in given}
    filled = names | {f"<SPECIAL_{at}>": at for at in range(len(names), num_special)}
    if sorted(filled.values()) != list(range(num_special)) or not {BOS, EOS} <= set(names):
        raise ValueError(
            f"special_tokens must be {num_special} at most with the ids from 0 on, {BOS} and {EOS} among them"
        )
    return filled
