"""Random bases, random requests, and the peft model that the engine's numbers are compared with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tinsmith.config import Settings
from tinsmith.model import BaseModel, load_base
from tinsmith.model.layout import HEAD_STATE_NAME
from tinsmith.training import Trainer
from tinsmith.types import BaseInfo, Datum, LossSpec, OpId, RunId, RunSpec, RunState, Targets, TrainItem, TrainResult

VOCAB = 211
SPREAD = 0.05  # of B. With 0.2 a random Llama is so ill-conditioned that peft in float32 is up to 1.2e-5 from float64
CPU = torch.device("cpu")
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "num_hidden_layers": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(
        hidden_size=56, intermediate_size=104, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        tie_word_embeddings=True, **COMMON,
    )),
    "llama": (LlamaForCausalLM, LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=1, attention_bias=True,
        mlp_bias=True, tie_word_embeddings=False, **COMMON,
    )),
    "deep": (Qwen3ForCausalLM, Qwen3Config(
        hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        tie_word_embeddings=True, **{**COMMON, "num_hidden_layers": 12, "max_position_embeddings": 40_000},
    )),
    "long": (Qwen3ForCausalLM, Qwen3Config(
        hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        tie_word_embeddings=True, **{**COMMON, "max_position_embeddings": 131_072},
    )),
    "words": (Qwen3ForCausalLM, Qwen3Config(
        hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        **{**COMMON, "vocab_size": 32_001, "num_hidden_layers": 1, "max_position_embeddings": 40_000},
    )),
    "thick": (Qwen3ForCausalLM, Qwen3Config(
        hidden_size=32, intermediate_size=1024, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        tie_word_embeddings=True, **{**COMMON, "num_hidden_layers": 8, "max_position_embeddings": 40_000},
    )),
    "wide": (Qwen3ForCausalLM, Qwen3Config(
        hidden_size=256, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        **{**COMMON, "vocab_size": 4001, "num_hidden_layers": 1},
    )),
}  # fmt: skip


def make_base(kind: str, path: Path, *, deterministic: bool = True) -> BaseModel:
    """A random model saved to `path` and opened."""
    model_class, config = CONFIGS[kind]
    torch.manual_seed(7)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(path)
    info = BaseInfo(kind, str(path), kind, config.vocab_size, config.max_position_embeddings, ())
    return load_base(info, device=CPU, dtype=torch.float32, deterministic=deterministic)


def make_trainer(base: BaseModel, *specs: RunSpec, chunk_tokens: int = 32, deterministic: bool = True) -> Trainer:
    """With the given runs, whose B isn't zero, so that every gradient is alive."""
    trainer = Trainer(base, Settings(loss_chunk_tokens=chunk_tokens, deterministic=deterministic))
    for spec in specs:
        trainer.create_run(spec)
        state = trainer.export_run(spec.run_id, ("param",))
        rng = np.random.default_rng(spec.seed)
        tensors = {
            name: rng.normal(0, SPREAD, array.shape).astype(np.float32) if name.endswith("lora_B") else array
            for name, array in state.tensors.items()
        }
        trainer.import_run(spec, RunState(spec, 0, tensors))
    return trainer


def spec(name: str, rank: int = 8, targets: Targets | None = None, seed: int = 1) -> RunSpec:
    return RunSpec(RunId(name), "base", rank, seed, targets or Targets(), alpha=32.0)


def datum(
    rng: np.random.Generator, length: int, loss: str = "cross_entropy", num_targets: int = 0, vocab: int = VOCAB
) -> Datum:
    """Random tokens and inputs; cross entropy with weights of either sign, a third of them zero."""
    shape = (length, num_targets) if num_targets else (length,)
    inputs: dict[str, Any] = {"target_tokens": rng.integers(0, vocab, shape)}
    if loss == "cross_entropy":
        inputs["weights"] = (rng.normal(size=shape) * (rng.random(shape) > 0.33)).astype(np.float32)
    else:
        inputs["logprobs"] = rng.normal(-5.5, 0.5, shape).astype(np.float32)
        inputs["advantages"] = rng.normal(size=shape).astype(np.float32)
    if loss == "gspo":
        inputs["sequence_ratio_mask"] = (rng.random(shape) > 0.4).astype(np.float32)
        inputs["sequence_ratio_mask"][0] = 1
    return Datum(rng.integers(0, vocab, length).astype(np.int32), inputs)


def item(
    run: str, data: Sequence[Datum], seq: int = 1, loss: str = "cross_entropy", backward: bool = True
) -> TrainItem:
    return TrainItem(OpId(f"{run}-{seq}"), RunId(run), seq, tuple(data), LossSpec(loss), backward)


def run_pass(trainer: Trainer, items: Sequence[TrainItem], max_tokens: int | Sequence[int] = 10**6) -> list[Any]:
    """Compute and commit; a sequence of budgets cuts the packs one by one."""
    training_pass = trainer.start_pass(items)
    budgets = iter([max_tokens] * 10**4 if isinstance(max_tokens, int) else [*max_tokens, *[10**6] * 10**4])
    while training_pass.advance(next(budgets)) is not None:
        pass
    return training_pass.commit()


def grads(trainer: Trainer, run: str) -> Mapping[str, np.ndarray[Any, Any]]:
    return trainer.export_run(RunId(run), ("grad",)).tensors


def assert_same_bits(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one.keys() == other.keys()
    different = {
        name: float(np.abs(one[name] - other[name]).max()) for name in one if not np.array_equal(one[name], other[name])
    }
    assert not different, different


def assert_same_result(one: TrainResult, other: TrainResult) -> None:
    assert_same_bits(dict(enumerate(one.logprobs)), dict(enumerate(other.logprobs)))
    assert one.metrics["loss:sum"] == other.metrics["loss:sum"]


def reader_of(base: BaseModel) -> Any:
    """The class of transformers that reads the base's directory."""
    return AutoModelForCausalLM if base.eyes is None else AutoModelForImageTextToText


class PeftTwin:
    """The same adapter on the same weights in peft, computed sequence by sequence under plain autograd.

    In float64, so that what differs is our own rounding: two results in float32 may each be near the truth, and too far
    from one another.
    """

    def __init__(self, base: BaseModel, state: RunState, **more: Any) -> None:
        """more: what else the adapter's configuration says."""
        spec = state.spec
        model = reader_of(base).from_pretrained(base.info.path, dtype=torch.float64, attn_implementation="eager")
        names = [info.name for info in base.linears if info.is_targeted(spec.targets)]
        config = LoraConfig(r=spec.rank, lora_alpha=int(spec.alpha), target_modules=names, lora_dropout=0.0, **more)
        with warnings.catch_warnings():  # of an old name in transformers, and of merging a tied head
            warnings.simplefilter("ignore")
            self.model = get_peft_model(model, config).double()
        self.params: dict[str, torch.nn.Parameter] = {}
        for name in names:
            layer = self.model.get_submodule(f"base_model.model.{name}")
            state_name = HEAD_STATE_NAME if name == "lm_head" else name
            self.params[f"{state_name}.lora_A"] = layer.lora_A["default"].weight
            self.params[f"{state_name}.lora_B"] = layer.lora_B["default"].weight
        for name, parameter in self.params.items():
            parameter.data.copy_(torch.from_numpy(state.tensors[f"param/{name}"]))

    def inputs(self, datum: Datum) -> dict[str, Any]:
        """What the model is called with."""
        return {"input_ids": torch.from_numpy(datum.tokens.astype(np.int64))[None]}

    def loss(self, data: Sequence[Datum], loss: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        total, logprobs = torch.zeros((), dtype=torch.float64), []
        for d in data:
            logits = self.model(**self.inputs(d)).logits[0]
            inputs = {name: torch.from_numpy(array) for name, array in d.inputs.items()}
            targets = inputs["target_tokens"]
            lp = logits.log_softmax(-1).gather(1, targets.view(len(targets), -1)).view(targets.shape)
            logprobs.append(lp.detach())
            if loss == "cross_entropy":
                total = total - (inputs["weights"] * lp).sum()
            else:
                total = total - ((lp - inputs["logprobs"]).exp() * inputs["advantages"]).sum()
        return total, logprobs

    def backward(self, data: Sequence[Datum], loss: str = "cross_entropy") -> tuple[float, list[torch.Tensor]]:
        total, logprobs = self.loss(data, loss)
        total.backward()
        return float(total.detach()), logprobs


def relative(ours: np.ndarray[Any, Any], theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    reference = theirs.detach().numpy()
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
