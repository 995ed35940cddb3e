"""A full run's weights as a Hugging Face directory: what transformers itself saves of the base with these weights.

Names and shards are those of `save_pretrained`, so memory is that of the whole model in float32.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tinsmith.bases.catalog import BaseRef, describe
from tinsmith.bases.tokenizer_files import converted, tokenizer_files
from tinsmith.errors import ConfigError, UserError
from tinsmith.files.adapter_files import FULL
from tinsmith.model import load_model

OF_THE_MODEL = {"config.json", "generation_config.json"}  # which transformers writes itself


def find_full(source: Path, scratch: Path) -> Path | None:
    """The weights in a checkpoint of a full run, a directory or a tar, which is unpacked to `scratch`; None: it is
    none of such a run."""
    if source.is_dir():
        return source / FULL if (source / FULL).is_file() else None
    try:
        with tarfile.open(source, mode="r:") as tar:
            member = next((entry for entry in tar if entry.name == FULL and entry.isreg()), None)
            stored = None if member is None else tar.extractfile(member)
            if stored is None:
                return None
            with stored, (scratch / FULL).open("wb") as target:
                shutil.copyfileobj(stored, target)
    except (OSError, tarfile.TarError):
        return None
    return scratch / FULL


def write_full(base: Path, weights: Path, target: Path, *, dtype: str | None = None) -> int:
    """Write the model to `target`, which must not exist; it appears when it is complete.

    Args:
        dtype: of the weights, float32, bfloat16 or float16; None: float32, as they were trained.

    Returns:
        How many weights there are.

    Raises:
        ConfigError: the target exists, or the base is no model directory.
        UserError: the weights are of another model; the message names one.
    """
    if target.exists():
        raise ConfigError(f"{target} exists: name a new directory")
    model: Any = load_model(describe(BaseRef("base", base)), torch.device("cpu"), torch.float32)
    own = dict(model.named_parameters())
    try:
        with safe_open(weights, framework="pt") as file:
            strange = sorted(own.keys() ^ set(file.keys()))
            if strange:
                raise UserError(f"{weights} and {base} are of different models: only one of them has {strange[0]}")
            for name, parameter in own.items():
                tensor = file.get_tensor(name)
                if tensor.shape != parameter.shape:
                    raise UserError(f"{name} has shape {list(tensor.shape)}, in {base} {list(parameter.shape)}")
                parameter.data = tensor
    except SafetensorError as error:
        raise UserError(f"{weights} is not a whole safetensors file: {error}") from None
    model.to(dtype=getattr(torch, dtype or "float32"))
    making = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        model.save_pretrained(making)
        with TemporaryDirectory() as scratch:
            for path in tokenizer_files(converted(base, Path(scratch))):
                if path.name not in OF_THE_MODEL:
                    shutil.copyfile(path, making / path.name)
        making.rename(target)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return len(own)
