"""A base model that takes pictures, for the fake engine: the shipped one's files, said to be a Qwen3-VL's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tinsmith.bases.catalog import SHIPPED_PATH

NAME = "tests/seeing"
IMAGE_TOKEN = 1010  # <|image_pad|> of the shipped tokenizer
START, END = 1007, 1008  # <|vision_start|>, <|vision_end|>
TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}"
    "{%- for part in message.content %}{%- if part.type == 'image' %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 8,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 256, "longest_edge": 4096},
}  # a token for each 16 x 16 pixels, at most 16 of them


def seeing_base(path: Path) -> Path:
    """A directory that can be served with `--device fake`."""
    shutil.copytree(SHIPPED_PATH, path)
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": "qwen3_vl",
        "image_token_id": IMAGE_TOKEN,
        "vision_config": {"patch_size": 8, "spatial_merge_size": 2},
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path
