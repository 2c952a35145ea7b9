"""Evaluating anything: nothing is measured twice, nothing is lost, mistakes show first."""

import json
import shutil

import numpy as np
import pytest
from oracle import Oracle
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from skipwise.cli import main
from skipwise.config import progress
from skipwise.config.lengths import parse_lengths
from skipwise.config.parse import parse_recipe
from skipwise.config.recipe import EvalSettings, with_known_revision
from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError
from skipwise.evaluation import run as evaluate_module
from skipwise.evaluation.evaluator import EvalModel, Texts, evaluate_model
from skipwise.evaluation.run import _check_base, _labels
from skipwise.evaluation.tasks import ruler
from skipwise.evaluation.tasks.prompts import token_ids
from skipwise.models.identity import base_identity
from skipwise.pipeline.quickstart import MODEL

SMALL = ["eval.passkey_samples=4", "eval.needle_samples=4", "eval.num_depths=2"]
SMALL += ["eval.perplexity_windows=2", "load.dtype=float32"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def counted(tokenizer):
    loads = []

    def load():
        loads.append(1)
        return Oracle()

    return EvalModel(label="it", load=load, tokenizer=tokenizer, identity="a"), loads


def settings(**more):
    values = {"tasks": ("passkey",), "passkey_samples": 4, "num_depths": 2}
    return EvalSettings(**{**values, **more})


def test_what_was_measured_is_not_measured_again(counted):
    eval_model, loads = counted
    saved = []
    first = evaluate_model(
        eval_model, Texts(), [256, 512], settings(), save=saved.append, progress=False
    )
    assert len(loads) == 1 and [len(rows) for rows in saved] == [2, 4]
    again = evaluate_model(eval_model, Texts(), [256, 512], settings(), done=first, progress=False)
    assert len(loads) == 1 and again == first
    more = evaluate_model(
        eval_model, Texts(), [256, 512, 1024], settings(), done=first, progress=False
    )
    assert (
        len(loads) == 2
        and [r["context_length"] for r in more] == [256] * 2 + [512] * 2 + [1024] * 2
    )


def test_a_run_that_is_killed_keeps_what_it_had_measured(counted, monkeypatch):
    eval_model, _ = counted
    saved = []
    measured = []

    def fail_late(*arguments):
        measured.append(1)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return [True] * 4

    monkeypatch.setattr("skipwise.evaluation.tasks.passkey.exact_match", fail_late)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(
            eval_model, Texts(), [256, 512], settings(), save=saved.append, progress=False
        )
    assert {row["context_length"] for row in saved[-1]} == {256}
    evaluate_model(
        eval_model,
        Texts(),
        [256, 512],
        settings(),
        done=saved[-1],
        save=saved.append,
        progress=False,
    )
    assert len(measured) == 3  # 256 was not measured again
    assert {row["context_length"] for row in saved[-1]} == {256, 512}


def test_ruler_is_all_of_its_tasks_and_each_has_a_name_of_its_own(counted):
    eval_model, _ = counted
    rows = evaluate_model(
        eval_model, Texts(), [2048], settings(tasks=("ruler",), ruler_samples=1), progress=False
    )
    assert {row["task"] for row in rows} == set(ruler.TASKS)
    assert {row["group"] for row in rows} == {"ruler"}
    rows = evaluate_model(
        eval_model, Texts(), [2048], settings(tasks=("vt",), ruler_samples=1), progress=False
    )
    assert {row["task"] for row in rows} == {"vt"}


def test_without_text_there_is_no_needle_grid_and_no_perplexity(counted):
    eval_model, loads = counted
    asked = settings(tasks=("perplexity", "needle"))
    assert evaluate_model(eval_model, Texts(), [256], asked, progress=False) == []
    assert not loads


@pytest.mark.extended  # needs lm-eval
def test_a_task_nobody_knows_is_named_before_a_model_is_loaded(counted):
    eval_model, loads = counted
    for name, word in (("passkeys", "mean passkey"), ("short-benchmark", "mean short-benchmarks")):
        with pytest.raises(SkipwiseError, match=word):
            evaluate_model(eval_model, Texts(), [256], settings(tasks=(name,)), progress=False)
    with pytest.raises(SkipwiseError, match=r"no task 'helaswag'.*hellaswag"):
        evaluate_model(eval_model, Texts(), [256], settings(tasks=("helaswag",)), progress=False)
    assert not loads


def test_what_could_not_be_measured_is_said(counted, tokenizer, capsys):
    eval_model, _ = counted
    evaluate_model(eval_model, Texts(), [64], settings(tasks=("perplexity", "needle", "vt")))
    said = capsys.readouterr().err
    assert "left out: perplexity (no text), needle (no text), vt 64 (it does not fit)" in said
    texts = Texts(documents=[np.array(token_ids(tokenizer, "x = 1\n" * 30))])
    evaluate_model(eval_model, texts, [64, 256], settings(tasks=("perplexity",)))
    assert "perplexity at 256 (no document is that long)" in capsys.readouterr().err


def test_progress_counts_all_tokens_and_a_log_file_gets_lines(
    counted, tokenizer, capsys, monkeypatch
):
    bars = []

    class Bar(progress.tqdm):
        def __init__(self, *arguments, **more):
            bars.append(self)
            super().__init__(*arguments, **{**more, "disable": False})

    eval_model, _ = counted
    texts = Texts(documents=[np.array(token_ids(tokenizer, "x = 1\n" * 300))])
    asked = settings(tasks=("perplexity", "passkey"), perplexity_windows=2)
    with monkeypatch.context() as patch:
        patch.setattr(progress, "tqdm", Bar)
        evaluate_model(eval_model, texts, [256, 512], asked)
    said = capsys.readouterr()
    assert not said.out and "evaluate it" in said.err and "passkey 512" in said.err
    assert bars[0].n == bars[0].total == (256 + 512) * (2 + 4)
    monkeypatch.setattr(progress, "SECONDS", 0)
    evaluate_model(eval_model, texts, [256, 512], asked)
    lines = capsys.readouterr().err.splitlines()
    assert "evaluate it: 33%, perplexity done, about " in "\n".join(lines)
    assert "100%, passkey 512 done" in lines[-1]


def test_lengths_are_lists_and_doublings():
    assert parse_lengths("4k..32k") == [4096, 8192, 16384, 32768]
    assert parse_lengths("4k..20k") == [4096, 8192, 16384, 20480]
    assert parse_lengths("8k,4k") == [4096, 8192]
    with pytest.raises(SkipwiseError, match="smaller than the first"):
        parse_lengths("8k..4k")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(200)))
    return file


def test_eval_of_a_model_with_a_baseline_writes_a_folder_and_goes_on(
    tiny, text, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "eval"
    command = ["eval", str(tiny), "--lengths", "128..256", "--data", str(text)]
    command += ["--tasks", "perplexity,passkey,needle", "--out", str(out), *SMALL]
    assert main([*command, "--baseline", str(MODEL)]) == 0
    said = capsys.readouterr().out
    assert "tiny-llama" in said and "needle" in said and "results.json" in said
    run = RunFolder(out)
    assert {row["model"] for row in run.results()} == {"tiny-llama", "model"}
    assert {row["metric"] for row in run.results()} >= {"bits_per_byte", "exact_match"}
    assert run.metadata()["baseline"] == "model" and (out / "report" / "index.html").exists()

    def refuse(*arguments, **more):
        raise AssertionError("it was measured already")

    before = run.results()
    monkeypatch.setattr("skipwise.evaluation.run.load_for_evaluation", refuse)
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == [row for row in before if row["model"] == "tiny-llama"]
    assert run.results() == before
    assert main(["report", str(out)]) == 0


def test_a_baseline_takes_the_label_of_no_model_of_the_run(tiny, tmp_path):
    run = RunFolder(tmp_path / "run")
    recipe = parse_recipe({"model": str(tiny), "target_length": 256})
    for name in ("before", "untrained", "after"):
        labels = _labels(recipe, run, True, str(tmp_path / name))
        assert list(labels) == [str(tmp_path / name), "after"]


def test_a_base_that_has_changed_is_not_measured_as_the_one_before(tiny, tmp_path, monkeypatch):
    base = shutil.copytree(tiny, tmp_path / "base")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    recipe = parse_recipe({"model": str(base), "target_length": 256})
    run.update(identity={"base": base_identity(str(base), None)})
    _check_base(recipe, run)
    labels = {"other": str(tiny), "before": str(base)}
    hub = with_known_revision(recipe, {"base": {"revision": "abc"}})
    asked = []
    monkeypatch.setattr(evaluate_module, "make_eval_model", lambda *a, **k: asked.append(a))
    evaluate_module._eval_models(hub, run, labels, [128])
    assert [a[2].revision for a in asked] == [None, "abc"]  # the commit is the base's alone
    (base / "config.json").write_text((base / "config.json").read_text() + " ")
    with pytest.raises(SkipwiseError, match=r"has changed since .*: config.json differs"):
        _check_base(recipe, run)
    revision = {"base": {"revision": "abc"}}
    assert with_known_revision(recipe, revision).load.revision == "abc"


def test_a_task_asked_for_that_needs_text_is_an_error_without(tiny, tmp_path, capsys):
    command = ["eval", str(tiny), "--lengths", "128", "--out", str(tmp_path / "e")]
    assert main([*command, "--tasks", "passkey,needle"]) == 2
    assert "needle need text: type --data" in capsys.readouterr().err
    assert main([*command, "--tasks", "passkey", "--limit", "0"]) == 2
    assert "--limit" in capsys.readouterr().err


def test_eval_does_not_write_into_other_folders(tiny, text, tmp_path, capsys):
    assert main(["eval", str(tiny), "--lengths", "128", "--out", str(text.parent)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "nothing"), "--lengths", "1k"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_models_with_learned_positions_are_measured_as_far_as_they_go(tmp_path, text, capsys):
    folder = tmp_path / "gpt2"
    config = GPT2Config(
        vocab_size=1024,
        n_positions=256,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    command = ["eval", str(folder), "--data", str(text), "--out", str(tmp_path / "e"), *SMALL]
    command += ["--tasks", "perplexity,passkey,niah_single_words"]
    assert main([*command, "--lengths", "128,256"]) == 0
    assert "| perplexity" in capsys.readouterr().out
    assert main([*command, "--lengths", "512"]) == 2
    assert "256 learned positions" in capsys.readouterr().err


def test_several_evaluations_stand_side_by_side(tiny, text, tmp_path, capsys):
    for name in ("one", "two"):
        command = ["eval", str(tiny), "--lengths", "128", "--data", str(text), *SMALL]
        assert main([*command, "--tasks", "passkey", "--out", str(tmp_path / name)]) == 0
    page = tmp_path / "both.html"
    folders = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert main(["report", *folders, "--out", str(page)]) == 0
    assert "passkey" in capsys.readouterr().out and page.stat().st_size > 5000
