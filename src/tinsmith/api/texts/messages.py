"""Messages in OpenAI's shape, checked and made plain for chat templates: text as one string, arguments as objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tinsmith.api.texts.fields import FieldError, UnofferedError
from tinsmith.api.texts.pictures import PLACEHOLDER, Gallery, is_picture

ROLES = ("system", "developer", "user", "assistant", "tool")
FIELDS: Mapping[str, tuple[str, ...]] = {
    "assistant": ("role", "content", "name", "tool_calls", "reasoning_content"),
    "tool": ("role", "content", "name", "tool_call_id"),
}
PLAIN_FIELDS = ("role", "content", "name")
DETAILS = (("detail", "auto"), ("detail", "high"))  # what happens anyway
UNOFFERED = ("audio", "function_call", "refusal", "annotations", "images")


def plain_messages(messages: Sequence[Any], gallery: Gallery) -> list[dict[str, Any]]:
    """A content with pictures stays a list of parts; they go to the gallery.

    Raises:
        FieldError, UnofferedError: naming the message and its field.
    """
    if not messages:
        raise FieldError("messages", "empty; give at least one message")
    return [_plain_message(message, f"messages[{index}]", gallery) for index, message in enumerate(messages)]


def plain_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Tools of type function, as templates read them.

    Raises:
        FieldError, UnofferedError: naming the tool and its field.
    """
    return [_plain_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def joined_text(content: Any, where: str) -> str:
    """A string, or the text of a list of text parts, joined without anything between them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise FieldError(where, "must be a string or a list of text parts")
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise UnofferedError(f"{where}[{index}]", f"of type {str(kind)[:100]!r} is not offered here: send text")
        only(part, ("type", "text"), f"{where}[{index}]")
        texts.append(text_of(part, "text", f"{where}[{index}]"))
    return "".join(texts)


def text_of(value: Mapping[str, Any], name: str, where: str) -> str:
    """Raises: FieldError: there is no such string."""
    text = value.get(name)
    if not isinstance(text, str):
        raise FieldError(f"{where}.{name}", "must be a string")
    return text


def only(value: Mapping[str, Any], names: Sequence[str], where: str, unoffered: Sequence[str] = ()) -> None:
    """Raises: FieldError: a field that isn't one of `names`."""
    for name in value:
        if name in unoffered:
            raise UnofferedError(f"{where}.{name}", "is not offered here: leave it out")
        if name not in names:
            raise FieldError(f"{where}.{name[:100]}", "there is no such field: leave it out")


def _plain_message(message: Any, where: str, gallery: Gallery) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise FieldError(f"{where}.role", f"must be one of {', '.join(ROLES)}, not {str(role)[:100]!r}")
    given = {name: item for name, item in message.items() if name not in UNOFFERED or item not in ("", [], {})}
    only(given, FIELDS.get(role, PLAIN_FIELDS), where, UNOFFERED)
    plain: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = given.get("tool_calls")
    content = given.get("content")
    if role == "user" and gallery.is_open and isinstance(content, list) and any(map(is_picture, content)):
        plain["content"] = [_part(part, f"{where}.content[{at}]", gallery) for at, part in enumerate(content)]
    elif "content" in given:
        plain["content"] = joined_text(given["content"], f"{where}.content")
    elif calls:
        plain["content"] = ""
    else:
        raise FieldError(f"{where}.content", "is missing")
    plain |= {
        name: text_of(given, name, where) for name in ("name", "tool_call_id", "reasoning_content") if name in given
    }
    if calls:
        plain["tool_calls"] = _plain_calls(calls, f"{where}.tool_calls")
    return plain


def _part(part: Any, where: str, gallery: Gallery) -> dict[str, Any]:
    """Of a content with pictures."""
    if not is_picture(part):
        return {"type": "text", "text": joined_text([part], where)}
    only(part, ("type", "image_url"), where)
    image = part.get("image_url")
    if part["type"] != "image_url" or not isinstance(image, dict):
        raise FieldError(where, "must be a picture as {type: image_url, image_url: {url: ...}}")
    only({name: item for name, item in image.items() if (name, item) not in DETAILS}, ("url",), where, ("detail",))
    gallery.add_url(text_of(image, "url", f"{where}.image_url"), f"{where}.image_url.url")
    return dict(PLACEHOLDER)


def _plain_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise FieldError(where, "must be a list")
    plain: list[dict[str, Any]] = []
    for index, call in enumerate(calls):
        at = f"{where}[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise FieldError(at, "must be a call of type function")
        only(call, ("id", "type", "function", "index"), at)
        only(function, ("name", "arguments"), f"{at}.function")
        arguments = _arguments(text_of(function, "arguments", f"{at}.function"), f"{at}.function.arguments")
        named = {"name": text_of(function, "name", f"{at}.function"), "arguments": arguments}
        plain.append({"type": "function", "function": named})
        if "id" in call:
            plain[-1]["id"] = text_of(call, "id", at)
    return plain


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(text or "{}")
    except (ValueError, RecursionError):  # half a surrogate pair among them
        value = None
    if not isinstance(value, dict):
        raise FieldError(where, "must be a JSON object, written as a string")
    return value


def _plain_tool(tool: Any, where: str) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        raise UnofferedError(where, f"of type {str(kind)[:100]!r} is not offered here: send tools of type function")
    only(tool, ("type", "function"), where)
    function = tool.get("function")
    if not isinstance(function, dict):
        raise FieldError(f"{where}.function", "must be an object")
    function = {name: item for name, item in function.items() if (name, item) != ("strict", False)}
    only(function, ("name", "description", "parameters"), f"{where}.function", ("strict",))
    text_of(function, "name", f"{where}.function")
    return {"type": "function", "function": function}
