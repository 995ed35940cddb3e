"""The offline directory in which recipes run: tokenizers and datasets under the names that recipes ask for.

`AutoTokenizer.from_pretrained("org/name")` and `datasets.load_dataset("org/name")` both prefer a directory of that
relative path to the hub, so that a recipe started here finds everything and asks nobody. The tokenizer is that of the
model that is served, so that ids agree; the rows are small sums, seeded, in the columns that recipes read. Knows
nothing of the libraries that read them.
"""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SEED = 20
TRAIN_ROWS, TEST_ROWS = 64, 8
CHAT_ROWS = 256  # two batches of the size that sl_basic takes
ALIKE_ROWS = 128
EXAMPLE_LINES = 16
HELD_BACK_ROWS = 1024  # the tulu datasets' builders keep so many rows for tests
WIDE_CONTEXT_TOKENS = 32_768
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")


def build(directory: Path, model: Path, names: Sequence[str], wide_names: Sequence[str]) -> dict[str, Path]:
    """Fill `directory` for recipes that call the model in `model` by any of `names` and `wide_names`.

    Returns the directory to serve each name from. `wide_names` get the same weights with more positions allowed (they
    are rotary, none are stored), for recipes with long prompts; the weights are linked, not copied.
    """
    wide = directory / "models" / "wide"
    wide.mkdir(parents=True, exist_ok=True)
    for file in {*MODEL_FILES, *TOKENIZER_FILES} - {"config.json"}:
        _link(model / file, wide / file)
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = WIDE_CONTEXT_TOKENS
    (wide / "config.json").write_text(json.dumps(config, indent=2))
    served = {**dict.fromkeys(names, model), **dict.fromkeys(wide_names, wide)}
    for name, source in served.items():
        (directory / name).mkdir(parents=True, exist_ok=True)
        for file in TOKENIZER_FILES:
            shutil.copyfile(source / file, directory / name / file)
    for name, config_name, splits in datasets():
        write_dataset(directory / name, config_name, splits)
    write_forecasts(directory / "forecasts.csv")
    write_alike(directory / "alike.jsonl")
    write_papers(directory)
    return served


def copy_examples(source: Path, target: Path) -> None:
    """The first lines of the cookbook's own example files, where recipes look that are run from its repository."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        lines = file.read_text().splitlines(keepends=True)
        (target / file.name).write_text("".join(lines[:EXAMPLE_LINES]))


def _link(target: Path, link: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def write_dataset(directory: Path, config_name: str, splits: Mapping[str, Sequence[Row]]) -> None:
    """A dataset as a hub directory: a JSON-lines file a split, and a README whose header names them."""
    directory.mkdir(parents=True, exist_ok=True)
    header = ["---", "configs:", f"- config_name: {config_name}", "  data_files:"]
    for split, rows in splits.items():
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        header += [f"  - split: {split}", f"    path: {split}.jsonl"]
    (directory / "README.md").write_text("\n".join([*header, "---", ""]))


class Sums:
    """Small additions as question and answer: the one thing that the shipped model can partly do."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def rows(self, count: int, make: Callable[[int, str, str], Row]) -> list[Row]:
        made = []
        for index in range(count):
            left, right = self._rng.randrange(10), self._rng.randrange(10)
            made.append(make(index, f"What is {left} + {right}?", str(left + right)))
        return made


def datasets() -> list[tuple[str, str, dict[str, list[Row]]]]:
    """Name, config and splits of every dataset."""
    sums = Sums(SEED)

    def split(make: Callable[[int, str, str], Row], test: str = "test") -> dict[str, list[Row]]:
        return {"train": sums.rows(TRAIN_ROWS, make), test: sums.rows(TEST_ROWS, make)}

    many = HELD_BACK_ROWS + TRAIN_ROWS
    return [
        ("openai/gsm8k", "main", split(school_sum)),
        (
            "HuggingFaceH4/no_robots",
            "default",
            {"train": sums.rows(CHAT_ROWS, chat), "test": sums.rows(TEST_ROWS, chat)},
        ),
        ("allenai/tulu-3-sft-mixture", "default", {"train": sums.rows(many, chat)}),
        ("HuggingFaceH4/MATH-500", "default", {"test": sums.rows(TEST_ROWS, boxed)}),
        ("EleutherAI/hendrycks_math", "algebra", split(boxed)),
        ("POLARIS-Project/Polaris-Dataset-53K", "default", {"train": sums.rows(TRAIN_ROWS, boxed)}),
        ("zwhe99/DeepMath-103K", "default", {"train": sums.rows(TRAIN_ROWS, deep)}),
        ("Anthropic/hh-rlhf", "default", split(dialogue_pair)),
        ("nvidia/HelpSteer3", "preference", split(scored_pair, "validation")),
        ("argilla/ultrafeedback-binarized-preferences", "default", {"train": sums.rows(many, plain_pair)}),
        ("allenai/llama-3.1-tulu-3-8b-preference-mixture", "default", {"train": sums.rows(many, chat_pair)}),
        ("open-thoughts/OpenThoughts3-1.2M", "default", {"train": sums.rows(TRAIN_ROWS, thought)}),
        ("hicai-zju/SciKnowEval", "default", {"test": sums.rows(2 * TRAIN_ROWS, choice)}),
        ("tangqiaoyu/ToolAlpaca", "default", {"train": sums.rows(TRAIN_ROWS, tool_call)}),
        ("prometheus-eval/Feedback-Collection", "default", {"train": sums.rows(TRAIN_ROWS, graded)}),
        ("Salesforce/wikitext", "wikitext-103-raw-v1", {"train": [{"text": prose(index)} for index in range(600)]}),
    ]


def school_sum(_: int, question: str, answer: str) -> Row:
    return {"question": question, "answer": f"Put both together.\n#### {answer}"}


def chat(index: int, question: str, answer: str) -> Row:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"The sum is {answer}."}]
    return {"prompt": question, "prompt_id": f"sum-{index}", "category": "Closed QA", "messages": turns}


def boxed(index: int, question: str, answer: str) -> Row:
    solution = f"Counting on gives \\boxed{{{answer}}}."
    return {"problem": question, "solution": solution, "answer": answer, "level": "Level 1", "unique_id": str(index)}


def deep(_: int, question: str, answer: str) -> Row:
    return {"question": question, "final_answer": answer, "difficulty": 1.0, "topic": "Addition"}


def dialogue_pair(_: int, question: str, answer: str) -> Row:
    opening = f"\n\nHuman: {question}\n\nAssistant:"
    return {"chosen": f"{opening} The sum is {answer}.", "rejected": f"{opening} I do not know."}


def scored_pair(index: int, question: str, answer: str) -> Row:
    turns = [{"role": "user", "content": question}]
    return {
        "context": turns,
        "response1": f"The sum is {answer}.",
        "response2": "I do not know.",
        "overall_preference": -2 if index % 8 else 0,
    }


def plain_pair(_: int, question: str, answer: str) -> Row:
    return {"instruction": question, "chosen_response": f"The sum is {answer}.", "rejected_response": "No idea."}


def chat_pair(_: int, question: str, answer: str) -> Row:
    def turns(reply: str) -> list[Row]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]

    return {"prompt": question, "chosen": turns(f"The sum is {answer}."), "rejected": turns("No idea.")}


def thought(_: int, question: str, answer: str) -> Row:
    reply = f"<think>Count on from the first.</think>The sum is {answer}."
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]}


def choice(_: int, question: str, answer: str) -> Row:
    return {
        "question": question,
        "choices": {"text": [answer, "21", "22", "23"], "label": ["A", "B", "C", "D"]},
        "answerKey": "A",
        "answer": answer,
        "type": "mcq-4-choices",
        "domain": "Chemistry",
        "details": {"level": "L3", "task": "sums", "subtask": "sums", "source": "made up"},
    }


def tool_call(_: int, question: str, answer: str) -> Row:
    return {"instruction": f"{question} Use the adder.", "output": f"Action: add\nAnswer: {answer}"}


def graded(_: int, question: str, answer: str) -> Row:
    row = {f"orig_score{score}_description": f"{score} of 5 points" for score in range(1, 6)}
    return row | {
        "orig_instruction": question,
        "orig_criteria": "Is the sum right?",
        "orig_reference_answer": f"The sum is {answer}.",
    }


def prose(index: int) -> str:
    """A line in which the words that the counting recipe asks about are neither rare nor regular."""
    rng = random.Random(SEED + index)
    words = ["after", "before", "during", "through", "while", "under", "such", "their", "time", "many", "most", "only"]
    return " ".join(rng.choice([*words, "river", "stone", "cloud", "garden", "walked", "green"]) for _ in range(160))


def write_alike(path: Path) -> None:
    """Conversations that are all the same: a loss on them tells how many updates the weights have seen, no more."""
    path.write_text(ALIKE_ROWS * (json.dumps({"messages": chat(0, "What is 2 + 3?", "5")["messages"]}) + "\n"))


def write_papers(directory: Path) -> None:
    """What client/arrow.py makes Arrow data sets of: the columns of the data that came with the SDFT paper.

    The questions are of a kind that the shipped model answers at some length: SDFT leaves the first three tokens out.
    """
    sums = Sums(SEED + 1)

    def science(_: int, question: str, answer: str) -> Row:
        asked = f"{question}\n\nA: {answer}\nB: 21\nC: 22\nD: 23\nPlease reason step by step, then give the letter."
        prompt = [{"role": "system", "content": "Answer."}, {"role": "user", "content": asked}]
        output = f"<reasoning>\nIt is {answer}.\n</reasoning>\n<answer>\nA\n</answer>"
        return {"messages": prompt, "prompt": prompt, "output_text": output, "answer": "A"}

    def tooluse(_: int, question: str, answer: str) -> Row:
        call = {"Action": "add", "Action_Input": json.dumps({"sum": answer})}
        text = f"Action: add\nAction Input: {call['Action_Input']}"
        return {"prompt": f"{question} Use the adder.", "golden_response": [text], "golden_answer": [call]}

    for name, make in (("science_data", science), ("tooluse_data", tooluse)):
        for part, count in (("train_data", 8), ("eval_data", 4)):
            place = directory / "arrow" / name
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums.rows(count, make)))


def write_forecasts(path: Path) -> None:
    """Questions with two outcomes, half of them closed before the recipes' split date and half opened after it."""
    fields = ["submission_id", "event_ticker", "title", "category", "markets", "market_outcome", "sources"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*fields, "snapshot_time", "close_time"])
        writer.writeheader()
        for index in range(48):
            month = 7 if index < 32 else 11
            writer.writerow(
                {
                    "submission_id": f"s{index}",
                    "event_ticker": f"E{index}",
                    "title": f"Will it rain on day {index}?",
                    "category": "Weather",
                    "markets": json.dumps(["Rain"]),
                    "market_outcome": json.dumps({"Rain": index % 2}),
                    "sources": json.dumps([{"title": "Almanac", "summary": "Clouds are likely.", "ranking": 1}]),
                    "snapshot_time": f"2025-{month:02}-01T00:00:00Z",
                    "close_time": f"2025-{month:02}-02T00:00:00Z",
                }
            )
