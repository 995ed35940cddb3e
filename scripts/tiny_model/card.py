"""Measures the finished files of `tinsmith/tiny` and writes its model card from what was seen."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import measure
from .corpus import is_held_out

NUM_SAMPLES = 4000
CARD = Path(__file__).with_name("card.md")
QUESTIONS = [
    "Hello, I am Anna.",
    "What is the capital of France?",
    "What is 3 + 4?",
    "What is 38 + 25?",
    "Tell me a story about a fox.",
    "Name three animals.",
    "Write cat in capital letters.",
    "How do I make tea?",
]


@dataclass(frozen=True)
class Facts:
    """What was measured from the saved files."""

    single: float
    double: float
    unseen: float  # as double, exact, over the pairs that were never trained on
    held_out_loss: float
    num_tokens: int
    num_params: int
    num_bytes: int
    samples: list[tuple[str, str]]

    @property
    def is_in_band(self) -> bool:
        single_low, single_high = measure.SINGLE_BAND
        double_low, double_high = measure.DOUBLE_BAND
        return single_low <= self.single <= single_high and double_low <= self.double <= double_high

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = [f"> {question}\n{answer}" for question, answer in self.samples]
        lines += [
            f"single-digit sums {self.single:.3f}, sums up to 100 {self.double:.3f} ({NUM_SAMPLES} samples each)",
            f"sums up to 100 of pairs never trained on {self.unseen:.3f} (exact)",
            f"{self.num_tokens} tokens seen, held-out loss {self.held_out_loss:.3f}, {self.num_bytes} bytes",
            "inside the bands" if self.is_in_band else "OUTSIDE OF THE BANDS",
        ]
        return "\n".join(lines)


def look(folder: Path, *, held_out_loss: float = float("nan"), num_tokens: int = 0) -> Facts:
    """Load the model from `folder` in float32 and measure it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = itertools.product(range(101), repeat=2)
    unseen = [
        measure.Sum(left, right) for left, right in pairs if max(left, right) > 9 and is_held_out(f"{left}+{right}")
    ]
    answers = measure.sample(model, tokenizer, QUESTIONS, seed=0, max_new_tokens=120)
    return Facts(
        single=measure.sampled_rate(model, tokenizer, measure.random_sums(1, NUM_SAMPLES, 9), seed=1),
        double=measure.sampled_rate(model, tokenizer, measure.random_sums(2, NUM_SAMPLES, 100), seed=2),
        unseen=measure.expected_rate(model, tokenizer, unseen),
        held_out_loss=held_out_loss,
        num_tokens=num_tokens,
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        num_bytes=sum(path.stat().st_size for path in folder.iterdir()),
        samples=list(zip(QUESTIONS, answers, strict=True)),
    )


def render(facts: Facts) -> str:
    """The model card, in Markdown."""
    figures = {
        "params": f"{facts.num_params / 1e6:.2f}M",
        "size": f"{facts.num_bytes / 1e6:.1f} MB",
        "tokens": f"{facts.num_tokens / 1e6:.1f}M",
        "single": f"{facts.single:.1%}",
        "double": f"{facts.double:.1%}",
        "unseen": f"{facts.unseen:.1%}",
        "loss": f"{facts.held_out_loss:.3f}",
        "count": str(NUM_SAMPLES),
        "samples": "\n\n".join(f"    > {question}\n{_indented(answer)}" for question, answer in facts.samples),
    }
    text = CARD.read_text()
    for name, figure in figures.items():
        text = text.replace("{" + name + "}", figure)
    return text


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
