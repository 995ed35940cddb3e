"""Two-player self-play: the model learns Nim by playing against itself.

A pile of counters, two players in turn take one, two or three; who takes the last one wins. Both players are the same
snapshot. A few supervised steps show it what a move looks like, with every legal move equally often, so that it plays
legally and at random. Then it plays against itself: the winner's moves get +1, the loser's -1, an illegal move, which
loses at once, -2; less the mean over all moves that were made from a pile of that size. The winning rule, leave a
multiple of four, is told to nobody; it is only used to measure.

    export TINKER_BASE_URL=... TINKER_API_KEY=...
    python examples/self_play.py
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tinker
from tinker import types

BASE_MODEL = "tinsmith/tiny"
RANK = 16
WARM_UP_STEPS = 30
STEPS = 14
GAMES = 96
LEARNING_RATE = 3e-3
TARGET = 0.8

MAX_PILE = 9
MAX_TAKE = 3
FIRST_PILES = range(2, MAX_PILE + 1)


@dataclass
class Move:
    """One move with what is needed to learn from it."""

    pile: int
    sequence: types.SampledSequence
    take: int  # 0: not a legal move
    has_won: bool = False

    @property
    def outcome(self) -> float:
        if not self.take:
            return -2.0
        return 1.0 if self.has_won else -1.0


@dataclass
class Report:
    """Wins against a random player and share of best moves, before and after; the latter in each step's games too."""

    before: float = float("nan")
    after: float = float("nan")
    best_before: float = float("nan")
    best_after: float = float("nan")
    best_moves: list[float] = field(default_factory=list)


def prompt_tokens(tokenizer: Any, pile: int) -> list[int]:
    return list(tokenizer.encode(f"<|im_start|>user\nTake from {pile}.<|im_end|>\n<|im_start|>assistant\n"))


def legal(pile: int) -> range:
    return range(1, min(MAX_TAKE, pile) + 1)


def best(pile: int) -> int:
    """The one winning move, 0 where every move loses against a perfect opponent."""
    return pile % (MAX_TAKE + 1)


def moves(sampler: tinker.SamplingClient, tokenizer: Any, piles: list[int], rng: random.Random) -> list[Move]:
    """A move for each of `piles`; equal piles share a request."""
    futures = {
        pile: sampler.sample(
            types.ModelInput.from_ints(prompt_tokens(tokenizer, pile)),
            num_samples=piles.count(pile),
            sampling_params=types.SamplingParams(max_tokens=4, temperature=1.0, seed=rng.randrange(2**31)),
        )
        for pile in sorted(set(piles))
    }
    answers = {pile: iter(future.result().sequences) for pile, future in futures.items()}
    made = []
    for pile in piles:
        sequence = next(answers[pile])
        text = tokenizer.decode(sequence.tokens, skip_special_tokens=True).strip()
        made.append(Move(pile, sequence, int(text) if text in map(str, legal(pile)) else 0))
    return made


def self_play(sampler: tinker.SamplingClient, tokenizer: Any, rng: random.Random) -> list[Move]:
    """All moves of `GAMES` games that are played side by side; every round moves once in each open game."""
    games: list[tuple[int, list[Move]]] = [(rng.choice(FIRST_PILES), []) for _ in range(GAMES)]
    finished: list[list[Move]] = []
    while games:
        still_open = []
        made_now = moves(sampler, tokenizer, [pile for pile, _ in games], rng)
        for (pile, history), move in zip(games, made_now, strict=True):
            history.append(move)
            if move.take and pile > move.take:
                still_open.append((pile - move.take, history))
                continue
            winner_parity = (len(history) - 1) % 2 if move.take else len(history) % 2
            for index, made in enumerate(history):
                made.has_won = index % 2 == winner_parity
            finished.append(history)
        games = still_open
    return [move for history in finished for move in history]


def wins_against_random(sampler: tinker.SamplingClient, tokenizer: Any, rng: random.Random) -> float:
    """Share of games won against a player who takes any legal number. All begin where the first player can win."""
    wins, piles = 0, [rng.choice([pile for pile in FIRST_PILES if best(pile)]) for _ in range(GAMES)]
    while piles:
        still_open = []
        for move in moves(sampler, tokenizer, piles, rng):
            left = move.pile - move.take
            wins += left == 0
            if move.take and left:
                left -= rng.choice(legal(left))
                still_open += [left] if left else []
        piles = still_open
    return wins / GAMES


def share_best(made: list[Move]) -> float:
    """Among the moves from piles where one move wins."""
    return float(np.mean([move.take == best(move.pile) for move in made if best(move.pile)]))


def training_data(made: list[Move], tokenizer: Any) -> list[types.Datum]:
    """Outcome less the mean outcome from that pile is a move's advantage. Equal moves are one datum: losses add up."""
    outcomes: dict[int, list[float]] = defaultdict(list)
    for move in made:
        outcomes[move.pile].append(move.outcome)
    advantages: dict[tuple[int, ...], float] = defaultdict(float)
    examples: dict[tuple[int, ...], Move] = {}
    for move in made:
        key = (move.pile, *move.sequence.tokens)
        advantages[key] += move.outcome - float(np.mean(outcomes[move.pile]))
        examples[key] = move
    data = []
    for key, move in examples.items():
        prompt = prompt_tokens(tokenizer, move.pile)
        tokens, pad = prompt + list(move.sequence.tokens), [0.0] * (len(prompt) - 1)
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={
                    "target_tokens": np.array(tokens[1:]),
                    "logprobs": np.array(pad + list(move.sequence.logprobs), dtype=np.float32),
                    "advantages": np.array(pad + [advantages[key]] * len(move.sequence.tokens), dtype=np.float32),
                },
            )
        )
    return data


def rules(tokenizer: Any) -> list[types.Datum]:
    """Every legal move from every pile, once."""
    data = []
    for pile in range(1, MAX_PILE + 1):
        for take in legal(pile):
            prompt = prompt_tokens(tokenizer, pile)
            tokens = prompt + tokenizer.encode(f"{take}<|im_end|>")
            weights = [0.0] * (len(prompt) - 1) + [1.0] * (len(tokens) - len(prompt))
            data.append(
                types.Datum(
                    model_input=types.ModelInput.from_ints(tokens[:-1]),
                    loss_fn_inputs={
                        "target_tokens": np.array(tokens[1:]),
                        "weights": np.array(weights, dtype=np.float32),
                    },
                )
            )
    return data


def run(seed: int = 0, on_step: Callable[[int, float], None] = lambda step, share: None) -> Report:
    """Teach the rules, play, and measure before and after the play."""
    report, rng = Report(), random.Random(seed)
    with tinker.ServiceClient(display_name="self-play") as service:
        client = service.create_lora_training_client(BASE_MODEL, rank=RANK, seed=seed).result()
        tokenizer = client.get_tokenizer()
        for step in range(WARM_UP_STEPS):
            client.forward_backward(rules(tokenizer), "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE * (1 - step / WARM_UP_STEPS)))
        sampler = client.save_weights_and_get_sampling_client().result()
        report.before = wins_against_random(sampler, tokenizer, rng)
        for step in range(STEPS):
            made = self_play(sampler, tokenizer, rng)
            client.forward_backward(training_data(made, tokenizer), "importance_sampling")
            client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE * (1 - step / STEPS)))
            sampler = client.save_weights_and_get_sampling_client().result()
            report.best_moves.append(share_best(made))
            on_step(step + 1, report.best_moves[-1])
        report.after = wins_against_random(sampler, tokenizer, rng)
        report.best_before, report.best_after = report.best_moves[0], share_best(self_play(sampler, tokenizer, rng))
    return report


def main() -> int:
    report = run(on_step=lambda step, share: step % 5 or print(f"step {step:3}  best moves {share:.0%}", flush=True))
    print(f"best moves: {report.best_before:.0%} -> {report.best_after:.0%}")
    print(f"wins against a random player: {report.before:.0%} -> {report.after:.0%}")
    return 0 if report.after >= TARGET and report.after > report.before else 1


if __name__ == "__main__":
    sys.exit(main())
