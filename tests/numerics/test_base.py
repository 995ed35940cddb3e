"""What a base must be to be served, and that hooks which an upgrade goes around are noticed at start."""

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.numerics.lab import (
    COMMON,
    CONFIGS,
    CPU,
    datum,
    grads,
    item,
    make_base,
    make_trainer,
    relative,
    run_pass,
    spec,
)
from tinsmith.bases.catalog import BaseRef, describe
from tinsmith.errors import TinsmithError, UnsupportedError
from tinsmith.lora_options import LoraOptions
from tinsmith.model import RowLayout, load_base
from tinsmith.model import base as base_module
from tinsmith.model.activation import StableSiLU
from tinsmith.model.blocks import GatedMLP, RotaryAttention
from tinsmith.model.families import Family
from tinsmith.training.packing import bucketed, length_class, num_fitting, pieces
from tinsmith.types import BaseInfo, RunId, RunSpec, Targets

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, **COMMON}


def load(model, path):
    model.save_pretrained(path)
    return load_base(BaseInfo("x", str(path), "x", 211, 512, ()), device=CPU, dtype=torch.float32)


def test_linears_are_named_and_grouped(base):
    groups = {info.name: info.group for info in base.linears}
    assert groups["model.layers.0.self_attn.q_proj"] == "attn"
    assert groups["model.layers.1.mlp.down_proj"] == "mlp"
    assert groups["lm_head"] == "unembed"
    assert len(groups) == 2 * 7 + 1
    assert base.head.out_features == 211
    assert sum(isinstance(module, GatedMLP) for module in base.backbone.modules()) == 2
    assert sum(isinstance(module, RotaryAttention) for module in base.backbone.modules()) == 2


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_the_api_knows_the_size_of_an_adapter_as_the_engine_lays_it_out(kind, tmp_path):
    """From the headers of the weights' files alone; quotas are reckoned with it."""
    linears = make_base(kind, tmp_path).linears
    info = describe(BaseRef("x", tmp_path))
    for targets in (Targets(), Targets(mlp=False, unembed=False), Targets(attn=False), Targets(attn=False, mlp=False)):
        asked = RunSpec(RunId("r"), "x", rank=3, targets=targets)
        assert info.adapter_bytes(asked) == 4 * RowLayout(linears, targets, 3).num_params
    mixed = LoraOptions(ranks=(("attn", 5), ("k_proj", 1), ("lm_head", 7), ("up_proj", 9)))
    asked = RunSpec(RunId("r"), "x", rank=3, options=mixed)
    layout = RowLayout.of(linears, asked)
    assert info.adapter_bytes(asked) == 4 * layout.num_own < 4 * layout.num_params


def test_experts_of_an_unknown_family_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(base_module, "family_of", lambda config: Family("of no file", ()))
    config = Qwen3MoeConfig(**SMALL, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16)
    with pytest.raises(UnsupportedError, match=r"mlp\.experts\.gate_up_proj"):
        load(Qwen3MoeForCausalLM(config), tmp_path)


def test_other_linear_modules_are_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedError, match=r"attn\.c_attn"):
        load(GPT2LMHeadModel(GPT2Config(vocab_size=211, n_embd=64, n_layer=1, n_head=2)), tmp_path)


def test_attention_that_sees_something_else_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(base_module, "family_of", lambda config: Family("of no file", ()))
    monkeypatch.setattr(base_module, "KNOWN_EXTRAS", set())
    with pytest.raises(UnsupportedError, match="sliding_window"):
        load(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=64)), tmp_path)


def test_windows_that_masks_alone_make_are_refused_by_name(tmp_path):
    """Longer than the tokens of the check at the start, which sees no difference."""
    config = Qwen2MoeConfig(
        **SMALL, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=32,
        use_sliding_window=True, sliding_window=64, max_window_layers=1,
    )  # fmt: skip
    assert config.layer_types[0] == "sliding_attention"
    with pytest.raises(UnsupportedError, match=r"sliding windows .* masks alone.*layer 0 is sliding_attention of 64"):
        load(Qwen2MoeForCausalLM(config), tmp_path)


def test_a_directory_without_all_weights_is_refused(tmp_path):
    model_class, config = CONFIGS["llama"]
    model = model_class(config)
    state = {k: v for k, v in model.state_dict().items() if "q_proj" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(TinsmithError, match="lacks weights"):
        load_base(BaseInfo("x", str(tmp_path), "x", 211, 512, ()), device=CPU, dtype=torch.float32)


def test_a_layer_that_goes_around_its_hook_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x))))
    with pytest.raises(UnsupportedError, match="up_proj"):
        make_base("llama", tmp_path)


def test_attention_that_goes_around_its_hook_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(base_module, "family_of", lambda config: Family("of no file", ()))
    monkeypatch.setattr(LlamaModel, "set_attn_implementation", lambda self, name: None)
    with pytest.raises(UnsupportedError, match="attention of its 2 layers"):
        make_base("llama", tmp_path)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_unknown_blocks_stay_as_they_came(kind, tmp_path, monkeypatch):
    """A model of the same layers under other names is served with hooks alone, and has the same numbers."""
    known = make_base(kind, tmp_path / "known")
    monkeypatch.setattr(base_module, "family_of", lambda config: Family("of no file", ()))
    unknown = make_base(kind, tmp_path / "unknown")
    assert not any(isinstance(module, GatedMLP | RotaryAttention) for module in unknown.backbone.modules())
    data = [datum(np.random.default_rng(0), n) for n in (7, 40)]
    results, gradients = [], []
    for base in (known, unknown):
        trainer = make_trainer(base, spec("a"))
        results.append(run_pass(trainer, [item("a", data)])[0])
        gradients.append(grads(trainer, "a"))
    for one, other in zip(results[0].logprobs, results[1].logprobs, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
    for name, gradient in gradients[0].items():
        assert relative(gradient, torch.from_numpy(gradients[1][name])) < 1e-5


def test_a_difference_between_hidden_states_and_logits_is_noticed(tmp_path, monkeypatch):
    check = base_module._check
    monkeypatch.setattr(
        base_module,
        "_check",
        lambda base, groups, model, tokens, logits, *rest: check(base, groups, model, tokens, logits * 1.1, *rest),
    )
    with pytest.raises(UnsupportedError, match="differ"):
        make_base("llama", tmp_path)


def test_packing_rules():
    assert [length_class(n) for n in (1, 16, 17, 64, 65, 100, 129, 512, 513)] == [
        16,
        16,
        32,
        64,
        80,
        112,
        160,
        512,
        640,
    ]
    assert all(n <= length_class(n) <= max(16, n * 1.25 + 16) for n in range(1, 5000))
    assert [(b.length, b.members) for b in bucketed([5, 40, 16])] == [(16, (0, 2)), (48, (1,))]
    assert [num_fitting([5, 5, 5], budget) for budget in (1, 10, 14, 99)] == [1, 2, 2, 3]
    assert num_fitting([], 5) == 0
    assert list(pieces(7, 3)) == [(0, 3), (3, 6), (6, 7)]


@pytest.mark.parametrize("grad", [False, True])
def test_silu_rounds_an_element_the_same_wherever_it_lies(threads, grad):
    """torch's own does not, from three threads up."""
    x = torch.randn(300, 1024, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.silu(x)
    silu = StableSiLU()

    def both(rows):
        leaf = x[:rows].clone().requires_grad_(grad)
        y = silu(leaf)
        return (y.detach(), torch.autograd.grad(y.square().sum(), leaf)[0]) if grad else (y, y)

    whole = both(300)
    torch.testing.assert_close(whole[0], expected)
    if grad:
        leaf = x.clone().requires_grad_()
        reference = torch.autograd.grad(torch.nn.functional.silu(leaf).square().sum(), leaf)[0]
        torch.testing.assert_close(whole[1], reference)
    for rows in range(16, 300, 12):
        for part, all_rows in zip(both(rows), whole, strict=True):
            assert torch.equal(part, all_rows[:rows])


def test_silu_of_extreme_numbers():
    x = torch.tensor([-1e4, -100.0, 0.0, 100.0])
    assert StableSiLU()(x).tolist() == [0.0, 0.0, 0.0, 100.0]
