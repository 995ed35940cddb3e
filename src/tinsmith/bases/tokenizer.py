"""Text to tokens and chat to text, for processes without transformers.

Owns the reading of tokenizer.json, of the special tokens and of the chat template. Renders as transformers'
`apply_chat_template` does (same sandbox, filters and whitespace rules), and knows nothing of models or requests.
Templates are foreign code: they run in jinja2's immutable sandbox and see plain JSON values alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Encoding, Tokenizer

from tinsmith.errors import ConfigError, UnsupportedError, UserError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
RENDERED_NAMES = ("messages", "tools", "documents", "add_generation_prompt")  # what `render` sets itself
NO_VARIABLES = ("self", "loop", "caller", "varargs", "kwargs")  # jinja2's own
REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")

Message = Mapping[str, Any]

REPLACEMENT = "\ufffd"  # stands for bytes that are not a whole character
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
# byte-level BPE (GPT-2): printable bytes are written as themselves, the others as letters from U+0100 on, in order
BYTE_OF_LETTER = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + rank): byte for rank, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)
}


class ChatTokenizer:
    """The tokenizer of one base model. Thread-safe; all token ids are the model's own."""

    def __init__(self, tokenizer: Tokenizer, special: Mapping[str, str], templates: Mapping[str, str]) -> None:
        """`special`: the template's variables such as eos_token; `templates`: by name, "default" first among them."""
        self._tokenizer = tokenizer
        self._special = dict(special)
        self._longest = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)
        self._templates = {name: _compile(source) for name, source in templates.items()}
        ours = {*RENDERED_NAMES, *NO_VARIABLES, *self._special}
        self._switches = {name: _undeclared(source) - ours for name, source in templates.items()}

    @classmethod
    def from_dir(cls, path: Path) -> Self:
        """Read a Hugging Face model directory.

        Raises:
            ConfigError: tokenizer.json is missing or not a tokenizer, or the chat template is not one.
        """
        try:
            tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception for a missing or malformed file
            raise ConfigError(f"{path / 'tokenizer.json'} can't be read: {error}") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        config = _read_json(path / "tokenizer_config.json")
        special = {**_special(_read_json(path / "special_tokens_map.json")), **_special(config)}
        try:
            return cls(tokenizer, special, _templates(path, config))
        except TemplateError as error:
            raise ConfigError(f"{path}: the chat template can't be used: {error}") from None

    @property
    def vocab_size(self) -> int:
        """Number of token ids that decode to something, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def longest_token(self) -> int:
        """Most characters that one token can stand for."""
        return self._longest

    def switches(self, *, with_tools: bool = False) -> frozenset[str]:
        """Variables that the chat template reads and that `render` takes as `extra`, such as enable_thinking."""
        return self._switches.get(self._chosen(with_tools), frozenset())

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; special tokens written out in it become their ids."""
        return list(self._encode(text, add_special_tokens).ids)

    def count(self, text: str) -> int:
        """How many tokens `encode` makes of it."""
        return len(self._encode(text, False))

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids. Bytes that are not whole characters (yet) show as U+FFFD; unknown ids as nothing."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token: int) -> bytes | None:
        """What one token stands for, whole characters or not; None where that depends on its neighbours."""
        text = self.decode([token])
        if REPLACEMENT not in text:
            return text.encode()
        letters = self._tokenizer.id_to_token(token) or ""
        if all(letter in BYTE_OF_LETTER for letter in letters):
            return bytes(BYTE_OF_LETTER[letter] for letter in letters)
        return None

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The chat as the model was trained to read it. `extra` goes to the template (e.g. enable_thinking=False).

        Raises:
            UnsupportedError: this model has no chat template.
            UserError: the template refuses these messages; its own words are in the message.
        """
        if not messages:
            raise UserError("messages is empty; give at least one message")
        template = self._templates.get(self._chosen(tools is not None))
        if template is None:
            raise UnsupportedError(
                "this base model has no chat template; send a prompt of tokens or text (the operator can put a "
                "chat_template.jinja into its directory)"
            )
        plain = [_aliased({k: v for k, v in _plain(dict(m)).items() if v is not None}) for m in messages]
        variables = {**self._special, **_plain(extra)}
        tool_list = None if tools is None else _plain(list(tools))
        try:
            return template.render(
                {
                    **variables,
                    "messages": plain,
                    "tools": tool_list,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"the chat template refused these messages: {error}") from None

    def _encode(self, text: str, add_special_tokens: bool) -> Encoding:
        """As a batch of one: `tokenizers` 0.23 lets other threads run while it encodes a batch, and else does not."""
        return self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def _chosen(self, with_tools: bool) -> str:
        return "tool_use" if with_tools and "tool_use" in self._templates else "default"


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for loss masks; in rendering it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> Template:
    return _environment().from_string(source)


def _undeclared(source: str) -> frozenset[str]:
    """What a template reads and doesn't define itself."""
    environment = _environment()
    return frozenset(meta.find_undeclared_variables(environment.parse(source)) - set(environment.globals))


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _plain(value: Any) -> Any:
    """A copy made of JSON's own types; anything else becomes its type's name, so that no template can call into it."""
    if value is None or isinstance(value, bool):
        return value
    for kind, convert in _SCALARS:
        if isinstance(value, kind):
            return convert(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return f"<{type(value).__name__}>"


_SCALARS: tuple[tuple[type, Callable[[Any], Any]], ...] = ((str, str.__str__), (int, int), (float, float))


def _aliased(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its reasoning under the names that templates read."""
    reasoning = next((message[name] for name in REASONING_NAMES if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _special(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in SPECIAL_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """By name: chat_template.jinja and additional_chat_templates/NAME.jinja, else those of the JSON files."""
    files = {"default": path / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    found = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    if found:
        return found
    given = _read_json(path / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(given, str):
        return {"default": given}
    return {entry["name"]: entry["template"] for entry in given} if isinstance(given, list) else {}


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object; empty if the file isn't there, as all but tokenizer.json are optional."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value
