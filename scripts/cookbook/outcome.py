"""What one recipe left behind, and the verdicts on it. Pure: reads the recipe's own log directory and output.

A judge is a function from an Outcome to a Verdict. Every judge but `refused` asks first that the process ended well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAST_LINES = 6
LINE_CHARS = 200


@dataclass(frozen=True, slots=True)
class Outcome:
    """log_path: the recipe's log directory, or where its log directories are. returncode None: out of time."""

    log_path: Path
    output: str
    returncode: int | None

    def metrics(self, file: str = "metrics.jsonl", folder: str = ".") -> list[dict[str, Any]]:
        """The rows of a metrics file; none if there is no file."""
        path = Path(os.path.normpath(self.log_path / folder / file))  # a recipe may not have made its log_path
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def series(self, name: str, folder: str = ".") -> list[float]:
        """The values of one metric, in the order of the rows that have it."""
        return [float(row[name]) for row in self.metrics(folder=folder) if name in row]


@dataclass(frozen=True, slots=True)
class Verdict:
    """steps None: the recipe doesn't train."""

    ok: bool
    text: str
    steps: int | None = None


Judge = Callable[[Outcome], Verdict]


def last_lines(output: str) -> str:
    lines = [line.strip()[:LINE_CHARS] for line in output.splitlines() if line.strip()]
    return "\n".join(lines[-LAST_LINES:])


def ended(outcome: Outcome) -> Verdict | None:
    """The bad verdict on a process that failed or was out of time; None if it ended well."""
    if outcome.returncode == 0:
        return None
    how = "out of time" if outcome.returncode is None else f"exit {outcome.returncode}"
    return Verdict(False, f"failed, {how}:\n{last_lines(outcome.output)}")


def steps_in(outcome: Outcome, folder: str, of: str) -> int:
    return len({row["step"] for row in outcome.metrics(folder=folder) if of in row and "step" in row})


def trained(steps: int, of: str, folders: Sequence[str] = (".",)) -> Judge:
    """The metric `of` was logged for so many steps, in each log directory."""

    def judge(outcome: Outcome) -> Verdict:
        bad = ended(outcome)
        counts = {folder: steps_in(outcome, folder, of) for folder in folders}
        total = sum(counts.values())
        if bad is not None:
            return Verdict(False, bad.text, total)
        short = {folder: count for folder, count in counts.items() if count < steps}
        if short:
            return Verdict(False, f"failed: {steps} steps with {of} wanted, found {short}", total)
        return Verdict(True, "ok", total)

    return judge


def said(*texts: str, never: Sequence[str] = ()) -> Judge:
    """For recipes that don't train: what they print."""

    def judge(outcome: Outcome) -> Verdict:
        if bad := ended(outcome):
            return bad
        missing = [text for text in texts if text not in outcome.output]
        unwanted = [text for text in never if text in outcome.output]
        if missing or unwanted:
            return Verdict(False, f"failed: not said {missing}, said {unwanted}:\n{last_lines(outcome.output)}")
        return Verdict(True, "ok")

    return judge


def refused(*texts: str) -> Judge:
    """The recipe has to fail, and its output to say why."""

    def judge(outcome: Outcome) -> Verdict:
        missing = [text for text in texts if text not in outcome.output]
        if outcome.returncode is None or outcome.returncode == 0 or missing:
            return Verdict(False, f"failed: a refusal was wanted that says {missing}:\n{last_lines(outcome.output)}")
        return Verdict(True, f"ok: refused, naming {', '.join(texts)}", 0)

    return judge


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def rises(steps: int, metric: str, window: int, by: float) -> Judge:
    """The mean of `metric` over the last `window` steps is above that over the first by `by` or more."""
    return _moves(steps, metric, window, by, "rose")


def falls(steps: int, metric: str, window: int, by: float) -> Judge:
    return _moves(steps, metric, window, -by, "fell")


def _moves(steps: int, metric: str, window: int, by: float, word: str) -> Judge:
    enough = trained(steps, metric)

    def judge(outcome: Outcome) -> Verdict:
        verdict = enough(outcome)
        if not verdict.ok:
            return verdict
        values = outcome.series(metric)
        first, last = mean(values[:window]), mean(values[-window:])
        moved = last - first >= by if by > 0 else last - first <= by
        text = f"{metric} {word if moved else 'did not move enough:'} from {first:.3f} to {last:.3f}"
        return Verdict(moved, f"{'ok' if moved else 'failed'}: {text}", verdict.steps)

    return judge


def learned(runs: int) -> Judge:
    """So many runs logged gradients below the log directory, and none of them only zeros."""

    def judge(outcome: Outcome) -> Verdict:
        if bad := ended(outcome):
            return bad
        folders = [str(path.parent) for path in sorted(outcome.log_path.glob("**/metrics.jsonl"))]
        norms = {Path(folder).name: outcome.series("grad_norm", folder) for folder in folders}
        idle = [name for name, values in norms.items() if not any(values)]
        steps = sum(len(values) for values in norms.values())
        if len(norms) < runs or idle:
            return Verdict(False, f"failed: {len(norms)} runs, without a gradient {idle}", steps)
        return Verdict(True, "ok", steps)

    return judge


AGREEMENT, AGREEMENT_BOUND = "optim/kl_sample_train_v2", 1e-10


def agreeing(then: Judge, folder: str = ".") -> Judge:
    """On-policy, the sampler's log-probabilities are the trainer's: half their mean squared difference is within 1e-10.

    The cookbook's own estimate (k2) of the divergence between the two, logged at every step of reinforcement learning.
    """

    def judge(outcome: Outcome) -> Verdict:
        verdict = then(outcome)
        values = outcome.series(AGREEMENT, folder)
        if not verdict.ok:
            return verdict
        if not values or max(values) > AGREEMENT_BOUND:
            return Verdict(False, f"failed: sampler and trainer differ, {AGREEMENT} {values}", verdict.steps)
        return Verdict(True, f"{verdict.text}; sampler and trainer agree, {max(values):.0e}", verdict.steps)

    return judge


def both(first: Judge, second: Judge) -> Judge:
    """The first bad verdict, or the two together."""

    def judge(outcome: Outcome) -> Verdict:
        one, two = first(outcome), second(outcome)
        if not one.ok:
            return one
        return Verdict(two.ok, two.text, (one.steps or 0) + (two.steps or 0))

    return judge


BEFORE_KILL = "metrics.before-kill.jsonl"


def resumed(then: Judge, metric: str, repeated: int) -> Judge:
    """After a kill, the resumed run's `metric` continues the killed run's from an earlier step, with the same bits.

    What the second process computes must occur in the first one's series and go on as it did there, `repeated` times or
    more: the first value depends on the weights of the checkpoint alone, the next on its optimizer state as well.
    """

    def judge(outcome: Outcome) -> Verdict:
        verdict = then(outcome)
        if not verdict.ok:
            return verdict
        before = [row[metric] for row in outcome.metrics(BEFORE_KILL) if metric in row]
        after = [row[metric] for row in rows_after_kill(outcome) if metric in row]
        if not after or after[0] not in before:
            return Verdict(False, f"failed: resumed at {after[:1]}, which the killed run never was at", verdict.steps)
        start = before.index(after[0])
        overlap = len(before) - start
        if overlap < repeated or len(after) < overlap:
            return Verdict(False, f"failed: only {min(overlap, len(after))} steps were computed twice", verdict.steps)
        if before[start:] != after[:overlap]:
            differing = f"{before[start:]} before the kill, {after[:overlap]} after it"
            return Verdict(False, f"failed: {metric} differs, {differing}", verdict.steps)
        return Verdict(
            True, f"{verdict.text}; killed and resumed, {overlap} steps again with the same bits", verdict.steps
        )

    return judge


def rows_after_kill(outcome: Outcome) -> list[dict[str, Any]]:
    """The rows that the second process logged. Rows carry times, so that none of them is a row of the first."""
    before = {json.dumps(row) for row in outcome.metrics(BEFORE_KILL)}
    return [row for row in outcome.metrics() if json.dumps(row) not in before]
