"""RoPE scalings: parity with transformers 5, worked values, and the configs they become."""

import itertools
import math

import numpy as np
import pytest
from transformers import AutoConfig, LlamaConfig, PhiConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from skipwise.errors import SkipwiseError
from skipwise.pose.rope import NTK, SCALINGS, Dynamic, LongRoPE, Unscaled, YaRN, make_scaling
from skipwise.pose.rope_config import from_rope_parameters, with_legacy_rope_keys

NAMES = tuple(SCALINGS)
L = 4096
HALF_POWERS = 10.0 ** (-np.arange(8) / 2)  # theta = 1e4, d = 16: 1, 0.316, 0.1, 0.0316, 0.01, ...


def build(name, *, factor=8.0, theta=1e4, dim=64, **options):
    factor = 1.0 if name == "default" else factor
    return make_scaling(name, factor=factor, original_length=L, theta=theta, dim=dim, **options)


def config_of(scaling, *, theta=1e4, dim=64):
    target = round(L * scaling.factor)
    return scaling.to_config(theta=theta, dim=dim, original_length=L, target_length=target)


def close(have, want):
    np.testing.assert_allclose(have.double().numpy(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("partial", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("name", NAMES)
def test_frequencies_and_attention_factor_are_those_of_transformers(name, head_dim, partial):
    dim = int(head_dim * partial)
    for theta, factor in itertools.product((1e4, 5e5, 1e6), (2.0, 8.0, 16.5)):
        scaling = build(name, factor=factor, theta=theta, dim=dim)
        settings = config_of(scaling, theta=theta, dim=dim)
        settings["rope_parameters"]["partial_rotary_factor"] = partial
        Config, Rotary = LlamaConfig, LlamaRotaryEmbedding
        if partial < 1:  # Llama's own default type rotates whole heads
            Config, Rotary = PhiConfig, PhiRotaryEmbedding
        config = Config(hidden_size=2 * head_dim, num_attention_heads=2, **settings)
        rotary = Rotary(config)
        at_load = {"length": L} if name == "dynamic" else {}
        close(rotary.inv_freq, scaling.inv_freq(theta, dim, **at_load))
        assert rotary.attention_scaling == pytest.approx(scaling.attention_factor, rel=1e-12)
        if name not in ("default", "ntk"):
            function = ROPE_INIT_FUNCTIONS[settings["rope_parameters"]["rope_type"]]
            have, attention_factor = function(config, "cpu", seq_len=round(L * scaling.factor))
            close(have, scaling.inv_freq(theta, dim))
            assert attention_factor == pytest.approx(scaling.attention_factor, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("yarn", {"truncate": False}),
        ("yarn", {"beta_fast": 16, "beta_slow": 2}),
        ("yarn", {"attention_factor": 1.5}),
        ("yarn", {"mscale": 0.707, "mscale_all_dim": 0.5}),
        ("llama3", {"low_freq_factor": 2, "high_freq_factor": 8}),
        ("longrope", {"long_factor": [1.0] * 16 + [8.0] * 16, "attention_factor": 1.1}),
    ],
)
def test_every_option_reaches_transformers_through_the_config_and_comes_back(name, options):
    scaling, plain = build(name, **options), build(name)
    settings = config_of(scaling)
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, **settings)
    rotary = LlamaRotaryEmbedding(config)
    close(rotary.inv_freq, scaling.inv_freq(1e4, 64))
    assert rotary.attention_scaling == pytest.approx(scaling.attention_factor, rel=1e-12)
    changed = abs(scaling.inv_freq(1e4, 64) / plain.inv_freq(1e4, 64) - 1).max() > 0.01
    assert changed or abs(scaling.attention_factor - plain.attention_factor) > 0.01
    positions = settings["max_position_embeddings"]
    again = from_rope_parameters(config.rope_parameters, max_position_embeddings=positions)
    assert again == scaling


def test_yarn_by_hand():
    # turns over 2,048 positions: 326, 103, 32.6, 10.3, 3.26, 1.03, 0.33, 0.10
    # 32 turns lie at pair 2.016 and 1 turn at pair 5.026: the whole-pair ramp goes from 2 to 6
    yarn = YaRN(factor=8.0, original_length=2048)
    kept = np.array([1, 1, 1, 0.75, 0.5, 0.25, 0, 0])
    inv_freq = yarn.inv_freq(1e4, 16)
    np.testing.assert_allclose(inv_freq, HALF_POWERS * (kept + (1 - kept) / 8), rtol=1e-12)
    assert inv_freq[0] == 1.0, "the fastest pair is unchanged"
    assert inv_freq[-1] == HALF_POWERS[-1] / 8, "the slowest is f times slower"
    assert inv_freq[4] == pytest.approx(0.005625, rel=1e-12)
    assert yarn.attention_factor == pytest.approx(1.2079441541679836, rel=1e-15)
    # not rounded to whole pairs, pair 4 is (4 - 2.016) / (2 log10(32)) = 0.65907 of the way
    exact = YaRN(factor=8.0, original_length=2048, truncate=False).inv_freq(1e4, 16)
    assert exact[4] == pytest.approx(0.01 * (1 - 0.65907 * 7 / 8), rel=1e-4)


def test_llama3_by_hand():
    # pair 4 turns 3.2595 times over 2,048 positions: (3.2595 - 1) / (4 - 1) = 0.75316 of it is kept
    scaling = make_scaling("llama3", factor=8, original_length=2048)
    inv_freq = scaling.inv_freq(1e4, 16)
    np.testing.assert_array_equal(inv_freq[:4], 1e4 ** -(np.arange(4) / 8))
    np.testing.assert_allclose(inv_freq[6:], HALF_POWERS[6:] / 8, rtol=1e-12)
    assert inv_freq[4] == pytest.approx(0.01 * (0.75316 + 0.24684 / 8), rel=1e-5)


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("factor", [2.0, 8.0, 16.5])
def test_ntk_slows_the_slowest_pair_by_exactly_f_and_the_fastest_not_at_all(factor, dim):
    slowed = Unscaled().inv_freq(5e5, dim) / NTK(factor=factor).inv_freq(5e5, dim)
    assert slowed[0] == 1.0
    assert slowed[-1] == pytest.approx(factor, rel=1e-12)
    assert (np.diff(slowed) > 0).all()


def test_dynamic_is_plain_up_to_the_original_length_and_cannot_be_trained():
    dynamic = Dynamic(factor=8.0, original_length=L)
    for length in (1, L):
        np.testing.assert_array_equal(
            dynamic.inv_freq(1e4, 64, length), Unscaled().inv_freq(1e4, 64)
        )
    # at 2 L: 8 * 2 - 7 = 9 times slower, as NTK by 9
    np.testing.assert_allclose(
        dynamic.inv_freq(1e4, 64, 2 * L), NTK(factor=9.0).inv_freq(1e4, 64), rtol=1e-12
    )
    assert [name for name in NAMES if not build(name).trainable] == ["dynamic"]


def test_longrope_takes_yarns_slowing_and_is_trainable_only_with_one_list():
    scaling = build("longrope")
    np.testing.assert_allclose(
        scaling.inv_freq(1e4, 64), build("yarn").inv_freq(1e4, 64), rtol=1e-12
    )
    assert scaling.attention_factor == pytest.approx(math.sqrt(1 + math.log(8) / math.log(L)))
    assert scaling.short_factor == scaling.long_factor and scaling.trainable
    two = LongRoPE(factor=8.0, original_length=L, long_factor=(8.0, 8.0), short_factor=(1.0, 1.0))
    assert not two.trainable


ORIGINAL = "original_max_position_embeddings"
KEYS = {
    "default": (8 * L, set()),
    "linear": (L, {"factor"}),
    "ntk": (8 * L, set()),
    "yarn": (8 * L, {"factor", ORIGINAL}),
    "llama3": (8 * L, {"factor", ORIGINAL, "low_freq_factor", "high_freq_factor"}),
    "longrope": (8 * L, {"factor", ORIGINAL, "short_factor", "long_factor"}),
    "dynamic": (L, {"factor"}),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_config_has_what_every_runtime_reads_and_the_scaling_comes_back_from_it(name):
    scaling, (length, keys) = build(name), KEYS[name]
    settings = scaling.to_config(theta=1e4, dim=64, original_length=L, target_length=8 * L)
    parameters = settings["rope_parameters"]
    assert settings["max_position_embeddings"] == length
    assert set(parameters) == {"rope_type", "rope_theta", *keys}
    assert parameters["rope_type"] == ("default" if name == "ntk" else name)
    assert settings.get(ORIGINAL) == (L if name == "longrope" else None)
    again = from_rope_parameters(parameters, max_position_embeddings=length)
    assert again == (Unscaled() if name == "ntk" else scaling)
    have = again.inv_freq(parameters["rope_theta"], 64)
    np.testing.assert_array_equal(have, scaling.inv_freq(1e4, 64))


SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
CASES = [(f, n) for f in ("llama", "gpt_neox", "olmo2", "gemma3_text", "olmo3") for n in NAMES]
CASES.remove(("olmo3", "ntk"))  # transformers 4 has one theta for both layer types


@pytest.mark.parametrize(("family", "name"), [*CASES, ("phi3", "longrope"), ("phi3", "ntk")])
def test_the_older_spelling_alone_and_beside_the_newer_says_the_same(family, name):
    head = {} if family in ("gpt_neox", "phi3") else {"head_dim": 64}
    settings = config_of(build(name, theta=5e4), theta=5e4)
    parameters = settings.pop("rope_parameters")
    if family == "gpt_neox":
        parameters["partial_rotary_factor"] = 0.5
    if family in ("gemma3_text", "olmo3"):
        theta = 5e4 if family == "olmo3" else 2e4
        sliding = {"rope_type": "default", "rope_theta": theta}
        parameters = {"full_attention": parameters, "sliding_attention": sliding}
    config = AutoConfig.for_model(family, **SIZES, **head, **settings, rope_parameters=parameters)
    stored = config.to_dict()
    both = with_legacy_rope_keys(stored)
    assert with_legacy_rope_keys(both) == both and "rope_scaling" not in stored
    older = {key: value for key, value in both.items() if key != "rope_parameters"}
    assert older["rope_scaling"] is None or older["rope_scaling"]["type"] == name
    for spelled in (both, older):
        spelled.pop("model_type", None)
        have = AutoConfig.for_model(family, **spelled).rope_parameters
        want = config.rope_parameters
        if "full_attention" in want:
            if spelled is both or family != "olmo3":  # 5.23 drops olmo3's older theta here
                assert have["sliding_attention"] == want["sliding_attention"]
            have, want = have["full_attention"], want["full_attention"]
        for key in ("rope_theta", "partial_rotary_factor"):
            assert have.get(key) == want.get(key)
        length = stored["max_position_embeddings"]
        assert from_rope_parameters(have, max_position_embeddings=length) == from_rope_parameters(
            want, max_position_embeddings=length
        )


def test_what_transformers_4_has_no_words_for_is_left_out():
    full = {"rope_type": "default", "rope_theta": 1e6}
    nested = {"full_attention": full, "sliding_attention": {**full, "rope_theta": 1e4}}
    for config in ({"rope_parameters": nested, "model_type": "olmo3"}, {"model_type": "gpt2"}):
        assert with_legacy_rope_keys(config) == config


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: build("yarm"), "default, yarn, llama3, longrope, ntk, linear, dynamic"),
        (lambda: build("yarn", factor=0.5), "1 or more"),
        (lambda: build("yarn", factor=math.nan), "1 or more"),
        (lambda: make_scaling("default", factor=8, original_length=L), "scales nothing"),
        (lambda: build("yarn", beta=1), "choose from attention_factor, beta_fast"),
        (lambda: build("linear", beta_fast=1), "it has none"),
        (lambda: build("yarn", beta_fast="32"), "a number above 0"),
        (lambda: build("yarn", truncate=1), "true or false"),
        (lambda: build("yarn", beta_fast=1, beta_slow=32), "not above beta_slow"),
        (lambda: YaRN(factor=8.0, original_length=6), "none would be interpolated"),
        (lambda: build("llama3", high_freq_factor=1), "not above low_freq_factor"),
        (lambda: build("longrope", long_factor=[1, "8"]), "one number above 0"),
        (lambda: config_of(build("longrope", long_factor=[1, 8])), "2 numbers .* 32 pairs"),
        (lambda: make_scaling("longrope", factor=8, original_length=L), "needs the model's theta"),
        (lambda: config_of(build("yarn", factor=2.0001)), "for 8192 tokens"),
        (lambda: config_from({"rope_type": "proportional"}), "'proportional'.*it knows default"),
        (lambda: config_from({"rope_type": "linear"}), "no factor"),
        (lambda: config_from({"rope_type": "longrope", "factor": 2}), "no long_factor"),
        (lambda: config_from({"full_attention": {"rope_type": "default"}}), "per layer type"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(build, words):
    with pytest.raises(SkipwiseError, match=words):
        build()


def config_from(rope_parameters):
    return from_rope_parameters(rope_parameters, max_position_embeddings=L)
