"""A task from outside of the package: one dictionary entry, and it is measured and shown."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from huggingface_hub import metadata_load
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipwise.cli import main
from skipwise.config.parse import dump_recipe, parse_recipe
from skipwise.config.recipe import EvalSettings
from skipwise.config.run_folder import RunFolder
from skipwise.evaluation.evaluator import EvalModel, Texts, _units, evaluate_model, find_tasks
from skipwise.evaluation.fingerprint import harness_identity
from skipwise.evaluation.tasks import TASKS, Task, mean_row
from skipwise.export.model_card import write_card
from skipwise.report import compare_runs, format_table, write_report
from skipwise.report.headline import headline

MEASURED = []


def measure(inputs):
    """Two of three answers are right."""
    MEASURED.append(inputs.length)
    assert inputs.model.training is False
    inputs.tick(3 * inputs.length)
    return [mean_row("colours", "accuracy", inputs.length, [1.0, 1.0, 0.0])]


def measure_delay(inputs):
    """A number that grows with the length; lower is better."""
    row = {"task": "delay", "metric": "tokens_late", "context_length": inputs.length}
    return [{**row, "value": inputs.length / 64, "low": None, "high": None, "num_samples": 3}]


@pytest.fixture(autouse=True)
def added(monkeypatch):
    MEASURED.clear()
    common = {"num_samples": lambda settings: 3, "cache_key": lambda settings: (3, "version 1")}
    colours = Task(
        name="colours",
        measure=measure,
        title="Colours of things",
        about="Share of things whose colour is named.",
        **common,
    )
    delay = Task(
        name="delay", measure=measure_delay, higher_is_better=False, is_share=False, **common
    )
    monkeypatch.setitem(TASKS, "colours", colours)
    monkeypatch.setitem(TASKS, "delay", delay)


def command(tiny, out, *more):
    given = ["eval", str(tiny), "--lengths", "64,128", "--out", str(out), "load.dtype=float32"]
    return [*given, *more]


def test_a_task_from_outside_is_measured_once(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)

    def load():
        return AutoModelForCausalLM.from_pretrained(tiny)

    eval_model = EvalModel(label="it", load=load, tokenizer=tokenizer)
    settings = EvalSettings(tasks=("colours",))
    rows = evaluate_model(eval_model, Texts(), [64, 128], settings, progress=False)
    assert [(r["task"], r["context_length"], r["num_samples"]) for r in rows] == [
        ("colours", 64, 3),
        ("colours", 128, 3),
    ]
    again = evaluate_model(eval_model, Texts(), [64, 128], settings, done=rows, progress=False)
    assert again == rows and MEASURED == [64, 128]


def test_skipwise_eval_knows_it_and_every_page_shows_it(tiny, tmp_path, capsys):
    out = tmp_path / "one"
    assert main(command(tiny, out, "--tasks", "colours,delay")) == 0
    table = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert ["colours", "accuracy ↑", "128", "66.7 % [21, 94]"] in lines
    assert ["delay", "tokens_late ↓", "128", "2.00"] in lines
    page = (out / "report" / "index.html").read_text()
    assert "<h2>Colours of things</h2>" in page and "<h2>delay</h2>" in page
    assert "Share of things whose colour is named." in page
    assert "Colours of things, accuracy, by tokens of context. tiny-llama: 66.7 % at 64" in page
    assert "delay 2.00 at 128" in page and "delay at 128, tiny-llama" in page
    assert {p.name for p in (out / "report").glob("task-*.png")} == {
        *("task-colours-accuracy.png", "task-delay-tokens_late.png")
    }
    shutil.copytree(out, tmp_path / "two")
    compare_runs([out, tmp_path / "two"], tmp_path / "both.html")
    assert "<h2>Colours of things</h2>" in (tmp_path / "both.html").read_text()
    assert main(command(tiny, out, "--tasks", "colours,delay")) == 0
    assert MEASURED == [64, 128], "a second evaluation measures nothing"
    assert main(command(tiny, out, "--tasks", "colour")) == 2
    assert "did you mean colours?" in capsys.readouterr().err


def test_the_model_card_and_the_headline_of_a_run_show_it(tiny, tmp_path):
    run = RunFolder(tmp_path / "run")
    shutil.copytree(tiny, run.model)
    tree = {"model": str(tiny), "target_length": 128, "load": {"dtype": "float32"}}
    tree["eval"] = {"tasks": ["colours"]}
    run.recipe_file.write_text(dump_recipe(parse_recipe(tree)))
    run.update(original_length=64, target_length=128)
    assert main(["eval", str(run.path), "--baseline"]) == 0
    rows = json.loads((run.path / "results.json").read_text())
    assert {row["model"] for row in rows} == {"before", "after"}
    assert "colours 66.7 % at 128 (66.7 % before)" in headline(run.metadata(), rows)
    assert "<h2>Colours of things</h2>" in write_report(run.path).read_text()
    card = write_card(run)
    assert format_table(rows) in card.read_text()
    assert "colours 66.7 % before, 66.7 % after" in card.read_text()
    (model,) = metadata_load(card)["model-index"]
    (result,) = model["results"]
    assert result["dataset"]["name"] == "colours at 128 tokens"
    assert result["metrics"][0]["name"] == "accuracy"


def test_the_keys_of_results_saved_earlier_stay_valid(tmp_path):
    settings = EvalSettings(passkey_samples=4, needle_samples=5, num_depths=2, seed=3, limit=7)
    texts = Texts(documents=[np.arange(200)])
    model = EvalModel(label="it", load=lambda: None, tokenizer=None, identity="weights")
    tasks = find_tasks(("perplexity", "passkey", "needle", "vt", "boolq"))
    text = texts.identity()
    decided_by = [
        ["perplexity", [64, 128], 32, None, text],
        ["passkey", 64, 4, 2],
        ["passkey", 128, 4, 2],
        ["needle", 64, 5, 2, 10, text],
        ["needle", 128, 5, 2, 10, text],
        ["vt", 64, 20, text],
        ["vt", 128, 20, text],
        ["boolq", 7, harness_identity(None)],
    ]
    (tmp_path / "tasks" / "deep").mkdir(parents=True)
    alone = harness_identity(str(tmp_path / "tasks"))
    (tmp_path / "tasks" / "deep" / "x.yaml").write_text("task: x")
    assert alone == harness_identity(None) != harness_identity(str(tmp_path / "tasks"))
    keys = [unit.key for unit in _units(tasks, model, texts, [64, 128], settings, None)]
    for key, facts in zip(keys, decided_by, strict=True):
        whole = json.dumps([1, "weights", 3, *facts])
        assert key == hashlib.sha1(whole.encode()).hexdigest()[:12], facts
    assert keys[1] == "08b343a922db"
