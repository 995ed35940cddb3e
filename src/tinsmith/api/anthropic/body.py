"""Requests of Anthropic's Messages, and how they read as a chat in OpenAI's shape, which is what templates know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from tinsmith.api.texts.fields import FieldError, UnofferedError
from tinsmith.api.texts.messages import only, text_of
from tinsmith.api.texts.pictures import PLACEHOLDER, Gallery
from tinsmith.api.texts.prompts import Chat
from tinsmith.wire.media import encode_json

NO_CACHE_CONTROL = "prompts are cached without being asked to; leave it out"
NOT_KEPT = "requests are not kept under names; leave it out"
UNOFFERED: Mapping[str, str] = {
    "betas": "there are no betas; leave it out",
    "cache_control": NO_CACHE_CONTROL,
    "container": "nothing is run for the model",
    "context_management": "shorten the messages yourself",
    "diagnostics": "leave it out",
    "inference_geo": "the model runs where this server does; leave it out",
    "mcp_servers": "the server calls nobody; give tools and carry out their calls",
    "metadata": NOT_KEPT,
    "service_tier": "there is one tier; leave it out",
    "speed": "there is one speed; leave it out",
    "user_profile_id": NOT_KEPT,
    "workspace_id": NOT_KEPT,
}
HARMLESS: Mapping[str, Any] = {
    "metadata": {},
    "service_tier": "auto",
    "speed": "standard",
    "betas": [],
    "mcp_servers": [],
}
BETAS_WITHOUT_EFFECT = (
    "messages-2023-12-15", "output-128k-2025-02-19", "prompt-caching-2024-07-31", "structured-outputs-2025-11-13",
    "token-counting-2024-11-01",
)  # fmt: skip
NO_BLOCK_FIELDS = ("cache_control", "citations", "caller", "toolset")
NO_TOOL_FIELDS = (
    "allowed_callers", "cache_control", "defer_loading", "eager_input_streaming", "input_examples", "strict",
)  # fmt: skip


class PromptBody(Struct):
    """What becomes the prompt: all of a request to count tokens."""

    model: str
    messages: list[Any]
    system: Any = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    thinking: Any = None
    output_config: Any = None

    @property
    def json_schema(self) -> str | None:
        """The schema that the answer is held to, as text.

        Raises:
            FieldError, UnofferedError: something else than a format, or tools beside it.
        """
        if self.output_config is None:
            return None
        form = self.output_config.get("format") if isinstance(self.output_config, dict) else None
        if not isinstance(form, dict) or form.get("type") != "json_schema" or len(self.output_config) != 1:
            raise UnofferedError("output_config", "is not offered here but for a format of type json_schema")
        if self.tools:
            raise UnofferedError("output_config", "is not offered here beside tools: a call is no such text")
        only(form, ("type", "schema"), "output_config.format")
        if not isinstance(form.get("schema"), dict):
            raise FieldError("output_config.format.schema", "must be an object")
        return encode_json(form["schema"]).decode()


class MessagesBody(PromptBody, kw_only=True):
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_sequences: list[str] = []
    stream: bool = False


def check_betas(headers: Sequence[str]) -> None:
    """headers: each `anthropic-beta` of a request.

    Raises:
        UnofferedError: one that would change something.
    """
    for beta in (part.strip() for header in headers for part in header.split(",")):
        if beta and beta not in BETAS_WITHOUT_EFFECT:
            raise UnofferedError("anthropic-beta", f"{beta[:100]!r} is not offered here: leave it out")


def read_chat(body: PromptBody, gallery: Gallery) -> Chat:
    """A turn of the user with pictures keeps a list of parts; they go to the gallery.

    Raises:
        FieldError, UnofferedError: naming the field.
    """
    if not body.messages:
        raise FieldError("messages", "empty; give at least one message")
    messages: list[dict[str, Any]] = []
    if body.system is not None:
        messages.append({"role": "system", "content": _joined(body.system, "system")})
    for index, message in enumerate(body.messages):
        messages += _read_message(message, f"messages[{index}]", gallery)
    prefill = ""
    if messages[-1]["role"] == "assistant":
        if "tool_calls" in messages[-1]:
            raise FieldError(f"messages[{len(body.messages) - 1}]", "a tool_use must be followed by its tool_result")
        prefill = messages.pop()["content"]
    offered = _read_tools(body.tools or ())
    tools = offered if _uses_tools(body.tool_choice, is_any=bool(offered)) else None
    return Chat(messages, tools, prefill, hints=_hints(body.thinking), files=gallery.files)


def _read_message(message: Any, where: str, gallery: Gallery) -> list[dict[str, Any]]:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("user", "assistant"):
        raise FieldError(f"{where}.role", f"must be user or assistant, not {str(role)[:100]!r}")
    only(message, ("role", "content"), where)
    blocks = _blocks(message.get("content"), f"{where}.content")
    return _read_user(blocks, gallery) if role == "user" else [_read_assistant(blocks)]


def _read_user(blocks: Sequence[tuple[str, Mapping[str, Any]]], gallery: Gallery) -> list[dict[str, Any]]:
    """Results of tools are turns of their own; the text and pictures between them make turns of the user."""
    turns: list[dict[str, Any]] = []
    for where, block in blocks:
        if block.get("type") == "tool_result":
            only(block, ("type", "tool_use_id", "content", "is_error"), where, NO_BLOCK_FIELDS)
            text = _joined(block.get("content", ""), f"{where}.content")
            if block.get("is_error"):
                text = f"Error: {text}"
            turns.append({"role": "tool", "tool_call_id": text_of(block, "tool_use_id", where), "content": text})
            continue
        is_picture = gallery.is_open and block.get("type") == "image"
        text = "" if is_picture else _text(block, where)
        if not turns or turns[-1]["role"] != "user":
            turns.append({"role": "user", "content": text})
        elif isinstance(turns[-1]["content"], str):
            turns[-1]["content"] += text
        else:
            turns[-1]["content"].append({"type": "text", "text": text})
        if is_picture:
            turns[-1]["content"] = [*_parts(turns[-1]["content"]), _picture(block, where, gallery)]
    return turns


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a turn that a picture follows; what is empty is left out."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [part for part in parts if part.get("text") != ""]


def _picture(block: Mapping[str, Any], where: str, gallery: Gallery) -> dict[str, Any]:
    only(block, ("type", "source"), where, NO_BLOCK_FIELDS)
    source, at = block.get("source"), f"{where}.source"
    kind = source.get("type") if isinstance(source, dict) else None
    if not isinstance(source, dict) or kind not in ("base64", "url"):
        raise UnofferedError(at, "other than of type base64 or url is not offered here")
    if kind == "base64":
        only(source, ("type", "media_type", "data"), at)
        gallery.add_base64(text_of(source, "media_type", at), text_of(source, "data", at), f"{at}.data")
    else:
        only(source, ("type", "url"), at)
        gallery.add_url(text_of(source, "url", at), f"{at}.url")
    return dict(PLACEHOLDER)


def _read_assistant(blocks: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    text = ""
    calls: list[dict[str, Any]] = []
    for where, block in blocks:
        if block.get("type") != "tool_use":
            text += _text(block, where)
            continue
        only(block, ("type", "id", "name", "input"), where, NO_BLOCK_FIELDS)
        if not isinstance(block.get("input"), dict):
            raise FieldError(f"{where}.input", "must be an object")
        function = {"name": text_of(block, "name", where), "arguments": block["input"]}
        calls.append({"type": "function", "id": text_of(block, "id", where), "function": function})
    return {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}


def _blocks(content: Any, where: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Each block with its place; a string is one block of text."""
    if isinstance(content, str):
        return [(where, {"type": "text", "text": content})]
    if not isinstance(content, list) or not content:
        raise FieldError(where, "must be a string or a list of content blocks")
    for index, block in enumerate(content):
        if not isinstance(block, dict):
            raise FieldError(f"{where}[{index}]", "must be a content block")
    return [(f"{where}[{index}]", block) for index, block in enumerate(content)]


def _joined(content: Any, where: str) -> str:
    return "".join(_text(block, at) for at, block in _blocks(content or "", where))


def _text(block: Mapping[str, Any], where: str) -> str:
    if block.get("type") != "text":
        kind = str(block.get("type"))[:100]
        raise UnofferedError(where, f"of type {kind!r} is not offered here: send text, tool_use and tool_result")
    only(block, ("type", "text"), where, NO_BLOCK_FIELDS)
    return text_of(block, "text", where)


def _read_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(tool, dict) or tool.get("type", "custom") != "custom":
            raise UnofferedError(where, "runs on Anthropic's side and is not offered here: send tools of your own")
        given = {name: item for name, item in tool.items() if (name, item) != ("strict", False)}
        only(given, ("type", "name", "description", "input_schema"), where, NO_TOOL_FIELDS)
        if not isinstance(tool.get("input_schema"), dict):
            raise FieldError(f"{where}.input_schema", "must be an object")
        function: dict[str, Any] = {"name": text_of(tool, "name", where)}
        if "description" in tool:
            function["description"] = text_of(tool, "description", where)
        read.append({"type": "function", "function": {**function, "parameters": tool["input_schema"]}})
    return read


def _uses_tools(choice: Any, *, is_any: bool) -> bool:
    if choice is None:
        return is_any
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind not in ("auto", "none"):
        raise UnofferedError(
            "tool_choice", "other than auto and none is not offered here: a model can't be made to call"
        )
    if choice.get("disable_parallel_tool_use"):
        raise UnofferedError(
            "tool_choice.disable_parallel_tool_use", "is not offered here: the model decides how many tools it calls"
        )
    only(choice, ("type", "disable_parallel_tool_use"), "tool_choice")
    if kind == "auto" and not is_any:
        raise FieldError("tool_choice", "needs tools: give some, or leave it out")
    return bool(kind == "auto")


def _hints(thinking: Any) -> dict[str, Any]:
    if thinking is None:
        return {}
    if thinking == {"type": "disabled"}:
        return {"enable_thinking": False}
    raise UnofferedError("thinking", "other than disabled is not offered here: a model thinks in its text if it does")
