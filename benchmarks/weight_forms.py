"""What do a base's dtypes and forms of weights cost, in memory, speed and accuracy?

    python benchmarks/weight_forms.py

Speed: CPU seconds of a training pass of 8 runs x 32 tokens, and of a sampler's step of 8 sequences, on random weights,
each over that of float32 in the same round (arms take turns, medians); MXFP4, which experts alone have, over float32
experts. Memory: bytes for each number of the matrices of attention, MLP and experts, before the first backward pass.
Accuracy: log-probabilities of text that the shipped model samples, in each form, from those in float32: the mean
absolute difference, and by how much the text got less likely a token. MXFP4 has none: the shipped model has no experts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinsmith.machine.cpu import math_env

os.environ.update({**math_env(), **os.environ})  # read when torch loads

import numpy as np
import rows
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from tinsmith.bases.catalog import SHIPPED_PATH, BaseRef, describe
from tinsmith.bases.tokenizer import ChatTokenizer
from tinsmith.config import Settings
from tinsmith.model import BaseModel, load_base
from tinsmith.sampling import Sampler
from tinsmith.training import Trainer
from tinsmith.types import BaseInfo, Datum, LossSpec, OpId, RunId, RunSpec, SampleItem, SamplingParams, TrainItem

RUNS, TOKENS, VOCAB = 8, 32, 1000
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.05,
}  # fmt: skip
DENSE = ("float32", "bfloat16", "float16", "fp8", "int4", "nf4")
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def fp8(weight: Tensor) -> dict[str, Tensor]:
    """In blocks of 128 x 128, which divide these weights or are cut at the end."""
    down, across = (-(-size // 128) for size in weight.shape)
    padded = torch.zeros(down * 128, across * 128)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    scales = padded.view(down, 128, across, 128).abs().amax((1, 3)) / 448
    grid = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
    return {"": (weight / grid).to(torch.float8_e4m3fn), "_scale_inv": scales}


def mxfp4(weight_EIO: Tensor) -> dict[str, Tensor]:
    groups = weight_EIO.transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).clamp(min=1e-20).log2().ceil()
    codes = (groups / exponents.exp2()[..., None])[..., None].sub(E2M1).abs().argmin(-1).to(torch.uint8)
    return {"_blocks": codes[..., ::2] + codes[..., 1::2] * 16, "_scales": (exponents + 127).to(torch.uint8)}


def rewrite(plain: Path, target: Path, make: Callable[[Tensor], dict[str, Tensor]], told: dict[str, Any]) -> Path:
    """The directory with its matrices (or experts, in 3 dimensions) in another form."""
    shutil.copytree(plain, target)
    stored: dict[str, Tensor] = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        is_experts = weight.ndim == 3
        if (make is mxfp4) == is_experts and (is_experts or name.split(".")[-2] in MATRICES):
            stored |= {name + suffix: part.contiguous() for suffix, part in make(weight.float()).items()}
        else:
            stored[name] = weight
    save_file(stored, target / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    return target


def load(form: str, plain: Path, home: Path, info: BaseInfo) -> BaseModel:
    path, dtype, weights = plain, "float32", "stored"
    if form in ("bfloat16", "float16"):
        dtype = form
    elif form in ("int4", "nf4"):
        weights = form
    elif form == "fp8":
        path = rewrite(plain, home / "fp8", fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    elif form == "MXFP4":
        path = rewrite(plain, home / "mxfp4", mxfp4, {"quant_method": "mxfp4"})
    own = BaseInfo(info.name, str(path), info.arch, info.vocab_size, info.max_context, ())
    return load_base(own, device=torch.device("cpu"), dtype=getattr(torch, dtype), weights=weights)


def bytes_each(base: BaseModel) -> float:
    """The head is left out."""
    matrices = list(base.matrices())[:-1]
    return sum(m.num_bytes for m in matrices) / sum(m.in_features * m.out_features for m in matrices)


def training_pass(base: BaseModel) -> Callable[[], None]:
    trainer, rng = Trainer(base, Settings()), np.random.default_rng(0)
    items = []
    for index in range(RUNS):
        run = RunId(f"r{index}")
        trainer.create_run(RunSpec(run, base.info.name, 16, index))
        tokens = rng.integers(0, base.info.vocab_size, TOKENS + 1)
        inputs = {"target_tokens": tokens[1:], "weights": np.ones(TOKENS, np.float32)}
        datum = Datum(tokens[:-1].astype(np.int32), inputs)
        items.append(TrainItem(OpId(run), run, 1, (datum,), LossSpec("cross_entropy"), backward=True))

    def step() -> None:
        started = trainer.start_pass(items)
        while started.advance(10**6):
            pass
        started.commit()

    return step


def sampler_step(base: BaseModel) -> Callable[[], None]:
    sampler = Sampler(base, Settings(), ChatTokenizer.from_dir(SHIPPED_PATH))
    for index in range(RUNS):
        prompt = np.arange(8, dtype=np.int32) + index
        params = SamplingParams(max_tokens=1500, stop_tokens=())
        sampler.submit(SampleItem(OpId(f"s{index}"), None, prompt, params, 1, index))
    for _ in range(3):
        sampler.step()

    def step() -> None:
        for _ in range(4):
            sampler.step()

    return step


def ratios(
    bases: dict[str, BaseModel], make: Callable[[BaseModel], Callable[[], None]], repeats: int
) -> dict[str, float]:
    """Of each arm over the first one, round by round."""
    arms = {form: make(base) for form, base in bases.items()}
    for step in arms.values():
        step()
    found: dict[str, list[float]] = {form: [] for form in arms}
    for _ in range(repeats):
        for form, step in arms.items():
            started = time.process_time()
            step()
            found[form].append(time.process_time() - started)
    first = found[next(iter(arms))]
    return {form: statistics.median(a / b for a, b in zip(own, first, strict=True)) for form, own in found.items()}


def text_of(base: BaseModel, count: int, length: int) -> list[np.ndarray]:
    sampler = Sampler(base, Settings(), ChatTokenizer.from_dir(SHIPPED_PATH))
    texts: dict[str, np.ndarray] = {}
    for index in range(count):
        params = SamplingParams(max_tokens=length, stop_tokens=())
        sampler.submit(SampleItem(OpId(f"t{index}"), None, np.arange(3, dtype=np.int32) + index, params, 1, index))
    while sampler.num_samples:
        for op_id, result in sampler.step():
            texts[op_id] = np.asarray(result.sequences[0].tokens)
    return [texts[f"t{index}"] for index in range(count)]


def logprobs(base: BaseModel, texts: list[np.ndarray]) -> np.ndarray:
    trainer = Trainer(base, Settings())
    trainer.create_run(RunSpec(RunId("r"), base.info.name, 4, 0))
    data = tuple(Datum(t[:-1].astype(np.int32), {"target_tokens": t[1:].astype(np.int64)}) for t in texts)
    item = TrainItem(OpId("o"), RunId("r"), 1, data, LossSpec("cross_entropy"), backward=False)
    started = trainer.start_pass([item])
    while started.advance(10**6):
        pass
    (result,) = started.commit()
    return np.concatenate(result.logprobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    rows.add_flag(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**SIZES, intermediate_size=1536, num_hidden_layers=2)).save_pretrained(home / "d")
        experts = GptOssConfig(
            **SIZES,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            intermediate_size=512,
            num_hidden_layers=2,
            num_local_experts=8,
        )
        GptOssForCausalLM(experts).save_pretrained(home / "e")
        table: list[rows.Row] = []
        for kind, forms in (("d", DENSE), ("e", ("float32", "MXFP4"))):
            info = BaseInfo(kind, str(home / kind), kind, VOCAB, 2048, ())
            bases = {form: load(form, home / kind, home / f"{kind}-forms", info) for form in forms}
            sizes = {form: bytes_each(base) for form, base in bases.items()}
            steps = ratios(bases, sampler_step, args.repeats)
            passes = ratios(bases, training_pass, args.repeats)
            for form in forms[1:] if kind == "e" else forms:
                table += [
                    rows.Row(f"base in {form}: memory of its matrices", sizes[form], "bytes a parameter", "", 1),
                    rows.Row(f"base in {form}: training pass over float32's", passes[form], "x", "", args.repeats),
                    rows.Row(f"base in {form}: sampler's step over float32's", steps[form], "x", "", args.repeats),
                ]
        shipped = describe(BaseRef("tiny", SHIPPED_PATH))
        exact = load("float32", SHIPPED_PATH, home / "t", shipped)
        texts = text_of(exact, 8, 90)
        expected = logprobs(exact, texts)
        for form in DENSE[1:]:
            found = logprobs(load(form, SHIPPED_PATH, home / "t", shipped), texts)
            table += [
                rows.Row(
                    f"base in {form}: logprobs from float32's, mean", float(abs(found - expected).mean()), "", "", 1
                ),
                rows.Row(f"base in {form}: text less likely a token", float((expected - found).mean()), "nats", "", 1),
            ]
    print(rows.HEAD)
    print("\n".join(map(str, table)))
    rows.save(args.rows, table)


if __name__ == "__main__":
    main()
