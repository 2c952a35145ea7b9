"""Checkpoint choice: the best of the saved ones is exported, by what was asked for."""

import dataclasses
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from skipwise.cli import main
from skipwise.config.parse import parse_recipe
from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError
from skipwise.pipeline import choose_checkpoint
from skipwise.pipeline.extend import extend


def make_recipe(tiny, text_folder, *overrides):
    tree = {
        "model": str(tiny),
        "target_length": 256,
        "rope": {"type": "yarn"},
        "attention_temperature": 1.0,
        "load": {"dtype": "float32"},
        "data": {"sources": [str(text_folder)]},
        "training": {
            "num_steps": 6,
            "global_batch_size": 2,
            "micro_batch_size": 2,
            "learning_rate": 1e-3,
            "save_steps": 2,
            "save_total_limit": 2,
        },
        "eval": {"tasks": ["perplexity"], "perplexity_windows": 2},
        "export": {"checkpoint": "passkey"},
    }
    return parse_recipe(tree, list(overrides))


def weights(folder):
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.float() for name, tensor in tensors.items()}


@pytest.mark.extended
@pytest.mark.parametrize(
    ("scores", "chosen"),
    [({2: 0.2, 4: 0.9, 6: 0.5}, 4), ({2: 0.7, 4: 0.7, 6: 0.1}, 4), ({2: 0, 4: 0, 6: 0}, 6)],
)
def test_the_best_checkpoint_is_exported_and_of_equals_the_latest(
    scores, chosen, tiny, text_folder, tmp_path, monkeypatch
):
    kept = {}

    def score(plan, run, folder):
        step = int(folder.name.split("-")[1])
        kept[step] = weights(folder)
        return scores[step]

    monkeypatch.setattr(choose_checkpoint, "_score", score)
    run = extend(make_recipe(tiny, text_folder), tmp_path / "run")
    # the Trainer keeps two checkpoints, and all three were there to choose from
    assert sorted(kept) == [2, 4, 6] and len(list(run.checkpoints.glob("checkpoint-*"))) == 2
    exported = weights(run.model)
    assert all(torch.equal(exported[name], kept[chosen][name]) for name in exported)
    other = next(step for step in kept if step != chosen)
    assert any(not torch.equal(exported[name], kept[other][name]) for name in exported)
    selection = run.metadata()["selection"]
    assert selection["chosen"] == chosen and selection["higher_is_better"]
    assert [c["score"] for c in selection["candidates"]] == [scores[2], scores[4], scores[6]]
    assert [f.name for f in run.candidates.iterdir()] == [f"step-{chosen}"]


@pytest.mark.extended
@pytest.mark.parametrize("by", ["needle", "perplexity", "area"])
def test_candidates_are_measured_once_and_a_kill_between_loses_nothing(
    by, tiny, text_folder, tmp_path, monkeypatch
):
    real, measured = choose_checkpoint._score, []

    def interrupted(plan, run, folder):
        if len(measured) == 2:
            measured.append("killed")
            raise KeyboardInterrupt
        measured.append(folder.name)
        return real(plan, run, folder)

    monkeypatch.setattr(choose_checkpoint, "_score", interrupted)
    lengths = ["eval.context_lengths=[128,256]", "eval.tasks=[perplexity,passkey]"]
    more = lengths if by == "area" else []
    recipe = make_recipe(tiny, text_folder, f"export.checkpoint={by}", *more)
    with pytest.raises(KeyboardInterrupt):
        extend(recipe, tmp_path / "run")
    (tmp_path / "run" / "candidates" / "step-4.part").mkdir()  # of a kill while it was linked
    run = extend(recipe, tmp_path / "run")
    assert measured == ["step-2", "step-4", "killed", "step-6"]
    selection = run.metadata()["selection"]
    scores = {c["step"]: c["score"] for c in selection["candidates"]}
    assert len(scores) == 3 and all(score >= 0 for score in scores.values())
    if by == "perplexity":
        assert selection["chosen"] == min(scores, key=lambda s: (scores[s], -s))
        assert 1 < min(scores.values()) < 3000
    page = (run.report / "index.html").read_text()
    assert "chosen" in page


@pytest.mark.extended
def test_lora_candidates_are_adapters(tiny, text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        choose_checkpoint, "_score", lambda plan, run, folder: -int(folder.name[5:])
    )
    run = extend(make_recipe(tiny, text_folder, "lora.rank=2"), tmp_path / "run")
    assert run.metadata()["selection"]["chosen"] == 2
    (folder,) = run.candidates.iterdir()
    assert (folder / "adapter_model.safetensors").exists()
    config = json.loads((run.model / "config.json").read_text())
    assert config["model_type"] == "llama"


def test_a_choice_that_cannot_be_made_is_refused_before_training(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)

    def check(by, documents, target=256):
        tree = {"model": str(tiny), "target_length": target, "export": {"checkpoint": by}}
        choose_checkpoint.check_selection(parse_recipe(tree), documents, tokenizer, 64)

    text = np.array(tokenizer("x = 1\n" * 100)["input_ids"])
    with pytest.raises(SkipwiseError, match=r"needs evaluation text.*\ntype"):
        check("needle", [])
    with pytest.raises(SkipwiseError, match="of 256 tokens"):
        check("perplexity", [text[:10]])
    with pytest.raises(SkipwiseError, match="no prompt fits 96 tokens"):
        check("passkey", [], target=96)
    check("needle", [text])
    check("passkey", [])


@pytest.mark.extended
def test_a_candidate_that_was_removed_is_named(tiny, text_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choose_checkpoint, "_score", lambda plan, run, folder: 0.5)
    run = extend(make_recipe(tiny, text_folder), tmp_path / "run")
    shutil.rmtree(run.candidates)
    assert main(["export", str(run.path)]) == 2
    assert "no checkpoint to choose from" in capsys.readouterr().err


@pytest.mark.extended
def test_a_damaged_candidate_is_not_chosen(tiny, text_folder, tmp_path, monkeypatch, capsys):
    def interrupted(plan, run, folder):
        raise KeyboardInterrupt

    recipe = make_recipe(tiny, text_folder)
    monkeypatch.setattr(choose_checkpoint, "_score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extend(recipe, tmp_path / "run")
    file = tmp_path / "run" / "candidates" / "step-2" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    scores = {"step-4": 0.2, "step-6": 0.1}
    monkeypatch.setattr(choose_checkpoint, "_score", lambda plan, run, f: scores[f.name])
    run = extend(recipe, tmp_path / "run")
    assert run.metadata()["selection"]["chosen"] == 4
    assert "step-2 is damaged: model.safetensors has changed" in capsys.readouterr().err


def test_the_choice_asks_other_questions_than_the_evaluation(tiny, monkeypatch):
    """Else the exported checkpoint is the one that knows the exam."""
    seeds = []

    def spy(subject, texts, lengths, settings, **more):
        seeds.append((settings.seed, tuple(lengths)))
        return [{"value": 0.5, "num_samples": 4, "metric": "exact_match"}]

    monkeypatch.setattr(choose_checkpoint, "evaluate_model", spy)
    monkeypatch.setattr(choose_checkpoint, "evaluation_documents", lambda *a: [])
    recipe = make_recipe(tiny, "-", "eval.seed=7")
    facts = types.SimpleNamespace(original_length=64)
    plan = types.SimpleNamespace(recipe=recipe, info=facts, tokenizer=None)
    plan.separator = plan.prompt_tokenizer = None
    assert choose_checkpoint._score(plan, None, Path("step-2")) == 0.5
    assert seeds == [(8, (128, 256))]


def test_without_a_choice_nothing_is_kept(tiny, text_folder, tmp_path):
    run = extend(make_recipe(tiny, text_folder, "export.checkpoint=last"), tmp_path / "run")
    assert not RunFolder(run.path).candidates.exists() and "selection" not in run.metadata()


def test_the_area_is_over_the_generated_tasks_and_all_lengths(tiny, monkeypatch):
    """A checkpoint that is best at the longest length alone is not the best by area."""
    asked = []

    def measured(subject, texts, lengths, settings, **more):
        asked.append((settings.tasks, tuple(lengths), settings.seed))
        rows = []
        for task, scores in (("passkey", (1.0, 0.5, 0.2)), ("needle", (0.5, 0.5, 0.5))):
            for length, value in zip(lengths, scores, strict=True):
                one = {"model": subject.label, "task": task, "metric": "exact_match"}
                one |= {"context_length": length, "value": value, "low": 0.0, "high": 1.0}
                rows.append({**one, "num_samples": 20})
        return rows

    monkeypatch.setattr(choose_checkpoint, "evaluate_model", measured)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    text = [np.array(tokenizer("x = 1\n" * 400)["input_ids"])]
    monkeypatch.setattr(choose_checkpoint, "evaluation_documents", lambda *a: text)
    tasks = "eval.tasks=[perplexity,passkey,needle,boolq]"
    recipe = make_recipe(tiny, "-", "export.checkpoint=area", tasks)
    plan = types.SimpleNamespace(recipe=recipe, info=types.SimpleNamespace(original_length=128))
    plan.separator, plan.prompt_tokenizer = None, tokenizer
    plan.recipe = parse_recipe({**recipe_tree(recipe), "target_length": 512})
    score = choose_checkpoint._score(plan, None, Path("step-2"))
    assert asked == [(("passkey", "needle"), (128, 256, 512), 1)]
    passkey, needle = (1.0 + 2 * 0.5 + 0.2) / 4, 0.5
    assert score == pytest.approx((passkey + needle) / 2)


def recipe_tree(recipe):
    return dataclasses.asdict(recipe)


def test_an_area_that_cannot_be_measured_is_refused_before_training(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)

    def check(tasks, lengths, documents=()):
        tree = {"model": str(tiny), "target_length": 512, "export": {"checkpoint": "area"}}
        tree["eval"] = {"tasks": tasks, "context_lengths": lengths}
        choose_checkpoint.check_selection(parse_recipe(tree), documents, tokenizer, 128)

    check(["perplexity", "passkey"], [128, 512])
    for tasks, lengths in (
        (["perplexity"], [128, 512]),  # no generated task
        (["needle"], [128, 512]),  # no text
        (["passkey"], [512]),  # one length
        (["passkey"], [32, 512]),  # no prompt fits the shortest
    ):
        with pytest.raises(SkipwiseError, match=r"area needs two context lengths.*\n(.|\n)*type"):
            check(tasks, lengths)
