"""A config.json with values that no runtime can use, or that say two things, is refused by name."""

import json
import math

import pytest
from transformers import CONFIG_MAPPING

from skipwise.cli import main
from skipwise.models.hf_config import complete

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 1024, "num_hidden_layers": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LINEAR_8 = {"rope_type": "linear", "factor": 8.0}
PLAIN = {"rope_type": "default"}
PER_TYPE = {"full_attention": {**PLAIN, "rope_theta": 1e6}, "sliding_attention": PLAIN}


def llama(**keys):
    return {**SHAPE, "model_type": "llama", "max_position_embeddings": 4096, **keys}


def of(family, **keys):
    return llama(model_type=family, **keys)


def scaled(**keys):
    return llama(max_position_embeddings=131072, rope_scaling={**YARN, **keys})


REFUSED = {  # what is wrong: (config, words of the error)
    "scaling text": (llama(rope_scaling="dynamic"), 'rope_scaling in config.json is "dynamic"'),
    "scaling list": (llama(rope_scaling=["linear", 2]), "give a JSON object, or remove it"),
    "factor text": (scaled(factor="4.0"), 'factor in rope_scaling is "4.0": give a number above 0'),
    "factor NaN": (scaled(factor=math.nan), "factor in rope_scaling is NaN"),
    "factor infinite": (scaled(factor=math.inf), "factor in rope_scaling is Infinity"),
    "factor 0": (scaled(factor=0), "factor in rope_scaling is 0"),
    "theta text": (llama(rope_theta="500000"), 'rope_theta in config.json is "500000"'),
    "theta NaN": (llama(rope_theta=math.nan), "rope_theta in config.json is NaN"),
    "theta below 0": (llama(rope_theta=-5), "rope_theta in config.json is -5"),
    "theta beyond float": (llama(rope_theta=10**400), "rope_theta in config.json is 1000"),
    "length text": (llama(max_position_embeddings="4096"), "give a whole number above 0"),
    "length float": (llama(max_position_embeddings=4096.0), "is 4096.0: give a whole number"),
    "length true": (llama(max_position_embeddings=True), "is true: give a whole number"),
    "length below 0": (llama(max_position_embeddings=-1), "is -1: give a whole number"),
    "other length text": (llama(seq_length="32768"), 'seq_length in config.json is "32768"'),
    "other length float": (
        llama(model_max_length=32768.0),
        "type original_length=4096, or original_length=32768",
    ),
    "L text": (scaled(original_max_position_embeddings="32768"), 'in rope_scaling is "32768"'),
    "cut below L": (
        llama(max_position_embeddings=8192, rope_scaling=YARN),
        "type original_length=8192, or original_length=131072",
    ),
    "heads": (
        llama(num_attention_heads=2, num_key_value_heads=3),
        "config.json has 2 num_attention_heads and 3 num_key_value_heads: the second must divide",
    ),
    "share text": (of("stablelm", partial_rotary_factor="0.25"), "partial_rotary_factor in config"),
    "share 0": (
        of("stablelm", partial_rotary_factor=0.0),
        "is 0.0: give a number above 0 and",
    ),
    "share 2": (of("stablelm", partial_rotary_factor=2.0), "is 2.0: give at most 1, or remove it"),
    "odd head": (llama(head_dim=15), "RoPE would rotate 15 of a head's 15 dimensions"),
    "heads text": (llama(num_attention_heads="4"), 'num_attention_heads in config.json is "4"'),
    "heads 0": (llama(num_attention_heads=0), "num_attention_heads in config.json is 0"),
    "window text": (of("mistral", sliding_window="4096"), 'is "4096": give a number'),
    "layers text": (of("gemma3_text", layer_types="full_attention"), "give a list"),
    "one layer type": (
        of("gemma3_text", layer_types=["full_attention"]),
        "2 num_hidden_layers and 1 layer_types",
    ),
    "no family": ({**SHAPE, "max_position_embeddings": 4096}, "config.json has no model_type"),
    "family null": (llama(model_type=None), "config.json has no model_type"),
    "dual text": (of("qwen2", dual_chunk_attention_config="262144"), "give a JSON object"),
    "alpha text": (
        of("hunyuan_v1_dense", rope_scaling={"type": "dynamic", "alpha": "1000", "factor": 1.0}),
        'alpha in rope_scaling is "1000"',
    ),
    "layer type text": (
        of("gemma3_text", rope_parameters={"full_attention": "default"}),
        'full_attention in rope_parameters is "default"',
    ),
    "inside a layer type": (
        of("gemma3_text", rope_parameters={**PER_TYPE, "full_attention": {"factor": "8"}}),
        'factor in full_attention is "8"',
    ),
    "inside text_config": (
        {"model_type": "gemma3", "text_config": of("gemma3_text", rope_theta="1e6")},
        'rope_theta in text_config is "1e6"',
    ),
    "per layer type, read as one": (
        llama(rope_parameters=PER_TYPE),
        "per layer type, and llama takes one for all layers",
    ),
    "per layer type, older key": (
        of("gemma3_text", rope_scaling=PER_TYPE),
        "gemma3_text takes those from rope_parameters alone",
    ),
}
CONFLICTS = {  # runtimes load these, and differ
    "two names": (
        llama(rope_scaling={"type": "linear", "rope_type": "yarn", "factor": 2.0}),
        "two values of rope_type, linear and yarn",
    ),
    "two scalings": (
        llama(
            rope_scaling={"type": "linear", "factor": 2.0},
            rope_parameters={**YARN, "rope_theta": 1e4},
        ),
        "two values of rope_type, linear and yarn",
    ),
    "two thetas": (
        llama(rope_theta=1e4, rope_scaling={**PLAIN, "rope_theta": 5e5}),
        "two values of rope_theta, 10000.0 and 500000.0",
    ),
    "a theta that is dropped": (
        llama(
            rope_scaling=YARN,
            rope_parameters={"rope_type": "yarn", "rope_theta": 1e6},
        ),
        "two values of rope_theta, 1000000.0 and unset",
    ),
}


@pytest.fixture
def said(tmp_path, capsys):
    """What a command says of a folder with this config.json, on one line, and its exit status."""

    def run(config, *command):
        (tmp_path / "config.json").write_text(json.dumps(config))
        status = main([*command[:-1], str(tmp_path)] if command[0] == "export" else [*command])
        out = capsys.readouterr()
        return status, " ".join((out.out + out.err).split())

    return run


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("verb", ["check", "plan"])
def test_a_value_that_cannot_be_used_is_named(name, verb, said, tmp_path):
    config, words = REFUSED[name]
    status, text = said(config, verb, str(tmp_path), "--to", "512k")
    assert status == 2 and words in text


@pytest.mark.parametrize("name", [name for name, (_, words) in REFUSED.items() if "give" in words])
def test_verify_names_it_too(name, said):
    config, words = REFUSED[name]
    status, text = said(config, "export", "--verify", "")
    assert status == 2 and words in text


@pytest.mark.parametrize("name", CONFLICTS)
def test_two_settings_that_differ_are_a_question_before_training(name, said, tmp_path):
    config, words = CONFLICTS[name]
    for verb in ("check", "plan"):
        status, text = said(config, verb, str(tmp_path), "--to", "512k")
        assert status == 2 and words in text
    status, text = said(config, "export", "--verify", "")
    assert status == 2 and "runtime loads as" in text and "FAIL" in text


USED = {  # odd, and used by transformers as it is
    "nulls": llama(rope_theta=None, head_dim=None, rope_scaling={"type": None, "factor": None}),
    "options null": scaled(beta_fast=None, beta_slow=None, attention_factor=None, mscale=None),
    "L float": scaled(original_max_position_embeddings=32768.0),
    "finetuned text": scaled(finetuned="true"),
    "no length of a tokenizer": llama(model_max_length=1e30),
    "window 0": of("mistral", sliding_window=0),
    "layer type null": of("gemma3_text", rope_parameters={**PER_TYPE, "full_attention": None}),
    "share integer": of("glm4", partial_rotary_factor=1),
    "two that agree": llama(
        rope_theta=1e6,
        rope_scaling={"type": "yarn", **YARN},
        rope_parameters={**YARN, "rope_theta": 1e6},
        max_position_embeddings=131072,
    ),
}


@pytest.mark.parametrize("name", USED)
def test_odd_values_that_transformers_uses_are_used(name, said, tmp_path):
    assert said(USED[name], "check", str(tmp_path), "--to", "512k")[0] == 0


@pytest.mark.parametrize("family", ["gemma3_text", "gemma3n_text", "modernbert-decoder", "olmo3"])
@pytest.mark.parametrize("top", [{}, {"rope_theta": 123456.0}])
@pytest.mark.parametrize("unset", [{}, {"rope_theta": None}])
def test_a_layer_type_without_theta_has_that_of_its_class(family, top, unset):
    given = {"full_attention": {**LINEAR_8, **unset}, "sliding_attention": PLAIN}
    config = of(family, rope_parameters=given, **top)
    plain = of(family, rope_parameters={"full_attention": LINEAR_8, "sliding_attention": PLAIN})
    rest = json.loads(json.dumps({k: v for k, v in {**plain, **top}.items() if k != "model_type"}))
    of_class = CONFIG_MAPPING[family](**rest).rope_parameters
    alone = complete(config)["rope_parameters"]
    assert alone["full_attention"]["rope_theta"] == of_class["full_attention"]["rope_theta"]
    assert alone["full_attention"]["factor"] == 8.0
