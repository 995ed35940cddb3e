"""The same adapter merged into the plain model's weights, in float64, and differentiated by autograd alone.

peft has no adapters with a factor that experts share, so for mixtures of experts this is the reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from tests.families.configs import CONFIGS
from tests.families.hub_configs import HUB_CONFIGS
from tests.numerics.lab import reader_of
from tinsmith.model import BaseModel
from tinsmith.model.layout import HEAD_STATE_NAME
from tinsmith.types import Datum, RunState


def plain_model(base: BaseModel) -> torch.nn.Module:
    """In float64 and written out, so that what differs is our own rounding."""
    return reader_of(base).from_pretrained(
        base.info.path,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
        **own_config(base),
    )


def own_config(base: BaseModel) -> dict[str, Any]:
    """For directories that name code of their own: the configuration that is here."""
    return {} if base.info.name not in HUB_CONFIGS else {"config": deepcopy(CONFIGS[base.info.name][1])}


class MergedTwin:
    """`params`: by the name of a state's tensors, without the part."""

    def __init__(self, base: BaseModel, state: RunState) -> None:
        self.model = plain_model(base).requires_grad_(False)
        self.params = {
            name.removeprefix("param/"): torch.from_numpy(array).double().requires_grad_()
            for name, array in state.tensors.items()
            if name.startswith("param/")
        }
        self.weights = merged(self.model, self.params, state.spec.alpha)

    def inputs(self, datum: Datum) -> dict[str, Any]:
        """What the model is called with."""
        return {"input_ids": torch.from_numpy(datum.tokens.astype(np.int64))[None]}

    def logprobs(self, datum: Datum) -> Tensor:
        logits = functional_call(self.model, self.weights, (), self.inputs(datum), tie_weights=False).logits[0]
        targets = torch.from_numpy(datum.inputs["target_tokens"])
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def backward(self, data: Sequence[Datum]) -> tuple[float, list[Tensor]]:
        logprobs = [self.logprobs(datum) for datum in data]
        total = -sum(((torch.from_numpy(d.inputs["weights"]) * lp).sum() for d, lp in zip(data, logprobs, strict=True)))
        assert isinstance(total, Tensor)
        total.backward()
        return float(total.detach()), [lp.detach() for lp in logprobs]


def head_of(model: torch.nn.Module) -> str:
    """Its path: in some models with vision it is further in."""
    return next(name for name, _ in model.named_modules() if name.rpartition(".")[2] == "lm_head")


def merged(model: torch.nn.Module, params: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The model's weights that the adapter changes, with it."""
    weights: dict[str, Tensor] = {}
    for name in sorted({name.rpartition(".")[0] for name in params}):
        a, b = params[f"{name}.lora_A"], params[f"{name}.lora_B"]
        delta = alpha / a.shape[-2] * b @ a
        path, _, last = name.rpartition(".")
        if delta.ndim == 2:
            own = head_of(model) if name == HEAD_STATE_NAME else name
            weights[f"{own}.weight"] = model.get_submodule(own).weight + delta
            continue
        module: Any = model.get_submodule(path)
        key = f"{path}.down_proj" if last == "w2" else f"{path}.gate_up_proj"
        whole = weights.get(key, model.get_parameter(key))
        is_transposed, is_concatenated = (getattr(module, f"is_{how}", True) for how in ("transposed", "concatenated"))
        if is_transposed:
            delta = delta.transpose(1, 2)
        if last == "w2":
            weights[key] = whole + delta
            continue
        out = -1 if is_transposed else 1
        is_gate = last == "w1"
        if is_concatenated:
            none = torch.zeros_like(delta)
            weights[key] = whole + torch.cat([delta, none] if is_gate else [none, delta], out)
        else:
            none = torch.zeros_like(delta)
            both = torch.stack([delta, none] if is_gate else [none, delta], -1 if out == -1 else 2)
            weights[key] = whole + (both.flatten(-2) if out == -1 else both.flatten(1, 2))
    return weights
