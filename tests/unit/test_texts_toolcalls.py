"""Tool calls in text, whole or in pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinsmith.api.texts.toolcalls import ToolCall, ToolReader

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def read(*pieces: str) -> list[str | tuple[str, str]]:
    """Neighbouring texts joined, calls without their ids."""
    reader = ToolReader("call_")
    found: list[str | tuple[str, str]] = []
    for item in [item for piece in pieces for item in reader.add(piece)] + reader.end():
        if isinstance(item, ToolCall):
            assert item.call_id.startswith("call_")
            found.append((item.name, item.arguments))
        elif found and isinstance(found[-1], str):
            found[-1] += item
        else:
            found.append(item)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("just text \n", ["just text \n"]),
        (CALL, [("add", '{"a": 1}')]),
        (f"Let me see.\n\n{CALL}\n{CALL}\n", ["Let me see.", ("add", '{"a": 1}'), ("add", '{"a": 1}')]),
        (f"{CALL}\n and so", [("add", '{"a": 1}'), "and so"]),
        (CALL.removesuffix("</tool_call>"), [("add", '{"a": 1}')]),
        ('<tool_call>{"name": "go"}</tool_call>', [("go", "{}")]),
        ('<tool_call>{"name": "go", "arguments": "{\\"a\\": 2}"}</tool_call>', [("go", '{"a": 2}')]),
        ("<tool_call>{broken}</tool_call> x", ["<tool_call>{broken}</tool_call> x"]),
        ('<tool_call>{"name": "go", "arguments": [1]}</tool_call>', None),
        ('<tool_call>{"name": "go", "arguments": {"a": NaN}}</tool_call>', None),
        ('<tool_call>{"name": 3}</tool_call>', None),
        ('<tool_call>{"name": "\\ud800"}</tool_call>', None),
        ('<tool_call>{"name": "go", "arguments": {"a": "\\ud800"}}</tool_call>', None),
        (f"<tool_call>{'[' * 5000}</tool_call>", None),
        ('a <tool_call>{"name": "go", ', None),
        ("a <tool", None),
    ],
)
def test_calls_and_text(text: str, expected: list[str | tuple[str, str]] | None) -> None:
    assert read(text) == ([text] if expected is None else expected)
    assert read(*text) == read(text)


PARTS = st.sampled_from(["a", " ", "\n", "<", "<tool_call>", "</tool_call>", CALL, '{"name": "x"}', "<tool_"])


@given(parts=st.lists(PARTS, max_size=12), cut=st.integers(1, 30))
def test_pieces_make_the_whole(parts: list[str], cut: int) -> None:
    text = "".join(parts)
    assert read(*(text[at : at + cut] for at in range(0, len(text), cut))) == read(text)


def test_arguments_are_json() -> None:
    ((_, arguments),) = read('<tool_call>{"name": "x", "arguments": {"é": [1, {"b": null}]}}</tool_call>')
    assert json.loads(arguments) == {"é": [1, {"b": None}]}
