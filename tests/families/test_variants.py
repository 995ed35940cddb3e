"""Forms of families that are no row of the models' page, in the heart of its battery: logits, gradients, samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from tests.families import test_battery
from tests.families.configs import COMMON, CONFIGS, MOONLIGHT, THETA, VOCAB
from tests.families.test_battery import data_of, twin_of
from tests.families.test_import import imported, tar_of_directory
from tests.numerics.lab import grads, item, make_trainer, relative, run_pass, spec
from tests.numerics.sampling_lab import make_sampler, prompt, run_all, sample
from tinsmith.bases.catalog import BaseRef, describe
from tinsmith.model.inspect import find_linears

CLIP = 0.2  # reached by most of the projections
VARIANTS: dict[str, tuple[Any, Any]] = {
    "no_shared_experts": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(**{**MOONLIGHT, "n_shared_experts": 0}, rope_parameters=THETA, num_nextn_predict_layers=0),
    ),
    "olmoe_clipped": (OlmoeForCausalLM, OlmoeConfig(**COMMON, num_experts=8, num_experts_per_tok=3, clip_qkv=CLIP)),
}  # fmt: skip


@pytest.fixture(params=VARIANTS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(CONFIGS, request.param, VARIANTS[request.param])
    return request.param


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_variant_is_sampled_and_trained_as_in_transformers(kind, make_base, plain, within) -> None:
    base = make_base(kind)
    tokens = prompt(5, 60, VOCAB)
    request = sample("r", tokens, prompt_logprobs=True, max_tokens=1)
    result = run_all(make_sampler(base), [request])["r"]
    with torch.no_grad():
        expected = plain(base)(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].log_softmax(-1)
    within("logprobs of the base", result.prompt_logprobs[1:], expected.numpy()[np.arange(59), tokens[1:]])

    trainer = make_trainer(base, spec("a", 8), deterministic=False)
    (ours,) = run_pass(trainer, [item("a", data_of(1))])
    twin = twin_of(base, trainer.export_run(spec("a").run_id))
    _, logprobs = twin.backward(data_of(1))
    for one, other in zip(ours.logprobs, logprobs, strict=True):
        within("logprobs with adapters", one, other.numpy())
    found = grads(trainer, "a")
    for name, parameter in twin.params.items():
        within("gradients, relative", relative(found[f"grad/{name}"], parameter.grad), 0.0)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_head_that_is_called_embed_out_is_exported(is_tied, make_base, tmp_path, monkeypatch, within) -> None:
    """GPT-NeoX's, whose embedding is `embed_in`: merged, as an adapter for peft, and back again."""
    kind, config = f"gpt_neox_{is_tied}", GPTNeoXConfig(**{**COMMON, "tie_word_embeddings": is_tied})
    monkeypatch.setitem(CONFIGS, kind, (GPTNeoXForCausalLM, config))
    base = make_base(kind)
    assert describe(BaseRef("x", Path(base.info.path))).is_head_tied is is_tied
    (tmp_path / "merged").mkdir()
    (tmp_path / "peft").mkdir()
    test_battery.test_the_merged_model_is_the_same_in_transformers(kind, make_base, tmp_path / "merged", within)
    test_battery.test_the_exported_adapter_is_the_same_in_peft(kind, make_base, tmp_path / "peft", within)
    with safe_open(tmp_path / "merged" / "merged" / "model.safetensors", "pt") as merged:
        assert [name for name in merged.keys() if "embed_out" in name] == ["embed_out.weight"]  # noqa: SIM118
    state = make_trainer(base, spec("a", 8), deterministic=False).export_run(spec("a").run_id)
    again = imported(base, tar_of_directory(tmp_path / "peft" / "peft"))
    assert again.tensors.keys() == {name for name in state.tensors if name.startswith("param/")}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_a_number_carry_no_adapters() -> None:
    model_class, config = VARIANTS["no_shared_experts"]
    model = model_class(config)
    experts = [module for name, module in model.named_modules() if name.endswith((".experts", ".gate"))]
    assert not [name for name in find_linears(model, model.lm_head, experts) if "shared_experts" in name]
