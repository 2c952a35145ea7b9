"""Released config.json files: the keys that decide, those that nothing reads, and the questions."""

import importlib
import inspect
import json
import math

import numpy as np
import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from skipwise.cli import main
from skipwise.config.parse import parse_recipe
from skipwise.errors import SkipwiseError
from skipwise.models.convert import conversion_for
from skipwise.models.hf_config import complete, defaults, model_info_of
from skipwise.models.model_info import read_model_info
from skipwise.models.scaled_config import config_changes, scaled_config, scaling_for
from skipwise.pose.rope import YaRN, make_scaling

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 1024, "num_hidden_layers": 2}
LLAMA = {**SHAPE, "model_type": "llama", "max_position_embeddings": 4096}
ZAMBA2 = {"model_type": "zamba2", "layers_block_type": ["mamba", "hybrid"]}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(config, original_length=None):
    """The facts of a config.json, which must be the same with and without transformers."""
    alone = read_model_info(complete(config), original_length)
    given = {key: value for key, value in config.items() if key != "model_type"}
    made = CONFIG_MAPPING[config["model_type"]](**json.loads(json.dumps(given)))
    assert model_info_of(made, original_length) == alone
    return alone


def refusal(config, original_length=None):
    with pytest.raises(SkipwiseError) as alone:
        read_model_info(complete(config), original_length)
    given = {key: value for key, value in config.items() if key != "model_type"}
    made = CONFIG_MAPPING[config["model_type"]](**json.loads(json.dumps(given)))
    with pytest.raises(SkipwiseError) as loaded:
        model_info_of(made, original_length)
    assert str(alone.value) == str(loaded.value)
    return str(alone.value)


def module_frequencies(config):
    """What the family's own rotary module computes; None if there is no such module."""
    name = type(config).__module__.replace("configuration_", "modeling_")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return None
    for name, found in vars(module).items():
        if inspect.isclass(found) and name.endswith("RotaryEmbedding") and "Vision" not in name:
            buffers = dict(found(config).named_buffers())
            return buffers.get("full_attention_inv_freq", buffers.get("inv_freq"))
    return None


# Keys that some class reads, and that others ignore, each with a value that is no default.
GIVEN = {
    "head_dim": 48,
    "qk_rope_head_dim": 48,
    "kv_channels": 48,
    "attention_head_dim": 48,
    "rotary_dim": 32,
    "rope_theta": 77777.0,
    "global_rope_theta": 80000.0,
    "rotary_emb_base": 77777,
    "rotary_pct": 0.5,
    "partial_rotary_factor": 0.25,
    "full_attn_idxs": [1],
    "attn_layer_indices": [1],
    "max_seq_len": 5000,
    "max_position_embeddings": 5000,
}
# Refused as they are, or after one of the keys.
REFUSED = ("beam", "deepseek_v4", "dots3_note_text", "gemma4_text", "gemma4_unified_text")
REFUSED += ("granitemoehybrid", "lfm3", "llama4_text", "recurrent_gemma", "zamba2")
REFUSED += ("zaya", "bamba", "afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe", "flint")
REFUSED += ("kolibri1",)
OWN_SCALING_FIRST = ("apertus", "cwm", "ministral3")  # ignore a rope_theta without rope_parameters


@pytest.mark.parametrize("family", sorted(defaults()))
def test_every_key_means_to_skipwise_what_it_means_to_the_config_class(family):
    config_class = CONFIG_MAPPING[family]
    shape = {key: value for key, value in defaults()[family].items() if key in SHAPE}
    shape.setdefault("num_hidden_layers", config_class().num_hidden_layers)
    compared = 0
    for key, value in GIVEN.items():
        if key == "rope_theta" and family in OWN_SCALING_FIRST:
            continue
        try:
            made = config_class(**{key: value})
            by_transformers = model_info_of(made, 5000)
        except Exception:  # the class takes no such value, or the family is refused
            continue
        alone = read_model_info(complete({**shape, key: value, "model_type": family}), 5000)
        if family == "ministral3":  # keeps the length in rope_parameters, which no runtime reads
            for info in (alone, by_transformers):
                info.rope_parameters.pop("max_position_embeddings", None)
        assert alone == by_transformers, key
        inv_freq = module_frequencies(made)
        if inv_freq is not None and alone.rotary_dim % 2 == 0:
            expected = alone.scaling.inv_freq(alone.rope_theta, alone.rotary_dim)
            assert inv_freq.count_nonzero() == len(expected), key
            if alone.rope_type != "longrope":
                assert np.allclose(
                    inv_freq[: len(expected)].double().numpy(), expected, rtol=1e-5, atol=0
                ), key
        compared += 1
    assert compared >= 5 or family in REFUSED


RELEASED = {  # config: (rotary dimension, theta)
    "minimax_m2": ({"head_dim": 128, "rotary_dim": 64, "rope_theta": 5000000}, 64, 5e6),
    "deepseek_v2": ({"qk_rope_head_dim": 32}, 32, 1e4),
    "deepseek_v3": ({"qk_rope_head_dim": 32}, 32, 1e4),
    "minicpm3": ({"qk_rope_head_dim": 16}, 16, 1e4),
    "glm4_moe_lite": ({"qk_rope_head_dim": 64}, 64, 1e4),
    "modernbert-decoder": ({"global_rope_theta": 80000.0}, 16, 80000.0),
    "zamba2": ({"use_mem_rope": True, "layers_block_type": ["mamba", "hybrid"]}, 32, 1e4),
    "jetmoe": ({"kv_channels": 48}, 48, 1e4),
}


@pytest.mark.parametrize("family", RELEASED)
def test_a_config_alone_has_the_rotary_dimension_and_theta_of_the_model(family):
    keys, rotary_dim, theta = RELEASED[family]
    info = read({**SHAPE, **keys, "model_type": family, "max_position_embeddings": 4096})
    assert (info.rotary_dim, info.rope_theta) == (rotary_dim, theta)


def test_minimax_m2_at_512k_has_the_slowest_pair_of_32(tmp_path, capsys):
    config = {
        **SHAPE,
        "model_type": "minimax_m2",
        "head_dim": 128,
        "rotary_dim": 64,
        "rope_theta": 5000000,
        "max_position_embeddings": 196608,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["check", str(tmp_path), "--to", "512k", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    slowest = checks["rope"]["numbers"]["slowest_inv_freq"]
    assert slowest == pytest.approx(1 / (524288 / 196608 * 5e6 ** (62 / 64)))


def test_a_transformers_that_does_not_know_a_key_is_refused(monkeypatch):
    config = {**SHAPE, "model_type": "minimax_m2", "head_dim": 128, "rotary_dim": 64}
    older = transformers.PreTrainedConfig.convert_rope_params_to_dict
    monkeypatch.setattr(transformers.MiniMaxM2Config, "convert_rope_params_to_dict", older)
    made = transformers.MiniMaxM2Config(**{k: v for k, v in config.items() if k != "model_type"})
    with pytest.raises(SkipwiseError, match=r"rotates 128 dim.* says 64 \(rotary_dim\)"):
        model_info_of(made, raw=config)


@pytest.mark.parametrize(
    ("config", "recurrent"),
    [
        ({"model_type": "lfm2", "full_attn_idxs": [1]}, True),
        ({"model_type": "lfm2", "full_attn_idxs": [0, 1]}, False),
        ({"model_type": "bamba", "attn_layer_indices": [1]}, True),
        ({"model_type": "falcon_h1"}, True),
        ({**ZAMBA2, "use_mem_rope": True}, True),
        ({"model_type": "qwen3"}, False),
    ],
)
def test_recurrent_layers_are_seen_without_layer_types(config, recurrent):
    assert read({**SHAPE, **config, "max_position_embeddings": 4096}).recurrent == recurrent


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "granitemoehybrid", "position_embedding_type": "nope"},
            'no positions (position_embedding_type is "nope")',
        ),
        (
            {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]},
            "no positions (position_embedding_type is null)",
        ),
        ({**ZAMBA2, "use_mem_rope": False}, "no positions (use_mem_rope is false)"),
        (ZAMBA2, "no positions (use_mem_rope is false)"),
        ({"model_type": "bamba"}, "bamba has no attention layer"),
    ],
)
def test_a_model_without_rope_is_refused_on_its_config(config, words):
    assert words in refusal({**SHAPE, **config, "max_position_embeddings": 4096})


def test_granite_with_rope_and_a_stray_position_embedding_type_are_not_refused():
    hybrid = {"position_embedding_type": "rope", "layer_types": ["mamba", "attention"]}
    assert read({**SHAPE, **hybrid, "model_type": "granitemoehybrid"}).recurrent
    read({**LLAMA, "position_embedding_type": "absolute"})  # which no Llama reads


QWEN_1M = {
    **SHAPE,
    "model_type": "qwen2",
    "max_position_embeddings": 1010000,
    "rope_theta": 10000000.0,
    "use_sliding_window": False,
    "dual_chunk_attention_config": {
        "chunk_size": 262144,
        "local_size": 8192,
        "original_max_position_embeddings": 262144,
    },
}


def test_dual_chunk_attention_does_not_count_as_trained_length(tmp_path, capsys):
    info = read(QWEN_1M)
    assert info.original_length == 262144
    assert read(QWEN_1M, 1010000).original_length == 1010000  # typed
    (tmp_path / "config.json").write_text(json.dumps(QWEN_1M))
    assert main(["check", str(tmp_path), "--to", "2m"]) == 0
    out = capsys.readouterr().out
    assert "from 262,144 to 2,097,152 tokens, scaled by 8" in out
    assert "rope.type: auto: extend will measure yarn, llama3, ntk and linear" in out
    assert "serves 1,010,000 tokens in chunks, with weights trained at 262,144" in out


HUNYUAN = {
    "type": "dynamic",
    "alpha": 1000.0,
    "factor": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@pytest.mark.parametrize("family", ["hunyuan_v1_dense", "hunyuan_v1_moe"])
@pytest.mark.parametrize("original_length", [None, 262144])
def test_alpha_of_hunyuan_is_a_theta_that_was_trained(family, original_length):
    config = {
        **SHAPE,
        "model_type": family,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rope_theta": 10000.0,
        "rope_scaling": HUNYUAN,
    }
    info = read(config, original_length)
    assert info.rope_theta == pytest.approx(11158839.9, rel=1e-8)
    assert (info.original_length, info.rope_type, info.scaling.factor) == (262144, "default", 1.0)
    assert "alpha 1000 makes rope_theta 11,158,840" in info.notes
    made = CONFIG_MAPPING[family](
        **{key: value for key, value in config.items() if key != "model_type"}
    )
    inv_freq = module_frequencies(made)
    expected = info.scaling.inv_freq(info.rope_theta, info.rotary_dim)
    assert np.allclose(inv_freq.double().numpy(), expected, rtol=1e-5, atol=0)
    scaling = YaRN(factor=2.0, original_length=262144)
    scaled = scaled_config(made, info, scaling, 524288)
    inv_freq = module_frequencies(scaled).double().numpy()
    assert np.allclose(inv_freq, scaling.inv_freq(info.rope_theta, 128), rtol=1e-5, atol=0)
    assert "alpha" not in scaled.rope_parameters


def test_alpha_is_named_where_only_other_runtimes_compute_it():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0}
    info = read({**LLAMA, "rope_scaling": scaling})
    assert info.rope_theta == 10000.0
    assert "alpha 1000.0 has no effect in transformers, but SGLang and vLLM" in info.notes


R1 = {
    **SHAPE,
    "model_type": "qwen3",
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"attn_factor": 0.8782488562869419}, "attn_factor 0.8782488562869419 has no effect in tr"),
        ({"apply_yarn_scaling": False}, "but vLLM leaves the attention factor of yarn out"),
        ({"finetuned": True}, "nothing is computed from finetuned"),
        ({"mrope_section": [16, 24, 24]}, "nothing is computed from mrope_section"),
        ({"finetuned": True, "attn_factor": 1.0}, "nothing is computed from finetuned, attn_facto"),
        ({"attn_factor": None, "beta_fast": None, "mscale": 0}, ""),
    ],
)
def test_keys_beside_the_scaling_are_passed_over_and_named(keys, words, tmp_path, capsys):
    config = {**R1, "rope_scaling": {**YARN, **keys}}
    info = read(config)
    assert info.original_length == 131072
    assert info.scaling == YaRN(factor=4.0, original_length=32768)
    assert info.scaling.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert words in info.notes and (words or not info.notes)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["check", str(tmp_path), "--to", "256k"]) == 0
    assert words in capsys.readouterr().out
    replaced = read(config, 32768)
    assert replaced.scaling.factor == 1.0 and replaced.notes == ""


@pytest.mark.parametrize(
    "scaling",
    [
        {**YARN, "beta_fast": 1, "beta_slow": 32},
        {**YARN, "factor": 0.5},
        {**LLAMA3, "original_max_position_embeddings": 32768, "low_freq_factor": "low"},
    ],
)
def test_a_scaling_that_is_replaced_need_not_be_valid(scaling):
    config = complete({**R1, "rope_scaling": scaling})
    with pytest.raises(SkipwiseError) as error:
        read_model_info(config)
    assert "rope.options" not in str(error.value)
    info = read_model_info(config, 32768)
    assert (info.original_length, info.scaling.factor) == (32768, 1.0)


def test_ministral_3_keeps_the_temperature_of_its_queries():
    """Its steps stay 16,384 positions long, so a query at the new end grows as the formula says."""
    from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

    config = CONFIG_MAPPING["ministral3"](**SHAPE, head_dim=16)  # the released rope_parameters
    info = model_info_of(config)
    T = 524288
    scaled = scaled_config(config, info, info.scaling.extended(262144, T), T)
    p = scaled.rope_parameters
    assert (info.original_length, p["rope_type"], p["factor"]) == (262144, "yarn", T / 16384)
    length, beta = p["original_max_position_embeddings"], p["llama_4_scaling_beta"]
    assert (length, beta) == (16384, 0.1)
    scale = get_llama_4_attn_scale(torch.tensor([[0, 262143, T - 1]]), beta, length).flatten()
    want = [1.0, 1 + 0.1 * math.log(16), 1 + 0.1 * math.log(32)]
    assert np.allclose(scale, want, rtol=1e-6)
    # replaced by another type, the model still needs both keys
    replaced = model_info_of(config, 16384)
    scaling = make_scaling("ntk", factor=2, original_length=16384)
    ntk = scaled_config(config, replaced, scaling, 32768)
    assert ntk.rope_parameters["llama_4_scaling_beta"] == 0.1
    assert ntk.rope_parameters["original_max_position_embeddings"] == 16384


def test_ministral_3_extended_has_the_frequencies_of_yarn_by_32():
    from transformers.models.ministral3.modeling_ministral3 import Ministral3RotaryEmbedding

    config = CONFIG_MAPPING["ministral3"](**SHAPE, head_dim=128)
    info = model_info_of(config)
    scaled = scaled_config(config, info, info.scaling.extended(262144, 524288), 524288)
    module = Ministral3RotaryEmbedding(scaled)
    plain = 1e6 ** -(np.arange(64) / 64)
    low, high = (128 * math.log(16384 / (r * 2 * math.pi)) / (2 * math.log(1e6)) for r in (32, 1))
    ramp = np.clip((np.arange(64) - math.floor(low)) / (math.ceil(high) - math.floor(low)), 0, 1)
    assert np.allclose(module.inv_freq, plain * (1 - ramp) + plain / 32 * ramp, rtol=1e-5)
    assert module.attention_scaling == 1.0  # mscale and mscale_all_dim are both 1


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_gemma_4_is_extended_by_theta_and_only_its_rotating_pairs_change(share):
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

    raw = {
        **SHAPE,
        "model_type": "gemma4_text",
        "head_dim": 16,
        "global_head_dim": 32,
        "max_position_embeddings": 131072,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1e6,
                "partial_rotary_factor": share,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    info = read(raw)
    pairs = int(share * 16)
    assert (info.head_dim, info.rotary_dim, info.original_length) == (32, 2 * pairs, 131072)
    config = CONFIG_MAPPING["gemma4_text"](**{k: v for k, v in raw.items() if k != "model_type"})
    ntk = make_scaling("ntk", factor=4, original_length=131072)
    scaled = scaled_config(config, info, ntk, 524288)
    assert scaled.max_position_embeddings == 524288
    sliding = "sliding_attention"
    assert scaled.rope_parameters[sliding] == raw["rope_parameters"][sliding]
    module = Gemma4TextRotaryEmbedding(scaled)
    # the lowest frequency is divided by 4, the highest is kept, those between geometrically
    j = np.arange(pairs)
    want = 1e6 ** (-2 * j / 32) * 4.0 ** (-j / (pairs - 1))
    assert np.allclose(module.full_attention_inv_freq[:pairs], want, rtol=1e-5)
    assert not module.full_attention_inv_freq[pairs:].any()
    assert np.allclose(module.sliding_attention_inv_freq, 1e4 ** (-np.arange(8) / 8), rtol=1e-5)


def test_proportional_rope_takes_no_other_scaling():
    recipe = parse_recipe({"model": "m", "target_length": 262144, "rope": {"type": "yarn"}})
    info = model_info_of(CONFIG_MAPPING["gemma4_text"](**SHAPE))
    with pytest.raises(SkipwiseError, match=r"leave it out, or type rope\.type=ntk"):
        scaling_for(recipe, info)


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_qwen_3_5_keeps_its_mrope_keys_and_scales_the_share_that_rotates(family):
    module = importlib.import_module(f"transformers.models.{family[:-5]}.modeling_{family[:-5]}")
    rotary = next(
        cls
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if name.endswith("TextRotaryEmbedding")
    )
    released = {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    }
    raw = {**SHAPE, "model_type": family, "head_dim": 256, "rope_parameters": released}
    raw["layer_types"] = ["linear_attention", "full_attention"]
    info = read({**raw, "max_position_embeddings": 262144})
    assert (info.rotary_dim, info.recurrent) == (64, True)
    given = {key: value for key, value in raw.items() if key != "model_type"}
    config = CONFIG_MAPPING[family](**given, max_position_embeddings=262144)
    linear = make_scaling("linear", factor=4, original_length=262144)
    scaled = scaled_config(config, info, linear, 1048576)
    kept = {key: scaled.rope_parameters[key] for key in ("mrope_section", "mrope_interleaved")}
    assert kept == {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
    made = rotary(scaled)
    assert np.allclose(made.inv_freq, 1e7 ** (-np.arange(32) / 32) / 4, rtol=1e-5)
    # text has the same position in all three rows, so the sections change nothing
    positions = torch.tensor([[0, 5, 1048575]])
    cos, _ = made(torch.zeros(1), positions.expand(3, 1, 3))
    angles = positions[0, :, None].double() * made.inv_freq.double()
    assert np.allclose(cos[0, :, :32], angles.float().cos(), atol=0.15)


@pytest.mark.parametrize(
    ("keys", "answers"),
    [
        # Llama 3.1 cut to save memory: 8 x 8,192 tokens, or never scaled
        ({"rope_scaling": LLAMA3, "max_position_embeddings": 8192}, (65536, 8192)),
        ({"rope_scaling": LLAMA3, "max_position_embeddings": 4096}, (65536, 8192)),
        # Command R
        ({"max_position_embeddings": 8192, "model_max_length": 131072}, (8192, 131072)),
        ({"seq_length": 32768}, (4096, 32768)),
        ({"max_sequence_length": 2048}, (4096, 2048)),
        ({"original_max_position_embeddings": 2048}, (4096, 2048)),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, (4096, 16384)),
        ({"dual_chunk_attention_config": {"chunk_size": 1024, "local_size": 32}}, (4096, 1024)),
    ],
)
def test_lengths_that_disagree_are_a_question_with_its_answers(keys, answers):
    config = {**LLAMA, **keys}
    error = refusal(config)
    assert f"type original_length={answers[0]}" in error
    for answer in answers:
        assert f"original_length={answer}" in error
        assert read(config, answer).original_length == answer
    assert read_model_info(complete(config), ask=False).original_length > 0


@pytest.mark.parametrize(
    ("keys", "length"),
    [
        ({"max_sequence_length": 4096, "model_max_length": 4096, "seq_length": None}, 4096),
        ({"model_max_length": 10**30}, 4096),  # a tokenizer's "no limit"
        ({"rope_scaling": LLAMA3, "max_position_embeddings": 131072}, 131072),  # Llama 3.1
        ({"rope_scaling": YARN, "max_position_embeddings": 32768}, 131072),  # Qwen 2.5's advice
        (
            {"rope_scaling": YARN, "max_position_embeddings": 131072, "model_max_length": 32768},
            131072,
        ),
        ({"rope_scaling": {**YARN, "factor": 1.0}, "max_position_embeddings": 32768}, 32768),
        ({"model_type": "phi3", "max_position_embeddings": 16384, "pad_token_id": 0}, 16384),
        ({"model_type": "dbrx", "max_seq_len": 32768, "max_position_embeddings": None}, 32768),
    ],
)
def test_lengths_that_agree_are_no_question(keys, length):
    config = {key: value for key, value in {**LLAMA, **keys}.items() if value is not None}
    assert read(config).original_length == length


def test_the_extended_config_has_one_length():
    made = transformers.LlamaConfig(**{**LLAMA, "seq_length": 32768})
    info = model_info_of(made, 4096)
    scaled = scaled_config(made, info, YaRN(factor=4.0, original_length=4096), 16384)
    assert (scaled.max_position_embeddings, scaled.seq_length) == (16384, 16384)
    assert model_info_of(scaled).original_length == 16384


def test_a_share_that_the_model_ignores_does_not_reach_its_scaled_form():
    """Llama rotates whole heads, but the scaled frequencies of transformers take the share."""
    made = transformers.LlamaConfig(**{**LLAMA, "partial_rotary_factor": 0.5})
    info = read({**LLAMA, "partial_rotary_factor": 0.5})
    assert info.rotary_dim == 16 == 2 * len(module_frequencies(made))
    scaling = YaRN(factor=4.0, original_length=4096)
    assert config_changes(info, scaling, 16384)["rope_parameters"]["partial_rotary_factor"] == 1.0
    assert len(module_frequencies(scaled_config(made, info, scaling, 16384))) == 8


VISION = {"model_type": "qwen2_vl", **SHAPE, "vision_config": {"depth": 2}}
MROPE = {"type": "mrope", "mrope_section": [2, 3, 3]}


@pytest.mark.parametrize(
    "config",
    [
        {**VISION, "rope_scaling": MROPE, "max_position_embeddings": 32768},
        {"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text", **SHAPE}},
        {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": {}}},
        {"model_type": "qwen2_vl", **SHAPE},
        {"model_type": "chameleon", **SHAPE},  # one flat config for text and images
    ],
)
@pytest.mark.parametrize("text_only", [False, True])
def test_a_vision_model_without_a_text_class_is_refused_once(config, text_only):
    with pytest.raises(SkipwiseError) as error:
        conversion_for(config, text_only)
        read_model_info(complete(config))
    assert f"{config['model_type']} cannot be extended: transformers has no causal" in str(
        error.value
    )
    assert "load.text_only" not in str(error.value) and "mrope" not in str(error.value)


def test_qwen_vl_is_refused_alike_by_transformers_config():
    with pytest.raises(SkipwiseError, match=r"qwen2_vl cannot be extended: .*\(qwen2_vl_text\)"):
        model_info_of(transformers.Qwen2VLConfig())
