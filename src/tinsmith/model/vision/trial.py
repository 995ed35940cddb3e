"""A picture between words, as the untouched model sees it: what the opened one is held to at the start.

Shape letters: T tokens of the trial, V vocabulary.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from tinsmith.model.rows import padded_rows
from tinsmith.model.vision.eyes import Eyes
from tinsmith.pictures import Picture, placeholders

WIDTH, HEIGHT = 72, 48
WORDS = 8  # before the picture, and at least so many after it


class Trial:
    """tokens_T: int64, as many as `padded_rows` says. logits_TV: of the model as it came."""

    def __init__(self, model: PreTrainedModel, eyes: Eyes, vocab_size: int) -> None:
        own = placeholders(eyes.info, WIDTH, HEIGHT)
        num_words = padded_rows(2 * WORDS + len(own)) - len(own)
        words = np.arange(num_words) % min(vocab_size, eyes.info.image_token)
        tokens = np.concatenate([words[:WORDS], own, words[WORDS:]]).astype(np.int32)
        self.picture = Picture(WORDS, len(own), noise(WIDTH, HEIGHT), WIDTH, HEIGHT)
        self.scene = eyes.scene(tokens, [self.picture])
        eyes.measure(self.picture)
        self.tokens_T = torch.from_numpy(tokens.astype(np.int64)).to(model.device)
        is_picture = (self.tokens_T == eyes.info.image_token).long()
        pixels = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
            for name, value in eyes.pixels(self.picture).items()
        }
        given = eyes.kind.inputs(self.tokens_T[None], is_picture[None], pixels)
        self.logits_TV: Tensor = model(**given, use_cache=False).logits[0]


def noise(width: int, height: int, seed: int = 0) -> bytes:
    """A PNG."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
