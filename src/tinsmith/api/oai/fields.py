"""The fields that both kinds of completions have, and those of OpenAI's that are not offered here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from tinsmith.api.texts.fields import FieldError
from tinsmith.config import Settings

MAX_STOPS = 64
DOES_NOTHING = "it would change nothing; leave it out"
NOT_KEPT = "requests are not kept under names; leave it out"
NO_BIAS = "the sampler can't shift single tokens; leave it out"
ONE_TIER = "there is one tier; leave it out"

UNOFFERED: Mapping[str, str] = {
    "audio": "models answer with text",
    "best_of": "ask for n answers and choose",
    "echo": "the prompt is known to you; its log-probabilities come from /api/v1/asample",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "logit_bias": NO_BIAS,
    "metadata": NOT_KEPT,
    "modalities": "models answer with text",
    "moderation": "nothing is moderated",
    "parallel_tool_calls": "the model decides how many tools it calls",
    "prediction": DOES_NOTHING,
    "prompt_cache_key": DOES_NOTHING,
    "prompt_cache_options": DOES_NOTHING,
    "prompt_cache_retention": DOES_NOTHING,
    "reasoning_effort": "set chat_template_kwargs, if the model's chat template has such a switch",
    "response_format": "ask for chat completions",
    "safety_identifier": NOT_KEPT,
    "service_tier": ONE_TIER,
    "store": NOT_KEPT,
    "suffix": "models write what follows the prompt",
    "user": NOT_KEPT,
    "verbosity": "ask for it in the prompt",
    "web_search_options": "nothing is searched",
}
HARMLESS: Mapping[str, Any] = {
    "best_of": 1,
    "echo": False,
    "logit_bias": {},
    "metadata": {},
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "store": False,
    "suffix": "",
}


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False


class CommonBody(Struct):
    model: str
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def sampling(self) -> dict[str, Any]:
        """What `Asked` takes under the same names."""
        names = (
            "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "seed",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check_common(self, settings: Settings, num_prompts: int = 1) -> None:
        """Raises: FieldError: the field that is out of its range."""
        if not 1 <= self.n * num_prompts <= settings.max_samples_per_request or self.n < 1:
            raise FieldError("n", f"at most {settings.max_samples_per_request} answers a request, at least 1")
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "needs stream")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            raise FieldError("stream_options.include_obfuscation", "streams are not padded here: leave it out")
        if len(self.stops) > MAX_STOPS:
            raise FieldError("stop", f"at most {MAX_STOPS} strings")
