"""Checks of requests whose loss was uploaded: does each datum hold what the loss reads? Pure, without torch.

As in the client, a datum may hold inputs that the loss doesn't read; they have no effect.
"""

from __future__ import annotations

import numpy as np

from tinsmith.config import Settings
from tinsmith.errors import TooLargeError, UserError
from tinsmith.loss_graph import LossGraph
from tinsmith.types import BaseInfo, Datum, LossSpec
from tinsmith.validate.requests import TARGETS, check_size, check_targets, check_tokens
from tinsmith.wire.training import TrainingRequest

MAX_STEPS = 2**20  # data of a request times calls of its loss


def check_custom_training(request: TrainingRequest, graph: LossGraph, info: BaseInfo, settings: Settings) -> None:
    """`request` is one that `with_graph` made.

    Raises:
        UserError: naming the datum and the input that is wrong.
        TooLargeError: beyond a limit.
    """
    check_size(request, settings)
    if len(request.data) * len(graph.calls) > MAX_STEPS:
        raise TooLargeError(
            f"{len(request.data)} datums with a custom loss of {len(graph.calls)} calls are more than one request may "
            f"hold, {MAX_STEPS} calls: send fewer datums at once"
        )
    for index, datum in enumerate(request.data):
        _check_datum(datum, f"datum {index}", graph, info)


def loss_id_of(loss: LossSpec) -> str:
    """What a custom loss's settings name.

    Raises:
        UserError: it is missing, or not alone.
    """
    loss_id = loss.config.get("loss_id")
    if not isinstance(loss_id, str) or len(loss.config) != 1:
        raise UserError(
            "loss custom takes the setting loss_id alone, a text: pass the LossHandle of create_custom_loss to "
            "forward_backward_custom"
        )
    return loss_id


def _check_datum(datum: Datum, where: str, graph: LossGraph, info: BaseInfo) -> None:
    check_tokens(datum, where, info)
    logprobs, *inputs = graph.inputs
    for name, rank in [(TARGETS, logprobs.rank), *((one.name, one.rank) for one in inputs)]:
        if name not in datum.inputs:
            raise UserError(f"{where}: the custom loss {graph.name!r} needs the input {name}")
        array = datum.inputs[name]
        if array.ndim != rank:
            raise UserError(
                f"{where}: {name} has shape {list(array.shape)}, the custom loss {graph.name!r} declared rank {rank}"
            )
        if array.dtype not in (np.float32, np.int64):
            raise UserError(f"{where}: {name} must be float32 or int64, not {array.dtype}")
    check_targets(datum.inputs[TARGETS], datum.num_tokens, where, info)
