"""The fields of `user_metadata` by which a new run asks for more than a rank and targets, and how a run's are shown.

Metadata are the client's own, but for keys with the prefix `tinsmith.`: those are read here, and one that isn't known
is refused, so that a misspelt field can't be overlooked. Values are text, as the SDK sends them. Pure: no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec

from tinsmith.errors import UserError
from tinsmith.lora_options import DEFAULT_ALPHA, VISION, LoraOptions, Targets
from tinsmith.types import BaseInfo, RunSpec

PREFIX = "tinsmith."
ALPHA, RSLORA = "tinsmith.lora_alpha", "tinsmith.use_rslora"
RANKS, ALPHAS = "tinsmith.rank_pattern", "tinsmith.alpha_pattern"
DROPOUT = "tinsmith.lora_dropout"
TRAIN_VISION = "tinsmith.train_vision"
FIELDS = (ALPHA, ALPHAS, DROPOUT, RANKS, RSLORA, TRAIN_VISION)
MAX_ALPHA = 1e6
ONLY = "only"  # the tower alone: the SDK wants one of the language model's groups to be trained
TOWER = Targets(attn=False, mlp=False, unembed=False, vision=True)

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Extras:
    """What the fields of a new run say; None: there is no such field."""

    alpha: float | None = None
    use_rslora: bool | None = None
    ranks: tuple[tuple[str, int], ...] | None = None
    alphas: tuple[tuple[str, float], ...] | None = None
    dropout: float | None = None
    vision: str | None = None

    def of_new_run(self, spec: RunSpec) -> RunSpec:
        """The spec with what they say, and otherwise what is usual."""
        options = LoraOptions(bool(self.use_rslora), self.ranks or (), self.alphas or (), self.dropout or 0.0)
        targets = TOWER if self.vision == ONLY else replace(spec.targets, vision=self.vision == "true")
        alpha = DEFAULT_ALPHA if self.alpha is None else self.alpha
        return replace(spec, targets=targets, alpha=alpha, options=options)

    def require_same(self, spec: RunSpec, path: str) -> None:
        """Raises: UserError: one of them says something else than the spec of the checkpoint at `path`."""
        options = spec.options
        pairs = {
            ALPHA: (self.alpha, spec.alpha),
            RSLORA: (self.use_rslora, options.use_rslora),
            RANKS: (self.ranks, options.ranks),
            ALPHAS: (self.alphas, options.alphas),
            DROPOUT: (self.dropout, options.dropout),
            TRAIN_VISION: (self.vision, _train_vision(spec.targets)),
        }
        for name, (asked, found) in pairs.items():
            if asked is not None and asked != found:
                raise UserError(
                    f"{path} was made with {shape_text(spec)}, which {name} doesn't change: leave the field out, a run "
                    "made from a checkpoint is like it"
                )


def read_extras(metadata: Mapping[str, str], max_rank: int) -> Extras:
    """What the fields among the metadata say.

    Raises:
        UserError: an unknown field with the prefix, or a value that can't be; the message names the field.
    """
    unknown = sorted(key for key in metadata if key.startswith(PREFIX) and key not in FIELDS)
    if unknown:
        raise UserError(f"user_metadata: there is no field {unknown[0][:100]!r}; there are {', '.join(FIELDS)}")
    ranks = _pattern(metadata, RANKS, int, lambda rank: 1 <= rank <= max_rank, f"ranks in 1..{max_rank}")
    alphas = _pattern(metadata, ALPHAS, float, _is_alpha, f"numbers above 0 and at most {MAX_ALPHA:g}")
    return Extras(
        alpha=_number(metadata, ALPHA, _is_alpha, f"a number above 0 and at most {MAX_ALPHA:g}"),
        use_rslora=_truth(metadata, RSLORA),
        ranks=ranks,
        alphas=alphas,
        dropout=_number(metadata, DROPOUT, lambda part: 0 <= part < 1, "a number in [0, 1)"),
        vision=_choice(metadata, TRAIN_VISION, ("true", "false", ONLY)),
    )


def check_extras(spec: RunSpec, info: BaseInfo) -> None:
    """
    Raises:
        UserError: the options name a layer or a tower that this base hasn't, or a layer that the run doesn't train; or
            the run has no adapter; or an alpha is none that a run can have.
    """
    options, targets = spec.options, spec.targets
    for alpha in (spec.alpha, *dict(options.alphas).values()):
        if not _is_alpha(alpha):
            raise UserError(f"lora_alpha must be a number above 0 and at most {MAX_ALPHA:g}, not {alpha:g}")
    if spec.is_full and extra_fields(spec):
        raise UserError(f"{next(iter(extra_fields(spec)))} is of adapters, and a run of rank 0 has none: leave it out")
    if targets.vision and not any(group == VISION for group, _, _ in info.layer_widths):
        raise UserError(f"{TRAIN_VISION}: {info.name} has no vision tower that is served: leave the field out")
    of_groups = set(targets.groups)
    known = of_groups | {layer for group, layer, _ in info.layer_widths if group in of_groups}
    unknown = sorted(options.names - known)
    if unknown:
        raise UserError(
            f"{RANKS} and {ALPHAS} name {unknown[0][:100]!r}, which this run doesn't train on {info.name}; it trains "
            f"{', '.join(sorted(known))}"
        )


def extra_fields(spec: RunSpec) -> dict[str, str]:
    """The fields with which a run like this is made anew; none for a plain one."""
    options = spec.options
    fields: dict[str, str] = {}
    if spec.alpha != DEFAULT_ALPHA:
        fields[ALPHA] = _plain(spec.alpha)
    if options.use_rslora:
        fields[RSLORA] = "true"
    if options.ranks:
        fields[RANKS] = msgspec.json.encode(dict(options.ranks)).decode()
    if options.alphas:
        fields[ALPHAS] = msgspec.json.encode(dict(options.alphas)).decode()
    if options.dropout:
        fields[DROPOUT] = _plain(options.dropout)
    if spec.targets.vision:
        fields[TRAIN_VISION] = _train_vision(spec.targets)
    return fields


def shape_text(spec: RunSpec) -> str:
    """Rank, layers and options, for messages."""
    if spec.is_full:
        return "all weights (rank 0)"
    groups = "+".join(spec.targets.groups)
    fields = {name: value for name, value in extra_fields(spec).items() if name != TRAIN_VISION}
    more = "".join(f", {name.removeprefix(PREFIX)} {value}" for name, value in fields.items())
    return f"rank {spec.rank} on {groups}{more}"


def _number(metadata: Mapping[str, str], field: str, is_good: Callable[[float], bool], wanted: str) -> float | None:
    if field not in metadata:
        return None
    try:
        value = float(metadata[field])
    except ValueError:
        value = math.nan
    if not is_good(value):
        raise UserError(f"user_metadata: {field} must be {wanted}, not {metadata[field][:100]!r}")
    return value


def _truth(metadata: Mapping[str, str], field: str) -> bool | None:
    value = _choice(metadata, field, ("true", "false"))
    return None if value is None else value == "true"


def _choice(metadata: Mapping[str, str], field: str, choices: Sequence[str]) -> str | None:
    if field not in metadata:
        return None
    value = metadata[field].lower()
    if value not in choices:
        *first, last = choices
        raise UserError(f"user_metadata: {field} must be {', '.join(first)} or {last}, not {metadata[field][:100]!r}")
    return value


def _train_vision(targets: Targets) -> str:
    """The field's value for a run that trains these."""
    return ONLY if targets == TOWER else "true" if targets.vision else "false"


def _pattern(
    metadata: Mapping[str, str], field: str, kind: type[Number], is_good: Callable[[Number], bool], wanted: str
) -> tuple[tuple[str, Number], ...] | None:
    if field not in metadata:
        return None
    try:
        found: dict[str, Any] = msgspec.json.decode(metadata[field], type=dict[str, kind])  # type: ignore[valid-type]
    except msgspec.DecodeError:
        found = {"": math.nan}
    if not all(is_good(value) for value in found.values()):
        raise UserError(
            f"user_metadata: {field} must be a JSON object of layers and {wanted}, such as "
            f'{{"q_proj": 8, "mlp": 16}}, not {metadata[field][:100]!r}'
        )
    return tuple(sorted(found.items()))


def _is_alpha(value: float) -> bool:
    return 0 < value <= MAX_ALPHA


def _plain(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() else repr(value)
