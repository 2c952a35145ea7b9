"""The tasks' prompts: whole, of the asked length, answerable, and neither generous nor mean."""

import re

import numpy as np
import pytest
from oracle import Oracle
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from skipwise.config.recipe import EvalSettings
from skipwise.evaluation.evaluator import EvalModel, Texts, evaluate_model
from skipwise.evaluation.tasks import passkey, ruler
from skipwise.evaluation.tasks.prompts import (
    fit_to_length,
    haystack_words,
    insert_needles,
    random_words,
    token_ids,
)
from skipwise.pipeline.quickstart import MODEL

ALL = ("passkey", "needle", "ruler")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def documents(tokenizer):
    lines = [f"def f{i}(x):\n    return x + {i}\n" for i in range(200)]
    return [np.array(token_ids(tokenizer, "".join(lines)))]


@pytest.fixture(scope="module")
def words(tokenizer, documents):
    return haystack_words(tokenizer, documents, 20000)


def samples(task, tokenizer, length, words, count=6, seed=0):
    common = {"num_trials": count, "num_depths": 3, "seed": seed}
    if task == "passkey":
        return passkey.passkey_trials(tokenizer, length, **common)
    if task == "needle":
        return passkey.needle_trials(tokenizer, length, **common, words=words)
    return ruler.make_samples(task, tokenizer, length, num_samples=count, seed=seed, words=words)


@pytest.mark.parametrize("task", ["passkey", "needle", *ruler.TASKS])
@pytest.mark.parametrize("length", [1500, 4096])
def test_prompts_fill_the_window_with_their_answers(task, length, tokenizer, words):
    made = samples(task, tokenizer, length, words)
    assert len(made) == 6
    for trial in made:
        slack = 0.012 * length if task in ("passkey", "cwe") else 20  # a unit: a sentence, a word
        assert length - slack <= trial.reach <= length, (task, length - trial.reach)
        if trial.max_new_tokens:
            answer = token_ids(tokenizer, " " + ", ".join(trial.answers))
            assert trial.max_new_tokens >= len(answer) + 4


@pytest.mark.parametrize("task", ["passkey", "needle", *ruler.TASKS])
def test_the_seed_fixes_the_set_and_another_makes_another(task, tokenizer, words):
    one, again, other = (samples(task, tokenizer, 1500, words, 4, seed) for seed in (0, 0, 1))
    assert one == again and one != other
    assert len({tuple(t.input_ids) for t in one}) == 4


@pytest.mark.parametrize("task", ruler.TASKS)
def test_ruler_answers_stand_in_the_prompt_and_are_asked_for_last(task, tokenizer, words):
    for trial in samples(task, tokenizer, 2048, words):
        text = tokenizer.decode(trial.input_ids)
        assert len(set(trial.answers)) == len(trial.answers)
        for answer in trial.answers:
            assert answer in text
        last = text.rsplit("\n", 1)[-1]
        assert re.search(r" (is|are)$", last) and not any(a in last for a in trial.answers)


def test_needles_of_many_keys_give_each_name_its_own_values(tokenizer, words):
    for task, values, asked in (
        ("niah_multikey", 1, 1),
        ("niah_multivalue", 4, 1),
        ("niah_multiquery", 1, 4),
    ):
        (trial,) = samples(task, tokenizer, 2048, words, 1)
        text = tokenizer.decode(trial.input_ids)
        pairs = re.findall(r"\nThe special number for (\w+) is (\d+)\.\n", text)
        assert len(pairs) == 4 and len({v for _, v in pairs}) == 4
        names = re.findall(r"\w+", text.rsplit(" for ", 1)[-1])[:-1]
        names = [n for n in names if n != "and"]
        assert len(names) == asked
        want = {v for n, v in pairs if n in names}
        assert set(trial.answers) == want and len(want) == values * asked


def test_variable_tracking_answers_are_those_that_follow_the_chain(tokenizer, words):
    for trial in samples("vt", tokenizer, 2048, words):
        text = tokenizer.decode(trial.input_ids).split("\n\n", 1)[1]
        value = re.search(r"have the value (\d+)", text)[1]
        holds = set()
        for name, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
            if given == value or given in holds:
                holds.add(name)
        assert holds == set(trial.answers) and len(holds) == 5


@pytest.mark.parametrize(
    ("task", "count", "length"), [("cwe", 10, 3000), ("fwe", 3, 3000), ("fwe", 3, 150)]
)
def test_counted_words_are_the_most_frequent_by_a_margin(task, count, length, tokenizer, words):
    made = samples(task, tokenizer, length, words, 12)
    assert len(made) == 12
    for trial in made:
        text = tokenizer.decode(trial.input_ids).rsplit("\nThe ", 1)[0].rsplit("\n", 1)[-1]
        found = re.findall(r"\b[a-z]+\b", text)
        counts = sorted(((found.count(w), w) for w in set(found)), reverse=True)
        assert {w for _, w in counts[:count]} == set(trial.answers)
        assert counts[count - 1][0] > counts[count][0]


def test_what_does_not_fit_is_left_out_and_never_cut(tokenizer, words):
    for task in ("passkey", "needle", *ruler.TASKS):
        assert samples(task, tokenizer, 40, words) == []


def test_the_passkey_prompt_is_the_published_template():
    text = passkey.prompt("81501", 5, 0.4)
    assert "The pass key is 81501. Remember it. 81501 is the pass key." in text
    assert text.startswith("There is an important info hidden inside a lot of irrelevant text.")
    assert text.endswith("What is the pass key? The pass key is")
    before = text.split("The pass key is 81501.")[0]
    assert before.count("The grass is green.") == 1 and "The sun is yellow." not in before


def test_hits_are_counted_at_their_depth(tokenizer):
    trials = passkey.passkey_trials(tokenizer, 300, num_trials=9, num_depths=3)
    right = [
        trial.depth == 0 or (trial.depth == 0.5 and i % 3 == 0) for i, trial in enumerate(trials)
    ]
    rows = passkey.rows_by_depth("passkey", 300, trials, right)
    assert [(row["depth"], round(row["value"], 3)) for row in rows] == [
        (0.0, 1.0),
        (0.5, 0.333),
        (1.0, 0.0),
    ]


def test_a_tokenizer_that_ends_texts_does_not_end_the_prompts(tokenizer, words):
    ending = AutoTokenizer.from_pretrained(MODEL)
    ending._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert ending("a")["input_ids"][-1] == 2 and token_ids(ending, "a")[0] == 1
    for task in ("passkey", "needle", *ruler.TASKS):
        for trial in samples(task, ending, 1500, words):
            assert trial.input_ids[0] == 1 and 2 not in trial.input_ids
            if trial.num_answer:
                answer = ending.decode(trial.input_ids[-trial.num_answer :]).strip()
                assert answer.isdigit() and len(answer) == 5


@pytest.mark.parametrize("model", [models.BPE, models.Unigram])
def test_a_tokenizer_that_merges_over_spaces_still_has_an_answer(model):
    """There the prompt's tokens are not the start of those of prompt and answer."""
    texts = [f"{passkey.prompt(str(key), 5, 0.5)} {key}" for key in range(10000, 10400)]
    inner = Tokenizer(model())
    special = ["<unk>", "<s>", "</s>"]
    if model is models.BPE:
        trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False)
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
        trainer = trainers.UnigramTrainer(
            vocab_size=900, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    inner.train_from_iterator(texts, trainer)
    merging = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    trials = passkey.passkey_trials(merging, 400, num_trials=20, num_depths=4)
    assert len(trials) == 20
    for trial in trials:
        prompt, said = (
            "".join(merging.convert_ids_to_tokens(ids))
            for ids in (trial.prompt, trial.input_ids[len(trial.prompt) :])
        )
        key = re.search(r"pass.key.is.(\d{5})\. ?", prompt)[1]
        assert trial.num_answer > 0 and said[1:] == key


def test_passkey_trials_hold_their_key_at_their_depth(tokenizer):
    for trial in passkey.passkey_trials(tokenizer, 700, num_trials=9, num_depths=3):
        text = tokenizer.decode(trial.input_ids)
        key = tokenizer.decode(trial.input_ids[-trial.num_answer :]).strip()
        assert key.isdigit() and len(key) == 5 and text.count(key) == 3
        assert text.index(key) / len(text) == pytest.approx(trial.depth, abs=0.25)


def test_needles_stand_at_their_depths_and_the_question_names_one(tokenizer, words):
    made = passkey.needle_trials(tokenizer, 2000, num_trials=10, num_depths=5, words=words)
    assert len({t.haystack for t in made}) == 2
    for trial in made:
        text = tokenizer.decode(trial.input_ids)
        name, key = re.search(r"The pass key of (\w+) is (\d{5})$", text).groups()
        needle = f"\nThe pass key of {name} is {key}. Remember it. {key} is the pass key of {name}."
        assert text.count(needle) == 1 and text.count("Remember it.") == 5
        haystack = text[text.index("\n") : text.rindex("\n")]
        assert haystack.index(needle) / len(haystack) == pytest.approx(trial.depth, abs=0.2)


def test_a_single_needle_is_the_passkeys_in_text(tokenizer, words):
    made = passkey.needle_trials(
        tokenizer, 600, num_trials=8, num_depths=4, words=words, per_haystack=1
    )
    assert [t.depth for t in made] == sorted(t.depth for t in made)
    for trial in made:
        text = tokenizer.decode(trial.input_ids)
        assert text.count("Remember it.") == 1 and passkey.QUERY in text and "return x" in text


@pytest.mark.parametrize(("kind", "value"), [("oracle", 1.0), ("mute", 0.0), ("nearly", 0.0)])
def test_an_oracle_scores_everything_and_mute_or_nearly_right_models_nothing(
    kind, value, tokenizer, documents, words
):
    model = Oracle()
    settings = EvalSettings(
        tasks=ALL, passkey_samples=6, needle_samples=6, num_depths=3, ruler_samples=3
    )
    for length in (1500, 2048):
        for task in ("passkey", "needle", *ruler.TASKS):
            for trial in _trials(task, tokenizer, length, documents, settings):
                model.tell_trials(tokenizer, [trial])
                whole = np.array(trial.input_ids)
                if kind == "nearly" and trial.num_answer:  # errs in the last digit
                    model.next[whole[:-1].tobytes()] = 5
    if kind == "mute":
        model.next.clear()
    eval_model = EvalModel(label="it", load=lambda: model, tokenizer=tokenizer)
    rows = evaluate_model(
        eval_model, Texts(documents=documents), [1500, 2048], settings, progress=False
    )
    if kind == "nearly":
        rows = [row for row in rows if row["metric"] == "exact_match"]
    else:
        assert {row["task"] for row in rows} == {"passkey", "needle", *ruler.TASKS}
    assert {row["value"] for row in rows} == {value}
    assert all(row["num_samples"] in (2, 3) for row in rows)
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)


def _trials(task, tokenizer, length, documents, settings):
    words = haystack_words(tokenizer, documents, 2 * length)
    common = {"num_trials": 6, "num_depths": 3}
    if task == "passkey":
        return passkey.passkey_trials(tokenizer, length, **common)
    if task == "needle":
        return passkey.needle_trials(tokenizer, length, **common, words=words)
    return ruler.make_samples(task, tokenizer, length, num_samples=3, words=words)


@pytest.mark.parametrize("length", [7, 100, 101, 5000])
def test_filling_finds_the_largest_number_of_units(length):
    def size(n):
        return 5 + 3 * n + n // 7

    best = fit_to_length(size, length)
    if best is None:
        assert size(1) > length
    else:
        assert size(best) <= length < size(best + 1)
    assert best == fit_to_length(size, length, guess=900)


def test_filling_ends_when_the_units_run_out():
    assert fit_to_length(lambda n: 5 + min(n, 30), 1000) >= 30


def test_needles_are_sprinkled_at_their_depths_each_on_a_line():
    units = [f"w{i} " for i in range(10)]
    text = insert_needles(units, [(1.0, "END"), (0.0, "START"), (0.5, "MIDDLE")])
    assert text == "START\nw0 w1 w2 w3 w4 \nMIDDLE\nw5 w6 w7 w8 w9 \nEND\n"
    assert "".join(units) == re.sub(r"\n?(END|START|MIDDLE)\n", "", text)


def test_made_up_words_are_distinct_and_fixed_by_the_seed():
    one, two = (random_words(np.random.default_rng(3), 2000) for _ in range(2))
    assert one == two and len(set(one)) == 2000
    assert all(re.fullmatch(r"([b-z][aeiou]){3}", word) for word in one)


def test_a_short_text_comes_again_and_no_text_gives_no_words(tokenizer):
    document = np.array(token_ids(tokenizer, "one two three"))
    words = haystack_words(tokenizer, [document], 100)
    assert words[:4] == ["one ", "two ", "three\n", "one "] and len(words) > 30
    assert haystack_words(tokenizer, [], 100) == []
