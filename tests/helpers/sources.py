"""Tiny checkpoints of the families that are converted, and a reference of Baichuan's class."""

import json
import math

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, GPTJConfig, GPTJForCausalLM

from skipwise.pipeline.quickstart import MODEL

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
            x = x + self.flex_attention_forward(
                layer.self_attn, layer.input_layernorm(x), positions
            )
            y = layer.post_attention_layernorm(x)
            gate = nn.functional.silu(layer.mlp.gate_proj(y))
            x = x + layer.mlp.down_proj(gate * layer.mlp.up_proj(y))
        weight = self.lm_head.weight
        if self.norm_head:
            weight = nn.functional.normalize(weight)
        return self.model.norm(x) @ weight.T

    def flex_attention_forward(self, attention, x, positions):
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


def make_gptj():
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


def make_sentencepiece(folder):
    """SentencePiece models as Baichuan's: BPE with byte fallback; with and without ▁ in front."""
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
