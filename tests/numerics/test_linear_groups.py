"""Layers with the same input are one product; a layer that is called otherwise gets its own."""

import pytest
import torch
from torch import Tensor, nn

from tinsmith.model.inspect import SiblingWatch
from tinsmith.model.linear import GroupedLinear, LinearGroup, PassHolder

LAYERS = {"m.a": nn.Linear(8, 4), "m.b": nn.Linear(8, 6, bias=False), "m.c": nn.Linear(8, 4)}


class Counting:
    """A pass context that adds nothing."""

    def __init__(self) -> None:
        self.groups: list[str] = []

    def add_lora(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        self.groups.append(group)
        return ()


@pytest.fixture
def context():
    return Counting()


@pytest.fixture
def layers(context: Counting) -> dict[str, GroupedLinear]:
    holder = PassHolder()
    holder.enter(context, torch.zeros(0, dtype=torch.int64))
    group = LinearGroup(LAYERS, holder)
    return {name: GroupedLinear(group, index) for index, name in enumerate(LAYERS)}


def test_siblings_share_one_product(layers, context):
    x = torch.randn(3, 5, 8)
    for name, layer in layers.items():
        torch.testing.assert_close(layer(x), LAYERS[name](x))
    assert context.groups == ["m.a"]
    assert layers["m.a"].group.drop_parts() == ()


def test_another_input_or_another_call_makes_a_product_of_its_own(layers, context):
    x, other = torch.randn(5, 8), torch.randn(5, 8)
    for name, given in (("m.a", x), ("m.b", other), ("m.c", x), ("m.c", x), ("m.a", x.clone())):
        torch.testing.assert_close(layers[name](given), LAYERS[name](given))
    assert len(context.groups) == 5
    assert layers["m.a"].group.drop_parts() == ("m.b", "m.c")


def test_gradients_of_siblings_meet_in_one_product(layers):
    x = torch.randn(5, 8, requires_grad=True)
    sum((layer(x) * (index + 1)).square().sum() for index, layer in enumerate(layers.values())).backward()
    exact = x.detach().clone().requires_grad_()
    sum((layer(exact) * (index + 1)).square().sum() for index, layer in enumerate(LAYERS.values())).backward()
    torch.testing.assert_close(x.grad, exact.grad)


def test_siblings_are_seen_where_they_are_called():
    """Same module, same tensor, one after another; an equal tensor isn't the same."""
    linears = {name: nn.Linear(4, 4) for name in ("m.q", "m.k", "m.v", "n.q", "n.k")}
    x = torch.randn(2, 4)
    with SiblingWatch(linears) as watch:
        for name in ("m.q", "m.k", "n.q"):
            linears[name](x)
        linears["n.k"](x.clone())
        linears["m.v"](x)
    assert watch.leads == {"m.q": "m.q", "m.k": "m.q", "m.v": "m.v", "n.q": "n.q", "n.k": "n.k"}
    linears["m.v"](x)


class WithGradients(Counting):
    """A pass context that keeps x, and adds to its gradient."""

    def add_lora(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        return (y_TO.new_ones(1),)

    def add_lora_grad(self, group: str, x_TI: Tensor, kept: tuple[Tensor, ...], dy_TO: Tensor, dx_TI: Tensor) -> None:
        self.groups.append(group)
        dx_TI += 1


@pytest.mark.parametrize("needs_grad", [False, True])
def test_an_input_that_needs_no_gradient_gets_none_but_its_adapters_do(needs_grad, monkeypatch):
    holder, context = PassHolder(), WithGradients()
    holder.enter(context, torch.zeros(0, dtype=torch.int64))
    group = LinearGroup({"m.a": nn.Linear(8, 4)}, holder)
    products = []
    backward = group.matrix.times_transpose
    monkeypatch.setattr(group.matrix, "times_transpose", lambda dy: products.append(dy) or backward(dy))
    x = torch.randn(5, 8, requires_grad=needs_grad)
    group(x).sum().backward()
    assert context.groups == ["m.a"]
    assert len(products) == needs_grad
    assert (x.grad is not None) == needs_grad
    assert holder.anchor.grad is None
