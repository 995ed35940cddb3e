"""Pure checks of decoded requests against the base model and the limits. No I/O, no store, no torch.

Each check raises a UserError whose message names the cure. `LOSSES` is the list of losses on offer; the engine
implements exactly these names. Shape letters: N tokens of one datum, K targets a position, P prompt tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tinsmith.config import Settings
from tinsmith.errors import TooLargeError, UnsupportedError, UserError
from tinsmith.types import AdamParams, Array, BaseInfo, Datum, LossSpec, PromptTargets, Targets
from tinsmith.validate.jsonform import json_grammar
from tinsmith.wire.sampling import SampleRequest
from tinsmith.wire.training import TrainingRequest

TARGETS = "target_tokens"
MAX_TTL_S = 10 * 366 * 24 * 3600  # ten years, leap years or not
MAX_METADATA_BYTES = 8192
MAX_TOPK = 128
MAX_STOPS = 64
MAX_STOP_CHARS = 256  # the sampler reads that much text again after every token
MAX_PENALTY = 2
MAX_SEED = 2**63


@dataclass(frozen=True, slots=True)
class LossSignature:
    """The inputs of a loss and its configuration keys with their defaults. `has_many_targets`: [N, K] is allowed.

    `optional` inputs that are also settings give each token its own value.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    config: Mapping[str, float] = field(default_factory=dict)
    has_many_targets: bool = False


POLICY = (TARGETS, "logprobs", "advantages")
LOW, HIGH = "clip_low_threshold", "clip_high_threshold"
MASK = "sequence_ratio_mask"
LOSSES: Mapping[str, LossSignature] = {
    "cross_entropy": LossSignature(required=(TARGETS,), optional=("weights",), has_many_targets=True),
    "importance_sampling": LossSignature(required=POLICY),
    "ppo": LossSignature(required=POLICY, optional=(LOW, HIGH), config={LOW: 0.8, HIGH: 1.2}),
    "cispo": LossSignature(required=POLICY, optional=(LOW, HIGH), config={LOW: 0.0, HIGH: 4.0}),
    "dro": LossSignature(required=POLICY, config={"beta": 0.05}),
    "gspo": LossSignature(required=(*POLICY, MASK), optional=(LOW, HIGH), config={LOW: 0.8, HIGH: 1.2}),
}
CUSTOM = "custom"


def check_training(request: TrainingRequest, info: BaseInfo, settings: Settings) -> None:
    """Of all losses but custom ones (see `validate.custom`).

    Raises:
        UserError: naming the datum and the input that is wrong.
        TooLargeError: beyond a limit.
    """
    signature = check_loss(request.loss)
    check_size(request, settings)
    for index, datum in enumerate(request.data):
        _check_datum(datum, f"datum {index}", request.loss, signature, info)


def check_size(request: TrainingRequest, settings: Settings) -> None:
    """Raises: UserError: there are no data. TooLargeError: too many tokens."""
    if not request.data:
        raise UserError("data is empty: send at least one datum")
    if request.num_tokens > settings.max_request_tokens:
        raise TooLargeError(
            f"the request holds {request.num_tokens} tokens, at most {settings.max_request_tokens} are allowed: "
            "send it in several calls; gradients add up until optim_step"
        )


def check_loss(loss: LossSpec) -> LossSignature:
    """Raises: UserError: unknown loss or configuration. UnsupportedError: a known loss that is not on offer."""
    offered = ", ".join(LOSSES)
    if loss.name == "stable_reinforce":
        raise UnsupportedError(
            "stable_reinforce is not offered, its formula is not published: use importance_sampling with "
            "target_tokens, logprobs and advantages"
        )
    if loss.name not in LOSSES:
        raise UserError(f"unknown loss {loss.name[:100]!r}; offered: {offered}, {CUSTOM}")
    signature = LOSSES[loss.name]
    for key, value in loss.config.items():
        if key not in signature.config:
            known = ", ".join(signature.config) or "none"
            raise UserError(f"loss {loss.name} has no setting {key[:100]!r}; it has: {known}")
        if isinstance(value, str) or not math.isfinite(value):
            raise UserError(f"loss {loss.name}: {key} must be a finite number, not {value!r:.100}")
    _check_thresholds(loss, signature)
    return signature


def check_adam(params: AdamParams) -> None:
    """Raises: UserError: a value that is not finite or out of its range."""
    for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm", "beta1", "beta2"):
        if not math.isfinite(getattr(params, name)):
            raise UserError(f"{name} must be a finite number, not {getattr(params, name)}")
    for name in ("learning_rate", "weight_decay", "grad_clip_norm"):
        if getattr(params, name) < 0:
            raise UserError(f"{name} must be 0 or more, not {getattr(params, name)}")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(params, name) < 1:
            raise UserError(f"{name} must lie in [0, 1), not {getattr(params, name)}")
    if params.eps <= 0:
        raise UserError(f"eps must be greater than 0, not {params.eps}")


def check_sample(request: SampleRequest, info: BaseInfo, settings: Settings) -> None:
    """Raises: UserError: a prompt or parameter that can't be sampled with; the message names the range."""
    num_prompt = int(request.prompt.size)
    if not 1 <= request.num_samples <= settings.max_samples_per_request:
        raise UserError(f"num_samples must lie in 1..{settings.max_samples_per_request}, not {request.num_samples}")
    if num_prompt == 0:
        raise UserError("the prompt is empty: give at least one token")
    if request.records_routes and not settings.router_replay:
        raise UnsupportedError(
            "record_stability_info is not offered: it records what the loss stable_reinforce trains on, whose formula "
            "is not published; leave it out, and train with importance_sampling (recipes: loss_fn=importance_sampling)"
            "; with --router-replay it records a mixture's routes"
        )
    _check_range(request.prompt, info.vocab_size, "prompt tokens")
    if num_prompt >= info.max_context:
        raise UserError(
            f"the prompt has {num_prompt} tokens; {info.name} holds at most {info.max_context - 1} and one more"
        )
    _check_sampling_params(request, num_prompt, info)
    _check_prompt_scores(request, num_prompt, info)
    _check_numbers(request, num_prompt, info, settings.max_sample_numbers)
    check_seed(request.seed)


def check_seed(seed: int | None) -> None:
    if seed is not None and not 0 <= seed < MAX_SEED:
        raise UserError(f"seed must lie in 0..2^63-1, not {seed}; leave it out for a random one")


def check_lora(rank: int, seed: int | None, targets: Targets, settings: Settings) -> None:
    """Rank 0 stands for full fine-tuning.

    Raises:
        UserError: naming the largest rank.
    """
    if rank == 0 and settings.full_fine_tuning and replace(targets, vision=False) != Targets():
        raise UserError("rank 0 trains all weights: leave out train_attn, train_mlp and train_unembed")
    if rank == 0 and not settings.full_fine_tuning:
        raise UserError(
            f"rank 0 is full fine-tuning, which this server doesn't offer (--full-fine-tuning): rank must lie in "
            f"1..{settings.lora_max_rank}, not 0"
        )
    if not 0 <= rank <= settings.lora_max_rank:
        raise UserError(f"rank must lie in 1..{settings.lora_max_rank}, not {rank}")
    if not targets.groups:
        raise UserError("nothing to train: set at least one of train_attn, train_mlp and train_unembed")
    check_seed(seed)


def check_optimizer(name: str) -> None:
    if name != "adamw":
        raise UnsupportedError(f"optimizer {name[:100]!r} is not offered here: use adamw")


def check_ttl(ttl_seconds: int | None, settings: Settings) -> int | None:
    """The lifetime of a checkpoint, as it was asked for.

    Raises:
        UserError: it is out of its range.
    """
    least = settings.min_ttl_s
    if ttl_seconds is not None and not least <= ttl_seconds <= MAX_TTL_S:
        raise UserError(
            f"ttl_seconds must lie in {least}..{MAX_TTL_S}, not {ttl_seconds}; leave it out to keep the checkpoint"
        )
    return ttl_seconds


def check_metadata(metadata: Mapping[str, Any] | None) -> dict[str, str]:
    """The metadata with every value a string, as clients want it back; other values become their JSON.

    Raises:
        UserError: larger than 8 KiB.
    """
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
    size = sum(len(key.encode()) + len(value.encode()) for key, value in texts.items())
    if size > MAX_METADATA_BYTES:
        raise UserError(f"user_metadata holds {size} bytes, at most {MAX_METADATA_BYTES} are kept: shorten it")
    return texts


def _check_thresholds(loss: LossSpec, signature: LossSignature) -> None:
    if LOW not in signature.config:
        return
    low, high = (float(loss.config.get(key, signature.config[key])) for key in (LOW, HIGH))
    if low > high:
        raise UserError(
            f"loss {loss.name}: {LOW} ({low}) is above {HIGH} ({high}): give bounds of the ratio, such as 0.8 and 1.2"
        )


def _check_datum(datum: Datum, where: str, loss: LossSpec, signature: LossSignature, info: BaseInfo) -> None:
    check_tokens(datum, where, info)
    for name in signature.required:
        if name not in datum.inputs:
            raise UserError(f"{where}: loss {loss.name} needs the input {name}")
    for name in datum.inputs:
        if name not in signature.required and name not in signature.optional:
            takes = ", ".join((*signature.required, *signature.optional))
            raise UserError(f"{where}: loss {loss.name} takes no input {name[:100]!r}; it takes: {takes}")
    targets = datum.inputs[TARGETS]
    if targets.ndim != 1 and not signature.has_many_targets:
        raise UserError(f"{where}: loss {loss.name} takes {TARGETS} of shape [N], not {list(targets.shape)}")
    check_targets(targets, datum.num_tokens, where, info)
    for name, array in datum.inputs.items():
        if name != TARGETS:
            _check_floats(array, targets.shape, f"{where}: {name}")
    _check_token_thresholds(datum, where, loss, signature)
    if MASK in signature.required and not datum.inputs[MASK].any():
        raise UserError(f"{where}: {MASK} is zero everywhere: mark the sampled tokens with 1")


def check_tokens(datum: Datum, where: str, info: BaseInfo) -> None:
    """Raises: UserError: a model input that is empty, too long or holds what is no token."""
    num_tokens = datum.num_tokens
    if num_tokens == 0:
        raise UserError(f"{where}: the model input is empty: give at least one token")
    if num_tokens > info.max_context:
        raise UserError(f"{where}: {num_tokens} tokens are longer than the context of {info.name}, {info.max_context}")
    _check_range(datum.tokens, info.vocab_size, f"{where}: model input tokens")


def _check_token_thresholds(datum: Datum, where: str, loss: LossSpec, signature: LossSignature) -> None:
    if LOW not in datum.inputs and HIGH not in datum.inputs:
        return
    for name in (LOW, HIGH):
        if name in datum.inputs and name in loss.config:
            raise UserError(f"{where}: {name} is both an input and a setting of loss {loss.name}: give it once")
    low, high = (datum.inputs.get(key, np.float32(loss.config.get(key, signature.config[key]))) for key in (LOW, HIGH))
    if bool((low > high).any()):
        at = int(np.argmax(low > high))
        raise UserError(f"{where}: {LOW} is above {HIGH} at token {at}: give bounds of the ratio, such as 0.8 and 1.2")


def check_targets(targets: Array, num_tokens: int, where: str, info: BaseInfo) -> None:
    """Raises: UserError: not one target a token, or what is no token."""
    if targets.dtype != np.int64:
        raise UserError(f"{where}: {TARGETS} must be int64, not {targets.dtype}")
    if targets.shape[0] != num_tokens or targets.size == 0:
        raise UserError(
            f"{where}: {TARGETS} has shape {list(targets.shape)}, but the model input has {num_tokens} tokens: give "
            "one target a token"
        )
    _check_range(targets, info.vocab_size, f"{where}: {TARGETS}", "; a position counts for nothing with weight 0")


def _check_floats(array: Array, shape: tuple[int, ...], where: str) -> None:
    if array.dtype != np.float32:
        raise UserError(f"{where} must be float32, not {array.dtype}")
    if array.shape != shape:
        raise UserError(f"{where} has shape {list(array.shape)}, {TARGETS} has {list(shape)}: they must be equal")
    if not np.isfinite(array).all():
        raise UserError(f"{where} holds NaN or infinity: send finite numbers")


def _check_range(ids: Array, vocab_size: int, where: str, hint: str = "") -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise UserError(f"{where} must lie in 0..{vocab_size - 1}, found {wrong}{hint}")


def _check_sampling_params(request: SampleRequest, num_prompt: int, info: BaseInfo) -> None:
    params = request.params
    room = info.max_context - num_prompt
    if params.max_tokens is not None and params.max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, not {params.max_tokens}")
    if params.max_tokens is not None and params.max_tokens > room:
        raise UserError(
            f"prompt ({num_prompt}) plus max_tokens ({params.max_tokens}) exceed the context of {info.name}, "
            f"{info.max_context}: ask for at most {room}"
        )
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        raise UserError(f"temperature must be 0 (greedy) or more, not {params.temperature}")
    if params.top_k != -1 and params.top_k < 1:
        raise UserError(f"top_k must be -1 (off) or at least 1, not {params.top_k}")
    if not 0 < params.top_p <= 1:
        raise UserError(f"top_p must lie in (0, 1], not {params.top_p}")
    if params.json_schema is not None:
        json_grammar(params.json_schema)
        if params.stop_tokens is not None:
            raise UserError("json_schema needs the model's own end tokens: leave stop out, or give strings")
    if not 0 <= params.min_p <= 1:
        raise UserError(f"min_p must lie in 0..1, not {params.min_p}")
    for name in ("presence_penalty", "frequency_penalty"):
        if not -MAX_PENALTY <= getattr(params, name) <= MAX_PENALTY:
            raise UserError(f"{name} must lie in -{MAX_PENALTY}..{MAX_PENALTY}, not {getattr(params, name)}")
    if len(params.stop_strings) > MAX_STOPS or len(params.stop_tokens or ()) > MAX_STOPS:
        raise UserError(f"stop may hold at most {MAX_STOPS} entries")
    longest = max(map(len, params.stop_strings), default=0)
    if longest > MAX_STOP_CHARS:
        raise UserError(
            f"stop holds a string of {longest} characters, at most {MAX_STOP_CHARS} are allowed: shorten it"
        )
    if any(not text for text in params.stop_strings):
        raise UserError("stop holds an empty string: leave it out")
    if any(not 0 <= token < info.vocab_size for token in params.stop_tokens or ()):
        raise UserError(f"stop tokens must lie in 0..{info.vocab_size - 1}")


def _check_numbers(request: SampleRequest, num_prompt: int, info: BaseInfo, most: int) -> None:
    """The answer is held in memory as a whole, by the worker and by whoever reads it."""
    max_tokens, topk = request.params.max_tokens or info.max_context - num_prompt, request.topk_sample_logprobs
    num_sampled = request.num_samples * max_tokens * (1 + topk)
    of_prompt = int(request.prompt_logprobs) + request.topk_prompt_logprobs + request.prompt_alt_tokens_k
    num_targets = 0 if request.prompt_targets is None else int(request.prompt_targets.ids.size)
    num_scored = num_prompt * of_prompt + num_targets
    if num_sampled + num_scored > most:
        raise TooLargeError(
            f"the answer may hold {num_sampled} numbers for the samples (num_samples {request.num_samples} x "
            f"max_tokens {max_tokens} x (1 + topk_sample_logprobs {topk})) and {num_scored} for the prompt, at most "
            f"{most} are allowed (--max-sample-numbers): send it as several requests, lower max_tokens, or ask for "
            "fewer log-probabilities"
        )


def _check_prompt_scores(request: SampleRequest, num_prompt: int, info: BaseInfo) -> None:
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
        most = min(MAX_TOPK, info.vocab_size)
        if not 0 <= getattr(request, name) <= most:
            raise UserError(f"{name} must lie in 0..{most}, not {getattr(request, name)}")
    last_n = request.prompt_logprobs_last_n
    if last_n is not None and not request.prompt_logprobs:
        raise UserError("prompt_logprobs_last_n says which prompt logprobs are wanted: set prompt_logprobs too")
    if last_n is not None and not 1 <= last_n < num_prompt:
        raise UserError(
            f"prompt_logprobs_last_n must lie in 1..{num_prompt - 1}, not {last_n}: of the prompt's {num_prompt} "
            "tokens the first has no logprob"
        )
    if request.prompt_targets is not None:
        _check_prompt_targets(request.prompt_targets, num_prompt, info)


def _check_prompt_targets(targets: PromptTargets, num_prompt: int, info: BaseInfo) -> None:
    name = "target_prompt_logprobs"
    if targets.shape[0] != num_prompt - 1:
        raise UserError(
            f"{name} has {targets.shape[0]} rows: give {num_prompt - 1}, one for each prompt token after the first"
        )
    if not targets.ids.size or int(targets.ids.max()) < 0:
        raise UserError(f"{name} names no token id: name one, or leave it out")
    if int(targets.ids.max()) >= info.vocab_size:
        raise UserError(f"{name} must hold ids in 0..{info.vocab_size - 1} or -1, found {int(targets.ids.max())}")
    most = max(info.vocab_size, MAX_TOPK * (num_prompt - 1))
    if targets.ids.size > most:
        raise TooLargeError(
            f"{name} holds {targets.ids.size} cells, at most {most} are allowed for this prompt: name fewer ids, or "
            "send them as CSR, which leaves out the cells that ask for nothing"
        )
