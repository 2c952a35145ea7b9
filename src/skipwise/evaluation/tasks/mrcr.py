"""MRCR: the same request came several times; repeat the answer that was given the k-th time.

The context is a list of requests "Write a {form} about {topic}.", each with its answer. One request
comes n times, each time with another answer; all others are near misses, with the same form or the
same topic. The last request asks for the k-th of the n answers, with some random characters, the
hash, before it.

A base model would not know what to do, so its prompt ends with the hash and the first words of the
answer, which are the same in all n; they tell the request but not the number. With a chat template
nothing is given, and an answer without the hash counts 0. The score is the share of equal words
between the text after these words and the right one, difflib's ratio. A model that repeats one of
the n at random has the floor (1 + (n - 1) r) / n, where r is the mean ratio of two of our texts.

Differences from the published task: short texts of generated words instead of a model's; all
requests of a chat are in one turn; ratios are of words, because two texts of a few hundred
characters have a third of them in common by chance.

Source: Vodrahalli et al. 2024, arXiv 2409.12640, section 4; 2, 4 and 8 needles and the hash are
        those of OpenAI-MRCR
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from skipwise.evaluation.scoring import Trial
from skipwise.evaluation.tasks import prompts
from skipwise.evaluation.tasks.task import Task, TaskInputs, mean_row, text_scores
from skipwise.report.rows import Rows

NUM_WORDS = 16  # of an answer, after its opening
FLOORS = {2: 0.52, 4: 0.29, 8: 0.17}  # of a random one of the n answers; a test measures them
_MARGIN = 8  # tokens of the answer beyond those of the longest of the n
_ORDINALS = ("1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th")
_WORD_LISTS = (
    "poem riddle letter speech fable song joke prayer toast review sermon story",
    "rivers bread winter clocks horses bridges salt gardens thunder ladders honey mirrors "
    "harbours candles maps wolves barley tunnels feathers kettles islands orchards ropes lanterns",
    "amber ancient angry autumn barrel basket beacon beetle bitter blanket borrow bottle branch "
    "brave brick broken bronze bucket button cabin camel canvas carpet castle cellar chalk cherry "
    "chimney circle clever cloud clover coal cobbler coffee copper coral corner cotton cousin "
    "cradle cricket crooked crown crystal curtain dancer desert diamond distant doctor donkey "
    "double dragon drawer dream drum dusty eager eagle early east echo edge eleven ember empty "
    "engine evening fabric falcon famous farmer fence ferry fiddle finger flame flour forest "
    "fossil fountain freckle frost funnel furnace garlic gather gentle giant ginger glass goblet "
    "golden goose grain granite gravel green guest guitar hammer handle hazel heavy helmet hidden "
    "hill hollow hungry idle ink iron ivory jacket jewel jungle kettle kind kitchen knight lake "
    "lazy leather lemon lively lizard lonely loud magnet maple marble market meadow medal melon "
    "midnight minor modest monkey morning mossy motor mountain narrow needle nephew nine noisy "
    "north nut oak ocean olive onion orange orbit oyster paint palace paper parrot patient pebble "
    "pencil pepper pillow pilot pine planet plenty pocket polish pony porch potato powder proud "
    "puppet purple puzzle quarrel quick quiet rabbit radio raven ribbon robin rocket rough round "
    "rusty saddle sailor sand scarlet shadow shallow sharp sheep shelf shiver silent silver simple "
    "sister sleepy slow smoke soldier south spark spider spoon square stable steady steam stone "
    "storm straw sugar summer swift table tailor tall teacher tender thick thin thirsty thread "
    "tiger timber tiny tired tower trumpet turtle twelve twin uncle upper valley velvet village "
    "violet violin walnut warm wax weary west wheat whisper whistle wide wild window wise wooden "
    "wrinkle yellow young",
)
_FORMS, _TOPICS, _WORDS = (text.split() for text in _WORD_LISTS)


@dataclass(frozen=True, kw_only=True)
class Item:
    """A prompt, and what is needed to score its answer."""

    trial: Trial
    given: str  # the start of the answer that the prompt ends with; empty in a chat
    hash: str
    opening: str  # the first words of all n answers
    bodies: tuple[str, ...]  # what follows the opening in each of them, in order
    asked: int  # index of the right one

    def score(self, generated: str) -> float:
        """The ratio of equal words, 0 .. 1; 0 without the hash."""
        answer = " ".join(f"{self.given} {generated}".split())
        if not answer.startswith(self.hash):
            return 0.0
        body = answer[len(self.hash) :].strip().removeprefix(self.opening)
        return ratio(body, self.bodies[self.asked])


def ratio(one: str, other: str) -> float:
    """Twice the words in common, in order, over the words of both."""
    return SequenceMatcher(None, one.split(), other.split(), autojunk=False).ratio()


def make_items(
    tokenizer: Any, length: int, *, num_needles: int, num_samples: int, seed: int = 0
) -> list[Item]:
    """Items that fill `length` tokens with their answers; empty if one does not fit."""
    chat = isinstance(tokenizer, prompts.ChatPrompts)
    items: list[Item] = []
    num_words: int | None = 16
    for i in range(num_samples):
        rng = np.random.default_rng([seed, length, i, num_needles, 3])
        form, topic = _FORMS[rng.integers(len(_FORMS))], _TOPICS[rng.integers(len(_TOPICS))]
        bodies = tuple(_body(rng) for _ in range(num_needles))
        depths = np.sort(rng.random(num_needles)).tolist()
        asked, order = int(rng.integers(num_needles)), int(rng.integers(1 << 30))
        code = rng.bytes(4).hex()
        opening = f"A {form} about {topic}:"
        needles = [(d, f"{_turn(form, topic, b)}\n") for d, b in zip(depths, bodies, strict=True)]
        question = f"Prepend {code} to the {_ORDINALS[asked]} (1 indexed) {form} about {topic}."
        given = "" if chat else f"{code} {opening}"

        def text(
            units: int,
            needles: Sequence[tuple[float, str]] = needles,
            last: str = f"{question}\n{given}",
            about: tuple[str, str, int] = (form, topic, order),
        ) -> str:
            turns = [f"{turn}\n\n" for turn in _near_misses(*about, units)]
            return f"{prompts.insert_needles(turns, needles)}{last}"

        more = f"{code} {opening} " if chat else ""
        room = _MARGIN + max(_count(tokenizer, f" {more}{body}") for body in bodies)

        def size(units: int, text: Any = text, room: int = room) -> int:
            return prompts.count_tokens(tokenizer, text(units)) + room

        num_words = prompts.fit_to_length(size, length, num_words)
        if num_words is None:
            return []
        ids = prompts.token_ids(tokenizer, text(num_words))
        answers = (f"{more}{bodies[asked]}",)
        trial = Trial(input_ids=ids, answers=answers, max_new_tokens=room)
        items.append(
            Item(trial=trial, given=given, hash=code, opening=opening, bodies=bodies, asked=asked)
        )
    return items


def _near_misses(form: str, topic: str, order: int, num_words: int) -> list[str]:
    """Other turns with this many words of answers in all; the last answer may be shorter.

    Counting words fills a context more closely than counting turns. A longer list begins with the
    same turns as a shorter one.
    """
    rng = np.random.default_rng(order)
    forms = [other for other in _FORMS if other != form]
    topics = [other for other in _TOPICS if other != topic]
    turns = []
    for start in range(0, num_words, NUM_WORDS):
        same_topic, pick = rng.integers(2), int(rng.integers(len(forms) * len(topics)))
        topic_at, form_at = divmod(pick, len(forms))
        about = (forms[form_at], topic) if same_topic else (form, topics[topic_at])
        turns.append(_turn(*about, _body(rng, num_words - start)))
    return turns


def _turn(form: str, topic: str, body: str) -> str:
    return f"Write a {form} about {topic}.\nA {form} about {topic}: {body}"


def _body(rng: np.random.Generator, most: int = NUM_WORDS) -> str:
    drawn = rng.choice(len(_WORDS), NUM_WORDS, replace=False)
    return " ".join(_WORDS[i] for i in drawn[:most].tolist())


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _measure(num_needles: int, inputs: TaskInputs) -> Rows:
    length, num, seed = inputs.length, inputs.settings.samples, inputs.settings.seed
    items = make_items(
        inputs.tokenizer, length, num_needles=num_needles, num_samples=num, seed=seed
    )
    if not items:
        return []
    scores, more = text_scores(inputs, items), {"group": "mrcr", "floor": FLOORS[num_needles]}
    return [mean_row(f"mrcr_{num_needles}", "ratio", length, scores, **more)]


TASKS = {
    f"mrcr_{n}": Task(
        name=f"mrcr_{n}",
        measure=functools.partial(_measure, n),
        group="mrcr",
        title=f"MRCR, {n} needles",
        about=f"Share of equal words with the one of {n} answers that is asked for by its number. "
        f"A random one of the {n} would have {100 * floor:.0f} %.",
        is_share=True,
    )
    for n, floor in FLOORS.items()
}
