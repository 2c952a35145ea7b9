"""Decoder families on tiny random models: scaled, checked, trained a step, saved, loaded again."""

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipwise.export import make_portable
from skipwise.models.checks import check_batch, check_model
from skipwise.models.load import load_model
from skipwise.prepare import plan_model, stand_in_data
from skipwise.quickstart import MODEL
from skipwise.recipe import ModelSettings, parse_recipe

L, T = 64, 256
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": L,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
HYBRID = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "Llama": {},
    "Mistral": {**HEADS, "sliding_window": 32},
    "Mixtral": {**HEADS, "num_local_experts": 4},
    "Qwen2": {},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "Qwen3": HEADS,
    "Qwen3Moe": {**HEADS, **EXPERTS},
    "Gemma": HEADS,
    "Gemma2": {**HEADS, **HYBRID},
    "Gemma3Text": {**HEADS, **HYBRID},
    "Phi": {},
    "GPTNeoX": {},
    "Falcon": {},
    "Olmo": {},
    "Olmo2": {},
    "Olmo3": HYBRID,
    "Cohere": {},
    "Cohere2": HYBRID,
    "StableLm": {},
    "Glm4": HEADS,
    "SmolLM3": {},
    "Starcoder2": {"sliding_window": None},
    "Granite": {},
    "Nemotron": {},
}
OWN_MASK = {"Falcon"}  # its mask does not cut at skips: nothing to catch


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def probe_logits(model):
    """Logits of tokens at both ends of the window, so that distances up to T show."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 1000, 32))[None]
    positions = torch.cat([torch.arange(16), torch.arange(T - 16, T)])[None]
    with torch.no_grad():
        out = model.eval()(
            ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False
        )
    return out.logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn"])
def test_a_family_is_scaled_checked_trained_saved_and_loaded(family, scaling, tmp_path, tokenizer):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **FAMILIES[family]})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = {"model": str(tmp_path / "base"), "target_length": T, "rope": {"type": scaling}}
    plan = plan_model(parse_recipe(recipe))
    assert plan.facts.original_length == L
    assert plan.facts.hybrid == ("layer_types" in FAMILIES[family])

    model = load_model(recipe["model"], plan.scaled, ModelSettings(), dtype=torch.float32)
    data = stand_in_data(plan)
    checks = check_model(model, model.config, plan.facts, plan.scaling, T)
    checks += check_batch(model, data.telling_batch())
    assert all(check.passed for check in checks), checks
    without_mask = data.telling_batch()
    del without_mask["attention_mask"]
    assert check_batch(model, without_mask)[0].passed == (family in OWN_MASK)
    plain = load_model(recipe["model"], plan.config, ModelSettings(), dtype=torch.float32)
    assert not check_model(plain, plain.config, plan.facts, plan.scaling, T)[0].passed

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model.train()(**data.telling_batch(), use_cache=False).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "out")
    make_portable(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(probe_logits(again), probe_logits(model), atol=1e-5)
