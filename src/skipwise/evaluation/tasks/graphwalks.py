"""Graphwalks: read the edges of a directed graph, and name the nodes around one of them.

Edges between nodes with random hexadecimal names fill the context. `graphwalks_parents` asks for
all nodes with an edge to a node, `graphwalks_bfs` for all nodes that are exactly d steps from it,
with d = 1; `graphwalks_bfs_2` and `graphwalks_bfs_3` go deeper. The score is the F1 of the set in
`Final Answer: [...]`; the prompt has a small worked example and ends with the start of this list.

Two defects of the published data are decided here. "At depth d" can be read as "up to depth d": we
ask for exactly d steps *and no fewer*, as the shortest way counts, and plant a shorter way to some
node at depths above 1. A node could be its own parent: no edge here leads from a node to itself.

A list of as many nodes of the graph, drawn at random, has the floor: their number over that of all
nodes. It falls with the context length, and rows state it (`floor`).

Source: the task of OpenAI's GPT-4.1 report, 2025 (openai/graphwalks); names, sizes and wording are
        ours
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from skipwise.evaluation.scoring import Trial
from skipwise.evaluation.tasks import prompts
from skipwise.evaluation.tasks.task import Task, TaskInputs, mean_row, text_scores
from skipwise.report.rows import Rows

Edge = tuple[str, str]

_MOST = 4  # nodes of an answer, and of each step on the way to it
_TOKENS_PER_NODE = 24  # of context; an edge takes about 12, so a node has about 2
_INTRO = "Each line is an edge of a directed graph, from one node to another."
_START = "Final Answer: ["


@dataclass(frozen=True, kw_only=True)
class Item:
    """A prompt, its answer and the number of nodes that it could be drawn from."""

    trial: Trial  # `answers` are the nodes
    num_nodes: int

    @property
    def floor(self) -> float:
        """The expected F1 of as many nodes, drawn at random from the others of the graph."""
        return len(self.trial.answers) / (self.num_nodes - 1)

    def score(self, generated: str) -> float:
        """The F1 of the set of nodes, 0 .. 1; 0 without a complete list."""
        found = re.search(r"Final Answer:\s*\[([^\]]*)\]", _START + generated)
        said = set(re.findall(r"[^\s,'\"]+", found[1])) if found else set()
        right = len(said & set(self.trial.answers))
        return 2 * right / (len(said) + len(self.trial.answers))


def make_items(
    tokenizer: Any, length: int, *, depth: int, num_samples: int, seed: int = 0
) -> list[Item]:
    """Items that fill `length` tokens with their answers; empty if one does not fit.

    Args:
        depth: d, steps to the nodes in the answer; 0 asks for the parents instead.
    """
    items = []
    num_edges: int | None = 16
    for i in range(num_samples):
        rng = np.random.default_rng([seed, length, i, depth, 4])
        nodes = _names(rng, max(20, length // _TOKENS_PER_NODE))
        planted, answer, closed = _plant(rng, nodes, depth)
        others = _other_edges(rng, nodes, closed, depth, max(16, length // 4))
        depths = rng.random(len(planted)).tolist()
        needles = [(at, " -> ".join(edge)) for at, edge in zip(depths, planted, strict=True)]
        example, last = _example(rng, depth), _question(nodes[0], depth)
        lines = [f"{' -> '.join(edge)}\n" for edge in others]

        def text(
            units: int,
            before: str = example,
            lines: Sequence[str] = lines,
            needles: Sequence[tuple[float, str]] = needles,
            last: str = last,
        ) -> str:
            edges = prompts.insert_needles(lines[:units], needles)
            return f"{before}\n\n{_INTRO}\n{edges}{last}"

        spoken = f"{', '.join(answer)}]"
        room = round(1.5 * len(tokenizer(spoken, add_special_tokens=False)["input_ids"])) + 4

        def size(units: int, text: Any = text, room: int = room) -> int:
            return prompts.count_tokens(tokenizer, text(units)) + room

        num_edges = prompts.fit_to_length(size, length, num_edges)
        if num_edges is None:
            return []
        shown = [*planted, *others[:num_edges]]
        trial = Trial(
            input_ids=prompts.token_ids(tokenizer, text(num_edges)),
            answers=tuple(answer),
            max_new_tokens=room,
        )
        items.append(Item(trial=trial, num_nodes=len({node for edge in shown for node in edge})))
    return items


def _plant(
    rng: np.random.Generator, nodes: Sequence[str], depth: int
) -> tuple[list[Edge], list[str], set[str]]:
    """Edges that make the answer, the answer, and the nodes whose edges would change it.

    Other edges must not start in a closed node, or end in it where the parents are asked for.
    """
    asked, rest = nodes[0], list(nodes[1:])
    levels = [[asked]]
    edges: list[Edge] = []
    for _ in range(max(1, depth)):
        level = [rest.pop() for _ in range(int(rng.integers(1, _MOST + 1)))]
        edges += [(levels[-1][int(rng.integers(len(levels[-1])))], node) for node in level]
        levels.append(level)
    if depth > 1:  # a walk of d steps that ends in a node of fewer
        edges.append((levels[-2][0], levels[1][-1] if depth > 2 else asked))
    others = [rest.pop() for _ in range(int(rng.integers(1, _MOST + 1)))]
    edges += [(node, asked) for node in others]  # the opposite direction
    if depth == 0:
        return [(b, a) for a, b in edges], levels[1], {asked}
    return edges, levels[-1], {node for level in levels[:-1] for node in level}


def _other_edges(
    rng: np.random.Generator, nodes: Sequence[str], closed: set[str], depth: int, count: int
) -> list[Edge]:
    """Random edges between different nodes that do not change the answer."""
    drawn: list[list[int]] = rng.integers(0, len(nodes), (count, 2)).tolist()
    edges = [(nodes[a], nodes[b]) for a, b in drawn if a != b]
    return [edge for edge in edges if edge[1 if depth == 0 else 0] not in closed]


def _example(rng: np.random.Generator, depth: int) -> str:
    """A way of one or d edges and one edge beside it, with its question and answer."""
    *way, one, other = _names(rng, max(1, depth) + 3)
    edges = [*pairwise(way), (one, other)]
    asked, answer = (way[1], way[0]) if depth == 0 else (way[0], way[-1])
    lines = "".join(f"{a} -> {b}\n" for a, b in edges)
    return f"{_INTRO}\n{lines}{_question(asked, depth)}{answer}]"


def _question(node: str, depth: int) -> str:
    if depth == 0:
        return f"Which nodes have an edge to {node}? {_START}"
    steps = "1 step" if depth == 1 else f"{depth} steps"
    return f"Which nodes are exactly {steps} from {node}, and no fewer? {_START}"


def _names(rng: np.random.Generator, count: int) -> list[str]:
    digits = 4 if count < 20_000 else 8
    numbers = rng.choice(16**digits, count, replace=False).tolist()
    return [f"{number:0{digits}x}" for number in numbers]


def _measure(name: str, inputs: TaskInputs) -> Rows:
    length, num, seed = inputs.length, inputs.settings.samples, inputs.settings.seed
    items = make_items(inputs.tokenizer, length, depth=DEPTHS[name], num_samples=num, seed=seed)
    if not items:
        return []
    scores = text_scores(inputs, items)
    floor = round(sum(item.floor for item in items) / len(items), 4)
    return [mean_row(name, "f1", length, scores, group="graphwalks", floor=floor)]


DEPTHS = {
    "graphwalks_parents": 0,
    "graphwalks_bfs": 1,
    "graphwalks_bfs_2": 2,
    "graphwalks_bfs_3": 3,
}
_ASKED = ("with an edge to a node", "exactly 1 step", "exactly 2 steps", "exactly 3 steps")
TASKS = {
    name: Task(
        name=name,
        measure=functools.partial(_measure, name),
        group="graphwalks" if depth < 2 else "",  # the others by their own name alone
        title=f"Graphwalks: nodes {_ASKED[depth]}{' from a node' if depth else ''}",
        about="F1 of the set of nodes in the answer. As many nodes drawn at random would have "
        "about 60 divided by the context length.",
        is_share=True,
    )
    for name, depth in DEPTHS.items()
}
