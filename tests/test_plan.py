"""The plan: counts against transformers' own models, worked values, and what has to be monotone."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
import torch
from test_families import FAMILIES, SHAPE
from transformers import AutoConfig, AutoModelForCausalLM

from skipwise.cli import main
from skipwise.config.parse import parse_recipe
from skipwise.config.recipe import LoRASettings
from skipwise.models.hf_config import complete
from skipwise.models.load import enable_checkpointing
from skipwise.models.lora import add_lora
from skipwise.pipeline.profile import measure
from skipwise.planning import find_gpu, make_plan, predict_memory
from skipwise.planning.architecture import read_architecture
from skipwise.planning.flops import cache_bytes, step_flops
from skipwise.planning.job import make_job, read_model
from skipwise.planning.memory import GIB, LATE_IMPORTS

ESTIMATED = {"gpt_neox_japanese", "lfm2", "modernbert-decoder", "gemma4_text", "ministral3"}
ESTIMATED |= {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "bamba", "zamba2"}
ESTIMATED |= {"falcon_h1", "granitemoehybrid", "minimax", "lfm2_moe", "lfm3"}
MASK = ("positions.key_weights=importance", "load.attn_implementation=sdpa")
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
LLAMA_2 = {
    **MISTRAL,
    "model_type": "llama",
    "intermediate_size": 11008,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
LLAMA_3 = {**MISTRAL, "model_type": "llama", "vocab_size": 128256}
QWEN = {
    **MISTRAL,
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
MIXTRAL = {**MISTRAL, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
NEOX = {  # Pythia 6.9B
    "model_type": "gpt_neox",
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 50432,
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
}


@pytest.fixture
def folder(tmp_path):
    """A folder with the config of Mistral-7B and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    return tmp_path


def recipe_of(folder, *settings):
    """PoSE as published: neither weights nor a teacher, unless they are asked for."""
    published = ["positions.key_weights=none", "distillation.weight=0"]
    given = [*published, *settings]
    return parse_recipe({"model": str(folder), "target_length": 32768}, given)


def predicted(folder, *settings, num_gpus=1, gpu=None):
    """(job, memory) of settings."""
    recipe = recipe_of(folder, *settings)
    job = make_job(recipe, *read_model(recipe), num_gpus=num_gpus, gpu=gpu)
    return job, predict_memory(job)


@pytest.mark.extended
@pytest.mark.parametrize(
    "family", [name for name, (extra, _) in FAMILIES.items() if extra is not None]
)
@pytest.mark.parametrize("num_layers", [2, 5])
def test_parameters_are_those_of_transformers_own_model(family, num_layers):
    extra = FAMILIES[family][0]
    if not {"layer_types", "layers_block_type"} & extra.keys():
        extra = {**extra, "num_hidden_layers": num_layers}
    config = AutoConfig.for_model(family, **{**SHAPE, **extra})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = read_architecture(config.to_dict())
    assert counted.exact == (family not in ESTIMATED)
    if counted.exact:
        assert counted.num_parameters == sum(p.numel() for p in model.parameters())
        assert counted.embedding == model.get_input_embeddings().weight.numel()


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (MISTRAL, 7_241_732_096),
        (LLAMA_2, 6_738_415_616),
        (LLAMA_3, 8_030_261_248),
        (QWEN, 7_615_616_512),
        (MIXTRAL, 46_702_792_704),
        (NEOX, 6_857_302_016),
    ],
)
def test_published_models_have_their_published_counts(config, count):
    assert read_architecture(complete(config)).num_parameters == count


def test_of_experts_only_those_a_token_uses_are_active():
    mixtral, mistral = (read_architecture(complete(c)) for c in (MIXTRAL, MISTRAL))
    expert = 3 * 4096 * 14336
    assert mixtral.active_parameters - mistral.active_parameters == 32 * (expert + 8 * 4096)


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gemma2", "qwen2_moe"])
def test_lora_trains_as_many_numbers_as_peft_makes(family, embeddings):
    extra = {**SHAPE, **FAMILIES[family][0], "tie_word_embeddings": False}
    config = AutoConfig.for_model(family, **extra)
    settings = LoRASettings(rank=4, train_embeddings=embeddings)
    model = add_lora(AutoModelForCausalLM.from_config(config), settings)
    made = sum(p.numel() for p in model.parameters() if p.requires_grad)
    job = dataclasses.replace(job_of(complete(config.to_dict())), lora=settings)
    assert job.trainable_parameters == made


def job_of(config):
    from skipwise.planning.job import Job

    return Job(
        architecture=read_architecture(config),
        batch_size=1,
        length=64,
        accumulation=1,
        num_steps=1,
        global_batch_size=1,
        bf16=True,
        lora=None,
        checkpointing=True,
        chunked=False,
        attention="sdpa",
        importance=False,
        optimizer="adamw_torch_fused",
        engine="ddp",
        num_gpus=1,
    )


def saved_bytes(model, length, rows, bf16, additive):
    """Bytes that autograd keeps from a forward pass until the backward pass, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    ids = torch.randint(0, 1000, (rows, length))
    mask = torch.ones_like(ids)
    if additive:
        above = torch.ones(length, length).triu(1).bool()
        mask = torch.zeros(rows, 1, length, length).masked_fill(above, -3e38)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        positions = torch.arange(length).expand(rows, -1)
        model(ids, labels=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return sum(storages.values())


@pytest.mark.parametrize(
    ("family", "bf16", "lora", "checkpointing", "additive", "attention"),
    [
        ("llama", True, False, False, False, "sdpa"),
        ("llama", False, False, False, False, "sdpa"),
        ("llama", True, True, False, False, "sdpa"),
        ("llama", True, False, True, False, "sdpa"),
        ("llama", True, True, True, False, "sdpa"),
        ("llama", True, False, False, True, "sdpa"),
        ("llama", False, False, False, True, "sdpa"),
        ("llama", True, False, False, False, "eager"),
        ("llama", False, False, False, False, "eager"),
        *[
            (family, True, False, False, False, "sdpa")
            for family in ("mistral", "qwen2", "qwen3", "gemma", "phi", "phi3", "gpt_neox", "olmo2")
        ],
    ],
)
def test_what_a_pass_keeps_is_what_autograd_saves(
    family, bf16, lora, checkpointing, additive, attention
):
    from skipwise.planning import allocations
    from skipwise.planning.memory import _saved_activations

    rows, length = 2, 256
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 1000}
    extra = {"max_position_embeddings": 2048, "pad_token_id": 0, "head_dim": 32}
    config = AutoConfig.for_model(family, **shape, **heads, **extra)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = model.to(torch.bfloat16 if lora and bf16 else torch.float32)
    settings = LoRASettings() if lora else None
    model = add_lora(model, settings) if lora else model
    if checkpointing:
        enable_checkpointing(model)
        if lora:
            model.enable_input_require_grads()
    job = dataclasses.replace(
        job_of(config.to_dict()),
        batch_size=rows,
        length=length,
        bf16=bf16,
        lora=settings,
        checkpointing=checkpointing,
        importance=additive,
        attention=attention,
    )
    kept = (
        _saved_activations(job)
        + allocations.head_activations(job, job.tokens)
        + allocations.head_copy(job)
    )
    softmax = 4 * job.tokens * 1000  # of the loss
    predicted = sum(item.total for item in kept) + softmax
    assert predicted == pytest.approx(
        saved_bytes(model.train(), length, rows, bf16, additive), rel=0.07
    )


def test_the_cache_of_mistral_at_32k_is_4_gib():
    assert cache_bytes(read_architecture(complete(MISTRAL)), 32768) == 4 * GIB


def test_sliding_layers_cache_their_window():
    kinds = ["full_attention", "sliding_attention"] * 16
    config = complete({**MISTRAL, "sliding_window": 1024, "layer_types": kinds})
    assert cache_bytes(read_architecture(config), 32768) == 2 * GIB * (1 + 1 / 32)


def test_full_fine_tuning_holds_16_bytes_a_parameter_and_lora_2(folder):
    job, memory = predicted(folder, "training.global_batch_size=1", "train_length=1k")
    count = job.architecture.num_parameters
    assert memory.parts["weights"] == 4 * count and memory.parts["optimizer"] == 8 * count
    assert memory.phases["update"] > 16 * count
    lora, adapted = predicted(folder, "lora.train_embeddings=false", "lora.train_norms=false")
    assert adapted.parts["weights"] == 2 * count + 4 * lora.trainable_parameters
    assert adapted.parts["optimizer"] == 8 * lora.trainable_parameters


def test_the_parts_sum_to_the_peak(folder):
    for settings in ([], ["lora={}"], ["engine=zero3"], ["engine=fsdp2"], ["engine=zero3-offload"]):
        _, memory = predicted(folder, *settings, num_gpus=4)
        assert sum(memory.parts.values()) == pytest.approx(memory.total)
        assert memory.total == max(memory.phases.values())


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3", "zero3-offload"])
def test_more_gpus_never_need_more_memory_each(folder, engine):
    sizes = [predicted(folder, f"engine={engine}", num_gpus=n)[1].total for n in (2, 4, 8, 16, 64)]
    assert sizes == sorted(sizes, reverse=True)


def test_pose_needs_the_same_at_any_target_and_full_length_needs_more(folder):
    def sizes(method):
        recipes = [
            dataclasses.replace(recipe_of(folder, f"method={method}"), target_length=T)
            for T in (16384, 32768, 131072)
        ]
        return [predict_memory(make_job(r, *read_model(r))).total for r in recipes]

    assert len(set(sizes("pose"))) == 1
    full = sizes("full")
    assert full[0] < full[1] < full[2] and sizes("pose")[0] < full[0]


@pytest.mark.parametrize(
    ("more", "less"),
    [
        (["training.micro_batch_size=4"], []),
        (["training.gradient_checkpointing=false"], []),
        (["training.loss=full"], ["training.loss=chunked"]),
        (["train_length=8k"], ["train_length=4k"]),
        ([], ["lora={}"]),
        (["lora={}"], ["lora.train_embeddings=false"]),
        (["lora={}"], ["lora.quantization=nf4"]),
        ([], ["trainer.optim=adamw_8bit"]),
        ([], ["trainer.optim=adafactor"]),
        ([*MASK], []),
        (["training.gradient_checkpointing=true"], ["training.gradient_checkpointing=offload"]),
        (["load.attn_implementation=eager"], []),
        ([], ["engine=zero3-offload"]),
    ],
)
def test_a_setting_that_saves_memory_is_predicted_to(folder, more, less):
    assert predicted(folder, *more)[1].total > predicted(folder, *less)[1].total


def test_one_mask_is_held_whatever_the_number_of_passes(folder):
    few, many = (
        predicted(folder, *MASK, f"training.global_batch_size={n}", "lora={}") for n in (2, 32)
    )
    assert few[1].parts["mask"] == many[1].parts["mask"] == 2 * 8192**2


def test_offloading_moves_weights_and_optimizer_to_the_cpu(folder):
    job, memory = predicted(folder, "engine=zero3-offload", num_gpus=2)
    assert not {"weights", "gradients", "optimizer"} & set(memory.parts)
    assert memory.host == job.architecture.num_parameters * (2 + 4 + 4 + 8)


def test_operations_are_six_a_weight_and_token_and_checkpointing_adds_two():
    job = job_of(complete(LLAMA_2))
    job = dataclasses.replace(job, length=4096, global_batch_size=1, checkpointing=False)
    n = 6_738_415_616 - 32000 * 4096 - (2 * 32 + 1) * 4096  # no embedding, no norms
    attention = 32 * 2 * 2 * 4096 * 4096 / 2  # layers, q.k and scores.v, 2 each, width, half of L
    assert step_flops(job) == pytest.approx(4096 * (6 * n + 3 * attention), rel=1e-12)
    again = dataclasses.replace(job, checkpointing=True)
    extra = 4096 * (2 * (n - 32000 * 4096) + attention)
    assert step_flops(again) - step_flops(job) == pytest.approx(extra, rel=1e-9)


def test_full_length_at_equal_tokens_differs_by_its_attention_alone(folder):
    plan = make_plan(recipe_of(folder))
    own, examples, tokens = plan.costs
    assert tokens.tokens_per_step == own.tokens_per_step
    assert examples.tokens_per_step == 4 * own.tokens_per_step
    attention = own.tokens_per_step * 4 * 32 * 2 * 2 * 4096 * (32768 - 8192) / 2
    assert tokens.flops_per_step - own.flops_per_step == pytest.approx(attention, rel=1e-9)


def test_a_plan_of_a_config_alone_takes_a_blink_and_loads_no_torch(folder):
    code = f"""
import sys
from skipwise.cli import main
code = main(["plan", {str(folder)!r}, "--to", "32k"])
heavy = {{"torch", "transformers", "numpy.linalg.lapack", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert "7,241,732,096" in done.stdout and "8,192 to 32,768 tokens" in done.stdout
    assert all(len(line) < 130 for line in done.stdout.splitlines())
    assert seconds < 5  # 0.2 s alone: tests share the machine


def test_the_verb_names_what_is_wrong(folder, tmp_path, capsys):
    assert main(["plan", str(folder), "--to", "32k", "--gpu", "H9000"]) == 2
    assert "H100" in capsys.readouterr().err
    assert main(["plan", str(folder), "--to", "4k"]) == 2
    assert "is not longer than" in capsys.readouterr().err
    assert main(["plan", str(folder), "--to", "32k", "--gpus", "3"]) == 2
    assert "not a multiple" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({**MISTRAL, "num_hidden_layers": None}))
    assert main(["plan", str(broken), "--to", "32k"]) == 2
    assert "has no num_hidden_layers" in capsys.readouterr().err


def test_the_verb_prints_json_and_one_gpu_where_it_is_named(folder, capsys):
    command = ["plan", str(folder), "--to", "32k", "--gpu", "a100", "--gpus", "8", "--json"]
    assert main([*command, "engine=zero3"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"]["total"] == 7_241_732_096 and plan["num_gpus"] == 8
    (row,) = plan["gpus"]
    assert row["name"] == "A100-80GB" and row["fits"] and row["change"] == ""
    assert plan["evaluation"][-1] == {**plan["evaluation"][-1], "cache": 4 * GIB}


def test_gpus_are_found_by_loose_names():
    assert find_gpu("a100 80gb").memory_gib > 79 and find_gpu("rtx-4090").name == "RTX4090"


def test_families_that_are_not_known_are_called_an_estimate(tmp_path, capsys):
    config = AutoConfig.for_model("lfm2", **SHAPE)
    config.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--to", "1k"]) == 0
    assert "counted like a Llama" in capsys.readouterr().out


def test_the_plan_cuts_the_loss_as_training_does(folder):
    from skipwise.training.setup import cuts_loss

    for settings in (["train_length=64"], ["train_length=8k"], ["training.loss=full"]):
        recipe = recipe_of(folder, "distillation.weight=0", *settings)
        info, architecture = read_model(recipe)
        job = make_job(recipe, info, architecture)
        assert job.chunked == cuts_loss(recipe, job.length, info.vocab_size)
    assert job.loss_tokens == job.tokens and not job.chunked


@pytest.mark.extended
@pytest.mark.parametrize("settings", [[], ["lora={}", "training.gradient_checkpointing=true"]])
def test_the_predicted_peak_is_within_15_percent_of_three_real_steps(settings):
    from skipwise.pipeline.quickstart import MODEL

    tree = {
        "model": str(MODEL),
        "target_length": 2048,
        "training": {
            "micro_batch_size": 16,
            "global_batch_size": 16,
            "gradient_checkpointing": False,
        },
        "trainer": {"report_to": "none"},
    }
    recipe = parse_recipe(tree, settings)
    taken = measure(recipe)
    job = make_job(recipe, *read_model(recipe), gpu=find_gpu("cpu"))
    memory = predict_memory(job, runtime=taken.runtime_bytes + LATE_IMPORTS)
    assert 0.85 < memory.total / taken.peak_bytes < 1.15
    assert taken.peak_bytes > taken.runtime_bytes + 0.05 * GIB


def test_a_plan_of_no_steps_is_an_error(folder, capsys):
    assert main(["plan", str(folder), "--to", "32k", "training.num_steps=0"]) == 2
    assert "method=none trains nothing" in capsys.readouterr().err
