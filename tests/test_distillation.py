"""Self-distillation: the teacher is the base, only first chunks are taught, and the loss is KL."""

import copy
import dataclasses
import json

import pytest
import torch
from test_families import FAMILIES, SHAPE
from test_train import equal
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from skipwise.config.parse import parse_recipe
from skipwise.config.recipe import LoRASettings, ModelSettings
from skipwise.data.collator import ExampleCollator, is_taught
from skipwise.models.attention.masks import with_layer_masks
from skipwise.models.hf_config import model_info_of
from skipwise.models.load import load_model
from skipwise.models.lora import add_lora, quantization_for
from skipwise.models.prepared import prepare_model
from skipwise.models.scaled_config import scaled_config
from skipwise.pipeline.quickstart import MODEL
from skipwise.pose.rope import make_scaling
from skipwise.training import chunked_loss as loss_module
from skipwise.training.chunked_loss import Distillation, chunk_loss
from skipwise.training.distillation import check_distillation, make_distillation
from skipwise.training.inputs import dummy_data
from skipwise.training.teacher import (
    base_config,
    load_teacher,
    move_teacher,
    teacher_sharing_weights,
)

CONFIGS = {family: needs for family, (needs, _) in FAMILIES.items() if needs is not None}
SCALES = ["llama", "gemma2", "cohere", "granite"]  # GQA; soft caps; logits times a number
FIRST = torch.tensor([5, 17])  # tokens of the first chunks of make_batch
L, W = 24, 3.0


@pytest.fixture
def slices_of_seven(monkeypatch):
    monkeypatch.setattr(loss_module, "SLICE", 14)


def recipe_of(tiny, *settings):
    return parse_recipe({"model": str(tiny), "target_length": 256}, list(settings))


def make_models(family, lora=False):
    """(the base, a model of scaled RoPE that has moved away from it, its teacher)."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **CONFIGS[family]})
    base = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "norm" not in name:
                parameter.mul_(4.0)  # attention that looks at positions
    facts = model_info_of(config)
    kinds = [kind for kind in ("yarn", "longrope", "ntk") if kind not in facts.refused_types]
    arguments = {"theta": facts.rope_theta, "dim": facts.rotary_dim}
    scaling = make_scaling(kinds[0], factor=4.0, original_length=facts.original_length, **arguments)
    scaled = scaled_config(config, facts, scaling, 4 * facts.original_length)
    model = AutoModelForCausalLM.from_config(scaled)
    model.load_state_dict(base.state_dict())
    teacher = teacher_sharing_weights(model, config) if lora else copy.deepcopy(base)
    whole = add_lora(model, LoRASettings(rank=4)) if lora else model
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return base, whole.train(), teacher


def save_model(folder, family, **needs):
    config = AutoConfig.for_model(family, **{**SHAPE, **CONFIGS[family], **needs})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)


def make_batch(config):
    torch.manual_seed(1)
    ids = torch.randint(3, 900, (2, L))
    labels = ids.clone()
    labels[0, 3] = labels[1, 20] = -100
    positions = torch.arange(L).repeat(2, 1)
    for row, first in enumerate(FIRST):
        positions[row, first:] += 50
    batch = {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        "attention_mask": torch.ones_like(ids),
    }
    return with_layer_masks(config, batch)


def dense_loss(base, model, batch, count, taught):
    """The equation as it is written, with all logits at once and each token by itself."""
    labels = batch["labels"]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    ours = model(**inputs, use_cache=False).logits.double().log_softmax(-1)
    with torch.no_grad():
        theirs = base(batch["input_ids"]).logits.double().log_softmax(-1)
    total = apart = torch.zeros((), dtype=torch.float64)
    for row in range(len(labels)):
        for i in range(L - 1):
            if labels[row, i + 1] != -100:
                total = total - ours[row, i, labels[row, i + 1]]
        for i in taught[row]:
            gap = theirs[row, i] - ours[row, i]
            apart = apart + (theirs[row, i].exp() * gap).sum()
    return (total + W * apart) / count, float(apart.detach())


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("slices_of_seven")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", SCALES)
def test_value_and_gradients_in_slices_are_those_of_the_equation(family, lora):
    base, model, teacher = make_models(family, lora)
    inner = model.base_model.model if lora else model
    batch = make_batch(inner.config)
    want, divergence = dense_loss(base, model, batch, 30, [range(5), range(17)])
    want.backward()
    expected = gradients(model)
    model.zero_grad()
    distillation = Distillation(teacher=teacher, weight=W)
    chunk_loss(inner, distillation)
    items = torch.tensor(30)
    have = model(**batch, first_lengths=FIRST, num_items_in_batch=items, use_cache=False).loss
    have.backward()
    assert abs(have.item() - want.item()) < 1e-5 * want.item()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert torch.allclose(found[name], gradient, atol=1e-4 * scale + 1e-7, rtol=1e-3), name
    apart, count = distillation.take_divergence()
    assert count == 22 and apart == pytest.approx(divergence, rel=1e-4)
    assert apart / count > 1e-3  # the models are apart, or nothing was tested
    assert distillation.take_divergence() == (0.0, 0.0)


@pytest.mark.usefixtures("slices_of_seven")
def test_with_checkpointing_and_lora_the_loss_is_the_same():
    _, model, teacher = make_models("llama", lora=True)
    inner = model.base_model.model
    chunk_loss(inner, Distillation(teacher=teacher, weight=W))
    batch = make_batch(inner.config)
    found = []
    for _ in range(2):
        model.zero_grad()
        loss = model(**batch, first_lengths=FIRST, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    (want, plain), (have, checkpointed) = found
    assert torch.equal(have, want) and plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.allclose(checkpointed[name], gradient, atol=1e-6), name


@pytest.mark.usefixtures("slices_of_seven")
@pytest.mark.parametrize("first", [[0, 17], [5, 0]])
def test_an_example_that_is_not_taught_is_not_read_by_the_teacher(first):
    base, model, teacher = make_models("llama")
    batch = make_batch(model.config)
    want, divergence = dense_loss(base, model, batch, 30, [range(n) for n in first])
    want.backward()
    expected = gradients(model)
    model.zero_grad()
    distillation, read = Distillation(teacher=teacher, weight=W), []
    teacher.model.register_forward_pre_hook(
        lambda *args: read.append(args[2]["input_ids"]), with_kwargs=True
    )
    chunk_loss(model, distillation)
    settings = {"num_items_in_batch": torch.tensor(30), "use_cache": False}
    have = model(**batch, first_lengths=torch.tensor(first), **settings).loss
    have.backward()
    assert abs(have.item() - want.item()) < 1e-5 * want.item()
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, expected[name], atol=1e-5, rtol=1e-3), name
    row, length = next((i, n) for i, n in enumerate(first) if n)
    assert [ids.tolist() for ids in read] == [batch["input_ids"][row : row + 1, :length].tolist()]
    apart, count = distillation.take_divergence()
    assert count == length and apart == pytest.approx(divergence, rel=1e-4) and apart > 1e-3


def test_a_batch_without_a_taught_example_has_the_plain_loss_and_no_teacher():
    _, model, teacher = make_models("llama")
    batch = make_batch(model.config)
    again = copy.deepcopy(model)
    chunk_loss(again)
    again(**batch, use_cache=False).loss.backward()
    teacher.forward = teacher.model.forward = None  # whoever calls them fails
    distillation = Distillation(teacher=teacher, weight=W)
    chunk_loss(model, distillation)
    model(**batch, first_lengths=torch.tensor([0, 0]), use_cache=False).loss.backward()
    assert equal(gradients(model), gradients(again))
    assert distillation.take_divergence() == (0.0, 0.0)


@pytest.mark.parametrize(
    ("every", "batch", "taught"),
    [
        (1, 3, range(48)),
        (4, 8, [0, 1, 8, 9, 16, 17, 24, 25, 32, 33, 40, 41]),
        (4, 16, [0, 1, 2, 3, 16, 17, 18, 19, 32, 33, 34, 35]),
        (4, 6, range(0, 48, 4)),
        (4, 1, range(0, 48, 4)),
        (3, 6, [k for k in range(48) if k % 6 < 2]),
    ],
)
def test_one_in_so_many_examples_is_taught_the_first_ones_of_each_step(every, batch, taught):
    found = [k for k in range(48) if is_taught(k, every, batch)]
    assert found == list(taught) and len(found) * every == 48


@pytest.mark.usefixtures("slices_of_seven")
def test_no_token_of_a_later_chunk_is_taught_or_teaches():
    _, model, teacher = make_models("llama")
    chunk_loss(model, Distillation(teacher=teacher, weight=W))
    batch = make_batch(model.config)
    batch["labels"] = torch.full_like(batch["labels"], -100)  # the divergence alone
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(batch["input_ids"])
    leaf = embeddings.requires_grad_(True)
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: leaf)
    model(**batch, first_lengths=FIRST, num_items_in_batch=1, use_cache=False).loss.backward()
    handle.remove()
    norms = leaf.grad.norm(dim=-1)
    for row, first in enumerate(FIRST):
        assert (norms[row, first:] == 0).all() and (norms[row, :first] > 0).all()


def test_without_lengths_the_loss_is_bit_by_bit_the_one_without_a_teacher():
    _, model, teacher = make_models("llama")
    batch = make_batch(model.config)
    again = copy.deepcopy(model)
    chunk_loss(again)
    chunk_loss(model, Distillation(teacher=teacher, weight=W))
    for one in (model, again):
        one(**batch, use_cache=False).loss.backward()
    assert equal(gradients(model), gradients(again))


@pytest.mark.parametrize("family", CONFIGS)
def test_the_teacher_under_lora_is_the_base_loaded_plainly(family):
    base, model, teacher = make_models(family, lora=True)
    ids = torch.randint(3, 900, (2, L))
    with torch.no_grad():
        want, have = base(ids).logits, teacher(ids).logits
        moved = model.eval()(ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.equal(have, want)
    assert float((moved - want).abs().max()) > 1e-2 * float(want.abs().max())
    shared = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in shared for p in teacher.parameters())  # no second copy


def test_a_lesson_that_fails_leaves_model_and_teacher_as_they_were():
    _, model, teacher = make_models("llama", lora=True)
    inner = model.base_model.model
    batch = make_batch(inner.config)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        before = model(**inputs).logits, teacher(batch["input_ids"]).logits
    children = [[*one.modules()] for one in (inner, teacher)]
    chunk_loss(inner, Distillation(teacher=teacher, weight=W))
    plain = teacher.get_output_embeddings().forward

    def broken(states):
        raise RuntimeError("broken")

    teacher.get_output_embeddings().forward = broken
    with pytest.raises(RuntimeError, match="broken"):
        model(**batch, first_lengths=FIRST, use_cache=False)
    teacher.get_output_embeddings().forward = plain
    assert [[*one.modules()] for one in (inner, teacher)] == children
    with torch.no_grad():
        after = model(**inputs).logits, teacher(batch["input_ids"]).logits
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.extended
def test_under_nf4_the_teacher_is_the_base_in_nf4(tiny):
    pytest.importorskip("bitsandbytes")
    settings = LoRASettings(rank=4, quantization="nf4")
    prepared = prepare_model(recipe_of(tiny))
    quantised = quantization_for(settings, torch.float32, "one process")
    arguments = {"dtype": torch.float32, "quantization": quantised}
    base = load_model(str(tiny), prepared.config, ModelSettings(), **arguments).eval()
    model = load_model(str(tiny), prepared.scaled, ModelSettings(), **arguments)
    teacher = teacher_sharing_weights(model, prepared.config)
    model = add_lora(model, settings)
    move_teacher(teacher, torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
        ids = torch.randint(3, 900, (2, L))
        assert torch.equal(teacher(ids).logits, base(ids).logits)


def test_a_scaling_that_was_never_trained_is_not_the_teachers(tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    theta = {"rope_theta": 10000.0}
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, **theta}
    shipped = AutoConfig.for_model(
        **{**config, "rope_parameters": yarn, "max_position_embeddings": 128}
    )
    untrained = base_config(shipped, model_info_of(shipped, 64)).rope_parameters
    assert untrained["rope_type"] == "default"
    trained = base_config(shipped, model_info_of(shipped)).rope_parameters
    assert trained["rope_type"] == "yarn" and trained["factor"] == 2.0


@pytest.mark.parametrize("lora", [[], ["lora.rank=4"]])
def test_the_preflight_fails_where_the_teacher_has_the_scaled_rope(tiny, lora):
    prepared = prepare_model(recipe_of(tiny, *lora, "distillation.weight=2"))
    model = load_model(prepared.source, prepared.scaled, prepared.load, dtype=torch.float32)
    arguments = model, torch.float32, "one process"
    made, data, _ = make_distillation(prepared, dummy_data(prepared), *arguments)
    batch = data.probe_batch()
    rest = prepared, batch["input_ids"], batch["first_lengths"], "one process"
    passed = check_distillation(made, *rest)
    assert passed.passed and "w = 2" in passed.detail
    assert ("under LoRA" if lora else "frozen copy") in passed.detail
    wrong = teacher_sharing_weights(model, prepared.scaled)
    failed = check_distillation(Distillation(teacher=wrong, weight=2.0), *rest)
    assert not failed.passed and "not have the base model's RoPE" in failed.detail


@pytest.mark.parametrize("lora", [[], ["lora.rank=4"]])
def test_the_teacher_has_the_window_that_the_model_has_lost(tmp_path, lora):
    save_model(tmp_path, "mistral", sliding_window=8)  # of all layers: training takes it away
    tree = {"model": str(tmp_path), "target_length": 512}
    prepared = prepare_model(parse_recipe(tree, [*lora, "distillation.weight=2"]))
    assert prepared.scaled.sliding_window is None
    model = load_model(prepared.source, prepared.scaled, prepared.load, dtype=torch.float32)
    arguments = prepared, dummy_data(prepared), model, torch.float32, "one process"
    made, _, _ = make_distillation(*arguments)
    ids = torch.randint(3, 900, (2, L))
    lengths = torch.tensor([L, L])
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        lesson = made.run_teacher(ids, lengths)
        assert torch.equal(made.logits(lesson)(lesson[0]), want)
        assert not torch.allclose(want[:, 12:], model(ids).logits[:, 12:], atol=1e-4)


def test_the_copy_is_frozen_and_in_the_dtype_of_the_arithmetic(tiny):
    prepared = prepare_model(recipe_of(tiny))
    model = load_model(prepared.source, prepared.scaled, prepared.load, dtype=torch.float32)
    teacher = load_teacher(prepared.source, prepared.config, prepared.load, torch.bfloat16, model)
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert teacher.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_collator_says_how_far_the_base_reads(tiny):
    recipe = parse_recipe({"model": str(tiny), "target_length": 256})
    items = dummy_data(prepare_model(recipe)).items(8)
    first = [int(item["example"].lengths[0]) for item in items]
    assert min(first) < 40 < max(first)
    batch = ExampleCollator(base_length=40)(items)
    assert batch["first_lengths"].tolist() == [min(one, 40) for one in first]
    assert "first_lengths" not in ExampleCollator()(items)
    some = ExampleCollator(base_length=40, every=4, global_batch_size=8)(items)
    assert some["first_lengths"].tolist() == [min(one, 40) for one in first[:2]] + [0] * 6


@pytest.mark.parametrize("size", [1, 2, 8, 16])
def test_the_passes_that_are_timed_are_those_of_a_step(tiny, size):
    keys = ["training.global_batch_size=16", "load.dtype=float32", "distillation.every=4"]
    recipe = parse_recipe({"model": str(tiny), "target_length": 256}, keys)
    data = dummy_data(prepare_model(recipe))
    assert [share for _, share in data.passes(size, recipe)] == [1.0], "nothing is taught"
    collator = ExampleCollator(base_length=64, every=4, global_batch_size=16)
    data = dataclasses.replace(data, collator=collator)
    data.dataset.num_examples = 16
    passes = [data.collator(data.items(16)[i : i + size]) for i in range(0, 16, size)]
    want = [int((batch["first_lengths"] > 0).sum()) for batch in passes]
    found = [(int((b["first_lengths"] > 0).sum()), share) for b, share in data.passes(size, recipe)]
    assert sum(n * share for n, share in found) == pytest.approx(sum(want) / len(want))
    assert sum(share for _, share in found) == 1 and {n for n, _ in found} == set(want)
