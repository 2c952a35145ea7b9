"""What an evaluation keeps, and what makes it measure again: nothing old passes for new."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from oracle import Oracle
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from skipwise.cli import main
from skipwise.config.parse import dump_recipe, parse_recipe
from skipwise.config.recipe import EvalSettings
from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError
from skipwise.evaluation.evaluator import EvalModel, Texts, _units, evaluate_model, find_tasks
from skipwise.evaluation.tasks.prompts import token_ids
from skipwise.pipeline.quickstart import MODEL

SMALL = ["eval.passkey_samples=4", "eval.perplexity_windows=2", "load.dtype=float32"]
CHANGES = {
    "passkey": [{"passkey_samples": 6}, {"num_depths": 1}, {"seed": 1}, "weights"],
    "needle": [{"needle_samples": 6}, {"needles_per_haystack": 1}, {"seed": 1}, "text"],
    "niah_single_words": [{"ruler_samples": 3}, {"seed": 1}, "text"],
    "perplexity": [{"perplexity_windows": 3}, {"perplexity_stride": 16}, "text"],
}


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


def settings(task, **more):
    values = {"passkey_samples": 4, "num_depths": 2, "needle_samples": 4, "ruler_samples": 2}
    return EvalSettings(**{"tasks": (task,), "perplexity_windows": 2, **values, **more})


def texts_of(tokenizer, word):
    return Texts(documents=[np.array(token_ids(tokenizer, f"{word} = 1\n" * 400))])


@pytest.mark.parametrize(
    ("task", "change"), [(task, change) for task, some in CHANGES.items() for change in some]
)
def test_other_settings_seeds_texts_or_weights_are_measured_and_replace_the_old(
    task, change, counted, tokenizer
):
    eval_model, loads = counted
    texts = texts_of(tokenizer, "one")
    old = evaluate_model(eval_model, texts, [256], settings(task), progress=False)
    asked = settings(task)
    if change == "text":
        texts = texts_of(tokenizer, "two")
    elif change == "weights":
        label, load = eval_model.label, eval_model.load
        eval_model = EvalModel(label=label, load=load, tokenizer=tokenizer, identity="b")
    else:
        asked = settings(task, **change)
    other, saved = {**old[0], "model": "other"}, []
    new = evaluate_model(
        eval_model, texts, [256], asked, done=[*old, other], save=saved.append, progress=False
    )
    assert len(loads) == 2 and new and not any(row in saved[-1] for row in old)
    assert other in saved[-1]
    places = [(r["task"], r["metric"], r["context_length"], r.get("depth")) for r in new]
    assert len(places) == len(set(places)) == sum(r["model"] == "it" for r in saved[-1])


def test_perplexity_at_other_lengths_is_measured_again_at_those_that_there_are(
    counted, tokenizer, capsys
):
    """Its targets follow from the lengths: two calls have not the same ones."""
    eval_model, _ = counted
    texts, asked, saved = texts_of(tokenizer, "one"), settings("perplexity"), []
    old = evaluate_model(eval_model, texts, [128, 256], asked, progress=False)
    more = {"done": old, "save": saved.append, "progress": False}
    evaluate_model(eval_model, texts, [256, 512], asked, **more)
    assert {row["context_length"] for row in saved[-1]} == {128, 256, 512}
    assert len({row["targets"] for row in saved[-1] if row["metric"] == "perplexity"}) == 1
    more["done"] = saved.pop()
    evaluate_model(eval_model, texts, [512], asked, **more)
    assert not saved  # all is there
    short = Texts(documents=[document[:300] for document in texts.documents])
    for other, lengths in ((texts, [128]), (short, [512])):  # results at 512 would be lost
        evaluate_model(eval_model, other, lengths, asked, **{**more, "progress": True})
        said = capsys.readouterr().err
        assert not saved and "perplexity (its results at" in said and "512 tokens would" in said


def test_what_was_asked_is_told_apart_whatever_the_model(counted, tokenizer):
    eval_model, _ = counted
    other = dataclasses.replace(eval_model, identity=["other weights"])
    texts = texts_of(tokenizer, "one")

    def asked(model, lengths=(128,), **keys):
        tasks = find_tasks(["passkey", "icl", "perplexity"])
        units = _units(tasks, model, texts, lengths, settings("passkey", **keys), None)
        return {(unit.task.name, unit.lengths[0]): unit.asked for unit in units}

    same = asked(eval_model)
    assert asked(other) == same and len(set(same.values())) == 3
    for keys in ({"seed": 7}, {"chat_template": True}):
        assert not set(asked(eval_model, **keys).values()) & set(same.values())
    assert asked(eval_model, passkey_samples=9)["passkey", 128] != same["passkey", 128]
    longer = asked(eval_model, lengths=(128, 256))
    assert longer["passkey", 256] != longer["passkey", 128] == same["passkey", 128]
    assert longer["perplexity", 128] == same["perplexity", 128]  # targets tell these apart


def test_the_seed_reaches_the_questions_and_other_lengths_do_not(counted, tokenizer, monkeypatch):
    eval_model, _ = counted
    documents = [np.array(token_ids(tokenizer, f"name{i} = {i}\n" * 20)) for i in range(40)]
    texts, asked = Texts(documents=documents), []

    def spy(model, *arguments):
        trials = next(a for a in arguments if isinstance(a, list))
        asked.append([t.input_ids for t in trials])
        return [False] * len(trials)

    monkeypatch.setattr("skipwise.evaluation.tasks.passkey.exact_match", spy)
    monkeypatch.setattr("skipwise.evaluation.tasks.ruler.recall", spy)
    for task in ("passkey", "needle", "niah_single_words"):
        asked.clear()
        for seed, lengths in ((0, [512]), (1, [512]), (0, [512, 1024])):
            evaluate_model(eval_model, texts, lengths, settings(task, seed=seed), progress=False)
        first, other, again, _longer = asked
        assert first != other and first == again, task


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(200)))
    return file


def test_changed_weights_of_equal_size_and_time_are_measured_again(tiny, text, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    command = ["eval", str(folder), "--lengths", "128", "--data", str(text), *SMALL]
    command += ["--tasks", "perplexity", "--out", str(tmp_path / "e")]
    assert main(command) == 0
    before = RunFolder(tmp_path / "e").results()[0]
    file = folder / "model.safetensors"
    times = file.stat()
    tensors = {name: tensor * 1.5 for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size and file.stat().st_mtime_ns == times.st_mtime_ns
    assert main(command) == 0
    assert RunFolder(tmp_path / "e").results()[0]["value"] != before["value"]


def test_two_models_of_one_name_are_not_mixed_up(tiny, tmp_path, capsys):
    for place in ("a", "b"):
        shutil.copytree(tiny, tmp_path / place / "model")
    command = ["--lengths", "128", "--tasks", "passkey", "--out", str(tmp_path / "e"), *SMALL]
    assert main(["eval", str(tmp_path / "a" / "model"), *command]) == 0
    assert main(["eval", str(tmp_path / "b" / "model"), *command]) == 2
    assert "results of another model" in capsys.readouterr().err


def test_two_evaluations_into_one_folder_do_not_lose_each_others_rows(tmp_path):
    run = RunFolder(tmp_path)
    with run.lock(), pytest.raises(SkipwiseError, match="another process"), run.lock():
        pass
    with run.lock():
        pass


@pytest.mark.parametrize("content", ["[1]", "{}", "null", '[{"a": 1}]', "{"])
def test_a_broken_results_file_is_an_error_and_stays(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SkipwiseError, match=r"results\.json(.|\n)*\nremove it"):
        RunFolder(tmp_path).results()
    assert (tmp_path / "results.json").read_text() == content


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["rope.type=linear"], "rope.type does not take effect"),
        (["data.sources=docs"], "--data for text"),
        (["--tasks", ""], "eval.tasks is ''"),
        (["eval.num_depths=0"], "eval.num_depths is 0"),
        (["eval.batch_tokens=0"], "eval.batch_tokens is 0"),
    ],
)
def test_settings_that_would_not_take_effect_are_errors(more, word, tiny, tmp_path, capsys):
    command = ["eval", str(tiny), "--lengths", "128", "--out", str(tmp_path / "e"), *more]
    assert main(command) == 2
    assert word in capsys.readouterr().err and not (tmp_path / "e").exists()


def test_what_is_left_out_of_the_text_is_said_and_nothing_measured_is_an_error(
    tiny, tmp_path, capsys
):
    file = tmp_path / "data" / "bad.jsonl"
    file.parent.mkdir()
    (file.parent / "README.md").write_text("about these texts\n" * 400)
    file.write_text('{"text": "a b c"}\n{"text": \n')
    command = ["eval", str(tiny), "--lengths", "256", "--data", str(file.parent)]
    command += ["--tasks", "perplexity"]
    assert main([*command, "--out", str(tmp_path / "e"), *SMALL]) == 2
    said = capsys.readouterr().err
    left_out = "left out of the text: 1 file that is no text: README.md, 1 unreadable records"
    assert left_out in said and "bad.jsonl" in said
    assert "no document is that long" in said and "nothing was measured" in said


def test_a_file_is_no_evaluation_folder(tiny, text, capsys):
    assert main(["eval", str(tiny), "--lengths", "128", "--out", str(text)]) == 2
    assert "holds something else" in capsys.readouterr().err


@pytest.fixture
def run_of(tiny, tmp_path):
    """A run folder with a model, results of its own, and held-out text."""
    run = RunFolder(tmp_path / "run")
    shutil.copytree(tiny, run.model)
    tree = {"model": str(tiny), "target_length": 128, "load": {"dtype": "float32"}}
    run.recipe_file.write_text(dump_recipe(parse_recipe(tree)))
    run.update(original_length=64)
    text = "one = 1\n" * 200
    tokens = AutoTokenizer.from_pretrained(tiny)(text)["input_ids"]
    run.eval_documents.write_text(json.dumps({"text": text, "tokens": tokens}) + "\n")
    return run


def test_a_runs_base_is_before_and_another_baseline_reads_the_text_its_own_way(
    run_of, tmp_path, tiny
):
    command = ["eval", str(run_of.path), "--tasks", "perplexity", *SMALL]
    assert main([*command, "--baseline"]) == 0
    assert {row["model"] for row in run_of.results()} == {"before", "after"}
    before = [row for row in run_of.results() if row["model"] == "before"]
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "=": 2, "1": 3}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(other)
    assert main([*command, "--baseline", str(other)]) == 0
    rows = run_of.results()
    assert [row for row in rows if row["model"] == "before"] == before
    assert {row["model"] for row in rows} == {"before", "after", "other"}
    # three words of 8 bytes a line, so 2.7 bytes a token, each about as surprising as ln 1024
    bits = [r["value"] for r in rows if (r["model"], r["metric"]) == ("other", "bits_per_byte")]
    assert bits == pytest.approx([10 / 2.67] * 2, rel=0.25)


def test_rows_tell_their_text_whatever_the_tokenizer(counted, tokenizer):
    eval_model, _ = counted
    digests = {}
    for word in ("one", "two"):
        texts = texts_of(tokenizer, word)
        rows = evaluate_model(eval_model, texts, [256], settings("perplexity"), progress=False)
        rows += evaluate_model(eval_model, texts, [256], settings("needle"), progress=False)
        (digests[word],) = {row["text"] for row in rows}
        characters = AutoTokenizer.from_pretrained(MODEL)
        other = [np.array([i for c in f"{word} = 1\n" for i in token_ids(characters, c)] * 400)]
        assert Texts(documents=other).digest(characters) == digests[word]
    assert digests["one"] != digests["two"]
    rows = evaluate_model(eval_model, Texts(), [256], settings("passkey"), progress=False)
    assert not any("text" in row for row in rows)
