from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from tinsmith.config import Settings
from tinsmith.observe import logs as observe

SECRET = "tml-abcdefgh12345678"


@pytest.fixture(autouse=True)
def untouched_logging() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], level = before[0], before[1]
    root.setLevel(level)
    structlog.reset_defaults()


def logged(settings: Settings) -> io.StringIO:
    stream = io.StringIO()
    observe.configure(settings, process="api", stream=stream)
    return stream


def test_lines_are_json_and_know_their_process() -> None:
    stream = logged(Settings(log_format="json"))
    structlog.get_logger("tinsmith.x").info("ready", base="tiny")
    logging.getLogger("other").warning("from %s", "afar")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["base"], first["process"], first["level"]) == ("ready", "tiny", "api", "info")
    assert (second["event"], second["logger"], second["process"]) == ("from afar", "other", "api")


def test_secrets_are_masked_wherever_they_stand() -> None:
    stream = logged(Settings(log_format="json"))
    log = structlog.get_logger("tinsmith.x")
    log.info(f"got {SECRET}", api_key="plain", headers={"X-API-Key": "a", "n": [f"Bearer {SECRET}"]}, num_tokens=5)
    try:
        raise ValueError(SECRET)
    except ValueError:
        log.exception("failed")
    text = stream.getvalue()
    assert SECRET not in text
    assert "plain" not in text
    first = json.loads(text.splitlines()[0])
    assert (first["event"], first["api_key"], first["num_tokens"]) == ("got tml-***", "***", 5)
    assert first["headers"] == {"X-API-Key": "***", "n": ["***"]}


def test_the_level_is_kept() -> None:
    stream = logged(Settings(log_format="text", log_level="warning"))
    structlog.get_logger("tinsmith.x").info("quiet")
    structlog.get_logger("tinsmith.x").warning("loud")
    assert "loud" in stream.getvalue()
    assert "quiet" not in stream.getvalue()


def test_auto_is_text_on_a_terminal_alone() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert observe.log_format(Settings(), io.StringIO()) == "json"
    assert observe.log_format(Settings(), Terminal()) == "text"
    assert observe.log_format(Settings(log_format="json"), Terminal()) == "json"
