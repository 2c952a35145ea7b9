"""Made-up questions in the formats of the six data sets of short-benchmarks, with what is right.

Each function gives row i of its data set, the statements that are right and those that are wrong,
as they end lm-eval's prompt and answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus")
FORMS = ("cup", "jar", "box", "tin", "bag")


def boolq(i: int) -> tuple[dict[str, Any], list[str], list[str]]:
    held, asked = 10 + i, 10 + i + i % 2
    row = {"passage": f"The {FORMS[i % 5]} number {i} holds {held} beans."}
    row |= {"question": f"does number {i} hold {asked} beans", "label": int(held == asked)}
    end = f"beans.\nQuestion: {row['question']}?\nAnswer:"
    answers = [f"{end} no", f"{end} yes"]
    return row, [answers[row["label"]]], [answers[1 - row["label"]]]


def piqa(i: int) -> tuple[dict[str, Any], list[str], list[str]]:
    ways = [f"turn the lid {i + 2} times", f"paint the lid with {i + 2} colours of your choice"]
    row = {"goal": f"open jar number {i}", "sol1": ways[i % 2], "sol2": ways[1 - i % 2]}
    end = f"Question: {row['goal']}\nAnswer: "
    return {**row, "label": i % 2}, [end + ways[0]], [end + ways[1]]


def winogrande(i: int) -> tuple[dict[str, Any], list[str], list[str]]:
    right, wrong = NAMES[i % 7], NAMES[(i + 3) % 7]
    sentence = (
        f"{right} gave {wrong} {i + 2} coins, so the poorer one by {i + 2} coins was _ today."
    )
    options = [right, wrong] if i % 2 else [wrong, right]
    row = {"sentence": sentence, "option1": options[0], "option2": options[1]}
    row["answer"] = str(1 + options.index(right))
    return row, [sentence.replace("_", right)], [sentence.replace("_", wrong)]


def truthfulqa_mc2(i: int) -> tuple[dict[str, Any], list[str], list[str]]:
    right = [f"It has {i + 3} corners", f"There are {i + 3} of them"]
    wrong = [f"It has {i + 9} corners", "Nobody can count them", f"The {i + 4} are round"]
    question = f"How many corners has a figure of {i + 3} sides?"
    targets = {"choices": right + wrong, "labels": [1, 1, 0, 0, 0]}
    row = {"question": question, "mc1_targets": targets, "mc2_targets": targets}
    end = f"\n\nQ: {question}\nA: "
    return row, [end + choice for choice in right], [end + choice for choice in wrong]


def arc_challenge(i: int) -> tuple[dict[str, Any], list[str], list[str]]:
    total = 5 + 2 * i
    texts = [str(total + 1), str(total + 20), f"{total} and a half"]
    texts.insert(i % 4, str(total))
    row = {"question": f"Which number is {i} plus {i + 5}?", "answerKey": "ABCD"[i % 4]}
    row["choices"] = {"text": texts, "label": list("ABCD")}
    ends = [f"Question: {row['question']}\nAnswer: {text}" for text in texts]
    return row, [ends[i % 4]], ends[: i % 4] + ends[i % 4 + 1 :]


def hellaswag(i: int) -> tuple[dict[str, Any], list[str], list[str]]:
    endings = [f"eats {i + 1} of the shoes.", f"sings to {i} lamps.", "melts. [step] It rains."]
    endings.insert(i % 4, f"counts {i + 2} coins.")
    row = {"activity_label": "Paying", "ctx_a": f"{NAMES[i % 7]} opens purse {i}.", "ctx_b": "she"}
    row |= {"ind": i, "endings": endings, "label": str(i % 4)}
    clean = [ending.replace("[step] ", "") for ending in endings]
    ends = [f"Paying: {row['ctx_a']} She {ending}" for ending in clean]
    return row, [ends[i % 4]], ends[: i % 4] + ends[i % 4 + 1 :]


TASKS: dict[str, Callable[[int], tuple[dict[str, Any], list[str], list[str]]]] = {
    task.__name__: task
    for task in (boolq, piqa, winogrande, truthfulqa_mc2, arc_challenge, hellaswag)
}


def write_task(
    folder: Path, name: str, splits: dict[str, list[dict[str, Any]]], **more: Any
) -> None:
    for split, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.{split}.jsonl").write_text(lines)
    kwargs = {
        "data_files": {split: f"{name}.{split}.jsonl" for split in splits},
        "cache_dir": str(folder / "cache"),
    }
    config = {"include": name, "task": name, "dataset_path": "json", "dataset_kwargs": kwargs}
    (folder / f"{name}.yaml").write_text(json.dumps({**config, **more}))
