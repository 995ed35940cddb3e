"""How often the model adds right, and how it talks.

Two ways to look at a band: `expected_rate` sums exact probabilities (no noise, used to steer training), `sampled_rate`
draws at temperature 1 from the full softmax (the figure that counts). Shapes: B prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

SINGLE_BAND = (1 / 3, 2 / 3)
DOUBLE_BAND = (0.10, 0.40)
SINGLE_AIM, DOUBLE_AIM = 0.50, 0.25


@dataclass(frozen=True)
class Sum:
    """A question for the sum of two numbers."""

    left: int
    right: int

    @property
    def question(self) -> str:
        return f"What is {self.left} + {self.right}?"

    @property
    def answer(self) -> str:
        return str(self.left + self.right)


def random_sums(seed: int, count: int, top: int) -> list[Sum]:
    """`count` sums with both numbers even over 0..`top`."""
    rng = random.Random(seed)
    return [Sum(rng.randint(0, top), rng.randint(0, top)) for _ in range(count)]


def prompt_ids(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """The chat template's tokens for one user turn, up to where the assistant begins."""
    turns = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


@torch.inference_mode()
def expected_rate(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, sums: list[Sum]) -> float:
    """The mean probability of the right answer followed by the end of the turn."""
    by_shape = defaultdict(list)
    for item in sums:
        prompt = prompt_ids(tokenizer, item.question)
        answer = [*tokenizer.encode(item.answer, add_special_tokens=False), tokenizer.eos_token_id]
        by_shape[len(prompt), len(answer)].append(prompt + answer)
    total = 0.0
    for (_, answer_len), rows in by_shape.items():
        ids_BT = torch.tensor(rows)
        logits_BTV = model(ids_BT, use_cache=False, logits_to_keep=answer_len + 1).logits[:, :-1].float()
        logprobs_BT = logits_BTV.log_softmax(-1).gather(-1, ids_BT[:, -answer_len:, None])[..., 0]
        total += logprobs_BT.sum(-1).exp().sum().item()
    return total / len(sums)


@torch.inference_mode()
def sample(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[str],
    *,
    seed: int,
    max_new_tokens: int,
    batch_size: int = 256,
) -> list[str]:
    """One completion for each question at temperature 1, without special tokens, in the order of `questions`."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [prompt_ids(tokenizer, question) for question in questions]
    by_len = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_len[len(prompt)].append(index)
    texts = [""] * len(questions)
    for indices in by_len.values():
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            rows = _sample_rows(model, [prompts[i] for i in chosen], tokenizer.eos_token_id, max_new_tokens, generator)
            for index, row in zip(chosen, rows, strict=True):
                texts[index] = tokenizer.decode(row, skip_special_tokens=True)
    return texts


def _sample_rows(
    model: Qwen3ForCausalLM, prompts: list[list[int]], eos_id: int, max_new_tokens: int, generator: torch.Generator
) -> list[list[int]]:
    tokens_BT, cache = torch.tensor(prompts), None
    is_done_B = torch.zeros(len(prompts), dtype=torch.bool)
    drawn: list[torch.Tensor] = []
    for _ in range(max_new_tokens):
        output = model(tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        probs_BV = output.logits[:, -1].float().softmax(-1)
        tokens_BT = torch.multinomial(probs_BV, 1, generator=generator)
        cache = output.past_key_values
        drawn.append(tokens_BT[:, 0].masked_fill(is_done_B, eos_id))
        is_done_B |= tokens_BT[:, 0] == eos_id
        if is_done_B.all():
            break
    rows = torch.stack(drawn, dim=1).tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


def sampled_rate(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, sums: list[Sum], *, seed: int) -> float:
    """The share of `sums` whose sampled answer, stripped, is the sum."""
    texts = sample(model, tokenizer, [item.question for item in sums], seed=seed, max_new_tokens=12)
    return sum(text.strip() == item.answer for text, item in zip(texts, sums, strict=True)) / len(sums)
