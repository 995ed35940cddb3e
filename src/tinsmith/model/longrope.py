"""LongRoPE: rotary frequencies for sequences up to the length that a model was first trained at, and others for longer
ones (arXiv 2402.13753, section 3.3; the config's `short_factor`, `long_factor`, `original_max_position_embeddings`).

transformers chooses at each call, by the longest sequence of the batch; while a sequence is sampled, the keys of all
its tokens change once it crosses that length. Here a server chooses once, by the longest sequence that it takes
(`BaseInfo.max_context`): the long ones if that is beyond the first length, else the short ones. vLLM does the same with
its `max_model_len`. So neither a neighbour in the pass nor a token yet to come changes a number, and what was sampled
has the log-probabilities of the trainer. A sequence has those of transformers where transformers would choose alike for
it alone: on a server of short sequences all have, on one of long ones those that are longer than the first length.
"""

from __future__ import annotations

from typing import Any, cast

import structlog
import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tinsmith.errors import UnsupportedError

log = structlog.get_logger("tinsmith.worker")

LONGROPE = "longrope"
SETTLED = "default"  # to transformers: frequencies that stay as they are
MAX_ERROR = 1e-5


@torch.no_grad()
def settle_longrope(model: nn.Module, max_context: int) -> None:
    """Give the model's rotary embeddings the frequencies that hold for sequences of up to `max_context` tokens, for
    good. Changes nothing in a model without LongRoPE.

    Raises:
        UnsupportedError: one chooses otherwise than by the frequencies that it keeps; it is named.
    """
    for path, module in model.named_modules():
        if getattr(module, "rope_type", None) == LONGROPE:
            _settle(f"{type(model).__name__}: {path}", module, max_context)


def _settle(name: str, module: nn.Module, max_context: int) -> None:
    """What transformers computes for two places of one sequence is what each of them has to get alone afterwards."""
    rope: Any = module
    first_length = int(rope.config.rope_parameters["original_max_position_embeddings"])
    is_long = max_context > first_length
    longest = first_length + 1 if is_long else first_length
    places = (min(1, longest - 1), longest - 1)
    expected = _turns(module, places)
    frequencies, _ = ROPE_INIT_FUNCTIONS[LONGROPE](rope.config, rope.inv_freq.device, seq_len=longest)
    rope.inv_freq.copy_(frequencies)
    rope.rope_type = SETTLED
    found = torch.cat([_turns(module, (place,)) for place in places], 1)
    if not torch.allclose(expected, found, rtol=0.0, atol=MAX_ERROR):
        raise UnsupportedError(
            f"{name} changes more than frequencies with the length of a sequence, which isn't served beyond "
            f"{first_length} tokens; if its other parts can be, then with --max-context-tokens {first_length}"
        )


def tell_longrope(model: nn.Module, base: str, max_context: int) -> None:
    """To the log, where sequences of a base get other frequencies than they had alone."""
    for module in model.modules():
        rope: Any = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        if rope.get("rope_type") == LONGROPE and max_context > rope["original_max_position_embeddings"]:
            log.info(
                "LongRoPE: short sequences get the frequencies of long ones, since those are taken too; with "
                f"--max-context-tokens {rope['original_max_position_embeddings']} all get those of short ones",
                base=base,
            )
            return


def _turns(module: nn.Module, places: tuple[int, ...]) -> Tensor:
    """Cosines and sines of these places of one sequence, [2, places, size]."""
    inv_freq = cast(Tensor, module.inv_freq)
    cos, sin = module(inv_freq.new_zeros(1), torch.tensor([places], device=inv_freq.device))
    return torch.cat([cos, sin])
