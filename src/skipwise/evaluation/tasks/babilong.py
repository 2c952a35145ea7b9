"""BABILong-like tasks: facts of a small simulated world, scattered in order in the user's text.

The three tasks need one, two and three supporting facts; all other facts and the text distract.
A haystack goes through the model once for up to five questions about its world. The last line
starts the answer, so that base models can do it.

Differences from BABILong: another world (its people, places, things and sentences are ours, and
simulated for each haystack), the evaluation text as haystack, several questions for a haystack, an
answer that must be exactly the place, and fewer facts where they do not fit.

Source: Kuratov et al. 2024, arXiv 2406.10149, section 2; the first three tasks of Weston et al.
2015, arXiv 1502.05698, section 4.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skipwise.evaluation.scoring import Trial, exact_match
from skipwise.evaluation.tasks import prompts
from skipwise.evaluation.tasks.passkey import fill_prompts
from skipwise.evaluation.tasks.task import Task, TaskInputs, mean_row
from skipwise.report.rows import Rows

PEOPLE = ("Anton", "Birgit", "Carlos", "Doreen", "Emil", "Farida", "Goran", "Helga")
PLACES = ("bakery", "chapel", "harbour", "library", "museum", "orchard", "station", "windmill")
THINGS = ("basket", "blanket", "compass", "ladder", "lantern", "teapot", "umbrella", "violin")
NUM_FACTS = {"qa1": (2, 10), "qa2": (2, 68), "qa3": (4, 32)}  # fewest and most, as in BABILong
INTRO = (
    "Some sentences of this text say where people go and what they carry, in the order in which it "
    "happens. Remember where everyone and everything is."
)
_WAYS = ("cycled", "drove", "hurried", "walked")
_NUM_PEOPLE = 4  # in one world
_PER_HAYSTACK = 5


@dataclass(frozen=True, kw_only=True)
class Question:
    text: str  # with the start of the answer
    answer: str
    supports: tuple[int, ...]  # the facts that decide it


@dataclass
class World:
    """Where people and things are, after the facts so far."""

    facts: list[str] = field(default_factory=list)
    # place, and the fact that says so
    people: dict[str, tuple[str, int]] = field(default_factory=dict)
    # thing -> who carries it, and the fact that says so
    carried: dict[str, tuple[str, int]] = field(default_factory=dict)
    # place, and the two facts that say so
    things: dict[str, tuple[str, tuple[int, int]]] = field(default_factory=dict)
    # places of a thing in turn, with the three facts that say that it came there from the last one
    paths: dict[str, list[tuple[str, tuple[int, ...]]]] = field(default_factory=dict)

    def move(self, person: str, place: str, way: str) -> None:
        before, now = self.people.get(person), len(self.facts)
        self.facts.append(f"{person} {way} to the {place}.")
        self.people[person] = place, now
        for thing, (who, taken) in self.carried.items():
            if who == person and before is not None:
                self.things[thing] = place, (taken, now)
                self.paths[thing].append((place, tuple(sorted((before[1], taken, now)))))

    def take(self, person: str, thing: str) -> None:
        place, came = self.people[person]
        self.carried[thing] = person, len(self.facts)
        self.things[thing] = place, (came, len(self.facts))
        self.paths.setdefault(thing, [(place, ())])
        self.facts.append(f"{person} now carries the {thing}.")

    def leave(self, person: str, thing: str) -> None:
        del self.carried[thing]
        place, came = self.people[person]
        self.things[thing] = place, (came, len(self.facts))
        self.facts.append(f"{person} left the {thing} there.")

    def questions(self, kind: str) -> list[Question]:
        if kind == "qa1":
            return [
                _question(f"Where is {person}? {person} is", place, (fact,))
                for person, (place, fact) in self.people.items()
            ]
        if kind == "qa2":
            return [
                _question(f"Where is the {thing}? The {thing} is", place, facts)
                for thing, (place, facts) in self.things.items()
            ]
        asked = []
        for thing, path in self.paths.items():
            places = [place for place, _ in path]
            hops = [i for i in range(1, len(path)) if places.count(places[i]) == 1]
            if hops:  # else every place of the thing was its first or is ambiguous
                place, facts = path[hops[-1]]
                question = f"Where was the {thing} before it was at the {place}? Before, it was"
                asked.append(_question(question, places[hops[-1] - 1], facts))
        return asked


def _question(text: str, place: str, facts: Sequence[int]) -> Question:
    return Question(text=f"{text} at the", answer=place, supports=tuple(sorted(facts)))


def simulate(rng: np.random.Generator, kind: str, num_facts: int) -> World:
    """A world of so many facts with at least one question of the kind: `qa1`, `qa2` or `qa3`."""
    while True:
        world = World()
        people = _pick(rng, PEOPLE, _NUM_PEOPLE)
        while len(world.facts) < num_facts:
            _step(world, rng, people[int(rng.integers(len(people)))], kind != "qa1")
        if world.questions(kind):
            return world


def _step(world: World, rng: np.random.Generator, person: str, with_things: bool) -> None:
    here = world.people.get(person, ("", 0))[0]
    own = [thing for thing, (who, _) in world.carried.items() if who == person]
    free = [
        thing
        for thing in THINGS
        if thing not in world.carried and world.things.get(thing, (here,))[0] == here
    ]
    act = rng.random() if with_things and here else 1.0
    if act < 0.2 and own:
        world.leave(person, *_pick(rng, own, 1))
    elif act < 0.5 and free:
        world.take(person, *_pick(rng, free, 1))
    else:
        places = [place for place in PLACES if place != here]
        world.move(person, *_pick(rng, places, 1), *_pick(rng, _WAYS, 1))


def _pick(rng: np.random.Generator, among: Sequence[str], count: int) -> list[str]:
    return [among[int(i)] for i in rng.choice(len(among), count, replace=False).tolist()]


def make_trials(
    kind: str, tokenizer: Any, length: int, *, num_samples: int, words: Sequence[str], seed: int = 0
) -> list[Trial]:
    """Prompts with answers that fill `length` tokens, haystack by haystack; empty if none fits.

    Args:
        kind: `qa1`, `qa2` or `qa3`.
        words: of the text, with their whitespace; each haystack starts at its own place.
    """
    trials: list[Trial] = []
    haystack, guess = 0, 16
    fewest, most = NUM_FACTS[kind]
    while len(trials) < num_samples:
        rng = np.random.default_rng([seed, length, haystack, *kind.encode()])
        start, count = int(rng.integers(len(words))), int(rng.integers(fewest, most + 1))
        found = None
        while found is None:
            world = simulate(rng, kind, count)
            asked = world.questions(kind)
            chosen = sorted(rng.permutation(len(asked))[:_PER_HAYSTACK].tolist())
            asked = [asked[i] for i in chosen[: num_samples - len(trials)]]
            needles = list(zip(sorted(rng.random(count).tolist()), world.facts, strict=True))
            texts = [question.text for question in asked]
            text = prompts.questions_in_text(INTRO, words, start, needles, texts)
            found = fill_prompts(tokenizer, text, [q.answer for q in asked], length, guess)
            if found is None and count == fewest:
                return []
            count = max(fewest, count // 2)  # as many as a short context has room for
        guess = found[0]
        trials += [Trial.of_answer(ids, full, haystack=haystack) for ids, full in found[1]]
        haystack += 1
    return trials


def _measure(kind: str, inputs: TaskInputs) -> Rows:
    settings, length, words = inputs.settings, inputs.length, inputs.words
    if not words:
        return []
    num, seed = settings.samples, settings.seed
    trials = make_trials(kind, inputs.tokenizer, length, num_samples=num, words=words, seed=seed)
    if not trials:
        return []
    correct = exact_match(inputs.model, trials, settings.batch_tokens, inputs.tick)
    more = {"group": "babilong", "documents": [trial.haystack for trial in trials]}
    return [mean_row(f"babilong_{kind}", "exact_match", length, correct, **more)]


_ABOUT = {
    "qa1": ("where a person is", "one fact"),
    "qa2": ("where a thing is that people carry", "two facts"),
    "qa3": ("where a thing was before it came to a place", "three facts"),
}
TASKS = {
    f"babilong_{kind}": Task(
        name=f"babilong_{kind}",
        measure=functools.partial(_measure, kind),
        version=1,
        text="required",
        group="babilong",
        title=f"BABILong-like {kind}",
        about=f"Questions of {what}, decided by {num} of a simulated world in the text. A random "
        f"place is right in {100 / len(PLACES):.1f} % of them.",
    )
    for kind, (what, num) in _ABOUT.items()
}
