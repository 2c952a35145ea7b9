"""RULER, needles, benchmarks and evaluation folders, as the report tells them."""

import json
import re

import pytest

from skipwise.report import format_table, write_report
from skipwise.report.benchmarks import describe_benchmarks, differences
from skipwise.report.headline import headline
from skipwise.report.rows import RULER_TASKS, find
from skipwise.report.ruler import EFFECTIVE_THRESHOLD, summarise_ruler

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
DEPTHS = tuple(d / 10 for d in range(11))
BENCHMARKS = {
    "boolq": ("acc", 0, 0.743, 0.741),
    "piqa": ("acc", 0, 0.781, 0.779),
    "winogrande": ("acc", 5, 0.690, 0.699),
    "truthfulqa_mc2": ("acc", 0, 0.402, 0.399),
    "arc_challenge": ("acc_norm", 25, 0.462, 0.455),
    "hellaswag": ("acc_norm", 10, 0.760, 0.731),
}


def ppl(model, length, value, metric="perplexity"):
    low, high = (None, None) if value is None else (value * 0.9, value * 1.1)
    return {
        "model": model,
        "task": "perplexity",
        "metric": metric,
        "context_length": length,
        "value": value,
        "low": low,
        "high": high,
        "num_samples": 64,
        "key": "5f2c",
    }


def found(model, task, length, value, depth=None, num=10):
    row = {**ppl(model, length, value, "exact_match"), "task": task, "num_samples": num}
    return row if depth is None else {**row, "depth": depth, "low": 0.0, "high": 1.0}


def ruler(model, task, length, value, num=50):
    high = None if value is None else min(value * 1.1, 1.0)
    row = found(model, task, length, value, num=num)
    return {**row, "high": high, "metric": "recall", "group": "ruler"}


def bench(model, task, value, stderr=0.012, metric="acc", shots=0):
    return {
        "model": model,
        "task": task,
        "metric": metric,
        "context_length": None,
        "value": value,
        "low": None,
        "high": None,
        "num_samples": 1000,
        "kind": "benchmark",
        "num_fewshot": shots,
        "stderr": stderr,
    }


def complete_rows(base, other, window=4096):
    """All kinds of rows: `base` reads to its window, `other` to the longest length."""
    rows = []
    for model, better in ((base, False), (other, True)):
        for i, n in enumerate(LENGTHS):
            inside = better or n <= window
            value = 7.9 - 0.1 * i if inside else 30.0 * 2**i
            rows += [ppl(model, n, value), ppl(model, n, 0.9 + value / 100, "bits_per_byte")]
            for d in DEPTHS:
                rows.append(found(model, "passkey", n, 1.0 if inside else 0.0, d))
                share = round((0.99 if inside else 0.05) * (1 - i / 25) - d * (1 - d) * i / 12, 2)
                rows.append(found(model, "needle", n, max(share, 0.0), d))
            for k, task in enumerate(RULER_TASKS):
                share = (0.99 - 0.01 * i - 0.02 * k) if inside else 0.1 / (k + 1)
                rows.append(ruler(model, task, n, share))
    for task, (metric, shots, was, now) in BENCHMARKS.items():
        error = 0.0043 if task == "hellaswag" else 0.013
        rows.append(bench(base, task, was, error, metric, shots))
        rows.append(bench(other, task, now, error, metric, shots))
    return rows


def make_run(folder, name="demo", rows=None, base="tiny", **more):
    """A complete run: everything that a page can show."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = [(0, 9000 + 4400 * k) for k in range(5)]
    run = {
        "name": name,
        "status": "finished",
        "model": {"name": base, "family": "llama", "num_parameters": 1_100_000_000},
        "original_length": 4096,
        "train_length": 4096,
        "target_length": 32768,
        "data": {"sources": ["books"], "num_documents": 10, "num_tokens": 99999},
        "checks": [{"name": "rope", "passed": True, "detail": "scaled as asked"}],
        "training": {
            "method": "pose",
            "mode": "full",
            "num_steps": 150,
            "batch_size": 64,
            "num_tokens": 150 * 64 * 4096,
            "seconds": 4000.0,
            "peak_memory_gib": 30.5,
        },
        "selection": {
            "by": "needles",
            "metric": "exact match",
            "higher_is_better": True,
            "chosen": 100,
            "candidates": [
                {"step": 50, "score": 0.41, "rows": [{}]},
                {"step": 100, "score": 0.87},
                {"step": 150, "score": 0.83},
            ],
        },
        "positions": {
            "sampler": "PoSE()",
            "examples": [{"lengths": [2000, 2096], "position_starts": s} for s in starts],
            "distances": [1, 2048, 16384, 32767],
            "coverage": [1.0, 0.6, 0.2, 0.01],
        },
        "machine": {"cpu": "x", "num_cpus": 2, "memory_gib": 8},
        "versions": {"skipwise": "0.1.0"},
        "reproduce": ["skipwise extend tiny --to 32k"],
        **more,
    }
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "recipe.yaml").write_text("model: tiny\n")
    lines = [json.dumps({"step": i, "loss": 2 - i / 200}) for i in range(1, 151)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    rows = complete_rows("before", "after") if rows is None else rows
    (folder / "results.json").write_text(json.dumps(rows))
    return folder


def make_evaluation(folder, rows, name="eval-demo", **more):
    folder.mkdir(parents=True, exist_ok=True)
    run = {
        "name": name,
        "kind": "evaluation",
        "models": {
            label: {"name": f"./{label}"} for label in dict.fromkeys(r["model"] for r in rows)
        },
        "command": "skipwise eval ./my-model --lengths 1k..32k --baseline ./base",
        "machine": {"cpu": "x"},
        "versions": {"skipwise": "0.1.0", "torch": "2.6"},
        **more,
    }
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "results.json").write_text(json.dumps(rows))
    return folder


def titles(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


@pytest.mark.parametrize(
    ("averages", "effective"),
    [
        ({4096: 0.95, 8192: 0.90, 16384: 0.856}, "at least 16,384"),  # not below is enough
        ({4096: 0.95, 8192: 0.90, 16384: 0.855}, "8,192"),
        ({4096: 0.85, 8192: 0.95}, "none"),
        ({4096: 0.95, 8192: 0.50, 16384: 0.95}, "4,096"),  # a hole in the middle
    ],
)
def test_the_effective_length_is_the_largest_that_passes_with_all_shorter_ones(averages, effective):
    rows = [ruler("after", "vt", n, v) for n, v in sorted(averages.items(), reverse=True)]
    assert summarise_ruler(rows)[0].effective == effective
    assert EFFECTIVE_THRESHOLD == 0.856


def test_the_ruler_average_weighs_every_task_alike_and_says_how_many():
    rows = [
        ruler("after", "vt", 4096, 0.9, num=100),
        ruler("after", "cwe", 4096, 0.6, num=10),
        ruler("after", "niah_multikey", 4096, 0.3, num=50),
    ]
    (summary,) = summarise_ruler(rows)
    assert summary.averages == {4096: pytest.approx(0.6)}  # (0.9 + 0.6 + 0.3) / 3
    assert summary.tasks == ("niah_multikey", "vt", "cwe")
    table = format_table(rows)
    assert "ruler average: mean of 3 tasks" in table
    lines = [re.split(r" *\| *", line)[1:-1] for line in table.splitlines()]
    assert ["ruler average", "recall ↑", "4,096", "60 %"] in lines
    assert ["effective length", "average ≥ 85.6 %", "", "none"] in lines


def test_there_is_no_average_over_different_tasks():
    rows = [ruler("after", "vt", n, 0.9) for n in (1024, 2048)]
    near, far = ruler("after", "cwe", 1024, 0.9), ruler("after", "cwe", 2048, None)
    for hole in ([near], [near, far]):
        (summary,) = summarise_ruler(rows + hole)
        assert not summary.averages and summary.effective == "not known"
        table = format_table(rows + hole)
        assert "no average for after: not every task was measured at every length" in table
    other = [ruler("before", "cwe", n, 0.9) for n in (1024, 2048)]
    assert "not the same tasks: not to be compared" in format_table(rows + other)


SMALL = [
    ppl("before", 256, 8.0),
    ppl("after", 256, 8.2),
    ppl("before", 256, 0.95, "bits_per_byte"),
    ppl("after", 256, 0.96, "bits_per_byte"),
    *[found("before", "passkey", 256, 1.0, d) for d in (0.0, 1.0)],
    *[found(m, "needle", 256, v, 0.5) for m, v in (("before", 0.9), ("after", 0.8))],
    *[ruler(m, "vt", 256, v) for m, v in (("before", 0.9), ("after", 0.8))],
    bench("after", "boolq", 0.741, 0.0077),
    bench("before", "boolq", 0.743, 0.0076),
    bench("before", "hellaswag", 0.76, None, "acc_norm", 10),
]
GOLDEN = """\
| Task             | Metric           | Context |               before |                after |
| ---------------- | ---------------- | ------: | -------------------: | -------------------: |
| perplexity       | perplexity ↓     |     256 |    8.00 [7.20, 8.80] |    8.20 [7.38, 9.02] |
| perplexity       | bits per byte ↓  |     256 | 0.950 [0.855, 1.045] | 0.960 [0.864, 1.056] |
| passkey          | exact match ↑    |     256 |      100 % [84, 100] |         not measured |
| needle           | exact match ↑    |     256 |        90 % [60, 98] |        80 % [49, 94] |
| vt               | recall ↑         |     256 |        90 % [81, 99] |        80 % [72, 88] |
| ruler average    | recall ↑         |     256 |                 90 % |                 80 % |
| effective length | average ≥ 85.6 % |         |         at least 256 |                 none |

ruler average: mean of 1 task

| Benchmark | Metric     | Shots |     before |        after |               Difference |
| --------- | ---------- | ----: | ---------: | -----------: | -----------------------: |
| boolq     | acc ↑      |     0 | 74.3 ± 0.8 |   74.1 ± 0.8 | −0.2 ± 1.1, within error |
| hellaswag | acc_norm ↑ |    10 |       76.0 | not measured |             not measured |

percent ± standard error, and of a difference sqrt(se1² + se2²)

Short contexts, after against before: 1 of 1 benchmark within error; not measured for both: \
hellaswag."""


def test_the_table_of_everything_reads_as_it_should():
    assert format_table(SMALL) == GOLDEN
    assert format_table(SMALL[::-1]).splitlines()[2:9] == GOLDEN.splitlines()[2:9]


def test_perplexity_is_not_taken_for_bits_per_byte():
    rows = [ppl("after", 256, 0.95, "bits_per_byte"), ppl("after", 256, 8.2)]
    assert find(rows, "after", "perplexity", 256)["value"] == 8.2


def test_a_difference_is_judged_by_the_errors_of_both():
    # sqrt(0.003² + 0.004²) = 0.005: beyond error from 0.0098 on
    rows = [bench("before", "boolq", 0.5, 0.003), bench("after", "boolq", 0.4903, 0.004)]
    (within,) = differences(rows, "before", "after")
    assert within.error == pytest.approx(0.005) and within.judgement == "within error"
    rows[1]["value"] = 0.4901
    (worse,) = differences(rows, "before", "after")
    assert worse.judgement == "worse" and str(worse) == "−1.0 ± 0.5"
    rows[1]["value"] = 0.5099
    assert differences(rows, "before", "after")[0].judgement == "better"
    lower = [{**row, "higher_is_better": False} for row in rows]
    assert differences(lower, "before", "after")[0].judgement == "worse"
    rows[0]["stderr"] = None
    assert differences(rows, "before", "after")[0].judgement == "error not known"


def test_the_verdict_on_short_contexts_names_what_changed_and_the_mean():
    # changes in points: −0.2 −0.2 +0.9 −0.3 −0.7 −2.9, mean −3.4 / 6; hellaswag's error is 0.608
    assert describe_benchmarks(complete_rows("before", "after")) == [
        "Short contexts, after against before: worse beyond error: hellaswag (−2.9 ± 0.6); 5 of 6 "
        "benchmarks within error; mean change −0.57 points over 6."
    ]
    unlike = [bench("before", "boolq", 0.7), bench("after", "boolq", 0.7, shots=5)]
    assert describe_benchmarks(unlike)[0].endswith("no benchmark was measured for both.")
    both = [bench(m, "piqa", 0.7, 0.1, k) for m in ("before", "after") for k in ("acc", "acc_norm")]
    assert [d.metric for d in differences(both, "before", "after")] == ["acc_norm"]
    assert describe_benchmarks([bench("after", "boolq", 0.7)]) == []


def test_the_headline_of_a_run_mentions_benchmarks_that_fell_and_no_others():
    run = {"model": {"name": "tiny"}, "original_length": 4096, "target_length": 32768}
    rows = complete_rows("before", "after")
    said = headline(run, rows)
    assert (
        "falls short: worse beyond error on short contexts: hellaswag from 76.0 to 73.1 %" in said
    )
    assert "boolq" not in said and "piqa" not in said
    said = headline(run, [row for row in rows if row["task"] != "hellaswag"])
    assert said.startswith("tiny now reads 32,768 tokens instead of 4,096") and "piqa" not in said
    assert "needle found in" in said
    assert "effective length at least 32,768, 4,096 before (RULER, mean of 9 tasks)" in said


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("complete"))
    return folder, write_report(folder).read_text()


def test_the_page_of_a_run_shows_every_kind_of_row(run_page):
    folder, page = run_page
    assert titles(page) == [
        "Before, rescaled and trained",
        "One figure over all context lengths",
        "Perplexity against context length",
        "Passkey retrieval",
        "Needle in real text",
        "RULER tasks",
        "Short-context benchmarks",
        "Load and serve the model",
        "Choice of the checkpoint",
        "Training loss",
        "Positions seen in training",
        "Cost compared with full-length training",
        "Checks",
        "Data, model and machine",
        "Reproduce",
    ]
    assert {path.stem for path in (folder / "report").glob("*.png")} == {
        *("perplexity", "passkey", "needle", "ruler", "selection", "loss", "positions")
    }
    assert "41 % at step 50, 87 % at step 100 (chosen), 83 % at step 150" in page
    assert "Chosen: step 100, 87&nbsp;%" in page
    assert "None" not in page and "nan" not in page
    cells = set(re.findall(r'id="needle-wide-(cell-\d+-\d+-\d+)"', page))
    assert len(cells) == len(DEPTHS) * len(LENGTHS) * 2
    assert all(task.replace("_", "_<wbr>") in page for task in RULER_TASKS)


def test_new_sections_stand_only_where_there_are_rows(tmp_path):
    rows = [ppl("after", 4096, 8.0), found("after", "passkey", 4096, 1.0, 0.5)]
    page = write_report(make_run(tmp_path, rows=rows, selection=None)).read_text()
    new = {"Needle in real text", "RULER tasks", "Short-context benchmarks"}
    assert not {*new, "Choice of the checkpoint"} & set(titles(page))


@pytest.mark.extended
def test_an_evaluation_claims_no_extension_and_shows_no_training(tmp_path):
    rows = complete_rows("base", "my-model")
    rows.sort(key=lambda row: row["model"] == "base")  # the baseline was measured later
    folder = make_evaluation(tmp_path, rows, baseline="base")
    page = write_report(folder).read_text()
    assert titles(page) == [
        "What was measured",
        "One figure over all context lengths",
        "Perplexity against context length",
        "Passkey retrieval",
        "Needle in real text",
        "RULER tasks",
        "Short-context benchmarks",
        "Models and machine",
        "Reproduce",
    ]
    head = re.sub("<.*?>", "", page.split("<h1>")[1].split("</h1>")[0]).replace("&nbsp;", " ")
    assert head.startswith("base and my-model, measured from 1,024 to 32,768 tokens. base: ")
    assert "my-model: effective length at least 32,768 (RULER, mean of 9 tasks)" in head
    assert "passkey found in 0 % of 110 trials at 32,768" in head
    assert "worse than base beyond error on hellaswag from 76.0 to 73.1 %" in head
    assert "extended" not in head and "now reads" not in head
    assert "skipwise eval ./my-model" in page and "Training" not in page


def test_an_evaluation_of_little_says_little(tmp_path):
    folder = make_evaluation(tmp_path, [bench("my-model", "boolq", 0.7)])
    page = write_report(folder).read_text()
    assert titles(page) == ["Short-context benchmarks", "Models and machine", "Reproduce"]
    assert "my-model, measured on benchmarks of short contexts. " in page
    page = write_report(make_evaluation(tmp_path, [])).read_text()
    assert "eval-demo is not measured yet." in page and "Not measured." in page


def test_values_that_are_missing_survive_everywhere(tmp_path):
    rows = [
        ppl("m", 1024, None),
        ppl("m", 1024, None, "bits_per_byte"),
        found("m", "needle", 1024, None, 0.5),
        found("m", "passkey", 1024, None, 0.5),
        found("m", "passkey", 2048, 1.0, 0.5),
        ruler("m", "vt", 1024, None),
        bench("m", "boolq", None, None),
        bench("m", "piqa", 0.7, float("nan")),
        {**bench("m", "odd", 12.5, None, "bleu"), "num_fewshot": None},
    ]
    table = format_table(rows)
    assert "beyond measure" in table and "None" not in table and "nan" not in table
    page = write_report(make_evaluation(tmp_path, rows)).read_text()
    assert "Beyond measure, and not drawn" not in page, "there is no curve to draw"
    assert ">None" not in page and "nan" not in page
    bare = [{k: row[k] for k in ("model", "task", "metric", "value")} for row in rows]
    assert "not measured" in format_table(bare)


def test_more_models_than_colours_stand_in_the_table_alone(tmp_path):
    rows = []
    for i in range(5):
        rows += [ppl(f"m{i}", n, 8.0 + i) for n in (256, 512)]
        rows += [ruler(f"m{i}", "vt", n, 0.9) for n in (256, 512)]
        rows += [found(f"m{i}", "needle", n, 0.9, 0.5) for n in (256, 512)]
    page = write_report(make_evaluation(tmp_path, rows)).read_text()
    assert page.count("5 models are too many to tell apart as curves") == 2
    assert "perplexity-wide" not in page and "needle-wide-cell-4-0-1" in page
    assert "5 models, measured from 256 to 512 tokens." in page
