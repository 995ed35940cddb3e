"""A base model from a Hugging Face directory.

Owns what becomes of its files: which class reads them, in which dtype, onto which device, and what is said when they
are damaged. Refuses to know what a pass does with the model.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from tinsmith.errors import UserError
from tinsmith.model.base import BaseModel, open_base
from tinsmith.model.directory import read_config
from tinsmith.types import BaseInfo


def load_base(
    info: BaseInfo,
    *,
    device: torch.device,
    dtype: torch.dtype,
    deterministic: bool = False,
    shares_factors: bool = True,
) -> BaseModel:
    """Load `info.path` and open it.

    deterministic: no kernel may round an element by its place in an array.
    shares_factors: of an adapter in experts, the one on the side of the hidden states is one for all of a layer.

    Raises:
        UserError: the directory lacks weights.
        UnsupportedError: the architecture has parts that can't be hooked; they are named.
    """
    model = load_model(info, device, dtype)
    return open_base(model, info, deterministic=deterministic, shares_factors=shares_factors)


def load_model(info: BaseInfo, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' own model of the directory, on the device.

    Raises:
        UserError: as `load_base`.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            info.path,
            config=read_config(info.path),
            dtype=dtype,
            attn_implementation="eager",  # of the check alone, and all families have it
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            device_map=None if device.type == "cpu" else device,  # weights go there one by one; needs accelerate
        )
    except (SafetensorError, ImportError, OSError, ValueError) as error:
        raise UserError(f"{info.path} can't be loaded ({error}): fetch its files again") from error
    model, report = loaded
    lacking = sorted(report["missing_keys"]) + [str(key) for key in report["mismatched_keys"]]
    if lacking:
        raise UserError(f"{info.path} lacks weights of {type(model).__name__}: {', '.join(lacking[:6])}")
    return cast(PreTrainedModel, model.to(device))
