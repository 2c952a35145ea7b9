"""Training runs with distillation: stopped, in several processes, in recipe and preflight."""

import dataclasses
import signal

import pytest
import torch
from test_distillation import recipe_of, save_model
from test_engines import EACH, skipwise
from test_train import STEPS, equal, make_recipe, run_training, stop_at, weights
from transformers import AutoModelForCausalLM

from skipwise.config.distillation import WEIGHT, distillation_weight, in_one_process
from skipwise.config.parse import dump_recipe, parse_recipe
from skipwise.config.run_folder import RunFolder
from skipwise.config.stages import full_length_stage
from skipwise.data.collator import ExampleCollator
from skipwise.data.dataset import PoSEDataset
from skipwise.errors import RunStopped, SkipwiseError
from skipwise.models.prepared import prepare_model
from skipwise.pipeline.checks import check
from skipwise.pose.samplers import FullLength
from skipwise.training import callbacks as callbacks_module
from skipwise.training.callbacks import read_metrics
from skipwise.training.inputs import dummy_data

SETTINGS = ["distillation.weight=3", "distillation.every=1", "load.dtype=float32"]


@pytest.fixture(scope="module")
def straight(tiny, text_folder, tmp_path_factory):
    """{mode: run with distillation that nothing disturbed}"""
    return {
        mode: run_training(
            make_recipe(tiny, text_folder, *SETTINGS, *more),
            tmp_path_factory.mktemp("distilled") / mode,
        )
        for mode, more in (("full", []), ("lora", ["lora.rank=4"]))
    }


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_divergence_of_every_step_is_written_down(straight, mode):
    found = [m["distillation"] for m in read_metrics(straight[mode])]
    assert len(found) == STEPS and 0 <= found[0] < 1e-4 and found[-1] > found[0]


def test_with_one_in_four_taught_a_step_without_one_has_no_divergence(tiny, text_folder, tmp_path):
    keys = ["training.global_batch_size=2", "training.micro_batch_size=1"]
    recipe = make_recipe(tiny, text_folder, *SETTINGS, "distillation.every=4", *keys)
    lines = read_metrics(run_training(recipe, tmp_path / "run"))
    assert [("distillation" in line) for line in lines] == [i % 2 == 0 for i in range(STEPS)]


@pytest.mark.parametrize(("mode", "more"), [("full", []), ("lora", ["lora.rank=4"])])
def test_a_run_that_was_stopped_ends_with_the_same_weights(
    straight, tiny, text_folder, tmp_path, monkeypatch, mode, more
):
    recipe = make_recipe(tiny, text_folder, *SETTINGS, *more)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks_module.RunCallback, "on_step_end", stop_at(5, signal.SIGINT))
        with pytest.raises(RunStopped):
            run_training(recipe, tmp_path / "run")
    resumed = run_training(recipe, tmp_path / "run")
    assert equal(weights(resumed), weights(straight[mode]))
    metrics = [[m["distillation"] for m in read_metrics(r)] for r in (resumed, straight[mode])]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_accumulation_gives_the_weights_of_one_large_batch(
    straight, tiny, text_folder, tmp_path, batch_size
):
    recipe = make_recipe(tiny, text_folder, *SETTINGS, f"training.micro_batch_size={batch_size}")
    other = run_training(recipe, tmp_path / "run")
    found, want = weights(other), weights(straight["full"])
    for name, tensor in want.items():
        assert torch.allclose(found[name], tensor, atol=2e-4), name
    for mine, theirs in zip(read_metrics(other), read_metrics(straight["full"]), strict=True):
        assert mine["distillation"] == pytest.approx(theirs["distillation"], rel=2e-2, abs=1e-6)


@pytest.mark.extended
@pytest.mark.parametrize("engine", EACH)
@pytest.mark.parametrize(("mode", "more"), [("full", []), ("lora", ["lora.rank=4"])])
def test_two_processes_train_what_one_does(
    straight, tiny, text_folder, tmp_path, mode, more, engine
):
    recipe = make_recipe(tiny, text_folder, *SETTINGS, *more)
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    out = tmp_path / "run"
    skipwise("train", tmp_path / "r.yaml", "--out", out, "--gpus", 2, "--engine", engine)
    run = RunFolder(out)
    want = weights(straight[mode])
    for name, tensor in weights(run).items():
        assert torch.allclose(tensor, want[name], atol=1e-5), name
    for key, near in (("loss", 1e-5), ("distillation", 1e-6)):
        pairs = zip(read_metrics(run), read_metrics(straight[mode]), strict=True)
        assert max(abs(a[key] - b[key]) for a, b in pairs) < near
    lines = {line["name"]: line for line in run.metadata()["checks"]}
    detail = lines["distillation"]["detail"]
    assert lines["distillation"]["passed"] and "w = 3" in detail
    assert engine == "ddp" or "18 of its 21 tensors sharded" in detail  # not: embedding, norm, head


@pytest.mark.extended
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_teach_one_in_four_as_one_does(tiny, text_folder, tmp_path, engine):
    """One of them has nothing to teach, and the sharded teacher runs in both."""
    keys = ["distillation.every=4", "training.micro_batch_size=1"]
    recipe = make_recipe(tiny, text_folder, *SETTINGS, *keys)
    want = run_training(recipe, tmp_path / "one")
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    out = tmp_path / "run"
    skipwise("train", tmp_path / "r.yaml", "--out", out, "--gpus", 2, "--engine", engine)
    found, other = weights(RunFolder(out)), weights(want)
    assert max(float((found[name] - other[name]).abs().max()) for name in other) < 1e-5
    for a, b in zip(read_metrics(RunFolder(out)), read_metrics(want), strict=True):
        assert a["distillation"] == pytest.approx(b["distillation"], abs=1e-6)
    assert read_metrics(want)[-1]["distillation"] > 1e-4


@pytest.mark.extended
def test_buffers_of_the_weights_are_the_teachers_in_every_process(text_folder, tmp_path):
    save_model(tmp_path / "model", "glm4_moe")  # which chooses experts with a buffer's help
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    buffers = [b for name, b in model.named_buffers() if "correction_bias" in name]
    assert buffers
    for buffer in buffers:
        buffer.copy_(torch.randn_like(buffer))
    model.save_pretrained(tmp_path / "model")
    recipe = make_recipe(tmp_path / "model", text_folder, *SETTINGS, "training.num_steps=1")
    recipe = dataclasses.replace(recipe, target_length=512)
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    found = {}
    for engine, count in (("ddp", 1), ("fsdp2", 2)):
        out = tmp_path / engine
        skipwise("train", tmp_path / "r.yaml", "--out", out, "--gpus", count, "--engine", engine)
        found[engine] = read_metrics(RunFolder(out))[0]
    assert found["fsdp2"]["distillation"] == pytest.approx(found["ddp"]["distillation"], rel=1e-3)
    assert found["fsdp2"]["loss"] == pytest.approx(found["ddp"]["loss"], abs=1e-5)


def test_without_it_nothing_is_taught(tiny, text_folder, tmp_path):
    off = ["training.num_steps=1", "distillation.weight=0"]
    run = run_training(make_recipe(tiny, text_folder, *off), tmp_path / "run")
    assert "distillation" not in read_metrics(run)[-1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["engine=fsdp2", "lora.quantization=nf4"], "fsdp2 would need a teacher that is not quant"),
        (["trainer.use_liger_kernel=true"], "use_liger_kernel replaces the loss"),
        (["training.loss=full"], "training.loss is full"),
        (["method=full"], "method: full has no first chunk"),
        (["method=randpos"], "method: randpos has no first chunk"),
        (["method=none"], "method: none has no first chunk"),
    ],
)
def test_where_it_cannot_be_done_a_number_is_refused_and_auto_says_why(tiny, settings, words):
    with pytest.raises(
        SkipwiseError, match=rf"distillation.weight: 2: .*{words}.*\n.*distillation.weight=0"
    ):
        prepare_model(recipe_of(tiny, "distillation.weight=2", *settings))
    weight, why = distillation_weight(recipe_of(tiny, "distillation.weight=auto", *settings))
    assert weight == 0 and words in why


def test_auto_is_three_for_pose_and_nothing_for_a_baseline(tiny):
    cream = recipe_of(tiny, "distillation.weight=auto", "method=cream")
    assert distillation_weight(cream)[0] == 0 and "baseline" in distillation_weight(cream)[1]
    assert distillation_weight(recipe_of(tiny, "distillation.weight=2", "method=cream"))[0] == 2
    recipe = recipe_of(tiny, "distillation.weight=auto")
    assert distillation_weight(recipe, engine="ddp") == (WEIGHT, "") and WEIGHT == 3
    assert distillation_weight(recipe, engine="fsdp of the launcher")[0] == WEIGHT
    assert distillation_weight(recipe, lacks="omits the router loss")[0] == 0
    assert distillation_weight(recipe, router_loss=True)[0] == 0
    assert distillation_weight(recipe_of(tiny, "distillation.weight=0")) == (0.0, "")


def test_a_router_loss_leaves_it_out_with_the_reason_in_the_preflight(tmp_path):
    save_model(tmp_path, "mixtral", output_router_logits=True)
    tree = {"model": str(tmp_path), "target_length": 512, "distillation": {"weight": "auto"}}
    lines = {one.name: one for one in check(parse_recipe(tree))}
    assert lines["distillation"].passed and "none: its loss" in lines["distillation"].detail
    with pytest.raises(SkipwiseError, match="router"):
        prepare_model(parse_recipe(tree, ["distillation.weight=1"]))


@pytest.mark.parametrize("value", ["-1", "often", "nan", "inf"])
def test_a_weight_is_a_number_from_zero_up(tiny, value):
    with pytest.raises(SkipwiseError, match=r"distillation\.weight is"):
        recipe_of(tiny, f"distillation.weight={value}")
    assert recipe_of(tiny, "distillation.weight=0").distillation.weight == 0


def test_a_recipe_of_a_sharding_engine_is_checked_in_one_process_without_a_whole_teacher(tiny):
    recipe = in_one_process(recipe_of(tiny, "distillation.weight=auto", "engine=fsdp2"))
    assert recipe.engine == "auto" and recipe.distillation.weight == 0
    kept = in_one_process(recipe_of(tiny, "distillation.weight=auto", "engine=ddp"))
    assert kept.distillation.weight == "auto"


@pytest.mark.parametrize(("method", "weight"), [("pose", 3), ("cream", 0), ("randpos", 0)])
def test_the_finish_of_a_baseline_is_taught_nothing_unasked(tiny, method, weight):
    auto = ("distillation.weight=auto", "full_length.fraction=0.5")
    recipe = recipe_of(tiny, f"method={method}", *auto)
    assert distillation_weight(recipe)[0] == weight
    assert distillation_weight(full_length_stage(recipe, 64))[0] == weight


def test_the_finish_is_taught_as_far_as_the_base_reads(tiny):
    recipe = recipe_of(tiny, "distillation.weight=2", "full_length.fraction=0.5")
    part = full_length_stage(recipe, 64)
    assert part.method == "full" and distillation_weight(part) == (2.0, "")
    data = dummy_data(prepare_model(recipe))
    long = PoSEDataset(data.corpus, FullLength(target_length=256), seed=0, num_examples=1)
    batch = ExampleCollator(base_length=64)([long[0]])
    assert batch["input_ids"].shape == (1, 256) and batch["first_lengths"].tolist() == [64]
