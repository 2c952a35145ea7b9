"""Conversions: the same logits as the source class, on stock Phi and Llama, in shards."""

import dataclasses
import json

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from sources import BAICHUAN, make_gptj, make_sentencepiece, randomise, save_baichuan, save_gptj
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaForCausalLM,
    PhiForCausalLM,
)

from skipwise.cli import main
from skipwise.config.parse import parse_recipe
from skipwise.config.recipe import ModelSettings
from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError
from skipwise.models import convert
from skipwise.models.convert import conversion_for, convert_model, load_sentencepiece
from skipwise.models.hf_config import read_config
from skipwise.models.load import load_model
from skipwise.models.prepared import convert_weights, load_scaled, prepare_model
from skipwise.pipeline.quickstart import MODEL

SHORT = ["training.num_steps=2", "training.global_batch_size=2", "training.learning_rate=1e-2"]
SHORT += ["rope.type=yarn"]  # a random model tells no scaling from another
SHORT += ["eval.tasks=[perplexity]", "eval.perplexity_windows=2", "load.dtype=float32"]


@pytest.fixture(scope="module")
def gptj():
    return make_gptj()


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    return make_sentencepiece(tmp_path_factory.mktemp("spm"))


def converted(folder, out, settings=None):
    settings = settings or ModelSettings()
    raw = read_config(str(folder), settings)
    if conversion_for(raw).sentencepiece:
        tokenizer = load_sentencepiece(str(folder), settings)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    convert_model(str(folder), raw, settings, out, tokenizer)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


IDS = torch.from_numpy(np.random.default_rng(1).integers(3, 400, (2, 48)))
SKIPPING = torch.cat([torch.arange(20), torch.arange(35, 63)]).expand(2, -1)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@torch.no_grad()
def test_gptj_is_a_phi_with_equal_logits(gptj, tmp_path, kind, shards):
    save_gptj(gptj, tmp_path / "source", kind, shards)
    settings = ModelSettings(use_safetensors=kind == "safetensors")
    model = converted(tmp_path / "source", tmp_path / "out", settings)
    assert type(model) is PhiForCausalLM
    ones = torch.ones_like(IDS)
    want = gptj(IDS, position_ids=SKIPPING, attention_mask=ones).logits
    have = model(IDS, position_ids=SKIPPING, attention_mask=ones).logits
    assert want.std() > 1 and (have - want).abs().max() < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        tokenizer("x = 1")["input_ids"] == AutoTokenizer.from_pretrained(MODEL)("x = 1").input_ids
    )


@pytest.mark.parametrize("norm_head", [False, True])
@pytest.mark.parametrize(("kind", "shards"), [("safetensors", 2), ("bin", 1)])
@torch.no_grad()
def test_baichuan_7b_is_a_llama_with_equal_logits(spm, tmp_path, norm_head, kind, shards):
    source = save_baichuan(tmp_path / "source", spm, norm_head, kind, shards)
    settings = ModelSettings(use_safetensors=kind == "safetensors")
    model = converted(tmp_path / "source", tmp_path / "out", settings)
    assert type(model) is LlamaForCausalLM
    want, have = source(IDS, SKIPPING), model(IDS, position_ids=SKIPPING).logits
    assert want.std() > 0.5 and (have - want).abs().max() < 1e-5
    norms = model.lm_head.weight.norm(dim=1)
    assert torch.allclose(norms, torch.ones(400), atol=1e-5) == norm_head
    assert conversion_for(read_config(str(tmp_path / "source"), settings)).frozen == (
        ("lm_head.weight",) if norm_head else ()
    )


@pytest.mark.parametrize("prefix", [False, True])
def test_a_sentencepiece_tokenizer_gives_its_own_ids_in_plain_transformers(spm, tmp_path, prefix):
    save_baichuan(tmp_path / "source", spm, False, prefix=prefix)
    converted(tmp_path / "source", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(spm / f"prefix_{prefix}.model"))
    for text in ("the pass key is 81501", "  a\n\tb", "北京的天气 ½ 😀 def f(x)", " x", "x "):
        assert tokenizer(text)["input_ids"] == reference.encode(text)  # add_bos_token is false
        assert tokenizer.decode(reference.encode(text)) == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_a_sentencepiece_model_that_transformers_tokenizes_otherwise_is_refused(spm, tmp_path):
    save_baichuan(tmp_path / "source", spm, False)
    sentencepiece.SentencePieceTrainer.train(
        input=str(spm / "text.txt"),
        model_prefix=str(tmp_path / "nfkc"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )  # nfkc, and spaces squeezed
    (tmp_path / "source/tokenizer.model").write_bytes((tmp_path / "nfkc.model").read_bytes())
    with pytest.raises(SkipwiseError, match="gives other tokens in transformers"):
        load_sentencepiece(str(tmp_path / "source"), ModelSettings())


def test_shards_are_bounded_whatever_the_source_has(gptj, tmp_path, monkeypatch):
    save_gptj(gptj, tmp_path / "source")
    monkeypatch.setattr(convert, "_SHARD_BYTES", 100_000)
    held = []
    write = convert._write_shards

    def spy(*arguments):
        from safetensors import torch as module

        original = module.save_file
        monkeypatch.setattr(
            module,
            "save_file",
            lambda tensors, *rest, **more: (
                held.append(sum(t.nbytes for t in tensors.values())),
                original(tensors, *rest, **more),
            ),
        )
        return write(*arguments)

    monkeypatch.setattr(convert, "_write_shards", spy)
    model = converted(tmp_path / "source", tmp_path / "out")
    largest = max(p.nbytes for p in model.parameters())
    assert len(held) > 3 and max(held) < 100_000 + largest
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == len(held)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(held)


def test_a_bin_file_is_read_only_on_request_and_never_run(gptj, tmp_path):
    save_gptj(gptj, tmp_path / "source", "bin")
    with pytest.raises(SkipwiseError, match=r"type load\.use_safetensors=false"):
        converted(tmp_path / "source", tmp_path / "out")

    class Evil:
        def __reduce__(self):
            return (exit, (3,))

    torch.save({"transformer.wte.weight": Evil()}, tmp_path / "source/pytorch_model.bin")
    with pytest.raises(SkipwiseError, match="holds more than weights"):
        converted(tmp_path / "source", tmp_path / "out", ModelSettings(use_safetensors=False))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_something_else_or_a_broken_one_is_refused_whole(gptj, tmp_path):
    folder = save_gptj(gptj, tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "transformer.h.0.adapter.weight": torch.ones(2)}, folder / "model.safetensors"
    )
    with pytest.raises(SkipwiseError, match=r"adapter\.weight is not a tensor of GPT-J"):
        converted(folder, tmp_path / "out")
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(SkipwiseError, match="is broken"):
        converted(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_baichuan_13b_is_refused_for_its_alibi():
    config = {**BAICHUAN, "hidden_size": 5120, "num_attention_heads": 40, "model_max_length": 4096}
    del config["max_position_embeddings"]
    with pytest.raises(SkipwiseError, match=r"ALiBi.*\nchoose Baichuan-7B or Baichuan2-7B"):
        conversion_for(config)
    with pytest.raises(SkipwiseError, match="ALiBi"):
        conversion_for({**BAICHUAN, "hidden_size": 5120})


def test_check_of_a_config_alone_knows_the_conversion(tmp_path, capsys):
    config = {**BAICHUAN, "vocab_size": 125696, "z_loss_weight": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["check", str(tmp_path), "--to", "1k"]) == 0
    assert "Baichuan2-7B, converted exactly to llama" in capsys.readouterr().out


def test_load_scaled_converts_for_a_loop_of_ones_own(gptj, tmp_path):
    folder = save_gptj(gptj, tmp_path / "source")
    model, _, facts = load_scaled(str(folder), 256)
    assert type(model) is PhiForCausalLM and facts.original_length == 64
    assert model.config.rope_parameters["rope_type"] == "yarn"


@pytest.mark.extended
@pytest.mark.parametrize("family", ["gptj", "baichuan2"])
def test_extend_converts_by_itself_and_says_so(family, gptj, spm, tmp_path, capsys):
    source, run = tmp_path / "source", RunFolder(tmp_path / "run")
    if family == "gptj":
        save_gptj(gptj, source)
    else:
        save_baichuan(source, spm, True)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"the pass key is {i}." for i in range(2000)))
    code = main(
        ["extend", str(source), "--to", "256", "--data", str(text), "--out", str(run.path), *SHORT]
    )
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert (
        f"converting {'GPT-J to Phi' if family == 'gptj' else 'Baichuan2-7B to Llama'}" in shown.err
    )
    base = AutoModelForCausalLM.from_pretrained(run.converted)
    model = AutoModelForCausalLM.from_pretrained(run.model)
    assert type(model) is (PhiForCausalLM if family == "gptj" else LlamaForCausalLM)
    assert model.config.rope_parameters["rope_type"] == "yarn"
    changed = {
        name
        for (name, a), b in zip(base.named_parameters(), model.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert "model.embed_tokens.weight" in changed
    assert ("lm_head.weight" in changed) == (family == "gptj")  # NormHead's rows keep their norm
    assert "converted" in run.metadata()["model"]
    assert main(["export", str(run.path)]) == 0, capsys.readouterr().err
    assert len(AutoTokenizer.from_pretrained(run.model)("the pass key")["input_ids"]) > 1
    assert dataclasses.asdict(run.recipe())["model"] == str(source)


@pytest.mark.extended
def test_export_alone_converts_what_lora_was_trained_on(gptj, tmp_path, capsys):
    run = RunFolder(tmp_path / "run")
    save_gptj(gptj, tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"the pass key is {i}." for i in range(2000)))
    command = ["train", str(tmp_path / "source"), "--to", "256", "--data", str(text), "--lora"]
    assert main([*command, "--out", str(run.path), *SHORT]) == 0
    assert main(["export", str(run.path), "--to", "hf,adapter"]) == 0, capsys.readouterr().err
    assert type(AutoModelForCausalLM.from_pretrained(run.model)) is PhiForCausalLM


TEXT = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
HYBRID = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
WRAPPERS = {
    "gemma3": ({"model_type": "gemma3_text", **HYBRID}, {}),
    "mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral"}),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model"}),
}


@pytest.mark.parametrize("names", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize("family", WRAPPERS)
@torch.no_grad()
def test_the_text_model_of_a_wrapper_is_taken_out_on_request(family, names, tmp_path):
    text, vision = WRAPPERS[family]
    config = AutoConfig.for_model(
        family, text_config={**TEXT, **text}, vision_config={**VISION, **vision}
    )
    source = randomise(AutoModelForImageTextToText.from_config(config))
    folder = tmp_path / "source"
    source.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        inner = name.replace("language_model.model.", names).replace("model.language_model.", names)
        tensors[inner] = tensor
    assert any(name.startswith(names) for name in tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SkipwiseError, match=r"type load\.text_only=true"):
        load_scaled(str(folder), 256)
    settings = ModelSettings(text_only=True)
    raw = read_config(str(folder), settings)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    convert_model(str(folder), raw, settings, tmp_path / "out", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    want = source(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    have = model(IDS).logits
    assert want.std() > 0.5 and (have - want).abs().max() < 1e-5
    assert not any("vision" in name for name, _ in model.named_parameters())
    tree = {"model": str(folder), "target_length": 256, "load": {"text_only": True}}
    prepared = convert_weights(prepare_model(parse_recipe(tree)), tmp_path / "out")
    scaled = load_model(prepared.source, prepared.scaled, prepared.load, dtype=torch.float32).eval()
    assert torch.equal(scaled.lm_head.weight, model.lm_head.weight)


def test_a_wrapper_whose_text_model_has_no_class_of_its_own_is_refused():
    config = {"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text"}}
    with pytest.raises(SkipwiseError, match=r"no causal language model.*\(qwen2_5_vl_text\)"):
        conversion_for(config, text_only=True)
    with pytest.raises(SkipwiseError, match="contains no text model"):
        conversion_for({"model_type": "llama"}, text_only=True)


def test_what_a_text_config_leaves_out_is_its_classs_default():
    text = {"model_type": "gemma3_text", "hidden_size": 2560}
    made = conversion_for({"model_type": "gemma3", "text_config": text}, text_only=True)
    config = made.config({"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]})
    assert config["hidden_size"] == 2560 and config["num_attention_heads"] == 8
    assert config["vocab_size"] == 262208 and config["eos_token_id"] == [1, 106]
