"""Evaluates a custom loss on one datum after another: the allow-listed calls, in order, within bounds of work.

What stays true: nothing runs but the functions of `graph_ops`; the work that a datum may cost follows from its own size
and the loss alone, never from a clock, so that a request which succeeded once succeeds when it is replayed.
Shape letters: T tokens of a datum, K targets a position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tinsmith.errors import UserError
from tinsmith.loss_graph import Arg, Dtype, LossCall, LossGraph, Ref, Span
from tinsmith.training.graph_ops import FUNCTIONS, MAX_NUMBER, GraphError
from tinsmith.training.shortage import is_out_of_memory
from tinsmith.wire.loss_ops import CALLS, Signature

DATUM_ELEMENTS = 2**25  # of all values of a datum, counted as float32: 128 MiB
FLOAT_BYTES = 4
REQUEST_ELEMENTS = 2**27  # of a request, beyond what its calls would make if each were as large as logprobs
ERRORS = (GraphError, RuntimeError, IndexError, TypeError, ValueError, ArithmeticError, AttributeError)
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32, "float64": torch.float64, "int64": torch.int64, "int32": torch.int32, "bool": torch.bool,
}  # fmt: skip
ALLOWED_DTYPES = frozenset(DTYPES.values())

Values = list[Any]


class GraphProgram:
    """One request's custom loss, made ready; it counts the work that the request has cost so far."""

    def __init__(self, graph: LossGraph) -> None:
        self._graph = graph
        self._calls = [_Call(call) for call in graph.calls]
        self._request_elements = 0
        self._num_tokens = self._num_elements = 0

    @property
    def num_calls(self) -> int:
        return len(self._calls)

    @property
    def elements_per_token(self) -> float:
        """Of all values of the data so far."""
        return self._num_elements / max(1, self._num_tokens)

    @property
    def input_names(self) -> tuple[str, ...]:
        """What it reads beside logprobs."""
        return tuple(one.name for one in self._graph.inputs[1:])

    def run(self, lp: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one datum, a scalar that depends on `lp`, and its metrics.

        Args:
            lp: log-probabilities of the targets, [T] or [T, K].

        Raises:
            UserError: a call that can't be carried out, too much work, or a loss that is no scalar; names the node.
        """
        values: Values = [lp, *(inputs[name] for name in self.input_names)]
        spent = 0
        for call in self._calls:
            size = call.size(values)
            _check_total(spent + size, call)
            values.append(call.run(values))
            spent += max(size, _held(values[-1]))
            _check_total(spent, call)
        self._num_tokens += len(lp)
        self._num_elements += spent
        self._request_elements += max(0, spent - len(self._calls) * lp.numel())
        if self._request_elements > REQUEST_ELEMENTS:
            raise UserError(
                f"custom loss {self._graph.name!r}: its intermediate values grow beyond {REQUEST_ELEMENTS} elements "
                "in this request: send fewer datums at once"
            )
        return self._loss(values[self._graph.loss]), {key: values[at] for key, at in self._graph.metrics}

    def _loss(self, value: Any) -> Tensor:
        where = f"custom loss {self._graph.name!r}"
        if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
            shape = f"shape {list(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else repr(value)[:100]
            raise UserError(f"{where} must return a scalar float tensor as its loss, not {shape}: sum it")
        if not value.requires_grad:
            raise UserError(f"{where}: the loss does not depend on logprobs, so it has no gradient")
        return value


class _Call:
    """One call: its function, and its arguments with the places of the values that they refer to."""

    def __init__(self, call: LossCall) -> None:
        self.where = f"custom loss: node {call.node!r} ({call.target.removeprefix('.')})"
        function = FUNCTIONS[call.target]
        self._fn, self._size = function.fn, function.size
        signature = CALLS[call.target]
        self._args = [
            _filler(arg, kind) for arg, kind in zip(call.args, _kinds(signature, len(call.args)), strict=True)
        ]
        self._kwargs = {name: _filler(arg, _kind_of(signature, name)) for name, arg in call.kwargs}
        self._filled: tuple[list[Any], dict[str, Any]] = ([], {})

    def size(self, values: Values) -> int:
        """At least the elements that `run` will make; also checks and keeps the arguments for it."""
        try:
            self._filled = [fill(values) for fill in self._args], {n: fill(values) for n, fill in self._kwargs.items()}
            return self._size(*self._filled)
        except ERRORS as error:
            raise self._refusal(error) from None

    def run(self, values: Values) -> Any:
        args, kwargs = self._filled
        self._filled = ([], {})
        try:
            return _checked(self._fn(*args, **kwargs))
        except ERRORS as error:
            if is_out_of_memory(error):
                raise
            raise self._refusal(error) from None

    def _refusal(self, error: Exception) -> UserError:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return UserError(f"{self.where}: {lines[0][:300]}")


def _check_total(num_elements: int, call: _Call) -> None:
    if num_elements > DATUM_ELEMENTS:
        raise UserError(
            f"{call.where} makes the loss larger than a datum's may be, {DATUM_ELEMENTS} elements of all its "
            "values: sum earlier, or pass the function itself to forward_backward_custom"
        )


def _held(value: Any) -> int:
    """What a value is in memory, in elements of float32."""
    if isinstance(value, tuple):
        return sum(map(_held, value))
    return value.nbytes // FLOAT_BYTES if isinstance(value, Tensor) else 0


def _kinds(signature: Signature, count: int) -> list[str]:
    """The kinds of `count` positional arguments."""
    if signature.rest is None:
        return [param.kind for param in signature.params if param.kind != "-"][:count]
    fixed = [param.kind for param in signature.params if param.is_required]
    return [*fixed, *[signature.rest] * count][:count]


def _kind_of(signature: Signature, name: str) -> str:
    param = signature.named(name)
    return "" if param is None else param.kind


def _filler(arg: Arg, kind: str) -> Callable[[Values], Any]:
    """A function from the values so far to the argument."""
    if isinstance(arg, Ref):
        place, check = arg.value, _CHECKS[kind]

        def fill(values: Values) -> Any:
            value = values[place]
            if not check(value):
                raise GraphError(f"an argument is a {type(value).__name__.lower()}, which does not fit there")
            return value

        return fill
    if isinstance(arg, tuple):
        inner = {"d": "i", "l": "t"}.get(kind, kind)
        parts = [_filler(part, inner) for part in arg]
        return lambda values: tuple(part(values) for part in parts)
    if isinstance(arg, Span):
        start, stop, step = (_filler(part, "i") for part in (arg.start, arg.stop, arg.step))
        return lambda values: slice(start(values), stop(values), step(values))
    constant = DTYPES[arg.name] if isinstance(arg, Dtype) else arg
    return lambda values: constant


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, tuple) and all(isinstance(size, int) for size in value))


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "t": _is_tensor,
    "v": lambda value: isinstance(value, Tensor | int | float),
    "n": _is_number,
    "p": _is_number,
    "i": _is_integer,
    "d": _is_sizes,
    "z": _is_sizes,
    "x": lambda value: isinstance(value, Tensor | int),
    "g": lambda value: isinstance(value, Tensor | tuple),
    "l": lambda value: isinstance(value, tuple) and all(map(_is_tensor, value)),
    "y": lambda value: isinstance(value, torch.dtype),
    "w": lambda value: isinstance(value, torch.device),
    "o": lambda value: isinstance(value, torch.dtype | torch.device | Tensor),
}


def _checked(value: Any) -> Any:
    """What a call returned, if it is a value that a loss may hold.

    Raises:
        GraphError: a complex number or tensor, or an integer beyond 64 bits.
    """
    if isinstance(value, Tensor):
        if value.dtype not in ALLOWED_DTYPES:
            raise GraphError(f"the result is {value.dtype}, which a custom loss may not hold")
        return value
    if isinstance(value, tuple):
        return tuple(_checked(item) for item in value)
    if isinstance(value, float | torch.dtype | torch.device):
        return value
    if isinstance(value, int):
        if abs(value) >= MAX_NUMBER:
            raise GraphError("the result is an integer beyond 64 bits")
        return value
    raise GraphError(f"the result is a {type(value).__name__}, which a custom loss may not hold")
