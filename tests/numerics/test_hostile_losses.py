"""Uploaded losses that mean harm or are broken: each is refused with its node named, within a second."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract.depth import DEEPER
from tests.numerics.custom_losses import pairwise, trace, upload
from tests.numerics.lab import assert_same_bits, datum, grads, item, make_trainer, run_pass, spec
from tinsmith.errors import TooLargeError, UnsupportedError, UserError
from tinsmith.loss_graph import LossGraph
from tinsmith.training.graph import GraphProgram
from tinsmith.training.graph_ops import FUNCTIONS
from tinsmith.training.losses import CustomLoss
from tinsmith.types import Failure, LossSpec, OpId, RunId, TrainItem
from tinsmith.wire.custom_loss import MAX_BYTES, MAX_NODES, decode_custom_loss
from tinsmith.wire.loss_ops import CALLS
from tinsmith.wire.media import encode_json

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about overloads and shapes
WITHIN_S = 1.0  # of CPU time: the machine may be busy
LP = {"ref": "logprobs"}
NUM_EXAMPLES = 150 if DEEPER else 60


def call(name: str, target: str, /, *args: Any, op: str = "call_function", **kwargs: Any) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


def method(name: str, target: str, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return call(name, target, *args, op="call_method", **kwargs)


def ref(name: str) -> dict[str, str]:
    return {"ref": name}


def loss(
    *calls: Any, returns: Any = "last", inputs: Any = (("logprobs", 1),), metrics: Any = None, **extra: Any
) -> bytes:
    """The body of an upload whose loss is the last call's value."""
    nodes = [{"op": "placeholder", "name": name, "target": name} for name, _ in inputs]
    nodes += calls
    last = nodes[-1]["name"] if returns == "last" else returns
    output = {"tuple": [ref(last) if isinstance(last, str) else last, {"dict": metrics or {}}]}
    nodes.append({"op": "output", "name": "output", "target": "output", "args": [output]})
    body = {
        "name": "mine",
        "inputs": [{"name": name, "rank": rank} for name, rank in inputs],
        "graph": {"format": 1, "nodes": nodes},
    }
    return encode_json(body | extra)


SUM = method("sum_1", "sum", LP)
DOUBLING = [call(f"d{i}", "torch.cat", [ref(f"d{i - 1}") if i else LP] * 2) for i in range(60)]
SQUARING = [
    call("o0", "torch.outer", LP, LP),
    method("f0", "flatten", ref("o0")),
    call("o1", "torch.outer", ref("f0"), ref("f0")),
    method("f1", "flatten", ref("o1")),
    call("o2", "torch.outer", ref("f1"), ref("f1")),
]  # fmt: skip
BAD_STRUCTURE: dict[str, tuple[bytes, str]] = {
    "an unknown function": (loss(call("x", "os.system", "rm")), "'os.system' is not on the list"),
    "a builtin": (loss(call("x", "eval", "1")), "'eval' is not on the list"),
    "a function of torch that reads files": (loss(call("x", "torch.load", "/etc/passwd")), "'torch.load' is not on"),
    "an unknown method": (loss(method("x", "backward", LP)), "'backward' is not on the list"),
    "a method that leaves torch": (loss(method("x", "numpy", LP)), "'numpy' is not on the list"),
    "a dunder method": (loss(method("x", "__reduce__", LP)), "'__reduce__' is not on the list"),
    "a method in place": (loss(method("x", "mul_", LP, 2)), "'mul_' is not on the list"),
    "randomness": (loss(call("x", "torch.rand_like", LP)), "'torch.rand_like' is not on the list"),
    "a function called as a method": (loss(method("x", "torch.exp", LP)), "'torch.exp' is not on the list"),
    "a method called as a function": (loss(call("x", ".exp", LP)), "'.exp' is not on the list"),
    "an attribute of Python": (loss(call("x", "getattr", LP, "__class__")), "'__class__' is not one of shape"),
    "an attribute named by a value": (loss(call("x", "getattr", LP, LP)), "no argument that fits"),
    "the gradient function": (loss(call("x", "getattr", LP, "grad_fn")), "'grad_fn' is not one of shape"),
    "a captured tensor": (loss(call("x", "_tensor_constant0", op="get_attr")), "'get_attr' nodes are not evaluated"),
    "a module": (loss(call("x", "linear", LP, op="call_module")), "'call_module' nodes are not evaluated"),
    "an unknown kind of node": (loss(call("x", "x", op="import")), "'import' nodes are not evaluated"),
    "a forward reference": (loss(call("a", "torch.exp", ref("b")), call("b", "torch.exp", LP)), "refers to 'b'"),
    "a cycle": (loss(call("a", "torch.exp", ref("b")), call("b", "torch.exp", ref("a"))), "'b', which is no earlier"),
    "a node that refers to itself": (loss(call("a", "torch.exp", ref("a"))), "'a', which is no earlier node"),
    "two nodes of one name": (loss(SUM, SUM), "two nodes are named 'sum_1'"),
    "a node without a name": (loss(call("", "torch.exp", LP)), "1 to 200 characters"),
    "a long name": (loss(call("x" * 10**4, "torch.exp", LP)), "1 to 200 characters"),
    "a reference that is no text": (loss(call("x", "torch.exp", {"ref": [1]})), "no earlier node"),
    "an unhashable reference": (loss(call("x", "torch.exp", {"ref": {}})), "no earlier node"),
    "a huge integer": (loss(call("x", "operator.mul", LP, 10**30)), "too large"),
    "too many arguments": (loss(call("x", "torch.exp", *[LP] * 9)), "takes at most 1 arguments"),
    "an unknown argument": (loss(call("x", "torch.exp", LP, out=LP)), "takes no argument 'out'"),
    "an argument twice": (loss(call("x", "torch.exp", LP, input=LP)), "takes no argument 'input' here"),
    "a missing argument": (loss(call("x", "torch.outer", LP)), "needs the argument other"),
    "a text for a tensor": (loss(call("x", "torch.exp", "logprobs")), "no argument that fits"),
    "a list to multiply": (loss(call("x", "operator.mul", [LP], 10**9)), "a list is no argument that fits"),
    "a text to multiply": (loss(call("x", "operator.mul", "x", 10**9)), "no argument that fits"),
    "a device": (loss(method("x", "to", LP, {"device": "cuda"})), "names no device"),
    "a layout": (loss(call("x", "torch.zeros", 3, layout={"layout": "strided"})), "takes no argument 'layout'"),
    "a dtype that isn't offered": (loss(method("x", "to", LP, {"dtype": "complex64"})), "'complex64' is not one of"),
    "deep nesting": (loss(call("x", "operator.getitem", LP, {"tuple": [{"tuple": [{"tuple": [
        {"tuple": [{"tuple": [1]}]}]}]}]})), "a list is no argument"),
    "a long list": (loss(call("x", "torch.stack", [LP] * 10**4)), "a list is no argument that fits"),
    "an object of two keys": (loss(call("x", "torch.exp", {"ref": "logprobs", "x": 1})), "no argument that fits"),
    "an unknown tag": (loss(call("x", "torch.exp", {"code": "1"})), "'code' is no argument"),
    "a loss that is no node": (loss(SUM, returns=1.0), "must be (loss, metrics)"),
    "a metric without a suffix": (loss(SUM, metrics={"custom/x": ref("sum_1")}), "must be named custom/<name>:sum"),
    "a metric that shadows the trainer's": (loss(SUM, metrics={"loss:sum": ref("sum_1")}), "must be named custom/"),
    "a metric that is no node": (loss(SUM, metrics={"custom/x:sum": 1.0}), "must be (loss, metrics)"),
    "an input of rank 3": (loss(SUM, inputs=(("logprobs", 3),)), "Invalid enum value 3"),
    "no logprobs": (loss(SUM, inputs=(("weights", 1),)), "the first input must be logprobs"),
    "an input twice": (loss(SUM, inputs=(("logprobs", 1), ("a", 1), ("a", 1))), "different names"),
    "an input that is no name": (loss(SUM, inputs=(("logprobs", 1), ("a.b", 1))), "different names"),
    "too many inputs": (loss(SUM, inputs=(("logprobs", 1), *((f"i{i}", 1) for i in range(16)))), "at most 16"),
    "too many nodes": (loss(*(call(f"n{i}", "torch.exp", LP) for i in range(MAX_NODES))), f"at most {MAX_NODES}"),
    "too many bytes": (loss(SUM, padding="x" * MAX_BYTES), f"at most {MAX_BYTES}"),
    "no nodes": (b'{"name":"x","inputs":[{"name":"logprobs","rank":1}],"graph":{"nodes":[]}}', "last node must be"),
    "another format": (loss(SUM, graph={"format": 2, "nodes": []}), "format 2 is not known"),
    "no JSON": (b"\xff{", "not JSON"),
    "ten thousand lists": (b'{"name":' + b"[" * 10**4 + b"]" * 10**4 + b"}", "nested too deeply|does not fit"),
}  # fmt: skip
BAD_VALUES: dict[str, tuple[bytes, str]] = {
    "doubling": (loss(*DOUBLING, method("s", "sum", ref("d59"))), "node 'd.*makes the loss larger"),
    "squaring": (loss(*SQUARING, method("s", "sum", ref("o2"))), "node 'o2'.*makes the loss larger"),
    "a huge tensor": (loss(call("z", "torch.zeros", 10**6, 10**6), method("s", "sum", ref("z"))), "'z'.*larger"),
    "a huge range": (loss(call("z", "torch.arange", 0, 2**52), method("s", "sum", ref("z"))), "'z'.*larger"),
    "a range of tiny steps": (loss(call("z", "torch.arange", 0, 1, 1e-300), method("s", "sum", ref("z"))), "node 'z'"),
    "a huge expansion": (loss(method("z", "expand", LP, 10**9, -1), call("s", "torch.exp", ref("z"))), "'z'.*larger"),
    "padding": (loss(call("z", "torch.nn.functional.pad", LP, [0, 10**12]), method("s", "sum", ref("z"))), "node 'z'"),
    "sums over nothing": (loss(
        call("z", "torch.zeros", 0, 2**24), *(call(f"s{i}", "torch.sum", ref("z"), 0) for i in range(3)),
        call("s", "torch.sum", LP)), "node 's2'.*larger"),
    "products over nothing": (loss(
        call("y", "torch.zeros", 8192, 0), call("z", "torch.zeros", 0, 8192), call("p", "torch.mm", ref("y"), ref("z")),
        call("s", "torch.sum", LP)), "node 'p'.*larger"),
    "pairs of nothing": (loss(
        call("y", "torch.zeros", 0, 2**25), call("z", "torch.zeros", 2, 0, 1),
        call("p", "torch.add", ref("y"), ref("z")), call("s", "torch.sum", ref("p"), 1),
        call("t", "torch.sum", LP)), "node 'p'.*larger"),
    "eight bytes each": (loss(
        call("y", "torch.ones", 2**23, dtype={"dtype": "float64"}), call("z", "torch.exp", ref("y")),
        call("s", "torch.sum", LP)), "node '[zs]'.*larger"),
    "a power of integers": (loss(
        method("n", "size", LP, 0), call("p", "operator.pow", ref("n"), ref("n")),
        call("q", "operator.pow", ref("p"), ref("p"))), "node 'p'.*up to 64|node 'q'.*up to 64|64 bits"),
    "integers that grow": (loss(
        method("n", "size", LP, 0), *(call(f"m{i}", "operator.mul", ref(f"m{i - 1}") if i else ref("n"),
        ref(f"m{i - 1}") if i else ref("n")) for i in range(9)),
        call("s", "operator.mul", LP, ref("m8"))), "beyond 64 bits"),
    "a complex number": (loss(
        method("n", "size", LP, 0), call("m", "operator.neg", ref("n")), call("p", "operator.pow", ref("m"), 0.5),
        call("s", "operator.mul", LP, ref("p"))), "is a complex"),
    "an integer division that traps": (loss(
        call("i", "torch.full", [3], -(2**53), dtype={"dtype": "int64"}),
        call("j", "torch.div", ref("i"), -1, rounding_mode="trunc"), SUM), "not divided by 0 or -1"),
    "an index out of range": (loss(
        call("i", "torch.full", [3], 10**6, dtype={"dtype": "int64"}), method("g", "gather", LP, 0, ref("i")),
        method("s", "sum", ref("g"))), "node 'g'.*indices must lie in"),
    "an index far out of range": (loss(call("s", "operator.getitem", LP, 10**6)), "node 's'"),
    "shapes that don't fit": (loss(
        method("v", "view", LP, 7, 13), method("s", "sum", ref("v"))), "node 'v' \\(view\\): shape '\\[7, 13\\]'"),
    "a number where a tensor must be": (loss(
        method("n", "size", LP, 0), call("s", "torch.exp", ref("n"))), "node 's'.*argument is a int"),
    "a tensor where a number must be": (loss(call("z", "torch.zeros", LP), SUM), "node 'z'.*argument is a tensor"),
    "a loss that is no scalar": (loss(call("e", "torch.exp", LP)), r"must return a scalar.*not shape \[11\]"),
    "a loss of one element": (loss(method("e", "sum", LP, 0, True)), r"must return a scalar.*not shape \[1\]"),
    "a loss that is a number": (loss(method("n", "size", LP, 0)), "must return a scalar.*not 11"),
    "a loss of integers": (loss(call("a", "torch.argmax", LP)), "must return a scalar float tensor"),
    "a loss without logprobs": (loss(method("d", "detach", LP), method("s", "sum", ref("d"))), "does not depend"),
    "a metric that is no scalar": (loss(SUM, metrics={"custom/x:sum": LP}), "metric custom/x:sum must be a scalar"),
    "infinity": (loss(call("x", "operator.mul", LP, {"float": "inf"}), method("s", "sum", ref("x"))), "is not finite"),
    "NaN": (loss(call("x", "operator.mul", LP, {"float": "nan"}), method("s", "sum", ref("x"))), "is not finite"),
    "an infinite gradient": (loss(
        method("z", "detach", LP), call("d", "operator.sub", LP, ref("z")), call("r", "torch.sqrt", ref("d")),
        method("s", "sum", ref("r"))), "is not finite"),
    "overflow": (loss(call("x", "operator.mul", LP, -1e38), method("e", "exp", ref("x")), method("s", "sum", ref("e"))),
                 "is not finite"),
    "overflow of a number": (loss(
        method("n", "size", LP, 0), call("m", "operator.mul", ref("n"), 1000), call("e", "math.exp", ref("m")),
        call("s", "operator.mul", LP, ref("e"))), "node 'e'.*math range error"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BAD_STRUCTURE)
def test_refused_when_it_arrives(mistake: str) -> None:
    body, words = BAD_STRUCTURE[mistake]
    started = time.process_time()
    with pytest.raises(UserError) as caught:
        decode_custom_loss(body)
    assert time.process_time() - started < WITHIN_S
    assert any(word in caught.value.message for word in words.split("|")), caught.value.message
    assert len(caught.value.message) < 1000


def test_what_is_known_and_not_offered_says_where_to_go() -> None:
    with pytest.raises(UnsupportedError, match=r"forward_backward_custom"):
        decode_custom_loss(loss(call("x", "torch.erfinv", LP)))
    with pytest.raises(TooLargeError):
        decode_custom_loss(loss(SUM, padding="x" * MAX_BYTES))


@pytest.mark.parametrize("mistake", BAD_VALUES)
def test_refused_when_it_is_evaluated(base: Any, mistake: str) -> None:
    """The request fails alone: a neighbour in the pass, and a request of the same run, have their bits."""
    body, words = BAD_VALUES[mistake]
    rng = np.random.default_rng(0)
    bad = TrainItem(
        OpId("bad"),
        RunId("a"),
        2,
        (datum(rng, 11), datum(rng, 11)),
        LossSpec("custom", {}, decode_custom_loss(body)),
        True,
    )
    good, neighbour = item("a", [datum(rng, 9)], 1), item("b", [datum(rng, 20)])
    trainer = make_trainer(base, spec("a", 4), spec("b", 4))
    run_pass(trainer, [good])
    started = time.process_time()
    _, failure, _ = run_pass(trainer, [good, bad, neighbour])
    assert time.process_time() - started < WITHIN_S
    assert isinstance(failure, Failure)
    assert failure.category == "user"
    assert "datum 0" in failure.message
    assert_matches(words, failure.message)
    expected = make_trainer(base, spec("a", 4), spec("b", 4))
    run_pass(expected, [good])
    run_pass(expected, [good, neighbour])
    for run in ("a", "b"):
        assert_same_bits(grads(trainer, run), grads(expected, run))


def assert_matches(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=words):
        raise ValueError(message)


def test_work_is_bounded_over_a_request() -> None:
    """A datum may make a large matrix; a request may not make very many."""
    graph = decode_custom_loss(upload(trace(pairwise)))
    program = GraphProgram(graph)
    lp = torch.linspace(-3, -1, 1000)

    def run_all() -> None:
        for _ in range(1000):
            program.run(lp.clone().requires_grad_(), {"rewards": lp})

    with pytest.raises(UserError, match=r"grow beyond .* send fewer datums"):
        run_all()


def test_every_name_on_the_list_has_its_function() -> None:
    assert FUNCTIONS.keys() == CALLS.keys()


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 3), st.floats(), st.text(max_size=5),
    st.sampled_from(["shape", "values", "sum", "mean", "fro", "trunc", "__class__"]),
)  # fmt: skip
ENCODED = st.recursive(
    st.one_of(
        SCALARS,
        st.builds(lambda i: {"ref": f"n{i}"}, st.integers(-1, 12)),
        st.sampled_from([LP, LP, LP, {"ellipsis": True}, {"float": "nan"}, {"dtype": "float32"}, {"dtype": "x"}]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.builds(lambda items: {"tuple": items}, st.lists(inner, max_size=3)),
        st.builds(lambda items: {"slice": items}, st.lists(inner, min_size=3, max_size=3)),
        st.builds(lambda x: {"dict": {"custom/x:sum": x}}, inner),
        st.dictionaries(st.text(max_size=4), inner, max_size=2),
    ),
    max_leaves=4,
)  # fmt: skip
TARGETS = sorted(CALLS)


@st.composite
def calls(draw: Any) -> list[dict[str, Any]]:
    """Nodes of listed targets with arguments that often fit: references back, small numbers, what is encoded."""
    nodes = []
    for index in range(draw(st.integers(1, 12))):
        target = draw(st.sampled_from(TARGETS))
        earlier = [LP, *(ref(f"n{i}") for i in range(index))]
        fitting = st.one_of(
            st.sampled_from(earlier), st.sampled_from(earlier), st.integers(-2, 4), st.floats(-2, 2), ENCODED
        )
        count = draw(st.integers(1, max(1, min(3, len(CALLS[target].params)))))
        args = [draw(st.sampled_from(earlier)), *(draw(fitting) for _ in range(count - 1))]
        kind = "call_method" if target.startswith(".") else "call_function"
        names = [name for param in CALLS[target].params[count:] for name in param.names]
        kwargs = draw(st.dictionaries(st.sampled_from(names), fitting, max_size=2)) if names else {}
        nodes.append(call(f"n{index}", target.removeprefix("."), *args, op=kind, **kwargs))
    return nodes


def read(body: bytes) -> LossGraph | None:
    try:
        return decode_custom_loss(body)
    except UserError as error:
        refusal = error.message
    assert 0 < len(refusal) < 1000
    return None


@settings(max_examples=2 * NUM_EXAMPLES, deadline=None)
@given(st.lists(st.builds(call, st.text(max_size=3), st.sampled_from([*TARGETS, "x"]), ENCODED, ENCODED), max_size=4))
def test_any_nodes_are_read_or_refused(nodes: list[dict[str, Any]]) -> None:
    read(loss(*nodes, SUM))


@settings(max_examples=NUM_EXAMPLES, deadline=None)
@given(ENCODED, ENCODED)
def test_any_output_and_any_inputs_are_read_or_refused(returned: Any, inputs: Any) -> None:
    read(encode_json({"name": "x", "inputs": [{"name": "logprobs", "rank": 1}], "graph": {"nodes": [
        {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
        {"op": "output", "name": "o", "target": "output", "args": [returned]}]}}))  # fmt: skip
    read(encode_json({"name": "x", "inputs": inputs, "graph": {"nodes": []}}))


@settings(max_examples=4 * NUM_EXAMPLES, deadline=None)
@given(calls())
def test_what_was_read_is_evaluated_or_refused(nodes: list[dict[str, Any]]) -> None:
    """Each call's value as the loss: a number with a gradient, or a refusal that names the cause."""
    while nodes:
        graph = read(loss(*nodes))
        if graph is not None:
            assert_evaluated_or_refused(graph)
            return
        nodes = nodes[:-1]


def assert_evaluated_or_refused(graph: LossGraph) -> None:
    lp = torch.tensor([-1.0, -2.0, -0.5, -3.0])
    try:
        found = CustomLoss(GraphProgram(graph)).evaluate(lp, {})
    except UserError as error:
        refusal = error.message
    else:
        refusal = "custom loss: none"
        assert found.coef.shape == lp.shape
    assert "custom loss" in refusal
    assert lp.tolist() == [-1.0, -2.0, -0.5, -3.0]
