"""MRCR, graphwalks and many-shot classification: exact prompts, right answers, true floors."""

import hashlib
import re
from difflib import SequenceMatcher
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracle import MUTE, Oracle
from transformers import AutoTokenizer

from skipwise.config.recipe import EvalSettings
from skipwise.evaluation.evaluator import EvalModel, Texts, evaluate_model, find_tasks
from skipwise.evaluation.scoring import exact_match
from skipwise.evaluation.tasks import TASKS, graphwalks, icl, mrcr
from skipwise.evaluation.tasks.prompts import ChatPrompts, token_ids
from skipwise.pipeline.quickstart import MODEL

NAMES = (*mrcr.TASKS, *graphwalks.TASKS, *icl.TASKS)
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def chat():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = CHAT
    return ChatPrompts(tokenizer)


def items(name, tokenizer, length, count, seed=0):
    common = {"num_samples": count, "seed": seed}
    if name in mrcr.TASKS:
        return mrcr.make_items(tokenizer, length, num_needles=int(name[5:]), **common)
    return graphwalks.make_items(tokenizer, length, depth=graphwalks.DEPTHS[name], **common)


def trials(name, tokenizer, length, count, seed=0):
    if name == "icl":
        return icl.make_trials(tokenizer, length, num_samples=count, seed=seed)[0]
    return [item.trial for item in items(name, tokenizer, length, count, seed)]


def spoken(name, answers):
    """What an oracle says; tokens of no meaning follow, so that a text has to end."""
    return f"{', '.join(answers)}]" if name in graphwalks.TASKS else f"{answers[0]}\n\n"


def evaluate(model, tokenizer, names, lengths, samples, **more):
    settings = EvalSettings(tasks=tuple(names), samples=samples, **more)
    eval_model = EvalModel(label="it", load=lambda: model, tokenizer=tokenizer)
    return evaluate_model(eval_model, Texts(), lengths, settings, progress=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1024, 2048])
def test_prompts_fill_the_context_with_their_answers_and_never_more(name, length, tokenizer):
    made = trials(name, tokenizer, length, 6)
    slack = 40 if name in mrcr.TASKS else 12  # the heading of a turn; an edge or a shot
    assert len(made) == 6
    for trial in made:
        assert length - slack <= trial.reach <= length, (name, length - trial.reach)
        if trial.max_new_tokens:
            said = token_ids(tokenizer, " " + spoken(name, trial.answers))
            assert len(said) + 4 <= trial.max_new_tokens <= 3 * len(said) + 12


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_left_out(name, tokenizer):
    assert trials(name, tokenizer, 12, 3) == []
    assert evaluate(None, tokenizer, [name], [16], 3) == []


# sha1 over the token ids of three prompts of 1,024 tokens, seed 0
DIGESTS = {
    "mrcr_2": "9f1b7520b66b",
    "mrcr_4": "d1d787ac9018",
    "mrcr_8": "b88d9591fcb7",
    "graphwalks_parents": "bd56ed6d23d3",
    "graphwalks_bfs": "dddd0b2e57ae",
    "graphwalks_bfs_2": "42073a38e301",
    "graphwalks_bfs_3": "009239d7a6d6",
    "icl": "cb30f828a1ce",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_fixes_the_prompts_on_every_platform(name, tokenizer):
    made = trials(name, tokenizer, 1024, 3)
    whole = np.concatenate([np.array(trial.input_ids, "<i4") for trial in made])
    digest = hashlib.sha1(whole.tobytes(), usedforsecurity=False).hexdigest()[:12]
    assert digest == DIGESTS[name]
    other = trials(name, tokenizer, 1024, 3, seed=1)
    assert len({tuple(trial.input_ids) for trial in [*made, *other]}) == 6


@pytest.mark.parametrize("num", [2, 4, 8])
def test_an_mrcr_prompt_has_n_equal_requests_and_asks_for_the_kth(num, tokenizer):
    asked = set()
    for item in mrcr.make_items(tokenizer, 1536, num_needles=num, num_samples=12):
        text = tokenizer.decode(item.trial.input_ids)
        *turns, last = text.split("\n\n")
        code, k, form, topic, end, opening = re.fullmatch(
            r"Prepend (\w{8}) to the (\d)\w\w \(1 indexed\) (\w+) about (\w+)\.\n(\w{8}) (.*)", last
        ).groups()
        assert end == code and opening == f"A {form} about {topic}:"
        request = f"Write a {form} about {topic}.\n{opening} "
        same = [turn.removeprefix(request) for turn in turns if turn.startswith(request)]
        assert len(same) == num == len(set(same)) and item.trial.answers == (same[int(k) - 1],)
        others = [turn for turn in turns if not turn.startswith(request)]
        abouts = [re.match(r"Write a (\w+) about (\w+)\.\nA \1 about \2: ", t) for t in others]
        assert all(abouts), "every turn repeats its request in the answer"
        assert all((m[1] == form) != (m[2] == topic) for m in abouts), "near misses"
        asked.add(int(k))
    assert len(asked) > 1


def test_an_mrcr_answer_without_the_hash_counts_nothing_and_words_are_counted_after_it(
    tokenizer, chat
):
    (given,) = mrcr.make_items(tokenizer, 600, num_needles=2, num_samples=1)
    (asked,) = mrcr.make_items(chat, 600, num_needles=2, num_samples=1)
    assert given.given and not asked.given and asked.hash == given.hash
    body, opening, code = asked.bodies[asked.asked], asked.opening, asked.hash
    assert asked.score(f"{code} {opening} {body}") == asked.score(f"{code}{body}") == 1
    assert asked.score(f"{opening} {body}") == asked.score(f"Sure: {code} {body}") == 0
    assert given.score(body) == 1 and given.score("") == 0
    half = " ".join(body.split()[:8])
    assert asked.score(f"{code} {opening} {half}") == pytest.approx(2 * 8 / (8 + 16))
    wrong = asked.bodies[1 - asked.asked]
    want = SequenceMatcher(None, wrong.split(), body.split()).ratio()
    assert asked.score(f"{code} {wrong}") == want < 0.3


@pytest.mark.parametrize("num", [2, 4, 8])
def test_the_floor_of_mrcr_is_what_a_random_one_of_the_answers_scores(num, tokenizer):
    made = mrcr.make_items(tokenizer, 1024, num_needles=num, num_samples=50)
    scores = [[item.score(body) for body in item.bodies] for item in made]
    assert np.mean(scores) == pytest.approx(mrcr.FLOORS[num], abs=0.02)


def walk(text, depth):
    """The answer of a graphwalks prompt, by walking over its edges."""
    graph = text.split("\n\n")[1]
    edges = set(re.findall(r"^(\w+) -> (\w+)$", graph, re.MULTILINE))
    assert all(a != b for a, b in edges)
    node = re.search(r"(?:edge to|steps? from) (\w+)", graph)[1]
    nodes = {node for edge in edges for node in edge}
    if depth == 0:
        return {a for a, b in edges if b == node}, nodes
    seen = level = {node}
    for _ in range(depth):
        level = {b for a, b in edges if a in level} - seen
        seen = seen | level
    return level, nodes


@pytest.mark.parametrize("name", graphwalks.TASKS)
def test_a_graphwalks_answer_is_what_a_walk_finds(name, tokenizer):
    depth, sizes = graphwalks.DEPTHS[name], set()
    for item in items(name, tokenizer, 1024, 12):
        text = tokenizer.decode(item.trial.input_ids)
        answer, nodes = walk(text, depth)
        assert set(item.trial.answers) == answer and len(item.trial.answers) == len(answer)
        assert item.num_nodes == len(nodes)
        assert item.floor == len(answer) / (len(nodes) - 1)
        example = text.split("\n\n")[0]
        shown, _ = walk(f"\n\n{example}", depth)
        assert {re.search(r"\[(\w+)\]$", example)[1]} == shown
        if depth > 1:  # a walk of d steps in which nodes may come again finds others too
            edges = re.findall(r"^(\w+) -> (\w+)$", text.split("\n\n")[1], re.MULTILINE)
            level = {re.search(r"steps? from (\w+)", text.split("\n\n")[1])[1]}
            for _ in range(depth):
                level = {b for a, b in edges if a in level}
            assert level > answer
        sizes.add(len(answer))
    assert sizes <= {1, 2, 3, 4} and len(sizes) > 2


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("a1, b2]", 1.0),
        ("b2, a1, a1]", 1.0),
        (" 'a1', \"b2\"] and more", 1.0),
        ("a1]", 2 / 3),
        ("a1, b2, c3, d4]", 2 / 3),
        ("c3]", 0.0),
        ("]", 0.0),
        ("a1, b2", 0.0),
        ("", 0.0),
    ],
)
def test_graphwalks_scores_the_f1_of_a_complete_list(said, score, tokenizer):
    (item,) = items("graphwalks_bfs", tokenizer, 1024, 1)
    trial = type(item.trial)(input_ids=[1], answers=("a1", "b2"))
    item = graphwalks.Item(trial=trial, num_nodes=5)
    assert item.score(said) == pytest.approx(score)


@pytest.mark.parametrize("name", graphwalks.TASKS)
def test_random_nodes_score_the_floor(name, tokenizer):
    rng, scores, floors = np.random.default_rng(0), [], []
    for item in items(name, tokenizer, 1024, 8):
        text = tokenizer.decode(item.trial.input_ids)
        answer, nodes = walk(text, graphwalks.DEPTHS[name])
        node = re.search(r"(?:edge to|steps? from) (\w+)", text.split("\n\n")[1])[1]
        others = sorted(nodes - {node})
        for _ in range(300):
            drawn = rng.choice(others, len(answer), replace=False)
            scores.append(item.score(f"{', '.join(drawn)}]"))
        floors.append(item.floor)
    assert np.mean(scores) == pytest.approx(np.mean(floors), abs=0.01)
    assert np.mean(floors) == pytest.approx(60 / 1024, rel=0.35), "as the page says"


def test_only_the_shots_tell_the_letter_of_a_word(tokenizer):
    rules, asked, shown = {}, {}, {}
    for trial in trials("icl", tokenizer, 2048, 36):
        _, *shots, last = tokenizer.decode(trial.input_ids).split("\n")
        pairs = [re.fullmatch(r"([a-z]+)(\W) ([A-Z])", line).groups() for line in [*shots, last]]
        rule = {sign: letter for _, sign, letter in pairs}
        assert all(rule[sign] == letter for _, sign, letter in pairs)
        words = [word for word, *_ in pairs]
        assert len(set(words)) == len(words), "the word is new"
        counts = sorted((sum(s == sign for _, s, _ in pairs) for sign in rule), reverse=True)
        assert counts[0] > 4 * counts[-1], "signs have unequal frequencies"
        assert shown.setdefault(trial.haystack, shots) == shots
        assert rules.setdefault(trial.haystack, rule) == rule
        asked.setdefault(trial.haystack, []).append(pairs[-1][1:])
    assert [len(some) for some in asked.values()] == [8, 8, 8, 8, 4]
    assert all(len(set(some)) == len(some) for some in asked.values()), "a sign is asked once"
    assert all(one != other for one, other in pairwise(rules.values()))
    assert len({letter for some in asked.values() for _, letter in some}) == 8


def test_more_shots_show_more_of_the_rule(tokenizer):
    """What a model that knows all shots would get right, without guessing."""
    known = []
    for length in (256, 1024, 4096):
        lines = [
            tokenizer.decode(trial.input_ids).split("\n")
            for trial in trials("icl", tokenizer, length, 48)
        ]
        known.append(np.mean([any(line[-1][-3] in s for s in line[1:-1]) for line in lines]))
    assert known[0] < 0.9 and known[0] < known[1] < known[2] + 1e-9 and known[2] > 0.97


def test_letters_differ_in_one_token_also_where_they_take_several(tokenizer):
    labels = icl.label_tokens(tokenizer)
    assert len(labels) == 8 and {len(ids) for ids in labels.values()} == {1}

    class Bytes:
        init_kwargs = {}  # noqa: RUF012

        def __call__(self, text, **_):
            texts = [text] if isinstance(text, str) else text
            ids = [list(one.encode()) for one in texts]
            return {"input_ids": ids[0] if isinstance(text, str) else ids}

    labels = icl.label_tokens(Bytes())
    assert labels["A"] == [32, 65] and len(labels) == 8


class Weighing(torch.nn.Module):
    """A model with the same logits everywhere."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.device, self.dtype = logits, torch.device("cpu"), torch.float32
        self.config = Oracle().config

    def forward(self, input_ids, logits_to_keep=0, **_):
        import types

        count = len(logits_to_keep)
        return types.SimpleNamespace(logits=self.logits.expand(len(input_ids), count, -1))


def test_among_labels_the_likeliest_counts_even_if_other_tokens_are_likelier(tokenizer):
    made, labels = icl.make_trials(tokenizer, 256, num_samples=20)
    logits = torch.zeros(1, 1, 1024)
    logits[..., MUTE], logits[..., labels[3]] = 9.0, 1.0
    right = exact_match(Weighing(logits), made, 4096, among=labels)
    assert right == [trial.input_ids[-1] == labels[3] for trial in made] and any(right)
    assert not any(exact_match(Weighing(logits), made, 4096))
    logits[..., labels[5]] = 1.0
    assert not any(exact_match(Weighing(logits), made, 4096, among=labels)), "a tie is no answer"


@pytest.mark.parametrize("kind", ["oracle", "mute"])
def test_an_oracle_scores_everything_and_a_mute_model_nothing(kind, tokenizer):
    model = Oracle()
    for name in NAMES if kind == "oracle" else ():
        for length in (1024, 1300):
            for trial in trials(name, tokenizer, length, 3):
                model.tell_trials(tokenizer, [trial], lambda t, name=name: spoken(name, t.answers))
    rows = evaluate(model, tokenizer, NAMES, [1024, 1300], 3)
    assert {row["task"] for row in rows} == set(NAMES) and len(rows) == 2 * len(NAMES)
    assert {row["value"] for row in rows} == {float(kind == "oracle")}
    assert all(0 < row["floor"] < 0.6 and row["num_samples"] == 3 for row in rows)


@pytest.mark.parametrize("name", ["mrcr_4", "graphwalks_bfs", "icl"])
def test_random_answers_score_the_stated_floor_through_the_whole_evaluation(name, tokenizer):
    """One of the n texts, nodes of the graph, a letter: each drawn at random."""
    rng, model = np.random.default_rng(1), Oracle()
    labels = [ids[-1] for ids in icl.label_tokens(tokenizer).values()]
    for trial in trials(name, tokenizer, 1024, 60) if name == "icl" else ():
        model.tell([*trial.input_ids[:-1], int(rng.choice(labels))], len(trial.input_ids) - 1)
    for item in items(name, tokenizer, 1024, 60) if name != "icl" else ():
        ids, count = item.trial.input_ids, len(item.trial.answers)
        if name == "mrcr_4":
            said = f"{rng.choice(item.bodies)}\n\n"
        else:
            _, nodes = walk(tokenizer.decode(ids), 1)
            said = f"{', '.join(rng.choice(sorted(nodes), count, replace=False))}]"
        model.tell([*ids, *token_ids(tokenizer, " " + said)], len(ids))
    (row,) = evaluate(model, tokenizer, [name], [1024], 60)
    assert row["low"] - 0.02 <= row["floor"] <= row["high"] + 0.02


@pytest.mark.parametrize("name", NAMES)
def test_with_a_chat_template_the_question_is_the_users_and_the_start_the_assistants(name, chat):
    for trial in trials(name, chat, 1024, 2):
        text = chat.decode(trial.prompt)
        user, start = text.split("<|assistant|>\n")
        assert user.startswith("<|user|>\n") and trial.reach <= 1024
        if name in mrcr.TASKS:
            assert start == "" and user.rstrip().endswith(".") and "Prepend " in user
        elif name in graphwalks.TASKS:
            assert start == "Final Answer: [" and user.rstrip().endswith("?")
        else:
            assert re.fullmatch(r"[a-z]+\W", start) and re.search(r" [A-Z]\n$", user)


def test_an_oracle_of_chats_scores_everything(chat):
    model = Oracle()
    for name in NAMES:
        for trial in trials(name, chat, 1024, 2):
            if name in mrcr.TASKS:
                assert trial.answers[0].split(" A ")[0] == trial.answers[0][:8]
            model.tell_trials(chat.tokenizer, [trial], lambda t, name=name: spoken(name, t.answers))
    rows = evaluate(model, chat.tokenizer, NAMES, [1024], 2, chat_template=True)
    assert len(rows) == len(NAMES) and {row["value"] for row in rows} == {1.0}


def test_groups_name_the_tasks_that_small_models_have_a_chance_at():
    def of(name):
        return [task.name for task in find_tasks([name])]

    assert of("mrcr") == ["mrcr_2", "mrcr_4", "mrcr_8"]
    assert of("graphwalks") == ["graphwalks_parents", "graphwalks_bfs"]
    assert of("graphwalks_bfs_3") == ["graphwalks_bfs_3"] and of("icl") == ["icl"]
    for name in NAMES:
        task = TASKS[name]
        assert task.num_samples(EvalSettings(samples=7)) == 7
        assert task.cache_key(EvalSettings(samples=7)) != task.cache_key(EvalSettings())
