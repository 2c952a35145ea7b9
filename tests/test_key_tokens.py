"""LongPPL and gain by context: worked values, one choice of tokens for all models."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_suite_keys import run_of, text  # noqa: F401 (fixtures)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import skipwise
from skipwise.cli import main
from skipwise.config.recipe import EvalSettings
from skipwise.evaluation.evaluator import EvalModel, Texts, evaluate_model
from skipwise.evaluation.tasks.key_tokens import (
    Evaluator,
    Reference,
    choose_key_tokens,
    exp_loss,
    gain_row,
    known_bounds,
    long_ppl_row,
    samples_of,
    vocabulary,
)
from skipwise.evaluation.tasks.perplexity import _windows, find_reference, perplexity
from skipwise.pipeline.quickstart import MODEL
from skipwise.report.tables import format_table

SETTINGS = EvalSettings(tasks=("perplexity",), perplexity_windows=18)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def documents(tokenizer):
    """Source files of this package: the bundled model was trained on Python."""
    files = sorted(Path(skipwise.__file__).parent.glob("report/*.py"))[:6]
    return [
        np.array(tokenizer(file.read_text(), verbose=False)["input_ids"][:700]) for file in files
    ]


def reference_of(key, short, long):
    sums = {"short": np.array(short, float), "long": np.array(long, float)}
    return Reference(evaluator="e", contexts=(8, 64), key=np.array(key, bool), **sums)


def test_key_tokens_gain_over_two_nats_and_are_then_below_two():
    short = np.array([[4.0, 3.9, 9.0, 4.5, 1.0, 4.0]])
    long = np.array([[1.9, 1.9, 2.5, 2.0, 0.1, 1.0]])
    counted = np.array([[True, True, True, True, True, False]])
    found = choose_key_tokens(short, long, counted)
    assert found.tolist() == [[True, False, False, False, False, False]]


def test_long_ppl_is_the_mean_over_key_tokens_and_not_over_windows():
    key = np.zeros((5, 20), bool)
    key[0, :16] = key[1, :8] = key[2, :4] = key[3, :1] = key[4, :1] = True
    losses = np.full((5, 20), 50.0)  # of other tokens
    for i, x in enumerate((1.0, 2.0, 3.0, 4.0, 5.0)):
        losses[i, key[i]] = x
    row = long_ppl_row(losses, reference_of(key, [1] * 5, [0] * 5), np.arange(5))
    mean = (16 * 1 + 8 * 2 + 4 * 3 + 4 + 5) / 30
    assert row["num_samples"] == 30 and row["value"] == pytest.approx(math.exp(mean))
    # t(4) = 2.776, of a ratio: residuals sum(loss) - mean * count, over the mean count 6
    residuals = np.array([n * (x - mean) for n, x in ((16, 1), (8, 2), (4, 3), (1, 4), (1, 5))]) / 6
    half = 2.776 * math.sqrt((residuals**2).sum() * 5 / 4) / 5
    assert math.log(row["high"] / row["low"]) == pytest.approx(2 * half, rel=1e-2)


def test_too_few_key_tokens_give_no_figure_and_their_number():
    key = np.zeros((5, 20), bool)
    key[:, :5] = True
    reference = reference_of(key, [1] * 5, [0] * 5)
    row = long_ppl_row(np.ones((5, 20)), reference, np.arange(5))
    assert row["value"] is None and row["num_samples"] == 25
    place = {"model": "m", "task": "perplexity", "context_length": 64}
    assert "| too few: 25 key tokens |" in format_table([{**place, **row}])
    key[0, 5:10] = True
    row = long_ppl_row(np.ones((5, 20)), reference_of(key, [1] * 5, [0] * 5), np.arange(5))
    assert row["value"] == pytest.approx(math.e)


def test_the_gain_is_a_share_of_the_evaluators_and_its_interval_that_of_a_ratio():
    short, long = np.array([10.0, 12, 14, 10, 9]), np.array([8.0, 9, 10, 9, 8])
    reference, owners = reference_of(np.zeros((5, 4)), short, long), np.arange(5)
    assert gain_row(short, 20, reference, owners)["value"] == pytest.approx(0)
    assert gain_row(long, 20, reference, owners)["value"] == pytest.approx(1)
    assert gain_row(long, 20, reference, owners)["high"] == pytest.approx(1)
    sums = np.array([7.0, 11, 10, 9, 11])
    row = gain_row(sums, 20, reference, owners)
    assert row["value"] == pytest.approx((3 + 1 + 4 + 1 - 2) / (2 + 3 + 4 + 1 + 1))
    residuals = (short - sums - 7 / 11 * (short - long)) / (11 / 5)
    half = 2.776 * math.sqrt((residuals**2).sum() * 5 / 4) / 5
    assert (row["high"] - row["low"]) / 2 == pytest.approx(half, rel=1e-2)
    assert np.mean(row["samples"]) == pytest.approx(7 / 11, abs=1e-4)
    assert row["higher_is_better"] and not row["is_share"]


def test_without_a_gain_of_the_evaluator_beyond_error_there_is_no_share():
    reference = reference_of(np.zeros((5, 4)), [10, 12, 14, 10, 9], [11, 9, 10, 12, 8])
    row = gain_row(np.full(5, 9.0), 20, reference, np.arange(5))
    assert row["value"] is None and "gains nothing" in row["reason"]
    four = reference_of(np.zeros((4, 4)), [10] * 4, [8] * 4)
    assert gain_row(np.full(4, 9.0), 16, four, np.arange(4))["value"] is None  # no interval


@pytest.mark.extended
def test_the_evaluator_reads_each_target_with_half_to_all_of_its_context(model, documents):
    found = find_reference(model, documents, [64, 512], (16, 64), name="e", num_windows=6)
    windows, _, labels = _windows(documents, 512, 32, 6)
    losses = {}
    for context in (16, 64):
        losses[context] = np.zeros(labels.shape)
        for row, window in enumerate(windows):
            for i in range(32):
                step = min(32, context // 2)
                end = 512 - 32 + (i // step + 1) * step  # of the targets read together
                seen = torch.from_numpy(window[end - context : end])[None]
                with torch.no_grad():
                    logits = model(seen).logits[0]
                at = 512 - 32 + i - (end - context)
                assert context // 2 <= at < context
                loss = torch.nn.functional.cross_entropy(logits[at - 1], seen[0, at])
                losses[context][row, i] = loss.item()
    assert found.short == pytest.approx(losses[16].sum(1), rel=1e-4)
    assert found.long == pytest.approx(losses[64].sum(1), rel=1e-4)
    near = np.abs(losses[16] - losses[64] - 2) + np.abs(losses[64] - 2) < 1e-3
    key = (losses[16] - losses[64] > 2) & (losses[64] < 2)
    assert ((found.key == key) | near).all() and 5 < key.sum() < 60


def evaluator_of(model, tokenizer, loads, **more):
    def load():
        loads.append("evaluator")
        return model

    more = {"weights": "base", "original_length": 64, "is_base": True, **more}
    return Evaluator(name="the base", load=load, vocabulary=vocabulary(tokenizer), **more)


def eval_model_of(model, tokenizer, loads, label="m", weights="m"):
    def load():
        loads.append(label)
        return model

    identity = [weights, "tokenizer"]
    return EvalModel(
        label=label, load=load, tokenizer=tokenizer, identity=identity, weights=weights
    )


def measure(eval_model, evaluator, documents, done=(), settings=SETTINGS, lengths=(64, 256)):
    texts = Texts(documents=documents)
    return evaluate_model(
        eval_model, texts, lengths, settings, done=done, evaluator=evaluator, progress=False
    )


def of(rows, metric):
    return {row["context_length"]: row for row in rows if row["metric"] == metric}


def test_the_base_gains_all_at_its_window_and_chooses_once_for_all(model, tokenizer, documents):
    loads, saved = [], []
    base = evaluator_of(model, tokenizer, loads, save=lambda chosen: saved.append(dict(chosen)))
    rows = measure(eval_model_of(model, tokenizer, loads, weights="base"), base, documents)
    assert loads == ["m"]  # the base is measured itself, and not loaded twice
    gains, long_ppl = of(rows, "context_gain"), of(rows, "long_ppl")
    assert gains[64]["value"] == pytest.approx(1, abs=1e-4) and gains[256]["value"] is not None
    assert gains[64]["evaluator_contexts"] == [8, 64] and list(long_ppl) == [256]
    again = dataclasses.replace(base, chosen=json.loads(json.dumps(saved[-1])))
    other = measure(eval_model_of(model, tokenizer, loads, "other"), again, documents)
    assert loads == ["m", "other"]
    assert of(other, "long_ppl")[256]["value"] == long_ppl[256]["value"]
    assert {row["key_tokens"] for row in rows + other if "key_tokens" in row} == {
        long_ppl[256]["key_tokens"]
    }
    count = long_ppl[256]["num_samples"]
    assert count >= 30 and f"on {count} key tokens, which the base predicts" in format_table(rows)
    changed = [*documents[:-1], documents[-1][1:]]
    measure(eval_model_of(model, tokenizer, loads, "other"), again, changed)
    assert loads[2:] == ["evaluator", "other"]  # another text, another choice


@pytest.mark.extended
def test_another_evaluator_measures_again_and_none_leaves_perplexity(model, tokenizer, documents):
    loads = []
    subject = eval_model_of(model, tokenizer, loads)
    base = evaluator_of(model, tokenizer, loads)
    rows = measure(subject, base, documents)
    assert measure(subject, base, documents, rows) == rows and loads == ["evaluator", "m"]
    other = dataclasses.replace(base, weights="other", is_base=False, chosen={})
    new = measure(subject, other, documents, rows)
    assert loads == ["evaluator", "m"] * 2
    assert of(new, "long_ppl")[256]["evaluator_contexts"] == [64, 256]
    assert of(new, "perplexity")[256]["value"] == of(rows, "perplexity")[256]["value"]
    plain = measure(subject, None, documents, new)
    assert {row["metric"] for row in plain} == {"perplexity", "bits_per_byte"}
    foreign = dataclasses.replace(base, vocabulary="of another model")
    assert measure(subject, foreign, documents) == plain


def test_rows_of_perplexity_itself_do_not_change(model, documents):
    reference = find_reference(model, documents, [64, 256], (8, 64), name="e", num_windows=8)
    with_it = perplexity(model, documents, [64, 256], num_windows=8, reference=reference)
    kept = [row for row in with_it if row["metric"] == "perplexity"]
    assert kept == perplexity(model, documents, [64, 256], num_windows=8)


def test_a_run_keeps_the_choice_of_its_base_for_both_models(run_of, capsys):  # noqa: F811
    command = ["eval", str(run_of.path), "--tasks", "perplexity", "eval.perplexity_windows=2"]
    assert main([*command, "--baseline"]) == 0
    rows = [row for row in run_of.results() if row["metric"] == "long_ppl"]
    assert [row["model"] for row in rows] == ["before", "after"]
    assert rows[0]["key_tokens"] == rows[1]["key_tokens"]
    assert rows[0]["evaluator_contexts"] == [8, 64] and run_of.key_tokens.exists()
    page = (run_of.report / "index.html").read_text()
    assert "gain at 64" in page and "gain at 128" in page and "LongPPL ↓" in page
    recipe = run_of.recipe_file.read_text()
    base = next(x for x in recipe.splitlines() if x.startswith("model:"))
    run_of.recipe_file.write_text(recipe.replace(base, "model: ./gone"))
    capsys.readouterr()
    assert main(command) == 0
    assert "left out: LongPPL, which the base would choose" in capsys.readouterr().err


def test_an_evaluator_that_cannot_choose_is_refused(tiny, text, tmp_path, capsys):  # noqa: F811
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(tiny).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(other)
    command = ["eval", str(tiny), "--data", str(text), "--out", str(tmp_path / "e")]
    for options, said in (
        (["--lengths", "64", f"eval.evaluator={other}"], "has another vocabulary than the model"),
        (["--lengths", "64k", f"eval.evaluator={tiny}"], "tokens, and has to read 65,536"),
        (["--lengths", "64", "eval.evaluator=./gone"], "eval.evaluator: ./gone"),
        (
            ["--lengths", "64", "--tasks", "passkey", f"eval.evaluator={tiny}"],
            "does not take effect without perplexity",
        ),
    ):
        assert main([*command, *options]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "e").exists()


def test_a_loss_that_is_no_number_gives_rows_that_json_can_hold():
    losses, owners = np.array([1.0, np.nan]), np.array([0, 1])
    assert samples_of(losses, owners) == {}
    assert known_bounds([exp_loss(float("nan")), 1.0, float("inf")]) == {
        "value": None,
        "low": None,
        "high": None,
    }


def test_an_evaluator_whose_loss_is_no_number_chooses_nothing(
    model, tokenizer, documents, monkeypatch, capsys
):
    def no_number(model, windows, labels, context, batch_tokens):
        return np.full(labels.shape, np.nan)

    monkeypatch.setattr("skipwise.evaluation.tasks.perplexity._sliding_losses", no_number)
    reference = find_reference(model, documents, [32, 64], (8, 64), name="it", num_windows=2)
    assert not reference.is_finite
    stored = json.loads(json.dumps(reference.to_json(), allow_nan=False))
    assert not Reference.from_json(stored).is_finite
    base = EvalModel(label="before", load=lambda: model, tokenizer=tokenizer, weights="w")
    evaluator = Evaluator(
        name="it", load=base.load, weights="w", vocabulary=vocabulary(tokenizer), original_length=64
    )
    settings = EvalSettings(tasks=("perplexity",), perplexity_windows=2)
    texts = Texts(documents=documents)
    rows = evaluate_model(base, texts, [32, 128], settings, evaluator=evaluator)
    assert {row["metric"] for row in rows} == {"perplexity", "bits_per_byte"}
    assert "no LongPPL and no gain" in capsys.readouterr().err
