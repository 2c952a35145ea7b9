"""Released models: what is read from their config.json, against transformers and against facts.

Each line of released/models_*.jsonl is one released config: its `config`, and in `expect` what was
written by hand. `extendable` is true, "question" (the length has to be given) or words of the
refusal; `text_only` is true or words of the refusal with load.text_only=true; the other keys are
facts. The facts of quantised weights are those of the same config without quantization_config.
"""

import importlib
import inspect
import json
import math
import os
import re
from collections import Counter

import numpy as np
import pytest
from families_table import FILE
from released import COUNTED, count_line, read_rows
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from skipwise.config.parse import parse_recipe
from skipwise.errors import SkipwiseError
from skipwise.export.runtimes import verify_folder
from skipwise.models.convert import conversion_for
from skipwise.models.hf_config import complete
from skipwise.models.model_info import read_model_info
from skipwise.planning.architecture import read_architecture
from skipwise.pose.rope import Unscaled
from skipwise.preflight.config import check_config_alone

ROWS = read_rows()
FACTS = ("length", "theta", "rotary_dim", "attention_factor", "tied")
EXPECT = {*FACTS, "extendable", "text_only", "sliding_layers", "rope_layers", "recurrent"}
# id: what is wrong today, by test
_MINIMAX = "transformers 5.23 ignores rotary_dim in minimax and turns all 128 dimensions"
WRONG_CHECK: dict[str, str] = {}
WRONG_FACTS: dict[str, str] = {
    "MiniMaxAI/MiniMax-Text-01-hf": _MINIMAX,
    "databricks/dbrx-base": "transformers 5.23 ignores attn_config.rope_theta and takes 10,000",
    "arcee-ai/AFM-4.5B": "its yarn reaches 81,920 tokens, and its config states 65,536",
}
WRONG_RUNTIMES: dict[str, str] = {"MiniMaxAI/MiniMax-Text-01-hf": _MINIMAX}


def each(wrong=(), keep=lambda row: True):
    """One test per model; `wrong` ones have to fail, so that they leave the list when they pass."""
    wrong = dict(wrong)
    marks = {name: pytest.mark.xfail(strict=True, reason=reason) for name, reason in wrong.items()}
    rows = [row for row in ROWS if keep(row)]
    params = [pytest.param(r, id=r["id"], marks=marks.get(r["id"], ())) for r in rows]
    return pytest.mark.parametrize("row", params)


def has_facts(row):
    return "length" in row["expect"]


def write(row, folder, config=None):
    (folder / "config.json").write_text(json.dumps(config or row["config"]))
    return folder


def trainable(row):
    """The config of the same weights, dequantised and without other parts."""
    config = {k: v for k, v in row["config"].items() if k != "quantization_config"}
    conversion = conversion_for(config, bool(config.get("text_config")))
    return conversion.config(config) if conversion else config


def asked(row):
    """original_length, where the config alone does not tell it."""
    expect = row["expect"]
    asks = expect["extendable"] == "question"
    return expect.get("length", row["trained_length"]) if asks else None


def check(folder, row, **settings):
    expect = row["expect"]
    target = 2 * expect.get("length", row["trained_length"])
    return check_config_alone(
        parse_recipe({"model": str(folder), "target_length": target, **settings})
    )


def test_every_row_is_complete_and_there_once():
    names = Counter(row["id"] for row in ROWS)
    assert [name for name, count in names.items() if count > 1] == []
    for row in ROWS:
        assert set(row) == {"id", "source", "trained_length", "note", "expect", "config"}, row["id"]
        assert row["source"] in ("repository", "card", "memory"), row["id"]
        assert set(row["expect"]) <= EXPECT and "extendable" in row["expect"], row["id"]
        given = [key in row["expect"] for key in FACTS]
        assert all(given) or not any(given), row["id"]
        assert isinstance(row["expect"]["extendable"], str) or all(given), row["id"]
        assert row["expect"].get("length") in (None, row["trained_length"]) or row["note"]
    unknown = {name for wrong in (WRONG_CHECK, WRONG_FACTS, WRONG_RUNTIMES) for name in wrong}
    assert unknown <= set(names)


def test_docs_families_counts_the_rows():
    """`WRITE_FAMILIES=1 pytest tests/test_released.py -k counts` writes the line."""
    page = FILE.read_text(encoding="utf-8")
    found = [line for line in page.splitlines() if line.startswith(COUNTED.strip())]
    if os.environ.get("WRITE_FAMILIES"):
        FILE.write_text(page.replace(found[0], count_line()), encoding="utf-8")
        found = [count_line()]
    assert found == [count_line()]


@each(WRONG_CHECK)
def test_check_takes_it_or_says_why_not(row, tmp_path):
    folder, expect = write(row, tmp_path), row["expect"]
    if expect["extendable"] is True:
        assert all(found.passed for found in check(folder, row))
        return
    words = "original_length=" if expect["extendable"] == "question" else expect["extendable"]
    with pytest.raises(SkipwiseError, match=re.escape(words)) as refusal:
        check(folder, row)
    if expect["extendable"] == "question":
        assert str(row["trained_length"]) in str(refusal.value)
        assert all(f.passed for f in check(folder, row, original_length=asked(row)))
    if isinstance(expect.get("text_only"), str):
        with pytest.raises(SkipwiseError, match=re.escape(expect["text_only"])):
            check(folder, row, load={"text_only": True})
    elif expect.get("text_only"):
        found = check(folder, row, load={"text_only": True}, original_length=asked(row))
        assert all(f.passed for f in found)


@each(WRONG_FACTS, has_facts)
def test_the_facts_are_read_from_config_json_alone(row):
    config, expect = complete(trainable(row)), row["expect"]
    info = read_model_info(config, asked(row))
    found = (info.original_length, info.rope_theta, info.rotary_dim)
    assert found == (expect["length"], pytest.approx(expect["theta"]), expect["rotary_dim"])
    assert info.scaling.attention_factor == pytest.approx(expect["attention_factor"], rel=1e-6)
    assert info.tied_embeddings == expect["tied"]
    assert info.recurrent == expect.get("recurrent", info.recurrent)
    if "sliding_layers" in expect or not info.sliding_window:
        assert windows(config, info) == expect.get("sliding_layers", 0)


@each(WRONG_FACTS, has_facts)
def test_the_facts_are_those_of_transformers(row, tmp_path):
    """Its config class and its rotary module, without weights."""
    raw = trainable(row)
    config = AutoConfig.from_pretrained(write(row, tmp_path, raw))
    info, expect = read_model_info(complete(raw), asked(row)), row["expect"]
    name, inv_freq, attention = rotary(config, info.original_length)
    assert 2 * len(inv_freq) == expect["rotary_dim"]
    assert attention == pytest.approx(expect["attention_factor"], rel=1e-6)
    ours = info.scaling.inv_freq(info.rope_theta, info.rotary_dim)
    np.testing.assert_allclose(ours, inv_freq, rtol=2e-5)
    if isinstance(info.scaling, Unscaled):
        theta = inv_freq[1] ** (-len(inv_freq))
        assert theta == pytest.approx(expect["theta"], rel=1e-4)
    assert config.tie_word_embeddings == expect["tied"]
    assert sliding_layers(config) == windows(complete(raw), info)
    assert rope_layers(config) == expect.get("rope_layers", rope_layers(config))
    if expect["extendable"] != "question":
        assert expect["length"] == window(config, name)


def parameters(config):
    p = config.rope_parameters
    return p.get("full_attention", p)


def windows(config, info):
    """The number of layers with a window, as `plan` counts them."""
    if not info.hybrid:
        return config["num_hidden_layers"] if info.sliding_window else 0
    return read_architecture(config).sliding_layers


def sliding_layers(config):
    """The same of transformers' config."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return 0
    return config.num_hidden_layers if kinds is None else kinds.count("sliding_attention")


def rope_layers(config):
    """Layers whose attention rotates."""
    flags = getattr(config, "no_rope_layers", None)  # 1 where it does
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return sum(flags) if flags else sum("attention" in k and "linear" not in k for k in kinds)


def without_alpha(p, dim):
    """Hunyuan's alpha is a larger theta at every length."""
    if not p.get("alpha"):
        return p
    theta = p["rope_theta"] * p["alpha"] ** (dim / (dim - 2))
    return {"rope_type": "default", "rope_theta": theta}


def window(config, name):
    """The length that the weights reach, by the config class's values."""
    p, chunks = parameters(config), getattr(config, "dual_chunk_attention_config", None)
    if chunks:
        return chunks["original_max_position_embeddings"]
    if name == "yarn":
        return round(p["factor"] * p["original_max_position_embeddings"])
    return config.max_position_embeddings


def rotary(config, length):
    """(type, inv_freq, attention factor) of the full layers: transformers' own module for them."""
    module = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__
    classes = [
        cls
        for name, cls in vars(importlib.import_module(module)).items()
        if "RotaryEmbedding" in name
        and "Vision" not in name
        and "config" in inspect.signature(cls).parameters
    ]
    made = classes[0](config)
    name = parameters(config)["rope_type"]
    if name == "longrope":  # the module has the short list until a text is longer
        inv_freq, attention = ROPE_INIT_FUNCTIONS[name](config, "cpu", seq_len=length)
    else:
        prefix = "" if hasattr(made, "inv_freq") else "full_attention_"
        inv_freq = getattr(made, f"{prefix}inv_freq")
        attention = getattr(made, f"{prefix}attention_scaling", 1.0)
    turning = inv_freq[inv_freq > 0]  # Gemma 4 leaves pairs of its full layers as they are
    return name, turning.double().numpy(), attention


# Runtimes: their rules in short, over transformers' reading of the config.

VLLM_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
VLLM_KEYS += ("max_target_positions", "max_sequence_length", "max_seq_length", "seq_len")
SGLANG_KEYS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length")
NOT_IN_4 = """
cwm deepseek_v32 glm4_moe_lite glm_moe_dsa hy_v3 hyperclovax internlm3 iquestcoder jais2 laguna
lfm2_moe minimax_m2 ministral3 qwen3_5_moe_text qwen3_5_text solar_open youtu
"""
NO_CONVERTER = """
cwm deepseek_v32 doge flex_olmo helium hy_v3 hyperclovax jetmoe laguna longcat_flash minimax
modernbert-decoder persimmon vaultgemma zamba2
"""  # llama.cpp's TEXT_MODEL_MAP lacks them; the table of `--verify` does not say so yet
LLAMA_CPP_NO_THETA = ("gpt_neox", "gemma", "gemma2", "phi", "falcon", "stablelm", "orion")


def vllm_length(raw, config, p):
    """0.33: the shortest of its keys; linear and dynamic multiply it, but not in Gemma 3."""
    stated = {**raw, "max_position_embeddings": config.max_position_embeddings}
    length = raw.get("model_max_length") or min(stated[k] for k in VLLM_KEYS if stated.get(k))
    if p["rope_type"] == "longrope":
        return config.original_max_position_embeddings
    if p["rope_type"] in ("linear", "dynamic") and "gemma3" not in config.model_type:
        return int(length * p["factor"])
    return length


def sglang_length(raw, config, p):
    """The first of its keys, times the factor if the parameters do not name a length."""
    length = next((raw[k] for k in SGLANG_KEYS if raw.get(k)), config.max_position_embeddings)
    flat = "full_attention" not in config.rope_parameters
    named = "original_max_position_embeddings" in p or p["rope_type"] == "llama3"
    return int(length * p.get("factor", 1.0)) if flat and not named else length


def attention(runtime, raw, p):
    """The factor of cos and sin."""
    factor, scaling = p.get("factor"), raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if runtime != "llama.cpp" and raw.get("dual_chunk_attention_config"):
        return 1.0
    if p["rope_type"] == "longrope":
        L = raw["original_max_position_embeddings"]
        return math.sqrt(1 + math.log(raw["max_position_embeddings"] / L) / math.log(L))
    if p["rope_type"] != "yarn":
        return 1.0
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dim:
        # llama.cpp takes mscale to be mscale_all_dim, in rope.scaling.yarn_log_multiplier
        assert mscale == all_dim
        return 1.0
    times = scaling.get("attn_factor", 1.0) if runtime == "SGLang" else 1.0
    return (0.1 * math.log(factor) + 1.0) * times


def plain(theta, dim):
    return theta ** -(np.arange(0, dim, 2) / dim)


def yarn(p, theta, dim):
    """Peng et al. 2023, with the ends of the ramp rounded to pairs, from 32 rotations to 1."""

    def pair(rotations):
        L = p["original_max_position_embeddings"]
        return dim * math.log(L / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), dim - 1)
    interpolated = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return plain(theta, dim) * (1 - interpolated * (1 - 1 / p["factor"]))


def readings(row, folder):
    verdict = verify_folder(write(row, folder))
    return {reading.runtime: reading for reading in verdict.readings}


def stays(row):
    """Not a model that is converted first, nor Gemma 4, whose RoPE the table does not compute."""
    family = row["config"]["model_type"]
    return has_facts(row) and family not in ("gptj", "baichuan", "gemma4")


@each(WRONG_RUNTIMES, stays)
def test_runtimes_read_it_by_their_own_rules(row, tmp_path):
    raw, expect = trainable(row), row["expect"]
    config = AutoConfig.from_pretrained(write(row, tmp_path, raw))
    p = without_alpha(parameters(config), expect["rotary_dim"])
    found = readings(row, tmp_path)
    five, four = found["transformers 5"], found["transformers 4"]
    assert five.error is None
    assert (five.rope_type, five.rope_theta) == (p["rope_type"], pytest.approx(p["rope_theta"]))
    assert five.attention_factor == pytest.approx(expect["attention_factor"], rel=1e-6)
    assert 2 * len(five.inv_freq) == expect["rotary_dim"]
    family, theta, dim = config.model_type, p["rope_theta"], expect["rotary_dim"]
    if family in NOT_IN_4.split():
        assert "is not in transformers 4" in four.error
    elif family == "mistral" and p["rope_type"] == "yarn" and "head_dim" not in raw:
        assert "needs head_dim" in four.error
    elif "rope_parameters" not in raw:
        assert four.error is None and four.same_rope(five)
    for runtime, length in (("vLLM", vllm_length), ("SGLang", sglang_length)):
        reading = found[runtime]
        assert reading.error is None
        assert reading.max_length == length(raw, config, p), runtime
        assert reading.attention_factor == pytest.approx(attention(runtime, raw, p)), runtime
        chunks = "dual_chunk_attention_config" in raw
        unscaled = chunks or (runtime == "vLLM" and p["rope_type"] == "dynamic")
        want = plain(theta, dim) if unscaled else five.inv_freq
        np.testing.assert_allclose(reading.inv_freq, want, rtol=1e-6)
    cpp = found["llama.cpp"]
    if family in NO_CONVERTER.split():
        return
    assert cpp.error is None
    assert cpp.max_length == (2048 if family == "falcon" else config.max_position_embeddings)
    assert cpp.attention_factor == pytest.approx(attention("llama.cpp", raw, p))
    want = five.inv_freq
    if family in LLAMA_CPP_NO_THETA or p["rope_type"] == "dynamic":
        want = plain(1e4 if family in LLAMA_CPP_NO_THETA else theta, dim)
    elif p["rope_type"] == "yarn":
        want = yarn(p, theta, dim)
    np.testing.assert_allclose(cpp.inv_freq, want, rtol=1e-6)
