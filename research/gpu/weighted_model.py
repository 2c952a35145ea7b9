"""The candidates of weighted_attention.py by name, alone in a layer and inside a model's step.

Shapes:  B = batch, L = tokens, H = heads (K of keys), D = their width
"""

import numpy as np
import torch
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask
from weighted_kernels import (
    Layout,
    additive,
    bias_cudnn,
    bias_cudnn_by_key,
    carrier_of,
    features,
    features_cudnn,
    flex,
    flex_keys,
    forced,
    unweighted,
    with_sdpa,
)
from weighted_pieces import device_pieces, host_pieces, pieces

from skipwise.models.attention.masks import FLEX, pack_key_weights, with_chunk_weights
from skipwise.pose.samplers import Example, PoSE

CANDIDATES = {  # (q, k, v, chunks, scale): (B, H, L, D), (B, K, L, D) twice, to (B, L, H, D)
    "unweighted": unweighted,
    "unweighted flash": forced(SDPBackend.FLASH_ATTENTION),
    "unweighted cudnn": forced(SDPBackend.CUDNN_ATTENTION),
    "mask": additive,
    "flex": flex,
    "flex keys": flex_keys,
    "features": features,
    "features cudnn": features_cudnn,
    "bias cudnn": bias_cudnn,
    "bias cudnn keys": bias_cudnn_by_key,
    "pieces flash": pieces("flash", device_pieces),
    "pieces flash host": pieces("flash", host_pieces),
    "pieces plain": pieces("plain", device_pieces),  # of the checks
    "pieces plain host": pieces("plain", host_pieces),
}


def layout(length, batch, chunks, rng, device, plain_row=False):
    sampler = PoSE(train_length=length, target_length=16 * length, num_chunks=chunks)
    examples = [sampler.sample(rng, 16 * length) for _ in range(batch)]
    if plain_row:  # an example of one chunk among the others
        zero = np.zeros(1, np.int64)
        examples[0] = Example(lengths=np.array([length]), position_starts=zero, text_starts=zero)
    positions = torch.from_numpy(np.stack([e.position_ids() for e in examples])).to(device)
    return Layout.of(examples, device), positions


def fresh(heads, length, batch, device, dtype=torch.bfloat16):
    """q, k, v and a gradient with the strides they have in a model."""
    H, K, D = heads
    made = [torch.randn(batch, length, h, D, device=device, dtype=dtype) for h in (H, K, K, H)]
    *qkv, grad = [t.transpose(1, 2) for t in made]
    return [t.requires_grad_() for t in qkv], grad.transpose(1, 2)


def run(flex_attention_forward, qkv, chunks, grad):
    out = flex_attention_forward(*qkv, chunks, qkv[0].shape[-1] ** -0.5)
    return [out, *torch.autograd.grad(out, qkv, grad)]


def errors(found, expected):
    names = ("out", "dq", "dk", "dv")
    pairs = zip(names, found, expected, strict=True)
    return {n: float((a.detach().float() - b).norm() / b.norm()) for n, a, b in pairs}


def register(name, seen=None):
    """`name` as an attention of transformers: a (B, 1, 2, L) mask carries the chunks to it."""

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        if seen is not None:  # of the checks
            seen.append(attention_mask)
        known = CANDIDATES[name]
        if attention_mask is None or attention_mask.shape[-2] != 2:
            known = with_sdpa  # a plain batch, a sliding layer
        return known(query, key, value, attention_mask, scaling), None

    implementation = "weighted_" + name.replace(" ", "_")
    AttentionInterface.register(implementation, attention)
    AttentionMaskInterface.register(implementation, sdpa_mask)
    return implementation


class Step:
    """Forward and backward of a model's loss, on chunks that differ from step to step."""

    def __init__(self, widths, length, batch, num_layers=4, vocabulary=32000, device="cuda"):
        hidden, intermediate, (H, K, D) = widths
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=num_layers,
            num_attention_heads=H,
            num_key_value_heads=K,
            head_dim=D,
            max_position_embeddings=16 * length,
            use_cache=False,
        )
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with torch.device(device):
            self.model = LlamaForCausalLM(config).to(dtype).train()
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.ids = torch.randint(0, vocabulary, (batch, length), device=device)
        self.dtype, self.device, self.shape = dtype, device, (length, batch)

    def layouts(self, count, num_chunks, rng):
        return [layout(*self.shape, num_chunks, rng, self.device) for _ in range(count)]

    def __call__(self, name, chunks, positions):
        batch = {"input_ids": self.ids, "labels": self.ids, "position_ids": positions}
        implementation = "sdpa"
        if name == "unweighted":
            batch["attention_mask"] = torch.ones_like(self.ids)
        elif name == "mask":
            batch = with_chunk_weights({**batch, **chunks.batch()}, self.dtype)
        elif name == "flex":  # as skipwise trains
            implementation = FLEX
            batch = pack_key_weights({**batch, **chunks.batch()})
        else:
            implementation = register(name)
            batch["attention_mask"] = carrier_of(chunks, host=name.endswith("host"))
        self.model.config._attn_implementation = implementation
        self.model.zero_grad(set_to_none=True)
        loss = self.model(**batch).loss
        loss.backward()
        return loss.detach()
