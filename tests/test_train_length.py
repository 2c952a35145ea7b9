"""The training length M: what follows from it, what it costs, and what `auto` takes."""

import dataclasses
import inspect
import json
import math

import numpy as np
import pytest
import torch
from test_plan import MISTRAL
from test_train import make_recipe, run_training
from transformers import PreTrainedModel

from skipwise.cli import main
from skipwise.config.distillation import WEIGHT, distillation_weight
from skipwise.config.parse import parse_recipe
from skipwise.config.run_folder import RunFolder
from skipwise.config.samplers import example_length, make_sampler
from skipwise.config.stages import full_length_stage
from skipwise.data.collator import ExampleCollator
from skipwise.errors import SkipwiseError
from skipwise.models.load import enable_checkpointing
from skipwise.models.prepared import END_PROMPT, prepare_model
from skipwise.pipeline import choose_train_length as chosen
from skipwise.planning import find_gpu, make_plan, train_lengths
from skipwise.planning.flops import step_flops
from skipwise.planning.job import make_job, read_model
from skipwise.planning.memory import GIB, predict_memory
from skipwise.planning.train_lengths import (
    choose_length,
    expected_distance,
    length_options,
    with_train_length,
)
from skipwise.pose.coverage import coverage
from skipwise.training.callbacks import read_metrics
from skipwise.training.inputs import load_training_data

L, T = 8192, 65536
BASE = {"model": "m", "target_length": T}
H200 = find_gpu("H200")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    return tmp_path


def recipe_of(folder, *settings):
    return parse_recipe({"model": str(folder), "target_length": T}, list(settings))


def options_of(folder, *settings, gpu=H200, num_gpus=1):
    recipe = recipe_of(folder, "train_length=auto", *settings)
    return length_options(recipe, *read_model(recipe), gpu, num_gpus)


@pytest.fixture
def measured(monkeypatch):
    """Stand-in distances: f = 8 and 32, at M / L = 1 and 2."""
    rows = {(8.0, 1.0): 0.02, (8.0, 2.0): 0.01, (32.0, 1.0): 0.08, (32.0, 2.0): -0.03}
    known = {key: (value, "measured, 1 seed") for key, value in rows.items()}
    monkeypatch.setattr(train_lengths, "_distances", lambda: known)


@pytest.mark.parametrize("M", [4096, 16384, T // 4])
def test_skips_reach_T_and_chunks_sum_to_M(M):
    sampler = make_sampler(parse_recipe(BASE, [f"train_length={M}"]), L)
    rng = np.random.default_rng(0)
    last = []
    for _ in range(400):
        example = sampler.sample(rng, T)
        first, second = example.lengths
        skip = int(example.position_starts[1]) - int(first)
        assert first + second == M and 0 <= skip <= T - M
        weight = math.log((first + skip) / first)  # l_0 keys for the positions up to the second
        assert example.log_weights() == pytest.approx([weight, 0.0])
        last.append(example.position_ids()[-1])
    assert max(last) > 0.98 * T and min(last) < M + 0.02 * T
    shown = coverage(sampler, distances=np.array([M - 1, M // 2]))
    assert shown[1] > shown[0] > 0


def test_the_base_teaches_what_it_can_read():
    sampler = make_sampler(parse_recipe(BASE, [f"train_length={2 * L}"]), L)
    rng = np.random.default_rng(1)
    examples = [sampler.sample(rng, T) for _ in range(8)]
    items = [
        {
            "input_ids": e.position_ids(),
            "labels": e.position_ids(),
            "position_ids": e.position_ids(),
        }
        | {"example": e, "number": k}
        for k, e in enumerate(examples)
    ]
    taught = ExampleCollator(base_length=L)(items)["first_lengths"].tolist()
    firsts = [int(e.lengths[0]) for e in examples]
    assert taught == [n if n < L else L for n in firsts] and max(firsts) > L > min(firsts)


@pytest.mark.parametrize(
    ("length", "weight"), [(None, WEIGHT), (L // 2, WEIGHT), (2 * L - 1, WEIGHT), (2 * L, 0.0)]
)
def test_auto_distils_below_2L(length, weight):
    recipe = parse_recipe(BASE, [f"train_length={length}"] if length else [])
    found, why = distillation_weight(recipe, original_length=L)
    assert found == weight
    assert why == (
        "" if weight else "examples of 16,384 tokens, 2 x 8,192 or more, gain nothing from it"
    )
    typed = parse_recipe(BASE, ["distillation.weight=1.5", f"train_length={length or L}"])
    assert distillation_weight(typed, original_length=L) == (1.5, "")


def test_a_stage_at_full_length_after_long_examples_is_not_distilled_and_has_their_tokens():
    keys = ["full_length.fraction=0.1", "training.num_steps=100", "training.global_batch_size=16"]
    for M, weight, batch in ((L, WEIGHT, 2), (2 * L, 0.0, 4)):  # 16 M / T examples a step
        stage = full_length_stage(parse_recipe(BASE, [*keys, f"train_length={M}"]), L)
        assert distillation_weight(stage, original_length=L)[0] == weight
        assert stage.training.global_batch_size == batch and stage.training.num_steps == 10


def test_an_auto_that_nothing_chose_for_is_the_original_length():
    recipe = parse_recipe(BASE, ["train_length=auto"])
    assert recipe.train_length == "auto" and example_length(recipe, L) == L
    assert make_sampler(recipe, L).train_length == L


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train_length=auto", "method=cream"], "auto chooses among lengths of method: pose"),
        (["train_length=8k", "method=full"], "does not take effect: method: full"),
        (["train_length=128k"], "target_length 65536 is below train_length 131072"),
        (["train_length=64k"], "no skips"),
    ],
)
def test_a_length_that_has_no_effect_is_an_error(settings, words):
    with pytest.raises(SkipwiseError, match=words):
        make_sampler(parse_recipe(BASE, settings), L)


def test_a_word_that_is_no_length_is_named():
    with pytest.raises(SkipwiseError, match="train_length is 'long': give auto or a length such"):
        parse_recipe(BASE, ["train_length=long"])


@pytest.mark.parametrize(
    ("length", "gpus", "size", "batch"),
    [(2 * L, 1, "auto", 32), (4 * L, 1, "auto", 16), (4 * L, 3, "auto", 15), (4 * L, 2, 8, 16)],
)
def test_a_step_keeps_its_tokens(length, gpus, size, batch):
    keys = ["training.global_batch_size=64", f"training.micro_batch_size={size}"]
    made = with_train_length(parse_recipe(BASE, keys), length, L, gpus)
    assert made.training.global_batch_size == batch  # 64 L / M, in multiples of the GPUs
    assert made.training.micro_batch_size == ("auto" if size == "auto" else 2)  # 8 L / M
    assert made.train_length == length and made.method == "pose"


def test_T_itself_is_full_length_training():
    recipe = parse_recipe(BASE, ["positions.num_chunks=3", "distillation.weight=2"])
    made = with_train_length(recipe, T, L)
    assert made.method == "full" and make_sampler(made, L).train_length == T
    assert distillation_weight(made, original_length=L)[0] == 0
    assert made.training.global_batch_size == 8 and made.positions.key_weights == "none"
    small = parse_recipe(BASE, ["training.global_batch_size=4"])
    with pytest.raises(
        SkipwiseError, match="4 examples of 8,192 tokens are fewer than 1 of 65,536"
    ):
        with_train_length(small, T, L)


def test_operations_of_a_token_grow_with_M_by_its_keys_alone(folder):
    recipe = recipe_of(folder, "distillation.weight=0")
    info, architecture = read_model(recipe)
    found = {}
    for M in (L, 4 * L):
        job = make_job(with_train_length(recipe, M, L), info, architecture)
        found[M] = step_flops(job) / job.tokens_per_step
    # 3 L more keys; 4 operations a key and width, forward, again, and twice backward; 32 layers
    assert found[4 * L] - found[L] == pytest.approx(4 * 4 * 4096 * 3 * L * 32, rel=1e-6)


def test_weights_by_flex_attention_hold_no_mask_and_a_mask_grows_with_the_square(folder):
    def mask(M, *settings, gpu=H200):
        recipe = recipe_of(folder, f"train_length={M}", "distillation.weight=0", *settings)
        job = make_job(recipe, *read_model(recipe), gpu=gpu)
        return predict_memory(job).parts.get("mask", 0.0)

    assert mask(4 * L) == 0.0
    sdpa = "load.attn_implementation=sdpa"
    assert mask(4 * L, sdpa) == 2 * (4 * L) ** 2 and mask(L, sdpa) == 2 * L**2
    assert mask(L, gpu=find_gpu("MI300X")) == 2 * L**2 and mask(L, gpu=find_gpu("V100")) == 4 * L**2


def test_offloading_frees_what_checkpointing_saves_and_fills_the_cpu(folder):
    recipe = recipe_of(folder, "method=full", "distillation.weight=0")
    offloaded = recipe_of(folder, "method=full", "training.gradient_checkpointing=offload")
    info, architecture = read_model(recipe)
    kept = predict_memory(make_job(recipe, info, architecture))
    moved = predict_memory(make_job(offloaded, info, architecture))
    layer = T * 4096 * 4  # the float32 stream of full fine-tuning
    assert moved.host == 32 * layer and kept.host == 0
    saved = kept.phases["backward"] - moved.phases["backward"]
    assert saved == pytest.approx(1.03 * 30 * layer)  # two stay, and what rounding loses


def test_options_are_L_its_doublings_and_T_at_equal_tokens(folder, measured):
    options = options_of(folder, "engine=zero3", "lora={}")
    assert [o.length for o in options] == [8192, 16384, 32768, 65536]
    assert [o.behind for o in options] == [0.02, 0.01, None, 0.0]
    assert options[0].cost == 1.0
    costs = [o.cost for o in options[1:]]
    assert costs == sorted(costs) and costs[-1] < 2
    for option in options:
        tokens = option.hours * 3600 * H200.tflops * 1e12 * 0.4
        each = step_flops(option.job) / option.job.tokens_per_step
        assert tokens / each == pytest.approx(1000 * 64 * L)


def test_auto_takes_the_closest_that_is_allowed(folder, measured):
    def taken(*settings, gpu=H200, obstacle=lambda length: ""):
        option, why = choose_length(options_of(folder, "lora={}", *settings, gpu=gpu), obstacle)
        return option.length, why

    assert taken("training.max_cost=9")[0] == T
    length, why = taken("training.max_cost=1.25")
    assert length == 2 * L and why.startswith("16,384 tokens, 1.0 % behind full length (measured")
    assert "32,768 costs 1." in why
    assert taken("training.max_cost=1")[0] == L
    small = dataclasses.replace(H200, memory_gib=45.0)
    options = options_of(folder, "lora={}", "training.max_cost=9", gpu=small)
    assert options[-1].obstacle == f"needs {options[-1].memory.gib:,.1f} GiB of 45.0"
    assert choose_length(options)[0].length == 2 * L
    texts = {2 * L: "would drop 80 % of the text"}
    length, why = taken("training.max_cost=1.25", obstacle=lambda n: texts.get(n, ""))
    assert length == L and "16,384 would drop 80 % of the text" in why
    length, _ = taken("training.max_cost=9", "full_length.fraction=0.1")
    assert length == 2 * L  # skips before full length were asked for
    length, why = taken("training.max_cost=9", "training.global_batch_size=1")
    assert length == L and "fewer than 1 of 16,384" in why


@pytest.mark.parametrize(
    ("M", "L", "T", "behind", "evidence"),
    [
        (256, 256, 2048, 0.02, "measured, 1 seed"),
        (256, 256, 4096, 0.05, "between f = 8 and 32"),  # half way in log f
        (512, 256, 4096, -0.01, "between f = 8 and 32"),
        (512, 256, 1024, None, ""),  # below what was measured
        (1024, 256, 2048, None, ""),
        (2048, 256, 2048, 0.0, ""),
    ],
)
def test_a_distance_is_measured_or_between_two_that_are(measured, M, L, T, behind, evidence):
    found, why = expected_distance(M, L, T)
    assert found == (None if behind is None else pytest.approx(behind)) and why == evidence


def test_the_plan_shows_the_options_and_follows_auto(folder, capsys):
    assert (
        main(["plan", str(folder), "--to", "64k", "--gpu", "H200", "--train-length", "auto"]) == 0
    )
    shown = capsys.readouterr().out
    [line] = [line for line in shown.splitlines() if line.startswith("* ")]
    recipe = recipe_of(folder, "train_length=auto")
    plan = make_plan(recipe, gpu=H200)
    assert plan.choice is not None and plan.job.length == plan.choice[0]
    assert f"train_length=auto takes {plan.choice[1]}" in shown.replace("\n", "; ")
    assert [o.length for o in plan.options] == [8192, 16384, 32768, 65536]
    assert line.split()[-1]
    assert main(["plan", str(folder), "--to", "64k", "--gpu", "H200", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["train_lengths"]
    assert [row["train_length"] for row in rows] == [8192, 16384, 32768, 65536]
    assert [row["auto"] for row in rows].count(True) == 1
    assert rows[0]["memory"] == pytest.approx(plan.options[0].memory.gib * GIB)
    assert main(["plan", str(folder), "--to", "64k", "--gpu", "H200", "method=full"]) == 0
    assert "train_length" not in capsys.readouterr().out


@pytest.mark.parametrize(("how", "gpu"), [(True, True), ("offload", True), ("offload", False)])
def test_offloading_is_asked_of_transformers_where_there_is_a_gpu(how, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    asked = []

    class Now(torch.nn.Module):
        def activation_checkpointing_enable(self, kwargs=None, every_n_layers=1, offload=False):
            asked.append((kwargs, offload))

    class Old(torch.nn.Module):
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
            asked.append("old")

    enable_checkpointing(Now(), how)
    assert asked == [({"use_reentrant": False}, how == "offload" and gpu)]
    if how == "offload":
        with pytest.raises(SkipwiseError, match=r"offload needs transformers 5\.16"):
            enable_checkpointing(Old(), "offload")
    parameters = inspect.signature(PreTrainedModel.activation_checkpointing_enable).parameters
    assert "offload" in parameters  # of the transformers that is installed


def test_a_run_trains_on_examples_of_M_tokens(tiny, text_folder, tmp_path):
    keys = ["train_length=128", "training.num_steps=2", "training.gradient_checkpointing=offload"]
    run = run_training(make_recipe(tiny, text_folder, *keys), tmp_path / "run")
    about = run.metadata()
    assert about["train_length"] == 128
    assert about["training"]["tokens_per_step"] == 128 * about["training"]["batch_size"]
    assert max(e["lengths"][0] for e in about["positions"]["examples"]) > 64
    assert not any("distillation" in row for row in read_metrics(run))  # 128 is 2 L


def test_endprompt_trains_with_its_own_prompt(tiny, text_folder, tmp_path):
    recipe = make_recipe(tiny, text_folder, "method=endprompt", "positions={}")
    prepared = prepare_model(recipe)
    ids = prepared.tokenizer(END_PROMPT, add_special_tokens=False)["input_ids"]
    assert list(prepared.sampler().prompt) == ids
    data = load_training_data(prepared, None)
    item = data.dataset[0]
    assert item["input_ids"][-len(ids) :].tolist() == item["labels"][-len(ids) :].tolist() == ids
    assert item["position_ids"][-1] == recipe.target_length - 1


@pytest.mark.parametrize(("length", "share"), [(100, 1.0), (101, 0.8), (301, 0.0), (300, 0.6)])
def test_the_share_of_the_text_that_longer_examples_keep(length, share):
    lengths = np.array([100, 100, 200, 300, 300])  # 200 + 200 + 600 of 1,000 tokens
    assert chosen.kept_share(lengths, length) == pytest.approx(share)


def test_packed_text_loses_nothing_at_a_longer_length(tiny, text_folder):
    recipe = make_recipe(tiny, text_folder, "train_length=auto", "data.short_documents=pack")
    run = RunFolder(text_folder.parent / "packed")
    run.path.mkdir()
    entry = chosen._choose(prepare_model(recipe), run, 1)
    assert set(entry["text"].values()) == {1.0}


def test_auto_is_chosen_once_and_a_run_keeps_it(tiny, text_folder, tmp_path, monkeypatch, capsys):
    recipe = make_recipe(tiny, text_folder, "train_length=auto", "training.global_batch_size=4")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.write_recipe(recipe)
    prepared = prepare_model(recipe)
    base = prepared.info.original_length
    known = {(recipe.target_length / base, 2.0): (-0.01, "measured, 1 seed")}
    known[recipe.target_length / base, 1.0] = (0.02, "measured, 1 seed")
    monkeypatch.setattr(train_lengths, "_distances", lambda: known)
    monkeypatch.setattr(chosen, "_KEPT", 0.0)
    model = chosen.choose_train_length(prepared, run)
    assert model.recipe.train_length == 2 * base
    assert model.recipe.training.global_batch_size == 2
    assert (
        f"train_length: {2 * base:,} tokens, 1.0 % ahead of full length" in capsys.readouterr().err
    )
    monkeypatch.setattr(chosen, "length_options", None)  # not asked again
    again = chosen.choose_train_length(prepare_model(run.recipe()), run)
    assert again.recipe == model.recipe and run.recipe().train_length == "auto"
    assert chosen.length_check(run)[0].detail == run.metadata()["train_length_choice"]["detail"]
