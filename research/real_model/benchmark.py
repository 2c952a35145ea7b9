"""A likelihood benchmark of held-out text for lm-evaluation-harness: which passage follows?

A question is 72 words of a held-out document and four passages: the one that follows it, and
three from elsewhere in the same document. It needs short context only, so it shows what an
extension costs where nothing should change.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

TASK = """task: next-passage
dataset_path: json
dataset_kwargs: {data_files: {validation: questions.jsonl}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


def make_benchmark(documents: Path, folder: Path, count: int, answer: int, seed: int = 0) -> None:
    """Write the task and its questions, the same for the same documents.

    Args:
        answer: words of a passage; the words before it are three times as many.
    """
    query, both = 3 * answer, 4 * answer
    words = [json.loads(line)["text"].split() for line in documents.open(encoding="utf-8")]
    words = [one for one in words if len(one) > 8 * both]
    rng, lines = np.random.default_rng(seed), []
    for i in range(count):
        text = words[i % len(words)]
        starts = rng.choice(len(text) // both, 4, replace=False) * both
        passages = [" ".join(text[s + query : s + both]) for s in starts]
        gold = int(rng.integers(4))
        passages[0], passages[gold] = passages[gold], passages[0]
        before = " ".join(text[starts[0] : starts[0] + query])
        lines.append(json.dumps({"query": before, "choices": passages, "gold": gold}) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "next-passage.yaml").write_text(TASK, encoding="utf-8")
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
