"""Adapters that come back or come from elsewhere: ours to the bit in every family, `peft`'s with `peft`'s numbers."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.families.configs import CONFIGS
from tests.numerics.lab import assert_same_bits, datum, item, make_trainer, run_pass, spec
from tests.numerics.sampling_lab import make_sampler, run_all, sample
from tinsmith.bases.catalog import BaseRef, describe, text_model_type, weight_shapes
from tinsmith.bases.layer_table import Layer
from tinsmith.errors import UserError
from tinsmith.export.adapter import read_adapter
from tinsmith.export.peft_files import BaseShapes, write_peft
from tinsmith.files.adapter_files import adapter_files
from tinsmith.files.checkpoint_file import dump_state, load_state, read_state_header
from tinsmith.importing.look import look
from tinsmith.lora_options import PLAIN, LoraOptions
from tinsmith.model import BaseModel
from tinsmith.torch_engine import layers_of
from tinsmith.types import RunId, RunState, Targets

BOUND = 1e-5
NAMES = ("adapter_config.json", "adapter_model.safetensors")


def tar_of(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def tar_of_directory(directory: Path) -> bytes:
    return tar_of({path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()})


def imported(base: BaseModel, sent: bytes, layers: list[Layer] | None = None) -> RunState:
    """What becomes of what was sent, as a run "a"."""
    if not Path(base.info.path, "tokenizer.json").is_file():
        Path(base.info.path, "tokenizer.json").write_text("{}")
    info = describe(BaseRef(base.info.name, Path(base.info.path)))
    found = look(io.BytesIO(sent), len(sent), layers or layers_of(base), info, dict)
    made = replace(found.spec, run_id=RunId("a"), base_model="base")
    data = b"".join(found.pieces(made))
    assert len(data) - found.num_bytes == read_state_header(io.BytesIO(data)).tensors[0].offset
    return load_state(data)


def exported(base: BaseModel, state: RunState) -> bytes:
    if not Path(base.info.path, "tokenizer.json").is_file():
        Path(base.info.path, "tokenizer.json").write_text("{}")
    info = describe(BaseRef(base.info.name, Path(base.info.path)))
    source = io.BytesIO(dump_state(state))
    files = adapter_files(read_state_header(source), info)
    return tar_of({name: b"".join(file.read(source)) for name, file in files.items()})


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_exported_comes_back_to_the_bit(kind: str, make_base) -> None:
    """Fused and tied layers, heads and experts among them; in the order in which a row lies, so in one piece."""
    base = make_base(kind)
    state = make_trainer(base, spec("a", 4), deterministic=False).export_run(RunId("a"), ("param",))
    found = imported(base, exported(base, state))
    assert_same_bits(state.tensors, found.tensors)
    assert list(found.tensors) == list(state.tensors)
    assert (found.spec.rank, found.spec.alpha, found.spec.targets) == (4, 32.0, Targets())


@pytest.mark.parametrize("kind", ["qwen3", "phi3", "qwen3_moe"])
def test_a_whole_state_comes_back_to_the_bit(kind: str, make_base) -> None:
    base = make_base(kind)
    run = spec("a", 4, Targets(attn=True, mlp=True, unembed=False), seed=5)
    state = make_trainer(base, run, deterministic=False).export_run(RunId("a"), ("param",))
    moments = {
        f"{part}{name.removeprefix('param')}": t + n for n, part in enumerate("mv") for name, t in state.tensors.items()
    }
    whole = RunState(run, 7, {**state.tensors, **moments})
    for sent in (dump_state(whole), tar_of({"run_state.safetensors": dump_state(whole)})):
        found = imported(base, sent)
        assert found.step == 7
        assert found.spec == run
        assert_same_bits(whole.tensors, found.tensors)


def peft_of(base: BaseModel, directory: Path, **config: Any) -> torch.nn.Module:
    """A peft model with a random adapter, saved by `save_pretrained`."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(
        base.info.path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        model.save_pretrained(directory)
    return model.double().eval()


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LAST = r".*layers\.1\.self_attn\.o_proj"
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "attention and MLP": ("llama", {"r": 6, "lora_alpha": 9, "target_modules": [*ATTENTION, *MLP]}),
    "two layers of four": ("qwen3", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    "a regular expression": ("mistral", {"r": 4, "target_modules": r".*layers\.1\..*(up|down)_proj"}),
    "all linear": ("olmo2", {"r": 4, "target_modules": "all-linear"}),
    "fused": ("phi3", {"r": 4, "target_modules": ["qkv_proj", "gate_up_proj"]}),
    "rsLoRA": ("llama", {"r": 9, "lora_alpha": 6, "use_rslora": True, "target_modules": ATTENTION}),
    "ranks and alphas by pattern": (
        "llama",
        {
            "r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "rank_pattern": {"q_proj": 2, LAST: 7},
            "alpha_pattern": {"q_proj": 4, LAST: 14},
        },
    ),
    "a head of its own": ("llama", {"r": 4, "target_modules": ["q_proj", "lm_head"]}),
    "a tied head": ("qwen2", {"r": 4, "target_modules": ["q_proj", "lm_head"]}),
    "experts in whole": (
        "gpt_oss", {"r": 3, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "experts side by side": (
        "qwen3_moe", {"r": 3, "target_parameters": EXPERTS, "target_modules": ["o_proj"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PEFT)
def test_an_adapter_of_peft_gives_pefts_numbers(case: str, make_base, tmp_path: Path) -> None:
    """In training and when sampled from."""
    kind, config = PEFT[case]
    base = make_base(kind, shares_factors=False)
    twin = peft_of(base, tmp_path, **config)
    state = imported(base, tar_of_directory(tmp_path))
    trainer = make_trainer(base, deterministic=False)
    trainer.import_run(state.spec, state)
    one = datum(np.random.default_rng(1), 40)
    (result,) = run_pass(trainer, [item("a", [one], backward=False)])
    with torch.no_grad():
        logprobs = twin(input_ids=torch.from_numpy(one.tokens.astype(np.int64))[None]).logits[0].log_softmax(-1)
    theirs = logprobs.gather(1, torch.from_numpy(one.inputs["target_tokens"])[:, None])[:, 0].numpy()
    np.testing.assert_allclose(result.logprobs[0], theirs, rtol=0, atol=BOUND)
    request = sample("r", one.tokens, "a", max_tokens=1, prompt_logprobs=True)
    (sampled,) = run_all(make_sampler(base, {"a": state}, deterministic=False), [request]).values()
    own = logprobs[:-1].gather(1, torch.from_numpy(one.tokens[1:].astype(np.int64))[:, None])[:, 0].numpy()
    np.testing.assert_allclose(sampled.prompt_logprobs[1:], own, rtol=0, atol=BOUND)


def test_what_an_adapter_leaves_out_never_learns(make_base, tmp_path: Path) -> None:
    """Layers without an adapter, and the rows by which one of a lower rank was filled up."""
    base = make_base("llama")
    peft_of(
        base,
        tmp_path,
        r=2,
        lora_alpha=2,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 4},
        alpha_pattern={"q_proj": 4},
    )
    state = imported(base, tar_of_directory(tmp_path))
    trainer = make_trainer(base, deterministic=False)
    trainer.import_run(state.spec, state)
    run_pass(trainer, [item("a", [datum(np.random.default_rng(1), 40)])])
    found = trainer.export_run(RunId("a"), ("grad",)).tensors
    alive = {name.rpartition(".")[0].rpartition(".")[2] for name, t in found.items() if t.any()}
    assert alive == {"q_proj", "v_proj"}
    v = "grad/model.layers.0.self_attn.v_proj"
    assert found[f"{v}.lora_A"][:2].any()
    assert not found[f"{v}.lora_A"][2:].any()
    assert not found[f"{v}.lora_B"][:, 2:].any()


def test_experts_factors_that_differ_need_a_server_that_has_them(make_base, tmp_path: Path) -> None:
    base = make_base("qwen3_moe")
    peft_of(
        base,
        tmp_path,
        r=3,
        target_parameters=EXPERTS,
        target_modules=["o_proj"],
    )
    with pytest.raises(UserError, match="--expert-adapters own"):
        imported(base, tar_of_directory(tmp_path))


def test_an_expert_under_two_names_is_refused(make_base) -> None:
    """As Mixtral and as others call them; one of both would be lost."""
    base = make_base("minimax_m2")
    (place,) = {
        layer.name.rpartition(".")[0] for layer in layers_of(base) if layer.name.startswith("model.layers.0.mlp")
    }
    a, b = np.ones((2, 64), np.float32), np.ones((96, 2), np.float32)
    tensors = {
        f"base_model.model.{place}.{number}.{name}.lora_{half}.weight": factor
        for number in range(8)
        for name in ("gate_proj", "w1")
        for half, factor in (("A", a), ("B", b))
    }
    config = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}).encode()
    sent = tar_of({"adapter_config.json": config, "adapter_model.safetensors": save(tensors)})
    with pytest.raises(UserError, match="twice, under two names"):
        imported(base, sent)


def test_layers_of_one_name_that_are_scaled_differently_are_refused(make_base, tmp_path: Path) -> None:
    base = make_base("llama")
    peft_of(base, tmp_path, r=2, lora_alpha=2, target_modules=["o_proj"], alpha_pattern={LAST: 3})
    with pytest.raises(UserError, match="have one scale"):
        imported(base, tar_of_directory(tmp_path))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "glm4_moe", "gpt_oss", "llama4", "qwen2_moe"])
@pytest.mark.parametrize("shares_factors", [True, False])
def test_what_is_written_for_serving_engines_comes_back_to_the_bit(
    kind: str, shares_factors: bool, make_base, tmp_path: Path
) -> None:
    """Experts one by one under the base's own names, or in one parameter, with shared factors repeated for each."""
    base = make_base(kind, shares_factors=shares_factors)
    state = make_trainer(base, spec("a", 4), deterministic=False).export_run(RunId("a"), ("param",))
    own, out = tmp_path / "own", tmp_path / "out"
    own.mkdir()
    out.mkdir()
    with tarfile.open(fileobj=io.BytesIO(exported(base, state))) as tar:
        tar.extractall(own, filter="data")
    path = Path(base.info.path)
    write_peft(read_adapter(own), out, BaseShapes(weight_shapes(path), text_model_type(path)))
    found = imported(base, tar_of_directory(out))
    assert_same_bits(state.tensors, found.tensors)
    assert (found.spec.rank, found.spec.alpha, found.spec.options) == (4, 32.0, PLAIN)
    names = load_file(out / "adapter_model.safetensors")
    own_names = {"mixtral": "block_sparse_moe.experts.5.w1", "gpt_oss": "mlp.experts.base_layer"}
    own_names["llama4"] = "feed_forward.experts.base_layer"
    one = own_names.get(kind, "mlp.experts.7.gate_proj")
    layer = 0 if kind == "qwen2_moe" else 1  # the other one is dense
    assert f"base_model.model.model.layers.{layer}.{one}.lora_A.weight" in names


@pytest.mark.parametrize(
    "options",
    [
        LoraOptions(True),
        LoraOptions(ranks=(("mlp", 3), ("q_proj", 7)), alphas=(("o_proj", 5.0),)),
        LoraOptions(True, (("k_proj", 2),)),
    ],
)
def test_ranks_and_scales_of_layers_come_back(options: LoraOptions, make_base) -> None:
    base = make_base("llama")
    run = replace(spec("a", 4), options=options, alpha=11.0)
    state = make_trainer(base, run, deterministic=False).export_run(RunId("a"), ("param",))
    found = imported(base, exported(base, state))
    assert_same_bits(state.tensors, found.tensors)
    assert found.spec.options.use_rslora == options.use_rslora
    for layer in layers_of(base):
        where = layer.group, layer.layer, 4
        assert found.spec.options.rank_of(*where) == options.rank_of(*where)
        assert found.spec.options.scale_of(*where, found.spec.alpha) == options.scale_of(*where, 11.0)
    whole = imported(base, dump_state(state))
    assert whole.spec.options == options
    assert_same_bits(state.tensors, whole.tensors)
