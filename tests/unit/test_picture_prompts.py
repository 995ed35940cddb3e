"""A chat with pictures becomes the prompt that the model's own processor in `transformers` makes of it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

from tests.paint import jpeg, png
from tinsmith.api.texts.fields import FieldError, UnofferedError
from tinsmith.api.texts.models import Model
from tinsmith.api.texts.pictures import File
from tinsmith.api.texts.prompts import Chat, ChatPrompt, chat_prompt, count_tokens
from tinsmith.bases.catalog import SHIPPED_PATH
from tinsmith.bases.tokenizer import ChatTokenizer
from tinsmith.bases.vision_files import read_vision
from tinsmith.errors import UnsupportedError
from tinsmith.types import BaseInfo
from tinsmith.wire.images import Sight

BEGIN, END, SOFT = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<start_of_image>{% else %}{{ p.text | trim }}{% endif %}{% endfor %}{% endif %}\n"
    "{% endfor %}"
)
FILES = (File(png(40, 24), "png"), File(jpeg(30, 90), None))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped tokenizer with Gemma's tokens of pictures."""
    path = tmp_path_factory.mktemp("gemma")
    tokenizer = Tokenizer.from_file(str(SHIPPED_PATH / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (BEGIN, END, SOFT)])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    (path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 32, "width": 32}}))
    return path


def base_of(path: Path) -> tuple[ChatTokenizer, Model, Sight]:
    tokenizer = ChatTokenizer.from_dir(path)
    begin, end, soft = (tokenizer.encode(text)[0] for text in (BEGIN, END, SOFT))
    config = {
        "model_type": "gemma3",
        "mm_tokens_per_image": 16,
        "image_token_index": soft,
        "boi_token_index": begin,
        "eoi_token_index": end,
        "vision_config": {"patch_size": 4},
    }
    vision = read_vision(path, config)
    info = BaseInfo("gemma", str(path), "gemma3", 1027, 4096, (), vision=vision)
    return tokenizer, Model("gemma", info), Sight("gemma", vision)


def prompt_of(path: Path, *parts: Any, files: Any = FILES) -> ChatPrompt:
    tokenizer, model, sight = base_of(path)
    chat = Chat([{"role": "user", "content": list(parts)}], files=files)
    prompt = chat_prompt(tokenizer, model, chat, sight)
    assert count_tokens(tokenizer, model, chat, sight) == len(prompt.tokens)
    return prompt


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


IMAGE = {"type": "image"}


def test_gemma_s_prompt_is_that_of_its_processor(gemma: Path) -> None:
    parts = [text("Look:\n"), IMAGE, text("and here"), IMAGE, text("What differs?")]
    prompt = prompt_of(gemma, *parts)
    names = {"image_token": SOFT, "boi_token": BEGIN, "eoi_token": END}
    theirs = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(gemma / "tokenizer.json"), extra_special_tokens=names),
        image_seq_length=16,
    )
    rendered = ChatTokenizer.from_dir(gemma).render([{"role": "user", "content": parts}])
    images = [Image.open(io.BytesIO(file.data)).convert("RGB") for file in FILES]
    expected = theirs(text=rendered, images=[images], add_special_tokens=False)["input_ids"][0]
    assert prompt.tokens == list(expected)
    assert [picture.num_tokens for picture in prompt.pictures] == [16, 16]
    assert [picture.data for picture in prompt.pictures] == [file.data for file in FILES]


@pytest.mark.parametrize("injected", [BEGIN, SOFT, f"{BEGIN}{SOFT}{END}"])
def test_text_that_stands_for_a_picture_is_refused(gemma: Path, injected: str) -> None:
    with pytest.raises(FieldError, match="stands for a picture"):
        prompt_of(gemma, text(f"no {injected}"), IMAGE, files=FILES[:1])


def test_a_template_that_drops_pictures_is_refused(gemma: Path) -> None:
    with pytest.raises(UnofferedError, match="its template drops them"):
        prompt_of(gemma, IMAGE)


def test_a_tokenizer_without_tokens_of_pictures_is_refused(gemma: Path) -> None:
    tokenizer, model, _ = base_of(gemma)
    vision = read_vision(gemma, {"model_type": "gemma3", "image_token_index": 5, "vision_config": {}})
    chat = Chat([{"role": "user", "content": [IMAGE]}], files=FILES[:1])
    with pytest.raises(UnsupportedError, match="lacks the tokens of pictures"):
        chat_prompt(tokenizer, model, chat, Sight("gemma", vision))
