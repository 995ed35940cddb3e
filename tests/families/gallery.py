"""Sequences with pictures among their tokens, and what transformers is called with for them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.families.configs import IMAGE, PROCESSORS
from tests.families.twin import MergedTwin
from tests.numerics.lab import PeftTwin
from tinsmith.model import BaseModel
from tinsmith.model.vision.trial import noise
from tinsmith.pictures import Picture, placeholders
from tinsmith.types import Datum, RunState, SampleItem

SIZES = ((40, 24), (16, 16), (21, 50))


def scenery(base: BaseModel, seed: int, sizes: Sequence[tuple[int, int]], length: int) -> tuple[Any, list[Picture]]:
    """Tokens and pictures: random words, of which there are `length` in all, around pictures of these sizes."""
    assert base.info.vision is not None
    rng = np.random.default_rng([seed, length])
    cuts = np.sort(rng.choice(np.arange(1, length), len(sizes), replace=False))
    words = np.split(rng.integers(3, IMAGE, length), cuts)
    parts, pictures = [words[0]], []
    for number, ((width, height), after) in enumerate(zip(sizes, words[1:], strict=True)):
        own = placeholders(base.info.vision, width, height)
        start = sum(map(len, parts))
        pictures.append(Picture(start, len(own), noise(width, height, 10 * seed + number), width, height))
        parts += [own, after]
    return np.concatenate(parts).astype(np.int32), pictures


def seeing(base: BaseModel, seed: int, sizes: Sequence[tuple[int, int]] = SIZES, length: int = 30) -> Datum:
    """A datum for cross entropy with weights of either sign."""
    tokens, pictures = scenery(base, seed, sizes, length)
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, IMAGE, len(tokens))
    weights = (rng.normal(size=len(tokens)) * (rng.random(len(tokens)) > 0.33)).astype(np.float32)
    return Datum(tokens, {"target_tokens": targets, "weights": weights}, tuple(pictures))


def with_pictures(item: SampleItem, pictures: Sequence[Picture]) -> SampleItem:
    return replace(item, pictures=tuple(pictures))


def changed(picture: Picture) -> Picture:
    """With one other pixel."""
    with Image.open(io.BytesIO(picture.data)) as image:
        pixels = np.array(image)
    pixels[0, 0, 0] ^= 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return replace(picture, data=file.getvalue())


def plain_inputs(base: BaseModel, kind: str, tokens: Any, pictures: Sequence[Picture]) -> dict[str, Any]:
    """For transformers' own model, from its own processor."""
    tokens_T = torch.from_numpy(tokens.astype(np.int64))
    if not pictures:
        return {"input_ids": tokens_T[None]}
    assert base.eyes is not None
    images = [Image.open(io.BytesIO(picture.data)) for picture in pictures]
    pixels = PROCESSORS[kind](images=images, return_tensors="pt")
    return base.eyes.kind.inputs(tokens_T[None], (tokens_T == IMAGE).long()[None], pixels)


def seeing_twin(base: BaseModel, kind: str, state: RunState) -> PeftTwin | MergedTwin:
    """As the battery takes them, looking at the pictures of data."""
    has_experts = any(linear.is_of_experts for linear in base.linears)
    twin = MergedTwin(base, state) if has_experts else PeftTwin(base, state)
    twin.inputs = lambda datum: plain_inputs(base, kind, datum.tokens, datum.pictures)  # type: ignore[method-assign]
    return twin
