"""A directory of a small model as Moonshot publishes theirs: tiktoken.model, tokenizer_config.json and code."""

from __future__ import annotations

import base64
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tiktoken

CORPUS = """def train(model, batches):\n    for batch in batches:\n        loss = model.forward(batch).mean()
The quick brown fox jumps over the lazy dog; it's what they've said, and I'll say it's so. THE END. The Model's Weights
月之暗面科技有限公司的模型是开源的，训练模型需要很多数据。人工智能模型可以写代码。中文English混合，第12章。
これはテストです。日本語の文章。Größe, café, naïve. Привет, мир! 안녕하세요 🙂🙂 1234567890 2024-07-11 3.14159
{"name": "tool", "arguments": {"x": [1, 2, 3], "y": null}}\r\n\r\n\t\treturn x == y\n\n\n        pass   \n"""
NAMED = {0: ("[BOS]", True), 1: ("[EOS]", True), 2: ("<|im_end|>", True), 3: ("<|im_user|>", True),
         4: ("<|im_assistant|>", True), 6: ("<|tool_call_begin|>", False), 17: ("<|im_middle|>", True),
         18: ("<|im_system|>", True)}  # fmt: skip
"""From the first id after the ranks on, and whether it is special; between them are ids without a name."""
NUM_ADDED = 32
# as tokenization_kimi.py of Kimi-K2 has it, written out
PATTERN = "|".join(
    [
        r"""[\p{Han}]+""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
TEMPLATE = (
    "{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{%- endif -%}"
    "{%- for message in messages -%}<|im_{{ message.role }}|>{{ message.role }}<|im_middle|>{{ message.content }}"
    "<|im_end|>{%- endfor -%}{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)


def ranks_of(num_tokens: int) -> dict[bytes, int]:
    """All bytes, in another order than theirs, and what joining the most frequent neighbours of `CORPUS` gives."""
    ranks = {bytes(((byte * 37 + 11) % 256,)): byte for byte in range(256)}
    words = [[bytes((byte,)) for byte in word.encode()] for word in CORPUS.replace(" ", "\n ").split("\n")]
    while len(ranks) < num_tokens:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.setdefault(left + right, len(ranks))
        for word in words:
            for at in range(len(word) - 2, -1, -1):
                if word[at : at + 2] == [left, right]:
                    word[at : at + 2] = [left + right]
    return ranks


def encoding(ranks: dict[bytes, int], num_added: int = NUM_ADDED) -> tiktoken.Encoding:
    """The same, as Moonshot's code builds it."""
    import tiktoken

    named = {len(ranks) + at: text for at, (text, _) in NAMED.items()} if num_added else {}
    ids = range(len(ranks), len(ranks) + num_added)
    special = {named.get(id, f"<|reserved_token_{id}|>"): id for id in ids}
    return tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def write_tokenizer(path: Path, ranks: dict[bytes, int], **config: Any) -> Path:
    """config: fields of tokenizer_config.json that differ."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (path / "tiktoken.model").write_text("".join(lines))
    added = {
        str(len(ranks) + at): {"content": text, "special": is_special, "lstrip": False, "rstrip": False}
        for at, (text, is_special) in NAMED.items()
    }
    fields = {
        "added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "[EOS]", "chat_template": TEMPLATE,
        "model_max_length": 1_000_000, "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}, **config,
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(fields))
    (path / "tokenization_kimi.py").write_text("raise AssertionError('code of a directory was run')\n")
    return path


def write_model(path: Path, ranks: dict[bytes, int]) -> Path:
    """Its weights and config.json too, small and random."""
    import torch

    from tests.families.configs import CONFIGS
    from tests.families.hub_configs import HUB_CONFIGS

    torch.manual_seed(3)
    kind, sizes = CONFIGS["kimi_k2"]
    config = type(sizes)(**{**sizes.to_dict(), "vocab_size": len(ranks) + NUM_ADDED})
    kind(config).save_pretrained(path)
    fields = {**HUB_CONFIGS["kimi_k2"], "vocab_size": len(ranks) + NUM_ADDED, "eos_token_id": len(ranks) + 1}
    (path / "config.json").write_text(json.dumps(fields))
    return write_tokenizer(path, ranks)
