"""Any causal model: where caches lose a state or count padding, a slower way gives the answers."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from skipwise.evaluation import prefill
from skipwise.evaluation.prefill import reading
from skipwise.evaluation.scoring import Trial, exact_match, greedy
from skipwise.evaluation.tasks.perplexity import perplexity
from skipwise.pipeline.quickstart import MODEL

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
GPT = {"n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
HYBRID = {
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "head_dim": 16,
}
PERIODS = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}
FAMILIES = {  # family: (config, pieces, padding, steps)
    "llama": ({}, True, True, True),
    "gemma2": (HYBRID, True, False, True),
    "gpt2": (GPT, True, False, True),
    "bloom": ({"n_head": 4, "n_layer": 2}, True, False, True),
    "mpt": ({"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}, True, False, True),
    "gpt_neo": (
        {
            "attention_types": [[["global", "local"], 1]],
            "num_layers": 2,
            "num_heads": 4,
            "window_size": 32,
        },
        True,
        False,
        True,
    ),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, True, False, True),
    "qwen3_next": (
        {"head_dim": 16, **EXPERTS, "moe_intermediate_size": 32, **LINEAR},
        True,
        False,
        True,
    ),
    "jamba": (
        {**EXPERTS, **PERIODS, "use_mamba_kernels": False, "mamba_d_state": 8},
        False,
        False,
        True,
    ),
    "mamba": ({"state_size": 8}, False, False, False),
    "rwkv": ({"attention_hidden_size": 64, "context_length": 512}, False, False, False),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    config, *ways = FAMILIES[request.param]
    torch.manual_seed(0)
    made = AutoConfig.for_model(request.param, **{**SHAPE, **config})
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model.eval(), ways


def plain(model, tokens, count):
    """Greedy decoding by a whole pass for each token."""
    tokens = list(tokens)
    said = []
    with torch.no_grad():
        for _ in range(count):
            ids = torch.tensor([tokens])
            logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            said.append(int(logits[0, -1].argmax()))
            tokens.append(said[-1])
            if said[-1] == model.config.eos_token_id:
                break
    return said


@pytest.mark.extended
@pytest.mark.parametrize("prefix", [0, 90])
def test_answers_are_those_of_plain_passes_whatever_the_model_can(family, prefix):
    model, ways = family
    assert [reading(model).pieces, reading(model).padding, reading(model).steps] == ways
    rng = np.random.default_rng(0)
    start = rng.integers(3, 1000, prefix).tolist()
    asked = [
        Trial(
            input_ids=start + rng.integers(3, 1000, n).tolist(),
            answers=("none",),
            max_new_tokens=count,
        )
        for n, count in ((30, 6), (41, 5), (30, 6), (58, 1))
    ]
    want = [plain(model, trial.input_ids, trial.max_new_tokens) for trial in asked]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    exact = [
        Trial(input_ids=t.input_ids + (w if i % 2 else [*w[:-1], 7]), num_answer=len(w))
        for i, (t, w) in enumerate(zip(asked, want, strict=True))
    ]
    for batch_tokens in (100, 10**6):
        assert greedy(model, tokenizer, asked, batch_tokens) == want
        assert exact_match(model, exact, batch_tokens) == [False, True, False, True]


def test_perplexity_in_pieces_is_that_of_whole_passes(family, monkeypatch):
    model, _ = family
    text = np.random.default_rng(1).integers(3, 1000, 200)
    (whole,) = perplexity(model, [text], [128], num_windows=3)
    monkeypatch.setattr(prefill, "PREFILL", 40)
    (pieces,) = perplexity(model, [text], [128], num_windows=3)
    assert pieces["value"] == pytest.approx(whole["value"], rel=1e-4)
