"""Against transformers, byte for byte, on the shipped model."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tinsmith.bases.catalog import SHIPPED_PATH
from tinsmith.bases.tokenizer import ChatTokenizer
from tinsmith.errors import ConfigError, UnsupportedError, UserError

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"x": {}}}}}
CALL = {"function": {"name": "add", "arguments": {"x": 1, "text": "ä <b>"}}}
USER = {"role": "user", "content": "What is 2 + 3?"}
CHATS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([USER], {}),
    ([{"role": "system", "content": "Be brief."}, USER], {"add_generation_prompt": False}),
    ([USER], {"enable_thinking": False}),
    ([USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n5"}, USER], {}),
    ([USER, {"role": "assistant", "content": "5", "reasoning": "two and three"}], {}),
    ([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "5"}], {}),
    ([{"role": "system", "content": "ü"}, USER], {"tools": [TOOL]}),
    ([USER, {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}], {"tools": [TOOL]}),
]


@pytest.fixture(scope="module")
def ours() -> ChatTokenizer:
    return ChatTokenizer.from_dir(SHIPPED_PATH)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return AutoTokenizer.from_pretrained(SHIPPED_PATH)


@given(text=st.text(max_size=200))
def test_text_encodes_and_decodes_alike(ours: ChatTokenizer, theirs: Any, text: str) -> None:
    tokens = ours.encode(text)
    assert tokens == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(tokens) == theirs.decode(tokens)


def test_other_threads_run_while_a_long_text_is_encoded(ours: ChatTokenizer) -> None:
    gaps, is_done = [], threading.Event()

    def watch() -> None:
        last = time.monotonic()
        while not is_done.wait(0.005):
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    try:
        count = ours.count("one two " * 60_000)
    finally:
        elapsed_s = time.monotonic() - started
        is_done.set()
        watcher.join()
    assert count == len(ours.encode("one two " * 60_000))
    assert max(gaps, default=elapsed_s) < elapsed_s / 2


@given(tokens=st.lists(st.integers(0, 1011), max_size=60))
def test_any_tokens_decode_alike(ours: ChatTokenizer, theirs: Any, tokens: list[int]) -> None:
    assert ours.decode(tokens) == theirs.decode(tokens)
    assert ours.decode(tokens, skip_special_tokens=True) == theirs.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(("messages", "options"), CHATS)
def test_chats_render_alike(
    ours: ChatTokenizer, theirs: Any, messages: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    options = {"add_generation_prompt": True, **options}
    assert ours.render(messages, **options) == theirs.apply_chat_template(messages, tokenize=False, **options)
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    assert ours.encode(ours.render(messages, **options)) == expected


def test_special_tokens_have_ids(ours: ChatTokenizer, theirs: Any) -> None:
    assert ours.encode("<|im_end|>") == [theirs.convert_tokens_to_ids("<|im_end|>")] == [1000]
    assert ours.vocab_size == len(theirs)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED_PATH, tmp_path / "model"))


def with_template(model: Path, source: str) -> ChatTokenizer:
    (model / "chat_template.jinja").write_text(source)
    return ChatTokenizer.from_dir(model)


def test_a_template_cannot_leave_its_sandbox(model: Path) -> None:
    tokenizer = with_template(model, "{{ messages.__class__.__mro__ }}")
    with pytest.raises(UserError, match="unsafe"):
        tokenizer.render([USER])
    tokenizer = with_template(model, "{{ messages.append(1) }}")
    with pytest.raises(UserError, match="unsafe"):
        tokenizer.render([USER])


def test_a_template_can_refuse(model: Path) -> None:
    tokenizer = with_template(model, "{{ raise_exception('no system turns') }}")
    with pytest.raises(UserError, match="no system turns"):
        tokenizer.render([USER])


def test_generation_marks_are_transparent(model: Path) -> None:
    assert with_template(model, "a{% generation %}b{% endgeneration %}c").render([USER]) == "abc"


def test_templates_in_the_config_are_found(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": "plain{{ eos_token }}"},
        {"name": "tool_use", "template": "tools"},
    ]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = ChatTokenizer.from_dir(model)
    assert tokenizer.render([USER]) == "plain<|im_end|>"
    assert tokenizer.render([USER], tools=[TOOL]) == "tools"


def test_a_model_without_a_template_says_so(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    tokenizer = ChatTokenizer.from_dir(model)
    with pytest.raises(UnsupportedError, match="no chat template"):
        tokenizer.render([USER])


def test_trouble_names_the_file(model: Path) -> None:
    with pytest.raises(ConfigError, match="chat template"):
        with_template(model, "{% if %}")
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        ChatTokenizer.from_dir(model)
