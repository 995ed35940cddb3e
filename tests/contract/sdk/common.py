"""What the suites share: data, and what hides the differences of the releases. Imports nothing of tinsmith."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np
from tinker import types

BASE = "tinsmith/tiny"
NOBODY = f"s{'0' * 24}"  # the id of no session
TEXT = [5, 17, 42, 99, 7, 13, 28, 64]
VERSION = tuple(int(part) for part in importlib.metadata.version("tinker").split(".")[:2])


def done(value: Any) -> Any:
    """What a call is about: the value itself, or the result of the future."""
    return value.result() if hasattr(value, "result") else value


def datum(tokens: list[int] = TEXT, **inputs: Any) -> types.Datum:
    arrays = {name: np.array(values, np.float32) for name, values in inputs.items()}
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": np.array(tokens[1:], np.int64), **arrays},
    )


def logprobs(output: Any) -> list[np.ndarray]:
    return [np.array(row["logprobs"].tolist(), np.float32) for row in output.loss_fn_outputs]


def current(run: Any, tokens: list[int] = TEXT) -> np.ndarray:
    return logprobs(run.forward([datum(tokens)], "cross_entropy").result())[0]


def step(run: Any, learning_rate: float = 5e-3) -> float:
    """One supervised step; the loss before it. The step is posted before the pass is fetched."""
    passed = run.forward_backward([datum()], "cross_entropy")
    run.optim_step(types.AdamParams(learning_rate=learning_rate)).result()
    return float(passed.result().metrics["loss:sum"])
