"""llama.cpp itself against transformers, on the bundled model: `make test-gguf` builds it once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_gguf import SCALINGS, YARN, F, rescaled

from skipwise.errors import SkipwiseError
from skipwise.evaluation.tasks.passkey import passkey_trials
from skipwise.export.gguf import convert, find_converter, to_gguf
from skipwise.models.compatibility import make_portable
from skipwise.pipeline.quickstart import MODEL
from skipwise.pose.rope import make_scaling

if not os.environ.get("LLAMA_CPP_TESTS"):
    pytest.skip("make test-gguf", allow_module_level=True)
import llama_cpp

pytestmark = pytest.mark.extended
L, DIM = 256, 64  # of the bundled model
T = F * L
SCALINGS = {**SCALINGS, "longrope": {"name": "longrope"}}  # with YaRN's slowing
CASES = {
    "plain text": "The grass is green. The pass key is 70591. def f(x):\n    return x + 1\n",
    "runs of spaces": "a  b   c\n\n\n\td \t e    \n  ",
    "other scripts": "Ünïcödé 我想在apple工作1314151天～ нещо на Български កាន់តែ 🚀🌫️",
    "numbers and marks": "3 33 333 3333 3.3 3..3 '''```\"\"......!!!??? I've we'LL '' # @#$%^&*()",
}


@pytest.fixture(scope="module")
def converter() -> Path:
    return find_converter()  # tools/fetch_converter.py has put it into the cache folder


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    """(T,) tokens of Python source."""
    from transformers import AutoTokenizer

    text = Path(json.__file__).with_name("decoder.py").read_text()
    return np.array(AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"][:T])


def run_llama_cpp(file: Path, **options: Any) -> Any:
    """A model with keys and values kept in float32; llama.cpp keeps them in float16 unasked."""
    return llama_cpp.Llama(
        str(file),
        n_ctx=T,
        n_batch=512,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        **options,
    )


def logits_of_llama_cpp(file: Path, ids: np.ndarray) -> np.ndarray:
    """(T, V)"""
    model = run_llama_cpp(file, logits_all=True)
    model.eval(ids.tolist())
    return np.array(model.scores[: len(ids)])


def logits_of_transformers(folder: Path, ids: np.ndarray) -> np.ndarray:
    """(T, V)"""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None], use_cache=True).logits[0].numpy()


def compared(folder: Path, file: Path, ids: np.ndarray) -> tuple[float, float]:
    """(largest difference of the logits beyond L, share of equal best tokens there)."""
    want, have = logits_of_transformers(folder, ids)[L:], logits_of_llama_cpp(file, ids)[L:]
    return float(np.abs(have - want).max()), float((have.argmax(1) == want.argmax(1)).mean())


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of large random weights: every angle shows in the logits, and rounding little."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("random") / "llama"
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=L,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SCALINGS)
def test_logits_beyond_the_trained_window_are_those_of_transformers(
    name: str, random_llama: Path, converter: Path, ids: np.ndarray, tmp_path: Path
) -> None:
    rescaled(random_llama, tmp_path / "model", SCALINGS[name], L, 32)
    file = to_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32", converter=converter)
    worst, _ = compared(tmp_path / "model", file, ids)
    unscaled, _ = compared(random_llama, file, ids)
    print(f"{name}: {worst:.1e}, against the unscaled model {unscaled:.1f}")
    assert worst < (3e-4 if "factor" in name else 1e-4)  # 1.5 sharpens attention, and rounding
    assert unscaled > 1


@pytest.mark.parametrize("name", ["linear", "ntk", "yarn"])
def test_a_trained_model_differs_by_rounding_alone(
    name: str, converter: Path, ids: np.ndarray, tmp_path: Path
) -> None:
    """Its logits reach 18; transformers itself is up to 8e-4 from the same in float64."""
    rescaled(MODEL, tmp_path / "model", SCALINGS[name], L, DIM)
    file = to_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32", converter=converter)
    worst, same = compared(tmp_path / "model", file, ids)
    print(f"{name}, trained: {worst:.1e}, {same:.2%} of best tokens the same")
    assert worst < 5e-3
    assert same > 0.998


@pytest.mark.parametrize(
    ("family", "tolerance"),
    [
        ("mixtral", 3e-4),
        ("qwen2", 3e-4),
        ("qwen3", 3e-4),
        ("smollm3", 3e-4),
        ("olmo3", 3e-4),
        ("phi3", 3e-4),
        ("phi", 5e-3),  # llama.cpp looks gelu up in a table, scaled or not
        ("gemma3_text", 5e-3),
    ],
)
def test_other_families_agree_beyond_the_trained_window(
    family: str, tolerance: float, converter: Path, word_splits: dict[str, Any], tmp_path: Path
) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from skipwise.models.hf_config import model_info_of
    from skipwise.models.scaled_config import scaled_config

    torch.manual_seed(0)
    own = {"phi3": {"sliding_window": None}, "phi": {"num_key_value_heads": 2}}
    own["gemma3_text"] = {"query_pre_attn_scalar": 32, "sliding_window": 64}
    own["mixtral"] = {"num_local_experts": 2}
    settings = {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 12 if family == "gemma3_text" else 4,  # two of its patterns
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": L,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        **own.get(family, {}),
    }
    config = CONFIG_MAPPING[family](**settings)
    facts = model_info_of(config)
    scaling = make_scaling(
        "longrope" if family == "phi3" else "yarn",
        factor=F,
        original_length=L,
        theta=facts.rope_theta,
        dim=facts.rotary_dim,
    )
    scaled = scaled_config(config, facts, scaling, T)
    folder = tmp_path / "model"
    if family in ("phi3", "gemma3_text", "mixtral"):
        shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    else:
        byte_level(folder, word_splits["gpt-2"], False)
    model = AutoModelForCausalLM.from_config(scaled)
    model.save_pretrained(folder)
    make_portable(folder)
    shutil.copytree(folder, tmp_path / "plain")
    config.save_pretrained(tmp_path / "plain")
    ids = np.random.default_rng(0).integers(3, 800, T)
    file = to_gguf(folder, tmp_path / "m.gguf", "f32", converter=converter)
    worst, _ = compared(folder, file, ids)
    unscaled, _ = compared(tmp_path / "plain", file, ids)
    print(f"{family}: {worst:.1e}, against the unscaled model {unscaled:.1f}")
    assert worst < tolerance
    assert unscaled > 20 * tolerance


@pytest.mark.parametrize("name", ["yarn, attention factor", "yarn, other turns", "longrope"])
def test_without_mending_they_are_not(
    name: str, converter: Path, ids: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "fix_rope_keys", lambda *_: [])
    rescaled(MODEL, tmp_path / "model", SCALINGS[name], L, DIM)
    with pytest.raises(SkipwiseError, match="would not compute"):
        to_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32", converter=converter)
    monkeypatch.setattr(convert, "check_gguf", lambda *_: [])
    file = to_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32", converter=converter)
    worst, _ = compared(tmp_path / "model", file, ids)
    print(f"{name}, as converted: {worst:.1e}")
    assert worst > 0.1


@pytest.mark.parametrize(
    ("outtype", "tolerance", "share"), [("bf16", 0.5, 0.98), ("f16", 0.5, 0.98), ("q8_0", 1, 0.95)]
)
def test_smaller_types_stay_close(
    outtype: str, tolerance: float, share: float, converter: Path, ids: np.ndarray, tmp_path: Path
) -> None:
    rescaled(MODEL, tmp_path / "model", YARN, L, DIM)
    file = to_gguf(tmp_path / "model", tmp_path / "m.gguf", outtype, converter=converter)
    worst, same = compared(tmp_path / "model", file, ids)
    print(f"{outtype}: {worst:.1e}, {same:.1%} of best tokens the same")
    assert worst < tolerance
    assert same > share


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model: of a run in this checkout, else of one made here (minutes)."""
    made = Path(__file__).parents[1] / "runs" / "quickstart"
    if not (made / "model").is_dir():
        made = tmp_path_factory.mktemp("runs") / "quickstart"
        asked = [
            "quickstart",
            "--out",
            str(made),
            "eval.tasks=[passkey]",
            "eval.passkey_samples=10",
        ]
        subprocess.run([sys.executable, "-m", "skipwise", *asked], check=True)
    return made / "model"


@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
def test_the_quickstart_answers_a_passkey_at_8_times_its_window_through_llama_cpp(
    outtype: str, converter: Path, extended: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(extended)
    file = to_gguf(extended, tmp_path / "m.gguf", outtype, converter=converter)
    model = run_llama_cpp(file)
    trials = passkey_trials(tokenizer, T, num_trials=10, num_depths=10)
    right = 0
    for trial in trials:
        text = tokenizer.decode(trial.prompt)
        answer = tokenizer.decode(trial.input_ids[-trial.num_answer :])
        assert model.tokenize(text.encode()) == trial.prompt  # llama.cpp's own tokenizer
        model.reset()
        said = model.create_completion(text, max_tokens=trial.num_answer, temperature=0)
        right += said["choices"][0]["text"].strip() == answer.strip()
    print(f"passkey at {T}, {outtype}: {right}/{len(trials)}")
    assert len(trials[0].prompt) > T - 40
    assert right >= 9


@pytest.fixture(scope="module")
def word_splits() -> dict[str, Any]:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    from skipwise.export.gguf.tokenizer import _REGEX

    whole = ByteLevel(add_prefix_space=False, use_regex=False)
    own = ByteLevel(add_prefix_space=False)
    splits = {"gpt-2": own, "smollm": Sequence([Digits(individual_digits=True), own])}
    for regex, name in _REGEX.items():
        splits[name] = Sequence([Split(Regex(regex), "isolated"), whole])
    return splits


def byte_level(folder: Path, split: Any, ignore_merges: bool) -> Any:
    """A random Llama whose byte-level BPE was newly trained, which no table of hashes knows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bare.pre_tokenizer, bare.decoder = split, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator([Path(json.__file__).read_text(), *CASES.values()] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>", eos_token="</s>", add_prefix_space=False
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_portable(folder)
    return tokenizer


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_byte_level_tokenizer_with_known_rules_gives_the_same_ids(
    name: str, word_splits: dict[str, Any], converter: Path, tmp_path: Path
) -> None:
    tokenizer = byte_level(tmp_path / "model", word_splits[name], name == "llama-bpe")
    file = to_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32", converter=converter)
    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in CASES.values():
        assert model.tokenize(text.encode(), add_bos=True) == tokenizer(text)["input_ids"], text


def test_a_byte_level_tokenizer_with_other_rules_is_refused(
    converter: Path, tmp_path: Path
) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    split = Sequence([Digits(individual_digits=False), ByteLevel(add_prefix_space=False)])
    byte_level(tmp_path / "model", split, False)
    with pytest.raises(SkipwiseError, match="does not know this tokenizer"):
        to_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32", converter=converter)


def test_the_bundled_tokenizer_gives_the_same_ids(converter: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    rescaled(MODEL, tmp_path / "model", YARN, L, DIM)
    file = to_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32", converter=converter)
    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for text in CASES.values():
        assert model.tokenize(text.encode(), add_bos=True) == tokenizer(text)["input_ids"], text
