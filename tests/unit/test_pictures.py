"""How many tokens a picture becomes: the same as in the models' own processors, over many sizes."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import random
import shutil
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.image_utils import SizeDict
from transformers.models.llama4.processing_llama4 import Llama4Processor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tinsmith.bases.catalog import SHIPPED_PATH, BaseRef, describe
from tinsmith.bases.tokenizer_files import tokenizer_files
from tinsmith.bases.vision_files import read_vision
from tinsmith.errors import ConfigError
from tinsmith.model.families import FAMILIES
from tinsmith.pictures import (
    GEMMA3,
    LLAMA4,
    QWEN3_VL,
    SHOWN,
    PictureSizeError,
    VisionInfo,
    canvas,
    placeholders,
    smart_resize,
)

IMAGE, X, Y, WHOLE = 7, 8, 9, 10
TILE_TOKENS = {"<|patch|>": IMAGE, "<|tile_x_separator|>": X, "<|tile_y_separator|>": Y, "<|image|>": WHOLE}


def sizes(count: int, most: int = 5000) -> list[tuple[int, int]]:
    """Widths and heights: the corners, near multiples of patches and tiles, and random ones up to 200:1."""
    rng = random.Random(7)
    named = [
        (1, 1),
        (1, 190),
        (200, 1),
        (31, 33),
        (336, 336),
        (337, 336),
        (672, 336),
        (1008, 672),
        (4999, 25),
        (32, 48),
    ]
    drawn = []
    while len(drawn) < count:
        width, height = (int(math.exp(rng.uniform(0, math.log(most)))) for _ in range(2))
        if max(width, height) <= 200 * min(width, height):
            drawn.append((width, height))
    return named + drawn


@pytest.mark.parametrize(("patch", "least", "most"), [(16, 65_536, 16_777_216), (14, 3136, 1_003_520), (4, 64, 4096)])
def test_qwen_counts_as_its_processor_does(patch: int, least: int, most: int) -> None:
    vision = VisionInfo(QWEN3_VL, IMAGE, patch_size=patch, merge_size=2, min_pixels=least, max_pixels=most)
    theirs = Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, size={"shortest_edge": least, "longest_edge": most}
    )
    for width, height in sizes(800):
        tokens = placeholders(vision, width, height)
        assert len(tokens) == theirs.get_number_of_image_patches(height, width) // 4, (width, height)
        assert tokens.dtype == np.int32
        assert set(tokens.tolist()) == {IMAGE}


def test_qwen_resizes_the_pixels_to_the_grid_that_was_counted() -> None:
    theirs = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096})
    vision = VisionInfo(QWEN3_VL, IMAGE, patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    for width, height in sizes(20, 300):
        pixels = np.zeros((height, width, 3), np.uint8)
        (_, rows, columns) = theirs(images=[pixels], return_tensors="pt", input_data_format="channels_last")[
            "image_grid_thw"
        ][0].tolist()
        assert smart_resize(vision, width, height) == (rows * 4, columns * 4)


def test_qwen_refuses_a_stripe() -> None:
    vision = VisionInfo(QWEN3_VL, IMAGE, patch_size=16, merge_size=2, min_pixels=65_536, max_pixels=16_777_216)
    with pytest.raises(PictureSizeError, match="more than 200 times"):
        placeholders(vision, 201, 1)


def test_gemma_has_one_number_for_all() -> None:
    vision = VisionInfo(GEMMA3, IMAGE, tokens_per_image=256, side=896)
    assert all(placeholders(vision, *size).tolist() == [IMAGE] * 256 for size in sizes(10))


@pytest.mark.parametrize(
    ("max_tiles", "side", "is_max"), [(16, 336, False), (16, 336, True), (5, 28, False), (1, 28, False)]
)
def test_llama_lays_out_tiles_and_separators_as_its_processor_does(max_tiles: int, side: int, is_max: bool) -> None:
    vision = VisionInfo(
        LLAMA4,
        IMAGE,
        patch_size=14,
        merge_size=2,
        side=side,
        max_tiles=max_tiles,
        is_max_canvas=is_max,
        x_separator=X,
        y_separator=Y,
        whole_token=WHOLE,
    )
    theirs = llama_functions()
    resolutions = torch.tensor(theirs.find_supported_resolutions(max_tiles, SizeDict(height=side, width=side)))
    tokens_of: dict[tuple[int, int], list[int]] = {}
    for width, height in sizes(500):
        best = theirs.get_best_fit((height, width), resolutions, resize_to_max_canvas=is_max)
        ratio = (int(best[0]) // side, int(best[1]) // side)
        assert canvas(vision, width, height) == ratio, (width, height)
        if ratio not in tokens_of:
            tokens_of[ratio] = layout(ratio, (side // 14) ** 2 // 4)
        assert placeholders(vision, width, height).tolist() == tokens_of[ratio]


def layout(ratio: tuple[int, int], patches: int) -> list[int]:
    text = Llama4Processor._prompt_split_image(SimpleNamespace(), ratio, patches)  # type: ignore[arg-type]
    names = text.removeprefix("<|image_start|>").removesuffix("<|image_end|>").replace("><", ">\n<").split("\n")
    return [TILE_TOKENS[name] for name in names]


@lru_cache(maxsize=1)
def llama_functions() -> Any:
    """The processor's functions of sizes; its module can't be imported without torchvision."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "models/llama4/image_processing_llama4.py").read_text())
    wanted = {"get_factors", "find_supported_resolutions", "get_best_fit"}
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    scope: dict[str, Any] = {"torch": torch, "lru_cache": lru_cache, "defaultdict": defaultdict, "SizeDict": SizeDict}
    exec(compile(tree, "llama4", "exec"), scope)
    return SimpleNamespace(**{name: scope[name] for name in wanted})


def directory(
    path: Path, *, added: dict[str, int], processor: dict[str, Any], name: str = "preprocessor_config.json"
) -> Path:
    path.mkdir(exist_ok=True)
    entries = [{"id": token, "content": text} for text, token in added.items()]
    (path / "tokenizer.json").write_text(json.dumps({"added_tokens": entries}))
    (path / name).write_text(json.dumps(processor))
    return path


QWEN_CONFIG = {
    "model_type": "qwen3_vl",
    "image_token_id": 5,
    "vision_config": {"patch_size": 16, "spatial_merge_size": 2},
}
QWEN_PROCESSOR = {"patch_size": 16, "merge_size": 2, "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}


@pytest.mark.parametrize("is_nested", [False, True])
def test_a_directory_says_how_qwen_sees(tmp_path: Path, is_nested: bool) -> None:
    path = directory(
        tmp_path,
        added={"<|image_pad|>": 5},
        processor={"image_processor": QWEN_PROCESSOR} if is_nested else QWEN_PROCESSOR,
        name="processor_config.json" if is_nested else "preprocessor_config.json",
    )
    vision = read_vision(path, QWEN_CONFIG)
    assert vision is not None
    assert (vision.image_token, vision.patch_size, vision.max_pixels) == (5, 16, 16_777_216)
    assert vision.chat_text == vision.expansion == "<|image_pad|>"


def test_a_directory_says_how_gemma_sees(tmp_path: Path) -> None:
    added = {"<start_of_image>": 3, "<end_of_image>": 4, "<image_soft_token>": 5}
    path = directory(tmp_path, added=added, processor={"size": {"height": 896, "width": 896}, "resample": 2})
    config = {
        "model_type": "gemma3",
        "mm_tokens_per_image": 16,
        "image_token_index": 5,
        "boi_token_index": 3,
        "eoi_token_index": 4,
        "vision_config": {"patch_size": 14},
    }
    vision = read_vision(path, config)
    assert vision is not None
    assert (vision.tokens_per_image, vision.side, vision.chat_text) == (16, 896, "<start_of_image>")
    assert vision.expansion == "\n\n<start_of_image><image_soft_token><end_of_image>\n\n"


def test_a_directory_says_how_llama_sees(tmp_path: Path) -> None:
    processor = {"size": {"height": 336, "width": 336}, "max_patches": 16}
    path = directory(tmp_path, added=TILE_TOKENS, processor=processor)
    config = {"model_type": "llama4", "image_token_index": IMAGE, "vision_config": {"patch_size": 14}}
    vision = read_vision(path, config)
    assert vision is not None
    assert (vision.x_separator, vision.y_separator, vision.whole_token) == (X, Y, WHOLE)
    assert len(placeholders(vision, 336, 336)) == 1 + 144


@pytest.mark.parametrize(
    "config", [{**QWEN_CONFIG, "model_type": "blip"}, {"model_type": "qwen3_vl"}, {"model_type": "qwen3"}]
)
def test_a_model_that_does_not_see_has_no_vision(tmp_path: Path, config: dict[str, Any]) -> None:
    assert read_vision(directory(tmp_path, added={}, processor=QWEN_PROCESSOR), config) is None


def test_a_model_without_its_processor_s_settings_has_no_vision(tmp_path: Path) -> None:
    assert read_vision(tmp_path, QWEN_CONFIG) is None


@pytest.mark.parametrize(
    "processor", [{**QWEN_PROCESSOR, "patch_size": 14}, {**QWEN_PROCESSOR, "do_resize": False}, []]
)
def test_settings_that_contradict_the_model_are_refused(tmp_path: Path, processor: Any) -> None:
    with pytest.raises(ConfigError, match="vision can't be understood"):
        read_vision(directory(tmp_path, added={"<|image_pad|>": 5}, processor=processor), QWEN_CONFIG)


def test_another_scale_of_pixels_is_refused_where_the_processor_is_ours(tmp_path: Path) -> None:
    processor = {"size": {"height": 336, "width": 336}, "rescale_factor": 0.5}
    config = {"model_type": "llama4", "image_token_index": IMAGE, "vision_config": {"patch_size": 14}}
    with pytest.raises(ConfigError, match="rescale_factor other than 1/255"):
        read_vision(directory(tmp_path, added=TILE_TOKENS, processor=processor), config)


def test_a_base_is_said_to_see_only_where_the_engine_can_show_it_pictures(tmp_path: Path) -> None:
    for kind, model_type in (("see", "qwen3_vl"), ("blind", "idefics")):
        path = tmp_path / kind
        shutil.copytree(SHIPPED_PATH, path)
        config = json.loads((path / "config.json").read_text())
        vision = {"image_token_index": 1010, "image_token_id": 1010, "vision_config": {"patch_size": 16}}
        (path / "config.json").write_text(json.dumps({**config, **vision, "model_type": model_type}))
        (path / "preprocessor_config.json").write_text(json.dumps(QWEN_PROCESSOR))
        assert (describe(BaseRef(kind, path)).vision is not None) == (kind == "see")
        assert "preprocessor_config.json" in {file.name for file in tokenizer_files(path)}


def test_the_kinds_that_are_shown_pictures_are_those_that_the_engine_knows() -> None:
    known = {kind for family in FAMILIES if family.vision is not None for kind in family.vision.model_types}
    assert known == set(SHOWN)
