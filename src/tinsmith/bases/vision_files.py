"""What a model's directory says of its vision: config.json beside the processor's own files. Loads no weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tinsmith.errors import ConfigError
from tinsmith.pictures import GEMMA3, LLAMA4, QWEN3_VL, QWEN3_VL_MOE, VisionInfo

Config = Mapping[str, Any]
BILINEAR, BICUBIC = 2, 3  # Pillow's numbers
RESCALE = 1 / 255
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = IMAGENET_STD = HALVES = (0.5, 0.5, 0.5)  # the standard ones of `transformers`
BEGIN, END, WHOLE = "<|image_start|>", "<|image_end|>", "<|image|>"  # Llama 4's
X_SEPARATOR, Y_SEPARATOR = "<|tile_x_separator|>", "<|tile_y_separator|>"


def read_vision(path: Path, config: Config) -> VisionInfo | None:
    """How the model of a directory takes pictures. None: it has no vision, or one of a kind that isn't known, or the
    settings of its image processor aren't beside it, or its tokenizer lacks the tokens.

    What the processor's file leaves out has the default of its class in `transformers`.

    Raises:
        ConfigError: the files contradict each other, or a number is none.
    """
    reader = READERS.get(str(config.get("model_type")))
    if reader is None or not isinstance(config.get("vision_config"), dict):
        return None
    try:
        processor = _processor(path)
        return None if processor is None else reader(config, processor, _added_tokens(path))
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise ConfigError(
            f"{path}: its vision can't be understood from config.json and preprocessor_config.json: {error!r}"
        ) from None


def _qwen(config: Config, processor: Config, added: Mapping[int, str]) -> VisionInfo:
    size, tower = processor.get("size") or {}, config["vision_config"]
    patch, merge = int(processor.get("patch_size", 14)), int(processor.get("merge_size", 2))
    if (patch, merge) != (tower.get("patch_size", 16), tower.get("spatial_merge_size", 2)):
        raise ValueError("patch_size and merge_size of the processor are not the tower's")
    image_token = int(config.get("image_token_id", 151_655))
    text = added.get(image_token, "")
    return VisionInfo(
        kind=config["model_type"],
        image_token=image_token,
        chat_text=text,
        expansion=text,
        patch_size=patch,
        merge_size=merge,
        temporal_patch_size=int(processor.get("temporal_patch_size", 2)),
        min_pixels=int(processor.get("min_pixels") or size.get("shortest_edge") or 56 * 56),
        max_pixels=int(processor.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280),
        **_normalisation(processor, CLIP_MEAN, CLIP_STD, BICUBIC),
    )


def _gemma(config: Config, processor: Config, added: Mapping[int, str]) -> VisionInfo:
    if processor.get("do_pan_and_scan"):
        raise ValueError("do_pan_and_scan is not supported: switch it off in preprocessor_config.json")
    image_token = int(config.get("image_token_index", 262_144))
    begin = added.get(int(config.get("boi_token_index", 255_999)), "")
    end = added.get(int(config.get("eoi_token_index", 256_000)), "")
    image = added.get(image_token, "")
    is_known = bool(begin and end and image)
    return VisionInfo(
        kind=GEMMA3,
        image_token=image_token,
        chat_text=begin if is_known else "",
        expansion=f"\n\n{begin}{image}{end}\n\n" if is_known else "",
        patch_size=int(config["vision_config"].get("patch_size", 16)),
        tokens_per_image=int(config.get("mm_tokens_per_image", 256)),
        side=_side(processor, 224),
        **_normalisation(processor, IMAGENET_MEAN, IMAGENET_STD, BILINEAR),
    )


def _llama(config: Config, processor: Config, added: Mapping[int, str]) -> VisionInfo | None:
    ids = {text: token for token, text in added.items()}
    image_token = int(config.get("image_token_index", 200_092))
    if not {X_SEPARATOR, Y_SEPARATOR, WHOLE} <= ids.keys():
        return None
    if abs(float(processor.get("rescale_factor") or RESCALE) - RESCALE) > 1e-9:
        raise ValueError("a rescale_factor other than 1/255 is not supported")
    tower = config["vision_config"]
    image = added.get(image_token, "")
    return VisionInfo(
        kind=LLAMA4,
        image_token=image_token,
        chat_text=WHOLE if image else "",
        expansion=f"{BEGIN}{image}{END}" if image else "",
        patch_size=int(tower.get("patch_size", 14)),
        merge_size=round(1 / float(tower.get("pixel_shuffle_ratio", 0.5))),
        side=_side(processor, 336),
        max_tiles=int(processor.get("max_patches", 16)),
        is_max_canvas=bool(processor.get("resize_to_max_canvas", False)),
        x_separator=ids[X_SEPARATOR],
        y_separator=ids[Y_SEPARATOR],
        whole_token=ids[WHOLE],
        **_normalisation(processor, HALVES, HALVES, BILINEAR),
    )


READERS: Mapping[str, Callable[[Config, Config, Mapping[int, str]], VisionInfo | None]] = {
    QWEN3_VL: _qwen,
    QWEN3_VL_MOE: _qwen,
    GEMMA3: _gemma,
    LLAMA4: _llama,
}


def _processor(path: Path) -> Config | None:
    """The image processor's settings: within processor_config.json, as newer versions write it, else alone."""
    whole = path / "processor_config.json"
    if whole.is_file():
        inner = json.loads(whole.read_bytes()).get("image_processor")
        if isinstance(inner, dict):
            return inner
    alone = path / "preprocessor_config.json"
    return dict(json.loads(alone.read_bytes())) if alone.is_file() else None


def _added_tokens(path: Path) -> dict[int, str]:
    """Tokens that the tokenizer never splits, by id."""
    file = path / "tokenizer.json"
    entries = json.loads(file.read_bytes()).get("added_tokens") or [] if file.is_file() else []
    return {int(entry["id"]): str(entry["content"]) for entry in entries}


def _side(processor: Config, default: int) -> int:
    size = processor.get("size") or {"height": default, "width": default}
    if size["height"] != size["width"]:
        raise ValueError("the processor's size must be square")
    return int(size["height"])


def _normalisation(processor: Config, mean: tuple[float, ...], std: tuple[float, ...], resample: int) -> dict[str, Any]:
    """Raises: ValueError: the processor leaves out a step that the others' pixels go through."""
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if processor.get(step) is False:
            raise ValueError(f"{step}: false is not supported")
    return {
        "mean": tuple(float(value) for value in processor.get("image_mean") or mean),
        "std": tuple(float(value) for value in processor.get("image_std") or std),
        "resample": int(processor.get("resample") or resample),
    }
