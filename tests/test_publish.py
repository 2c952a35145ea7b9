"""Publishing: shown, asked, uploaded; against a stand-in of the Hub on this machine."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hub_stand_in import TOKEN, Hub
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.numpy import save_file

from skipwise.config.parse import dump_recipe, parse_recipe
from skipwise.config.run_folder import RunFolder, write_json, write_text
from skipwise.errors import SkipwiseError
from skipwise.export.hub import confirm, describe_upload, plan_upload
from skipwise.export.model_card import base_metadata, read_metadata, write_card


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
    data = read_metadata(write_card(run))
    assert data["license"] == "apache-2.0" and data["language"] == ["en"]
    assert data["library_name"] == "transformers" and data["datasets"] == ["me/books"]
    assert "base_model" not in data  # a folder of this machine is none
    parsed = ModelCardData(**{**data, "model_name": None})
    assert parsed.pipeline_tag == "text-generation"
    name, results = model_index_to_eval_results(data["model-index"])
    values = {result.dataset_type: result.metric_value for result in results}
    assert values == {"skipwise-passkey": 0.9, "skipwise-perplexity": 4.5} and name


def test_a_base_without_a_card_gives_no_licence(tmp_path):
    assert base_metadata(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\n: [broken\n---\n")
    assert base_metadata(str(tmp_path)) == {}


def test_what_is_uploaded_is_what_was_shown(run):
    (run.path / "gguf").mkdir()
    (run.path / "gguf/model-f16.gguf").write_bytes(b"GGUF" * 100)
    hub = Hub()
    code, out, err = publish(run, hub, "me/long", "--yes", "--private")
    assert code == 0, err
    assert out.strip() == f"{hub.url}/me/long" and hub.private["me/long"]
    stored = hub.repositories["me/long"]
    for name in ("model.safetensors", "config.json", "README.md", "LICENSE"):
        assert stored[name] == (run.model / name).read_bytes() and name in err
    assert stored["model-f16.gguf"] == b"GGUF" * 100
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
