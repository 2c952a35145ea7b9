"""Scalings on models, also on those that are scaled already, and the configs they become."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from skipwise.config.parse import parse_recipe
from skipwise.errors import SkipwiseError
from skipwise.models.hf_config import model_info_of
from skipwise.models.scaled_config import scaled_config, scaling_for
from skipwise.pose.rope import Llama3, LongRoPE, Unscaled, YaRN
from skipwise.preflight.model import rotary_modules

LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
}


def tiny_config(family="llama", length=131072, **values):
    return AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=length,
        pad_token_id=None,
        **values,
    )


def extend(config, target, *, original_length=None, **recipe):
    """(facts, scaling, scaled config) of a model that is to reach the target."""
    facts = model_info_of(config, original_length)
    recipe = parse_recipe({"model": "-", "target_length": target, **recipe})
    scaling = scaling_for(recipe, facts)
    return facts, scaling, scaled_config(config, facts, scaling, target)


def frequencies(config):
    """inv_freq and attention factor that transformers computes from a config."""
    model = AutoModelForCausalLM.from_config(config)
    ((module, prefix),) = rotary_modules(model)
    return getattr(module, f"{prefix}inv_freq").double().numpy(), module.attention_scaling


def turned(config, length):
    """(d/2,) turns of every pair from one end of a window to the other."""
    return frequencies(config)[0] * length / (2 * math.pi)


def test_llama_3_1_is_carried_on_and_its_slow_pairs_turn_as_far_as_before():
    config = tiny_config(rope_parameters=LLAMA_31)
    facts, scaling, scaled = extend(config, 524288)
    assert facts.original_length == 131072  # its window, not the 8,192 before its own scaling
    assert scaling == Llama3(factor=32.0, original_length=8192)
    assert scaled.rope_parameters == {**LLAMA_31, "factor": 32.0}
    assert scaled.max_position_embeddings == 524288
    before, after = turned(config, 131072), turned(scaled, 524288)
    slow = 8192 * 500000.0 ** (-np.arange(32) / 32) / (2 * math.pi) < 1.0
    assert slow.sum() > 5
    assert np.allclose(after[slow], before[slow], rtol=1e-5)
    assert (after > before * 0.999).all()  # none is slowed more than it has to be
    assert np.allclose(frequencies(scaled)[0], scaling.inv_freq(500000.0, 64), rtol=1e-5)


@pytest.mark.parametrize("stated", [32768, 131072])  # both are found in such configs
def test_a_yarn_model_is_carried_on_from_its_own_original_length(stated):
    config = tiny_config("qwen2", stated, rope_parameters=QWEN_YARN)
    facts, scaling, scaled = extend(config, 262144)
    assert facts.original_length == 131072
    assert scaling == YaRN(factor=8.0, original_length=32768)
    assert scaled.max_position_embeddings == 262144
    assert scaled.rope_parameters["original_max_position_embeddings"] == 32768
    inv_freq, factor = frequencies(scaled)
    assert np.allclose(inv_freq, YaRN(factor=8.0, original_length=32768).inv_freq(1e6, 64), 1e-5)
    assert factor == pytest.approx(0.1 * math.log(8) + 1)


def test_a_yarn_that_was_never_trained_is_replaced_when_the_true_length_is_given():
    config = tiny_config("qwen2", 131072, rope_parameters=QWEN_YARN)
    facts, scaling, _ = extend(config, 65536, original_length=32768)
    assert facts.original_length == 32768 and facts.scaling == Unscaled()
    assert scaling == YaRN(factor=2.0, original_length=32768)


def test_a_linear_model_says_which_length_its_config_means_before_it_is_carried_on():
    parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    config = tiny_config(length=4096, rope_parameters=parameters)
    with pytest.raises(SkipwiseError, match="original_length=4096, or original_length=16384"):
        model_info_of(config)
    _, scaling, scaled = extend(config, 32768, original_length=16384)
    assert scaling.factor == 8.0  # 4 for its own 16k, twice that for 32k
    assert scaled.max_position_embeddings == 4096  # vLLM multiplies it by the factor
    _, scaling, scaled = extend(config, 32768, original_length=4096)
    assert scaling.factor == 32.0  # its own 4 reaches 4k
    assert scaled.max_position_embeddings == 1024


def test_a_dynamic_model_was_trained_unscaled_and_its_scaling_is_replaced():
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    facts, scaling, _ = extend(tiny_config(length=4096, rope_parameters=parameters), 8192)
    assert facts.original_length == 4096
    assert scaling == YaRN(factor=2.0, original_length=4096)


def test_a_theta_that_was_raised_is_a_theta():
    parameters = {"rope_type": "default", "rope_theta": 5e6}
    facts, _, scaled = extend(
        tiny_config(length=16384, rope_parameters=parameters), 65536, rope={"type": "ntk"}
    )
    assert facts.scaling == Unscaled() and facts.rope_theta == 5e6
    assert scaled.rope_parameters["rope_theta"] == pytest.approx(5e6 * 4 ** (64 / 62))


def test_phi_3_long_is_refused_for_its_factors_were_searched_for_one_length():
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 32,
        "long_factor": [4.0] * 32,
        "original_max_position_embeddings": 4096,
    }
    config = tiny_config("phi3", 131072, rope_parameters=parameters)
    with pytest.raises(SkipwiseError, match="none are known for a longer one"):
        extend(config, 262144)
    # unless that scaling is only in the config
    _, scaling, _ = extend(config, 16384, original_length=4096)
    assert isinstance(scaling, LongRoPE) and scaling.factor == 4.0


def test_phi_3_gets_longrope_for_its_config_takes_nothing_else():
    config = tiny_config("phi3", 4096)
    _, scaling, scaled = extend(config, 16384)
    assert isinstance(scaling, LongRoPE) and scaling.trainable
    assert scaled.rope_parameters["rope_type"] == "longrope"
    with pytest.raises(
        SkipwiseError, match=r"config of phi3 does not take rope.type: yarn\n.*longrope or ntk"
    ):
        extend(config, 16384, rope={"type": "yarn"})


@pytest.mark.parametrize(
    ("parameters", "recipe", "word"),
    [
        (LLAMA_31, {"rope": {"type": "yarn"}}, "leave rope.type out: llama3 is extended"),
        (LLAMA_31, {"rope": {"factor": 4}}, "leave rope.factor and rope.options out"),
        ({**QWEN_YARN, "attention_factor": 1.5}, {}, "attention_factor of 1.5"),
    ],
)
def test_what_would_shrink_a_scaled_model_in_silence_is_refused(parameters, recipe, word):
    with pytest.raises(SkipwiseError, match=word):
        extend(tiny_config(rope_parameters=parameters), 524288, **recipe)


def test_a_target_within_the_scaled_window_is_refused():
    with pytest.raises(SkipwiseError, match="not longer than the model's 131,072"):
        extend(tiny_config(rope_parameters=LLAMA_31), 65536)


def test_a_head_dim_that_a_config_leaves_out_is_written_for_scaled_rotary_modules():
    config = tiny_config("mixtral", 8192, num_local_experts=2)
    config.head_dim = None
    _, scaling, scaled = extend(config, 32768)
    assert np.allclose(frequencies(scaled)[0], scaling.inv_freq(1e6, 64), rtol=1e-5)


def test_a_scaled_model_computes_what_its_scaling_says_at_float32_precision():
    config = tiny_config(length=64)
    _, scaling, scaled = extend(config, 256)
    model = AutoModelForCausalLM.from_config(scaled)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.model.rotary_emb.attention_scaling == pytest.approx(scaling.attention_factor)
