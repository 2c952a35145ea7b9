"""The study's page shows its newest results, and what it tries are examples like any other."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "research" / "study"))

import dial  # noqa: E402
import figures  # noqa: E402
import settings  # noqa: E402
import train  # noqa: E402
from rows import Rows  # noqa: E402
from samplers import VariantDataset  # noqa: E402

from skipwise.data.corpus import build_corpus  # noqa: E402
from skipwise.data.token_cache import TokenStore  # noqa: E402
from skipwise.pose.samplers import PoSE  # noqa: E402


def test_the_page_shows_the_newest_results():
    page = figures.PAGE.read_text(encoding="utf-8")
    assert figures.filled(page, figures.main_table(Rows())) == page


def test_the_table_is_filled_alone_and_a_missing_one_is_an_error():
    page = "x\n<!-- table -->\nold\n<!-- end -->\n\n## kept\n"
    once = figures.filled(page, "| 1 |")
    assert once == "x\n<!-- table -->\n\n| 1 |\n\n<!-- end -->\n\n## kept\n"
    assert figures.filled(once, "| 1 |") == once
    with pytest.raises(AssertionError, match="0 blocks"):
        figures.filled("x\n<!-- end -->\n", "| 1 |")


def test_the_plan_expects_what_the_study_measured():
    stored = dial.EVIDENCE.read_text(encoding="utf-8")
    assert stored == dial.evidence(), "run python research/study/dial.py --evidence"
    rows = {(r["factor"], r["lengths"]): r["behind"] for r in json.loads(stored)["rows"]}
    assert rows[4.0, 1.0] == 0.0307  # 5.28 over 5.12, as the study's page has it


def test_every_stored_row_belongs_to_a_setting_of_a_table():
    rows = Rows()
    settings_of = {s for make in settings.TABLES.values() for s in make()}
    found = {row["key"] for setting in settings_of for row in rows.all_of(setting)}
    assert found == {row["key"] for row in rows.rows}
    assert len(rows.rows) > 200


def test_settings_that_differ_have_keys_that_differ():
    found = {setting for make in settings.TABLES.values() for setting in make()}
    assert len({setting.key for setting in found}) == len(found) > 100


def test_examples_of_M_tokens_are_trained_at_equal_tokens_and_taught_what_the_base_reads():
    for setting in settings.dial():
        M = setting.train_length
        sampler = train._sampler(setting)
        assert sampler.train_length == (M or setting.target)
        if setting.distil:
            assert M <= 2 * settings.L
            example = sampler.sample(np.random.default_rng(0), setting.target)
            taught = train._taught(example, setting)
            assert taught.sum() == example.lengths[0] and len(taught) == M
    assert len({s.key for s in settings.dial()}) == len(settings.dial()) == 3 * (8 + 9)


def test_a_key_stays_when_a_setting_is_added_and_tells_it_when_it_is_used():
    paper = settings.at(settings.PAPER, 2048)
    assert paper.key == "cb2c2d43a27e"  # rows measured before there was `finish_at` are found by it
    assert len({paper.key, settings.made(paper, finish_at="spread").key}) == 2


@pytest.mark.parametrize(
    ("way", "first", "last"), [("first", 0, 4), ("last", 36, 40), ("spread", 9, 40)]
)
def test_a_finish_in_one_schedule_takes_its_share_of_the_steps(way, first, last):
    setting = settings.made(finish=0.1, finish_at=way)
    full = [k for k in range(40) if train.is_full(k, 40, setting)]
    assert len(full) == 4 and full[0] == first and full[-1] == last - 1


@pytest.mark.parametrize("variant", ["related:4", "topup:1", "sections:2", "sections:8"])
def test_a_variant_makes_examples_of_L_tokens_within_T(variant):
    L, T = 64, 512
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 900, 4000).astype(np.uint16)
    store = TokenStore(tokens=tokens, offsets=np.array([0, 300, 4000]))
    corpus = build_corpus([store], [None], min_length=L, target_length=T)
    sampler = PoSE(train_length=L, target_length=T, content="aligned")
    dataset = VariantDataset(variant, corpus, sampler, seed=0, num_examples=200)
    for item in (dataset[k] for k in range(200)):
        positions = item["position_ids"]
        assert item["input_ids"].shape == item["labels"].shape == positions.shape == (L,)
        assert positions[0] == 0 and positions[-1] < T and (np.diff(positions) > 0).all()
        if variant == "topup:1":
            assert positions[-1] == T - 1
        if variant == "sections:8":
            assert len(item["example"].lengths) >= 4
    assert (dataset[7]["position_ids"] == dataset[7]["position_ids"]).all()
