"""Counts the calls of an SDK release that a run of the suite makes: methods of its clients, and commands.

What there is to call is read from the release itself: the public methods of each client class, and the commands of
`tinker`. Only what a test calls counts, not what the SDK calls inside of it. A call has been answered when it returned
and its future, if it gave one, came to a result. The report is JSON, for scripts/contract_matrix.py. Imports nothing of
tinsmith.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import inspect
import json
import pkgutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from tinker.cli.__main__ import main_cli
from tinker.lib import public_interfaces

SETTLE_TIMEOUT_S = 60.0
_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("inside", default=False)


@dataclass
class Call:
    """One call of a name. future: what it gave, until `settle` has asked it."""

    name: str
    test: str
    answered: bool = False
    future: Any = None


@dataclass
class Ledger:
    """All calls of a run, and the tests in which they were made.

    skipped: tests that were, and why. unable: what the release cannot do though it has the call, as a test has seen.
    """

    calls: list[Call] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    unable: dict[str, str] = field(default_factory=dict)
    test: str = ""
    given: set[tuple[str, str]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, name: str) -> Call:
        call = Call(name, self.test)
        with self._lock:
            self.calls.append(call)
        return call

    def begin_command(self, args: Sequence[str]) -> Call:
        """The call of the command that these arguments of `tinker` name."""
        words = list(args[2:] if args[0] in ("-f", "--format") else args)
        name = next(name for n in (2, 1) if (name := " ".join(["tinker", *words[:n]])) in commands())
        with self._lock:
            self.given |= {(name, option) for option, spellings in options(name).items() if spellings & set(words)}
        return self.begin(name)

    def begin_method(self, name: str, arguments: Iterable[str]) -> Call:
        with self._lock:
            self.given |= {(row_of(name), argument) for argument in arguments}
        return self.begin(name)

    def settle(self) -> None:
        """Wait for the futures that this test's calls gave; whatever they raise is the test's own matter."""
        for call in self.calls:
            future, call.future = call.future, None
            if future is not None:
                with contextlib.suppress(Exception), _entered():
                    future.result(SETTLE_TIMEOUT_S)
                    call.answered = True

    def row(self, names: list[str]) -> dict[str, Any]:
        """Of the names that share a row of the table.

        missing: names that no call was answered of, and options and parameters that no call gave.
        """
        mine = [call for call in self.calls if call.name in names]
        missing = set(names) - {call.name for call in mine if call.answered}
        if not missing:
            row = row_of(names[0])
            known = {each for name in names for each in (*options(name), *parameters(name))}
            missing |= {f"{row} {each}" for each in known if (row, each) not in self.given}
        return {
            "calls": len(mine),
            "answered": sum(call.answered for call in mine),
            "failed": sorted({call.test for call in mine} & self.failed),
            "missing": sorted(missing),
        }

    def write(self, path: Path, version: str) -> None:
        rows: dict[str, list[str]] = {}
        for name in [*public_methods(), *commands()]:
            rows.setdefault(row_of(name), []).append(name)
        report = {
            "version": version,
            "calls": {name: self.row(names) for name, names in rows.items()},
            "failed": sorted(self.failed),
            "skipped": self.skipped,
            "unable": self.unable,
        }
        path.write_text(json.dumps(report))


@functools.cache
def clients() -> dict[str, type]:
    """The classes whose instances are clients: futures of a client that may be used as the client are among them."""
    found: dict[str, type] = {}
    for info in pkgutil.iter_modules(public_interfaces.__path__):
        module = importlib.import_module(f"{public_interfaces.__name__}.{info.name}")
        found |= {name: kind for name, kind in vars(module).items() if inspect.isclass(kind)}
    proper = tuple(kind for name, kind in found.items() if name.endswith("Client"))
    return {name: kind for name, kind in found.items() if issubclass(kind, proper)}


@functools.cache
def public_methods() -> dict[str, tuple[type, str]]:
    """(class, method) by "Class.method". One inherited from another client class counts as that one's."""
    found = {}
    for kind in clients().values():
        for method in dir(kind):
            owner = next(base for base in kind.__mro__ if method in vars(base))
            is_own = owner is kind or owner not in clients().values()
            is_futures = hasattr(public_interfaces.APIFuture, method)
            if not method.startswith("_") and is_own and not is_futures and callable(getattr(kind, method)):
                found[f"{kind.__name__}.{method}"] = (kind, method)
    return found


@functools.cache
def commands() -> dict[str, click.Command]:
    """The leaves of `tinker`, by what is typed."""
    return dict(_leaves(main_cli, "tinker"))


def options(name: str) -> dict[str, set[str]]:
    """The spellings of each option of a command; none of a method."""
    command = commands().get(name)
    found = [param for param in command.params if isinstance(param, click.Option)] if command else []
    return {param.opts[0]: {*param.opts, *param.secondary_opts} for param in found}


@functools.cache
def parameters(name: str) -> frozenset[str]:
    """What a method can be given; none of a command."""
    if name not in public_methods():
        return frozenset()
    kind, method = public_methods()[name]
    return frozenset(
        parameter.name
        for parameter in inspect.signature(getattr(kind, method)).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and parameter.name != "self"
    )


def row_of(name: str) -> str:
    """The row of the table in which a call is counted: both flavours of a method have one."""
    return name.removesuffix("_async")


def _leaves(command: click.Command, typed: str) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield typed, command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        child = command.get_command(context, name)
        assert child is not None
        yield from _leaves(child, f"{typed} {name}")


def count_calls(ledger: Ledger) -> None:
    """From now on every public method tells the ledger when it is called."""
    for name, (kind, method) in public_methods().items():
        raw = inspect.getattr_static(kind, method)
        is_static = isinstance(raw, staticmethod | classmethod)
        function = getattr(kind, method) if is_static else raw
        counted = _counted(function, name, ledger)
        setattr(kind, method, staticmethod(counted) if is_static else counted)


def _counted(function: Callable[..., Any], name: str, ledger: Ledger) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        if _inside.get():
            return function(*args, **kwargs)
        call = ledger.begin_method(name, signature.bind(*args, **kwargs).arguments)
        with _entered():
            value = function(*args, **kwargs)
        if inspect.iscoroutine(value):
            return _awaited(value, call)
        _returned(value, call)
        return value

    return counted


async def _awaited(coroutine: Any, call: Call) -> Any:
    with _entered():
        value = await coroutine
    _returned(value, call)
    return value


def _returned(value: Any, call: Call) -> None:
    if hasattr(value, "result") and hasattr(value, "result_async"):
        call.future = value
    else:
        call.answered = True


@contextlib.contextmanager
def _entered() -> Iterator[None]:
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)
