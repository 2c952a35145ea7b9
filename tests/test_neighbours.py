"""Neighbours of known faults: the same in another key, file, verb or system call."""

import json
import os
import shutil
import struct
from types import SimpleNamespace

import pytest

from skipwise.cli import _is_override, main
from skipwise.config.parse import parse_recipe
from skipwise.config.run_folder import RunFolder
from skipwise.data.files import list_folder
from skipwise.data.readers import BadRecord, read_record
from skipwise.errors import SkipwiseError, row_fault, run_fault
from skipwise.models.compatibility import _without_paths
from skipwise.models.convert.gguf_file import read_file
from skipwise.models.hf_config import check_inside, unreachable_hub
from skipwise.pipeline import stages
from skipwise.training.arguments import check_trainer, device_memory
from skipwise.training.callbacks import read_metrics
from skipwise.training.checkpoints import remove_incomplete

BASE = {"model": "m", "target_length": 512}


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_json_that_is_a_link_out_of_the_model_is_not_exported(tiny, tmp_path, name):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (tmp_path / "secret.json").write_text('{"auth": "x"}')
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / "secret.json")
    with pytest.raises(SkipwiseError, match="a link out of its folder"):
        check_inside(model)


def test_a_linked_folder_of_templates_is_refused_and_one_of_the_hubs_cache_is_not(tmp_path):
    other, model = tmp_path / "other", tmp_path / "models--a/snapshots/c"
    other.mkdir()
    model.mkdir(parents=True)
    (other / "x.jinja").write_text("private")
    (model / "additional_chat_templates").symlink_to(other)
    with pytest.raises(SkipwiseError, match="a link out of its folder"):
        check_inside(model)
    (model / "additional_chat_templates").unlink()
    (model / "additional_chat_templates").mkdir()
    blobs = tmp_path / "models--a/blobs"
    blobs.mkdir()
    (blobs / "1").write_text("{}")
    (model / "additional_chat_templates/x.jinja").symlink_to(blobs / "1")
    (model / "config.json").symlink_to(blobs / "1")
    check_inside(model)


def test_tokens_in_the_bases_configs_stay_out_of_the_export():
    config = {"token": "abc", "use_auth_token": True, "note": "hf_" + "a" * 34, "eos_token": "</s>"}
    assert _without_paths(config) == {"eos_token": "</s>"}


def test_an_export_runs_no_kernel_that_nobody_typed(tmp_path, monkeypatch):
    recipe = parse_recipe({**BASE, "load": {"attn_implementation": "kernels-community/x"}})
    run = RunFolder(tmp_path)
    monkeypatch.setattr(RunFolder, "recipe", lambda self: recipe)

    def stop(found):
        raise SkipwiseError(found.load.attn_implementation)

    monkeypatch.setattr(stages, "prepare_model", stop)
    with pytest.raises(SkipwiseError, match=r"^auto$"):
        stages.export_again(run, ["hf"])


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"save_only_model": True}, "save_only_model is set by"),
        ({"ignore_data_skip": True}, "ignore_data_skip is set by"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter is set by"),
        ({"eval_on_start": True}, "eval_on_start is set by"),
        ({"dataloader_num_workers": -1}, "give 0 to 4096"),
        ({"adam_epsilon": 1e9}, "give 0 to 0.1"),
        ({"neftune_noise_alpha": -5}, "give 0 to 10000"),
        ({"log_level": "bogus"}, "refuses the training settings"),
        ({"optim_args": {"a": 1}}, "refuses the training settings"),
    ],
)
def test_trainer_keys_that_void_or_stop_a_run_are_told_before_it(trainer, words):
    with pytest.raises(SkipwiseError, match=words):
        check_trainer(parse_recipe({**BASE, "trainer": trainer}))


def test_a_negative_number_that_a_trainer_key_takes_is_no_fault():
    check_trainer(parse_recipe({**BASE, "trainer": {"local_rank": -1}}))


@pytest.mark.parametrize("value", ["010", "1:30", "-1:30", "0_7"])
def test_numbers_of_yaml_1_1_are_not_read_as_others(value):
    with pytest.raises(SkipwiseError, match=r"training\.num_steps"):
        parse_recipe(BASE, [f"training.num_steps={value}"])


def test_a_section_that_would_drop_a_typed_key_is_refused():
    with pytest.raises(SkipwiseError, match=r"replaces .*training\.num_steps=7"):
        parse_recipe(BASE, ["training.num_steps=7", "training={learning_rate: 1.0e-3}"])
    recipe = parse_recipe(BASE, ["training={learning_rate: 1.0e-3}", "training.num_steps=7"])
    assert recipe.training.num_steps == 7 and recipe.training.learning_rate == 1e-3


def test_an_override_may_be_longer_than_a_file_name():
    assert _is_override("rope.options={short_factor: [" + "1.0, " * 200 + "1.0]}")


def test_a_record_nested_too_deep_is_one_bad_record():
    deep = "x"
    for _ in range(5000):
        deep = [deep]
    found = read_record("x.json:1", {"text": deep}, "text")
    assert isinstance(found, BadRecord) and "nested too deep" in found.why


def test_a_saved_data_set_names_only_files_beside_it(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("../secret.txt", "/etc/passwd"):
        state = {"_data_files": [{"filename": name}]}
        (folder / "state.json").write_text(json.dumps(state))
        with pytest.raises(SkipwiseError, match="no file beside it"):
            list_folder(folder)


def test_a_users_copy_of_a_checkpoint_is_kept(tmp_path):
    run = RunFolder(tmp_path)
    for name in ("checkpoint-best", "checkpoint-4"):
        (run.checkpoints / name).mkdir(parents=True)
    remove_incomplete(run)
    assert [folder.name for folder in run.checkpoints.iterdir()] == ["checkpoint-best"]


@pytest.mark.parametrize(
    "run",
    [
        {"machine": {"memory_gib": "x"}},
        {"data": {"num_documents": "x"}},
        {"temperature": {"value": "x"}},
        {"selection": {"chosen": "x"}},
        {"finish": {"seconds": "x"}},
        {"training": {"num_tokens": 10**400}},
        {"status": 5},
    ],
)
def test_a_wrong_value_inside_run_json_is_named(run):
    assert run_fault(run) == next(iter(run))
    assert run_fault({key: {} for key in run if key != "status"}) == ""


def test_numbers_beyond_arithmetic_are_faults(tmp_path):
    row = {"model": "a", "task": "passkey", "metric": "m", "value": 10**400}
    assert row_fault(row) == "value" and row_fault({**row, "value": 0.5}) == ""
    run = RunFolder(tmp_path)
    lines = [{"step": 1, "seconds": 1, "loss": 2.0}, {"step": 10**400, "seconds": 1}]
    lines += [{"step": 3, "seconds": 1, "loss": "x"}]
    text = "\n".join(map(json.dumps, lines)).encode() + b"\n\xff\n"
    run.metrics_file.write_bytes(text)
    assert read_metrics(run) == lines[:1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_in_a_run_folder_is_not_waited_for(tmp_path):
    run = RunFolder(tmp_path)
    os.mkfifo(tmp_path / "run.json")
    os.mkfifo(run.metrics_file)
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(SkipwiseError, match="not a regular file"):
        run.metadata()
    assert read_metrics(run) == []
    with run.lock():
        pass


@pytest.mark.extended
def test_a_list_longer_than_its_gguf_file_ends(tmp_path):
    pytest.importorskip("gguf")
    file = tmp_path / "long.gguf"
    key = b"some.key"
    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    file.write_bytes(head + struct.pack("<IIQ", 9, 0, 1 << 40))
    with pytest.raises(SkipwiseError, match="ends before its keys do"):
        read_file(file)


def test_what_a_launcher_or_the_user_set_wrongly_is_named(monkeypatch):
    for value in ("0", "abc"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
        with pytest.raises(SkipwiseError, match=f"LOCAL_WORLD_SIZE={value}"):
            device_memory()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://h:abc")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    unreachable_hub.cache_clear()
    with pytest.raises(SkipwiseError, match="HF_ENDPOINT=http://h:abc is no address"):
        unreachable_hub()
    unreachable_hub.cache_clear()


def test_a_name_that_is_no_text_is_refused_before_training(tiny, capsys):
    assert main(["extend", str(tiny), "--to", "256", "--out", "r\udce9sum"]) == 2
    assert "give the name of a folder" in capsys.readouterr().err


def test_a_closed_stdout_is_no_traceback(monkeypatch):
    args = SimpleNamespace(run=lambda _: 0)
    monkeypatch.setattr("skipwise.cli._parse", lambda _: args)
    monkeypatch.setattr("sys.stdout", None)
    assert main(["recipes"]) == 0

    def fail(_):
        raise BrokenPipeError

    args.run = fail
    assert main(["recipes"]) == 0
