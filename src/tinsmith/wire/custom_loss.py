"""A custom loss on the wire: the node list that `ServiceClient.create_custom_loss` uploads, read into a `LossGraph`.

Structure alone is checked here, without torch: every call is on the list (loss_ops.py) and has arguments of the kinds
that it takes, every reference leads back to an earlier node, and all sizes are bounded. What values turn out to be is
known only when a datum comes; `training.graph` checks them then. Encoding: `tinker.types.custom_loss_graph`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from msgspec import Struct

from tinsmith.errors import TooLargeError, UnsupportedError, UserError
from tinsmith.loss_graph import Arg, Dtype, LossCall, LossGraph, LossInput, Ref, Span
from tinsmith.wire.loss_ops import ALIASES, ATTRIBUTES, CALLS, DTYPES, NO_EFFECT, WORDS, Param, Signature
from tinsmith.wire.media import decode_json

MAX_BYTES = 256 * 1024
MAX_NODES = 512
MAX_INPUTS = 16
MAX_METRICS = 64
MAX_ARGS = 64
MAX_DEPTH = 4
MAX_TEXT = 200
MAX_INT = 2**53
METRIC_KEY = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
CURE = (
    "see docs/reference/losses.md, or pass the function itself to forward_backward_custom: the client evaluates it then"
)
VALUES = "tvnidzlxgowy"  # kinds of which a reference may be one


class InputBody(Struct):
    name: str
    rank: Literal[0, 1, 2]


class NodeBody(Struct):
    op: str
    name: str
    target: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


class GraphBody(Struct):
    nodes: list[NodeBody]
    format: int = 1


class LossBody(Struct):
    """What a create_custom_loss request holds beside its address; stored as it came."""

    name: str
    inputs: list[InputBody]
    graph: GraphBody


def decode_custom_loss(body: bytes) -> LossGraph:
    """The loss of a create_custom_loss request.

    Raises:
        WireError: it can't be read.
        UserError: nodes that don't fit together; the message names the node.
        UnsupportedError: an operation that isn't on the list.
        TooLargeError: more nodes, inputs or bytes than a loss may have.
    """
    if len(body) > MAX_BYTES:
        raise TooLargeError(f"the custom loss takes {len(body)} bytes, at most {MAX_BYTES} are kept: write it shorter")
    asked = decode_json(body, LossBody)
    if asked.graph.format != 1:
        raise UnsupportedError(f"custom loss: graph format {asked.graph.format} is not known here, 1 is")
    if len(asked.graph.nodes) > MAX_NODES:
        raise TooLargeError(
            f"the custom loss has {len(asked.graph.nodes)} nodes, at most {MAX_NODES} are evaluated: write it shorter"
        )
    return _Reader(asked).read()


class _Reader:
    """Reads the nodes in order; `_values` are the numbers of those read so far."""

    def __init__(self, asked: LossBody) -> None:
        self._asked = asked
        self._inputs = _read_inputs(asked.inputs)
        self._values: dict[str, int] = {}

    def read(self) -> LossGraph:
        nodes = self._asked.graph.nodes
        if not nodes or nodes[-1].op != "output":
            raise UserError("custom loss: the last node must be the output")
        num_inputs = len(self._inputs)
        for index, node in enumerate(nodes[:num_inputs]):
            self._read_placeholder(node, self._inputs[index])
        calls = tuple(self._read_call(node) for node in nodes[num_inputs:-1])
        if len(nodes) <= num_inputs:
            raise UserError(
                f"custom loss: {num_inputs} inputs are declared and {len(nodes) - 1} nodes come before the output"
            )
        loss, metrics = self._read_output(nodes[-1])
        return LossGraph(_text(self._asked.name, "the name"), self._inputs, calls, loss, metrics)

    def _read_placeholder(self, node: NodeBody, declared: LossInput) -> None:
        if node.op != "placeholder" or node.target != declared.name or node.args or node.kwargs:
            raise UserError(
                f"custom loss: node {node.name[:MAX_TEXT]!r} must be the placeholder of input {declared.name!r}: the "
                "first nodes are the declared inputs, in order and without defaults"
            )
        self._define(node)

    def _read_call(self, node: NodeBody) -> LossCall:
        where = f"custom loss: node {node.name[:MAX_TEXT]!r}"
        target = _target(node, where)
        signature = CALLS[target]
        given: list[Param] = []
        args: list[Arg] = []
        kwargs: list[tuple[str, Arg]] = []
        is_shifted = False
        for param, arg in _positional(node.args, signature, where, target):
            value = self._arg(arg, param.kind, where)
            given.append(param)
            if param.kind == "-":
                is_shifted = True
            elif is_shifted:
                kwargs.append((param.names[0], value))
            else:
                args.append(value)
        for name, arg in node.kwargs.items():
            named = signature.named(name)
            if named is None or any(named is other for other in given):
                raise UserError(f"{where}: {target} takes no argument {name[:MAX_TEXT]!r} here; {CURE}")
            value = self._arg(arg, named.kind, where)
            given.append(named)
            if named.kind != "-":
                kwargs.append((name, value))
        for param in signature.params:
            if param.is_required and not any(param is other for other in given):
                raise UserError(f"{where}: {target} needs the argument {param.names[0]}")
        self._define(node)
        return LossCall(node.name, target, tuple(args), tuple(kwargs))

    def _read_output(self, node: NodeBody) -> tuple[int, tuple[tuple[str, int], ...]]:
        cure = "custom loss: the output must be (loss, metrics), a node and a dict of nodes"
        if len(node.args) != 1 or node.kwargs:
            raise UserError(cure)
        returned = node.args[0]
        pair = returned.get("tuple") if isinstance(returned, dict) and len(returned) == 1 else returned
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(cure)
        metrics = pair[1].get("dict") if isinstance(pair[1], dict) and len(pair[1]) == 1 else None
        if not isinstance(metrics, dict):
            raise UserError(cure)
        if len(metrics) > MAX_METRICS:
            raise TooLargeError(f"custom loss: {len(metrics)} metrics, at most {MAX_METRICS} are kept")
        return self._returned(pair[0], cure), tuple(
            (self._metric_key(key), self._returned(value, cure)) for key, value in metrics.items()
        )

    def _returned(self, arg: Any, cure: str) -> int:
        if not (isinstance(arg, dict) and arg.keys() == {"ref"}):
            raise UserError(cure)
        return self._ref(arg["ref"], "custom loss: the output").value

    def _metric_key(self, key: str) -> str:
        if not METRIC_KEY.fullmatch(key):
            raise UserError(
                f"custom loss: metric {key[:MAX_TEXT]!r} must be named custom/<name>:sum or custom/<name>:mean, in "
                "lowercase"
            )
        return key

    def _define(self, node: NodeBody) -> None:
        name = _text(node.name, "a node's name")
        if name in self._values:
            raise UserError(f"custom loss: two nodes are named {name!r}")
        self._values[name] = len(self._values)

    def _ref(self, name: Any, where: str) -> Ref:
        if not isinstance(name, str) or name not in self._values:
            raise UserError(f"{where}: refers to {name!r:.{MAX_TEXT}}, which is no earlier node")
        return Ref(self._values[name])

    def _arg(self, arg: Any, kind: str, where: str, depth: int = 0) -> Arg:
        """An encoded argument of the given kind, read."""
        if kind == "-":
            if not any(arg is value or (type(arg) is type(value) and arg == value) for value in NO_EFFECT):
                raise UnsupportedError(f"{where}: {arg!r:.{MAX_TEXT}} is not offered for this argument; {CURE}")
            return None
        if isinstance(arg, dict) and len(arg) == 1:
            ((tag, inner),) = arg.items()
            if tag == "ref" and kind in VALUES:
                return self._ref(inner, where)
            read = self._tagged(tag, inner, kind, where, depth)
        elif isinstance(arg, list) and kind != "x":  # as an index, a list is no tuple
            read = self._items(arg, kind, where, depth)
        else:
            read = _scalar(arg, kind, where)
        return read

    def _tagged(self, tag: str, inner: Any, kind: str, where: str, depth: int) -> Arg:
        if tag == "tuple" and isinstance(inner, list):
            return self._items(inner, kind, where, depth)
        if tag == "slice" and kind == "x" and isinstance(inner, list) and len(inner) == 3:
            start, stop, step = (None if item is None else self._arg(item, "i", where, depth + 1) for item in inner)
            return Span(start, stop, step)
        if tag == "ellipsis" and kind == "x" and inner is True:
            return ...
        if tag == "float" and inner in ("inf", "-inf", "nan") and kind in "vn":
            return float(inner)
        if tag == "dtype" and kind in "yo":
            if inner not in DTYPES:
                raise UnsupportedError(f"{where}: dtype {inner!r:.{MAX_TEXT}} is not one of {', '.join(DTYPES)}")
            return Dtype(inner)
        if tag in ("device", "layout", "memory_format"):
            raise UnsupportedError(f"{where}: a custom loss names no {tag}; leave it out: values are where logprobs is")
        raise UserError(f"{where}: {tag[:MAX_TEXT]!r} is no argument that fits here")

    def _items(self, items: Sequence[Any], kind: str, where: str, depth: int) -> tuple[Arg, ...]:
        inner = {"d": "i", "z": "z", "x": "x", "l": "t"}.get(kind)
        if inner is None or depth >= MAX_DEPTH or len(items) > MAX_ARGS:
            raise UserError(f"{where}: a list is no argument that fits here")
        return tuple(self._arg(item, inner, where, depth + 1) for item in items)


def _positional(args: Sequence[Any], signature: Signature, where: str, target: str) -> list[tuple[Param, Any]]:
    """Each positional argument with the parameter that it is for."""
    if len(args) > MAX_ARGS or (len(args) > len(signature.params) and signature.rest is None):
        raise UserError(f"{where}: {target} takes at most {len(signature.params)} arguments, not {len(args)}; {CURE}")
    if signature.rest is None:
        return list(zip(signature.params, args, strict=False))
    fixed = [param for param in signature.params if param.is_required]
    rest = Param(("",), signature.rest, is_required=False)
    return list(zip([*fixed, *[rest] * len(args)], args, strict=False))


def _target(node: NodeBody, where: str) -> str:
    if node.op not in ("call_function", "call_method"):
        raise UnsupportedError(f"{where}: {node.op[:MAX_TEXT]!r} nodes are not evaluated here; {CURE}")
    name = f".{node.target}" if node.op == "call_method" else node.target.replace("_operator.", "operator.", 1)
    target = ALIASES.get(name, name)
    if target not in CALLS or target.startswith(".") != (node.op == "call_method"):
        raise UnsupportedError(f"{where}: {node.target[:MAX_TEXT]!r} is not on the list of operations; {CURE}")
    return target


def _scalar(arg: Any, kind: str, where: str) -> Arg:
    if isinstance(arg, bool):
        if kind in "bvndx":
            return arg
    elif isinstance(arg, int):
        if abs(arg) > MAX_INT:
            raise UserError(f"{where}: the integer {str(arg)[:40]} is too large: at most 2^53")
        if kind in "vnidzxp":
            return arg
    elif isinstance(arg, float):
        if kind in "vnp" and math.isfinite(arg):
            return arg
    elif isinstance(arg, str):
        if arg in WORDS.get(kind, ()):
            return arg
        if kind == "a":
            raise UnsupportedError(f"{where}: the attribute {arg[:MAX_TEXT]!r} is not one of {', '.join(ATTRIBUTES)}")
    elif arg is None and kind in "vnidzrmpywbx":
        return None
    raise UserError(f"{where}: {arg!r:.{MAX_TEXT}} is no argument that fits here")


def _read_inputs(declared: Sequence[InputBody]) -> tuple[LossInput, ...]:
    names = [declared_input.name for declared_input in declared]
    if not names or names[0] != "logprobs" or declared[0].rank == 0:
        raise UserError("custom loss: the first input must be logprobs, of rank 1 or 2")
    if len(names) > MAX_INPUTS:
        raise TooLargeError(f"custom loss: {len(names)} inputs, at most {MAX_INPUTS} are read")
    if len(set(names)) != len(names) or not all(INPUT_NAME.fullmatch(name) for name in names):
        raise UserError("custom loss: inputs must have different names of lowercase letters, digits and underscores")
    return tuple(LossInput(one.name, one.rank) for one in declared)


def _text(text: str, what: str) -> str:
    if not 0 < len(text) <= MAX_TEXT:
        raise UserError(f"custom loss: {what} must have 1 to {MAX_TEXT} characters")
    return text
