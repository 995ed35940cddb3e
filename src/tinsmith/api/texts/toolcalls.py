"""Tool calls in a model's text, as Qwen's and Hermes' templates teach them:

    <tool_call>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_call>

Text comes in pieces and goes out as soon as it can't be part of a call. What stands between the marks and is no call
stays text. White space before a call belongs to the call.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass

import msgspec

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """arguments: a JSON object, as text."""

    call_id: str
    name: str
    arguments: str


class ToolReader:
    def __init__(self, prefix: str) -> None:
        """prefix: what ids of calls begin with."""
        self._prefix = prefix
        self._held = ""
        self._is_after_call = False

    def add(self, text: str) -> list[str | ToolCall]:
        """New text; what is certain by now."""
        self._hold(text)
        found: list[str | ToolCall] = []
        while (start := self._held.find(OPEN)) >= 0:
            end = self._held.find(CLOSE, start)
            if end < 0:
                break
            end += len(CLOSE)
            call = self._parse(self._held[start + len(OPEN) : end - len(CLOSE)])
            found += [self._held[:start].rstrip(), call] if call else [self._held[:end]]
            rest, self._held, self._is_after_call = self._held[end:], "", call is not None
            self._hold(rest)
        sure = self._sure() if start < 0 else len(self._held[:start].rstrip())
        found.append(self._held[:sure])
        self._held = self._held[sure:]
        return [item for item in found if item]

    def end(self) -> list[str | ToolCall]:
        """Nothing more comes. A call that lacks its last mark alone is one."""
        start = self._held.find(OPEN)
        call = self._parse(self._held[start + len(OPEN) :]) if start >= 0 else None
        rest: list[str | ToolCall] = [self._held[:start].rstrip(), call] if call else [self._held]
        self._held = ""
        return [item for item in rest if item]

    def _hold(self, text: str) -> None:
        self._held += text
        if self._is_after_call:
            self._held = self._held.lstrip()
            self._is_after_call = not self._held

    def _sure(self) -> int:
        """Characters that can't belong to a call: all but white space and the beginning of a mark at the end."""
        held = next((n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n])), 0)
        return len(self._held[: len(self._held) - held].rstrip())

    def _parse(self, body: str) -> ToolCall | None:
        try:
            call = msgspec.json.decode(body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
            return None
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = msgspec.json.decode(arguments)
            except (ValueError, RecursionError):
                return None
        if not isinstance(arguments, dict):
            return None
        return ToolCall(f"{self._prefix}{secrets.token_hex(12)}", call["name"], json.dumps(arguments))
