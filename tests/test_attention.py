"""Importance weights through flex_attention: what the mask of pairs computes, without the mask."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from skipwise.config.parse import parse_recipe
from skipwise.config.recipe import ModelSettings
from skipwise.config.run_folder import open_run
from skipwise.errors import SkipwiseError
from skipwise.models.attention import flex
from skipwise.models.attention.flex import flex_attention_forward, unsupported_by_model
from skipwise.models.attention.masks import (
    FLEX,
    is_packed,
    pack_key_weights,
    unpack_key_weights,
    with_chunk_weights,
    with_layer_masks,
)
from skipwise.models.load import attention_for, mask_reason
from skipwise.models.prepared import prepare_model
from skipwise.pipeline.stages import prepare_run, train_run
from skipwise.pose.samplers import Example, PoSE, additive_mask
from skipwise.preflight.batch import check_batch
from skipwise.training.callbacks import read_metrics
from skipwise.training.setup import enable_checkpointing, set_up

L, T = 48, 1024
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": L,
    "pad_token_id": 0,
}
HYBRID = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "head_dim": 16,
}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 16},
    "gemma3_text": HYBRID,
    "olmo3": HYBRID,
    "phi": {"num_key_value_heads": 4},
    "gpt_neox": {"attention_dropout": 0.0},
    "diffllama": {},  # its values are twice as wide as its keys
}


def examples_of(num_chunks, rows=3, length=L, seed=0):
    sampler = PoSE(train_length=length, target_length=20 * length, num_chunks=num_chunks)
    rng = np.random.default_rng([seed, num_chunks])
    return [sampler.sample(rng, 20 * length) for _ in range(rows)]


def batch_of(examples, vocab=64):
    """As the collator sends it, before any mask is made."""
    ids = np.random.default_rng(1).integers(0, vocab, (len(examples), examples[0].num_tokens))
    return {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(np.stack([e.position_ids() for e in examples])),
        "attention_mask": torch.ones(ids.shape, dtype=torch.long),
        "chunk_ids": torch.from_numpy(np.stack([e.chunk_ids() for e in examples])),
        "key_weights": torch.from_numpy(
            np.stack([np.repeat(e.log_weights(), e.lengths) for e in examples])
        ),
    }


@torch.autocast("cpu", enabled=False)  # which knows no flex_attention
def dense(query, key, value, *, score_mod, block_mask, scale, enable_gqa, kernel_options):
    """flex_attention by its definition, all pairs at once, for it has no backward on a CPU."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert query.dtype == key.dtype == value.dtype
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
    sizes = scores.shape
    at = [
        torch.arange(n).view([-1 if i == j else 1 for j in range(4)]) for i, n in enumerate(sizes)
    ]
    scores = score_mod(scores.float(), *at)
    scores = scores.masked_fill(~block_mask.mask_mod(*at), -torch.inf)
    return (scores.softmax(-1).to(value.dtype)) @ value


@pytest.fixture
def on_gpu(monkeypatch):
    """As on a machine that flex_attention trains on, slowly."""
    monkeypatch.setattr(flex, "unsupported_by_machine", lambda: "")
    monkeypatch.setattr(flex, "flex_attention", dense)


def model_of(family, implementation, **more):
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES.get(family, {}), **more})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    enable_checkpointing(model)
    return model.train()


def gradients(model, batch):
    """The loss and all gradients, one after the other."""
    batch = with_layer_masks(model.config, batch)
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(found)


def distance(found, wanted):
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def test_a_carrier_gives_back_what_went_in_after_an_engine_has_cast_what_it_can():
    batch = batch_of(examples_of(4))
    carried = pack_key_weights(batch)
    assert set(carried) == {"input_ids", "labels", "position_ids", "attention_mask"}
    cast = {k: v.bfloat16() if v.is_floating_point() else v for k, v in carried.items()}
    mask = cast["attention_mask"]
    assert mask.shape == (3, 1, 2, L) and is_packed(mask)
    chunk_ids, key_weights = unpack_key_weights(mask)
    assert torch.equal(chunk_ids, batch["chunk_ids"].int())
    assert torch.equal(key_weights, batch["key_weights"])  # to the bit
    assert torch.equal(unpack_key_weights(mask[1:2])[1], key_weights[1:2])
    assert pack_key_weights(carried) is carried
    for other in (None, carried["labels"], torch.zeros(3, 1, L, L), torch.ones(3, 1, 2, L) > 0):
        assert not is_packed(other)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("num_chunks", [1, 2, 4])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("length", [L, 300])  # of one block of pairs, and of three
@torch.no_grad()
def test_flex_attention_computes_what_sdpa_does_with_the_additive_mask(
    num_chunks, heads, key_heads, length
):
    examples = examples_of(num_chunks, length=length)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, h, length, 16, generator=generator) for h in (heads, key_heads, key_heads)
    )
    module = SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True)

    def run(mask):
        return flex_attention_forward(module, query, key, value, mask, scaling=0.3)[0]

    found = run(pack_key_weights(batch_of(examples))["attention_mask"])
    wanted = run(torch.from_numpy(additive_mask(examples, torch.finfo(torch.float32).min)))
    assert found.shape == (3, length, heads, 16)
    assert distance(found, wanted) < 1e-6
    plain = run(None)
    assert (distance(plain, wanted) > 0.02) == (num_chunks > 1)


def test_another_mask_goes_to_sdpa_as_it_came():
    query = torch.randn(2, 2, L, 16)
    near = torch.ones(L, L, dtype=torch.bool).tril().triu(-5).expand(2, 1, L, L)
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True)
    for mask in (None, near):
        found, _ = flex_attention_forward(module, query, query, query, mask, scaling=0.25)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            query, query, query, attn_mask=mask, is_causal=mask is None, scale=0.25
        )
        assert torch.equal(found, wanted.transpose(1, 2))


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"dropout": 0.1}, "attention dropout is 0.1"),
        ({"softcap": 50.0}, "has softcap"),
        ({"s_aux": torch.zeros(2)}, "has s_aux"),
    ],
)
def test_what_it_cannot_compute_is_an_error(given, word):
    query = torch.randn(1, 2, L, 16)
    mask = pack_key_weights(batch_of(examples_of(2, rows=1)))["attention_mask"]
    with pytest.raises(SkipwiseError, match=f"{word}\ntype load.attn_implementation=sdpa"):
        flex_attention_forward(SimpleNamespace(), query, query, query, mask, **given)
    if "dropout" not in given:  # which sdpa would leave out
        with pytest.raises(SkipwiseError, match=word):
            flex_attention_forward(SimpleNamespace(), query, query, query, None, **given)


@pytest.mark.parametrize("num_chunks", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_learns_with_it_what_it_learns_with_the_mask(on_gpu, family, num_chunks):
    batch = batch_of(examples_of(num_chunks))
    by_mask, by_carrier = model_of(family, "sdpa"), model_of(family, FLEX)
    assert not unsupported_by_model(by_carrier.config)
    loss, wanted = gradients(by_mask, with_chunk_weights(batch, torch.float32))
    found_loss, found = gradients(by_carrier, pack_key_weights(batch))
    assert abs(found_loss - loss) < 1e-5 and distance(found, wanted) < 1e-4
    ones = {k: v for k, v in batch.items() if k not in ("chunk_ids", "key_weights")}
    plain_loss, plain = gradients(by_mask, ones)
    assert distance(plain, wanted) > 0.01
    found_loss, found = gradients(by_carrier, ones)  # a plain batch: sdpa
    assert abs(found_loss - plain_loss) < 1e-6 and distance(found, plain) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_preflight_runs_through_it_and_sees_a_broken_carrier(on_gpu, family, monkeypatch):
    model = model_of(family, FLEX)
    batch = with_layer_masks(model.config, pack_key_weights(batch_of(examples_of(2))))
    checks = check_batch(model, batch)
    assert all(c.passed for c in checks), checks
    assert ("sliding layers" in {c.name for c in checks}) == (family == "gemma3_text")

    def uncausal(*arguments, block_mask, **more):
        everywhere = SimpleNamespace(mask_mod=lambda row, head, i, j: i + j >= 0)
        return dense(*arguments, block_mask=everywhere, **more)

    monkeypatch.setattr(flex, "flex_attention", uncausal)
    assert not {c.name: c.passed for c in check_batch(model, batch)}["no look ahead"]


def test_under_autocast_it_computes_in_its_dtype_as_sdpa_does(on_gpu):
    query = torch.randn(1, 2, L, 16, requires_grad=True)
    mask = pack_key_weights(batch_of(examples_of(2, rows=1)))["attention_mask"]
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = flex_attention_forward(SimpleNamespace(), query, query, query, mask)
    mixed, _ = flex_attention_forward(
        SimpleNamespace(), query, query, query.bfloat16(), mask
    )  # rotated in float32
    plain, _ = flex_attention_forward(SimpleNamespace(), query, query, query, mask)
    assert (cast.dtype, plain.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(mixed, cast) and 0 < distance(cast, plain) < 1e-2


CONFIGS = [  # (family, settings, why it takes a mask)
    ("gemma2", HYBRID, "caps its attention logits"),
    ("gemma2", {**HYBRID, "attn_logit_softcapping": None}, "does not run gemma2 on sdpa"),
    ("gpt_oss", HYBRID, "does not run gpt_oss on sdpa"),
    ("stablelm", {}, "does not run stablelm on flex_attention"),
    ("gptj", {}, "does not run gptj on sdpa"),
    ("seed_oss", {"head_dim": 16}, "attention_dropout is 0.1"),
    ("llama", {"head_dim": 96}, "head_dim is 96"),
    ("llama", {"num_attention_heads": 8}, "head_dim is 8"),
    ("deepseek_v3", {}, "differ in width"),
    ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "layers of type conv"),
]


@pytest.mark.parametrize(("family", "settings", "word"), CONFIGS, ids=[c[2] for c in CONFIGS])
def test_what_a_model_lacks_sends_it_a_mask_and_is_said(on_gpu, family, settings, word):
    config = AutoConfig.for_model(family, **{**SHAPE, **settings})
    assert word in mask_reason(ModelSettings(), config)
    assert attention_for(ModelSettings(), "importance", config=config) is None
    asked = ModelSettings(attn_implementation="flex_attention")
    with pytest.raises(SkipwiseError, match=rf"flex_attention: .*{word}.*\nleave it out"):
        attention_for(asked, "importance", config=config)


def test_it_is_chosen_where_it_can_be_and_never_against_the_recipe(on_gpu, monkeypatch):
    config = AutoConfig.for_model("llama", **SHAPE)
    for asked, weights, wanted in (
        ("auto", "importance", FLEX),
        ("flex_attention", "importance", FLEX),
        ("sdpa", "importance", "sdpa"),
        ("eager", "importance", "eager"),
        ("auto", "none", None),
    ):
        settings = ModelSettings(attn_implementation=asked)
        assert attention_for(settings, weights, config=config) == wanted
    with pytest.raises(SkipwiseError, match=r"is only for positions\.key_weights: importance"):
        attention_for(ModelSettings(attn_implementation="flex_attention"), "none", config=config)
    config.auto_map = {"AutoModelForCausalLM": "modeling.Own"}
    assert "code of its own" in mask_reason(ModelSettings(trust_remote_code=True), config)
    assert not mask_reason(ModelSettings(), config)
    monkeypatch.setattr(flex, "unsupported_by_machine", lambda: "no GPU here")
    assert attention_for(ModelSettings(), "importance", config=config) is None
    assert mask_reason(ModelSettings(), config) == "no GPU here"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_preflight_says_why_there_is_a_mask(tiny, text_folder, tmp_path):
    training, _ = set_up_run(tiny, text_folder, tmp_path / "run")
    (line,) = [str(c) for c in training.checks if c.name == "importance weights"]
    assert line.endswith("additive mask in sdpa, because flex_attention trains only on NVIDIA GPUs")
    with pytest.raises(SkipwiseError, match=r"only on NVIDIA GPUs\nleave it out"):
        set_up_run(tiny, text_folder, tmp_path / "other", "load.attn_implementation=flex_attention")
    assert not (tmp_path / "other").exists()


def set_up_run(tiny, text_folder, folder, *overrides):
    tree = {
        "model": str(tiny),
        "target_length": 256,
        "load": {"dtype": "float32"},
        "positions": {"content": "aligned", "key_weights": "importance"},
        "data": {"sources": [str(text_folder)]},
        "training": {
            "num_steps": 3,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-3,
            "loss": "chunked",
        },
        "trainer": {"report_to": "none"},
    }
    recipe = parse_recipe(tree, list(overrides))
    prepared = prepare_model(recipe)
    run = open_run(folder, recipe, "test")
    inputs = prepare_run(prepared, run)
    return set_up(prepared, inputs.data, run), (prepared, inputs, run)


@pytest.mark.parametrize("lora", [[], ["lora.rank=2"]], ids=["full", "lora"])
def test_a_run_trains_the_weights_it_trains_with_the_mask(
    on_gpu, tiny, text_folder, tmp_path, lora
):
    losses, seen = {}, []
    for asked in ("auto", "sdpa"):
        folder = tmp_path / asked
        training, job = set_up_run(
            tiny, text_folder, folder, f"load.attn_implementation={asked}", *lora
        )
        seen.append({c.name: c.detail for c in training.checks}["importance weights"])
        batch = next(iter(training.trainer.get_train_dataloader()))
        mask = training.trainer._prepare_inputs(batch)["attention_mask"]
        assert is_packed(mask) == (asked == "auto")
        assert mask.shape == (2, 1, 2 if asked == "auto" else 64, 64)
        train_run(*job)
        losses[asked] = [m["loss"] for m in read_metrics(job[2])]
        (saved,) = job[2].checkpoints.glob("checkpoint-3/config.json")
        assert "attn_implementation" not in saved.read_text() and FLEX not in saved.read_text()
        assert job[0].scaled._attn_implementation != FLEX  # what is evaluated next is loaded by it
    assert losses["auto"] == pytest.approx(losses["sdpa"], abs=1e-5)
    assert seen[0] == "applied by flex_attention"
    assert seen[1] == "applied by an additive mask in sdpa, because load.attn_implementation is set"


def test_an_example_of_one_chunk_beside_others_is_plain():
    zero = np.zeros(1, np.int64)
    plain = Example(lengths=np.array([L]), position_starts=zero, text_starts=zero)
    examples = [plain, *examples_of(2, rows=1)]
    _, weights = unpack_key_weights(pack_key_weights(batch_of(examples))["attention_mask"])
    assert not weights[0].any() and weights[1].any()
