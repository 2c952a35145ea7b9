"""Released config.json files: the keys that decide, and those that nothing reads."""

import json

import numpy as np
import pytest
import transformers
from config_facts import LLAMA, SHAPE, module_frequencies, read, refusal
from transformers import CONFIG_MAPPING

from skipwise.cli import main
from skipwise.errors import SkipwiseError
from skipwise.models.convert import conversion_for
from skipwise.models.hf_config import complete, defaults, model_info_of
from skipwise.models.model_info import read_model_info

ZAMBA2 = {"model_type": "zamba2", "layers_block_type": ["mamba", "hybrid"]}


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
REFUSED += ("glm4_moe",)  # without head_dim, 21 dimensions of 42 rotate
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
