"""Llama 4's image processor for tests, by the name and call of transformers', which needs torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinsmith.model.vision.tiles import Tiles
from tinsmith.pictures import LLAMA4, VisionInfo

SIDE, MAX_TILES = 16, 4
ADDED = {"<|patch|>": 207, "<|tile_x_separator|>": 208, "<|tile_y_separator|>": 209, "<|image|>": 210}


class TilesProcessor:
    """Its pixels are those of the real one (`test_tiles.py`), in float64."""

    def __call__(self, images: list[Any], return_tensors: str) -> dict[str, Any]:
        info = VisionInfo(LLAMA4, 207, side=SIDE, max_tiles=MAX_TILES)
        return {"pixel_values": Tiles(info)(images=images)["pixel_values"].double()}

    def save_pretrained(self, directory: str) -> None:
        settings = {
            "image_processor_type": "Llama4ImageProcessor",
            "size": {"height": SIDE, "width": SIDE},
            "max_patches": MAX_TILES,
        }
        entries = [{"id": token, "content": text} for text, token in ADDED.items()]
        Path(directory, "preprocessor_config.json").write_text(json.dumps(settings))
        Path(directory, "tokenizer.json").write_text(json.dumps({"added_tokens": entries}))
