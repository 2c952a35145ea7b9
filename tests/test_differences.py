"""What training added: paired differences of two models on the same trials and windows."""

import math

import numpy as np
import pytest

from skipwise.report.differences import PairedDifference, describe_training, difference
from skipwise.report.headline import headline
from skipwise.report.intervals import mean_interval, paired_difference
from skipwise.report.tables import format_table

L, T = 256, 2048
RUN = {"model": {"name": "m"}, "original_length": L, "target_length": T}


def passkey(model, length, scores):
    return {
        "model": model,
        "task": "passkey",
        "metric": "exact_match",
        "context_length": length,
        "value": float(np.mean(scores)),
        "low": 0.0,
        "high": 1.0,
        "num_samples": len(scores),
        "samples": list(scores),
    }


def perplexity(model, length, losses, documents):
    return {
        "model": model,
        "task": "perplexity",
        "metric": "perplexity",
        "context_length": length,
        "value": math.exp(np.mean(losses)),
        "low": None,
        "high": None,
        "num_samples": 64 * len(losses),
        "samples": list(losses),
        "documents": list(documents),
    }


def test_matched_proportions_are_those_of_agresti_and_min():
    # 10 trials: 5 only the first finds, 1 only the second, 4 the same
    first, second = [1] * 5 + [0] + [1] * 2 + [0] * 2, [0] * 5 + [1] + [1] * 2 + [0] * 2
    value, low, high = paired_difference(first, second)
    n12, n21, n = 5.5, 1.5, 12
    centre = (n12 - n21) / n
    half = 1.96 * math.sqrt((n12 + n21) - (n12 - n21) ** 2 / n) / n
    assert (value, low, high) == pytest.approx((0.4, centre - half, centre + half), abs=1e-4)
    assert paired_difference(second, first) == pytest.approx((-value, -high, -low))


def test_an_interval_of_equal_trials_does_not_collapse():
    value, low, high = paired_difference([1] * 20, [1] * 20)
    assert value == 0 and low == pytest.approx(-high) and 0.05 < high < 0.15


def test_what_is_hard_for_both_models_drops_out():
    rng = np.random.default_rng(0)
    hard, documents = rng.normal(2, 1, 24), np.repeat(np.arange(8), 3)
    noise = rng.normal(0, 0.01, 24)
    new = perplexity("after", T, hard - 0.2 + noise, documents)
    old = perplexity("untrained", T, hard, documents)
    change = difference(new, old)
    assert change.value == pytest.approx(100 * math.expm1(-0.2), abs=0.5)
    assert change.better and not change.worse and change.high - change.low < 3
    assert difference(old, new).worse
    apart = perplexity("untrained", T, hard, documents[::-1].copy())
    assert difference(new, apart) is None  # not the same windows
    known = {**old, "targets": "a"}
    assert difference({**new, "targets": "a"}, known) == difference(new, known) == change
    assert difference({**new, "targets": "b"}, known) is None  # of another longest length


def test_fewer_than_five_documents_give_no_interval():
    documents = [0, 0, 1, 1, 2, 2, 3, 3]
    new, old = (perplexity(m, T, [x] * 8, documents) for m, x in (("after", 1.0), ("b", 2.0)))
    change = difference(new, old)
    assert change.low is None and change.high is None and not change.better
    assert str(change) == "perplexity −63.2 %"


def rows_of(base_near, untrained, after, base_far=None):
    return [
        passkey("before", L, base_near),
        passkey("before", T, base_far or [0] * len(after)),
        passkey("untrained", T, untrained),
        passkey("after", L, base_near),
        passkey("after", T, after),
    ]


def test_the_verdict_says_what_training_added():
    rows = rows_of([1] * 50, [1] * 19 + [0] * 31, [1] * 50)
    said = headline(RUN, rows)
    assert "passkey found in 100 % of 50 trials at 2,048 (0 % before, 38 % untrained)" in said
    assert "Training added to rescaling alone at 2,048 tokens: passkey +62 points [" in said
    assert "untrained: the base model with the same scaling" in format_table(rows)


def test_training_that_adds_nothing_is_said():
    said = headline(RUN, rows_of([1] * 50, [1] * 48 + [0] * 2, [1] * 49 + [0]))
    assert "falls short: training added nothing beyond error to rescaling alone: passkey +2" in said
    assert describe_training(rows_of([1] * 50, [0] * 50, [1] * 50), T)[1]


def needle(model, scores, **more):
    return {**passkey(model, T, scores), "task": "needle", **more}


def test_what_training_made_worse_is_a_shortfall_and_not_added():
    rows = rows_of([1] * 50, [0] * 50, [1] * 50)
    rows += [needle("untrained", [1] * 45 + [0] * 5), needle("after", [1] * 20 + [0] * 30)]
    added, anything, harm = describe_training(rows, T)
    assert anything and "passkey +100 points" in added and "needle" not in added
    assert harm.startswith("training made worse than rescaling alone: needle −50 points [")
    said = headline(RUN, rows)
    assert "falls short: training made worse than rescaling alone: needle" in said
    assert "now reads" not in said
    rows = [row for row in rows if row["task"] == "needle"]
    added, anything, harm = describe_training(rows, T)
    assert (added, anything) == ("Training added nothing beyond error to rescaling alone", False)
    assert harm


def test_an_interval_that_ends_at_0_is_within_error():
    for value in (0.1, 3.7, 6.1, 100 / 3, 41.3):
        for low, high in ((0.0, 2 * value), (-2 * value, 0.0)):
            keys = {"task": "x", "unit": "points", "higher_is_better": True}
            one = PairedDifference(value=value if high else -value, low=low, high=high, **keys)
            assert not one.better and not one.worse


def test_of_many_comparisons_one_beyond_its_own_interval_is_no_finding():
    one = difference(needle("a", [1] * 8 + [0] * 42), needle("b", [1] * 2 + [0] * 48))
    assert one.better and one.direction(1) == 1 and one.direction(20) == 0
    worse = difference(needle("b", [1] * 2 + [0] * 48), needle("a", [1] * 8 + [0] * 42))
    assert worse.worse and worse.direction(20) == 0


def test_other_questions_are_not_paired_and_are_named():
    rows = rows_of([1] * 50, [0] * 50, [1] * 50)
    for row, asked in zip(rows, ("a", "b", "b", "a", "c"), strict=True):
        row["asked"] = asked
    assert describe_training(rows, T) == ("", True, "")
    assert "Not with the same questions everywhere: passkey." in format_table(rows)
    for row in rows:
        row["asked"] = f"at {row['context_length']}"
    assert "same questions" not in format_table(rows)
    assert describe_training(rows, T)[0]


def test_trials_of_one_haystack_are_not_independent():
    rng = np.random.default_rng(0)
    haystacks = np.repeat(np.arange(7), 8)
    outside = {True: 0, False: 0}
    for _ in range(400):
        ease = np.clip(0.5 + 0.3 * rng.standard_normal(7), 0, 1)[haystacks]
        own = (rng.random(56) < ease).astype(int)
        other = (rng.random(56) < np.clip(1 - ease, 0, 1)).astype(int)  # the same on average
        for clustered in outside:
            more = {"documents": haystacks.tolist()} if clustered else {}
            one = difference(needle("a", own, **more), needle("b", other, **more))
            outside[clustered] += one.better or one.worse
    assert outside[False] > 0.2 * 400 and outside[True] < 0.09 * 400
    assert mean_interval([1, 0] * 4, [0, 1, 2, 3] * 2) == (0.5, None, None)  # of 4 haystacks
    few = needle("a", [1] * 8, documents=[0, 1] * 4), needle("b", [0] * 8)  # an older row
    assert (difference(*few).value, difference(*few).low) == (100, None)
    wide = mean_interval(own.tolist(), haystacks.tolist())
    narrow = mean_interval(own.tolist())
    assert wide[1] < narrow[1] < narrow[2] < wide[2]
    assert mean_interval(own.tolist(), list(range(56))) == narrow


def test_a_base_that_cannot_do_it_is_named_and_not_the_extension():
    said = headline(RUN, rows_of([0] * 48 + [1] * 2, [0] * 50, [0] * 50))
    assert "the base finds 4 % of the passkeys inside its own window of 256 tokens" in said
    assert "did not work" not in said and "passkey below" not in said


def test_a_weak_base_sets_the_bar():
    base = [1] * 40 + [0] * 10
    assert "passkey below" not in headline(RUN, rows_of(base, [0] * 50, [1] * 39 + [0] * 11))
    said = headline(RUN, rows_of(base, [0] * 50, [1] * 30 + [0] * 20))
    assert "passkey below 75 % at 2,048 (lowest 60 %)" in said


def test_a_base_above_the_bar_does_not_lower_it():
    base = [1] * 46 + [0] * 4  # 92 %
    said = headline(RUN, rows_of(base, [0] * 50, [1] * 44 + [0] * 6))
    assert "passkey below 90 % at 2,048 (lowest 88 %)" in said
