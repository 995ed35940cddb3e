"""Which tokens a sequence may go on with so that its text stays within a JSON schema.

A schema can take a second of computing before its first token. It is compiled once, beside the sampler's steps, on a
thread that lets others compute; tenants take turns, and what was compiled last is kept.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import numpy.typing as npt
import structlog
from llguidance import LLMatcher, LLTokenizer

from tinsmith.bases.tokenizer_files import directory_of
from tinsmith.errors import TinsmithError
from tinsmith.types import BaseInfo
from tinsmith.validate.jsonform import grammar_of, refusal

log = structlog.get_logger("tinsmith.worker")

MAX_KEPT = 32


class Matcher:
    """The state of one sequence."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> npt.NDArray[np.bool_]:
        """[V], all false once the matcher gave up. End tokens are allowed where the text may end."""
        if self._matcher.is_error():
            return np.zeros(self._vocab_size, np.bool_)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(np.bool_)

    def accept(self, token: int) -> bool:
        """The sequence went on with this token. False if that isn't within the schema, or the schema is too complex."""
        return bool(self._matcher.consume_token(token))


class Grammar:
    """A compiled schema."""

    def __init__(self, first: LLMatcher, vocab_size: int) -> None:
        self._first = first
        self._vocab_size = vocab_size

    def matcher(self) -> Matcher:
        """A sequence at its beginning; costs microseconds."""
        return Matcher(self._first.deep_copy(), self._vocab_size)


class Grammars:
    """The schemas of one base model's requests. Called from one thread."""

    def __init__(self, info: BaseInfo) -> None:
        self._info = info
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[str, Grammar | TinsmithError] = OrderedDict()
        self._lines: OrderedDict[str, deque[str]] = OrderedDict()  # what tenants wait for; the next one's is first
        self._under_way: tuple[str, Future[Grammar | TinsmithError]] | None = None
        self._thread = ThreadPoolExecutor(1, "grammar")

    def find(self, schema: str, tenant: str) -> Grammar | TinsmithError | None:
        """A schema compiled, or why it can't be held to; None while that isn't known. To be asked again until it is."""
        self._move_on()
        found = self._kept.get(schema)
        if found is not None:
            self._kept.move_to_end(schema)
        elif self._under_way is None or self._under_way[0] != schema:
            line = self._lines.setdefault(tenant, deque())
            if schema not in line:
                line.append(schema)
            self._move_on()
        return found

    def forget(self, schema: str, tenant: str) -> None:
        """The tenant waits for it no longer."""
        line = self._lines.get(tenant, deque())
        if schema in line:
            line.remove(schema)

    def wait(self, seconds: float) -> None:
        """Until the schema under way is compiled, and no longer than that."""
        if self._under_way is not None:
            wait([self._under_way[1]], seconds)

    def _move_on(self) -> None:
        """Take in what has been compiled, and begin with what the next tenant waits for."""
        if self._under_way is not None:
            schema, coming = self._under_way
            if not coming.done():
                return
            self._under_way = None
            self._kept[schema] = coming.result()
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        while self._lines:
            tenant, line = self._lines.popitem(last=False)
            if line:
                schema = line.popleft()
                self._lines[tenant] = line
                self._under_way = schema, self._thread.submit(self._try, schema)
                return

    def _try(self, schema: str) -> Grammar | TinsmithError:
        """Runs on the thread. What is unforeseen concerns those who wait for this schema alone."""
        try:
            return self._compile(schema)
        except TinsmithError as error:
            return error
        except Exception:
            log.exception("schema not compiled")
            return TinsmithError("the server failed on this json_schema; its log has the details")

    def _compile(self, schema: str) -> Grammar | TinsmithError:
        """The first one costs the reading of the tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                str(directory_of(self._info) / "tokenizer.json"),
                n_vocab=self._info.vocab_size,
                eos_token=list(self._info.eos_tokens),
            )
        matcher = LLMatcher(self._tokenizer, grammar_of(schema), log_level=0)
        return refusal(matcher.get_error()) if matcher.is_error() else Grammar(matcher, self._info.vocab_size)
