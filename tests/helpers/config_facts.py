"""A config.json read with and without transformers, and what the family's own module computes."""

import importlib
import inspect
import json

import pytest
from transformers import CONFIG_MAPPING

from skipwise.errors import SkipwiseError
from skipwise.models.hf_config import complete, model_info_of
from skipwise.models.model_info import read_model_info

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 1024, "num_hidden_layers": 2}
LLAMA = {**SHAPE, "model_type": "llama", "max_position_embeddings": 4096}
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
