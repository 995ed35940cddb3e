"""From chats to prompts: what of a request the chat template has a place for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tinsmith.api.texts.fields import FieldError, UnofferedError
from tinsmith.api.texts.models import Model
from tinsmith.api.texts.prompts import Chat, chat_prompt
from tinsmith.bases.catalog import SHIPPED_NAME, SHIPPED_PATH, BaseRef, describe
from tinsmith.bases.tokenizer import ChatTokenizer
from tinsmith.wire.images import BLIND

MODEL = Model(SHIPPED_NAME, describe(BaseRef(SHIPPED_NAME, SHIPPED_PATH)))
SPEAKERS = (
    "{% set mood = mood | default('calm') %}{{ mood }}"
    "{% for m in messages %}{% if m.role == 'user' and m.name %}{{ m.name }}: {% endif %}{{ m.content }}{% endfor %}"
)
USER = {"role": "user", "content": "Hi."}


def with_template(tmp_path: Path, source: str) -> ChatTokenizer:
    shutil.copy(SHIPPED_PATH / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source)
    return ChatTokenizer.from_dir(tmp_path)


def test_names_and_switches_reach_a_template_that_reads_them(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, SPEAKERS)
    assert tokenizer.switches() == {"mood"}
    chat = Chat([{**USER, "name": "anna"}], options={"mood": "glad"}, hints={"enable_thinking": False})
    assert tokenizer.decode(chat_prompt(tokenizer, MODEL, chat, BLIND).tokens) == "gladanna: Hi."


def test_those_that_it_does_not_read_are_refused_by_name(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, SPEAKERS)
    named = {"role": "assistant", "content": "Hello.", "name": "bot"}
    with pytest.raises(UnofferedError, match=r"^messages\[1\].name is not offered"):
        chat_prompt(tokenizer, MODEL, Chat([{**USER, "name": "anna"}, named]), BLIND)
    with pytest.raises(FieldError, match=r"'modo' can't be set here.* has: mood"):
        chat_prompt(tokenizer, MODEL, Chat([USER], options={"modo": "glad"}), BLIND)


def test_nothing_in_a_chat_takes_the_place_of_what_the_template_gets(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ self }}{{ tools }}{{ messages[0].content }}{{ namespace }}{{ loop }}")
    assert not tokenizer.switches()
    plain = tokenizer.render([USER])
    taking = dict.fromkeys(("self", "messages_", "documents", "args", "kwargs"), "taken")
    assert tokenizer.render([USER], **taking) == plain
