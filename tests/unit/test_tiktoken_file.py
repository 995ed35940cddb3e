"""Moonshot's tokenizer files: the ids of `tiktoken`, through tinsmith and through transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.kimi import CORPUS, NAMED, NUM_ADDED, PATTERN, encoding, ranks_of, write_tokenizer
from tinsmith.bases import tiktoken_file
from tinsmith.bases.catalog import parse
from tinsmith.bases.tokenizer import ChatTokenizer
from tinsmith.bases.tokenizer_files import check_tokenizer, converted, tokenizer_files
from tinsmith.errors import ConfigError

RANKS = ranks_of(600)
HARD = [
    CORPUS, "", " ", "中文English混合々〇〆ヶ", "汉字abcDEFghi'LL 'S 's",
    "\u3000\u00a0 \u2003x\x85\u2028\n\n \t\r\n\r\r y ", "👨\u200d👩\u200d👧🏳\ufe0f\u200d🌈🇩🇪👍🏽",
    "a\u0301\u0300é ÅΩ ǅ ʰ ª", "ſ's K'T 'ſ", "𠀀𰀀𱍐\U0002ebf0", "x\x00\x01\x7f\ufeff\ufffd\U0010ffff",
    "１２３４ ⅣⅤ ¼½ 12345678", "[BOS]<|im_user|>user<|im_middle|>hi<|im_end|> <|im_end| ><|reserved_token_605|>[EOS]",
    "    if x:\n\n\n        y  = 1\n\t\t\n", "ا\u064eلعربية עברית हिन्दी ไทย", "aaaaaaaaaaaaaaaa" * 9, "月" * 700,
    " " * 300,
]  # fmt: skip
OF_CHARACTERS = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
OF_PIECES = st.lists(st.sampled_from([*HARD[3:9], *CORPUS.split(), *(text for text, _ in NAMED.values())])).map("".join)


@pytest.fixture(scope="module")
def theirs() -> tiktoken.Encoding:
    return encoding(RANKS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tokenizer(tmp_path_factory.mktemp("kimi"), RANKS)
    (path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "kimi_k2",
                "vocab_size": len(RANKS) + NUM_ADDED,
                "auto_map": {"AutoConfig": "x.Y"},
                "rope_scaling": {"type": "yarn", "factor": 32.0},
            }
        )
    )
    return path


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(model, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def ours(made: Path) -> ChatTokenizer:
    return ChatTokenizer.from_dir(made)


def test_the_split_is_moonshots() -> None:
    assert tiktoken_file.KIMI == PATTERN


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_hard_texts(ours: ChatTokenizer, theirs: tiktoken.Encoding, text: str) -> None:
    ids = theirs.encode(text, allowed_special="all")
    assert ours.encode(text) == ids
    assert ours.decode(ids) == text
    assert ours.encode(text, add_special_tokens=True) == ids


@given(text=OF_CHARACTERS | OF_PIECES)
def test_any_text(ours: ChatTokenizer, theirs: tiktoken.Encoding, text: str) -> None:
    ids = theirs.encode(text, allowed_special="all")
    assert ours.encode(text) == ids
    assert ours.decode(ids) == text


@given(data=st.binary(max_size=200))
def test_bytes_that_are_text(ours: ChatTokenizer, theirs: tiktoken.Encoding, data: bytes) -> None:
    text = data.decode(errors="ignore")
    assert ours.encode(text) == theirs.encode(text, allowed_special="all")


@given(ids=st.lists(st.integers(0, len(RANKS) + NUM_ADDED - 1), max_size=60))
def test_any_ids(ours: ChatTokenizer, theirs: tiktoken.Encoding, ids: list[int]) -> None:
    assert ours.decode(ids) == theirs.decode(ids)
    for token in ids:
        assert ours.token_bytes(token) == theirs.decode_single_token_bytes(token)


def test_every_character(ours: ChatTokenizer, theirs: tiktoken.Encoding) -> None:
    """Both engines know each in the same classes, and the same versions of Unicode."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for at in range(0, len(characters), 1 << 16):
        text = "a".join(characters[at : at + (1 << 16)])
        assert ours.encode(text) == theirs.encode(text, allowed_special="all")


@pytest.mark.parametrize("seed", range(12))
def test_ranks_that_no_training_gave(tmp_path: Path, seed: int) -> None:
    """In any order, some reached in several ways or in none."""
    draw = random.Random(seed)
    letters = b"ab" if seed % 2 else b"abc "
    tokens = {bytes(draw.choices(letters, k=draw.randint(2, 6))) for _ in range(60)}
    order = [*(bytes((byte,)) for byte in range(256)), *sorted(tokens)]
    draw.shuffle(order)
    ranks = {token: rank for rank, token in enumerate(order)}
    config = json.loads((write_tokenizer(tmp_path, ranks) / "tokenizer_config.json").read_text())
    mine = tiktoken_file.read_tokenizer(tmp_path, {**config, "added_tokens_decoder": {}}, len(ranks))
    other = encoding(ranks, num_added=0)
    for _ in range(300):
        text = bytes(draw.choices(letters, k=draw.randint(1, 40))).decode()
        assert mine.encode(text).ids == other.encode(text)


def test_transformers_reads_the_copy(made: Path, ours: ChatTokenizer) -> None:
    """As clients on this machine do, with and without trust in code: there is none."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好, what's 2 + 3?"}]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    for trusts in (False, True):
        theirs = AutoTokenizer.from_pretrained(made, trust_remote_code=trusts)
        for text in HARD:
            assert theirs.encode(text) == ours.encode(text)
        for options in ({}, {"tools": tools}):
            chat = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)
            assert chat == ours.render(turns, **options)
        assert (theirs.eos_token_id, theirs.vocab_size) == (len(RANKS) + 1, len(RANKS))
        ids = [len(RANKS) + 2, 5, len(RANKS) + 6, len(RANKS) + 7]
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special_tokens=True)
    assert ours.render(turns).endswith("3?<|im_end|><|im_assistant|>assistant<|im_middle|>")
    assert "<|tool_call_begin|>" in ours.decode(ids, skip_special_tokens=True)


def test_a_copy_is_made_once_and_anew_for_other_files(model: Path, tmp_path: Path) -> None:
    first = converted(model, tmp_path)
    stamp = (first / "tokenizer.json").stat().st_mtime_ns
    assert converted(model, tmp_path) == first
    assert (first / "tokenizer.json").stat().st_mtime_ns == stamp
    assert {"tokenizer.json", "tokenizer_config.json", "config.json"} == {file.name for file in tokenizer_files(first)}
    assert all("auto_map" not in file.read_text() for file in tokenizer_files(first))
    (model / "chat_template.jinja").write_text("another")
    try:
        second = converted(model, tmp_path)
        assert second != first
        assert (second / "chat_template.jinja").read_text() == "another"
    finally:
        (model / "chat_template.jinja").unlink()
    assert {path.name for path in (tmp_path / "tokenizers").iterdir()} == {first.name, second.name}


def test_a_directory_with_a_tokenizer_json_is_left_as_it_is(model: Path, made: Path, tmp_path: Path) -> None:
    assert converted(made, tmp_path) == made
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}}, "tokenization_qwen.QWenTokenizer"),
        ({"auto_map": None, "tokenizer_class": "ChatGLM4Tokenizer"}, "ChatGLM4Tokenizer.*put that beside"),
        ({"added_tokens_decoder": {"x": {"content": "y"}}}, "a content for each id"),
        ({"added_tokens_decoder": {"1000": {"special": True}}}, "a content for each id"),
        ({"added_tokens_decoder": {"601": {"content": "a"}}}, "leave gaps or clash"),
        ({"added_tokens_decoder": {"9999999999999": {"content": "z"}}}, "is the most that can be"),
    ],
)
def test_a_configuration_that_cannot_be_followed(
    model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = {**json.loads((model / "tokenizer_config.json").read_text()), **changes}
    write_tokenizer(tmp_path, RANKS)
    with pytest.raises(ConfigError, match=message):
        tiktoken_file.read_tokenizer(tmp_path, config, len(RANKS) + NUM_ADDED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("YQ== 0\n", "256 bytes"),
        ("YQ==\n", "token in base64"),
        ("?? 0\n", "token in base64"),
        ("", "256 bytes"),
        ("YQ== -1\n", "its rank is from 0"),
        ("YQ== 99999999999\n", "its rank is from 0"),
        ("YWFh" * 1024 + " 0\n", "1024 bytes at most"),
    ],
)
def test_a_broken_file_of_ranks(model: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tiktoken.model").write_text(text)
    config = json.loads((model / "tokenizer_config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        tiktoken_file.read_tokenizer(tmp_path, config, 2000)


def test_ranks_with_gaps(model: Path, tmp_path: Path) -> None:
    """Ids after a gap would be shifted."""
    write_tokenizer(tmp_path, {token: rank + (rank > 400) for token, rank in RANKS.items()})
    config = json.loads((model / "tokenizer_config.json").read_text())
    with pytest.raises(ConfigError, match="leave gaps"):
        tiktoken_file.read_tokenizer(tmp_path, config, len(RANKS) + NUM_ADDED)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("tokenizer.model", "only tokenizer.model: .*save_pretrained"),
        ("vocab.json", "only vocab.json: .*save_pretrained"),
        ("README.md", "no tokenizer.json; it must be a Hugging Face model directory"),
    ],
)
def test_other_forms_are_named_with_their_cure(tmp_path: Path, file: str, message: str) -> None:
    for name in ("config.json", file):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=message):
        parse(f"a={tmp_path}")


def test_code_that_is_not_known_is_refused_at_once(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, {}, auto_map={"AutoTokenizer": ["own--tokenization_own.OwnTokenizer", None]})
    with pytest.raises(ConfigError, match=r"own--tokenization_own\.OwnTokenizer"):
        check_tokenizer(tmp_path)
    write_tokenizer(tmp_path, {}, auto_map={"AutoTokenizer": ["org/model--tokenization_moonshot.TikTokenTokenizer"]})
    check_tokenizer(tmp_path)
