"""Configs: read without transformers as transformers reads them, and refused with the reason."""

import json
import subprocess
import sys
import time

import pytest
import transformers
from transformers import AutoConfig

from skipwise.cli import main
from skipwise.config.recipe import ModelSettings
from skipwise.errors import SkipwiseError
from skipwise.models.hf_config import complete, defaults, load_config, model_info_of
from skipwise.models.model_info import read_model_info
from skipwise.pose.rope_config import with_legacy_rope_keys

OLDER = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi"]
OLDER += ["gpt_neox", "falcon", "olmo", "olmo2", "olmo3", "cohere", "stablelm", "glm4"]
OLDER += ["smollm3", "starcoder2", "granite", "deepseek_v3"]


def both_facts(folder):
    """(facts from config.json alone, facts from transformers' config); errors as their text."""

    def read(get):
        try:
            return get()
        except SkipwiseError as error:
            return str(error)

    raw = json.loads((folder / "config.json").read_text())
    return (
        read(lambda: read_model_info(complete(raw))),
        read(lambda: model_info_of(AutoConfig.from_pretrained(folder))),
    )


@pytest.mark.parametrize("family", sorted(defaults()))
def test_config_json_alone_tells_what_transformers_tells(family, tmp_path):
    transformers.CONFIG_MAPPING[family]().save_pretrained(tmp_path)
    alone, by_transformers = both_facts(tmp_path)
    assert alone == by_transformers


@pytest.mark.parametrize("family", OLDER)
def test_an_older_config_json_tells_the_same(family, tmp_path):
    transformers.CONFIG_MAPPING[family]().save_pretrained(tmp_path)
    old = with_legacy_rope_keys(json.loads((tmp_path / "config.json").read_text()))
    for key in ("rope_parameters", "layer_types"):
        old.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(old))
    alone, by_transformers = both_facts(tmp_path)
    assert alone == by_transformers and not isinstance(alone, str)


OLD = {  # as they stand in well-known repositories
    "Llama-2-7B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rope_scaling": None,
        "vocab_size": 32000,
    },
    "Llama-3.1-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "vocab_size": 128256,
    },
    "Mistral-7B-v0.1": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 32000,
    },
    "gemma-2-9b": {
        "model_type": "gemma2",
        "hidden_size": 3584,
        "head_dim": 256,
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "max_position_embeddings": 8192,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text",
        "hidden_size": 1152,
        "head_dim": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "Qwen2.5-7B with YaRN": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "rope_theta": 1000000.0,
        "rope_scaling": {
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "type": "yarn",
        },
        "sliding_window": 131072,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "pythia-1b": {
        "model_type": "gpt_neox",
        "hidden_size": 2048,
        "num_attention_heads": 8,
        "max_position_embeddings": 2048,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "vocab_size": 50304,
    },
    "phi-2": {
        "model_type": "phi",
        "hidden_size": 2560,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.4,
        "rope_theta": 10000.0,
        "vocab_size": 51200,
    },
    "Phi-3-mini-128k": {
        "model_type": "phi3",
        "hidden_size": 3072,
        "num_attention_heads": 32,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
        "sliding_window": 262144,
        "vocab_size": 32064,
    },
}
EXPECTED = {  # L, theta, rotary_dim, window, hybrid
    "Llama-2-7B": (4096, 10000.0, 128, None, False),
    "Llama-3.1-8B": (131072, 500000.0, 128, None, False),
    "Mistral-7B-v0.1": (32768, 10000.0, 128, 4096, False),
    "gemma-2-9b": (8192, 10000.0, 256, 4096, True),
    "gemma-3-1b": (32768, 1e6, 256, 512, True),
    "Qwen2.5-7B with YaRN": (131072, 1e6, 128, None, False),
    "pythia-1b": (2048, 10000.0, 64, None, False),
    "phi-2": (2048, 10000.0, 32, None, False),
    "Phi-3-mini-128k": (131072, 10000.0, 96, 262144, False),
}


@pytest.mark.parametrize("name", OLD)
def test_configs_of_well_known_models_are_read_right(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD[name]))
    alone, by_transformers = both_facts(tmp_path)
    assert alone == by_transformers
    found = (alone.original_length, alone.rope_theta, alone.rotary_dim)
    assert (*found, alone.sliding_window, alone.hybrid) == EXPECTED[name]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("GPT2Config", {}, "learned absolute positions.*\nchoose a RoPE model"),
        ("OPTConfig", {}, "learned absolute positions.*\nchoose a RoPE model"),
        ("BloomConfig", {}, "ALiBi.*\nchoose a RoPE model"),
        ("MptConfig", {}, "ALiBi.*\nchoose a RoPE model"),
        ("FalconConfig", {"alibi": True}, "ALiBi.*\nchoose a RoPE model"),
        ("MambaConfig", {}, "no attention"),
        ("T5Config", {}, "encoder-decoder.*\nchoose a decoder"),
        ("LlavaConfig", {}, "contains a language model.*\ntype load.text_only=true"),
        ("Gemma3Config", {}, "contains a language model.*\ntype load.text_only=true"),
        ("LlamaConfig", {"quantization_config": {"bits": 4}}, "quantised.*\ngive the original"),
        ("RecurrentGemmaConfig", {}, "no full-attention layer with RoPE"),
        ("Llama4TextConfig", {}, "RoPE only in layers that see a chunk at a time"),
        ("Cohere2Config", {}, "RoPE only in its sliding layers.*\nchoose another model"),
        ("Exaone4Config", {}, "RoPE only in its sliding layers"),
        ("NemotronHConfig", {}, "no RoPE settings"),
        ("DeepseekV4Config", {}, "no full-attention layer with RoPE"),
    ],
)
def test_what_cannot_be_extended_is_refused_alike_with_and_without_transformers(
    name, change, words, tmp_path
):
    getattr(transformers, name)(**change).save_pretrained(tmp_path)
    for error in both_facts(tmp_path):
        assert isinstance(error, str)
        with pytest.raises(SkipwiseError, match=words):
            raise SkipwiseError(error)


def test_remote_code_is_refused_unasked_and_never_run(tmp_path, capsys):
    config = {"model_type": "qwen", "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_qwen.py").write_text("raise SystemExit('this was run')\n")
    with pytest.raises(
        SkipwiseError, match=r"brings its own code.*\nread it, and type load\.trust"
    ):
        load_config(str(tmp_path), ModelSettings())
    assert main(["check", str(tmp_path), "--to", "32k"]) == 2
    assert "brings its own code" in capsys.readouterr().err


def test_check_reads_a_config_alone_in_a_blink_and_without_torch(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD["Mistral-7B-v0.1"]))
    command = f"""
import sys
from skipwise.cli import main
code = main(["check", {str(tmp_path)!r}, "--to", "64k"])
assert not {{"torch", "transformers"}} & set(sys.modules)
sys.exit(code)
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert "32,768 to 65,536 tokens, scaled by 2" in done.stdout
    assert "every layer has a sliding_window of 4,096: it will be removed" in done.stdout
    assert "neither the loaded model nor the text was checked" in done.stdout
    assert seconds < 5  # the bar of one second is measured by hand: tests share the machine


def test_check_of_a_config_alone_names_mistakes(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(OLD["Llama-2-7B"]))
    assert main(["check", str(tmp_path), "--to", "4k"]) == 2
    assert "not longer than the model's 4,096" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    assert main(["check", str(tmp_path), "--to", "8k"]) == 2
    assert "is not JSON" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 10}))
    assert main(["check", str(tmp_path), "--to", "8k"]) == 2
