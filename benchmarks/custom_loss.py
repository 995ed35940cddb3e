"""What does a loss of one's own cost? The same loss three ways, in this process, interleaved.

`native` is the built-in loss; `uploaded` the same function traced by the SDK and evaluated inside the pass; `client`
what `forward_backward_custom` does with a plain function: a forward, the loss in torch, its gradient as cross-entropy
weights. CPU seconds of engine and loss, medians of the ratios of neighbouring measurements; no service, no network.

    python benchmarks/custom_loss.py --cases 16x64 8x256 4x512 2x2048 --repeats 7
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from tinsmith.machine.cpu import math_env

os.environ.update({**math_env(), **os.environ})  # read when torch loads

import msgspec
import numpy as np
import rows
import torch
from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss
from transformers import Qwen3Config, Qwen3ForCausalLM

from tinsmith.config import Settings
from tinsmith.model import load_base
from tinsmith.training import Trainer
from tinsmith.training.budget import USEFUL_TOKENS
from tinsmith.types import BaseInfo, Datum, LossSpec, OpId, RunId, RunSpec, TrainItem, TrainResult
from tinsmith.wire.custom_loss import decode_custom_loss

RUN = RunId("r")
RANKS: dict[str, Any] = {"ppo": ("logprobs", "q", "advantages"), "gspo": ("logprobs", "q", "advantages", "mask")}


def ppo(logprobs: Any, q: Any, advantages: Any) -> Any:
    ratio = torch.exp(logprobs - q)
    clipped = ratio.clamp(0.8, 1.2)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).sum()
    return loss, {"custom/clipped:sum": (ratio != clipped).sum(), "custom/ratio:mean": ratio.mean()}


def gspo(logprobs: Any, q: Any, advantages: Any, mask: Any) -> Any:
    fixed = logprobs.detach()
    ratio = torch.exp(((fixed - q) * mask).sum() / mask.sum()) * torch.exp(logprobs - fixed)
    clipped = ratio.clamp(0.8, 1.2)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).sum()
    return loss, {"custom/clipped:sum": (ratio != clipped).sum(), "custom/ratio:mean": ratio.mean()}


FUNCTIONS: dict[str, Callable[..., Any]] = {"ppo": ppo, "gspo": gspo}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as path:
        config = Qwen3Config(
            vocab_size=args.vocab, hidden_size=512, intermediate_size=1536, num_hidden_layers=args.layers,
            num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
        )  # fmt: skip
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(path)
        info = BaseInfo("bench", path, "qwen3", args.vocab, 4096, ())
        print(
            f"hidden 512 x {args.layers} layers, vocabulary {args.vocab}, rank 16, {args.threads} thread(s); CPU "
            f"seconds, medians of {args.repeats}\n"
        )
        print("| loss | data x tokens | native s | uploaded / native | client / native |")
        print("|---|---|---|---|---|")
        trainer = Trainer(load_base(info, device=torch.device("cpu"), dtype=torch.float32), Settings())
        trainer.create_run(RunSpec(RUN, info.name, 16, 0))
        for case in args.cases:
            for loss in FUNCTIONS:
                report(trainer, loss, case, args)


def report(trainer: Trainer, loss: str, case: str, args: argparse.Namespace) -> None:
    count, length = (int(n) for n in case.split("x"))
    rng = np.random.default_rng(0)
    data = [make_datum(rng, length, args.vocab) for _ in range(count)]
    arms = {
        "native": native_arm(trainer, loss, data),
        "uploaded": uploaded_arm(trainer, loss, data),
        "client": client_arm(trainer, loss, data),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(args.repeats + 1):
        for name, arm in arms.items():
            started = time.process_time()
            arm()
            if repeat:
                times[name].append(time.process_time() - started)
    ratios = {
        name: statistics.median(own / native for own, native in zip(times[name], times["native"], strict=True))
        for name in ("uploaded", "client")
    }
    native_s = statistics.median(times["native"])
    print(f"| {loss} | {case} | {native_s:.3f} | {ratios['uploaded']:.3f} | {ratios['client']:.3f} |", flush=True)
    rows.save(
        args.rows,
        [
            rows.Row(f"{loss} uploaded / native, {case} tokens", ratios["uploaded"], "x", "< 1.05", args.repeats),
            rows.Row(f"{loss} by the client / native, {case} tokens", ratios["client"], "x", "< 1.55", args.repeats),
        ],
    )


def native_arm(trainer: Trainer, loss: str, data: list[Datum]) -> Callable[[], Any]:
    names = {"q": "logprobs", "mask": "sequence_ratio_mask"}
    own = [renamed(datum, {**names, "advantages": "advantages"}, RANKS[loss]) for datum in data]
    return lambda: run(trainer, own, LossSpec(loss))


def uploaded_arm(trainer: Trainer, loss: str, data: list[Datum]) -> Callable[[], Any]:
    handle = trace_loss(FUNCTIONS[loss], dict.fromkeys(RANKS[loss], 1), "session")
    inputs = [one.model_dump() for one in handle.inputs]
    body = {"name": loss, "inputs": inputs, "graph": encode_graph(handle).model_dump()}
    graph = decode_custom_loss(msgspec.json.encode(body))
    return lambda: run(trainer, data, LossSpec("custom", {}, graph))


def client_arm(trainer: Trainer, loss: str, data: list[Datum]) -> Callable[[], Any]:
    def step() -> None:
        bare = [Datum(d.tokens, {"target_tokens": d.inputs["target_tokens"]}) for d in data]
        forward = run(trainer, bare, LossSpec("cross_entropy"), backward=False)
        logprobs = [torch.from_numpy(lp).requires_grad_() for lp in forward.logprobs]
        total: Any = 0.0
        for datum, lp in zip(data, logprobs, strict=True):
            total = total + FUNCTIONS[loss](lp, *(torch.from_numpy(datum.inputs[n]) for n in RANKS[loss][1:]))[0]
        total.backward()
        weighted = [
            Datum(d.tokens, {"target_tokens": d.inputs["target_tokens"], "weights": -weight(lp)})
            for d, lp in zip(data, logprobs, strict=True)
        ]
        run(trainer, weighted, LossSpec("cross_entropy"))

    return step


def weight(lp: torch.Tensor) -> Any:
    assert lp.grad is not None
    return lp.grad.numpy()


def run(trainer: Trainer, data: list[Datum], loss: LossSpec, *, backward: bool = True) -> TrainResult:
    training_pass = trainer.start_pass([TrainItem(OpId("o"), RUN, 1, tuple(data), loss, backward)])
    while training_pass.advance(USEFUL_TOKENS["cpu"]):
        pass
    (result,) = training_pass.commit()
    if not isinstance(result, TrainResult):
        raise SystemExit(result.message)
    return result


def make_datum(rng: np.random.Generator, length: int, vocab: int) -> Datum:
    """Sampling log-probabilities like an untrained model's, advantages of either sign, the latter half sampled."""
    tokens = rng.integers(0, vocab, length + 1)
    mask = (np.arange(length) >= length // 2).astype(np.float32)
    inputs = {
        "target_tokens": tokens[1:],
        "q": rng.normal(-np.log(vocab), 0.2, length).astype(np.float32),
        "advantages": (rng.normal(size=length)).astype(np.float32),
        "mask": mask,
    }
    return Datum(tokens[:-1].astype(np.int32), inputs)


def renamed(datum: Datum, names: dict[str, str], used: tuple[str, ...]) -> Datum:
    inputs = {names[name]: array for name, array in datum.inputs.items() if name in used}
    return Datum(datum.tokens, {"target_tokens": datum.inputs["target_tokens"], **inputs})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["16x64", "8x256", "4x512", "2x2048"], help="data x tokens")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    rows.add_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
