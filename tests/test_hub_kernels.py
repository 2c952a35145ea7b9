"""Attention kernels of the Hub: passed to transformers, if the command line names one."""

import dataclasses
import json
import shutil

import pytest
import stand_in_kernel
import torch
from stand_in_kernel import NAME
from transformers.integrations import hub_kernels
from transformers.utils import import_utils

from skipwise.cli import main
from skipwise.config.parse import dump_recipe, load_recipe, parse_recipe
from skipwise.config.recipe import ModelSettings
from skipwise.config.run_folder import RunFolder, open_run, write_text
from skipwise.config.samplers import resolve_auto
from skipwise.errors import SkipwiseError
from skipwise.models.hf_config import load_config
from skipwise.models.load import attention_for, load_for_evaluation, load_model
from skipwise.models.prepared import prepare_model
from skipwise.pipeline import stages
from skipwise.planning.architecture import read_architecture
from skipwise.planning.job import make_job
from skipwise.training.callbacks import read_metrics
from skipwise.training.setup import set_up

TYPED = f"load.attn_implementation={NAME}"
BASE = {"model": "m", "target_length": 256}


@pytest.fixture
def loaded(monkeypatch):
    return stand_in_kernel.install(monkeypatch)


def test_a_run_trains_with_the_kernel_as_with_sdpa(loaded, tiny, text_folder, tmp_path):
    tree = {
        "model": str(tiny),
        "target_length": 256,
        "load": {"dtype": "float32"},
        "positions": {"key_weights": "none"},
        "data": {"sources": [str(text_folder)]},
        "training": {"num_steps": 3, "global_batch_size": 2, "learning_rate": 1e-3},
        "trainer": {"report_to": "none"},
    }
    losses, used = {}, {}
    for asked in ("sdpa", NAME):
        recipe = parse_recipe(tree, [f"load.attn_implementation={asked}"])
        prepared = prepare_model(recipe)
        run = open_run(tmp_path / asked.replace("/", "-"), recipe, "test")
        inputs = stages.prepare_run(prepared, run)
        training = set_up(prepared, inputs.data, run)
        assert all(check.passed for check in training.checks)
        used[asked] = training.trainer.base_config._attn_implementation
        stages.train_run(prepared, inputs, run)
        losses[asked] = [line["loss"] for line in read_metrics(run)]
    assert used == {"sdpa": "sdpa", NAME: NAME} and (NAME, False) in loaded
    assert losses[NAME] == pytest.approx(losses["sdpa"], abs=1e-5) and len(losses[NAME]) == 3


def test_an_evaluation_computes_the_same_with_the_kernel(loaded, tiny):
    ids = torch.arange(3, 51)[None]
    logits = []
    for asked in ("sdpa", NAME):
        settings = ModelSettings(attn_implementation=asked)
        config = load_config(str(tiny), settings)
        model = load_for_evaluation(str(tiny), config, settings, dtype=torch.float32)
        assert model.config._attn_implementation == asked
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.allclose(*logits, atol=1e-5)


def test_a_kernel_counts_as_flash_attention(tiny):
    recipe = parse_recipe({**BASE, "model": str(tiny)}, [TYPED])
    assert resolve_auto(recipe).positions.key_weights == "none"
    info = prepare_model(parse_recipe({**BASE, "model": str(tiny)})).info
    architecture = read_architecture(json.loads((tiny / "config.json").read_text()))
    jobs = [make_job(one, info, architecture) for one in (recipe, parse_recipe(BASE, ["model=x"]))]
    assert [job.attention for job in jobs] == ["flash", "sdpa"]
    assert [job.importance for job in jobs] == [False, True]


def test_what_needs_a_mask_is_refused(loaded):
    settings = ModelSettings(attn_implementation=NAME)
    assert attention_for(settings, "none") == NAME
    for weights, hybrid in (("importance", False), ("none", True)):
        with pytest.raises(SkipwiseError, match=r"no \(L, L\) mask.*\n.*implementation=sdpa"):
            attention_for(settings, weights, hybrid)


def test_without_the_kernels_package_the_error_says_what_to_install(monkeypatch, tiny, capsys):
    monkeypatch.setattr(import_utils, "is_kernels_available", lambda *_: False)
    assert main(["check", str(tiny), "--to", "256", TYPED]) == 2
    error = capsys.readouterr().err
    assert f"{NAME} is a kernel of the Hub, which needs a package" in error
    assert f"pip install 'kernels~={import_utils.KERNELS_MIN_VERSION}'" in error
    settings = ModelSettings(attn_implementation=NAME)
    config = load_config(str(tiny), settings)
    with pytest.raises(SkipwiseError, match="pip install 'kernels~="):
        load_for_evaluation(str(tiny), config, settings, dtype=torch.float32)


def test_the_code_of_other_owners_needs_more_than_the_name(loaded, tiny):
    other = ModelSettings(attn_implementation="someone/attention")
    with pytest.raises(
        SkipwiseError, match=r"someone/attention is code.*\n.*trust_remote_code=true"
    ):
        attention_for(other, "none")
    trusted = dataclasses.replace(other, trust_remote_code=True)
    assert attention_for(trusted, "none") == "someone/attention"
    if not hasattr(hub_kernels, "allow_all_hub_kernels"):
        pytest.skip("this transformers has no list of owners of its own")
    config = load_config(str(tiny), trusted)
    name = trusted.attn_implementation
    load_model(str(tiny), config, trusted, dtype=torch.float32, attn_implementation=name)
    assert loaded[-1] == ("someone/attention", True)


def test_a_recipe_file_cannot_agree_to_run_a_kernel(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: m\ntarget_length: 32k\nload: {{attn_implementation: {NAME}}}\n")
    with pytest.raises(SkipwiseError, match=f"a file cannot agree.*\ntype {TYPED}"):
        load_recipe(file)
    with pytest.raises(SkipwiseError, match="a file cannot agree"):
        load_recipe(file, ["load.dtype=float32", "seed=1"])
    assert load_recipe(file, [TYPED]).load.attn_implementation == NAME
    assert load_recipe(file, ["load.attn_implementation=sdpa"]).load.takes_mask
    assert main(["extend", str(file)]) == 2 and "a file cannot agree" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["eval", "train"])
def test_a_run_folder_cannot_agree_either(tiny, tmp_path, capsys, verb):
    run = RunFolder(tmp_path / "run")
    run.model.mkdir(parents=True)
    recipe = parse_recipe({**BASE, "model": str(tiny)}, [TYPED])
    write_text(run.recipe_file, dump_recipe(recipe))
    assert run.recipe().load.attn_implementation == NAME  # what only reads it goes on
    assert main([verb, str(run.path)]) == 2
    assert "a file cannot agree" in capsys.readouterr().err


def test_the_processes_of_a_run_get_the_name_that_was_typed(tiny, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(stages, "launch", lambda *arguments: started.append(arguments))
    for overrides in ([TYPED], []):
        run = RunFolder(tmp_path / f"run{len(overrides)}")
        run.path.mkdir()
        write_text(run.recipe_file, dump_recipe(parse_recipe(BASE, overrides)))
        stages.launch_training(run, 2, only_check=True)
    assert started[0] == (["train", str(tmp_path / "run1"), "--dry-run", TYPED], 2)
    assert started[1] == (["train", str(tmp_path / "run0"), "--dry-run"], 2)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_that_the_models_config_names_is_not_loaded(loaded, tiny, tmp_path, key):
    shutil.copytree(tiny, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, key: NAME, "experts_implementation": "deep-gemm"}))
    settings = ModelSettings()
    config = load_config(str(tmp_path / "model"), settings)
    model = load_model(str(tmp_path / "model"), config, settings, dtype=torch.float32)
    assert model.config._attn_implementation == "sdpa" and loaded == []
    assert config._experts_implementation is None


def test_a_name_without_an_owner_is_a_mistake():
    with pytest.raises(SkipwiseError, match="choose one of auto, eager, sdpa, flex_attention"):
        parse_recipe(BASE, ["load.attn_implementation=flash_attention2"])


@pytest.mark.parametrize("value", [["a/b"], {"a/b": 1}, "a/../b", "/a/b", "a/b/c", "a/b\nc", ""])
def test_what_is_no_name_of_a_kernel_is_refused(value):
    tree = {"model": "m", "target_length": 128, "load": {"attn_implementation": value}}
    with pytest.raises(SkipwiseError, match=r"load\.attn_implementation is .*: choose one of"):
        parse_recipe(tree)


@pytest.mark.parametrize("name", [NAME, f"{NAME}@v1.2", f"{NAME}:flash_attn"])
def test_a_kernel_may_have_a_revision_and_a_function(name):
    tree = {"model": "m", "target_length": 128, "load": {"attn_implementation": name}}
    assert parse_recipe(tree).load.attn_implementation == name
