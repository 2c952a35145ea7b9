"""A GGUF file as a source: the unpacked folder computes what the file's model did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from skipwise.cli import main
from skipwise.config.recipe import ModelSettings
from skipwise.errors import SkipwiseError
from skipwise.models.convert.gguf import local_source, unpack_gguf
from skipwise.models.hf_config import load_config, to_dict
from skipwise.models.model_info import read_model_info
from skipwise.pipeline.quickstart import MODEL

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.extended

L, F, HEADS = 512, 4, 2
SAMPLES = ["x  12 and 345", "the <|end|> of\n\n  it", "naïve 😀"]
TEMPLATE = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"
FACTORS = [1.0 + j / 4 for j in range(16)]
ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": F},
    "yarn": {"rope_type": "yarn", "factor": F, "original_max_position_embeddings": L},
    "yarn, own attention": {
        "rope_type": "yarn",
        "factor": F,
        "original_max_position_embeddings": L,
        "attention_factor": 1.3,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": F,
        "original_max_position_embeddings": L,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": F,
        "original_max_position_embeddings": L,
        "long_factor": FACTORS,
        "short_factor": FACTORS,
        "attention_factor": 1.2,
    },
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with SmolLM's rule: digits alone, then GPT-2's words."""
    backend = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|start|>", "<|end|>"], initial_alphabet=alphabet
    )
    backend.train_from_iterator(["the end of it and the   12  34  rest\n\n"] * 4, trainer)
    ends = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **ends)


def make_model(rope: dict[str, Any], tied: bool = True, vocab_size: int = 320) -> LlamaForCausalLM:
    torch.manual_seed(0)
    scaled = rope["rope_type"] not in ("default", "linear")
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        max_position_embeddings=L * F if scaled else L,
        rope_parameters={"rope_theta": 20000.0, **rope},
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def write_vocabulary(writer: Any, tokenizer: Any, rule: str) -> None:
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    merges = tokenizer.backend_tokenizer.model.__getstate__().decode()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([3 if i < 2 else 1 for i in range(len(vocab))])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(merges)["merges"]])
    for key, name in (("bos", "<|start|>"), ("eos", "<|end|>"), ("pad", "<|end|>")):
        getattr(writer, f"add_{key}_token_id")(tokenizer.convert_tokens_to_ids(name))
    writer.add_chat_template(TEMPLATE)


def write_sentencepiece(writer: Any, space: bool) -> None:
    """The bundled model's 1,024 pieces."""
    pieces = SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(i) for i in range(1024)])
    writer.add_token_scores([pieces.get_score(i) for i in range(1024)])
    kinds = [2, 3, 3] + [6 if pieces.is_byte(i) else 1 for i in range(3, 1024)]
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(space)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write_gguf(
    file: Path, model: LlamaForCausalLM, tokenizer: Any, *, quantized: bool = False, **more: Any
) -> Path:
    """What llama.cpp's converter writes of a Llama; `more` are tensors and keys beside it."""
    config, rope = model.config, model.config.rope_parameters
    writer = gguf.GGUFWriter(file, more.pop("architecture", "llama"))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(more.pop("rotary_dim", 32))
    writer.add_vocab_size(config.vocab_size)
    writer.add_license("apache-2.0")
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(L)
        own = 1 + 0.1 * np.log(F) if kind == "yarn" else 1.0  # llama.cpp's own factor of yarn
        if "attention_factor" in rope:
            writer.add_float32("llama.rope.scaling.attn_factor", rope["attention_factor"] / own)
    if kind in ("llama3", "longrope"):
        plain = 20000.0 ** (-np.arange(0, 32, 2) / 32)
        table = FACTORS if kind == "longrope" else plain / model.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", np.array(table, np.float32))
    if "space" in more:
        write_sentencepiece(writer, more.pop("space"))
    else:
        write_vocabulary(writer, tokenizer, more.pop("pre", "smollm"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.numpy().copy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # pairs side by side
            heads = HEADS if "q_proj" in name else 1
            shape = (heads, 2, data.shape[0] // heads // 2, data.shape[1])
            data = data.reshape(shape).swapaxes(1, 2).reshape(data.shape)
        stored, kind = data, None
        if quantized and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            stored = gguf.quants.quantize(data, kind)
        writer.add_tensor(names.get_name(name, (".weight",)), stored, raw_dtype=kind)
    for name, data in more.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.mark.parametrize("kind", ROPE)
def test_an_unpacked_file_computes_the_logits_of_its_model(
    kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model(ROPE[kind], tied=kind != "yarn")
    folder = unpack_gguf(write_gguf(tmp_path / "m.gguf", model, tokenizer))
    again: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 63)[None]
    positions = torch.arange(60)[None] * 31  # far ones: to 1,829
    mask = torch.ones_like(ids)
    with torch.no_grad():
        want, have = (
            m(ids, position_ids=positions, attention_mask=mask).logits for m in (model, again)
        )
    assert want.std() > 0.5 and torch.allclose(have, want, atol=1e-4)
    info = read_model_info(to_dict(load_config(str(folder), ModelSettings())), ask=False)
    assert info.original_length == (L if kind == "default" else L * F)
    assert info.scaling.name == kind.partition(",")[0]
    if kind == "llama3":  # its table names no length
        assert (info.scaling.original_length, info.scaling.high_freq_factor) == (L, 4.0)


def test_its_tokenizer_gives_the_same_ids_template_and_ends(tokenizer: Any, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", make_model(ROPE["default"]), tokenizer)
    own = AutoTokenizer.from_pretrained(unpack_gguf(file))
    for text in SAMPLES:
        assert own(text)["input_ids"] == tokenizer(text)["input_ids"], text
        assert own.decode(own(text)["input_ids"]) == text
    assert own.tokenize("  12") == ["ĠĠ", "1", "2"]  # by GPT-2's rule: "Ġ", "Ġ", "1", "2"
    assert (own.bos_token, own.eos_token, own.chat_template) == ("<|start|>", "<|end|>", TEMPLATE)
    config = load_config(str(unpack_gguf(file)), ModelSettings())
    assert (config.eos_token_id, config.pad_token_id, config.tie_word_embeddings) == (1, 1, True)


def test_llama_3s_rule_keeps_words_of_the_vocabulary_whole(tokenizer: Any, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", make_model(ROPE["default"]), tokenizer, pre="llama-bpe")
    own = AutoTokenizer.from_pretrained(unpack_gguf(file))
    assert own.backend_tokenizer.model.ignore_merges
    assert own.tokenize("a 123") == ["a", "Ġ", "1", "2", "3"]  # no merges of digits here
    split = own.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab1234 c")
    assert [word for word, _ in split] == ["ab", "123", "4", "Ġc"]


def test_sentencepiece_pieces_keep_their_ids_their_space_and_bos(tmp_path: Path) -> None:
    file = write_gguf(
        tmp_path / "m.gguf", make_model(ROPE["default"], vocab_size=1024), None, space=True
    )
    own = AutoTokenizer.from_pretrained(unpack_gguf(file))
    pieces = SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))
    for text in ("a b", "naïve 😀 1"):
        ids = own(text)["input_ids"]
        assert ids[0] == 1  # llama.cpp adds BOS where the file does not say otherwise
        assert "".join(own.convert_ids_to_tokens(ids[1:])).startswith("▁")
        assert ids[1:] == pieces.encode("▁" + text.replace(" ", "▁"))
        assert own.decode(ids, skip_special_tokens=True).strip() == text


def test_quantized_weights_are_the_files_in_bf16(tokenizer: Any, tmp_path: Path) -> None:
    model = make_model(ROPE["default"])
    file = write_gguf(tmp_path / "m.gguf", model, tokenizer, quantized=True)
    again: Any = AutoModelForCausalLM.from_pretrained(unpack_gguf(file))
    assert again.dtype == torch.bfloat16
    kind = gguf.GGMLQuantizationType.Q8_0
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        stored = gguf.quants.quantize(model.state_dict()[name].numpy(), kind)
        want = torch.from_numpy(gguf.quants.dequantize(stored, kind)).bfloat16()
        assert torch.equal(again.state_dict()[name], want)


def test_it_is_unpacked_once_and_again_when_the_file_changes(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_gguf(tmp_path / "m.gguf", make_model(ROPE["default"]), tokenizer)
    first = local_source(str(tmp_path))  # a folder with nothing else
    assert capsys.readouterr().err.count("unpacking") == 1
    assert local_source(str(file)) == first and not capsys.readouterr().err
    assert "license: apache-2.0" in (Path(first) / "README.md").read_text()
    write_gguf(file, make_model(ROPE["yarn"]), tokenizer)
    assert local_source(str(file)) != first
    assert not list(Path(first).parent.glob("*.part"))
    shutil.copy(file, tmp_path / "other.gguf")
    with pytest.raises(SkipwiseError, match=r"holds 2 GGUF files: give one, .*m\.gguf"):
        local_source(str(tmp_path))
    with pytest.raises(SkipwiseError, match=r"none\.gguf: no such file"):
        local_source("none.gguf")
    assert local_source("user/name") == "user/name"  # of a hub


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"architecture": "granite"}, "cannot read the architecture 'granite'.*\n.*safetensors"),
        ({"blk.0.attn_q.bias": np.ones(64, np.float32)}, "reads [0-9,]+ of its [0-9,]+ weights"),
        ({"rotary_dim": 16}, "cannot read|other frequencies"),
        ({"space": False}, "puts no space before a text.*\n.*tokenizer.json"),
        ({"pre": "unheard-of"}, "rule 'unheard-of'.*\nput the original model's tokenizer.json"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_transformers_would_read_wrongly_is_an_error(
    more: dict[str, Any], said: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model(ROPE["default"], vocab_size=1024 if "space" in more else 320)
    file = write_gguf(tmp_path / "m.gguf", model, tokenizer, **more)
    with pytest.raises(SkipwiseError, match=said):
        unpack_gguf(file)
    if "pre" in more:
        tokenizer.save_pretrained(tmp_path)
        own = AutoTokenizer.from_pretrained(unpack_gguf(file))
        assert own(SAMPLES[0])["input_ids"] == tokenizer(SAMPLES[0])["input_ids"]


def test_a_cut_file_is_not_complete(tokenizer: Any, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", make_model(ROPE["default"]), tokenizer)
    file.write_bytes(file.read_bytes()[:20000])
    with pytest.raises(SkipwiseError, match="not a complete GGUF file"):
        unpack_gguf(file)


def test_extend_and_check_and_plan_take_a_file(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(ROPE["default"])
    model.config.max_position_embeddings = 64
    file = write_gguf(tmp_path / "tiny.Q8_0.gguf", model, tokenizer, quantized=True)
    assert main(["plan", str(file), "--to", "128"]) == 0
    assert main(["check", str(file), "--to", "128"]) == 0
    assert "FAIL" not in capsys.readouterr().out
    text = tmp_path / "text"
    text.mkdir()
    for i in range(6):
        (text / f"{i}.txt").write_text(f"the end of it and {i} the rest " * 60)
    out = tmp_path / "run"
    small = ["training.num_steps=2", "training.global_batch_size=2", "rope.type=yarn"]
    small += ["eval.tasks=[perplexity]", "attention_temperature=1.0", "data.separator=eos"]
    assert (
        main(["extend", str(file), "--to", "128", "--data", str(text), "--out", str(out), *small])
        == 0
    )
    again: Any = AutoModelForCausalLM.from_pretrained(out / "model")
    assert again.config.max_position_embeddings == 128
    assert again.config.rope_parameters["rope_type"] == "yarn"
    card = (out / "model" / "README.md").read_text()
    assert "license: apache-2.0" in card and str(tmp_path) not in card
