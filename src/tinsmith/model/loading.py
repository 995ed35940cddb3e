"""A base model from a Hugging Face directory, weight by weight onto its device.

Owns what becomes of the files: in which form and dtype a weight is kept, and what is said when a file is damaged.
transformers' loader knows names, experts and shapes; it is handed the weights as a mapping of what has yet to be read,
so that only what is being put together is in memory beside the model. Refuses to know what a pass does with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from tinsmith.errors import UnsupportedError, UserError
from tinsmith.machine.large_blocks import large_blocks_apart
from tinsmith.model.base import BaseModel, open_base
from tinsmith.model.directory import read_config
from tinsmith.model.families import vision_of
from tinsmith.model.lean import without_compiler
from tinsmith.model.longrope import settle_longrope, tell_longrope
from tinsmith.model.lora.choice import compiled
from tinsmith.model.quantise import Matrices, Quantise, quantiser
from tinsmith.model.stored import Stored
from tinsmith.model.weight_files import WeightFiles
from tinsmith.types import BaseInfo

Progress = Callable[[int, int], None]  # bytes of the files that were read, and all

STORED, DEQUANTISED = "stored", "dequantised"
# what transformers raises, in reading a configuration and in building a model of it, for values that can't be
WRONG_VALUES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
    StrictDataclassError, TypeError, ValueError,
)  # fmt: skip


def load_base(
    info: BaseInfo,
    *,
    device: torch.device,
    dtype: torch.dtype,
    deterministic: bool = False,
    shares_factors: bool = True,
    weights: str = STORED,
    may_compile: bool = True,
    progress: Progress | None = None,
) -> BaseModel:
    """Load `info.path` and open it.

    deterministic: no kernel may round an element by its place in an array.
    shares_factors: of an adapter in experts, the one on the side of the hidden states is one for all of a layer.
    weights: `stored`: in fewer bits where the files have them so; `dequantised`: all in `dtype`; `int4` or `nf4`:
        matrices of attention, MLP and experts are quantised as they are read.
    may_compile: a C program may be compiled for the adapters of training passes.
    progress: is told of each weight that was read, by threads.

    Raises:
        UserError: the directory lacks weights.
        UnsupportedError: the architecture has parts that can't be hooked, or its weights a form that isn't read; they
            are named.
    """
    with large_blocks_apart():
        model = load_model(info, device, dtype, weights=weights, progress=progress)
        tell_longrope(model, info.name, info.max_context)
        base = open_base(model, info, deterministic=deterministic, shares_factors=shares_factors)
    if may_compile:
        base.lora = compiled(base.lora)
        if base.eyes is not None:
            base.eyes.lora = base.lora
    return base


def plain_shapes(info: BaseInfo) -> dict[str, tuple[int, ...]]:
    """Of the parameters of transformers' own model of the directory, by name, in its order. No weights are read.

    Raises:
        UserError, UnsupportedError: as `load_base`.
    """
    _, _, outline = _architecture(info)
    return {name: tuple(weight.shape) for name, weight in outline.named_parameters()}


def load_model(
    info: BaseInfo,
    device: torch.device,
    dtype: torch.dtype,
    *,
    weights: str = DEQUANTISED,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """transformers' own model of the directory, on the device; as `load_base`, but for `weights`. Its rotary
    frequencies are those for `info.max_context`, see `longrope`.

    Raises:
        UserError, UnsupportedError: as `load_base`.
    """
    model_class, config, _ = _architecture(info)
    files = WeightFiles(Path(info.path))
    source = _Source(files, Matrices(config, files), weights, progress)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what it says was done to the weights is undone here
    one_by_one: dict[str, Any] = {"experts_implementation": "eager"} if source.is_quantised else {}
    try:
        with without_compiler():
            loaded: Any = model_class.from_pretrained(
                None,
                config=config,
                state_dict={name: _Unread(name, source) for name in files},
                dtype=dtype,
                attn_implementation="eager",  # of the check alone, and all families have it
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report
                device_map=None if device.type == "cpu" else device,  # weights go there one by one; needs accelerate
                **one_by_one,  # not all experts of a layer in full
            )
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        if source.failure is not None:
            raise source.failure from None
        if isinstance(error, RuntimeError):
            raise
        raise UserError(f"{info.path} can't be loaded ({error}): fetch its files again") from error
    model, report = loaded
    _check_report(report, info.path, type(model).__name__)
    source.end()
    settle_longrope(model, info.max_context)
    return cast(PreTrainedModel, model)


def _check_report(report: dict[str, Any], path: str, kind: str) -> None:
    """Raises: UserError: weights are missing, or have other shapes than the configuration says."""
    wrong = sorted((name, list(stored), list(wanted)) for name, stored, wanted in report["mismatched_keys"])
    if wrong:
        name, stored, wanted = wrong[0]
        raise UserError(
            f"{path}: {name} is {stored} in its files and {wanted} by its config.json ({len(wrong)} such weights): "
            "they are of different models, fetch its files again"
        )
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise UserError(f"{path} lacks weights of {kind}: {', '.join(lacking[:6])}")


def _architecture(info: BaseInfo) -> tuple[type[PreTrainedModel], PretrainedConfig, PreTrainedModel]:
    """The class of the directory's model, its configuration, and a model of it without numbers."""
    try:
        model_class, config = _class_of(read_config(info.path))
        with torch.device("meta"), without_compiler():
            return model_class, config, cast(Any, model_class)(deepcopy(config))
    except WRONG_VALUES as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{info.path}: no model can be made of its config.json ({text}): fetch it again") from error


def _class_of(config: PretrainedConfig) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The class of a causal language model, and its part of the configuration; the whole model where its vision is
    known, or where there is no other form."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if found is None or vision_of(config) is not None:
        found = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), found)
    if found is None:
        raise UnsupportedError(f"{config.model_type!r} is no causal language model that transformers knows")
    model_class = cast(type[PreTrainedModel], found[0] if isinstance(found, (list, tuple)) else found)
    text = config.sub_configs.get("text_config")
    if text is not None and model_class.config_class is text:
        return model_class, config.get_text_config()
    return model_class, config


class _Source:
    """What the loader's threads read from: counts, and keeps the first failure, which the loader would only log."""

    def __init__(self, files: WeightFiles, matrices: Matrices, weights: str, progress: Progress | None) -> None:
        self._files = files
        self._matrices = matrices
        self._keeps = weights != DEQUANTISED
        self._quantise: Quantise | None = None if weights in (STORED, DEQUANTISED) else quantiser(weights, files)
        self._progress = progress
        self._lock = threading.Lock()
        self._quantising = threading.Lock()  # one weight at a time: it takes several times the weight's own memory
        self._total = sum(map(files.num_bytes, files))
        self._done = 0
        self.failure: Exception | None = None

    @property
    def is_quantised(self) -> bool:
        """Whether a weight of the model will be in fewer bits."""
        return self._quantise is not None or (self._keeps and any(map(self._files.is_quantised, self._files)))

    def read(self, name: str) -> Tensor:
        try:
            found = self._made(name)
        except Exception as error:
            self.failure = self.failure or error
            raise
        with self._lock:
            self._done += self._files.num_bytes(name)
            if self._progress is not None:
                self._progress(self._done, self._total)
        return found

    def end(self) -> None:
        """What wasn't read belongs to no part of the model, such as layers that predict further tokens."""
        if self._progress is not None and self._done < self._total:
            self._progress(self._total, self._total)

    def _made(self, name: str) -> Tensor:
        found = self._files[name]
        is_matrix = self._matrices.has(name)
        if isinstance(found, Stored):
            return found if self._keeps and is_matrix else found.dequantised()
        if self._quantise is None or not is_matrix:
            return found
        with self._quantising:
            if self._matrices.is_flipped(name):
                return self._quantise(found.transpose(-1, -2).contiguous()).transpose(-1, -2)
            return self._quantise(found)


@dataclass(frozen=True, slots=True)
class _Unread:
    """A weight in the loader's hands, which it reads by taking all of it."""

    name: str
    source: _Source

    def __getitem__(self, index: object) -> Tensor:
        assert index is ..., "only whole weights are read"
        return self.source.read(self.name)
