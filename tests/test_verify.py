"""Verifying a folder: every runtime's reading against that runtime, and every known fault found."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from config_facts import module_frequencies
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from verify_cases import (
    AT_L,
    BASE,
    CASES,
    FAULTS,
    LINEAR,
    LLAMA3,
    LONGROPE,
    MISTRAL,
    RUNTIMES,
    THETA,
    YARN,
    L,
    T,
    both,
    newer,
    older,
    without,
)

from skipwise.config.parse import parse_recipe
from skipwise.errors import SkipwiseError
from skipwise.export.runtimes import as_json, format_verdict, verify_folder
from skipwise.models.compatibility import make_portable
from skipwise.models.hf_config import model_info_of
from skipwise.models.scaled_config import scaled_config, scaling_for
from skipwise.preflight.model import rotary_modules

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": T}


def write(folder, config, tokenizer=TOKENIZER, **files):
    """A folder of these files, with something that passes for weights."""
    folder.mkdir(exist_ok=True)
    contents = {"config": config, "tokenizer_config": tokenizer, **files}
    for name, content in contents.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def verify(folder, changes, *, original_length=None, **files):
    return verify_folder(write(folder, {**BASE, **changes}, **files), original_length)


def reading(verdict, runtime):
    return next(r for r in verdict.readings if r.runtime == runtime)


def recorded(benchmark):
    """The newest result of a benchmark: what the runtime itself computed."""
    return json.loads(sorted(RESULTS.glob(f"{benchmark}_*.json"))[-1].read_text())


def agrees(have, want, pairs):
    """Whether a reading is what the runtime computed: inv_freq of some pairs, attention factor."""
    assert (have.error is None) == ("error" not in want), (have.error, want)
    if have.error is None:
        inv_freq = [have.inv_freq[k] for k in pairs if k < len(have.inv_freq)]
        np.testing.assert_allclose(inv_freq, want["inv_freq"], rtol=2e-5)
        assert have.attention_factor == pytest.approx(want["attention"], rel=1e-5)
        assert have.max_length == want.get("max_length", have.max_length)


@pytest.mark.parametrize("name", CASES)
def test_the_reading_for_transformers_5_is_what_the_model_computes(name, tmp_path):
    have = reading(verify(tmp_path, CASES[name]), "transformers 5")
    try:
        config = AutoConfig.from_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_config(config)
    except Exception:
        assert have.error is not None
        return
    assert have.error is None
    module, prefix = next(
        found for found in rotary_modules(model) if found[1] in ("", "full_attention_")
    )
    inv_freq = getattr(module, f"{prefix}inv_freq")
    attention = getattr(module, f"{prefix}attention_scaling")
    if have.rope_type in ("longrope", "dynamic"):  # the reading is at the end of the window
        function = ROPE_INIT_FUNCTIONS[have.rope_type]
        inv_freq, attention = function(config, "cpu", seq_len=T)
    np.testing.assert_allclose(have.inv_freq, inv_freq.double().numpy(), rtol=1e-5)
    assert have.attention_factor == pytest.approx(attention, rel=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_the_reading_for_transformers_4_is_what_4_57_6_computed(name, tmp_path):
    result = recorded("old_transformers")
    assert result["transformers"][1] == "4.57.6" and set(result["transformers 4"]) == set(CASES)
    have = reading(verify(tmp_path, CASES[name]), "transformers 4")
    agrees(have, result["transformers 4"][name], result["pairs"])


@pytest.mark.parametrize("runtime", ["vLLM", "SGLang", "llama.cpp"])
@pytest.mark.parametrize("name", CASES)
def test_the_reading_for_a_server_is_what_its_own_code_computed(name, runtime, tmp_path):
    result = recorded(f"serving_rules_{runtime.lower()}")
    assert set(result["cases"]) == set(CASES)
    have = reading(verify(tmp_path, CASES[name]), runtime)
    agrees(have, result["cases"][name], result["pairs"])


def test_exports_compute_the_same_logits_in_transformers_4_beyond_the_old_window():
    result = recorded("old_transformers")
    assert set(result["exports"]) == {"linear", "ntk", "yarn", "llama3"}
    for export in result["exports"].values():
        assert export["largest_difference_beyond_L"] < 1e-4 and export["faults"] == []
        assert export["largest_difference_newer_only"] > 1  # the comparison can see a wrong scaling
        assert export["faults_newer_only"] == ["older spelling missing"]


def exported(folder, family, method, tokenizer=TOKENIZER, **values):
    """A config of this family extended to T, as the export writes it."""
    base = {k: v for k, v in BASE.items() if k not in ("model_type", "architectures")}
    config = AutoConfig.for_model(family, **{**base, "max_position_embeddings": L, **values})
    facts = model_info_of(config)
    recipe = parse_recipe({"model": "-", "target_length": T, "rope": {"type": method}})
    scaled_config(config, facts, scaling_for(recipe, facts), T).save_pretrained(folder)
    write(folder, None, tokenizer)
    make_portable(folder, T)
    return folder


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn", "llama3"])
def test_our_own_export_is_well_in_every_runtime(method, tmp_path):
    tokenizer = {"tokenizer_class": "TokenizersBackend", "model_max_length": L}
    verdict = verify_folder(exported(tmp_path, "llama", method, tokenizer), L)
    assert verdict.well and verdict.window == T
    readings = verdict.readings
    assert [r.runtime for r in readings] == list(RUNTIMES)
    assert {r.max_length for r in readings if r.runtime in ("vLLM", "SGLang")} == {T}
    for other in readings[1:]:
        np.testing.assert_allclose(other.inv_freq, readings[0].inv_freq, rtol=1e-12)
        assert other.attention_factor == readings[0].attention_factor


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "olmo2", "gemma3_text"])
def test_our_own_yarn_is_well_in_other_families(family, tmp_path):
    layers = {"layer_types": ["full_attention"]} if family == "gemma3_text" else {}
    assert verify_folder(exported(tmp_path, family, "yarn", **layers), L).issues == ()


@pytest.mark.parametrize("family", ["gpt_neox", "gemma", "phi", "stablelm"])
def test_a_family_whose_rope_llama_cpp_does_not_convert_is_faulted_for_that_alone(family, tmp_path):
    heads = {"head_dim": 64} if family == "gemma" else {}
    (issue,) = verify_folder(exported(tmp_path, family, "yarn", **heads), L).issues
    assert issue.runtimes == ("llama.cpp",) and f"writes no RoPE for {family}" in issue.what
    assert issue.fix.endswith("--rope-scaling yarn --rope-scale 8 --yarn-orig-ctx 4096")


def test_a_class_that_lists_two_thetas_is_read_with_both(tmp_path):
    folder = exported(tmp_path, "gemma3_text", "yarn", layer_types=["full_attention"])
    assert {r.sliding_theta for r in verify_folder(folder).readings} == {10000.0}
    config = json.loads((folder / "config.json").read_text())
    del config["rope_scaling"]
    config["rope_local_base_freq"] = 5000.0
    (folder / "config.json").write_text(json.dumps(config))
    (issue,) = verify_folder(folder).issues
    assert issue.name == "older spelling missing"


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_with_whom_it_hits_and_its_fix(name, tmp_path):
    changes, fault_name, runtimes, words = FAULTS[name]
    verdict = verify(tmp_path, changes)
    found = [issue for issue in verdict.issues if issue.name == fault_name]
    assert list(runtimes) in [list(issue.runtimes) for issue in found]
    told = " ".join(f"{issue.what} | {issue.fix}" for issue in found)
    told = told.replace("takes rope_parameters", "rope_parameters")
    for word in words:
        assert word in told
    assert not verdict.well


@pytest.mark.parametrize(
    ("files", "name", "fix"),
    [
        ({"tokenizer": {**TOKENIZER, "model_max_length": L}}, "tokenizer length", "32768"),
        (
            {"tokenizer": {**TOKENIZER, "tokenizer_class": "TokenizersBackend"}},
            "tokenizer class",
            "PreTrainedTokenizerFast",
        ),
        ({"generation_config": {"max_length": L}}, "generation length", "remove max_length"),
        ({"generation_config": {"use_cache": False}}, "use_cache", "true"),
        (
            {"model.safetensors.index": {"weight_map": {"a": "model-00001-of-2.safetensors"}}},
            "weights",
            "copy them",
        ),
    ],
)
def test_a_fault_of_the_files_around_is_found_and_is_the_only_one(files, name, fix, tmp_path):
    (issue,) = verify(tmp_path, both(YARN), **files).issues
    assert issue.name == name and fix in issue.fix


def test_the_healthy_neighbours_of_faults_are_well(tmp_path):
    huge = {**TOKENIZER, "model_max_length": int(1e30)}
    own = {"attention_factor": 0.1 * np.log(8) + 1}
    for k, (changes, files) in enumerate(
        [
            (both(YARN), {"tokenizer": huge}),
            (both({**YARN, **own}), {}),
            (both({**YARN, "beta_fast": 32.0, "truncate": True}), {}),
            (both(YARN, model_max_length=T), {}),
            (both(YARN, sliding_window=L), {}),  # Llama reads no such key
            (older({"type": "yarn", **without(YARN, "rope_type")}), {}),
            (both(LINEAR, **AT_L), {}),
            (both(YARN), {"generation_config": {"max_length": T}}),
            (THETA, {}),
        ]
    ):
        assert verify(tmp_path / str(k), changes, **files).issues == ()


def test_no_case_is_read_differently_by_two_runtimes_without_a_fault(tmp_path):
    for k, (name, changes) in enumerate(CASES.items()):
        verdict = verify(tmp_path / str(k), changes)
        loads = [r for r in verdict.readings if not r.error]
        same = len(loads) == 5 and all(r.same_rope(loads[0]) for r in loads)
        served = {r.max_length for r in loads if r.runtime in ("vLLM", "SGLang")}
        if name.startswith("phi3 longrope"):  # vLLM serves L unless asked for more: a note
            assert served == {L, T} and any("--max-model-len 32768" in n for n in verdict.notes)
            served = {T}
        assert verdict.issues or (same and served == {verdict.window}), name


def test_the_window_is_what_the_config_reaches_where_it_says_so(tmp_path):
    windows = {
        "linear": T,
        "dynamic": T,
        "yarn": T,
        "yarn at L": T,
        "yarn, two L": T // 2,
        "yarn without L": T,  # max_position_embeddings: nothing says what the factor multiplies
        "yarn without factor": T,
        "llama3": T,
        "linear at T": 8 * T,
    }
    for k, (name, window) in enumerate(windows.items()):
        assert verify(tmp_path / str(k), CASES[name]).window == window, name


@pytest.mark.parametrize(
    "changes",
    [
        newer(YARN),
        newer(LLAMA3),
        newer({"rope_type": "default"}),
        CASES["yarn, newer by type"],
        {**CASES["gemma3 without thetas"], "sliding_window": 512},
    ],
)
def test_pasting_the_fix_fixes(changes, tmp_path):
    (issue,) = verify(tmp_path, changes).issues
    added = json.loads("{" + issue.fix.removeprefix("add to config.json ") + "}")
    assert verify(tmp_path, {**changes, **added}).well


def test_the_original_length_settles_what_a_config_cannot_tell(tmp_path):
    assert verify(tmp_path, both(LINEAR, **AT_L), original_length=L).well
    (issue,) = verify(tmp_path, both(LINEAR), original_length=L).issues
    assert "serve 262,144" in issue.what and issue.fix.endswith("to 4096")
    (issue, *_) = verify(tmp_path, both(YARN), original_length=L // 2).issues
    assert "counts from 4,096 tokens, and the model was trained at 2,048" in issue.what


def test_a_length_that_is_left_out_is_the_class_s(tmp_path):
    config = {k: v for k, v in {**BASE, **THETA}.items() if k != "max_position_embeddings"}
    assert verify_folder(write(tmp_path / "llama", config)).window == 2048
    assert verify_folder(write(tmp_path / "mistral", {**config, **MISTRAL})).window == 131072


def test_a_linear_window_beyond_the_tokenizer_is_found_unless_it_may_be_meant(tmp_path):
    for k, (tokens, name) in enumerate([(2 * L, "tokenizer length"), (L, "length")]):
        tokenizer = {**TOKENIZER, "model_max_length": tokens}
        (issue,) = verify(tmp_path / str(k), both(LINEAR, **AT_L), tokenizer=tokenizer).issues
        assert issue.name == name


def test_a_newer_family_and_missing_weights_are_notes_not_faults(tmp_path):
    changes = {"model_type": "ministral3", "head_dim": 64, "sliding_window": None}
    folder = write(tmp_path, {**BASE, **both(YARN), **changes}, None)
    (folder / "model.safetensors").unlink()
    verdict = verify_folder(folder)
    assert verdict.well
    notes = " ".join(verdict.notes)
    for word in ("not in transformers 4.57", "no weights", "no tokenizer_config"):
        assert word in notes


def test_the_language_model_of_a_wrapper_is_read(tmp_path):
    wrapper = {"model_type": "llava", "text_config": {**BASE, **newer(YARN)}}
    verdict = verify_folder(write(tmp_path, wrapper))
    assert verdict.family == "llama" and not verdict.well
    assert reading(verdict, "transformers 5").factor == 8.0


def adapter_of(base, folder, config=None):
    return write(folder, config, adapter_config={"base_model_name_or_path": str(base)})


def test_an_adapter_is_read_with_the_rope_of_its_base(tmp_path):
    plain = write(tmp_path / "plain", {**BASE, **THETA, **AT_L})
    scaled = write(tmp_path / "scaled", {**BASE, **both(YARN)})
    own = {**BASE, **both(YARN)}
    (issue, *_) = verify_folder(adapter_of(plain, tmp_path / "a")).issues
    assert issue.name == "adapter" and "is no scaling, theta 500,000" in issue.what
    verdict = verify_folder(adapter_of(plain, tmp_path / "b", own))
    assert verdict.issues[-1].name == "adapter" and verdict.readings[0].rope_type == "default"
    assert "which is no scaling" in verdict.issues[-1].what
    verdict = verify_folder(adapter_of("hub/name", tmp_path / "c", own))
    assert [issue.name for issue in verdict.issues] == ["adapter"]
    assert "config is not on this machine" in verdict.issues[0].what
    assert verify_folder(adapter_of(scaled, tmp_path / "d")).well


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no config.json"),
        ("{", "is not JSON"),
        ("[]", "must map keys to values"),
        (json.dumps({"model_type": "gpt2"}), "has no RoPE settings"),
        (json.dumps({"model_type": "x", "rope_theta": 1e4}), "neither head_dim nor hidden_size"),
        (json.dumps({"model_type": "x", "rope_theta": 1e4, "hidden_size": 64}), "incomplete"),
        (json.dumps({**BASE, "rope_scaling": "yarn"}), 'rope_scaling in config.json is "yarn"'),
    ],
)
def test_what_cannot_be_read_is_an_error_with_its_reason(content, words, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(SkipwiseError, match=words):
        verify_folder(tmp_path)


def test_a_folder_that_is_not_there_and_an_adapter_without_its_base_are_errors(tmp_path):
    with pytest.raises(SkipwiseError, match="no such folder"):
        verify_folder(tmp_path / "nowhere")
    with pytest.raises(SkipwiseError, match="is an adapter of hub/name"):
        verify_folder(adapter_of("hub/name", tmp_path / "a"))


def test_the_table_has_a_row_for_each_runtime_and_the_mend_of_each_fault(tmp_path):
    verdict = verify(tmp_path, newer(YARN))
    text = format_verdict(verdict)
    rows = [line for line in text.splitlines() if line.startswith(RUNTIMES)]
    assert [row.split("  ")[0] for row in rows] == list(RUNTIMES)
    assert rows[0].split()[2:] == ["yarn", "500,000", "8", "4,096", "1.2079", "32,768"]
    assert rows[1].split()[2:] == ["default", "10,000", "1", "-", "1.0000", "32,768"]
    assert "FAIL older spelling missing" in text and "fix: add to config.json" in text
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "ok   nothing to fix" in format_verdict(verify(tmp_path, both(YARN)))


def test_a_runtime_that_fails_has_its_reason_in_the_table(tmp_path):
    text = format_verdict(verify(tmp_path, CASES["ntk"]))
    assert "fails: rope_type 'ntk' is unknown" in text


def test_json_has_the_table_and_the_faults(tmp_path):
    out = json.loads(json.dumps(as_json(verify(tmp_path, newer(YARN)))))
    assert out["well"] is False and out["window"] == T
    assert [r["runtime"] for r in out["readings"]] == list(RUNTIMES)
    assert out["readings"][0]["inv_freq_ends"][0] == pytest.approx(1.0)
    assert out["issues"][0]["name"] == "older spelling missing" and out["issues"][0]["fix"]


def test_neither_torch_nor_transformers_is_imported(tmp_path):
    write(tmp_path, {**BASE, **newer(LONGROPE)})
    program = (
        "import sys; from pathlib import Path\n"
        "from skipwise.export.runtimes import format_verdict, verify_folder\n"
        "print(format_verdict(verify_folder(Path(sys.argv[1]))))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "llama.cpp" in done.stdout, done.stderr


GEMMA_4 = {
    "model_type": "gemma4_text",
    "vocab_size": 64,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "max_position_embeddings": T,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.mark.parametrize("factor", [None, 2.0])
@pytest.mark.parametrize("share", [0.25, 0.75, 1.0])
def test_proportional_rope_is_compared_by_its_frequencies(tmp_path, share, factor):
    full = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": share}
    full |= {"factor": factor} if factor else {}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    given = {"full_attention": full, "sliding_attention": plain}
    folder = write(tmp_path, {**GEMMA_4, "rope_parameters": given})
    verdict = verify_folder(folder)
    config = AutoConfig.from_pretrained(folder)
    want = module_frequencies(config).numpy()
    assert want.shape == (16,) and (want > 0).sum() == 16 * share
    assert np.allclose(reading(verdict, "transformers 5").inv_freq, want, rtol=1e-6)
    others = [reading(verdict, name) for name in ("vLLM", "SGLang", "llama.cpp")]
    for other in others:  # none reads the factor
        assert np.allclose(other.inv_freq, want * (factor or 1.0), rtol=1e-6)
    issues = [issue for issue in verdict.issues if issue.name == "other frequencies"]
    assert {name for issue in issues for name in issue.runtimes} == (
        {"vLLM", "SGLang", "llama.cpp"} if factor else set()
    )
