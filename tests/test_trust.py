"""Trust: what a recipe, a run folder or a model from others cannot do without the user's word."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import metadata_load
from test_publish import publish, row, run  # noqa: F401  (run is a fixture)

from skipwise.cli import main
from skipwise.config.parse import load_recipe, load_run_recipe, parse_recipe
from skipwise.config.recipe import ModelSettings
from skipwise.config.run_folder import RunFolder, open_run, write_json
from skipwise.config.trust import secret_in, without_secrets
from skipwise.errors import SkipwiseError
from skipwise.export.gguf import find_converter
from skipwise.export.hf import _RELOAD, without_local_names
from skipwise.export.hub import describe_upload, plan_upload
from skipwise.export.model_card import public_name, write_card
from skipwise.models.compatibility import save_tokenizer
from skipwise.models.hf_config import read_config, stays_inside
from skipwise.models.identity import changed_note, folder_digests

BASE = {"model": "me/base", "target_length": "32k"}
TOKEN = "hf_" + "Q" * 34


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("push_to_hub", True),
        ("hub_model_id", "evil/x"),
        ("hub_token", TOKEN),
        ("hub_strategy", "every_save"),
        ("push_to_hub_model_id", "x"),
        ("trackio_space_id", "evil/space"),
        ("logging_dir", "/home/me/.config"),
        ("resume_from_checkpoint", "/planted"),
        ("deepspeed", "/planted/config.json"),
        ("deepspeed", {"csv_monitor": {"output_path": "/home/me"}}),
    ],
)
def test_a_trainer_key_that_uploads_or_writes_elsewhere_is_refused_at_load(key, value):
    with pytest.raises(SkipwiseError) as caught:
        parse_recipe({**BASE, "trainer": {key: value}})
    assert f"trainer.{key}" in str(caught.value) and TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    "tree",
    [
        {"trainer": {"some_token": "abc"}},
        {"trainer": {"accelerator_config": {"api_key": "abc"}}},
        {"trainer": {"run_name": TOKEN}},
        {"model": "https://me:word@example.org/model"},
        {"data": {"sources": ["https://example.org/x?token=abcdef"]}},
        {"data": {"sources": [{"path": f"https://{TOKEN}@huggingface.co/x"}]}},
        {"name": "ghp_" + "x" * 36},
        {"rope": {"options": {"secret": "x"}}},
        {"eval": {"task_folder": "s3://AKIA" + "A" * 16 + "@bucket"}},
    ],
    ids=lambda tree: json.dumps(tree)[:40],
)
def test_a_recipe_holds_no_secret_and_the_error_does_not_show_it(tree):
    with pytest.raises(SkipwiseError, match="leave it out") as caught:
        parse_recipe({**BASE, **tree})
    shown = str(caught.value)
    assert TOKEN not in shown and "me:word" not in shown and "abcdef" not in shown


def test_names_of_models_folders_and_settings_are_no_secrets():
    for text in (
        *("me/hf_small_model", "sk-learn-docs", "C:/keys/key", "a@b.org", "tokens", "hf_transfer"),
        *("git@github.com:me/x", "runs/akia", "https://example.org/a?page=2", "monkey"),
    ):
        assert secret_in(text) == "" and without_secrets(text) == text
    assert secret_in(True, "average_tokens") == "" and secret_in("x", "lr_scheduler_key") == ""
    command = f"skipwise eval m --data https://me:word@h/x?sig=1 trainer.a={TOKEN}"
    assert TOKEN not in without_secrets(command) and "me:word" not in without_secrets(command)


def test_remote_code_in_a_file_is_not_consent_and_a_typed_word_is_kept_for_the_run(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: me/base\ntarget_length: 32k\nload: {trust_remote_code: true}\n")
    with pytest.raises(SkipwiseError, match=r"cannot consent.*\n.*load.trust_remote_code=true"):
        load_recipe(file)
    assert main(["check", str(file)]) == 2
    assert not load_recipe(file, ["load.trust_remote_code=false"]).load.trust_remote_code
    typed = load_recipe(file, ["load.trust_remote_code=true"])
    own = open_run(tmp_path / "own", typed, "x")
    assert own.recipe().load.trust_remote_code  # export and eval need not ask again
    theirs = RunFolder(tmp_path / "theirs")
    theirs.path.mkdir()
    theirs.recipe_file.write_text(own.recipe_file.read_text())
    with pytest.raises(SkipwiseError, match="cannot consent"):
        theirs.recipe()
    write_json(theirs.path / "run.json", {"consent": own.metadata()["consent"][::-1]})
    with pytest.raises(SkipwiseError, match="cannot consent"):
        theirs.recipe()
    for more in ("model: me/other\n", "load: {trust_remote_code: true, revision: b}\n"):
        lines = own.recipe_file.read_text().splitlines(keepends=True)
        key = more.split(":")[0]
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
        end = next(i for i in range(start + 1, len(lines)) if not lines[i].startswith(" "))
        own.recipe_file.write_text("".join(lines[:start]) + more + "".join(lines[end:]))
        with pytest.raises(SkipwiseError, match="cannot consent"):  # for the first model only
            own.recipe()
        own.recipe_file.write_text("".join(lines))
    again = open_run(theirs.path, typed, "x")  # typed for this folder, too
    assert again.recipe().load.trust_remote_code
    with pytest.raises(SkipwiseError, match="cannot consent"):
        load_run_recipe(own.recipe_file)


def test_no_path_inside_a_trainer_setting_is_published():
    offload = {"offload_optimizer": {"device": "nvme", "nvme_path": "/home/me/nvme"}}
    trainer = {"deepspeed": {"zero_optimization": offload, "list": ["/a/b", 1]}}
    public = without_local_names(parse_recipe({**BASE, "trainer": trainer}), {})
    assert "/" not in json.dumps(public.trainer) and "nvme" in json.dumps(public.trainer)


def test_a_check_in_a_new_process_imports_nothing_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("numpy", "torch", "random"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    program = "\n".join(_RELOAD.splitlines()[:4])  # to the first imports
    assert "import numpy, torch" in program
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    monkeypatch.setenv("PYTHONSAFEPATH", "x")  # so that it is undone
    monkeypatch.delenv("PYTHONSAFEPATH")
    monkeypatch.setattr(sys, "argv", ["skipwise", "recipes"])
    assert main() == 0 and os.environ["PYTHONSAFEPATH"]
    assert not (tmp_path / "ran").exists()
    if sys.version_info >= (3, 11):
        command = [sys.executable, "-c", "import numpy"]
        assert subprocess.run(command, check=False).returncode == 0
        assert not (tmp_path / "ran").exists()


def test_a_converter_of_the_current_folder_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setenv("SKIPWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    (tmp_path / "a/llama.cpp").mkdir(parents=True)
    (tmp_path / "a/llama.cpp/convert_hf_to_gguf.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(SkipwiseError, match="was not found"):
        find_converter()
    found = find_converter("llama.cpp")
    assert found == tmp_path / "a/llama.cpp/convert_hf_to_gguf.py"


def test_only_what_export_wrote_is_uploaded_and_the_rest_is_shown(run, tmp_path):  # noqa: F811
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/config.json").write_text("{}")
    write_card(run)
    run.update(exported_files={"config.json": [], "model.safetensors": []})
    left = (".env", "optimizer.pt", "notes.txt", "model-2.safetensors", "LICENSE-mine", "a\nb.json")
    for name in left:
        (run.model / name).write_text("x")
    (run.model / ".git").mkdir()
    (run.model / ".git/config").write_text("x")
    (run.model / "link.txt").symlink_to(tmp_path / "secret")
    (run.model / "tokenizer.json").symlink_to(tmp_path / "secret")
    (run.model / "additional_chat_templates").symlink_to(tmp_path / "more")
    run.gguf.mkdir()
    (run.gguf / "x.gguf").symlink_to(tmp_path / "secret")
    upload = plan_upload(run, "me/long")
    assert {name for _, name in upload.files} == {
        *("README.md", "LICENSE", "config.json", "model.safetensors", "passkey.png")
    }
    shown = describe_upload(upload)
    names = (*left, ".git/config", "link.txt", "tokenizer.json", "x.gguf")
    assert all(repr(name) in shown.split("left out")[1] for name in names)
    assert len(shown.splitlines()) < 30
    names = ("config.json", "model.safetensors", ".env", "link.txt")  # a planted list
    run.update(exported_files={name: [] for name in names})
    assert len(plan_upload(run, "me/long").files) == 5
    (run.model / "vocab.json").write_text("{}")  # of an earlier version: names without digests
    run.update(exported_files=None, files=["config.json", "model.safetensors"])
    assert len(plan_upload(run, "me/long").files) == 5


def test_a_file_that_changed_since_the_export_is_named(run):  # noqa: F811
    write_card(run)
    run.update(exported_files=folder_digests(run.model))
    assert not plan_upload(run, "me/long").changed
    write_card(run, "me/long")  # its own files may change
    config = run.model / "config.json"
    config.write_text("[]")  # valid JSON of the same size
    upload = plan_upload(run, "me/long")
    assert upload.changed.startswith("changed since the export: config.json\n")
    assert upload.changed in describe_upload(upload)
    config.unlink()
    assert "config.json" in changed_note(run.model, run.metadata())
    names = ["../secret", "/etc/passwd", "a\nb", *(f"{i}.json" for i in range(9))]
    run.update(exported_files={name: [] for name in names})
    said = changed_note(run.model, run.metadata())
    assert "0.json, 1.json, 2.json, 3.json, 4.json and 4 more\n" in said and "secret" not in said


def test_an_older_run_uploads_by_the_names_that_export_writes(run):  # noqa: F811
    (run.model / ".env").write_text("x")
    (run.model / "tokenizer.json").write_text("{}")
    upload = plan_upload(run, "me/long")
    assert [n for _, n in upload.files] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert upload.left_out == [".env"]


def test_a_licence_that_is_a_link_out_of_the_folder_is_not_copied(run, tmp_path):  # noqa: F811
    secret, base = tmp_path / "secret", tmp_path / "base"
    secret.write_text("mine")
    (base / "LICENSE-extra").symlink_to(secret)
    (base / "NOTICE").symlink_to(base / "LICENSE")
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (run.model / "LICENSE").symlink_to(precious)
    write_card(run)
    assert not (run.model / "LICENSE-extra").exists() and (run.model / "NOTICE").exists()
    assert precious.read_text() == "mine" and not (run.model / "LICENSE").is_symlink()


def test_links_of_the_hubs_cache_stay_allowed(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/abc").write_text("x")
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "LICENSE").symlink_to("../../blobs/abc")
    (snapshot / "NOTICE").symlink_to("../../other")
    assert stays_inside(snapshot / "LICENSE") and not stays_inside(snapshot / "NOTICE")


@pytest.mark.parametrize("name", ["chat_template.jinja", "merges.txt", "tokenizer.model"])
def test_text_of_a_model_folder_that_is_a_link_out_is_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (tmp_path / "id_rsa").write_text("mine")
    (folder / name).symlink_to(tmp_path / "id_rsa")
    with pytest.raises(SkipwiseError, match="link out of its folder"):
        read_config(str(folder), ModelSettings())
    out = tmp_path / "out"
    out.mkdir()
    save_tokenizer(type("T", (), {"save_pretrained": lambda *a: None})(), str(folder), out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("shard", ["../../etc/passwd", "/etc/passwd", "a/../../x", 5, None])
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path, shard):
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"w": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SkipwiseError, match="weight_map lists"):
        read_config(str(tmp_path), ModelSettings())


@pytest.mark.parametrize(
    "values",
    [
        *({"hidden_size": n} for n in (1e12, "x", -1, 0, 2.5, True)),
        *({"num_hidden_layers": n} for n in (1e9, 1_000_000, -1, -2, "x", 0)),
        *({"vocab_size": n} for n in (-5, "x", 1e10)),
        *({"rope_theta": n} for n in (0, "x", float("inf"), float("nan"))),
        *({"rope_parameters": {"full_attention": {"rope_theta": n}}} for n in (0, "x")),
        *({"sliding_window": n} for n in (-1, "x")),
        *({"partial_rotary_factor": n} for n in (0, 5, "x")),
        *({"text_config": {"head_dim": n}} for n in (-2, 0.5, 1e9)),
    ],
    ids=str,
)
def test_a_config_with_a_size_that_no_model_has_is_refused_with_its_key(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **values}))
    with pytest.raises(SkipwiseError, match=r"[a-z_]+ in [a-z_.]+ is .*: give "):
        read_config(str(tmp_path), ModelSettings())


@pytest.mark.parametrize(
    "values",
    [
        {"head_dim": 31},
        {"num_attention_heads": 7},
        {"rope_scaling": "x"},
        {"layer_types": 5},
        {"text_config": 5},
        {"num_attention_heads": [1, 2]},
        {"rope_parameters": {"rope_theta": [1]}},
        {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": "x"}},
        {"use_sliding_window": True, "max_window_layers": "x", "sliding_window": 10},
    ],
    ids=str,
)
def test_a_config_of_the_wrong_kind_is_two_lines_in_plan_and_check(tmp_path, capsys, values):
    plain = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    plain |= {"num_attention_heads": 4, "max_position_embeddings": 64, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps({**plain, "intermediate_size": 64}))
    assert main(["check", str(tmp_path), "--to", "256"]) == 0
    capsys.readouterr()
    (tmp_path / "config.json").write_text(json.dumps({**plain, **values}))
    for verb in ("check", "plan"):
        assert main([verb, str(tmp_path), "--to", "256"]) == 2
        assert 1 <= len(capsys.readouterr().err.splitlines()) <= 3


def test_a_config_nested_too_deep_or_no_regular_file_is_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"a":' * 100_000)
    with pytest.raises(SkipwiseError, match="nested too deep"):
        read_config(str(tmp_path), ModelSettings())
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(SkipwiseError, match="not a regular file"):
        read_config(str(tmp_path), ModelSettings())


def test_a_revision_of_a_local_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SkipwiseError, match=r"load\.revision: main is for a hub name"):
        read_config(str(tmp_path), ModelSettings(revision="main"))


def test_a_name_that_was_local_when_the_run_began_stays_private(run, tmp_path):  # noqa: F811
    """Also from another folder, and after the folder was removed: then it looks like a hub name."""
    from skipwise.export.hf import without_local_names

    text = run.recipe_file.read_text().replace(str(tmp_path / "base"), "clients/secret-base")
    run.recipe_file.write_text(text.replace("me/books", "clients/acme-contracts"))
    run.update(
        model={"name": "secret-base", "family": "llama", "hub": False},
        data={"sources": ["clients/acme-contracts"], "hub_sources": [], "num_documents": 3},
    )
    card = write_card(run).read_text()
    assert "acme" not in card and "secret-base" not in card and "clients" not in card
    assert "A llama model with its" in card and public_name(run) == "llama-256"
    recipe = dataclasses.replace(run.recipe(), trainer={"optim_args": "/home/me/x"})
    published = str(without_local_names(recipe, run.metadata()))
    assert "acme" not in published and "secret" not in published and "/home" not in published


def test_names_of_the_hub_are_in_the_card_and_the_recipe(run):  # noqa: F811
    from skipwise.export.hf import without_local_names

    text = run.recipe_file.read_text().splitlines(keepends=True)
    run.recipe_file.write_text("model: org/base-7b\n" + "".join(text[1:]))
    run.update(model={"name": "base-7b", "family": "llama", "hub": True})
    data = metadata_load(write_card(run))
    assert data["base_model"] == "org/base-7b" and data["datasets"] == ["me/books"]
    published = without_local_names(run.recipe(), run.metadata())
    assert published.model == "org/base-7b" and published.data.sources == ("me/books", "local")


def test_where_a_name_comes_from_is_decided_once(tiny, text_folder, tmp_path):
    from skipwise.models.prepared import prepare_model
    from skipwise.pipeline.stages import prepare_run

    tree = {"model": str(tiny), "target_length": 256, "data": {"sources": [str(text_folder)]}}
    recipe = parse_recipe(tree)
    opened = open_run(tmp_path / "run", recipe, "x")
    prepare_run(prepare_model(recipe), opened)
    metadata = opened.metadata()
    assert metadata["model"]["hub"] is False and metadata["data"]["hub_sources"] == []
    opened.update(model={**metadata["model"], "hub": True})  # as decided when it began
    prepare_run(prepare_model(recipe), opened)
    assert opened.metadata()["model"]["hub"] is True


HOSTILE = '<img src=x onerror=alert(1)> `"</code>` [a](javascript:x) \n---\n# b'


def test_a_card_shows_no_html_of_others(run, tmp_path):  # noqa: F811
    front = {
        "license": HOSTILE,
        "language": [HOSTILE],
        "license_name": "<script>",
        "license_link": "x",
    }
    (tmp_path / "base/README.md").write_text(f"---\n{json.dumps(front)}\n---\n")
    run.update(
        scaling=HOSTILE,
        model={"name": HOSTILE, "family": HOSTILE, "hub": False},
        selection={"chosen": 3, "by": HOSTILE},
        versions={"skipwise": HOSTILE},
    )
    hostile = row("after", HOSTILE, HOSTILE, 256, 0.5)
    write_json(run.path / "results.json", [*run.results(), hostile])
    card = write_card(run)
    head, body = card.read_text().split("\n---\n", 1)
    assert "<img" not in body and "<script" not in body and "](javascript" not in body
    assert "license_link: x" in head and "<script" not in head and "license:" not in head
    assert metadata_load(card)["library_name"] == "transformers"
