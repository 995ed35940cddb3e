"""Import transformers' modelling, and build models, without what only a compiler of graphs, or several processes, need.

`transformers.modeling_utils` imports torch's graph compiler for decorators that mean something to it alone, torch's
distributed tensors, and torchao where that is installed; and torch imports its compiler to keep it away from functions
that work on the meta device. Together they are more than a third of the memory and of the time that a worker takes to
import, and nothing here uses them through transformers. They stand empty meanwhile; afterwards each can be imported
as ever.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from transformers import utils
from transformers.utils import import_utils

COMPILER = "torch._dynamo"
VIEWS = f"{COMPILER}._trace_wrapped_higher_order_op"
VIEWS_CLASS = "TransformGetItemToIndex"
UNUSED = ("is_torch_distributed_available", "is_torchao_available")


def import_lightly(load: Callable[[], object], package: str) -> None:
    """Call `load`, which imports something of the package, while what is unused stands empty. If it asks for more of
    that than its decorators, what it has imported of the package is forgotten, to be imported whole."""
    before = set(sys.modules)
    try:
        with without_compiler(), _unused_is_hidden():
            load()
    except ImportError:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == package:
                del sys.modules[name]


def _modelling() -> None:
    importlib.import_module("transformers.modeling_utils")
    importlib.import_module("transformers.masking_utils")


@contextmanager
def without_compiler() -> Iterator[None]:
    """Whoever wants a decorator of torch's compiler gets one that leaves functions as they are; whoever wants anything
    else of it gets the compiler. Where that is imported already this does nothing. For any number of threads."""
    _stand_in.enter()
    try:
        yield
    finally:
        _stand_in.leave()


class _StandIn:
    """An empty compiler in the place of the real one, as long as anybody is within and nobody needs more of it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._num_within = 0
        self._disable: Any = None

    def enter(self) -> None:
        with self._lock:
            self._num_within += 1
            if COMPILER in sys.modules:
                return
            compiler, views = _Empty(COMPILER), ModuleType(VIEWS)
            compiler.__path__ = []  # its parts are asked of `_Parts`
            compiler.__dict__.update(assume_constant_result=_as_it_is, allow_in_graph=_as_it_is, disable=_as_it_is)
            views.__dict__[VIEWS_CLASS] = _views
            sys.modules |= {COMPILER: compiler, VIEWS: views}
            sys.meta_path.insert(0, _parts)
            torch.__dict__["_dynamo"] = compiler
            self._disable = torch.compiler.__dict__["disable"]
            torch.compiler.__dict__["disable"] = _as_it_is

    def leave(self) -> None:
        with self._lock:
            self._num_within -= 1
            if not self._num_within:
                self.give_way()

    def give_way(self) -> None:
        """To the real one, which is imported when it is next asked for."""
        with self._lock:
            if isinstance(sys.modules.get(COMPILER), _Empty):
                torch.compiler.__dict__["disable"] = self._disable
                del torch.__dict__["_dynamo"], sys.modules[COMPILER], sys.modules[VIEWS]
                sys.meta_path.remove(_parts)


class _Empty(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _stand_in.give_way()
        return getattr(importlib.import_module("torch._dynamo"), name)


class _Parts(MetaPathFinder, Loader):
    """Finds a part of the compiler while that stands empty: the real one is imported, and its part with it."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if not name.startswith(f"{COMPILER}."):
            return None
        _stand_in.give_way()
        importlib.import_module(f"torch._dynamo.{name.removeprefix(f'{COMPILER}.')}")
        return ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """It was."""


_parts = _Parts()
_stand_in = _StandIn()


@contextmanager
def _unused_is_hidden() -> Iterator[None]:
    """What transformers asks for is said to be missing; whoever imported the question keeps the answer."""
    asked = [(module, name) for module in (utils, import_utils) for name in UNUSED if hasattr(module, name)]
    answers = [getattr(module, name) for module, name in asked]
    for module, name in asked:
        setattr(module, name, _is_missing)
    try:
        yield
    finally:
        for (module, name), answer in zip(asked, answers, strict=True):
            setattr(module, name, answer)


def _as_it_is(function: Callable[..., Any] | None = None, *_: object, **__: object) -> Any:
    return _as_it_is if function is None else function


def _is_missing(*_: object, **__: object) -> bool:
    return False


def _views() -> Any:
    """The compiler's own context, once somebody enters it."""
    return getattr(importlib.import_module("torch._dynamo._trace_wrapped_higher_order_op"), VIEWS_CLASS)()


if "transformers.modeling_utils" not in sys.modules:
    import_lightly(_modelling, "transformers")
