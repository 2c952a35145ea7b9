"""Needles that share no content word with the question: the model must know what links them.

A needle says beside which landmark somebody lives; the question asks who has been to its city or
country. Five people with made-up names, far apart in the user's text, distract from each other, and
a haystack goes through the model once for all of them. `shared_words` checks that nothing can be
found by its words.

The score is also given relative to the model's base score, the best at 256, 512 and 1,024 tokens
inside its own window. The effective length is the last one with at least 85 % of the base score.

Differences from NoLiMa: needles, questions and names are ours; five needles in a haystack, not one;
the answer must be exactly the name; the base score is the best of three means, not the mean over
needles of each one's best.

Source: Modarressi et al. 2025, arXiv 2502.05167, sections 3 and 4.3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from skipwise.evaluation.scoring import Tick, Trial, exact_match
from skipwise.evaluation.tasks import prompts
from skipwise.evaluation.tasks.passkey import fill_prompts
from skipwise.evaluation.tasks.task import Task, TaskInputs, mean_row
from skipwise.report.rows import Rows

NAME = "needle_nonliteral"
# landmark, city, country
LANDMARKS = (
    ("the Eiffel Tower", "Paris", "France"),
    ("the Colosseum", "Rome", "Italy"),
    ("the Brandenburg Gate", "Berlin", "Germany"),
    ("the Sagrada Família", "Barcelona", "Spain"),
    ("the Parthenon", "Athens", "Greece"),
    ("Big Ben", "London", "England"),
    ("Schönbrunn Palace", "Vienna", "Austria"),
    ("the Rijksmuseum", "Amsterdam", "the Netherlands"),
    ("the Atomium", "Brussels", "Belgium"),
    ("the Little Mermaid statue", "Copenhagen", "Denmark"),
    ("the Vasa Museum", "Stockholm", "Sweden"),
    ("the Vigeland sculpture park", "Oslo", "Norway"),
    ("the Hallgrímskirkja", "Reykjavik", "Iceland"),
    ("the Ha'penny Bridge", "Dublin", "Ireland"),
    ("Belém Tower", "Lisbon", "Portugal"),
    ("the Charles Bridge", "Prague", "the Czech Republic"),
    ("Wawel Castle", "Krakow", "Poland"),
    ("the Fisherman's Bastion", "Budapest", "Hungary"),
    ("the Hagia Sophia", "Istanbul", "Turkey"),
    ("the Kremlin", "Moscow", "Russia"),
    ("the Motherland Monument", "Kyiv", "Ukraine"),
    ("the House of the Blackheads", "Riga", "Latvia"),
    ("the Chapel Bridge", "Lucerne", "Switzerland"),
    ("Diocletian's Palace", "Split", "Croatia"),
    ("the Great Sphinx", "Giza", "Egypt"),
    ("the Hassan II Mosque", "Casablanca", "Morocco"),
    ("Table Mountain", "Cape Town", "South Africa"),
    ("the Karen Blixen house", "Nairobi", "Kenya"),
    ("the Burj Khalifa", "Dubai", "the United Arab Emirates"),
    ("the Western Wall", "Jerusalem", "Israel"),
    ("the Azadi Tower", "Tehran", "Iran"),
    ("the Taj Mahal", "Agra", "India"),
    ("the Badshahi Mosque", "Lahore", "Pakistan"),
    ("the Boudhanath Stupa", "Kathmandu", "Nepal"),
    ("the Forbidden City", "Beijing", "China"),
    ("the Senso-ji temple", "Tokyo", "Japan"),
    ("Gyeongbokgung Palace", "Seoul", "South Korea"),
    ("Wat Arun", "Bangkok", "Thailand"),
    ("the Petronas Towers", "Kuala Lumpur", "Malaysia"),
    ("the Monas obelisk", "Jakarta", "Indonesia"),
    ("Hoan Kiem Lake", "Hanoi", "Vietnam"),
    ("Fort Santiago", "Manila", "the Philippines"),
    ("Bondi Beach", "Sydney", "Australia"),
    ("the Sky Tower", "Auckland", "New Zealand"),
    ("the Statue of Liberty", "New York", "the United States"),
    ("the CN Tower", "Toronto", "Canada"),
    ("the Angel of Independence", "Mexico City", "Mexico"),
    ("the Christ the Redeemer statue", "Rio de Janeiro", "Brazil"),
    ("the Casa Rosada", "Buenos Aires", "Argentina"),
    ("Huaca Pucllana", "Lima", "Peru"),
    ("Monserrate Hill", "Bogotá", "Colombia"),
)
INTRO = "Read this text. At its end is a question about the people in it. The answer is a name."
BASE_LENGTHS = (256, 512, 1024)
NUM_PEOPLE = 5  # in a haystack
_FUNCTION_WORDS = frozenset(
    ("a", "and", "by", "de", "has", "been", "in", "is", "of", "on", "one", "s", "the", "to", "who")
)
# of one evaluation, which loads one model: results by length and settings
_MEASURED: WeakKeyDictionary[Any, dict[Any, list[bool]]] = WeakKeyDictionary()


def needle(name: str, landmark: str) -> str:
    return f"{name} lives right beside {landmark}."


def question(place: str) -> str:
    """The question, with the start of the answer."""
    return f"Who has been to {place}? The one who has been to {place} is"


def shared_words(text: str, other: str) -> set[str]:
    """The content words of a text that another has too; words with equal stems are the same.

    The stem is the first five letters: `Italy` and `Italian`.
    """
    one, two = (
        {word[:5] for word in re.findall(r"\w+", t.casefold()) if word not in _FUNCTION_WORDS}
        for t in (text, other)
    )
    return one & two


def make_trials(
    tokenizer: Any, length: int, *, num_samples: int, words: Sequence[str], seed: int = 0
) -> list[Trial]:
    """Prompts with answers that fill `length` tokens, haystack by haystack; empty if none fits.

    Args:
        words: of the text, with their whitespace; each haystack starts at its own place.
    """
    trials: list[Trial] = []
    haystack, guess = 0, 16
    while len(trials) < num_samples:
        rng = np.random.default_rng([seed, length, haystack, *b"nonliteral"])
        start = int(rng.integers(len(words)))
        depths = (np.arange(NUM_PEOPLE) + rng.random(NUM_PEOPLE)) / NUM_PEOPLE
        names, lines, asked = _people(rng)
        needles = list(zip(depths.tolist(), lines, strict=True))
        order = rng.permutation(NUM_PEOPLE)[: num_samples - len(trials)].tolist()
        texts = [asked[i] for i in order]
        text = prompts.questions_in_text(INTRO, words, start, needles, texts)
        keys = [names[i] for i in order]
        found = fill_prompts(tokenizer, text, keys, length, guess)
        if found is None:
            return []
        guess = found[0]
        trials += [
            Trial.of_answer(ids, full, float(depths[i]), haystack)
            for i, (ids, full) in zip(order, found[1], strict=True)
        ]
        haystack += 1
    return trials


def _people(rng: np.random.Generator) -> tuple[list[str], list[str], list[str]]:
    """Names, needles and questions of people beside different landmarks.

    No needle has a content word of a question. Names are made up: no name hints at a country.
    """
    while True:
        chosen = [LANDMARKS[i] for i in rng.permutation(len(LANDMARKS))[:NUM_PEOPLE].tolist()]
        names = [word.capitalize() for word in prompts.random_words(rng, NUM_PEOPLE)]
        lines = [needle(name, row[0]) for name, row in zip(names, chosen, strict=True)]
        asked = [question(row[1 + int(rng.integers(2))]) for row in chosen]
        if not any(shared_words(line, one) for line in lines for one in asked):
            return names, lines, asked


def _results(inputs: TaskInputs, length: int, tick: Tick | None = None) -> list[bool]:
    """Whether each answer is right, at a length that may be another than the one asked for."""
    known = _MEASURED.setdefault(inputs.load_model, {})
    settings, key = inputs.settings, (length, inputs.settings)
    if key not in known and (words := inputs.haystack(2 * length)):
        trials = make_trials(
            inputs.tokenizer, length, num_samples=settings.samples, words=words, seed=settings.seed
        )
        batch = settings.batch_tokens
        known[key] = exact_match(inputs.model, trials, batch, tick) if trials else []
    return known.get(key, [])


def _base_score(inputs: TaskInputs) -> float | None:
    """The best score at short lengths inside the model's window; None if it may be chance."""
    config = inputs.model.config.get_text_config(decoder=True)
    window = getattr(config, "max_position_embeddings", None) or BASE_LENGTHS[-1]
    lengths = [n for n in BASE_LENGTHS if n <= window]
    rows = [mean_row(NAME, "", n, r) for n in lengths if (r := _results(inputs, n))]
    best = max(rows, key=lambda row: row["value"], default=None)
    return best["value"] if best and best["low"] > 1 / NUM_PEOPLE else None


def _measure(inputs: TaskInputs) -> Rows:
    correct = _results(inputs, inputs.length, inputs.tick)
    if not correct:
        return []
    haystacks = [i // NUM_PEOPLE for i in range(len(correct))]
    row = mean_row(NAME, "exact_match", inputs.length, correct, documents=haystacks)
    base = _base_score(inputs)
    if base is None:
        return [row]
    share = {"value": min(1.0, row["value"] / base), "low": None, "high": None}
    relative = {**row, **share, "metric": "share of the base score"}
    del relative["samples"], relative["documents"]
    return [row, relative]


TASKS = {
    NAME: Task(
        name=NAME,
        measure=_measure,
        version=1,
        text="required",
        title="Needles without shared words",
        about="The question shares no content word with the needle. Naming any of the "
        f"{NUM_PEOPLE} people in the text is right in {100 // NUM_PEOPLE} %. The base score is "
        "the model's best at 256, 512 and 1,024 tokens; the effective length is the last one with "
        "at least 85 % of it (NoLiMa's rule).",
    )
}
