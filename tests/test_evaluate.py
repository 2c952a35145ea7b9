"""Evaluation: equal to plain references, and neither generous nor mean."""

import math
import types

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipwise.evaluate import forward
from skipwise.evaluate.intervals import clustered_mean, t_quantile, wilson
from skipwise.evaluate.passkey import answers_right, make_trials, passkey_retrieval, prompt
from skipwise.evaluate.perplexity import _windows, perplexity
from skipwise.quickstart import MODEL


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def documents(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(3, 1000, n) for n in lengths]


def test_perplexity_equals_a_ten_line_reference(model):
    texts = documents(300, 100, 260)
    rows = perplexity(model, texts, [64, 256], num_windows=4, progress=False)
    windows, _ = _windows(texts, 256, 32, 4)
    for row, c in zip(rows, (64, 256), strict=True):
        losses = []
        for window in windows:
            ids = torch.from_numpy(window[-c:])[None]
            with torch.no_grad():
                logits = model(ids).logits[0, c - 33 : c - 1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, -32:]).item())
        assert row["value"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
        assert row["low"] < row["value"] < row["high"]
        assert row["num_samples"] == 3 * 32  # two fit the first document, one the last


def test_windows_share_their_targets_over_lengths_and_never_overlap():
    texts = [np.arange(1000), np.arange(1000, 1150), np.arange(5000, 5700)]
    windows, owners = _windows(texts, 200, 20, 30)
    assert owners.tolist() == [0] * 15 + [2] * 15
    targets = windows[:, -20:]
    assert len(np.unique(targets)) == targets.size
    assert (np.diff(windows, axis=1) == 1).all()


def test_lengths_beyond_every_document_are_left_out(model):
    rows = perplexity(model, documents(100), [64, 128], num_windows=2, progress=False)
    assert [row["context_length"] for row in rows] == [64]
    assert perplexity(model, documents(10), [64], progress=False) == []


@pytest.mark.parametrize("tokens", [5, 64, 200])
def test_chunked_prefill_gives_the_logits_of_one_forward_pass(model, monkeypatch, tokens):
    monkeypatch.setattr(forward, "PREFILL", 24)
    ids = torch.from_numpy(np.stack(documents(tokens, tokens)))
    positions = torch.arange(max(0, tokens - 40), tokens)
    with torch.no_grad():
        want = model(ids).logits[:, positions]
        have = forward.logits_at(model, ids, positions)
    assert torch.allclose(have, want, atol=2e-5)


def test_passkey_answers_are_those_of_greedy_generation(model, tokenizer):
    rng = np.random.default_rng(0)
    for length, depth in ((128, 0.5), (200, 0.2), (256, 1.0), (300, 0.5)):
        trials = make_trials(tokenizer, length, depth, 6, rng)
        right = answers_right(model, trials, batch_tokens=700)
        for trial, ours in zip(trials, right, strict=True):
            asked = torch.tensor([trial.input_ids[: -trial.num_answer]])
            out = model.generate(asked, max_new_tokens=trial.num_answer, do_sample=False)
            assert (
                out[0, asked.shape[1] :].tolist() == trial.input_ids[-trial.num_answer :]
            ) == ours


def test_shared_prefixes_change_no_answer(model, tokenizer, monkeypatch):
    trials = make_trials(tokenizer, 256, 0.7, 8, np.random.default_rng(3))
    shared = answers_right(model, trials, batch_tokens=2000)
    monkeypatch.setattr("skipwise.evaluate.passkey.can_share", lambda past: False)
    assert answers_right(model, trials, batch_tokens=2000) == shared


def test_trials_fill_the_length_and_hold_their_key_and_answer(tokenizer):
    for length in (128, 256, 700):
        for depth in (0.0, 0.5, 1.0):
            trials = make_trials(tokenizer, length, depth, 5, np.random.default_rng(0))
            for trial in trials:
                assert length - 16 < len(trial.input_ids) <= length
                text = tokenizer.decode(trial.input_ids)
                key = tokenizer.decode(trial.input_ids[-trial.num_answer :]).strip()
                assert key.isdigit() and len(key) == 5 and text.count(key) == 3
    assert make_trials(tokenizer, 40, 0.5, 5, np.random.default_rng(0)) == []


def test_the_prompt_is_the_published_template():
    text = prompt("81501", 5, 0.4)
    assert "The pass key is 81501. Remember it. 81501 is the pass key." in text
    assert text.startswith("There is an important info hidden inside a lot of irrelevant text.")
    assert text.endswith("What is the pass key? The pass key is")
    before = text.split("The pass key is 81501.")[0]
    assert before.count("The grass is green.") == 1 and "The sun is yellow." not in before


def test_an_oracle_scores_everything_and_mute_or_nearly_right_models_nothing(tokenizer):
    def fake(kind):
        def forward(input_ids, logits_to_keep, **_):
            # an oracle sees the next token; a mute one always says the token 5; a nearly right one
            # errs in the last digit (the last token whose successor is in the row)
            said = torch.roll(input_ids, -1, 1)
            if kind == "mute":
                said = torch.full_like(said, 5)
            if kind == "nearly":
                said[:, -2] = 5
            logits = torch.nn.functional.one_hot(said[:, logits_to_keep], 1024).float()
            return types.SimpleNamespace(logits=logits)

        class Model:
            device = torch.device("cpu")
            config = AutoModelForCausalLM.from_pretrained(MODEL).config

            def __call__(self, **inputs):
                return self.forward(**inputs)

        made = Model()
        made.forward = forward
        return made

    for kind, value in (("oracle", 1.0), ("mute", 0.0), ("nearly", 0.0)):
        rows = passkey_retrieval(
            fake(kind), tokenizer, [128, 256], num_trials=6, num_depths=3, progress=False
        )
        assert len(rows) == 6
        assert {row["value"] for row in rows} == {value}, kind
        assert {row["num_samples"] for row in rows} == {2}


def test_wilson_interval_worked_values():
    assert wilson(19, 20) == pytest.approx((0.7639, 0.9911), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@pytest.mark.parametrize(
    ("degrees", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (30, 2.042)]
)
def test_t_quantiles_are_the_tables(degrees, value):
    assert t_quantile(degrees) == pytest.approx(value, rel=0.01)


def test_windows_of_one_document_do_not_count_as_independent():
    values = np.array([1.0, 1.1, 3.0, 3.1])
    mean, low, high = clustered_mean(values, np.array([0, 0, 1, 1]))
    apart = clustered_mean(values, np.arange(4))
    assert mean == pytest.approx(2.05) and high - low > 3 * (apart[2] - apart[1])
    assert clustered_mean(values, np.zeros(4))[1:] == pytest.approx(apart[1:])


def test_only_the_positions_asked_for_get_logits(model, tokenizer, monkeypatch):
    monkeypatch.setattr(forward, "PREFILL", 64)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda m, i, out: seen.append(out.shape[1]))
    try:
        perplexity(model, documents(300), [64, 256], num_windows=1, progress=False)
        assert max(seen) == 32  # S targets, whatever the context
        seen.clear()
        passkey_retrieval(model, tokenizer, [256], num_trials=4, num_depths=2, progress=False)
        assert max(seen) <= 8  # the answer's tokens and padding, not the prompt
    finally:
        handle.remove()
