"""Conversions: the same logits as the source class, on stock Phi and Llama, in shards."""

import dataclasses
import json
import math

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaForCausalLM,
    PhiForCausalLM,
)

from skipwise.cli import main
from skipwise.errors import SkipwiseError
from skipwise.models import convert
from skipwise.models.configs import read_config
from skipwise.models.convert import conversion_for, convert_model, load_sentencepiece
from skipwise.prepare import load_scaled
from skipwise.quickstart import MODEL
from skipwise.recipe import ModelSettings
from skipwise.run import RunFolder

BAICHUAN = {
    "architectures": ["BaiChuanForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_baichuan.BaiChuanConfig"},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "model_type": "baichuan",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


SHORT = ["training.num_steps=2", "training.global_batch_size=2", "training.learning_rate=1e-2"]
SHORT += ["eval.passkey_trials=0", "eval.perplexity_documents=2", "load.dtype=float32"]


class Baichuan(nn.Module):
    """Baichuan-7B by its definition: one matrix W_pack, rotary halves, and Baichuan2's NormHead.

    Source: baichuan-inc/Baichuan-7B and Baichuan2-7B-Base, modeling_baichuan.py, as described
    there; written here from the definition, for the class itself is remote code.
    """

    def __init__(self, config, norm_head):
        super().__init__()
        self.config, self.norm_head = config, norm_head
        hidden, inner = config["hidden_size"], config["intermediate_size"]

        def linear(rows, columns):
            return nn.Linear(columns, rows, bias=False)

        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], hidden)
        self.model.layers = nn.ModuleList()
        for _ in range(config["num_hidden_layers"]):
            layer = nn.Module()
            layer.self_attn = nn.Module()
            layer.self_attn.W_pack = linear(3 * hidden, hidden)
            layer.self_attn.o_proj = linear(hidden, hidden)
            layer.self_attn.rotary_emb = nn.Module()
            dim = hidden // config["num_attention_heads"]
            inv_freq = 1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim)
            layer.self_attn.rotary_emb.register_buffer("inv_freq", inv_freq)
            layer.mlp = nn.Module()
            layer.mlp.gate_proj, layer.mlp.up_proj = linear(inner, hidden), linear(inner, hidden)
            layer.mlp.down_proj = linear(hidden, inner)
            layer.input_layernorm = nn.RMSNorm(hidden, eps=config["rms_norm_eps"])
            layer.post_attention_layernorm = nn.RMSNorm(hidden, eps=config["rms_norm_eps"])
            self.model.layers.append(layer)
        self.model.norm = nn.RMSNorm(hidden, eps=config["rms_norm_eps"])
        self.lm_head = linear(config["vocab_size"], hidden)

    def forward(self, ids, positions):
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = x + self.attend(layer.self_attn, layer.input_layernorm(x), positions)
            y = layer.post_attention_layernorm(x)
            gate = nn.functional.silu(layer.mlp.gate_proj(y))
            x = x + layer.mlp.down_proj(gate * layer.mlp.up_proj(y))
        weight = self.lm_head.weight
        if self.norm_head:
            weight = nn.functional.normalize(weight)
        return self.model.norm(x) @ weight.T

    def attend(self, attention, x, positions):
        rows, length, hidden = x.shape
        heads = self.config["num_attention_heads"]
        packed = attention.W_pack(x).view(rows, length, 3, heads, -1)
        q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
        angles = positions[:, None, :, None] * attention.rotary_emb.inv_freq
        cos, sin = angles.cos().repeat(1, 1, 1, 2), angles.sin().repeat(1, 1, 1, 2)

        def turn(z):
            first, second = z.chunk(2, -1)
            return z * cos + torch.cat([-second, first], -1) * sin

        scores = turn(q) @ turn(k).transpose(2, 3) / math.sqrt(hidden // heads)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return attention.o_proj((weights @ v).transpose(1, 2).reshape(rows, length, hidden))


def randomise(model):
    """Weights that leave no tensor at zero or one, so that a swapped name shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * (0.2 if parameter.dim() > 1 else 0.1) + (
            0 if parameter.dim() > 1 else 1
        )
    return model.eval()


def save_as(folder, tensors, kind, shards):
    """Weights in one file or several, safetensors or .bin, with an index where they are several."""
    names = sorted(tensors)
    groups = np.array_split(np.array(names), shards)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    places = {}
    for i, group in enumerate(groups):
        name = f"{stem}-{i + 1:05d}-of-{shards:05d}.{kind}" if shards > 1 else f"{stem}.{kind}"
        part = {str(key): tensors[str(key)].clone() for key in group}
        if kind == "safetensors":
            save_file(part, folder / name)
        else:
            torch.save(part, folder / name)
        places |= dict.fromkeys(part, name)
    if shards > 1:
        index = {"weight_map": places}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def gptj():
    config = GPTJConfig(
        vocab_size=1024, n_positions=64, n_embd=64, n_layer=2, n_head=4, rotary_dim=8
    )
    return randomise(GPTJForCausalLM(config))


def save_gptj(model, folder, kind="safetensors", shards=1):
    folder.mkdir()
    model.config.save_pretrained(folder)
    save_as(folder, model.state_dict(), kind, shards)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """SentencePiece models as Baichuan's: BPE with byte fallback; with and without ▁ in front."""
    folder = tmp_path_factory.mktemp("spm")
    text = folder / "text.txt"
    lines = ["def f(x): return x + 1", "the pass key is 81501", "北京是中国的首都", "今天天气很好"]
    text.write_text("\n".join(lines * 20 + ["alpha beta gamma delta", "一二三四五六七八九十"] * 9))
    for prefix in (False, True):
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(folder / f"prefix_{prefix}"),
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            add_dummy_prefix=prefix,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            split_digits=True,
            minloglevel=2,
        )
    return folder


def save_baichuan(folder, spm, norm_head, kind="safetensors", shards=1, prefix=False):
    folder.mkdir()
    config = {**BAICHUAN, "vocab_size": 400}
    if norm_head:
        config |= {"architectures": ["BaichuanForCausalLM"], "z_loss_weight": 0}
    model = randomise(Baichuan(config, norm_head))
    (folder / "config.json").write_text(json.dumps(config))
    options = {"add_bos_token": False, "tokenizer_class": "BaichuanTokenizer"}
    options["auto_map"] = {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    (folder / "tokenization_baichuan.py").write_text("raise SystemExit('this was run')\n")
    (folder / "tokenizer.model").write_bytes((spm / f"prefix_{prefix}.model").read_bytes())
    save_as(folder, model.state_dict(), kind, shards)
    return model


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
        write(*arguments)

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
    assert "Baichuan2-7B, to be converted exactly to llama" in capsys.readouterr().out


def test_load_scaled_converts_for_a_loop_of_ones_own(gptj, tmp_path):
    folder = save_gptj(gptj, tmp_path / "source")
    model, _, facts = load_scaled(str(folder), 256)
    assert type(model) is PhiForCausalLM and facts.original_length == 64
    assert model.config.rope_parameters["rope_type"] == "yarn"


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
    assert "converted" in run.facts()["model"]
    assert len(AutoTokenizer.from_pretrained(run.model)("the pass key")["input_ids"]) > 1
    assert dataclasses.asdict(run.recipe())["model"] == str(source)
