"""GGUF: the keys that llama.cpp reads, without llama.cpp; it runs in test_gguf_llama_cpp.py."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.extended

from skipwise.errors import SkipwiseError  # noqa: E402
from skipwise.export.gguf import check_gguf, find_converter, to_gguf  # noqa: E402
from skipwise.export.gguf.keys import fix_rope_keys, llama_cpp_rope  # noqa: E402
from skipwise.models.compatibility import make_portable  # noqa: E402
from skipwise.pose.rope import make_scaling  # noqa: E402

L, F, THETA, DIM = 64, 8, 10000.0, 16
T = L * F
YARN: dict[str, Any] = {"name": "yarn"}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear"},
    "ntk": {"name": "ntk"},
    "yarn": YARN,
    "yarn, attention factor": {**YARN, "attention_factor": 1.5},
    "yarn, other turns": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn, ramp not at whole pairs": {**YARN, "truncate": False},
    "llama3": {"name": "llama3"},
    "longrope": {"name": "longrope", "long_factor": [1.0 + j for j in range(DIM // 2)]},
}

# what the converter does with a Llama's config, without its weights
CONVERTER = """
import json, sys, numpy as np, gguf
from pathlib import Path
folder, out = Path(sys.argv[1]), sys.argv[3]
config = json.loads((folder / "config.json").read_text())
(Path(out).parent / "seen.json").write_text(json.dumps({
    "files": sorted(p.name for p in folder.iterdir()), "config": config,
    "tokenizer": json.loads((folder / "tokenizer_config.json").read_text()),
    "arguments": sys.argv[4:]}))
rope = config["rope_parameters"]
w = gguf.GGUFWriter(out, ARCHITECTURE)
w.add_context_length(config["max_position_embeddings"])
w.add_embedding_length(32)
w.add_head_count(2)
w.add_rope_freq_base(rope["rope_theta"])
w.add_rope_dimension_count(16)
kind = rope["rope_type"]
if kind in ("linear", "yarn"):
    w.add_rope_scaling_type(gguf.RopeScalingType(kind))
    w.add_rope_scaling_factor(rope["factor"])
if kind == "yarn":
    w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if "attention_factor" in rope:
        w.add_float32("llama.rope.scaling.yarn_attn_factor", rope["attention_factor"])
if kind == "longrope":
    w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
w.add_tokenizer_model("llama")
w.add_token_list(["a", "b"])
w.add_bool("tokenizer.ggml.add_bos_token",
           json.loads((folder / "tokenizer_config.json").read_text())["add_bos_token"])
w.add_tensor("token_embd.weight", np.arange(64, dtype=np.float16).reshape(2, 32))
w.add_tensor("blk.0.attn_q.weight", np.arange(34, dtype=np.uint8).reshape(1, 34),
             raw_dtype=gguf.GGMLQuantizationType.Q8_0)
w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
"""


def scaling_of(settings: dict[str, Any], length: int = L, dim: int = DIM) -> Any:
    options = {k: v for k, v in settings.items() if k != "name"}
    return make_scaling(
        settings["name"], factor=F, original_length=length, theta=THETA, dim=dim, **options
    )


def rescaled(
    source: Path, folder: Path, settings: dict[str, Any], length: int = L, dim: int = DIM
) -> Any:
    """A copy of the model folder with this scaling in its config; the scaling is returned."""
    shutil.copytree(source, folder)
    scaling = scaling_of(settings, length, dim)
    lengths = {"original_length": length, "target_length": F * length}
    changes = scaling.to_config(theta=THETA, dim=dim, **lengths)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    make_portable(folder)
    return scaling


def fake(folder: Path, text: str = CONVERTER, architecture: str = "llama") -> Path:
    script = folder / "convert_hf_to_gguf.py"
    script.write_text(text.replace("ARCHITECTURE", repr(architecture)))
    return script


@pytest.mark.parametrize("settings", SCALINGS.values(), ids=SCALINGS)
def test_llama_cpp_will_turn_every_pair_as_the_config_says(
    settings: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    scaling = rescaled(tiny, folder, settings)
    file = to_gguf(folder, tmp_path / "m.gguf", converter=fake(tmp_path))
    reader = gguf.GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tables = {t.name: t.data for t in reader.tensors if t.name.startswith("rope")}
    inv_freq, attention = llama_cpp_rope(keys, tables)
    np.testing.assert_allclose(inv_freq, scaling.inv_freq(THETA, DIM), rtol=1e-6)
    assert attention == pytest.approx(scaling.attention_factor, rel=1e-6)
    assert keys["llama.context_length"] == T
    assert all(check.passed for check in check_gguf(file, folder))


def test_worked_values_of_the_keys(tiny: Path, tmp_path: Path) -> None:
    """1.5 / (1 + 0.1 ln 8) = 1.24178: llama.cpp multiplies by the denominator itself."""
    folder = tmp_path / "model"
    rescaled(tiny, folder, SCALINGS["yarn, attention factor"])
    fields = gguf.GGUFReader(to_gguf(folder, tmp_path / "m.gguf", converter=fake(tmp_path))).fields
    assert fields["llama.rope.scaling.type"].contents() == "yarn"
    assert fields["llama.rope.scaling.factor"].contents() == 8
    assert fields["llama.rope.scaling.original_context_length"].contents() == 64
    assert fields["llama.rope.scaling.attn_factor"].contents() == pytest.approx(1.24178, abs=1e-5)
    assert "llama.rope.scaling.yarn_attn_factor" not in fields  # it would count twice if read


def test_mending_keeps_all_else_to_the_bit(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    rescaled(tiny, folder, SCALINGS["longrope"])
    file = to_gguf(folder, tmp_path / "m.gguf", converter=fake(tmp_path))
    reader = gguf.GGUFReader(file)
    tensors = {t.name: t for t in reader.tensors}
    assert list(tensors) == ["token_embd.weight", "blk.0.attn_q.weight", "rope_freqs.weight"]
    np.testing.assert_array_equal(
        tensors["token_embd.weight"].data, np.arange(64, dtype=np.float16).reshape(2, 32)
    )
    assert tensors["blk.0.attn_q.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight"].data, [np.arange(34)])
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert "llama.rope.scaling.type" not in reader.fields  # longrope would leave the table unread


def test_numbers_are_mended_where_they_stand_and_a_right_file_is_left_alone(
    tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    rescaled(tiny, folder, YARN)
    file = to_gguf(folder, tmp_path / "m.gguf", converter=fake(tmp_path))
    before = file.read_bytes()
    assert fix_rope_keys(file, folder) == []
    assert file.read_bytes() == before
    for key, wrong in (("rope.scaling.factor", 4.0), ("context_length", L)):
        field = (reader := gguf.GGUFReader(file, "r+")).fields[f"llama.{key}"]
        field.parts[field.data[0]][0] = wrong
        reader.data.flush()
    failed = {check.name for check in check_gguf(file, folder) if not check.passed}
    assert failed == {"gguf rope", "gguf attention factor", "gguf context length"}
    assert fix_rope_keys(file, folder) == ["llama.rope.scaling.factor", "llama.context_length"]
    assert file.read_bytes() == before


def test_a_file_without_its_scaling_is_told_from_the_models(tiny: Path, tmp_path: Path) -> None:
    rescaled(tiny, tmp_path / "plain", {"name": "ntk"})
    rescaled(tiny, tmp_path / "model", SCALINGS["linear"])
    file = to_gguf(tmp_path / "plain", tmp_path / "m.gguf", converter=fake(tmp_path))
    checks = {check.name: check for check in check_gguf(file, tmp_path / "model")}
    assert not checks["gguf rope"].passed
    assert (
        "1 for the frequency of pair 0 of 8, and linear by 8 has 0.125"
        in checks["gguf rope"].detail
    )
    assert checks["gguf context length"].passed


def test_a_bos_that_training_never_saw_is_told(tiny: Path, tmp_path: Path) -> None:
    rescaled(tiny, tmp_path / "model", YARN)
    text = CONVERTER.replace('["add_bos_token"])', '["add_bos_token"] or True)')
    with pytest.raises(SkipwiseError, match="begins with BOS, and in training it begins without"):
        to_gguf(tmp_path / "model", tmp_path / "m.gguf", converter=fake(tmp_path, text))
    assert not list(tmp_path.glob("*.gguf*"))


def test_the_converter_sees_no_code_and_the_true_length(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    rescaled(tiny, folder, SCALINGS["linear"])
    (folder / "tokenization.py").write_text("raise SystemExit('ran')")
    for name in ("config.json", "tokenizer_config.json"):
        held = json.loads((folder / name).read_text())
        held["auto_map"] = {"AutoTokenizer": ["tokenization.Mine", None]}
        (folder / name).write_text(json.dumps(held))
    to_gguf(folder, tmp_path / "m.gguf", "q8_0", converter=fake(tmp_path), name="mine")
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert "model.safetensors" in seen["files"]
    assert not [name for name in seen["files"] if name.endswith(".py")]
    assert "auto_map" not in seen["config"] and "auto_map" not in seen["tokenizer"]
    assert seen["config"]["max_position_embeddings"] == T
    assert seen["arguments"] == ["--outtype", "q8_0", "--model-name", "mine"]
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == L


@pytest.mark.parametrize(
    ("stderr", "told"),
    [
        ("ModuleNotFoundError: No module named 'google.protobuf'", "pip install protobuf"),
        ("ERROR:hf-to-gguf:Model XForCausalLM is not supported", "a newer llama.cpp"),
        (
            "NotImplementedError: BPE pre-tokenizer was not recognized - update",
            "split text differently",
        ),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("KeyError: 'rope'", "failed: KeyError: 'rope'"),
    ],
)
def test_a_failed_conversion_says_why_and_leaves_what_was_there(
    stderr: str, told: str, tiny: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "model", tmp_path / "m.gguf"
    rescaled(tiny, folder, YARN)
    out.write_text("older")
    script = f"import sys; open(sys.argv[3], 'w'); sys.exit({stderr!r})"
    with pytest.raises(SkipwiseError, match=told.replace("(", r"\(")):
        to_gguf(folder, out, converter=fake(tmp_path, script))
    assert out.read_text() == "older" and not list(tmp_path.glob("*.part"))


def test_what_llama_cpp_cannot_compute_is_refused_before_any_work(
    tiny: Path, tmp_path: Path
) -> None:
    none = tmp_path / "none.py"
    cases = {
        "no dynamic scaling": {"rope_type": "dynamic", "factor": 8.0},
        "no keys for this llama3 scaling, and takes no table of frequencies for Qwen2": {
            **scaling_of(SCALINGS["llama3"]).to_config(
                theta=THETA, dim=DIM, original_length=L, target_length=T
            )["rope_parameters"]
        },
        "short_factor or long_factor": {
            "rope_type": "longrope",
            "factor": 8.0,
            "original_max_position_embeddings": L,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
        },
        "no keys for this yarn scaling, and takes no table of frequencies for Qwen2": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": L,
            "beta_fast": 8.0,
        },
    }
    for i, (told, parameters) in enumerate(cases.items()):
        folder = tmp_path / str(i)
        shutil.copytree(tiny, folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"rope_parameters": {"rope_theta": THETA, **parameters}}
        config |= {"max_position_embeddings": T}
        if "Qwen2" in told:
            config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(SkipwiseError, match=told):
            to_gguf(folder, tmp_path / "m.gguf", converter=none)
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0, "attention_factor": 1.5}
    yarn["original_max_position_embeddings"] = L
    sliding = {"rope_type": "default", "rope_theta": THETA}
    config |= {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    config |= {"rope_parameters": {"full_attention": yarn, "sliding_attention": sliding}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SkipwiseError, match="would also multiply the sliding layers"):
        to_gguf(folder, tmp_path / "m.gguf", converter=none)
    with pytest.raises(SkipwiseError, match="'q4' is not a GGUF output type: choose f16"):
        to_gguf(tiny, tmp_path / "m.gguf", "q4", converter=none)


def test_an_architecture_that_scales_in_its_own_way_is_not_vouched_for(
    tiny: Path, tmp_path: Path
) -> None:
    rescaled(tiny, tmp_path / "model", YARN)
    with pytest.raises(SkipwiseError, match="has its own scaling"):
        to_gguf(
            tmp_path / "model", tmp_path / "m.gguf", converter=fake(tmp_path, architecture="grok")
        )


def test_the_converter_is_found_or_how_to_get_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SkipwiseError, match="type git clone"):
        find_converter()
    with pytest.raises(SkipwiseError, match=r"no convert_hf_to_gguf\.py"):
        find_converter(str(tmp_path))
    places = [tmp_path / "home/llama.cpp", tmp_path / "llama.cpp", tmp_path / "env"]
    for place in places:
        place.mkdir(parents=True)
        fake(place)
    assert find_converter() == places[0] / "convert_hf_to_gguf.py"  # not the current folder's
    monkeypatch.setenv("LLAMA_CPP", str(places[2]))
    assert find_converter() == places[2] / "convert_hf_to_gguf.py"
    assert find_converter(str(places[0])) == places[0] / "convert_hf_to_gguf.py"
    assert find_converter(str(places[0] / "convert_hf_to_gguf.py")).parent == places[0]


def test_a_missing_gguf_package_says_what_to_type(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SkipwiseError, match=r"pip install '\.\[gguf\]'"):
        to_gguf(tiny, tmp_path / "m.gguf", converter=tmp_path)
    (tmp_path / "x.gguf").write_text("not one")
    monkeypatch.undo()
    with pytest.raises(SkipwiseError, match="not a complete GGUF file"):
        check_gguf(tmp_path / "x.gguf", tiny)
