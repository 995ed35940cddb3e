"""Mistral's tokenizer files: the ids of `tiktoken` behind the control tokens, through tinsmith and transformers."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.kimi import CORPUS, ranks_of
from tinsmith.bases.catalog import parse
from tinsmith.bases.tokenizer import ChatTokenizer
from tinsmith.bases.tokenizer_files import converted, tokenizer_bytes
from tinsmith.errors import ConfigError, UnsupportedError

RANKS = ranks_of(600)
NUM_SPECIAL, NUM_IDS = 40, 590  # as in the published files, some tokens are beyond the vocabulary
KNOWN = {token: rank for token, rank in RANKS.items() if rank < NUM_IDS - NUM_SPECIAL}
# of tekken_240911.json
PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
NAMED = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[THINK]"]
HARD = [CORPUS, "", " ", "aB's 'LL // \n/\r\n  x", "汉字abc １２３ ⅣⅤ", "👨\u200d👩🏽 e\u0301 \x00\u2028 ", "a" * 99]
OF_CHARACTERS = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)


def write(path: Path, **changes: Any) -> Path:
    """changes: of tekken.json; of None a key is left out."""
    config = {"pattern": PATTERN, "default_vocab_size": NUM_IDS, "default_num_special_tokens": NUM_SPECIAL}
    vocab = [{"rank": rank, "token_bytes": base64.b64encode(token).decode()} for token, rank in RANKS.items()]
    special = [{"rank": at, "token_str": name, "is_control": True} for at, name in enumerate(NAMED)]
    data = {
        "config": {**config, "version": "v13", **changes.pop("config", {})},
        "vocab": sorted(vocab, key=lambda entry: int(entry["rank"])),
        "special_tokens": special,
        **changes,
    }
    (path / "tekken.json").write_text(json.dumps({name: value for name, value in data.items() if value is not None}))
    (path / "config.json").write_text(json.dumps({"model_type": "mistral3", "text_config": {"vocab_size": NUM_IDS}}))
    return path


@pytest.fixture(scope="module")
def theirs() -> tiktoken.Encoding:
    return tiktoken.Encoding("tekken", pat_str=PATTERN, mergeable_ranks=KNOWN, special_tokens={})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(write(tmp_path_factory.mktemp("mistral")), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def ours(made: Path) -> ChatTokenizer:
    return ChatTokenizer.from_dir(made)


def shifted(ids: list[int]) -> list[int]:
    return [id + NUM_SPECIAL for id in ids]


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_hard_texts(ours: ChatTokenizer, theirs: tiktoken.Encoding, text: str) -> None:
    ids = shifted(theirs.encode(text))
    assert ours.encode(text) == ids
    assert ours.encode(text, add_special_tokens=True) == [1, *ids]
    assert ours.decode(ids) == text


@given(text=OF_CHARACTERS)
def test_any_text(ours: ChatTokenizer, theirs: tiktoken.Encoding, text: str) -> None:
    assert ours.encode(text) == shifted(theirs.encode(text))


def test_each_id_is_what_it_is_for_mistral(ours: ChatTokenizer, theirs: tiktoken.Encoding) -> None:
    assert ours.vocab_size == NUM_IDS
    names = [*NAMED, *(f"<SPECIAL_{id}>" for id in range(len(NAMED), NUM_SPECIAL))]
    assert [ours.decode([id]) for id in range(NUM_SPECIAL)] == names
    assert ours.encode("<s>[INST][/INST]") == [1, 3, 4]
    for id in range(NUM_SPECIAL, NUM_IDS):
        assert ours.token_bytes(id) == theirs.decode_single_token_bytes(id - NUM_SPECIAL)


def test_transformers_reads_the_copy(made: Path, ours: ChatTokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(made)
    for text in HARD:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert theirs.decode([1, *shifted([5, 6]), 2], skip_special_tokens=True) == ours.decode(shifted([5, 6]))


def test_a_chat_template_beside_it_is_used(tmp_path: Path, ours: ChatTokenizer) -> None:
    with pytest.raises(UnsupportedError, match=r"no chat template.*put a chat_template\.jinja into its directory"):
        ours.render([{"role": "user", "content": "hi"}])
    write(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}[INST]{{ messages[0].content }}[/INST]")
    chat = ChatTokenizer.from_dir(converted(tmp_path, tmp_path / "data"))
    assert chat.render([{"role": "user", "content": "hi"}]) == "<s>[INST]hi[/INST]"


def test_older_files_have_the_names_of_their_time(tmp_path: Path) -> None:
    path = write(tmp_path, special_tokens=None, config={"version": "v3"})
    made = ChatTokenizer.from_dir(converted(path, tmp_path / "data"))
    assert made.encode("<unk><s></s>[INST][IMG]<pad>[TOOL_CONTENT]<SPECIAL_20>") == [0, 1, 2, 3, 10, 11, 19, 20]


def test_a_directory_with_such_a_file_is_a_base(tmp_path: Path) -> None:
    (write(tmp_path) / "model.safetensors").write_bytes(b"{}")
    assert parse(f"a={tmp_path}").path == tmp_path
    assert tokenizer_bytes(tmp_path) == (tmp_path / "tekken.json").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"special_tokens": None}, "special_tokens are missing"),
        ({"special_tokens": [{"rank": 0, "token_str": "<s>"}]}, "ids from 0 on"),
        ({"special_tokens": [{"rank": at, "token_str": n} for at, n in enumerate([*NAMED, "a"])]}, "and others too"),
        ({"vocab": []}, "ranks from 0 on"),
        ({"vocab": [{"rank": 0, "token_bytes": "??"}]}, "can't be read"),
        ({"vocab": {}}, "can't be read"),
        ({"config": {"pattern": "("}}, "no regular expression"),
        ({"config": {"default_vocab_size": NUM_IDS + 1}}, "590"),
        ({"config": {"default_num_special_tokens": -1}}, "can't be read"),
        ({"config": {"default_vocab_size": 1 << 40}}, "can't be"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"tekken\.json.*{message}"):
        converted(write(tmp_path, **changes), tmp_path / "data")
    assert not list((tmp_path / "data").rglob("tokenizer.json"))
