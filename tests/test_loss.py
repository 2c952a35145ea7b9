"""The loss in slices is the plain loss: value, gradients, and what stands in memory."""

import pytest
import torch
from test_families import FAMILIES, SHAPE
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from skipwise.config.batch import is_chunked
from skipwise.config.recipe import LoRASettings
from skipwise.errors import SkipwiseError
from skipwise.models.attention.masks import with_layer_masks
from skipwise.models.lora import add_lora
from skipwise.training import chunked_loss as loss_module
from skipwise.training.chunked_loss import chunk_loss

CONFIGS = {family: needs for family, (needs, _) in FAMILIES.items() if needs is not None}


def make_model(family, needs):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SHAPE, **needs}))


def make_batch(model, rows=2, length=24):
    torch.manual_seed(1)
    ids = torch.randint(3, 900, (rows, length))
    labels = ids.clone()
    labels[:, 10] = -100
    positions = torch.arange(length).expand(rows, -1).clone()
    positions[:, 12:] += 100
    batch = {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        "attention_mask": torch.ones_like(ids),
    }
    return with_layer_masks(model.config, batch)


def loss_and_gradients(model, batch, **arguments):
    model.zero_grad()
    torch.manual_seed(2)
    loss = model(**batch, use_cache=False, **arguments).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def slices_of_seven(monkeypatch):
    """Tokens of a slice that divide nothing, so the last one is short."""
    monkeypatch.setattr(loss_module, "SLICE", 14)


@pytest.mark.parametrize("family", CONFIGS)
def test_loss_and_gradients_in_slices_are_those_of_the_model(family):
    model = make_model(family, CONFIGS[family]).train()
    batch = make_batch(model)
    want, gradients = loss_and_gradients(model, batch)
    chunk_loss(model)
    have, chunked = loss_and_gradients(model, batch)
    assert torch.isfinite(have) and abs(have - want) < 1e-5
    assert chunked.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(chunked[name], gradient, atol=1e-5, rtol=1e-3), name


@pytest.fixture
def llama():
    return make_model("llama", {})


def test_the_number_of_items_divides_the_sum(llama):
    batch = make_batch(llama)
    want, _ = loss_and_gradients(llama, batch, num_items_in_batch=torch.tensor(100))
    chunk_loss(llama)
    have, _ = loss_and_gradients(llama, batch, num_items_in_batch=torch.tensor(100))
    assert abs(have - want) < 1e-6
    mean, _ = loss_and_gradients(llama, batch)
    assert abs(have - mean * (batch["labels"][:, 1:] != -100).sum() / 100) < 1e-6


def test_with_checkpointing_and_lora_the_loss_is_the_same(llama):
    batch = make_batch(llama)
    llama = add_lora(llama, LoRASettings(rank=4))
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    want, gradients = loss_and_gradients(llama, batch)
    chunk_loss(llama.base_model.model)
    llama.enable_input_require_grads()
    llama.gradient_checkpointing_enable({"use_reentrant": False})
    have, chunked = loss_and_gradients(llama, batch)
    assert abs(have - want) < 1e-6 and chunked.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(chunked[name], gradient, atol=1e-6, rtol=1e-4), name


def test_without_labels_the_model_gives_its_logits(llama):
    batch = make_batch(llama)
    del batch["labels"]
    want = llama(**batch).logits
    chunk_loss(llama)
    assert torch.equal(llama(**batch).logits, want)


def test_a_saved_model_knows_nothing_of_slices(llama, tmp_path):
    chunk_loss(llama)
    loss_and_gradients(llama, make_batch(llama))
    llama.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert "forward" not in vars(again)
    have, want = again.state_dict(), llama.state_dict()
    assert have.keys() == want.keys() and all(torch.equal(have[k], want[k]) for k in want)


def test_no_tensor_of_all_logits_is_kept_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(loss_module, "SLICE", 16)
    config = LlamaConfig(**{**SHAPE, "vocab_size": 4096, "num_hidden_layers": 1})
    model = LlamaForCausalLM(config).train()
    batch = make_batch(model, rows=1, length=128)

    def kept_numbers():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            model(**batch, use_cache=False).loss.backward()
        weights = {p.numel() for p in model.parameters()}
        return max(size for size in sizes if size not in weights)

    assert kept_numbers() >= 128 * 4096  # the plain loss keeps them
    chunk_loss(model)
    assert kept_numbers() <= 16 * 4096


def test_a_router_loss_is_not_left_out_silently():
    model = make_model("mixtral", {**CONFIGS["mixtral"], "output_router_logits": True})
    with pytest.raises(SkipwiseError, match=r"router.*\n.*training.loss=full"):
        chunk_loss(model)


def test_auto_cuts_where_logits_are_large():
    assert not is_chunked("auto", 16, 256, 1024)  # 16 MiB
    assert is_chunked("auto", 1, 8192, 32000)  # 1,000 MiB
    assert is_chunked("chunked", 1, 256, 1024) and not is_chunked("full", 1, 8192, 32000)
