"""What `tinker_cookbook.weights` makes of exported adapters of mixtures: the model that was trained.

Of models with vision it reads the language model. Qwen3-VL's tower is beyond it, since it puts `language_model` after
every `model.` of a name, and Gemma 3, whose tensors it looks for under other names than they are stored by.

Mixtral isn't among them: cookbook 0.6.1 turns w1, w2 and w3 into gate_proj, down_proj and up_proj whatever the base
calls them, and in Mixtral's files they are w1, w2 and w3. No name of ours changes that; `tinsmith export` merges it.

The cookbook runs in its own environment, which `make cookbook` makes; without TINSMITH_TEST_COOKBOOK what asks it is
skipped.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.cookbook import environment
from tests.families.configs import CONFIGS
from tests.numerics.lab import datum, item, make_trainer, reader_of, run_pass, spec
from tinsmith.bases.catalog import BaseRef, describe
from tinsmith.export.adapter import read_adapter
from tinsmith.files.adapter_files import adapter_files
from tinsmith.files.checkpoint_file import dump_state, read_state_header
from tinsmith.model import BaseModel
from tinsmith.training import Trainer
from tinsmith.types import RunId, Targets

BOUND = 1e-5
RUN = spec("a", 4)
HEADLESS = spec("a", 4, Targets(unembed=False))  # the cookbook changes the embedding along with a tied head
TOWER = spec("a", 4, Targets(vision=True))


Ask = Callable[..., subprocess.CompletedProcess[str]]
CLIENT = environment.ROOT / "scripts" / "cookbook" / "client" / "archive.py"


@pytest.fixture(scope="session")
def cookbook() -> Ask:
    """Calls a function of `tinker_cookbook.weights` by name."""
    if "TINSMITH_TEST_COOKBOOK" not in os.environ:
        pytest.skip("`make cookbook` runs it: an environment of 1.7 GB")
    python = environment.python()

    def ask(function: str, **arguments: object) -> subprocess.CompletedProcess[str]:
        """All arguments are strings or paths."""
        given = json.dumps({name: str(value) for name, value in arguments.items()})
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [python, CLIENT, function, given], capture_output=True, text=True, check=False,
            env={**ours, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    return ask


def export(trainer: Trainer, base: BaseModel, directory: Path) -> None:
    Path(base.info.path, "tokenizer.json").write_text("{}")
    info = describe(BaseRef(base.info.name, Path(base.info.path)))
    source = io.BytesIO(dump_state(trainer.export_run(RunId("a"))))
    directory.mkdir()
    for name, file in adapter_files(read_state_header(source), info).items():
        (directory / name).write_bytes(b"".join(file.read(source)))


def test_names_and_shapes_are_those_of_shared_outer_experts(make_base, tmp_path: Path) -> None:
    base = make_base("qwen3_moe")
    export(make_trainer(base, RUN), base, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    path = "base_model.model.model.layers.1.mlp.experts"
    shapes = {name.removeprefix(path + "."): tuple(t.shape) for name, t in tensors.items() if name.startswith(path)}
    assert shapes == {
        "w1.lora_A.weight": (1, 4, 64), "w1.lora_B.weight": (8, 48, 4),
        "w2.lora_A.weight": (8, 4, 48), "w2.lora_B.weight": (1, 64, 4),
        "w3.lora_A.weight": (1, 4, 64), "w3.lora_B.weight": (8, 48, 4),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_vl_moe"])
def test_layers_of_a_model_with_vision_are_named_as_without(kind: str, make_base, tmp_path: Path) -> None:
    """What the archive leaves out is told in it, so that it is read back whole."""
    base = make_base(kind)
    export(make_trainer(base, TOWER), base, tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    of_language = {name for name in names if ".layers." in name}
    assert of_language
    assert all(name.startswith("base_model.model.model.layers.") for name in of_language)
    assert all("visual." in name or "unembed" in name or "lm_head" in name for name in names.keys() - of_language)
    trained = {linear.name for linear in base.linears if linear.is_targeted(TOWER.targets)}
    assert set(read_adapter(tmp_path / "adapter").names) == trained


@pytest.mark.parametrize(
    "kind", ["qwen3_moe", "glm4_moe", "gpt_oss", "deepseek_v3", "qwen3_vl", "qwen3_vl_moe", "llama4_vl"]
)
def test_the_cookbook_merges_what_was_trained(kind: str, cookbook: Ask, make_base, tmp_path: Path) -> None:
    base = make_base(kind)
    trainer = make_trainer(base, HEADLESS if CONFIGS[kind][1].tie_word_embeddings else RUN)
    data = [datum(np.random.default_rng(3), length) for length in (9, 50)]
    (result,) = run_pass(trainer, [item("a", data, backward=False)])
    export(trainer, base, tmp_path / "adapter")
    done = cookbook(
        "build_hf_model", base_model=base.info.path, adapter_path=tmp_path / "adapter", output_path=tmp_path / "merged",
        dtype="float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = reader_of(base).from_pretrained(
        tmp_path / "merged", dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    for one, ours in zip(data, result.logprobs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(one.tokens.astype(np.int64))[None]).logits[0].log_softmax(-1)
        theirs = logits.gather(1, torch.from_numpy(one.inputs["target_tokens"])[:, None])[:, 0]
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=BOUND)


def test_the_cookbook_converts_it_for_serving_engines(cookbook: Ask, make_base, tmp_path: Path) -> None:
    base = make_base("qwen3_moe")
    export(make_trainer(base, RUN), base, tmp_path / "adapter")
    done = cookbook(
        "build_lora_adapter",
        base_model=base.info.path,
        adapter_path=tmp_path / "adapter",
        output_path=tmp_path / "peft",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()


def test_adapters_of_qwen_s_tower_are_refused_by_name(cookbook: Ask, make_base, tmp_path: Path) -> None:
    """When this fails, the docs can send such runs to the cookbook too."""
    base = make_base("qwen3_vl")
    export(make_trainer(base, TOWER), base, tmp_path / "ours")
    done = cookbook(
        "build_hf_model", base_model=base.info.path, adapter_path=tmp_path / "ours", output_path=tmp_path / "merged"
    )
    assert done.returncode == 1
    assert re.search(r"visual\.blocks.*does not exist", done.stderr), done.stderr


def test_mixtral_is_beyond_the_cookbook_under_either_name(cookbook: Ask, make_base, tmp_path: Path) -> None:
    """When this fails, Mixtral belongs to the tests above."""
    base = make_base("mixtral")
    export(make_trainer(base, RUN), base, tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    (tmp_path / "theirs").mkdir()
    named = {name.replace(".mlp.experts.", ".block_sparse_moe.experts."): tensor for name, tensor in tensors.items()}
    save_file(named, tmp_path / "theirs" / "adapter_model.safetensors")
    shutil.copyfile(tmp_path / "ours" / "adapter_config.json", tmp_path / "theirs" / "adapter_config.json")
    for directory in ("ours", "theirs"):
        done = cookbook(
            "build_hf_model", base_model=base.info.path, adapter_path=tmp_path / directory,
            output_path=tmp_path / "merged", dtype="float32",
        )  # fmt: skip
        assert done.returncode == 1
        assert re.search(r"gate_proj\.weight.*does not exist", done.stderr), done.stderr
