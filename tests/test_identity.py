"""A run goes on with the base, the text and the decisions it began with, or says what changed."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_checkpoints import STEPS, make_recipe, train_into, weights

from skipwise.config.parse import dump_recipe
from skipwise.config.run_folder import RunFolder, open_run, write_text
from skipwise.data import token_cache
from skipwise.errors import SkipwiseError
from skipwise.models.identity import base_identity, difference
from skipwise.models.prepared import prepare_model
from skipwise.pipeline import choose_train_length
from skipwise.pipeline.stages import prepare_training, train_run
from skipwise.training import checkpoints
from skipwise.training.checkpoints import add_decision, known_decisions, resume_decisions


def train(folder, recipe):
    """As `skipwise train` does."""
    prepared, inputs, run = prepare_training(recipe, folder, "test")
    train_run(prepared, inputs, run)
    return run


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    shutil.copytree(tiny, folder)
    return folder


@pytest.fixture(scope="module")
def stopped(base, text_folder, tmp_path_factory):
    """A LoRA run that has its scaling from a measurement, as if it was killed after step 4."""
    run = RunFolder(tmp_path_factory.mktemp("stopped") / "run")
    recipe = make_recipe(base, text_folder, "lora={rank: 2}")
    open_run(run.path, recipe, "test")
    run.update(rope_choice={"type": "linear", "detail": "planted"})
    own = dataclasses.asdict(prepare_model(recipe).separator)
    run.update(separator={**own, "detail": "planted", "perplexity": {}})
    train(run.path, recipe)
    shutil.rmtree(run.checkpoints / f"checkpoint-{STEPS}")
    return run, recipe


@pytest.fixture
def copied(stopped, tmp_path):
    run = RunFolder(tmp_path / "run")
    shutil.copytree(stopped[0].path, run.path)
    return run, stopped[1]


def test_the_checkpoint_says_what_decided_the_run(copied):
    run, _ = copied
    name, decided = known_decisions(run)
    facts = run.metadata()
    assert name == "checkpoint-4"
    assert decided["rope_choice"] == {"type": "linear"}
    assert decided["rope"]["rope_type"] == "linear" and decided["rope"]["factor"] == 4
    assert decided["data"]["digest"] == facts["data"]["digest"]
    assert decided["separator"]["end"] == facts["separator"]["end"] == [2]
    assert "model.safetensors" in decided["identity"]["base"]["files"]
    mark = json.loads((run.checkpoints / "checkpoint-4/complete").read_text())
    assert mark["micro_batch_size"] == 2


CHANGES = {
    "model.safetensors": lambda file: save_file(
        {k: v + 0.5 * (k == "lm_head.weight") for k, v in load_file(file).items()}, file
    ),
    "config.json": lambda file: file.write_text(
        file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    ),
    "tokenizer.json": lambda file: file.write_text(file.read_text() + " "),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_base_that_has_changed_is_refused_with_what_changed(copied, base, name):
    run, recipe = copied
    file, kept = base / name, (base / name).read_bytes()
    stat = file.stat()
    CHANGES[name](file)
    assert file.read_bytes() != kept
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as cp -p leaves it
    try:
        with pytest.raises(SkipwiseError) as told:
            train(run.path, recipe)
    finally:
        file.write_bytes(kept)
    said = str(told.value)
    assert f"{base} has changed since {run.path} began: {name} differs" in said
    assert "--out" in said and len(said.splitlines()) == 2
    train(run.path, recipe)  # the old one is there again


def test_the_base_is_compared_before_there_is_a_checkpoint_and_without_run_json(copied, base):
    run, recipe = copied
    prepared = prepare_model(recipe)
    file, kept = base / "model.safetensors", (base / "model.safetensors").read_bytes()
    shutil.copytree(run.path, run.path.with_name("lost"))
    CHANGES[file.name](file)
    try:
        lost = RunFolder(run.path.with_name("lost"))
        (lost.path / "run.json").unlink()
        with pytest.raises(SkipwiseError, match=r"model\.safetensors differs"):
            resume_decisions(prepared, lost)
        shutil.rmtree(run.checkpoints)
        with pytest.raises(SkipwiseError, match=r"model\.safetensors differs"):
            resume_decisions(prepared, run)
    finally:
        file.write_bytes(kept)


def test_identities_are_compared_file_by_file(tmp_path):
    for name in ("model.safetensors", "config.json", "README.md"):
        (tmp_path / name).write_text(name)
    before = base_identity(str(tmp_path), None)
    assert set(before["files"]) == {"model.safetensors", "config.json"}
    (tmp_path / "README.md").write_text("other")
    assert difference(before, base_identity(str(tmp_path), None)) == ""
    (tmp_path / "model-2.safetensors").write_text("x")
    assert difference(before, base_identity(str(tmp_path), None)) == "model-2.safetensors was added"
    (tmp_path / "config.json").unlink()
    now = base_identity(str(tmp_path), None)
    assert difference(before, now) == "config.json is gone, and 1 more"
    hub, other = base_identity("me/no-such-model", "a1"), base_identity("me/no-such-model", "b2")
    assert difference(hub, hub) == "" and "was a1 and is b2" in difference(hub, other)


def test_a_lost_run_json_changes_nothing(copied, stopped, capsys):
    run, recipe = copied
    (run.path / "run.json").unlink()
    train(run.path, recipe)
    said = capsys.readouterr().err
    assert "run.json has lost" in said and "taken from checkpoint-4" in said
    facts = run.metadata()
    assert facts["rope"]["rope_type"] == "linear" and facts["rope_choice"]["type"] == "linear"
    assert facts["command"] == "test" and facts["versions"] and facts["created"]
    config = json.loads((run.checkpoints / f"checkpoint-{STEPS}/config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "linear"
    straight = RunFolder(run.path.with_name("straight"))
    shutil.copytree(stopped[0].path, straight.path)
    train(straight.path, recipe)
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        files = [r.checkpoints / f"checkpoint-{STEPS}" / name for r in (run, straight)]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_the_training_length_that_auto_chose_is_in_the_checkpoint(
    tiny, text_folder, tmp_path, monkeypatch
):
    """Where run.json is lost, another machine would choose another length in the middle."""
    recipe = make_recipe(tiny, text_folder, "train_length=auto")
    found = {"train_length": 128, "num_gpus": 1, "detail": "128 tokens"}
    monkeypatch.setattr(choose_train_length, "_choose", lambda *_: found)
    run = train(tmp_path / "run", recipe)
    assert run.metadata()["train_length"] == 128
    found.update(train_length=64)
    (run.path / "run.json").unlink()
    train(run.path, recipe)
    assert run.metadata()["train_length_choice"]["train_length"] == 128
    run.update(train_length_choice=found)
    with pytest.raises(SkipwiseError, match=r"train_length_choice .*64.* trained with .*128"):
        train(run.path, recipe)


EDITS = {
    "rope_choice": {"type": "yarn", "detail": "edited"},
    "separator": {
        "name": "x",
        "begin": [5],
        "end": [],
        "between": [],
        "detail": "",
        "perplexity": {},
    },
}


@pytest.mark.parametrize("key", EDITS)
def test_an_edited_decision_is_refused(copied, key):
    run, recipe = copied
    run.update(**{key: EDITS[key]})
    with pytest.raises(SkipwiseError) as told:
        train(run.path, recipe)
    said = str(told.value)
    assert len(said.splitlines()) == 2
    if key == "separator":  # the tokens are others then
        assert "text has changed" in said or "separator" in said
    else:
        assert key in said and "checkpoint-4" in said and "remove run.json" in said
        (run.path / "run.json").unlink()
        train(run.path, recipe)
        assert run.metadata()["rope_choice"]["type"] == "linear"


def test_an_edited_digest_of_the_text_is_refused(copied, text_folder):
    run, recipe = copied
    run.update_entry("data", digest="0" * 16, digests={str(text_folder): "0" * 16})
    with pytest.raises(SkipwiseError, match="text has changed") as told:
        train(run.path, recipe)
    assert str(text_folder) in str(told.value)


def test_a_smaller_micro_batch_than_the_checkpoints_is_told(copied, capsys):
    run, recipe = copied
    run.update(batch={"micro_batch_size": 1})
    resume_decisions(prepare_model(recipe), run)
    assert "micro batch 1; checkpoint-4 was trained with 2" in capsys.readouterr().err


def test_the_temperature_is_kept_in_the_last_checkpoint(copied, monkeypatch):
    from skipwise.pipeline import choose_temperature

    run, recipe = copied
    train(run.path, recipe)
    found = {"value": 1.15, "detail": "found"}
    searches = []

    def search(*arguments):
        searches.append(1)
        return dict(found)

    monkeypatch.setattr(choose_temperature, "_search_of_run", search)
    prepared, last = prepare_model(recipe), run.checkpoints / f"checkpoint-{STEPS}"
    assert choose_temperature.chosen_temperature(prepared, run, last) == 1.15
    assert checkpoints.damage(last) == ""
    assert known_decisions(run)[1]["temperature"] == {"value": 1.15}
    run.update(temperature={"value": 1.3, "detail": "edited"})
    with pytest.raises(SkipwiseError, match=r"says temperature 1.3, and 1.15 was found"):
        choose_temperature.chosen_temperature(prepared, run, last)
    (run.path / "run.json").unlink()
    resume_decisions(prepared, run)
    assert choose_temperature.chosen_temperature(prepared, run, last) == 1.15
    assert len(searches) == 1


def test_a_decision_keeps_the_seal_and_makes_none(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    folder = tmp_path / "checkpoint-2"
    (folder / "model.safetensors").write_bytes(b"x")
    checkpoints.mark_complete(folder, 2, "zero3")
    add_decision(folder, temperature={"value": 1.2})
    checkpoints.check_trusted(folder, "zero3")
    mark = json.loads((folder / "complete").read_text())
    mark["seal"] = "0" * 64  # of somebody else
    (folder / "complete").write_text(json.dumps(mark))
    add_decision(folder, temperature={"value": 1.3})
    assert json.loads((folder / "complete").read_text()) == mark


@pytest.mark.parametrize(
    "leftovers",
    [
        [],
        ["recipe.yaml.part"],
        ["recipe.yaml.123.part", ".run.lock"],
        ["recipe.yaml"],
        ["recipe.yaml", "run.json.9.part", ".run.lock"],
    ],
    ids=" ".join,
)
def test_a_run_that_was_made_half_is_gone_on_with(tiny, text_folder, tmp_path, leftovers):
    recipe = make_recipe(tiny, text_folder)
    folder = tmp_path / "run"
    folder.mkdir()
    for name in leftovers:
        write_text(folder / name, dump_recipe(recipe) if name == "recipe.yaml" else "half")
    run = open_run(folder, recipe, "skipwise extend x")
    facts = run.metadata()
    assert run.recipe() == recipe and facts["command"] == "skipwise extend x"
    assert {"name", "created", "status", "versions", "machine"} <= set(facts)
    assert open_run(folder, recipe, "again").metadata() == facts


def test_a_folder_of_something_else_is_still_refused(tiny, text_folder, tmp_path):
    recipe = make_recipe(tiny, text_folder)
    for name in ("notes.txt", "run.json", "recipe.yaml.bak"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(SkipwiseError, match="not a run folder"):
            open_run(folder, recipe, "x")


FILES = ("tokens.bin", "offsets.npy", "meta.json", "masked.bin")


@pytest.fixture
def store(text_folder, tmp_path):
    from transformers import AutoTokenizer

    from skipwise.data.readers import parse_sources
    from skipwise.data.tokenize import tokenize_source
    from skipwise.pipeline.quickstart import MODEL

    (source,) = parse_sources([str(text_folder)], "text")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return lambda: tokenize_source(source, tokenizer, cache=tmp_path, progress=False)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "more"])
def test_a_damaged_token_store_is_made_again(store, name, harm, capsys):
    first = store()
    expected, folder = (first.tokens.tolist(), first.offsets.tolist()), Path(first.folder)
    file = folder / name
    content, stat = bytearray(file.read_bytes()), file.stat()
    if not content and harm in ("flip", "cut"):
        harm = "more"
    if harm == "flip":
        content[len(content) // 2] ^= 1
    changed = {"cut": content[: len(content) // 2], "more": content + b"12345678"}
    file.write_bytes(changed.get(harm, content))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if harm == "gone":
        file.unlink()
    again = store()
    assert (again.tokens.tolist(), again.offsets.tolist()) == expected
    said = capsys.readouterr().err
    assert ("is damaged, and is made again" in said) == (name != "meta.json" or harm != "gone")
    assert store().tokens.tolist() == expected[0] and not capsys.readouterr().err


@pytest.mark.parametrize("name", ["offsets.npy", "meta.json"])
def test_a_store_that_is_damaged_between_its_check_and_its_use_is_told_in_a_line(store, name):
    expected = store().tokens.tolist()
    folder = Path(store().folder)
    content = bytearray((folder / name).read_bytes())
    content[20] = 0  # in the header
    (folder / name).write_bytes(content)
    with pytest.raises(SkipwiseError, match=r"is damaged: type the same command again"):
        token_cache.open_store(folder)
    assert store().tokens.tolist() == expected


def test_a_store_whose_list_says_something_else_is_made_again(store, capsys):
    first = store()
    file = Path(first.folder) / "meta.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), "num_bad_records": 7}))
    assert store().num_bad_records == first.num_bad_records == 0
    assert "is damaged, and is made again" in capsys.readouterr().err
    assert file.read_text() == before


@pytest.mark.parametrize("number", ["EIO", "EMFILE", "ENOMEM", "ESTALE"])
def test_a_file_that_cannot_be_read_for_now_is_not_left_out_of_the_text(
    store, text_folder, monkeypatch, number
):
    import errno
    import io

    plain, code = io.open, getattr(errno, number)

    def opened(file, *rest, **options):
        if str(file).startswith(str(text_folder)):
            raise OSError(code, os.strerror(code), str(file))
        return plain(file, *rest, **options)

    monkeypatch.setattr(io, "open", opened)
    with pytest.raises(SkipwiseError):
        store()
    monkeypatch.undo()
    assert store().num_documents == 12 and store().num_bad_records == 0


def test_training_itself_has_not_changed(tiny, text_folder, tmp_path):
    """The commands' path and the stages' path end with the same weights."""
    recipe = make_recipe(tiny, text_folder, "rope.type=yarn")
    one, other = train(tmp_path / "one", recipe), train_into(tmp_path / "other", recipe)
    ours, theirs = weights(one), weights(other)
    assert all((ours[name] == theirs[name]).all() for name in theirs)
