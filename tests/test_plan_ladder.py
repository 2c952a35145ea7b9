"""What the plan proposes where a run does not fit: rung by rung, and no more than is needed."""

import json

import pytest
from test_plan import MISTRAL, recipe_of

from skipwise.planning import first_change, next_change, predict_memory
from skipwise.planning.gpus import common_gpus
from skipwise.planning.job import make_job, read_model
from skipwise.planning.memory import fits


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "processes", "change"),
    [
        (["training.micro_batch_size=2"], 1, "training.micro_batch_size=1"),
        (["training.gradient_checkpointing=false"], 1, "training.gradient_checkpointing=true"),
        (["training.loss=full"], 1, "training.loss=chunked"),
        ([], 4, "--engine fsdp2"),
        (["engine=fsdp2"], 4, "--lora"),
        ([], 1, "--lora"),
        (["lora={}"], 1, "lora.train_embeddings=false"),
        (["lora.train_embeddings=false"], 1, "lora.quantization=nf4"),
        (
            ["lora.train_embeddings=false", "lora.quantization=nf4"],
            1,
            "trainer.optim=adamw_8bit",
        ),
        (["lora.train_embeddings=false", "engine=zero3"], 4, "--engine zero3-offload"),
        (
            ["lora.train_embeddings=false", "engine=zero3-offload", "train_length=8k"],
            4,
            "train_length=4k",
        ),
        (["engine=fsdp2", "method=full"], 4, "training.gradient_checkpointing=offload"),
        (
            [
                "lora.train_embeddings=false",
                "engine=zero3-offload",
                "method=full",
                "training.gradient_checkpointing=offload",
            ],
            4,
            "method=pose",
        ),
        (["lora.train_embeddings=false", "engine=zero3-offload", "train_length=1k"], 4, None),
    ],
)
def test_the_next_change_is_the_next_rung_of_the_ladder(folder, settings, processes, change):
    assert next_change(recipe_of(folder, *settings), processes) == change


@pytest.mark.parametrize(
    "settings",
    [
        ["training.micro_batch_size=8", "training.gradient_checkpointing=false"],
        ["training.micro_batch_size=8", "lora={}"],
        ["training.loss=full", "training.micro_batch_size=4", "lora={}"],
        ["train_length=16k", "training.gradient_checkpointing=false", "lora={}"],
        ["training.micro_batch_size=4", "positions.key_weights=importance", "lora={}"],
        [],
    ],
)
@pytest.mark.parametrize("gpu", common_gpus(), ids=lambda gpu: gpu.name)
def test_the_first_change_makes_the_run_fit_and_nothing_less_does(folder, settings, gpu):
    recipe = recipe_of(folder, *settings, "original_length=8k")
    facts, architecture = read_model(recipe)
    change = first_change(recipe, facts, architecture, gpu)

    def enough(words):
        keys = [w for w in words if "=" in w]
        num_gpus, engine, rest = 1, None, iter(words)
        for word in rest:
            num_gpus = int(next(rest)) if word == "--gpus" else num_gpus
            engine = next(rest) if word == "--engine" else engine
        keys = (["lora={}"] if "--lora" in words else []) + keys
        keys += [f"engine={engine}"] if engine else []
        changed = recipe_of(folder, *settings, "original_length=8k", *keys)
        job = make_job(changed, facts, architecture, num_gpus=num_gpus, gpu=gpu)
        return fits(predict_memory(job), gpu)

    assert change is not None
    words = change.split()
    assert enough(words)
    if words:
        assert not enough([])
    singles = [w for w in words if "=" in w or w == "--lora"]
    if len(singles) == len(words) > 1 and "--lora" not in words:
        for word in words:
            assert not enough([w for w in words if w != word])
