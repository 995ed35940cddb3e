"""What the handlers of compatible endpoints work with beside the services: the desk for requests, and tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from litestar.di import NamedDependency
from litestar.params import SkipValidation

from tinsmith.api.services import Services
from tinsmith.api.texts.asking import Desk
from tinsmith.api.texts.choices import Choice
from tinsmith.api.texts.models import Model
from tinsmith.api.texts.prompts import Tokenizers
from tinsmith.api.texts.toolcalls import ToolReader
from tinsmith.api.texts.written import Written
from tinsmith.bases.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Room:
    services: Services
    desk: Desk
    tokenizers: Tokenizers

    @classmethod
    def of(cls, services: Services) -> Room:
        return cls(services, Desk(services), Tokenizers())

    def tokenizer(self, model: Model) -> ChatTokenizer:
        """Raises: UnsupportedError: the model has none that can be read."""
        return self.tokenizers.of(model.info)

    def choice(self, model: Model, stop: tuple[str, ...], call_prefix: str | None) -> Choice:
        """call_prefix: what ids of tool calls begin with; None: text is text."""
        reader = None if call_prefix is None else ToolReader(call_prefix)
        written = Written(self.tokenizer(model), model.info.eos_tokens, stop, keeps_special=reader is not None)
        return Choice(written, reader)


RoomDep: TypeAlias = NamedDependency[SkipValidation[Room]]
