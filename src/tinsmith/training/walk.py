"""One pack through the base: lanes in, hidden states out, ready for backward.

Shape letters: T rows of the pack (padded), D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tinsmith.model import BaseModel, padded_rows
from tinsmith.model.lora.tables import to_device
from tinsmith.model.vision import Span, joined, positions_of
from tinsmith.training.context import TrainingContext
from tinsmith.training.lanes import Lane
from tinsmith.training.tower import look
from tinsmith.training.varlen import attention_for


def walk(base: BaseModel, lanes: Sequence[Lane], *, backward: bool, recompute: bool, deterministic: bool) -> Tensor:
    """Hidden states [T, D]; the lanes' rows lie end to end from row 0.

    Args:
        backward: autograd follows; backward from the result adds the adapters' gradients of live lanes, but for those
            of the vision tower, which `tower.look_back` adds after it.
        recompute: with activation checkpointing.
        deterministic: each datum is a segment of its adapter by itself.

    Raises:
        UserError: a picture can't be read.
    """
    sights = None
    if base.eyes is not None:
        look(base.eyes, lanes, backward=backward, deterministic=deterministic)
        spans = [Span(lane.scene, 0, lane.ref.num_tokens, lane.start, seen=lane.seen) for lane in lanes]
        with torch.set_grad_enabled(backward):
            sights = base.eyes.sights(spans)
    num_tokens = lanes[-1].end
    num_filler = padded_rows(num_tokens) - num_tokens  # rows of a sequence that nobody asked for
    lengths = [lane.ref.num_tokens for lane in lanes] + [num_filler] * (num_filler > 0)
    tokens = np.concatenate([lane.datum.tokens for lane in lanes] + [np.zeros(num_filler)]).astype(np.int64)
    scenes = [lane.scene for lane in lanes] + [None] * (num_filler > 0)
    positions = joined([positions_of(scene, 0, length) for scene, length in zip(scenes, lengths, strict=True)])
    tokens_T, positions_T = (to_device(table, base.device) for table in (tokens, positions))
    last_seen = [
        None if scene is None else scene.last_seen(0, len_) for scene, len_ in zip(scenes, lengths, strict=True)
    ]
    attention = attention_for(base.device, base.dtype)(lengths, base.device, last_seen=last_seen)
    context = TrainingContext(lanes, attention, base.lora, deterministic=deterministic)
    with torch.set_grad_enabled(backward):
        h_TD = base.hidden(tokens_T, positions_T, context, recompute=recompute, sights=sights)
    context.book_loads()
    return h_TD
