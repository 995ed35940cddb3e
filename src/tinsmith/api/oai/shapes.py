"""Parts of answers that completions and chat completions share: usage, errors in streams, the end of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinsmith.api.dialects import openai_error, problem_of
from tinsmith.api.texts.events import frame
from tinsmith.errors import TinsmithError
from tinsmith.types import SampleResult

DONE = b"data: [DONE]\n\n"


def usage(num_prompt: int, results: Sequence[SampleResult]) -> dict[str, Any]:
    """num_prompt: tokens of all prompts. Completion tokens are all that were sampled, end tokens included."""
    num_sampled = sum(len(sequence.tokens) for result in results for sequence in result.sequences)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_sampled,
        "total_tokens": num_prompt + num_sampled,
        "prompt_tokens_details": {"cached_tokens": sum(result.prompt_cache_hit_tokens for result in results)},
    }


def failed_frame(error: TinsmithError) -> bytes:
    """The last event of a stream that went wrong."""
    problem, status = problem_of(error)
    return frame(openai_error(problem, status, error))
