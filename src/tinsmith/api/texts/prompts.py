"""From messages or text to the tokens of a prompt. Text that can't fit the context is refused untokenized."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import structlog

from tinsmith.api.texts.fields import FieldError, UnofferedError
from tinsmith.api.texts.models import Model
from tinsmith.api.texts.pictures import File
from tinsmith.bases.tokenizer import ChatTokenizer
from tinsmith.bases.tokenizer_files import directory_of
from tinsmith.errors import ConfigError, UnsupportedError, UserError
from tinsmith.pictures import Picture
from tinsmith.types import BaseInfo
from tinsmith.wire.images import Chunks, Looking, Sight, blind

log = structlog.get_logger("tinsmith.api")

MAX_COUNTED_CHARS = 1 << 20
MAX_COUNTED_MESSAGES = 20_000
SCALARS = (str, bool, int, float)


class ContextError(UserError):
    """The prompt doesn't fit the context. `openai_code`: what OpenAI's clients know this by."""

    openai_code = "context_length_exceeded"


@dataclass(frozen=True, slots=True)
class Chat:
    """messages and tools as templates read them (OpenAI's shapes, arguments of tool calls as objects).

    prefill: the beginning of the answer. options: further variables of the template, such as enable_thinking. hints:
    such that say what happens anyway where the template has none of the name. files: the pictures of the messages.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    prefill: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    hints: Mapping[str, Any] = field(default_factory=dict)
    files: Sequence[File] = ()


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """tokens: with the placeholders of `pictures` among them."""

    tokens: list[int]
    pictures: tuple[Picture, ...] = ()


class Tokenizers:
    """The tokenizers of the served bases, each read when it is first needed. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read: dict[str, ChatTokenizer] = {}

    def of(self, info: BaseInfo) -> ChatTokenizer:
        """Raises: UnsupportedError: the model's directory has none that can be read."""
        with self._lock:
            try:
                if info.name not in self._read:
                    self._read[info.name] = ChatTokenizer.from_dir(directory_of(info))
            except ConfigError as error:
                log.error("no tokenizer", base=info.name, error=error.message)
                raise UnsupportedError(f"{info.name} is served without a tokenizer: send tokens to /api/v1") from None
            return self._read[info.name]


def chat_prompt(tokenizer: ChatTokenizer, model: Model, chat: Chat, sight: Sight) -> ChatPrompt:
    """The prompt of a chat. sight: how the model takes pictures.

    Raises:
        UserError: as `chat_text`, or pictures that it can't be shown.
        ContextError: it doesn't fit the context.
    """
    if len(chat.messages) > model.info.max_context:
        raise _too_long(model, f"{len(chat.messages)} messages")
    text = chat_text(tokenizer, model, chat)
    if not chat.files:
        return ChatPrompt(text_tokens(tokenizer, model, text))
    if len(text) > model.info.max_context * tokenizer.longest_token:
        raise _too_long(model, f"{len(text)} characters")
    chunks = _with_pictures(tokenizer, text, chat, sight)
    return ChatPrompt(check_length(model, chunks.tokens.tolist()), chunks.pictures)


def count_tokens(tokenizer: ChatTokenizer, model: Model, chat: Chat, sight: Sight) -> int:
    """The tokens of a chat, whether or not they fit the context; its pictures are counted by their headers alone.

    Raises:
        UserError: as `chat_text`.
        ContextError: it is beyond what is counted here.
    """
    if len(chat.messages) > max(MAX_COUNTED_MESSAGES, model.info.max_context):
        raise _too_long(model, f"{len(chat.messages)} messages")
    text = chat_text(tokenizer, model, chat)
    if len(text) > max(MAX_COUNTED_CHARS, model.info.max_context * tokenizer.longest_token):
        raise _too_long(model, f"{len(text)} characters")
    if not chat.files:
        return tokenizer.count(text)
    return len(_with_pictures(tokenizer, text, chat, replace(sight, verified=None)).tokens)


def _with_pictures(tokenizer: ChatTokenizer, text: str, chat: Chat, sight: Sight) -> Chunks:
    """What the template wrote for each picture gives way to what the model's processor writes for it.

    Raises:
        UnsupportedError: the model takes no pictures, or its template or tokenizer has no place for them.
        UserError: the text itself holds what stands for a picture, or one that can't be read.
    """
    vision = sight.vision
    if vision is None:
        raise blind(sight.base)
    if not vision.chat_text:
        raise UnsupportedError(f"the tokenizer of {sight.base} lacks the tokens of pictures: send tokens to /api/v1")
    pieces = text.split(vision.chat_text)
    if len(pieces) - 1 < len(chat.files):
        raise UnofferedError("messages", f"with pictures are not offered for {sight.base}: its template drops them")
    tokens = np.array(tokenizer.encode(vision.expansion.join(pieces)), np.int32)
    places = np.flatnonzero(tokens == vision.image_token).tolist()
    if len(pieces) - 1 > len(chat.files) or len(places) != len(chat.files):
        raise FieldError("messages", f"the text holds {vision.chat_text} or the like, which stands for a picture")
    chunks = Chunks(Looking(sight), "messages")
    for start, end, file in zip([0, *(place + 1 for place in places)], places, chat.files, strict=False):
        chunks.add_tokens(tokens[start:end])
        chunks.add_picture(file.data, file.kind, None)
    chunks.add_tokens(tokens[places[-1] + 1 :])
    return chunks


def chat_text(tokenizer: ChatTokenizer, model: Model, chat: Chat) -> str:
    """A chat as the model reads it, up to where its answer begins (or goes on from `prefill`).

    Raises:
        UnsupportedError: the model has no chat template, or its template has no place for tools or names.
        UserError: the template refuses the messages, or knows no such option.
    """
    switches = tokenizer.switches(with_tools=chat.tools is not None)
    check_options(chat.options, switches, model.name)
    options = {**chat.options, **{name: value for name, value in chat.hints.items() if name in switches}}
    try:
        text = tokenizer.render(chat.messages, tools=chat.tools, **options)
        if chat.tools is not None and tokenizer.render(chat.messages, **options) == text:
            raise UnofferedError("tools", f"is not offered for {model.name}: its chat template has no place for them")
        _check_names(tokenizer, model, chat, options, text)
    except RecursionError:
        raise UserError("the chat template can't follow messages nested so deeply: flatten them") from None
    return text + chat.prefill


def text_tokens(tokenizer: ChatTokenizer, model: Model, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Raises: ContextError: it doesn't fit the context."""
    if len(text) > model.info.max_context * tokenizer.longest_token:
        raise _too_long(model, f"{len(text)} characters")
    return check_length(model, tokenizer.encode(text, add_special_tokens=add_special_tokens))


def check_length(model: Model, tokens: list[int], max_tokens: int | None = None) -> list[int]:
    """Raises: ContextError: no room for an answer, or not for one of `max_tokens`."""
    room = model.info.max_context - len(tokens)
    if room < 1:
        raise _too_long(model, f"{len(tokens)} tokens")
    if max_tokens is not None and max_tokens > room:
        raise ContextError(
            f"the prompt has {len(tokens)} tokens and the answer may have {max_tokens}, together more than the context "
            f"of {model.info.name}, {model.info.max_context}: ask for at most {room}, or shorten the prompt"
        )
    return tokens


def check_options(options: Mapping[str, Any], switches: Collection[str], model: str) -> None:
    """Raises: FieldError: no variable of the template, one that is set otherwise, or one that isn't a plain value."""
    for name, value in options.items():
        if name not in switches:
            known = ", ".join(sorted(switches)) or "none"
            raise FieldError(
                "chat_template_kwargs",
                f"{name[:100]!r} can't be set here: leave it out; the chat template of {model} has: {known}",
            )
        if not isinstance(value, SCALARS):
            raise FieldError("chat_template_kwargs", f"{name[:100]!r} must be a string, a number, true or false")


def _check_names(tokenizer: ChatTokenizer, model: Model, chat: Chat, options: Mapping[str, Any], text: str) -> None:
    """Raises: UnofferedError: a name of a speaker that makes no difference to `text`."""
    for role in sorted({str(message["role"]) for message in chat.messages if "name" in message}):
        nameless = [
            {key: value for key, value in message.items() if key != "name" or message["role"] != role}
            for message in chat.messages
        ]
        try:
            is_read = tokenizer.render(nameless, tools=chat.tools, **options) != text
        except UserError:  # the template insists on names
            continue
        if not is_read:
            at = next(i for i, message in enumerate(chat.messages) if message["role"] == role and "name" in message)
            raise UnofferedError(
                f"messages[{at}].name",
                f"is not offered for {model.name}: its chat template has no place for names of role {role}; leave it "
                "out, or write the name into the content",
            )


def _too_long(model: Model, what: str) -> ContextError:
    return ContextError(
        f"the prompt has {what}, and {model.info.name} has a context of {model.info.max_context} tokens for the prompt "
        "and its answer: shorten it"
    )
