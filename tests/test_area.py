"""The area of a score over the context lengths: values and intervals computed apart."""

import math

import numpy as np
import pytest

from skipwise.report.area import find_areas, length_weights, linear_interval, main_areas
from skipwise.report.format import format_value
from skipwise.report.headline import headline
from skipwise.report.intervals import wilson
from skipwise.report.tables import format_table

LENGTHS = (256, 512, 1024, 2048)


def share(model, task, length, scores, **more):
    low, high = wilson(sum(scores), len(scores))
    return {
        "model": model,
        "task": task,
        "metric": "exact_match",
        "context_length": length,
        "value": float(np.mean(scores)),
        "low": low,
        "high": high,
        "num_samples": len(scores),
        "samples": list(scores),
        **more,
    }


def loss(model, length, losses, documents):
    return {
        "model": model,
        "task": "perplexity",
        "metric": "perplexity",
        "context_length": length,
        "value": math.exp(np.mean(losses)),
        "low": None,
        "high": None,
        "num_samples": 64,
        "samples": list(losses),
        "documents": list(documents),
    }


def passkeys(model, *counts, of=20, task="passkey", lengths=LENGTHS, **more):
    return [
        share(model, task, n, [1] * k + [0] * (of - k), **more)
        for n, k in zip(lengths, counts, strict=True)
    ]


def area_of(rows, name, ends=None):
    return next(area for area in find_areas(rows, ends)[0] if area.name == name)


def test_weights_are_those_of_trapezoids_over_log2():
    assert length_weights([256, 512, 1024, 2048]) == pytest.approx([1 / 6, 1 / 3, 1 / 3, 1 / 6])
    # 8, 10, 11: trapezoids of width 2 and 1 over 3
    assert length_weights([256, 1024, 2048]) == pytest.approx([1 / 3, 1 / 2, 1 / 6])
    x, y = np.log2([256, 700, 2048]), np.array([0.9, 0.2, 0.4])
    whole = np.sum((y[1:] + y[:-1]) / 2 * np.diff(x)) / (x[-1] - x[0])
    assert np.dot(length_weights([256, 700, 2048]), y) == pytest.approx(whole)


def test_the_area_of_a_share_and_its_interval_by_hand():
    row = area_of(passkeys("m", 20, 10, 5, 0), "passkey").row("m")
    assert row["value"] == pytest.approx((1.0 + 2 * 0.5 + 2 * 0.25 + 0.0) / 6)
    bounds = [(p, *wilson(20 * p, 20)) for p in (1.0, 0.5, 0.25, 0.0)]
    below = sum(
        (w * (p - low) / 6) ** 2 for w, (p, low, _) in zip((1, 2, 2, 1), bounds, strict=True)
    )
    above = sum(
        (w * (high - p) / 6) ** 2 for w, (p, _, high) in zip((1, 2, 2, 1), bounds, strict=True)
    )
    assert row["low"] == pytest.approx(row["value"] - math.sqrt(below))
    assert row["high"] == pytest.approx(row["value"] + math.sqrt(above))
    assert format_value(row) == "41.7 % [33, 52]"


def test_the_interval_covers_the_true_area_and_never_collapses():
    rng = np.random.default_rng(0)
    truth, weights, n = np.array([0.98, 0.9, 0.6, 0.1]), np.array(length_weights(LENGTHS)), 30
    inside = 0
    for hits in rng.binomial(n, truth, (2000, 4)):
        parts = [(w, (k / n, *wilson(int(k), n))) for w, k in zip(weights, hits, strict=True)]
        _, low, high = linear_interval(parts)
        inside += low <= truth @ weights <= high
    assert 0.93 < inside / 2000 < 0.98
    perfect = area_of(passkeys("m", 20, 20, 20, 20), "passkey").row("m")
    assert perfect["low"] < 0.97 and perfect["high"] == pytest.approx(1)


def test_the_area_of_perplexity_is_the_loss_of_each_window_over_documents():
    rng = np.random.default_rng(1)
    documents, losses = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4], rng.normal(2, 0.5, (4, 10))
    rows = [loss("m", n, x, documents) for n, x in zip(LENGTHS, losses, strict=True)]
    row = area_of(rows, "perplexity").row("m")
    each = (losses[0] + 2 * losses[1] + 2 * losses[2] + losses[3]) / 6  # (10,)
    sums = (each - each.mean()).reshape(5, 2).sum(1)
    half = 2.776 * math.sqrt((sums**2).sum() * 5 / 4) / 10
    assert row["value"] == pytest.approx(each.mean())
    assert (row["low"], row["high"]) == pytest.approx(
        (each.mean() - half, each.mean() + half), abs=1e-2 * half
    )
    few = [loss("m", n, x[:8], documents[:8]) for n, x in zip(LENGTHS, losses, strict=True)]
    assert area_of(few, "perplexity").row("m")["low"] is None


def test_differences_are_paired_and_keep_their_sign():
    rng = np.random.default_rng(2)
    documents, hard = np.arange(12) % 6, rng.normal(2, 1, (4, 12))
    rows = [loss("old", n, x, documents) for n, x in zip(LENGTHS, hard, strict=True)]
    noise = rng.normal(0, 0.01, (4, 12))
    better = hard + noise - np.array([[0.0], [0.3], [0.3], [0.6]])
    rows += [loss("new", n, x, documents) for n, x in zip(LENGTHS, better, strict=True)]
    change = area_of(rows, "perplexity").difference("new", "old")
    assert change.value == pytest.approx(-(2 * 0.3 + 2 * 0.3 + 0.6) / 6, abs=0.02)
    assert change.better and change.unit == "nats" and change.high - change.low < 0.1
    rows = [*passkeys("new", 20, 20, 20, 20), *passkeys("old", 20, 10, 10, 0)]
    change = area_of(rows, "passkey").difference("new", "old")
    assert change.value == pytest.approx(100 * (2 * 0.5 + 2 * 0.5 + 1) / 6) and change.better
    assert area_of(rows, "passkey").difference("old", "new").worse
    assert str(change).startswith("passkey area +50 points [+")
    other = [{**row, "text": "b"} if row["model"] == "old" else row for row in rows]
    assert area_of(other, "passkey").difference("new", "old") is None


def test_ruler_counts_once_among_the_tasks_and_perplexity_never():
    rows = passkeys("m", 20, 20, 20, 20)
    for task, k in (("vt", 4), ("cwe", 8), ("fwe", 12)):
        rows += passkeys("m", k, k, k, k, task=task, group="ruler")
    documents = [0, 1, 2, 3, 4]
    rows += [loss("m", n, [9.0] * 5, documents) for n in LENGTHS]
    errors = {"metric": "error", "is_share": True, "higher_is_better": False}
    rows += passkeys("m", 1, 1, 1, 1, task="wrong", **errors)
    assert area_of(rows, "RULER").row("m")["value"] == pytest.approx(0.4)
    total, losses = main_areas(find_areas(rows)[0])
    assert total.row("m")["value"] == pytest.approx((1.0 + 0.4) / 2)
    assert losses.row("m")["value"] == pytest.approx(9.0)


def test_what_was_not_measured_is_said_and_not_filled_in():
    rows = [*passkeys("m", 20, 10, 5, 0), *passkeys("m", 9, 9, task="needle", lengths=(512, 2048))]
    areas, said = find_areas(rows, (256, 2048))
    assert [area.name for area in areas] == ["passkey"]
    assert "left out: needle (not measured at 256)" in said
    rows += passkeys("other", 20, 10, 0, lengths=(256, 512, 2048))
    areas, said = find_areas(rows, (256, 2048))
    assert "passkey at 1,024 (not measured for every model)" in said
    # 1/6, 1/2 and 1/3 of the lengths that both have
    assert areas[0].row("m")["value"] == pytest.approx(1 / 6 + 0.5 / 2)
    assert areas[0].row("other")["value"] == pytest.approx(1 / 6 + 0.5 / 2)
    assert find_areas(passkeys("m", 20, lengths=(256,))) == ([], "")
    beyond = [*rows, *passkeys("m", 0, lengths=(4096,))]
    assert area_of(beyond, "passkey", (256, 2048)).row("m")["value"] == pytest.approx(5 / 12)
    exploded = [{**r, "value": None} if r["context_length"] == 512 else r for r in rows[:4]]
    assert area_of(exploded, "passkey").row("m") is None


def test_a_task_that_a_model_lacks_is_left_out_of_the_mean():
    rows = [*passkeys("a", 20, 20, 20, 20), *passkeys("b", 10, 10, 10, 10)]
    rows += passkeys("a", 0, 0, 0, 0, task="needle")
    areas, said = find_areas(rows)
    assert "needle (not measured for b)" in said
    (total,) = main_areas(areas)
    assert [total.row(m)["value"] for m in ("a", "b")] == pytest.approx([1, 0.5])
    rows += [row for m in ("a", "b") for row in passkeys(m, 10, 10, 10, 10, task="vt")]
    (total,) = main_areas(find_areas(rows)[0])
    assert [total.row(m)["value"] for m in ("a", "b")] == pytest.approx([0.75, 0.5])


def test_the_table_and_the_verdict_have_one_line_of_it():
    rows = [*passkeys("before", 20, 0, 0, 0), *passkeys("after", 20, 20, 20, 20)]
    for model, k in (("before", 0), ("after", 10)):
        rows += passkeys(model, k, k, k, k, task="needle")
    lines = [x for x in format_table(rows, ends=(256, 2048)).splitlines() if "| area" in x]
    assert len(lines) == 1 and "| area, all tasks | mean score ↑  | 256–2,048 |" in lines[0]
    # passkey 1/6 and 1, needle 0 and 1/2
    assert " 8.3 % [" in lines[0] and " 75 % [" in lines[0]
    run = {"model": {"name": "m"}, "original_length": 256, "target_length": 2048}
    said = headline(run, rows)
    assert "area of all tasks 75 % over 256–2,048 tokens (8.3 % before)" in said
