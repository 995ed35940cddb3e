"""`adapter_config.json` of an adapter of anybody's: what it says of ranks and scales, and what can't be carried.

Settings of `peft.LoraConfig` (0.21) that change nothing in how trained weights are used are known by name; any other
that is set is refused by name, so that a feature of a later release is never left out in silence.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tinsmith.errors import UnsupportedError, UserError, echo

Value = TypeVar("Value", int, float)

NAME = "adapter_config.json"
MAX_BYTES = 2**20
MAX_PATTERNS = 256
HARMLESS = frozenset({
    "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
    "use_rslora", "ensure_weight_tying",
})  # fmt: skip
CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # ways to begin that take something from the weights
FLAGS = ("ensure_weight_tying", "fan_in_fan_out", "inference_mode", "lora_bias", "use_dora", "use_rslora")
CURE = "merge it with peft itself, or train without"


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """rank and alpha: of modules that no pattern in `ranks` or `alphas` matches. is_stabilised: rsLoRA,
    alpha / sqrt(rank) (arXiv 2312.03732)."""

    rank: int
    alpha: float
    is_stabilised: bool
    alphas: Mapping[str, float]
    ranks: Mapping[str, int]

    def alpha_of(self, module: str) -> float:
        return next((value for pattern, value in self.alphas.items() if _matches(pattern, module)), self.alpha)

    def scale(self, module: str, rank: int) -> float:
        """Of a module's product, B A times this. `rank`: as its tensors have it.

        Raises:
            UserError: the configuration says another rank, so that `peft` wouldn't load these tensors.
        """
        pattern = next((pattern for pattern in self.ranks if _matches(pattern, module)), None)
        told = self.rank if pattern is None else self.ranks[pattern]
        if told != rank:
            where = "r" if pattern is None else f"rank_pattern {echo(pattern)}"
            raise UserError(
                f"{NAME} says rank {told} for {echo(module)} ({where}), and its tensors have rank {rank}: the files "
                "are of different adapters, send those that were saved together"
            )
        return self.alpha_of(module) / self.divisor(rank)

    def divisor(self, rank: int) -> float:
        """What alpha is divided by."""
        return math.sqrt(rank) if self.is_stabilised else rank


def parse_config(data: bytes) -> PeftConfig:
    """Raises: UserError: it doesn't describe a LoRA adapter, or one that can't be carried; the message says why."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{NAME} can't be read: {error}") from None
    if not isinstance(found, dict) or found.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{NAME} does not describe a LoRA adapter")
    _check_known(found)
    return PeftConfig(
        _rank(found.get("r"), "r"),
        _alpha(found.get("lora_alpha"), "lora_alpha"),
        found.get("use_rslora") is True,
        _pattern(found, "alpha_pattern", _alpha),
        _pattern(found, "rank_pattern", _rank),
    )


def _check_known(found: Mapping[str, Any]) -> None:
    for flag in FLAGS:
        if not isinstance(found.get(flag), bool | None):
            raise UserError(f"{NAME}: {flag} must be true or false, not {echo(json.dumps(found[flag]))}")
    if found.get("bias", "none") not in ("none", None):
        raise UnsupportedError(
            f"{NAME} trains biases (bias={echo(str(found['bias']))}), which have no place here: {CURE}"
        )
    if found.get("use_dora"):
        raise UnsupportedError(f"{NAME} sets use_dora: magnitudes beside the two factors can't be carried; {CURE}")
    if found.get("modules_to_save"):
        raise UnsupportedError(
            f"{NAME} has modules_to_save={echo(str(found['modules_to_save']))}: whole modules trained beside the "
            f"adapter can't be carried; {CURE}"
        )
    begun = found.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(CHANGE_THE_BASE):
        raise UnsupportedError(
            f"{NAME} has init_lora_weights={echo(begun)}, which changes the base's own weights: convert it with peft's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    strange = sorted(name for name, value in found.items() if value and name not in HARMLESS)
    if strange:
        raise UnsupportedError(f"{NAME} sets {', '.join(map(echo, strange[:6]))}, which can't be carried; {CURE}")


def _pattern(found: Mapping[str, Any], name: str, read: Callable[[object, str], Value]) -> Mapping[str, Value]:
    values = {} if found.get(name) is None else found[name]
    if not isinstance(values, dict) or len(values) > MAX_PATTERNS:
        raise UserError(f"{NAME}: {name} must be an object of at most {MAX_PATTERNS} patterns and numbers")
    return {pattern: read(value, f"{name} {echo(pattern)}") for pattern, value in values.items()}


def _rank(value: object, name: str) -> int:
    if type(value) is not int or value < 1:
        raise UserError(f"{NAME}: {name} must be a whole number of at least 1, not {echo(str(value))}")
    return value


def _alpha(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise UserError(f"{NAME}: {name} must be a number above 0, not {echo(str(value))}")
    return float(value)


def _matches(pattern: str, module: str) -> bool:
    """As `peft` matches: the end of a module's path, which may be a regular expression; here one of names, dots and
    one `.*`, whose time is bounded."""
    if not re.fullmatch(r"[\w.*\\^$-]{1,500}", pattern) or pattern.count("*") > 1:
        raise UnsupportedError(f"{NAME}: the pattern {echo(pattern)} is beyond what is read here: name modules plainly")
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except re.error as error:
        raise UserError(f"{NAME}: the pattern {echo(pattern)} is none: {error}") from None
