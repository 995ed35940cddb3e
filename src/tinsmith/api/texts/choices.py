"""One choice of an answer as it comes about: text and tool calls that are certain, and the tokens behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinsmith.api.texts.toolcalls import ToolCall, ToolReader
from tinsmith.api.texts.written import Ending, Written
from tinsmith.bases.tokenizer import ChatTokenizer
from tinsmith.types import SampledSequence, SamplePiece
from tinsmith.wire.pieces import cut_sequence


@dataclass(frozen=True, slots=True)
class Delta:
    """items: text and calls that came up, in order. tokens: those that came up. ending: at the end."""

    items: Sequence[str | ToolCall]
    tokens: SampledSequence
    ending: Ending | None = None

    @property
    def text(self) -> str:
        return "".join(item for item in self.items if isinstance(item, str))

    @property
    def calls(self) -> list[ToolCall]:
        return [item for item in self.items if isinstance(item, ToolCall)]


class Choice:
    """Fed with pieces or not, `end` completes it; what comes out, put together, is the same."""

    def __init__(self, written: Written, reader: ToolReader | None) -> None:
        self._written = written
        self._reader = reader
        self._num_known = 0
        self.num_calls = 0

    def add(self, piece: SamplePiece) -> Delta:
        self._num_known = piece.start + len(piece.sequence.tokens)
        return Delta(self._read(self._written.add(piece.sequence.tokens.tolist())), piece.sequence)

    def end(self, sequence: SampledSequence) -> Delta:
        """Raises: ContradictionError: the pieces were not of this sequence."""
        ending = self._written.end(sequence)
        items = self._read(ending.text)
        if self._reader is not None:
            items += self._count(self._reader.end())
        return Delta(items, cut_sequence(sequence, self._num_known), ending)

    def _read(self, text: str) -> list[str | ToolCall]:
        if self._reader is None:
            return [text] if text else []
        return self._count(self._reader.add(text))

    def _count(self, items: list[str | ToolCall]) -> list[str | ToolCall]:
        self.num_calls += sum(isinstance(item, ToolCall) for item in items)
        return items


@dataclass(frozen=True, slots=True)
class Score:
    """A token, what it stands for (data: None if that is no text by itself), and its logprob."""

    text: str
    data: bytes | None
    logprob: float


@dataclass(frozen=True, slots=True)
class Scored:
    """A sampled token and the most likely ones in its place."""

    token: Score
    top: Sequence[Score]


def scores(tokenizer: ChatTokenizer, end_tokens: Sequence[int], sequence: SampledSequence) -> list[Scored]:
    """One for each token but the end token; tokens of a stop string, which the text leaves out, are among them."""
    found: list[Scored] = []
    for position, token in enumerate(sequence.tokens.tolist()):
        if token in end_tokens:
            continue
        top: list[Score] = []
        if sequence.topk_tokens is not None and sequence.topk_logprobs is not None:
            row = zip(sequence.topk_tokens[position].tolist(), sequence.topk_logprobs[position].tolist(), strict=True)
            top = [_score(tokenizer, other, logprob) for other, logprob in row]
        found.append(Scored(_score(tokenizer, token, float(sequence.logprobs[position])), top))
    return found


def _score(tokenizer: ChatTokenizer, token: int, logprob: float) -> Score:
    return Score(tokenizer.decode([token]), tokenizer.token_bytes(token), logprob)
