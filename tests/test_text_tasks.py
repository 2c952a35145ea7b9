"""Tasks in the user's text: BABILong-like worlds, needles without shared words, copying."""

import hashlib
import re
import types
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from chats import CHATML, tokenizer_with
from oracle import Oracle
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from skipwise.config.recipe import EvalSettings
from skipwise.evaluation.evaluator import EvalModel, Texts, evaluate_model, find_tasks
from skipwise.evaluation.scoring import answer_tokens
from skipwise.evaluation.tasks import TASKS, TaskInputs, babilong, copy_far, nonliteral
from skipwise.evaluation.tasks.prompts import ChatPrompts, haystack_words, token_ids
from skipwise.pipeline.quickstart import MODEL
from skipwise.report import format_table

KINDS = ("qa1", "qa2", "qa3")
NAMES = (*(f"babilong_{kind}" for kind in KINDS), "needle_nonliteral", "copy_far")
PEOPLE, PLACES, THINGS = ("|".join(x) for x in (babilong.PEOPLE, babilong.PLACES, babilong.THINGS))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def documents(tokenizer):
    lines = [f"def f{i}(x, y={i * i}):\n    return x + {i} * y\n" for i in range(1000)]
    return [np.array(token_ids(tokenizer, "".join(lines)))]


@pytest.fixture(scope="module")
def words(tokenizer, documents):
    return haystack_words(tokenizer, documents, 20000)


def trials(name, tokenizer, length, words, count=6, seed=0):
    common = {"num_samples": count, "words": words, "seed": seed}
    if name == "copy_far":
        return list(chain(*copy_far.make_trials(tokenizer, length, **common)))
    if name == "needle_nonliteral":
        return nonliteral.make_trials(tokenizer, length, **common)
    return babilong.make_trials(name.removeprefix("babilong_"), tokenizer, length, **common)


def answer(tokenizer, trial):
    return tokenizer.decode(trial.input_ids[-trial.num_answer :]).strip()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [600, 2048])
def test_prompts_fill_the_window_with_their_answers(name, length, tokenizer, words):
    made = trials(name, tokenizer, length, words)
    assert len(made) == (12 if name == "copy_far" else 6)
    longest: dict[int, int] = {}
    for trial in made:
        assert length - 45 <= trial.reach <= length  # the answers of a haystack differ in length
        longest[trial.haystack] = max(longest.get(trial.haystack, 0), trial.reach)
    assert min(longest.values()) >= length - 12


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_fixes_the_set_and_another_makes_another(name, tokenizer, words):
    one, again, other = (trials(name, tokenizer, 700, words, 12, seed) for seed in (0, 0, 1))
    assert one == again and one != other
    assert len({tuple(t.input_ids) for t in one}) == len(one)
    assert len({t.haystack for t in one}) >= 3


def test_the_prompts_are_the_same_on_every_platform(tokenizer, words):
    found = {}
    for name in NAMES:
        ids = [trial.input_ids for trial in trials(name, tokenizer, 700, words, 12)]
        found[name] = hashlib.sha256(repr(ids).encode()).hexdigest()[:12]
    assert found == HASHES


HASHES = {
    "babilong_qa1": "567a6a587fc1",
    "babilong_qa2": "a12fa90dd3bf",
    "babilong_qa3": "51557ef1bb84",
    "needle_nonliteral": "4af8269c0b4d",
    "copy_far": "f4fdfc9301c8",
}


def score(model, tokenizer, documents, length, names=NAMES, count=12):
    settings = EvalSettings(tasks=names, samples=count)
    eval_model = EvalModel(label="it", load=lambda: model, tokenizer=tokenizer)
    return evaluate_model(
        eval_model, Texts(documents=documents), [length], settings, progress=False
    )


def tell(model, name, tokenizer, documents, length, count, say=lambda trial: None):
    """Teach a model to answer each trial, or to say other tokens for it."""
    words = haystack_words(tokenizer, documents, 2 * length)
    made = trials(name, tokenizer, length, words, count)
    for trial in made[:count]:  # not the controls
        said = say(trial) or trial.input_ids[-trial.num_answer :]
        # teacher forcing: what it says after each token of the right answer
        for i, token in enumerate(said[: trial.num_answer]):
            model.next[np.array(trial.input_ids[: len(trial.prompt) + i]).tobytes()] = token


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_an_oracle_scores_everything_and_a_mute_model_nothing(value, tokenizer, documents):
    model = Oracle()
    for name in NAMES if value else ():
        for length in (256, 512, 1024, 700):  # the base score's, too
            tell(model, name, tokenizer, documents, length, 12)
    rows = score(model, tokenizer, documents, 700)
    assert {row["task"] for row in rows} == set(NAMES)
    for row in rows:
        assert row["num_samples"] == 12
        assert row["value"] == (0.0 if row["metric"] == "without the passage" else value), row
        if row["task"] == "copy_far":
            assert row["low"] is None  # of 3 haystacks
    relative = [row for row in rows if row["metric"] == "share of the base score"]
    assert len(relative) == (1 if value else 0)  # no share of nothing


@pytest.mark.extended
def test_random_answers_score_the_stated_floors(tokenizer, documents):
    rng, model = np.random.default_rng(0), Oracle()
    begin = len(token_ids(tokenizer, ""))
    places = [token_ids(tokenizer, f" {place}")[begin:] for place in babilong.PLACES]
    for kind in KINDS:
        tell(
            *(model, f"babilong_{kind}", tokenizer, documents, 400, 80),
            lambda trial: places[int(rng.integers(len(places)))],
        )

    def somebody(trial):
        text = tokenizer.decode(trial.prompt)
        people = re.findall(r"\n(\w+) lives right beside", text)
        return token_ids(tokenizer, f" {people[int(rng.integers(len(people)))]}")[begin:]

    def anything(trial):
        return rng.integers(10, 1000, trial.num_answer).tolist()

    tell(model, "needle_nonliteral", tokenizer, documents, 400, 80, somebody)
    tell(model, "copy_far", tokenizer, documents, 400, 80, anything)
    rows = score(model, tokenizer, documents, 400, count=80)
    for row in rows:
        floor = 1 / 8 if "babilong" in row["task"] else 1 / 5
        floor = floor if row["metric"] == "exact_match" else 0.0
        assert abs(row["value"] - floor) < 0.13, row
        if "exact_match" in row["metric"]:
            assert f"{100 * floor:g} %" in TASKS[row["task"]].about
    assert {row["task"] for row in rows} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_asks_through_the_chat_template(name, words):
    tokenizer = tokenizer_with(CHATML)
    made = trials(name, ChatPrompts(tokenizer), 700, words)
    assert made
    for trial in made:
        assert 640 < trial.reach <= 700
        text = tokenizer.decode(trial.prompt)
        user, turn = text.split("<|im_end|>\n<|im_start|>assistant\n")
        assert user.startswith("<|im_start|>user\n") and user.endswith("?")
        if name == "copy_far":
            assert user.endswith(f"\n{copy_far.QUESTION}")
        else:
            assert re.search(r"(at the|Before, it was at the|is)$", turn)


def test_a_group_is_its_tasks_and_the_table_shows_them(tokenizer, documents):
    assert [task.name for task in find_tasks(["babilong"])] == list(NAMES[:3])
    rows = score(Oracle(), tokenizer, documents, 400, count=5)
    table = format_table(rows)
    for name in NAMES:
        assert f"| {name} " in table
    assert "gain ↑" in table and "-0" not in table


def test_without_text_or_room_there_are_no_rows(tokenizer, documents):
    assert score(Oracle(), tokenizer, [], 400) == []
    for name in NAMES:
        assert score(Oracle(), tokenizer, documents, 60, (name,)) == []


# BABILong-like worlds


def replay(facts):
    """Where people and things are, and the places of each thing in turn, from sentences alone."""
    at, carried, things, paths = {}, {}, {}, {}
    for fact in facts:
        if found := re.fullmatch(rf"({PEOPLE}) (?:\w+) to the ({PLACES})\.", fact):
            who, place = found.groups()
            at[who] = place
            moved = [thing for thing, by in carried.items() if by == who]
        elif found := re.fullmatch(rf"({PEOPLE}) now carries the ({THINGS})\.", fact):
            who, thing = found.groups()
            assert thing not in carried and things.get(thing, at.get(who)) == at.get(who)
            carried[thing] = who
            moved = [thing]
        else:
            who, thing = re.fullmatch(rf"({PEOPLE}) left the ({THINGS}) there\.", fact).groups()
            moved = [thing]
            carried.pop(thing, None)
        for thing in moved:
            things[thing] = at.get(who)
            if paths.setdefault(thing, [None])[-1] != at.get(who):
                paths[thing].append(at.get(who))
    return at, things, {thing: [p for p in path if p] for thing, path in paths.items()}


def found_answer(question, facts):
    """The answer to a question from the facts, or None."""
    at, things, paths = replay(facts)
    if found := re.match(r"Where is (\w+)\?", question):
        return at.get(found[1])
    if found := re.match(r"Where is the (\w+)\?", question):
        return things.get(found[1])
    thing, place = re.match(r"Where was the (\w+) before it was at the (\w+)\?", question).groups()
    path = paths.get(thing, [])
    assert path.count(place) <= 1, "ambiguous"
    i = path.index(place) if place in path else 0
    return path[i - 1] if i else None


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_worlds_follow_from_their_supporting_facts_and_no_fewer(kind):
    rng = np.random.default_rng(5)
    fewest, most = babilong.NUM_FACTS[kind]
    answers = []
    for num_facts in [fewest, most, *rng.integers(fewest, most + 1, 60).tolist()]:
        world = babilong.simulate(rng, kind, num_facts)
        assert len(world.facts) == num_facts
        for question in world.questions(kind):
            answers.append(question.answer)
            assert found_answer(question.text, world.facts) == question.answer
            needed = [world.facts[i] for i in question.supports]
            assert len(needed) == KINDS.index(kind) + 1
            assert found_answer(question.text, needed) == question.answer
            for i in range(len(needed)):
                fewer = [fact for j, fact in enumerate(needed) if j != i]
                assert found_answer(question.text, fewer) != question.answer
    counts = [answers.count(place) for place in babilong.PLACES]
    assert min(counts) > 0.5 * np.mean(counts) and max(counts) < 1.7 * np.mean(counts)
    assert not set(babilong.PLACES) & {"bathroom", "bedroom", "garden", "hallway", "kitchen"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_facts_of_a_prompt_come_in_order_on_lines_and_give_the_answer(kind, tokenizer, words):
    made = babilong.make_trials(kind, tokenizer, 3000, num_samples=20, words=words)
    counts = set()
    pattern = rf"^(?:{PEOPLE}) (?:\w+ to|now carries|left) the (?:{PLACES}|{THINGS})(?: there)?\.$"
    for trial in made:
        text = tokenizer.decode(trial.prompt)
        facts = re.findall(pattern, text, re.M)
        counts.add(len(facts))
        assert found_answer(text.rsplit("\n", 1)[1], facts) == answer(tokenizer, trial)
        assert "return x" in text and text.count("\n") > len(facts) + 20
    fewest, most = babilong.NUM_FACTS[kind]
    assert fewest <= min(counts) < max(counts) <= most and len(counts) > 2
    assert len({trial.haystack for trial in made}) <= 10  # a haystack for several questions


# Needles without shared words


def test_no_needle_of_the_table_has_a_content_word_of_its_question():
    small = {"a", "de", "has", "been", "ii", "is", "of", "one", "s", "the", "to", "who"}
    rows = nonliteral.LANDMARKS
    assert len(rows) >= 50 and len({row[0] for row in rows}) == len({r[1] for r in rows}) == len(
        rows
    )
    for landmark, *places in rows:
        for place in places:
            needle = nonliteral.needle("Dorevi", landmark).lower()
            question = nonliteral.question(place).lower()
            one, two = (set(re.split(r"[^\w]+", t)) - small - {""} for t in (needle, question))
            assert not one & two
            for word in one:
                assert not any(word.startswith(w[:5]) or w.startswith(word) for w in two), word
            assert nonliteral.shared_words(needle, question) == set()
    assert nonliteral.shared_words("Dorevi has a Viennese house", "Who has been to Vienna?") == {
        "vienn"
    }


def test_a_needle_names_who_lives_beside_the_landmark_of_the_place_asked_for(tokenizer, words):
    where = {landmark: places for landmark, *places in nonliteral.LANDMARKS}
    depths, kinds = [], set()
    for trial in nonliteral.make_trials(tokenizer, 1000, num_samples=60, words=words):
        text = tokenizer.decode(trial.prompt)
        people = dict(re.findall(r"\n(\w+) lives right beside (.+)\.\n", text))
        place = re.search(r"\nWho has been to (.+)\? The one who has been to \1 is$", text)[1]
        assert len(people) == 5
        (name,) = [name for name, landmark in people.items() if place in where[landmark]]
        assert answer(tokenizer, trial) == name
        for landmark in people.values():
            needle = nonliteral.needle(name, landmark)
            assert not nonliteral.shared_words(needle, nonliteral.question(place))
        body = text[text.index("\n") : text.rindex("\n")]
        assert body.index(f"\n{name} lives") / len(body) == pytest.approx(trial.depth, abs=0.2)
        depths.append(trial.depth)
        kinds.add(where[people[name]].index(place))
    assert kinds == {0, 1} and min(depths) < 0.1 and max(depths) > 0.9


@pytest.mark.parametrize(
    ("window", "shares", "relative"),
    [
        (2048, {256: 0.5, 512: 0.8, 1024: 0.7, 2048: 0.4}, 0.5),
        (2048, {256: 0.5, 512: 0.8, 1024: 0.7, 2048: 0.9}, 1.0),  # never more than all
        (256, {256: 0.5, 2048: 0.4}, 0.8),  # 512 and 1,024 are outside its window
        (2048, {256: 0.2, 512: 0.3, 1024: 0.2, 2048: 0.4}, None),  # the base may be chance
    ],
)
def test_the_share_of_the_base_score_is_of_the_best_at_short_lengths(
    window, shares, relative, tokenizer, documents, monkeypatch
):
    measured = []

    def fake(model, made, batch_tokens, tick=None):
        length = min(n for n in (256, 512, 1024, 2048) if n >= made[0].reach)
        measured.append(length)
        return [i < shares[length] * len(made) for i in range(len(made))]

    monkeypatch.setattr(nonliteral, "exact_match", fake)
    config = LlamaConfig(max_position_embeddings=window)
    model = types.SimpleNamespace(config=config)
    inputs = {
        "load_model": lambda: model,
        "tokenizer": tokenizer,
        "documents": documents,
        "haystack": lambda n: haystack_words(tokenizer, documents, n),
        "settings": EvalSettings(samples=20),
        "tick": lambda n: None,
    }
    task = TASKS["needle_nonliteral"]
    rows = task.measure(TaskInputs(lengths=(2048,), **inputs))
    assert rows[0]["value"] == shares[2048] and rows[0]["metric"] == "exact_match"
    assert [round(row["value"], 9) for row in rows[1:]] == ([] if relative is None else [relative])
    assert sorted(measured) == sorted(shares)
    (first, *_) = task.measure(TaskInputs(lengths=(256,), **inputs))
    assert first["value"] == shares[256] and sorted(measured) == sorted(shares)  # known by now


# Copying


def test_a_passage_occurs_once_in_the_first_half_and_nowhere_in_the_control(tokenizer, words):
    length = 1000
    made, controls = copy_far.make_trials(tokenizer, length, num_samples=23, words=words)
    assert len(made) == len(controls) == 23
    places = []
    for trial, control in zip(made, controls, strict=True):
        num = trial.num_answer
        assert trial.input_ids[-num:] == control.input_ids[-num:] and num >= 20
        texts = [tokenizer.decode(t.prompt) for t in (trial, control)]
        context, question = texts[0].rsplit("\n", 1)
        other, same = texts[1].rsplit("\n", 1)
        assert question == same and "\n" in context
        cue = question.removeprefix(f"{copy_far.QUESTION} ")
        passage = f"{cue} {answer(tokenizer, trial)}"
        assert context.count(cue) == context.count(passage) == 1 and passage not in other
        places.append((context.index(passage) + len(passage)) / len(context))
        assert places[-1] < 0.56  # half the context, which has a question too
        assert trial.haystack != control.haystack
    assert min(places) < 0.15 and max(places) > 0.45
    assert len({t.haystack for t in made}) < 10  # passages share a haystack


def test_a_text_that_repeats_itself_has_no_passage_to_copy(tokenizer):
    short = [np.array(token_ids(tokenizer, "one two three four five six seven eight\n" * 9))]
    words = haystack_words(tokenizer, short, 4000)
    assert copy_far.make_trials(tokenizer, 600, num_samples=5, words=words) == ([], [])


@pytest.mark.parametrize(
    ("copied", "control", "gain"), [(0.75, 0.25, 0.5), (0.5, 0.5, 0.0), (0.25, 0.75, 0.0)]
)
def test_the_gain_is_what_the_passage_adds(
    copied, control, gain, tokenizer, documents, monkeypatch
):
    """And of tokens whose probabilities are those without the passage, half are likelier."""
    rng = np.random.default_rng(0)

    def fake(model, made, batch_tokens, tick=None):
        half = len(made) // 2
        shares = [copied] * half + [control] * half
        return [[(i % 4 < 4 * share, rng.normal()) for i in range(40)] for share in shares]

    monkeypatch.setattr(copy_far, "answer_tokens", fake)
    rows = score(Oracle(), tokenizer, documents, 400, ("copy_far",), 30)
    values = {row["metric"]: row["value"] for row in rows}
    assert values["gain"] == gain and values["without the passage"] == control
    assert abs(values["likelier tokens"] - 0.5) < 0.05
    assert rows[0]["metric"] == "gain"  # what the headline and the differences show
    assert rows[0]["samples"] == [copied - control] * 30
    low, high = rows[1]["low"], rows[1]["high"]
    assert low < 0.5 < high and 0.01 < high - low < 0.15


def test_tokens_of_answers_have_the_log_probabilities_of_a_plain_pass(tokenizer, words):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    made = trials("copy_far", tokenizer, 256, words, 4)
    for trial, ours in zip(made, answer_tokens(model, made, 700), strict=True):
        ids = torch.tensor([trial.input_ids])
        with torch.inference_mode():
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
        assert len(ours) == trial.num_answer
        for i, (hit, log) in enumerate(ours):
            at = len(trial.prompt) + i
            assert log == pytest.approx(logits[at - 1, trial.input_ids[at]].item(), abs=1e-3)
            assert hit == (int(logits[at - 1].argmax()) == trial.input_ids[at])


def test_the_bundled_model_copies_inside_its_window(tokenizer):
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    source = [np.array(token_ids(tokenizer, Path(re.__file__).read_text()))]
    rows = score(model, tokenizer, source, 256, ("copy_far",), 30)
    gain, likelier, _ = rows
    assert gain["low"] > 0.02 and likelier["low"] > 0.55
