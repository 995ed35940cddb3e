"""Small random models with vision and a tokenizer, a chat template and a processor each, and what they make of two
pictures: `FILES`, in the sizes that `Viewer.shown` is of."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from transformers import (
    AutoImageProcessor,
    Gemma3ForConditionalGeneration,
    Llama4ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.llama4.processing_llama4 import Llama4Processor

from tests.families.configs import CONFIGS, PROCESSORS
from tests.paint import jpeg, png
from tests.seeing import END, IMAGE_TOKEN, START, TEMPLATE, seeing_base
from tinsmith.bases.catalog import SHIPPED_PATH

FILES = (png(48, 32, seed=1), jpeg(40, 70, seed=2))
ALIKE = {"num_hidden_layers": 2, "initializer_range": 0.1}
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
GEMMA_WORDS = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
LLAMA_WORDS = {
    "vision_start": "image_start", "vision_end": "image_end", "image_pad": "patch", "object_ref_start": "image",
    "object_ref_end": "tile_x_separator", "box_start": "tile_y_separator",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Viewer:
    """write: makes the directory. shown: what the model's own processor in `transformers` writes for each of `FILES`.
    edges: the tokens around what stands for a picture. image: the one that pixels take the place of. inputs: what the
    model is called with beside the tokens, given which of them are `image`, int64 [1, T], and the pictures."""

    model_class: Any
    write: Callable[[Path], None]
    shown: tuple[str, str]
    edges: tuple[str, str]
    image: str
    inputs: Callable[[Path, torch.Tensor, Sequence[Any]], dict[str, Any]]

    def expected(self, path: Path, tokens: list[int]) -> Any:
        """The log-probabilities of tokens 1.., each picture's placeholders among them, in float64."""
        model = self.model_class.from_pretrained(
            path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
        (image,) = tokens_of(path, self.image)
        tokens_1T = torch.tensor([tokens])
        pictures = [Image.open(io.BytesIO(file)).convert("RGB") for file in FILES]
        with torch.no_grad():
            own = self.inputs(path, (tokens_1T == image).long(), pictures)
            logits = model(input_ids=tokens_1T, **own).logits[0]
        return logits.log_softmax(-1)[:-1].gather(1, tokens_1T[0, 1:, None])[:, 0].numpy()


def tokens_of(path: Path, text: str) -> list[int]:
    return list(Tokenizer.from_file(str(path / "tokenizer.json")).encode(text, add_special_tokens=False).ids)


def write_qwen(path: Path) -> None:
    seeing_base(path)
    config = Qwen3VLConfig(
        text_config={
            **ALIKE, "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 2048, "eos_token_id": 1000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0], "initializer_range": 0.1,
        },
        image_token_id=IMAGE_TOKEN, video_token_id=1011, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    torch.manual_seed(5)
    Qwen3VLForConditionalGeneration(config).save_pretrained(path)


def write_gemma(path: Path) -> None:
    config = deepcopy(CONFIGS["gemma3_vl"][1])
    path.mkdir()
    tokenizer = Tokenizer.from_file(str(SHIPPED_PATH / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in GEMMA_WORDS])
    tokenizer.save(str(path / "tokenizer.json"))
    shutil.copyfile(SHIPPED_PATH / "tokenizer_config.json", path / "tokenizer_config.json")
    (path / "chat_template.jinja").write_text(TEMPLATE.replace(QWEN_PICTURE, "<start_of_image>"))
    config.text_config.vocab_size = tokenizer.get_vocab_size()
    config.boi_token_id, config.eoi_token_id, config.image_token_id = map(tokenizer.token_to_id, GEMMA_WORDS)
    torch.manual_seed(7)
    model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():  # zero as it is made: every picture would look alike
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.2)
    model.save_pretrained(path)
    PROCESSORS["gemma3_vl"].save_pretrained(path)


def write_llama(path: Path) -> None:
    """With Llama 4's words for pictures in the place of Qwen's."""
    config = deepcopy(CONFIGS["llama4_vl"][1])
    path.mkdir()
    config.text_config.vocab_size, config.image_token_index = 1024, IMAGE_TOKEN
    torch.manual_seed(7)
    Llama4ForConditionalGeneration(config).save_pretrained(path)
    PROCESSORS["llama4_vl"].save_pretrained(str(path))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (SHIPPED_PATH / name).read_text()
        for own, wanted in LLAMA_WORDS.items():
            text = text.replace(f"<|{own}|>", f"<|{wanted}|>")
        (path / name).write_text(text)
    (path / "chat_template.jinja").write_text(TEMPLATE.replace(QWEN_PICTURE, "<|image|>"))


def processed(path: Path, pictures: Sequence[Any]) -> dict[str, Any]:
    """By the image processor of the directory, as `transformers` opens it."""
    return dict(AutoImageProcessor.from_pretrained(path, backend="pil")(images=pictures, return_tensors="pt"))


_BEGIN, _END, _SOFT = GEMMA_WORDS
_TILES = Llama4Processor._prompt_split_image(None, (2, 2), 4)  # type: ignore[arg-type]
VIEWERS = {
    "qwen3_vl": Viewer(
        Qwen3VLForConditionalGeneration, write_qwen,
        shown=tuple(f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in (6, 8)),
        edges=("<|vision_start|>", "<|vision_end|>"), image="<|image_pad|>",
        inputs=lambda path, is_image, images: {"mm_token_type_ids": is_image, **processed(path, images)},
    ),
    "gemma3": Viewer(
        Gemma3ForConditionalGeneration, write_gemma, shown=(f"\n\n{_BEGIN}{_SOFT * 16}{_END}\n\n",) * 2,
        edges=(_BEGIN, _END), image=_SOFT,
        inputs=lambda path, is_image, images: {
            "token_type_ids": is_image, "pixel_values": processed(path, images)["pixel_values"],
        },
    ),
    "llama4": Viewer(
        Llama4ForConditionalGeneration, write_llama, shown=(_TILES, _TILES),
        edges=("<|image_start|>", "<|image_end|>"), image="<|patch|>",
        inputs=lambda path, is_image, images: PROCESSORS["llama4_vl"](images=images, return_tensors="pt"),
    ),
}  # fmt: skip
