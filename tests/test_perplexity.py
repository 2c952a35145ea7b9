"""Perplexity and bits per byte: equal to plain references, on the same targets at every length."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipwise.evaluation import prefill
from skipwise.evaluation.tasks.perplexity import _windows, perplexity
from skipwise.pipeline.quickstart import MODEL
from skipwise.report.intervals import clustered_mean, mean_interval, t_quantile, wilson


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def documents(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(3, 1000, n) for n in lengths]


def of(rows, metric):
    return [row for row in rows if row["metric"] == metric]


def test_perplexity_equals_a_ten_line_reference(model):
    texts = documents(300, 100, 260)
    rows = perplexity(model, texts, [64, 256], num_windows=4)
    windows, _, _ = _windows(texts, 256, 32, 4)
    for row, c in zip(rows, (64, 256), strict=True):
        losses = []
        for window in windows:
            ids = torch.from_numpy(window[-c:])[None]
            with torch.no_grad():
                logits = model(ids).logits[0, c - 33 : c - 1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, -32:]).item())
        assert row["value"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
        assert row["low"] is None  # of two documents
        assert math.exp(np.mean(row["samples"])) == pytest.approx(row["value"], rel=1e-4)
        assert row["num_samples"] == 3 * 32  # two fit the first document, one the last


def test_with_room_for_all_windows_it_is_the_sliding_window_over_the_whole_document(model):
    """Press et al.: stride S, every token after the first window's context is a target once."""
    (text,) = documents(400)
    (row,) = perplexity(model, [text], [128], num_windows=10**6, stride=16)
    losses = []
    for start in range(0, 400 - 128 + 1, 16):
        ids = torch.from_numpy(text[start : start + 128])[None]
        labels = ids.clone()
        labels[:, :-16] = -100
        with torch.no_grad():
            losses.append(model(ids, labels=labels).loss.item())
    assert row["value"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert row["num_samples"] == 16 * len(losses)


def test_bits_per_byte_are_the_loss_over_the_bytes_of_the_targets(model, tokenizer):
    text = "def größe(x):\n    return x + 1  # naïve — ∑\n" * 30
    ids = np.array(tokenizer(text, verbose=False)["input_ids"])
    rows = perplexity(model, [ids], [64], tokenizer=tokenizer, num_windows=10**6, stride=40)
    (ppl,), (bits,) = of(rows, "perplexity"), of(rows, "bits_per_byte")
    windows, _, _ = _windows([ids], 64, 40, 10**6)
    num_bytes = 0
    for window in windows:
        pieces = tokenizer.convert_ids_to_tokens(window[-40:].tolist())
        num_bytes += sum(
            1 if piece.startswith("<0x") else len(piece.replace("▁", " ").encode())
            for piece in pieces
        )
    nats = math.log(ppl["value"]) * ppl["num_samples"]
    assert bits["value"] == pytest.approx(
        nats / math.log(2) / num_bytes, rel=3e-3
    )  # cut characters
    assert bits["low"] is None and bits["high"] is None  # of one document


def test_windows_share_their_targets_over_lengths_and_never_overlap():
    texts = [np.arange(1000), np.arange(1000, 1150), np.arange(5000, 5700)]
    windows, owners, labels = _windows(texts, 200, 20, 30)
    assert owners.tolist() == [0] * 15 + [2] * 15
    targets = windows[:, -20:]
    assert len(np.unique(targets)) == targets.size
    assert (labels == targets).all()
    assert (np.diff(windows, axis=1) == 1).all()


def test_lengths_beyond_every_document_are_left_out(model):
    rows = perplexity(model, documents(100), [64, 128], num_windows=2)
    assert [row["context_length"] for row in rows] == [64]
    assert perplexity(model, documents(10), [64]) == []


def test_slices_of_the_head_change_nothing(model, monkeypatch):
    texts = documents(300, 280)
    whole = perplexity(model, texts, [64, 256], num_windows=4)
    monkeypatch.setattr(prefill, "_LOGITS", 4 * 1024 * 5)
    monkeypatch.setattr(prefill, "PREFILL", 48)
    sliced = perplexity(model, texts, [64, 256], num_windows=4)
    for a, b in zip(whole, sliced, strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-5)


def test_only_the_targets_get_logits(model, monkeypatch):
    monkeypatch.setattr(prefill, "PREFILL", 64)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda m, i, out: seen.append(out.shape[1]))
    perplexity(model, documents(300), [64, 256], num_windows=1)
    handle.remove()
    assert max(seen) == 32  # S targets, whatever the context


def test_wilson_interval_worked_values():
    assert wilson(19, 20) == pytest.approx((0.7639, 0.9911), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert mean_interval([1.0] * 19 + [0.0]) == pytest.approx((0.95, 0.7639, 0.9911), abs=1e-4)


@pytest.mark.parametrize(
    ("degrees", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (30, 2.042)]
)
def test_t_quantiles_are_the_tables(degrees, value):
    assert t_quantile(degrees) == pytest.approx(value, rel=0.01)


def test_windows_of_one_document_do_not_count_as_independent():
    values = np.repeat([1.0, 3.0, 1.0, 3.0, 2.0], 4) + np.tile([0.0, 0.1, 0.0, 0.1], 5)
    mean, low, high = clustered_mean(values, np.repeat(np.arange(5), 4))
    apart = clustered_mean(values, np.arange(20))
    assert mean == pytest.approx(2.05) and high - low > 2 * (apart[2] - apart[1])
    # by hand: cluster sums of deviations -2, 2, -2, 2, 0; error sqrt(16 * 5/4) / 10; t(4) = 2.776
    values, owners = np.repeat([1.0, 3.0, 1.0, 3.0, 2.0], 2), np.repeat(np.arange(5), 2)
    half = 2.776 * math.sqrt(16 * 5 / 4) / 10
    assert clustered_mean(values, owners) == pytest.approx((2.0, 2 - half, 2 + half), abs=1e-2)
    # and one that depends on the mean: 6 windows of 5 documents
    values, owners = np.array([0.0, 0.5, 1.0, 1.0, 3.0, 0.5]), np.array([0, 0, 1, 2, 3, 4])
    sums = (-1.5, 0.0, 0.0, 2.0, -0.5)
    error = math.sqrt(sum(x**2 for x in sums) * 5 / 4) / 6
    mean, low, high = clustered_mean(values, owners)
    assert (mean, high - low) == pytest.approx((1.0, 2 * 2.776 * error), rel=1e-2)
    assert clustered_mean(values, np.array([0, 0, 1, 2, 3, 3]))[1:] == (-math.inf, math.inf)


def test_the_interval_is_over_documents_and_no_batch_is_over_the_limit(model):
    """Six documents, some easy: the windows of each agree, so the spread is theirs."""
    hard = [np.random.default_rng(i).integers(3, 1000, 400) for i in range(3)]
    texts = [*hard, *[np.tile([11 + i, 12, 13, 14], 100) for i in range(3)]]
    sizes = []
    handle = model.model.embed_tokens.register_forward_hook(
        lambda m, i, out: sizes.append(out.shape[0] * out.shape[1])
    )
    (row,) = perplexity(model, texts, [128], num_windows=24, batch_tokens=300)
    handle.remove()
    assert max(sizes) <= 300 and len(sizes) == 12
    means = [
        math.log(perplexity(model, [text], [128], num_windows=4)[0]["value"]) for text in texts
    ]
    half = 2.571 * float(np.std(means, ddof=1)) / math.sqrt(6)  # t(5)
    assert math.log(row["value"]) == pytest.approx(np.mean(means), rel=1e-4)
    assert math.log(row["high"]) == pytest.approx(np.mean(means) + half, rel=1e-2)
