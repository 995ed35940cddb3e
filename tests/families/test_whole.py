"""Directories of whole models with vision, of which the language model alone is served."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from tests.families.configs import (
    COMMON,
    IMAGE,
    MROPE,
    QWEN_EXPERTS,
    QWEN_MARKS,
    QWEN_NEXT,
    QWEN_TOWER,
    SCALED_YARN,
)
from tests.families.test_battery import data_of, write_adapter
from tests.families.test_import import imported, tar_of_directory
from tests.numerics.lab import item, make_trainer, run_pass, spec
from tinsmith.bases.catalog import BaseRef, describe, text_model_type, weight_shapes
from tinsmith.errors import UnsupportedError
from tinsmith.export.adapter import read_adapter
from tinsmith.export.merge import merge
from tinsmith.export.peft_files import BaseShapes, write_peft
from tinsmith.model import BaseModel, load_base
from tinsmith.types import RunId, RunState

TOWER = {name: value for name, value in QWEN_TOWER.items() if name != "deepstack_visual_indexes"}
QWEN: dict[str, Any] = {"vision_config": TOWER, **QWEN_MARKS}
MISTRAL: dict[str, Any] = {
    "vision_config": {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "head_dim": 16, "image_size": 32, "patch_size": 4,
    },
    "image_token_index": IMAGE,
}  # fmt: skip
TEXTS: Mapping[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
    "Qwen3.5": ("Qwen3_5", {**QWEN_NEXT, "rope_parameters": MROPE}, QWEN, 1e-5),
    "Qwen3.5-MoE": ("Qwen3_5Moe", {**QWEN_NEXT, **QWEN_EXPERTS, "rope_parameters": MROPE}, QWEN, 1e-4),
    "Mistral Small 3": (
        "Mistral3", {**COMMON, "model_type": "mistral", "head_dim": 24}, {**MISTRAL, "tie_word_embeddings": False},
        1e-5,
    ),
    "Ministral 3": (
        "Mistral3", {**COMMON, "model_type": "ministral3", "head_dim": 16, "rope_parameters": SCALED_YARN}, MISTRAL,
        1e-5,
    ),
}  # fmt: skip
PLAIN = {"dtype": torch.float64, "attn_implementation": "eager", "experts_implementation": "eager"}


@pytest.fixture(params=TEXTS)
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any, float]:
    """The directory, the class of the whole model, and how far numbers may differ."""
    stem, text, others, bound = TEXTS[request.param]
    made = getattr(transformers, f"{stem}Config")(text_config=text, **others)
    model_class = getattr(transformers, f"{stem}ForConditionalGeneration")
    torch.manual_seed(3)
    model = model_class(made)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.copy_(torch.linspace(0.02, 0.5, len(parameter)).log())
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    return tmp_path / "base", model_class, bound


@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys", "ignore::FutureWarning", "ignore:Model has `tie_word_embeddings"
)  # peft looks at modules alone
def test_what_is_exported_is_the_whole_models(whole: tuple[Path, Any, float], tmp_path: Path) -> None:
    path, model_class, bound = whole
    base = load_base(describe(BaseRef("base", path)), device=torch.device("cpu"), dtype=torch.float32)
    trainer = make_trainer(base, spec("a", 8), deterministic=False)
    (result,) = run_pass(trainer, [item("a", data_of(1), backward=False)])
    own, out = tmp_path / "own", tmp_path / "peft"
    own.mkdir()
    out.mkdir()
    write_adapter(base, trainer, own)

    merge(path, read_adapter(own), tmp_path / "merged")
    merged, report = model_class.from_pretrained(tmp_path / "merged", output_loading_info=True, **PLAIN)
    assert not report["missing_keys"] | report["unexpected_keys"]
    assert farthest(merged, result.logprobs) < bound

    assert imports_to(base, tar_of_directory(own), trainer.export_run(RunId("a")))
    shapes = BaseShapes(weight_shapes(path), text_model_type(path))
    if "moe" in base.info.arch:
        with pytest.raises(UnsupportedError, match="merge it with --format hf"):
            write_peft(read_adapter(own), out, shapes)
        return
    write_peft(read_adapter(own), out, shapes)
    plain = model_class.from_pretrained(path, **PLAIN)
    assert farthest(PeftModel.from_pretrained(plain, out).double().eval(), result.logprobs) < bound
    assert "language_model" not in json.loads((out / "adapter_config.json").read_text())["target_modules"]
    assert imports_to(base, tar_of_directory(out), trainer.export_run(RunId("a")))


def imports_to(base: BaseModel, sent: bytes, right: RunState) -> bool:
    """Whether what is sent comes back as the weights that were exported, to the bit."""
    found = imported(base, sent)
    return all(
        np.array_equal(found.tensors[name], tensor)
        for name, tensor in right.tensors.items()
        if name.startswith("param/")
    )


def farthest(model: Any, logprobs: Any) -> float:
    """The largest difference of log-probabilities."""
    most = 0.0
    for one, ours in zip(data_of(1), logprobs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(one.tokens.astype(np.int64))[None]).logits[0].log_softmax(-1)
        theirs = logits.gather(1, torch.from_numpy(one.inputs["target_tokens"])[:, None])[:, 0].numpy()
        most = max(most, float(np.abs(theirs - ours).max()))
    return most
