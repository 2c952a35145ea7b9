"""Answers by shared prefixes and batches: token by token those of plain greedy generation."""

import numpy as np
import pytest
import torch
from oracle import MUTE, Oracle
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from skipwise.evaluation import prefill, scoring
from skipwise.evaluation.scoring import Trial, exact_match, greedy, recall
from skipwise.evaluation.tasks import passkey
from skipwise.evaluation.tasks.prompts import haystack_words
from skipwise.pipeline.quickstart import MODEL

HYBRID = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def hybrid():
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **HYBRID))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def words(tokenizer):
    text = "for name in names:\n    total = total + count(name)\nreturn total\n"
    return haystack_words(tokenizer, [np.array(tokenizer(text)["input_ids"])], 4000)


def questions(tokenizer, words, length):
    common = {"num_trials": 12, "num_depths": 4}
    return {
        "passkey": passkey.passkey_trials(tokenizer, length, **common),
        "needle": passkey.needle_trials(tokenizer, length, **common, words=words, per_haystack=2),
        "single": passkey.needle_trials(tokenizer, length, **common, words=words, per_haystack=1),
    }


def generated(model, trial, count):
    asked = torch.tensor([trial.prompt])
    out = model.generate(
        asked, attention_mask=torch.ones_like(asked), max_new_tokens=count, do_sample=False
    )
    return out[0, asked.shape[1] :].tolist()


@pytest.mark.extended
@pytest.mark.parametrize("batch_tokens", [100, 1500, 16384])
@pytest.mark.parametrize("kind", ["passkey", "needle", "single"])
def test_exact_answers_are_those_of_greedy_generation(model, tokenizer, words, kind, batch_tokens):
    for length in (256, 300):
        asked = questions(tokenizer, words, length)[kind]
        right = exact_match(model, asked, batch_tokens)
        for trial, ours in zip(asked, right, strict=True):
            said = generated(model, trial, trial.num_answer)
            assert (said == trial.input_ids[-trial.num_answer :]) == ours
        assert length > 256 or kind == "needle" or any(right)  # it can pass


@pytest.mark.parametrize("family", ["model", "hybrid"])
@pytest.mark.parametrize("prefix", [0, 80])
def test_greedy_rows_of_unequal_length_are_those_of_plain_generate(family, prefix, request):
    asked_model = request.getfixturevalue(family)
    rng = np.random.default_rng(1)
    start = rng.integers(3, 1000, prefix).tolist()
    asked = [
        Trial(
            input_ids=start + rng.integers(3, 1000, n).tolist(),
            answers=("none",),
            max_new_tokens=count,
        )
        for n, count in ((30, 12), (41, 7), (30, 12), (58, 1), (41, 20))
    ]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for batch_tokens in (100, 10**6):
        said = greedy(asked_model, tokenizer, asked, batch_tokens)
        for trial, ours in zip(asked, said, strict=True):
            assert ours == generated(asked_model, trial, trial.max_new_tokens)
    assert len({tuple(s) for s in said}) > 2


def test_greedy_ends_where_generate_ends(model, tokenizer, monkeypatch):
    trial = Trial(input_ids=[5, 6, 7, 8], answers=("x",), max_new_tokens=20)
    (free,) = greedy(model, tokenizer, [trial], 1000)
    end = free[3]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end])
    (said,) = greedy(model, tokenizer, [trial], 1000)
    assert said == generated(model, trial, 20) == free[: free.index(end) + 1]


def test_a_haystack_goes_through_the_model_once(tokenizer, words):
    length, oracle = 1024, Oracle()
    asked = passkey.needle_trials(
        tokenizer, length, num_trials=20, num_depths=10, words=words, per_haystack=10
    )
    oracle.tell_trials(tokenizer, asked)
    assert all(exact_match(oracle, asked, 16384))
    assert oracle.num_tokens < 2 * length + 20 * 80  # two haystacks, and a question each
    oracle.num_tokens = 0
    asked = passkey.passkey_trials(tokenizer, length, num_trials=20, num_depths=10)
    oracle.tell_trials(tokenizer, asked)
    assert all(exact_match(oracle, asked, 16384))
    whole = sum(trial.reach for trial in asked)
    assert oracle.num_tokens < 0.6 * whole + length  # what follows the needle is read again


def test_only_the_answers_positions_get_logits(model, tokenizer):
    seen = []
    handle = model.lm_head.register_forward_hook(lambda m, i, out: seen.append(out.shape[1]))
    asked = passkey.passkey_trials(tokenizer, 256, num_trials=4, num_depths=2)
    exact_match(model, asked, 16384)
    handle.remove()
    assert max(seen) <= 8  # the answer's tokens and padding, not the prompt


def test_batches_are_filled_and_never_over_the_limit(tokenizer, words, monkeypatch):
    sizes = []
    grouped = scoring._grouped

    def spy(*arguments):
        for group in grouped(*arguments):
            sizes.append(len(group))
            yield group

    monkeypatch.setattr(scoring, "_grouped", spy)
    asked = passkey.needle_trials(
        tokenizer, 512, num_trials=10, num_depths=10, words=words, per_haystack=10
    )
    exact_match(Oracle(), asked, 2048)
    assert sizes == [4, 4, 2]


def test_shares_count_each_answer_once_whatever_its_case(tokenizer):
    oracle = Oracle()
    asked = [
        Trial(input_ids=[10 + i, 11, 12], answers=("Alpha", "beta"), max_new_tokens=24)
        for i in range(4)
    ]
    spoken = ["alpha, BETA", "it is beta beta", "alp hab eta", "beta and alpha"]
    for trial, text in zip(asked, spoken, strict=True):
        oracle.tell_trials(tokenizer, [trial], lambda _, text=text: text)
    assert recall(oracle, tokenizer, asked, 1000) == [1.0, 0.5, 0.0, 1.0]


def test_a_row_stops_when_all_was_said(tokenizer):
    oracle = Oracle()
    trial = Trial(input_ids=[10, 11, 12], answers=("7",), max_new_tokens=1000)
    oracle.tell_trials(tokenizer, [trial])
    assert recall(oracle, tokenizer, [trial], 5000) == [1.0]
    assert oracle.num_tokens < 10


def test_a_mute_model_is_read_to_the_end_and_finds_nothing(tokenizer):
    oracle = Oracle()
    trial = Trial(input_ids=[10, 11, 12], answers=("7",), max_new_tokens=9)
    assert greedy(oracle, tokenizer, [trial], 1000) == [[MUTE] * 9]
    assert recall(oracle, tokenizer, [trial], 1000) == [0.0]


def test_pieces_change_no_answer(model, tokenizer, words, monkeypatch):
    asked = questions(tokenizer, words, 256)["passkey"]
    whole = exact_match(model, asked, 16384)
    monkeypatch.setattr(prefill, "PREFILL", 50)
    assert exact_match(model, asked, 2000) == whole
