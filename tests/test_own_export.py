"""What is written into an exported config, what runtimes load from it, and that a run asks."""

import json
import math

import numpy as np
import pytest
from test_verify import TOKENIZER, L, T, exported, reading, write
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from verify_cases import BASE, LLAMA3, LONGROPE, ORIGINAL, QWEN2, THETA, YARN, both, of

from skipwise.config.parse import parse_recipe
from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError
from skipwise.export.gguf.requirements import read_requirements
from skipwise.export.runtimes import check_export, verify_folder
from skipwise.export.runtimes.readers import gguf_architecture
from skipwise.models.compatibility import LENGTH_KEYS, make_portable
from skipwise.models.hf_config import complete, defaults, model_info_of
from skipwise.models.model_info import read_model_info
from skipwise.models.scaled_config import config_changes, scaled_config, scaling_for
from skipwise.pipeline import stages
from skipwise.pipeline.extend import extend
from skipwise.pose.rope import Dynamic, Linear, YaRN

FULL = {"layer_types": ["full_attention"]}
SERVERS = ("vLLM", "SGLang")


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def change(folder, **values):
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **values}))


def plain(theta, dim=64):
    """Frequencies by the formula."""
    return theta ** (-np.arange(0, dim, 2) / dim)


def served(verdict):
    return {reading(verdict, runtime).max_length for runtime in SERVERS}


# Gemma 3


@pytest.mark.parametrize("family", ["gemma3_text", "gemma3n_text"])
def test_gemma_3_states_the_window_under_linear_and_is_served_at_it(family, tmp_path):
    folder = exported(tmp_path, family, "linear", **(FULL if family == "gemma3_text" else {}))
    assert config_of(folder)["max_position_embeddings"] == T
    verdict = verify_folder(folder, L)
    assert served(verdict) == {T} and verdict.window == T
    dim = 2 * len(verdict.readings[0].inv_freq)
    np.testing.assert_allclose(reading(verdict, "vLLM").inv_freq, plain(1e6, dim) / 8, rtol=1e-12)
    assert all(issue.inherent for issue in verdict.issues)
    assert check_export(folder, Linear(factor=8.0), T).passed
    assert read_requirements(folder).target_length == T


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo3"])
def test_other_families_state_the_length_before_linear(family, tmp_path):
    folder = exported(tmp_path, family, "linear", **(FULL if family == "olmo3" else {}))
    assert config_of(folder)["max_position_embeddings"] == L
    assert served(verify_folder(folder, L)) == {T}


def test_the_released_gemma_3_is_read_as_it_states_and_carried_on(tmp_path):
    released = {
        "model_type": "gemma3_text",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": 16,
        "vocab_size": 1024,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window": 1024,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    verdict = verify_folder(write(tmp_path, released, None))
    assert verdict.window == 131072 and served(verdict) == {131072}
    info = read_model_info(complete(released))
    assert info.original_length == 131072
    recipe = parse_recipe({"model": "-", "target_length": 262144})
    scaling = scaling_for(recipe, info)
    changes = config_changes(info, scaling, 262144)
    assert scaling.factor == 16 and changes["max_position_embeddings"] == 262144


def test_a_gemma_3_export_at_the_length_before_scaling_is_found_with_the_value_to_set(tmp_path):
    folder = exported(tmp_path, "gemma3_text", "linear", **FULL)
    change(folder, max_position_embeddings=L)
    for issues in (verify_folder(folder).issues, verify_folder(folder, L).issues):
        assert [issue.runtimes for issue in issues] == [("vLLM",), ("SGLang",)]
        assert {issue.fix for issue in issues} == {f"set max_position_embeddings to {T}"}
    check = check_export(folder, Linear(factor=8.0), T)
    assert not check.passed
    assert (
        f"vLLM serves 4,096 tokens, the window is 32,768: set max_position_embeddings to {T}"
        in (check.detail)
    )


def test_dynamic_states_l_in_gemma_3_too_because_transformers_counts_from_it(tmp_path):
    recipe = {"model": "-", "target_length": T, "method": "none", "rope": {"type": "dynamic"}}
    base = {k: v for k, v in BASE.items() if k not in ("model_type", "architectures")}
    values = {**base, **FULL, "max_position_embeddings": L}
    config = AutoConfig.for_model("gemma3_text", **values)
    info = model_info_of(config)
    scaling = scaling_for(parse_recipe(recipe), info)
    scaled = scaled_config(config, info, scaling, T)
    assert scaled.max_position_embeddings == L
    inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](
        scaled, "cpu", seq_len=T, layer_type="full_attention"
    )
    want = Dynamic(factor=8.0, original_length=L).inv_freq(1e6, 2 * len(inv_freq))
    np.testing.assert_allclose(inv_freq.double().numpy(), want, rtol=1e-5)


def test_a_length_that_suits_only_one_server_names_another_scaling(tmp_path):
    folder = exported(tmp_path, "mellum", "linear")
    lengths = [issue for issue in verify_folder(folder, L).issues if issue.name == "length"]
    assert [issue.runtimes for issue in lengths] == [("SGLang",)]
    assert lengths[0].fix.endswith("extend with rope.type=yarn")


# Keys that a server prefers to the scaling

CHUNKS = {"chunk_size": 262144, "local_size": 8192, ORIGINAL: 262144}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_dual_chunk_attention_leaves_the_servers_with_theta_alone(family, tmp_path):
    changes = {"model_type": family, "head_dim": 64, "dual_chunk_attention_config": CHUNKS}
    verdict = verify_folder(write(tmp_path, {**BASE, **both(YARN), **changes}))
    for runtime in SERVERS:
        have = reading(verdict, runtime)
        np.testing.assert_allclose(have.inv_freq, plain(5e5), rtol=1e-12)
        assert have.attention_factor == 1
    assert reading(verdict, "transformers 5").attention_factor == pytest.approx(1.2079, abs=1e-4)
    (issue,) = verdict.issues
    assert issue.runtimes == SERVERS and "drop the scaling" in issue.what
    assert issue.fix == "remove dual_chunk_attention_config from config.json"
    make_portable(tmp_path, T)
    assert "dual_chunk_attention_config" not in config_of(tmp_path)
    assert verify_folder(tmp_path).well


@pytest.mark.parametrize("key", LENGTH_KEYS)
def test_an_export_has_one_length(key, tmp_path):
    folder = write(tmp_path, {**BASE, **both(YARN), key: L})
    found = verify_folder(folder).issues
    assert found and all(f"remove {key}" in issue.fix for issue in found)
    make_portable(folder, T)
    assert key not in config_of(folder)
    assert served(verify_folder(folder)) == {T}


def test_a_family_whose_length_has_another_name_keeps_it(tmp_path):
    config = AutoConfig.for_model("bailing_hybrid")  # its max_position_embeddings
    config.save_pretrained(tmp_path)
    make_portable(tmp_path)
    assert config_of(tmp_path)["model_max_length"] == config.max_position_embeddings


def test_a_length_above_the_scaling_follows_it(tmp_path):
    values = {k: v for k, v in BASE.items() if k not in ("model_type", "architectures")}
    values |= {"max_position_embeddings": L, ORIGINAL: 1024, "interleaved_sliding_window": L}
    config = AutoConfig.for_model("mistral", sliding_window=L, **values)
    info = model_info_of(config, L)
    recipe = parse_recipe({"model": "-", "target_length": T, "rope": {"type": "yarn"}})
    scaled = scaled_config(config, info, scaling_for(recipe, info), T)
    assert not hasattr(scaled, "interleaved_sliding_window")
    scaled.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    inv_freq, _ = ROPE_INIT_FUNCTIONS["yarn"](loaded, "cpu")
    want = YaRN(factor=8.0, original_length=L).inv_freq(1e4, 64)
    np.testing.assert_allclose(inv_freq.double().numpy(), want, rtol=1e-5)


# Families and keys with arithmetic of their own


@pytest.mark.parametrize("family", ["hunyuan_v1_dense", "hunyuan_v1_moe"])
def test_hunyuans_alpha_is_a_theta_in_every_runtime(family, tmp_path):
    alpha = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "mscale": 1.0}
    small = {"head_dim": 16, "num_attention_heads": 2, "num_experts": 2, "moe_topk": 1}
    base = {k: v for k, v in BASE.items() if k != "architectures"}
    config = {**base, **small, "model_type": family, "rope_theta": 1e4, "rope_scaling": alpha}
    verdict = verify_folder(write(tmp_path, config))
    want = 1e4 * 1000 ** (16 / 14)
    for have in verdict.readings:
        assert have.rope_theta == pytest.approx(want, rel=1e-9), have
        np.testing.assert_allclose(have.inv_freq, plain(want, 16), rtol=1e-12)
    assert verdict.issues == () and served(verdict) == {T}
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    computed = model.model.rotary_emb.inv_freq.double().numpy()
    np.testing.assert_allclose(computed, plain(want, 16), rtol=1e-5)
    change(tmp_path, head_dim=128)
    assert round(verify_folder(tmp_path).readings[0].rope_theta) == 11_158_840


DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "qk_rope_head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 163840,
    "rope_theta": 10000.0,
}
OFFICIAL = {
    "type": "yarn",
    "factor": 40.0,
    ORIGINAL: 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def test_deepseeks_official_yarn_passes_with_cos_and_sin_as_they_are(tmp_path):
    verdict = verify_folder(write(tmp_path, {**DEEPSEEK, "rope_scaling": OFFICIAL}, None))
    assert verdict.issues == ()
    assert {have.attention_factor for have in verdict.readings} == {1.0}


def test_deepseek_with_two_mscales_is_faulted_where_they_are_read_otherwise(tmp_path):
    two = {**OFFICIAL, "mscale": 0.5}
    (issue,) = verify_folder(write(tmp_path, {**DEEPSEEK, "rope_scaling": two}, None)).issues
    log = 0.1 * math.log(40)
    assert issue.runtimes == ("llama.cpp",) and "llama." not in issue.fix and issue.inherent
    assert f"makes it {(1 + 0.5 * log) / (1 + log):.4f}; llama.cpp computes 1.0000" in issue.what
    other = {key: value for key, value in OFFICIAL.items() if "mscale" not in key}
    other["attn_factor"] = 0.5  # read by deepseek_yarn of both servers
    (issue,) = verify_folder(write(tmp_path, {**DEEPSEEK, "rope_scaling": other}, None)).issues
    assert issue.runtimes == SERVERS and not issue.inherent
    assert f"vLLM computes {(1 + log) / 2:.4f}" in issue.what


@pytest.mark.parametrize(
    ("family", "prefix"),
    [("qwen3", "qwen3"), ("qwen3_moe", "qwen3moe"), ("cohere", "command-r"), ("llama", "llama")],
)
def test_a_key_of_gguf_has_the_models_own_architecture(family, prefix, tmp_path):
    changes = {"model_type": family, "head_dim": 64, **both({**YARN, "attention_factor": 1.5})}
    (issue,) = verify_folder(write(tmp_path, {**BASE, **changes})).issues
    assert f"GGUF needs {prefix}.rope.scaling.attn_factor = 1.241779" in issue.fix


@pytest.mark.extended
def test_every_architecture_that_is_named_is_one_of_llama_cpp():
    constants = pytest.importorskip("gguf").constants
    known = set(constants.MODEL_ARCH_NAMES.values())
    named = {family: gguf_architecture(family) for family in defaults()}
    renamed = {name for family, name in named.items() if name != family.removesuffix("_text")}
    assert renamed <= known
    spelled = {name.replace("_", "").replace("-", ""): name for name in known}
    for family, name in named.items():  # none is only spelled otherwise
        assert spelled.get(name.replace("_", "").replace("-", ""), name) == name, family


def test_an_attn_factor_is_told_with_what_it_makes_of_the_attention(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 8192, "attn_factor": 0.8782488562869}
    folder = write(tmp_path, {**BASE, **both(scaling), "model_type": "qwen3", "head_dim": 64})
    verdict = verify_folder(folder)
    assert reading(verdict, "SGLang").attention_factor == pytest.approx(1.0, abs=1e-9)
    (issue,) = verdict.issues
    assert "compute 1.0000; the others compute 1.1386" in issue.what and not issue.inherent
    assert 'add "attention_factor": 1,' in issue.fix


# The run asks


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({**QWEN2, **both(LLAMA3)}, "drops llama3 for qwen2"),
        (both({**YARN, "attention_factor": 1.5}), "SGLang attn_factor = 1.241779"),
        (both(LONGROPE, **{ORIGINAL: L}), "vLLM serves 4,096 tokens by default"),
        ({**of("gpt_neox", "GPTNeoXForCausalLM"), **THETA, "rotary_emb_base": 5e5}, "no RoPE for"),
    ],
)
def test_what_belongs_to_the_scaling_or_the_family_is_said_and_passes(changes, words, tmp_path):
    folder = write(tmp_path, {**BASE, **changes})
    check = check_export(folder, YaRN(factor=8.0, original_length=L), T)
    assert check.passed and words in check.detail
    assert check.detail.startswith("transformers 5, transformers 4")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": None}, "transformers 4"),
        ({"max_position_embeddings": L}, f"set max_position_embeddings to {T}"),
        ({"seq_length": L}, "remove seq_length"),
        ({"sliding_window": L, "model_type": "mistral", "head_dim": 64}, "sliding_window"),
    ],
)
def test_what_another_config_would_avoid_fails(changes, words, tmp_path):
    folder = write(tmp_path, {**BASE, **both(YARN), **changes})
    check = check_export(folder, YaRN(factor=8.0, original_length=L), T)
    assert not check.passed and words in check.detail


def test_a_window_that_is_not_the_runs_target_fails(tmp_path):
    folder = write(tmp_path, {**BASE, **both(YARN)}, {**TOKENIZER, "model_max_length": 2 * T})
    check = check_export(folder, YaRN(factor=16.0, original_length=L), 2 * T)
    assert not check.passed and "a window of 32,768 tokens, not 65,536" in check.detail


def recipe_of(tiny):
    tree = {"model": str(tiny), "target_length": 256, "rope": {"type": "yarn"}, "method": "none"}
    return parse_recipe({**tree, "eval": {"tasks": ["passkey"], "passkey_samples": 1}})


@pytest.mark.extended
def test_extend_fails_on_its_own_verdict_and_goes_on_once_the_config_is_right(
    tiny, tmp_path, monkeypatch
):
    def too_short(folder, target_length=None):
        make_portable(folder, target_length)
        change(folder, seq_length=64)

    monkeypatch.setattr("skipwise.export.hf.make_portable", too_short)
    monkeypatch.setattr("skipwise.pipeline.extend.report_run", lambda run: None)
    with pytest.raises(SkipwiseError) as failed:
        extend(recipe_of(tiny), tmp_path)
    said = str(failed.value)
    assert "vLLM takes seq_length 64" in said and "remove seq_length from config.json" in said
    run = RunFolder(tmp_path)
    assert (run.model / "model.safetensors").is_file()
    assert run.metadata().get("status") != "finished"
    config = config_of(run.model)
    del config["seq_length"]
    (run.model / "config.json").write_text(json.dumps(config))
    assert extend(recipe_of(tiny), tmp_path).metadata()["status"] == "finished"
    (check,) = [c for c in run.metadata()["checks"] if c["name"] == "runtimes"]
    assert check["passed"]
    with pytest.raises(SkipwiseError, match="remove seq_length"):
        stages.export_again(run, ["hf"])


def test_extend_asks_before_it_trains(tiny, tmp_path, monkeypatch):
    def too_short(folder, target_length=None):
        make_portable(folder, target_length)
        change(folder, seq_length=64)

    monkeypatch.setattr("skipwise.pipeline.checks.make_portable", too_short)
    with pytest.raises(SkipwiseError, match="remove seq_length"):
        extend(recipe_of(tiny), tmp_path)
    assert not RunFolder(tmp_path).model.exists()
