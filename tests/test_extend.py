"""The whole job on a small model: what it leaves in the run folder, and that it loads anywhere."""

import argparse
import inspect
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipwise.cli import main
from skipwise.config.parse import parse_recipe
from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError
from skipwise.export.hf import export_model
from skipwise.export.hub import plan_upload
from skipwise.export.model_card import write_card
from skipwise.models.compatibility import make_portable
from skipwise.models.prepared import prepare_model
from skipwise.pipeline.extend import extend


def make_recipe(tiny, text_folder, *overrides):
    tree = {
        "model": str(tiny),
        "target_length": 256,
        "rope": {"type": "yarn"},  # measured in tests/test_scaling_choice.py
        "data": {"sources": [str(text_folder)]},
        "training": {"num_steps": 4, "global_batch_size": 4, "micro_batch_size": 4},
        "eval": {
            "tasks": ["perplexity", "passkey", "needle"],
            "perplexity_windows": 4,
            "passkey_samples": 2,
            "needle_samples": 2,
        },
    }
    return parse_recipe(tree, list(overrides))


@pytest.fixture(scope="module")
def finished(tiny, text_folder, tmp_path_factory):
    return extend(make_recipe(tiny, text_folder), tmp_path_factory.mktemp("extend") / "run")


def test_the_run_folder_holds_everything(finished):
    facts = finished.metadata()
    assert facts["status"] == "finished" and facts["exported"]
    assert all(check["passed"] for check in facts["checks"])
    names = {check["name"] for check in facts["checks"]}
    assert {"chunks see each other", "rope", "attention window", "reload"} <= names
    assert (finished.report / "index.html").exists()
    card = (finished.model / "README.md").read_text()
    assert "64 to 256 tokens" in card and "perplexity" in card
    recipe = (finished.model / "skipwise_recipe.yaml").read_text()
    assert "model: local\n" in recipe and "/" not in recipe  # no name of this machine
    logged = list((finished.path / "tensorboard").glob("events*"))
    assert bool(logged) == (find_spec("tensorboard") is not None)  # on where it is installed


def test_after_is_what_the_exported_folder_gives(finished, capsys):
    assert main(["eval", str(finished.path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == [row for row in finished.results() if row["model"] == "after"]
    before = [row for row in finished.results() if row["model"] == "before"]
    assert [r["value"] for r in before[:3]] != [r["value"] for r in rows[:3]]


def test_results_are_tidy_rows_of_the_base_rescaled_and_trained(finished):
    rows = finished.results()
    assert {row["model"] for row in rows} == {"before", "untrained", "after"}
    for row in rows:
        assert row["num_samples"] > 0 or row["value"] is None
        if row["task"] == "perplexity":
            assert row["low"] is None and row["high"] is None  # one document is too few
        else:
            assert row["low"] <= row["value"] <= row["high"]
    lengths = {r["context_length"] for r in rows if r["task"] == "perplexity"}
    assert lengths == {64, 128, 256}
    assert all("depth" in row for row in rows if row["task"] == "passkey")


@pytest.mark.extended
def test_untrained_is_what_rescaling_alone_exports(tiny, text_folder, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text(inspect.getsource(argparse))
    texts = [f"data.eval_sources=[{book}]", "attention_temperature=3.0"]
    trained = extend(make_recipe(tiny, text_folder, *texts), tmp_path / "trained")
    alone = extend(make_recipe(tiny, text_folder, *texts, "method=none"), tmp_path / "alone")
    mine = [row for row in trained.results() if row["model"] == "untrained"]
    other = [row for row in alone.results() if row["model"] == "after"]
    assert {row["model"] for row in alone.results()} == {"before", "after"}
    assert len(mine) == len(other) == 18
    for a, b in zip(mine, other, strict=True):
        for key in ("task", "context_length", "depth", "metric", "num_samples"):
            assert a.get(key) == b.get(key)
        assert a["value"] == (b["value"] and pytest.approx(b["value"], rel=1e-6))
    left_out = make_recipe(tiny, text_folder, *texts, "eval.untrained=false")
    run = extend(left_out, tmp_path / "left-out")
    assert {row["model"] for row in run.results()} == {"before", "after"}


def test_the_exported_model_loads_in_plain_transformers_with_its_tokenizer(finished, tiny):
    model = AutoModelForCausalLM.from_pretrained(finished.model)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    assert model.dtype == base.dtype
    assert model.config.max_position_embeddings == 256 and model.config.use_cache
    assert AutoTokenizer.from_pretrained(finished.model).model_max_length == 256
    changed = model.model.layers[0].mlp.up_proj.weight - base.model.layers[0].mlp.up_proj.weight
    assert changed.abs().max() > 0


def test_no_file_of_the_export_names_this_machine_or_how_it_was_loaded(finished, tiny):
    for file in finished.model.glob("*.json"):
        text = file.read_text()
        assert str(tiny.parent) not in text and str(finished.path) not in text, file.name
    settings = json.loads((finished.model / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "name_or_path"} & set(settings)


def test_the_code_of_the_card_generates(finished, capsys):
    card = write_card(finished, str(finished.model)).read_text()
    code = card.split("```python\n", 1)[1].split("```", 1)[0]
    exec(code, {})
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_paths_leave_every_config_and_text_stays(portable_folder):
    files = {
        "config.json": {"_name_or_path": "/home/me/model", "text_config": {"f": "/home/me/x"}},
        "tokenizer_config.json": {
            "tokenizer_file": "/home/me/tokenizer.json",
            "is_local": True,
            "local_files_only": True,
            "sep_token": "/",
            "chat_template": "/{{ messages }}",
            "added_tokens_decoder": {"3": {"content": "/end", "special": True}},
        },
        "preprocessor_config.json": {"files": [{"at": "/tmp/a", "size": 3}], "url": "a/b"},
        "adapter_config.json": {"base_model_name_or_path": "/home/me/base"},
    }
    for name, more in files.items():
        file = portable_folder / name
        old = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**old, **more}))
    make_portable(portable_folder)
    read = {name: json.loads((portable_folder / name).read_text()) for name in files}
    assert "_name_or_path" not in read["config.json"]
    assert read["config.json"]["text_config"] == {}
    kept = {key: read["tokenizer_config.json"].get(key) for key in files["tokenizer_config.json"]}
    gone = dict.fromkeys(("tokenizer_file", "is_local", "local_files_only"))
    assert kept == files["tokenizer_config.json"] | gone
    assert read["preprocessor_config.json"] == {"files": [{"size": 3}], "url": "a/b"}
    assert read["adapter_config.json"] == files["adapter_config.json"]  # peft loads it from there


@pytest.fixture
def portable_folder(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_the_config_says_the_same_in_both_spellings(finished):
    config = json.loads((finished.model / "config.json").read_text())
    new, old = config["rope_parameters"], config["rope_scaling"]
    assert config["rope_theta"] == new["rope_theta"]
    assert old["rope_type"] == old["type"] == new["rope_type"] == "yarn"
    assert old["factor"] == new["factor"] == 4.0
    assert old["original_max_position_embeddings"] == 64
    settings = json.loads((finished.model / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_what_is_there_is_not_done_again(finished, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("done again")

    for name in (
        "pipeline.stages.train",
        "pipeline.stages.export_model",
        "evaluation.run.load_for_evaluation",
    ):
        monkeypatch.setattr(f"skipwise.{name}", refuse)
    extend(finished.recipe(), finished.path)


def test_evaluation_text_is_kept_out_of_training(finished):
    held = [json.loads(line)["text"] for line in finished.eval_documents.read_text().splitlines()]
    assert len(held) == 2  # a fifth of twelve documents
    assert finished.metadata()["data"]["num_documents"] == 10


@pytest.mark.parametrize("scaling", ["linear", "ntk", "llama3", "longrope"])
def test_other_scalings_without_training_export_and_reload(tiny, tmp_path, scaling):
    recipe = make_recipe(tiny, "-", f"rope.type={scaling}", "method=none", "data.sources=[]")
    run = RunFolder(tmp_path)
    run.recipe_file.write_text("{}")
    (check,) = export_model(prepare_model(recipe), run, None)
    assert check.passed, check


def test_the_reload_check_catches_a_config_that_lost_its_scaling(tiny, tmp_path, monkeypatch):
    def lose(folder, target_length):
        make_portable(folder, target_length)
        file = folder / "config.json"
        config = json.loads(file.read_text())
        for key in ("rope_parameters", "rope_scaling"):
            config.pop(key)
        file.write_text(json.dumps(config))

    monkeypatch.setattr("skipwise.export.hf.make_portable", lose)
    recipe = make_recipe(tiny, "-", "method=none", "data.sources=[]")
    run = RunFolder(tmp_path)
    run.recipe_file.write_text("{}")
    (check,) = export_model(prepare_model(recipe), run, None)
    assert not check.passed and "different logits" in check.detail


@pytest.mark.extended
def test_merged_lora_gives_the_logits_of_the_adapted_model(tiny, text_folder, tmp_path):
    run = extend(make_recipe(tiny, text_folder, "lora.rank=4"), tmp_path / "run")
    from peft import PeftModel

    prepared = prepare_model(run.recipe())
    base = AutoModelForCausalLM.from_pretrained(tiny, config=prepared.scaled)
    adapted = PeftModel.from_pretrained(base, run.checkpoints / "checkpoint-4").eval()
    merged = AutoModelForCausalLM.from_pretrained(run.model).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 1000, (1, 200)))
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-4)


def far_logits(model):
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 1000, (1, 16)))
    with torch.no_grad():
        return model.eval()(ids, position_ids=torch.arange(240, 256)[None]).logits


@pytest.fixture(scope="module")
def with_lora(tiny, text_folder, tmp_path_factory):
    recipe = make_recipe(tiny, text_folder, "lora.rank=4", "eval.tasks=[passkey]")
    return extend(recipe, tmp_path_factory.mktemp("lora") / "run")


@pytest.mark.extended
def test_an_adapter_alone_comes_with_the_config_it_needs(with_lora, capsys):
    from peft import PeftModel
    from transformers import AutoConfig

    assert main(["export", str(with_lora.path), "--to", "adapter"]) == 0
    assert "ok   reload of the adapter" in capsys.readouterr().err
    merged = AutoModelForCausalLM.from_pretrained(with_lora.model)
    base = with_lora.recipe().model
    scaled = AutoConfig.from_pretrained(with_lora.adapter)
    right = AutoModelForCausalLM.from_pretrained(base, config=scaled)
    right = PeftModel.from_pretrained(right, with_lora.adapter)
    assert torch.allclose(far_logits(right), far_logits(merged), atol=1e-4)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), with_lora.adapter)
    assert not torch.allclose(far_logits(plain), far_logits(merged), atol=1e-4)
    assert "config=config" in (with_lora.adapter / "README.md").read_text()
    card = metadata_load(with_lora.adapter / "README.md")
    assert card["library_name"] == "peft" and "base_model" not in card  # a local folder
    config = json.loads((with_lora.adapter / "config.json").read_text())
    assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 4


@pytest.mark.extended
def test_a_run_of_all_weights_has_no_adapter(finished, capsys):
    assert main(["export", str(finished.path), "--to", "adapter"]) == 2
    assert "has no adapter" in capsys.readouterr().err


@pytest.mark.parametrize("of", ["finished", "with_lora"])
def test_a_checkpoint_in_the_middle_has_both_spellings(of, request):
    run = request.getfixturevalue(of)
    folder = run.checkpoints / "checkpoint-4"
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_scaling"]["rope_type"] == "yarn" and config["use_cache"]
    assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 4
    assert config["max_position_embeddings"] == 256
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 256
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_large_weights_are_written_in_shards_that_load(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("skipwise.export.hf._SHARD", "60KB")
    run = RunFolder(tmp_path)
    run.recipe_file.write_text("{}")
    prepared = prepare_model(make_recipe(tiny, "-", "method=none", "data.sources=[]"))
    (check,) = export_model(prepared, run, None)
    assert check.passed and len(list(run.model.glob("model-*.safetensors"))) > 1
    assert (run.model / "model.safetensors.index.json").exists()


def test_mistakes_are_found_before_anything_is_written(tiny, text_folder, tmp_path):
    for overrides, word in (
        (["target_length=32"], "not longer"),
        (["rope.type=dynamic"], "cannot be trained"),
        (["rope.options.beta_fats=3"], "not an option of yarn"),
        (["data.sources=[./nowhere.txt]"], "no such file"),
        (["model=./nowhere"], "no such folder"),
        (["data.sources=[]"], "no text to train on"),
        (["training.num_steps=0"], "method=none"),
        (["method=randpos", "positions.num_chunks=3"], "method: randpos"),
        (
            ["positions.key_weights=importance", "load.attn_implementation=flash_attention_2"],
            r"takes no \(L, L\) mask",
        ),
    ):
        with pytest.raises(SkipwiseError, match=word):
            extend(make_recipe(tiny, text_folder, *overrides), tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.extended
def test_untrained_rescaling_is_measured_on_the_sources(tiny, text_folder, tmp_path):
    run = extend(make_recipe(tiny, text_folder, "method=none"), tmp_path / "run")
    rows = run.results()
    assert {r["task"] for r in rows if r["model"] == "after"} >= {"perplexity", "passkey"}
    assert "training" not in run.metadata() and not run.checkpoints.exists()
    assert "Nothing was trained" in (run.report / "index.html").read_text()


@pytest.mark.extended
@pytest.mark.parametrize("method", ["full", "randpos", "cream"])
def test_the_baselines_run_from_the_same_recipe(tiny, text_folder, tmp_path, method):
    run = extend(make_recipe(tiny, text_folder, f"method={method}"), tmp_path / "run")
    facts = run.metadata()
    assert facts["status"] == "finished" and facts["training"]["method"] == method
    assert facts["training"]["tokens_per_step"] == 4 * (256 if method == "full" else 64)


@pytest.mark.extended
def test_importance_weights_train_with_lora_and_export(tiny, text_folder, tmp_path):
    overrides = ["lora.rank=2", "positions.key_weights=importance"]
    run = extend(make_recipe(tiny, text_folder, *overrides), tmp_path / "run")
    assert run.metadata()["training"]["mode"] == "lora"


def test_no_file_of_the_export_names_a_folder_of_this_machine(finished, tiny, text_folder):
    for file in finished.model.iterdir():
        content = file.read_bytes()
        for name in (str(tiny), tiny.name, str(text_folder), str(finished.path)):
            assert name.encode() not in content, (file.name, name)
    assert set(finished.metadata()["exported_files"]) <= {
        file.name for file in finished.model.iterdir()
    }
    upload = plan_upload(finished, "me/long")
    assert upload.left_out == [] and len(upload.files) == len(list(finished.model.iterdir()))
