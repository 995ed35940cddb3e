"""Makes `tinsmith/tiny` from nothing: corpus, tokenizer, weights, model card.

    python -m scripts.tiny_model.train --out src/tinsmith/assets/tiny

Seeded; under half an hour on two cores. A run repeats bit by bit on the same machine with the same number of threads,
unless --minutes shortens it. Training has two parts. First every sum in the corpus is right and the learning rate is
constant. Then the rate falls to zero while a share of the sums is answered wrong on purpose; that share is steered by
the measured rates, so that the model ends inside the bands of measure.py and has room to learn by reinforcement. At the
end the bands are measured from the saved files, which are then renamed into place, one by one, in or out of the bands;
the exit code is 1 when one is missed.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from . import card, measure
from .corpus import Corpus, Exchange, chat
from .packing import Batch, Packer
from .tokenizer import MAX_POSITIONS, VOCAB_SIZE, save_tokenizer, train_tokenizer

ROW_LEN = 256
MARKUP = re.compile(r"<\|im_start\|>\w+|<.*?>")
WARMUP = 0.02  # share of the training
NOISE_FROM = 0.65  # where wrong sums and the fall of the learning rate begin


@dataclass
class Progress:
    """Where a training stands, in steps and seconds."""

    steps: int
    limit_s: float  # infinite: only the steps count, and a run repeats
    step: int = 0
    num_tokens: int = 0
    started: float = 0.0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def done(self) -> float:
        """The share that is done, from 0 to 1: of the steps, or of the time when that is nearer to its end."""
        return max(self.step / self.steps, self.elapsed_s / self.limit_s)


def build_model(seed: int, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A freshly initialised Qwen3 of 2.8M parameters, float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        intermediate_size=512,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    residual_scale = (2 * config.num_hidden_layers) ** -0.5
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.mul_(residual_scale)
        layer.mlp.down_proj.weight.data.mul_(residual_scale)
    return model


def build_tokenizer(seed: int, folder: Path) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the corpus, save it into `folder` and load it as a user would."""
    corpus = Corpus(seed)
    texts = (MARKUP.sub("", text) for _ in range(20_000) for text, _ in corpus.document())
    save_tokenizer(train_tokenizer(texts), folder)
    return AutoTokenizer.from_pretrained(folder)


def check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise when the corpus and the chat template disagree on the text of a chat."""
    pairs = [Exchange("Hello!", "Hi!", ""), Exchange("What is 1 + 1?", "2", "")]
    turns = [{"role": "system", "content": "Be kind."}]
    for question, answer, _ in pairs:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for no_thinking in (False, True):
        wanted = tokenizer.apply_chat_template(
            turns[:-1], tokenize=False, add_generation_prompt=True, enable_thinking=not no_thinking
        )
        written = "".join(text for text, _ in chat(pairs, system="Be kind.", no_thinking=no_thinking))
        if written != f"{wanted}2<|im_end|>\n":
            raise ValueError(f"the corpus writes {written!r}, the template {wanted!r}")


def learning_rate(peak: float, done: float) -> float:
    """Warm up, stay, then fall linearly to zero from `NOISE_FROM` on."""
    if done < WARMUP:
        return peak * (done + 1e-3) / WARMUP
    return peak * min(1.0, max(0.0, (1.0 - done) / (1.0 - NOISE_FROM)))


def batch_loss(model: Qwen3ForCausalLM, batch: Batch) -> torch.Tensor:
    """The weighted mean of the cross entropy, in nats for each token of weight 1."""
    logits_BTV = model(
        batch.ids_BT, attention_mask=batch.mask_B1TT, position_ids=batch.positions_BT, use_cache=False
    ).logits
    losses = F.cross_entropy(logits_BTV.flatten(0, 1).float(), batch.targets_BT.flatten(), reduction="none")
    return (losses * batch.weights_BT.flatten()).sum() / batch.weights_BT.sum()


@dataclass
class Steering:
    """Moves the corpus's rates of right sums so that the measured rates reach their aims."""

    corpus: Corpus
    singles: list[measure.Sum]
    doubles: list[measure.Sum]

    def look(self, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, done: float) -> str:
        """Measure both rates; once noise has begun, set those of the corpus; a line that says so."""
        model.eval()
        single = measure.expected_rate(model, tokenizer, self.singles)
        double = measure.expected_rate(model, tokenizer, self.doubles)
        model.train()
        rates = self.corpus.sum_rates
        if done >= NOISE_FROM:
            is_first = rates.single == 1.0
            rates.single = _steered(rates.single, single, measure.SINGLE_AIM, is_first)
            rates.double = _steered(rates.double, double, measure.DOUBLE_AIM, is_first)
        return f"sums {single:.3f} {double:.3f} (corpus {rates.single:.2f} {rates.double:.2f})"


def _steered(rate: float, measured: float, aim: float, is_first: bool) -> float:
    wanted = aim / max(measured, aim) if is_first else rate + 0.3 * (aim - measured)
    return min(1.0, max(0.15, wanted))


def train(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace, progress: Progress
) -> float:
    """Train `model` in place; the loss on held-out documents."""
    raw = tokenizer.backend_tokenizer
    packer = Packer(raw, Corpus(args.seed), num_rows=args.rows, row_len=ROW_LEN)
    singles = [measure.Sum(left, right) for left in range(10) for right in range(10)]
    steering = Steering(packer.corpus, singles, measure.random_sums(args.seed, 400, 100))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    progress.started, smooth = time.monotonic(), None
    while progress.done < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, progress.done)
        batch = packer.next_batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = batch_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.num_tokens += batch.num_tokens
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        if progress.step % args.every == 0:
            print_progress(progress, smooth, steering.look(model, tokenizer, progress.done))
    return held_out_loss(model, raw, args.seed)


def print_progress(progress: Progress, loss: float, note: str) -> None:
    """One line: step, loss, speed, time left."""
    speed = progress.num_tokens / progress.elapsed_s
    left_s = progress.elapsed_s * (1 / progress.done - 1)
    head = f"step {progress.step}/{progress.steps} loss {loss:.3f} {speed:.0f} tokens/s {left_s:.0f} s left"
    print(f"{head} | {note}", flush=True)


@torch.inference_mode()
def held_out_loss(model: Qwen3ForCausalLM, raw: Tokenizer, seed: int) -> float:
    """The weighted loss on documents whose questions were never trained on, sums right."""
    packer = Packer(raw, Corpus(seed + 1, held_out=True), num_rows=16, row_len=ROW_LEN)
    model.eval()
    return sum(batch_loss(model, packer.next_batch()).item() for _ in range(8)) / 8


def install(folder: Path, out: Path) -> None:
    """Move every file of `folder` into `out`, each by a rename, so that no reader sees half a file."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        staged = out / f".{path.name}.new"
        shutil.copyfile(path, staged)
        staged.replace(out / path.name)


def save_model(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Write the weights as bfloat16, with config.json and generation_config.json."""
    end_ids = [model.config.eos_token_id, model.config.pad_token_id]
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=end_ids)
    model.to(torch.bfloat16).save_pretrained(folder)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("src/tinsmith/assets/tiny"), help="where the files go")
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps; 0 writes an untrained model")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end earlier than --steps, after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=16, help=f"rows of {ROW_LEN} tokens in a batch")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--every", type=int, default=50, help="steps between measurements")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", action="store_true", help="train nothing: measure the model that is in --out")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 matrix products")
    return parser.parse_args()


def main() -> int:
    """Make the model, install it, measure it; 0 when both bands are met."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    facts = card.look(args.out) if args.measure else make(args)
    print(facts.summary())
    return 0 if facts.is_in_band else 1


def make(args: argparse.Namespace) -> card.Facts:
    """Train everything and install it into `args.out`; what was measured from the saved files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = build_tokenizer(args.seed, folder)
        check_template(tokenizer)
        model = build_model(args.seed, tokenizer)
        progress = Progress(max(args.steps, 1), args.minutes * 60)
        loss = train(model, tokenizer, args, progress) if args.steps else float("nan")
        save_model(model, folder)
        facts = card.look(folder, held_out_loss=loss, num_tokens=progress.num_tokens)
        (folder / "README.md").write_text(card.render(facts))
        install(folder, args.out)
    return facts


if __name__ == "__main__":
    sys.exit(main())
