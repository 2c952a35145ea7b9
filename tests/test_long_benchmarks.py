"""lm-eval's own long tasks: at the length that is asked, with nothing cut off, offline."""

import math
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipwise.config.recipe import EvalSettings
from skipwise.errors import SkipwiseError
from skipwise.evaluation.evaluator import EvalModel, Texts, evaluate_model, find_tasks
from skipwise.evaluation.harness import benchmarks, long_tasks
from skipwise.pipeline.quickstart import MODEL
from skipwise.report.area import find_areas

pytest.importorskip("lm_eval", reason="pip install '.[bench]'")
pytestmark = pytest.mark.extended

# in the manner of lm-eval's RULER: lengths and tokenizer come from metadata, metrics are lengths
SOURCE = """
import random
import datasets
from transformers import AutoTokenizer

def make(**kwargs):
    tokenizer = AutoTokenizer.from_pretrained(kwargs["tokenizer"])
    rows = []
    for length in kwargs.get("max_seq_lengths", [4096]):
        ids = tokenizer("a b " * length)["input_ids"][: length - 8]
        number = random.randint(0, 10**9)
        rows += [{"input": tokenizer.decode(ids), "n": number, "max_length": length}] * 2
    return {"test": datasets.Dataset.from_list(rows)}

def results(doc, results):
    return {"4096": -1.0, str(doc["max_length"]): 0.5}
"""
CONFIG = {
    "task": "niah_single_1",
    "dataset_path": "",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{input}}",
    "doc_to_target": "{{n}}",
    "metric_list": [{"metric": "4096", "aggregation": "mean", "higher_is_better": True}],
    "generation_kwargs": {"do_sample": False, "max_gen_toks": 8, "until": []},
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A TaskManager of one task, and the prompts that reach the model."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    text = yaml.safe_dump(CONFIG)
    text += "custom_dataset: !function made.make\nprocess_results: !function made.results\n"
    (tmp_path / "made.py").write_text(SOURCE)
    (tmp_path / "niah_single_1.yaml").write_text(text)
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path))
    monkeypatch.setattr(benchmarks, "_built_in", lambda: manager)
    monkeypatch.setattr(long_tasks, "check_requirements", lambda name: None)
    read = []

    def generate(self, context, max_length, **_):
        read.append((context.shape[1], max_length))
        return torch.cat([context, torch.full((len(context), 8), 5)], 1)

    monkeypatch.setattr(HFLM, "_model_generate", generate)
    return read


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_the_length_reaches_the_harness_and_no_prompt_is_cut(stand_in, model, tokenizer):
    assert model.config.max_position_embeddings == 256
    eval_model = EvalModel(label="it", load=lambda: model, tokenizer=tokenizer)
    settings = EvalSettings(tasks=("lm_eval/niah_single_1",), limit=2)
    rows = evaluate_model(eval_model, Texts(), [512, 1024], settings, progress=False)
    assert [(n, m) for n, m in stand_in] == [(504, 512), (1016, 1024)]
    shown = ("task", "metric", "context_length", "value", "num_samples", "num_truncated")
    assert [[row[key] for key in shown] for row in rows] == [
        ["niah_single_1", "string_match", length, 0.5, 2, 0] for length in (512, 1024)
    ]
    assert all("kind" not in row and row["low"] <= 0.5 <= row["high"] for row in rows)


def test_without_a_length_the_window_of_the_config_cuts_and_that_is_said(
    stand_in, model, tokenizer, tmp_path, monkeypatch
):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(
        benchmarks,
        "with_metadata",
        lambda manager, _: _with(manager, {"tokenizer": str(tmp_path / "tokenizer")}),
    )
    with pytest.warns(UserWarning, match="lost their start"):
        benchmarks.run_benchmark(model, tokenizer, "niah_single_1", limit=1)
    assert stand_in == [(248, 256)]


_with = benchmarks.with_metadata


def test_the_seed_decides_the_prompts_that_are_drawn_while_loading(stand_in, model, tokenizer):
    drawn = []
    for seed in (0, 0, 1):
        with benchmarks.guarded(model) as refused:
            folder = str(MODEL)
            benchmarks._set_seed(seed)
            more = long_tasks.metadata("niah_single_1", 64, folder)
            loaded = benchmarks._load("niah_single_1", None, refused, metadata=more)
        drawn.append(loaded["tasks"]["niah_single_1"].dataset["test"]["n"][0])
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_answer_longer_than_the_window_is_an_error_of_one_line(stand_in, model, tokenizer):
    class Task:
        def get_config(self, key):
            return {"max_gen_toks": 16384}

    with pytest.raises(SkipwiseError, match="answer with 16,384 tokens, more than its window"):
        benchmarks._check_answers_fit({"tasks": {"graphwalks_128k": Task()}}, 2048)
    benchmarks._check_answers_fit({"tasks": {"graphwalks_128k": Task()}}, 32768)


def test_names_with_lengths_are_those_of_the_harness():
    index = benchmarks._built_in().task_index
    for folder, names in (("ruler", long_tasks.RULER), ("babilong", long_tasks.BABILONG)):
        known = {
            name
            for name, entry in index.items()
            if entry.yaml_path and entry.yaml_path.parent.name == folder
        }
        assert set(names) < known
        members = yaml.safe_load((index[_group(folder)].yaml_path).read_text())["task"]
        assert sorted(members) == sorted(names)
    for name in ("longbench2", "graphwalks_128k", "graphwalks_1M", "babilong"):
        assert name in index and not long_tasks.has_lengths(name)


def _group(folder):
    return "ruler" if folder == "ruler" else "babilong_longctx"


def test_a_prefix_names_the_harnesss_task_where_skipwise_has_one_of_that_name():
    def names(*asked):
        return [(task.name, task.lengths) for task in find_tasks(asked)]

    assert ("ruler", "each") not in names("ruler") and len(names("ruler")) == 9
    assert names("lm_eval/ruler") == [("lm_eval/ruler", "each")]
    assert names("graphwalks") == [("graphwalks_parents", "each"), ("graphwalks_bfs", "each")]
    assert names("lm_eval/graphwalks") == [("lm_eval/graphwalks", "none")]
    assert names("niah_single_1", "lm_eval/niah_single_1") == [("niah_single_1", "each")]
    assert names("niah_multivalue") != names("lm_eval/niah_multivalue")
    assert names("lm_eval/boolq", "longbench2") == [("boolq", "none"), ("longbench2", "none")]


def test_rulers_mean_counts_each_task_the_same():
    def row(task, metric, value, low, high, n):
        ends = {"low": low, "high": high, "stderr": 0.1, "kind": "benchmark", "num_fewshot": 0}
        return {"task": task, "metric": metric, "value": value, "num_samples": n, **ends}

    rows = [row("a", "512", 1.0, 0.9, 1.1, 10), row("b", "512", 0.5, 0.3, 0.7, 30)]
    rows += [row("a", "4096", -1.0, None, None, 10)]
    mean, a, b = long_tasks.rows_at(512, rows, "ruler")
    half = math.sqrt(0.05**2 + 0.2**2) / 2  # the interval of a ends at 1
    assert (mean["task"], mean["value"], mean["num_samples"]) == ("ruler", 0.75, 40)
    assert (mean["low"], mean["high"]) == pytest.approx((0.75 - half, 0.75 + half))
    assert (a["high"], b["value"], b["context_length"]) == (1.0, 0.5, 512)
    assert {r["metric"] for r in (mean, a, b)} == {"string_match"}
    unknown = [{**r, "low": None, "high": None} for r in rows]
    assert long_tasks.rows_at(512, unknown, "ruler")[0]["low"] is None
    alone = long_tasks.rows_at(512, rows, "niah_single_1")
    assert [{**row, "part_of": "ruler"} for row in alone] == [a, b]


def test_the_area_counts_the_harness_ruler_once():
    def row(task, length, value, **more):
        keys = {"model": "m", "task": task, "metric": "string_match", "context_length": length}
        ends = {"value": value, "low": value, "high": value, "num_samples": 9, "is_share": True}
        return {**keys, **ends, **more}

    rows = [row("passkey", n, 1.0, metric="exact_match") for n in (256, 512)]
    rows += [row("ruler", n, 0.5) for n in (256, 512)]
    parts = [row(f"niah_{i}", n, 0.5, part_of="ruler") for i in range(5) for n in (256, 512)]
    (whole,) = [a for a in find_areas(rows + parts)[0] if a.is_main]
    assert whole.row("m")["value"] == pytest.approx(0.75)


def test_babilong_has_lengths_of_its_own_and_others_are_left_out():
    assert long_tasks.metadata("babilong_qa1", 4096, "x")["max_seq_lengths"] == "4k"
    task = benchmarks.make_task("babilong_longctx")

    class Inputs:
        settings, tokenizer, length = EvalSettings(), None, 3000

    assert task.measure(Inputs()) == []
    assert long_tasks.fits("babilong_qa1", 131072) and long_tasks.fits("ruler", 3000)


def test_a_missing_package_is_named_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(SkipwiseError, match=r"wonderwords.*pip install 'lm_eval\[ruler\]'"):
        long_tasks.check_requirements("ruler")
    long_tasks.check_requirements("babilong_qa1")
