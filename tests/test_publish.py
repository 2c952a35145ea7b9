"""Publishing: shown, asked, uploaded; against a stand-in of the Hub on this machine."""

import dataclasses
import os
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import yaml
from hub_stand_in import TOKEN, Hub
from huggingface_hub import ModelCardData, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.numpy import save_file

from skipwise.config.parse import dump_recipe, parse_recipe
from skipwise.config.run_folder import RunFolder, write_json, write_text
from skipwise.errors import SkipwiseError
from skipwise.export import model_card
from skipwise.export.hub import confirm, describe_upload, gguf_model, plan_upload
from skipwise.export.model_card import base_metadata, hub_results, relation, write_card
from skipwise.models.identity import digests, folder_digests


def row(model, task, metric, length, value, **more):
    keys = {"model": model, "task": task, "metric": metric, "context_length": length}
    interval = {"low": value * 0.9, "high": value * 1.1, "num_samples": 50}
    return {**keys, "value": value, **interval, **more}


ROWS = [
    row("before", "perplexity", "perplexity", 64, 5.0),
    row("after", "perplexity", "perplexity", 64, 5.1),
    row("after", "perplexity", "perplexity", 256, 4.5),
    row("before", "passkey", "exact match", 64, 1.0, depth=0.5, num_correct=50),
    row("after", "passkey", "exact match", 64, 1.0, depth=0.5, num_correct=50),
    row("after", "passkey", "exact match", 256, 0.9, depth=0.5, num_correct=45),
]


@pytest.fixture
def run(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Base\n")
    (base / "LICENSE").write_text("the licence")
    run = RunFolder(tmp_path / "run")
    run.model.mkdir(parents=True)
    tree = {
        "model": str(base),
        "target_length": 256,
        "data": {"sources": ["me/books", str(tmp_path)]},
        "lora": {},
    }
    write_text(run.recipe_file, dump_recipe(parse_recipe(tree)))
    save_file({"w": np.arange(5000, dtype=np.float32)}, run.model / "model.safetensors")
    (run.model / "config.json").write_text("{}")
    run.update(
        exported=True,
        original_length=64,
        train_length=64,
        target_length=256,
        scaling="yarn",
        model={"name": "base", "family": "llama", "hub": False},
        data={
            "sources": ["me/books", str(tmp_path)],
            "hub_sources": ["me/books"],
            "num_documents": 3,
            "num_tokens": 999,
        },
        training={
            "mode": "lora",
            "num_steps": 10,
            "tokens_per_step": 128,
            "num_tokens": 1280,
        },
        checks=[{"name": "reload", "passed": True, "detail": ""}],
        versions={"skipwise": "0.1.0"},
    )
    write_json(run.path / "results.json", ROWS)
    return run


def publish(run, hub, *arguments, token=TOKEN, typed=None):
    home = run.path.parent / "home"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
    environment.pop("HF_HUB_OFFLINE", None)
    environment.pop("HF_TOKEN", None)
    if token:
        home.mkdir(exist_ok=True)
        (home / "token").write_text(token)  # as `hf auth login` leaves it
    done = subprocess.run(
        [sys.executable, "-m", "skipwise", "publish", str(run.path), *arguments],
        env={**environment, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        input=typed,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def results_of(card):
    """The results that the Hub reads from a card, or from the card of a folder."""
    file = card / "README.md" if card.is_dir() else card
    name, results = model_index_to_eval_results(metadata_load(file)["model-index"])
    assert name
    return results


def test_the_card_says_what_was_measured_and_carries_the_licence_over(run):
    card = write_card(run, "me/long").read_text()
    assert "A llama model with its context window extended from 64 to 256 tokens" in card
    assert "| passkey " in card and "perplexity 5.00 before, 5.10 after (+2.0%)" in card
    assert "`apache-2.0`, the license of the base model" in card
    assert "vllm serve me/long --max-model-len 256" in card
    assert "zhu2024pose" in card and "peng2024yarn" in card
    assert (run.model / "LICENSE").read_text() == "the licence"
    assert str(run.path.parent) not in card  # no path of this machine


def test_the_cards_metadata_is_what_the_hub_reads(run):
    data = metadata_load(write_card(run))
    assert data["license"] == "apache-2.0" and data["language"] == ["en"]
    assert data["library_name"] == "transformers" and data["datasets"] == ["me/books"]
    assert not {"base_model", "base_model_relation"} & set(data)  # a folder of this machine
    parsed = ModelCardData(**{**data, "model_name": None})
    assert parsed.pipeline_tag == "text-generation"
    values = {result.dataset_type: result.metric_value for result in results_of(run.model)}
    assert values == {"skipwise-passkey": 0.9, "skipwise-perplexity": 4.5}


def test_the_card_shows_the_passkeys_in_a_picture_beside_it(run):
    card = write_card(run).read_text()
    assert (run.model / "passkey.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "![Passkey retrieval over all depths. before at 64: 100 %" in card
    assert "](passkey.png)" in card
    write_json(run.path / "results.json", ROWS[:3])
    assert "passkey.png" not in write_card(run).read_text()
    assert not (run.model / "passkey.png").exists()  # of an earlier measurement


def test_the_card_says_on_which_text_perplexity_is(run):
    run.update(data={**run.metadata()["data"], "num_eval_documents": 7})
    text = "7 documents held out of me/books, local text"
    card = write_card(run)
    (result,) = [r for r in results_of(card) if r.dataset_type == "skipwise-perplexity"]
    assert result.dataset_name == f"perplexity at 256 tokens, {text}"
    assert f"of {text}. Passkey" in " ".join(card.read_text().split())
    given = {"sources": ["me/books"], "eval_sources": ["me/books", "/gone/texts/my.txt"]}
    tree = {"model": "me/base", "target_length": 256, "data": given}
    write_text(run.recipe_file, dump_recipe(parse_recipe(tree)))
    assert "of 7 documents of me/books, given text. Passkey" in " ".join(
        write_card(run).read_text().split()
    )


def test_a_base_of_the_hub_is_named_with_its_relation(run):
    tree = {"model": "me/base", "target_length": 256, "data": {"sources": ["me/books"]}}
    write_text(run.recipe_file, dump_recipe(parse_recipe(tree)))
    assert "base_model" not in metadata_load(write_card(run))  # a folder when the run began
    run.update(model={**run.metadata()["model"], "hub": True})
    data = metadata_load(write_card(run))
    assert (data["base_model"], data["base_model_relation"]) == ("me/base", "finetune")
    found = relation("me/base", "adapter", run.metadata())
    assert found["base_model_relation"] == "adapter"


def test_ruler_task_by_task_is_folded(run):
    ruler = [
        row(model, task, "recall", length, 0.0)
        for model in ("before", "after")
        for task in ("niah_multikey", "vt", "cwe")
        for length in (64, 256)
    ]
    write_json(run.path / "results.json", ROWS + ruler)
    shown, _, folded = write_card(run).read_text().partition("<details>")
    folded, _, rest = folded.partition("</details>")
    assert "niah_multikey" not in shown + rest and folded.count("| niah_multikey ") == 2
    assert shown.count("| ruler average ") == 2 and "| passkey " in shown
    assert "| passkey " not in folded and "<summary>" in folded


def benchmark(task, metric, value, num, model="after"):
    keys = {"model": model, "task": task, "metric": metric, "context_length": None}
    return {**keys, "kind": "benchmark", "value": value, "num_samples": num, "num_fewshot": 5}


def test_results_of_the_hubs_benchmarks_are_in_its_own_format(run):
    rows = [
        benchmark("gsm8k", "exact_match,strict-match", 0.1234567, 1319),
        benchmark("gsm8k", "exact_match,flexible-extract", 0.2, 1319),
        benchmark("gsm8k", "exact_match,strict-match", 0.9, 1319, model="before"),
        benchmark("gpqa_diamond_zeroshot", "acc_norm", 0.3, 50),  # a part of the questions
        benchmark("boolq", "acc", 0.8, 3270),  # the Hub has no benchmark of it
    ]
    write_json(run.path / "results.json", ROWS + rows)
    write_card(run)
    assert [f.name for f in (run.model / ".eval_results").iterdir()] == ["gsm8k.yaml"]
    entries = yaml.safe_load((run.model / ".eval_results" / "gsm8k.yaml").read_text())
    assert entries[0]["dataset"] == {"id": "openai/gsm8k", "task_id": "gsm8k"}
    assert entries[0]["value"] == 12.35 and "5-shot" in entries[0]["notes"] and len(entries) == 1
    names = [name for _, name in plan_upload(run, "me/long").files]
    assert ".eval_results/gsm8k.yaml" in names and "passkey.png" in names
    if hasattr(huggingface_hub, "parse_eval_result_entries"):  # not in its oldest versions
        (parsed,) = huggingface_hub.parse_eval_result_entries(entries)
        assert (parsed.dataset_id, parsed.task_id, parsed.value) == ("openai/gsm8k", "gsm8k", 12.35)
    assert hub_results(ROWS) == {}


def test_a_base_without_a_card_gives_no_licence(tmp_path):
    assert base_metadata(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\n: [broken\n---\n")
    assert base_metadata(str(tmp_path)) == {}


def test_a_local_base_that_is_gone_is_not_looked_for_on_the_hub(run, monkeypatch):
    asked = []
    monkeypatch.setattr(model_card, "base_metadata", lambda name: asked.append(name) or {})
    for base in ("me/gone", "gone.gguf"):
        run.write_recipe(dataclasses.replace(run.recipe(), model=base))
        run.update(model={"hub": False, "family": "llama"})
        write_card(run)
        assert asked == []
    run.update(model={"hub": True, "family": "llama"})
    run.write_recipe(dataclasses.replace(run.recipe(), model="me/base"))
    write_card(run)
    assert asked == ["me/base"]


def test_a_card_names_the_method_that_trained(run):
    run.update_entry("training", method="full")  # as train_length: auto may choose
    text = write_card(run).read_text()
    head = text.split("##")[0]
    assert "RoPE scaling and with training at full length." in head and "[PoSE]" not in head
    assert "- full\n" in text and "- pose\n" not in text and "zhu2024pose" not in text
    run.update_entry("training", method="cream")
    assert "RoPE scaling and with method `cream`." in write_card(run).read_text()


def test_what_is_uploaded_is_what_was_shown(run):
    (run.path / "gguf").mkdir()
    file = run.path / "gguf/model-f16.gguf"
    file.write_bytes(b"GGUF" * 100)
    (run.path / "gguf/other.gguf").write_bytes(b"GGUF")  # nobody exported it
    run.update(exported_files=folder_digests(run.model))
    about = {"file": digests({"": file})[""], "model": "of an earlier export"}
    run.update(gguf_files={file.name: about})
    with pytest.raises(SkipwiseError, match=r"from an earlier export of the model\n.*--to gguf"):
        plan_upload(run, "me/long")
    run.update(gguf_files={file.name: {**about, "model": gguf_model(run.metadata())}})
    hub = Hub()
    code, out, err = publish(run, hub, "me/long", "--yes", "--private")
    assert code == 0, err
    assert out.strip() == f"{hub.url}/me/long" and hub.private["me/long"]
    stored = hub.repositories["me/long"]
    for name in ("model.safetensors", "config.json", "README.md", "LICENSE"):
        assert stored[name] == (run.model / name).read_bytes() and name in err
    assert stored["model-f16.gguf"] == b"GGUF" * 100 and "other.gguf" not in stored
    assert "private" in err and TOKEN not in out + err
    assert ("POST", "/api/validate-yaml") in hub.requests
    uploads = sum(method == "PUT" for method, _ in hub.requests)
    assert publish(run, hub, "me/long", "--yes", "--private")[0] == 0
    assert sum(method == "PUT" for method, _ in hub.requests) == uploads  # not sent again


def test_a_dry_run_and_an_upload_without_a_yes_send_nothing(run):
    hub = Hub()
    code, out, err = publish(run, hub, "me/long", "--dry-run")
    assert code == 0 and "nothing uploaded" in out and "model.safetensors" in err
    assert "public: everyone can read it" in err
    code, _, err = publish(run, hub, "me/long", typed="y\n")  # no terminal
    assert code == 2 and "--yes" in err
    assert hub.requests == []


def test_the_question_takes_only_a_yes(run):
    upload = plan_upload(run, "me/long")
    assert confirm(upload, ask=lambda text: "y") and confirm(upload, ask=lambda text: "Yes")
    assert not confirm(upload, ask=lambda text: "") and not confirm(upload, ask=lambda text: "n")


@pytest.mark.extended
@pytest.mark.parametrize(
    ("hub", "token", "words"),
    [
        ({}, None, "hf auth login"),
        ({}, "hf_" + "y" * 34, "hf auth login"),
        ({"may_write": False}, TOKEN, "no write access to me/long"),
        ({"accepts_card": False}, TOKEN, "rejects the model card"),
    ],
    ids=["no login", "wrong token", "no right", "card"],
)
def test_what_the_hub_turns_down_is_said(run, hub, token, words):
    server = Hub(**hub)
    code, _, err = publish(run, server, "me/long", "--yes", token=token)
    assert code == 2 and words in err and "Traceback" not in err
    assert not any(server.repositories.values())


def test_a_hub_that_cannot_be_reached_is_said(run):
    hub = Hub()
    hub.shutdown()
    hub.server_close()
    code, _, err = publish(run, hub, "me/long", "--yes")
    assert code == 2 and "Traceback" not in err and "skipwise:" in err


def test_only_a_sound_export_is_published(run, tmp_path):
    with pytest.raises(SkipwiseError, match="use USER/NAME"):
        plan_upload(run, "long")
    with pytest.raises(SkipwiseError, match="not a valid Hub name"):
        plan_upload(run, "me/a b")
    run.update(checks=[{"name": "reload", "passed": False, "detail": ""}])
    with pytest.raises(SkipwiseError, match="'reload' failed"):
        plan_upload(run, "me/long")
    run.update(exported=False)
    with pytest.raises(SkipwiseError, match="is not exported"):
        plan_upload(run, "me/long")


def test_sizes_are_shown_in_units_of_people(run):
    lines = describe_upload(plan_upload(run, "me/long")).splitlines()
    assert lines[0].endswith("/me/long (public: everyone can read it)")
    assert any("model.safetensors" in line and "20.1 kB" in line for line in lines)
