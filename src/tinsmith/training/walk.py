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
from tinsmith.training.context import TrainingContext
from tinsmith.training.lanes import Lane
from tinsmith.training.varlen import attention_for


def walk(base: BaseModel, lanes: Sequence[Lane], *, backward: bool, recompute: bool, deterministic: bool) -> Tensor:
    """Hidden states [T, D]; the lanes' rows lie end to end from row 0.

    Args:
        backward: autograd follows; backward from the result adds the adapters' gradients of live lanes.
        recompute: with activation checkpointing.
        deterministic: each datum is a segment of its adapter by itself.
    """
    num_tokens = lanes[-1].end
    num_filler = padded_rows(num_tokens) - num_tokens  # rows of a sequence that nobody asked for
    lengths = [lane.ref.num_tokens for lane in lanes] + [num_filler] * (num_filler > 0)
    tokens = np.concatenate([lane.datum.tokens for lane in lanes] + [np.zeros(num_filler)]).astype(np.int64)
    positions = np.concatenate([np.arange(length) for length in lengths])
    tokens_T, positions_T = (to_device(table, base.device) for table in (tokens, positions))
    attention = attention_for(base.device, base.dtype)(lengths, base.device)
    context = TrainingContext(lanes, attention, base.lora, deterministic=deterministic)
    with torch.set_grad_enabled(backward):
        h_TD = base.hidden(tokens_T, positions_T, context, recompute=recompute)
    context.book_loads()
    return h_TD
