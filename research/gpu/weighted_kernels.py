"""Attention with a weight for each chunk's keys: the candidates that are one call of a kernel.

Shapes:  B = batch, L = tokens, N = chunks, H = heads (K of keys), D = their width
"""

import functools
import math
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from skipwise.models.attention.flex import flex_attention_forward
from skipwise.models.attention.masks import pack_key_weights, with_chunk_weights

aten = torch.ops.aten


class Layout:
    """The chunks of a batch, and what the candidates make of them once a batch.

    chunk_ids (B, L) int32, key_weights (B, L) float32; `host` are the lengths, by row, on the host.
    """

    def __init__(self, chunk_ids, key_weights, num_chunks, host=None):
        self.chunk_ids, self.key_weights = chunk_ids, key_weights
        self.num_chunks, self.host, self.made = num_chunks, host, {}

    @classmethod
    def of(cls, examples, device):
        rows = [
            np.stack([np.repeat(np.arange(len(e.lengths)), e.lengths) for e in examples]),
            np.stack([np.repeat(e.log_weights(), e.lengths) for e in examples]),
        ]
        ids, weights = (torch.from_numpy(r).to(device) for r in rows)
        host = [e.lengths.tolist() for e in examples]
        made = cls(ids.int(), weights.float(), max(len(e.lengths) for e in examples), host)
        made.examples = examples
        return made

    def without_weights(self):
        return Layout(self.chunk_ids, torch.zeros_like(self.key_weights), self.num_chunks)

    def batch(self):
        """What `skipwise train`'s collator sends in a mask's stead."""
        return {"chunk_ids": self.chunk_ids, "key_weights": self.key_weights}

    def once(self, key, make):
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def bias(self):
        """(B, 1, L, L) float32 without the causal part."""
        same = self.chunk_ids[:, :, None] == self.chunk_ids[:, None, :]
        return self.key_weights[:, None, :].masked_fill(same, 0.0)[:, None]


def carrier_of(chunks, host=False):
    """(B, 1, 2, L) float32: chunk ids, key weights. 4-D, so transformers hands it on untouched."""
    carrier = torch.stack([chunks.chunk_ids.float(), chunks.key_weights], 1)[:, None]
    carrier.num_chunks = chunks.num_chunks
    if host:
        carrier.made = chunks
    return carrier


def layout_of(carrier):
    """From the carrier; made in the first layer, kept on the tensor for the others."""
    if isinstance(carrier, Layout):
        return carrier
    if not hasattr(carrier, "made"):
        ids, weights = carrier[:, 0, 0].int().contiguous(), carrier[:, 0, 1].float().contiguous()
        count = getattr(carrier, "num_chunks", None) or int(ids.max()) + 1  # waits for the GPU
        carrier.made = Layout(ids, weights, count)
    return carrier.made


def reference(q, k, v, grad, chunks, scale):
    """out (B, L, H, D), dq, dk, dv in float32, a key head at a time."""
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    bias = chunks.bias().masked_fill(future, -math.inf)
    found = []
    for head in range(k.shape[1]):
        own = slice(head * group, (head + 1) * group)
        wanted = (q[:, own], k[:, head : head + 1], v[:, head : head + 1])
        q_, k_, v_ = (t.detach().float().requires_grad_() for t in wanted)
        out = ((q_ @ k_.transpose(-1, -2)) * scale + bias).softmax(-1) @ v_
        upstream = grad.transpose(1, 2)[:, own].float()
        found.append([out.detach(), *torch.autograd.grad(out, (q_, k_, v_), upstream)])
    out, *grads = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return [out.transpose(1, 2), *grads]


# --- 0 and 1: sdpa as transformers calls it, with and without the mask


def with_sdpa(q, k, v, mask, scale):
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=True)
    return sdpa_attention_forward(module, q, k, v, mask, scaling=scale)[0]


def unweighted(q, k, v, chunks, scale):
    return with_sdpa(q, k, v, None, scale)


def forced(backend):
    def flex_attention_forward(q, k, v, chunks, scale):
        with sdpa_kernel(backend):
            return unweighted(q, k, v, chunks, scale)

    return flex_attention_forward


def additive(q, k, v, chunks, scale):
    chunks = layout_of(chunks)
    make = lambda: with_chunk_weights(chunks.batch(), q.dtype)["attention_mask"]  # noqa: E731
    return with_sdpa(q, k, v, chunks.once(("mask", q.dtype), make), scale)


# --- 2: flex_attention; what skipwise trains with, and an exact short cut for N = 2


def flex(q, k, v, chunks, scale):
    chunks = layout_of(chunks)
    carrier = chunks.once("carrier", lambda: pack_key_weights(chunks.batch())["attention_mask"])
    return flex_attention_forward(None, q, k, v, carrier, scaling=scale)[0]


def flex_by_key(q, k, v, key_weights, block_mask, scale):
    """N = 2: the first chunk's queries see keys of one weight, which the softmax cancels."""

    def score(score, b, h, i, j):
        return score + key_weights[b, j]

    gqa = q.shape[1] != k.shape[1]
    return flex_attention(
        q, k, v, score_mod=score, block_mask=block_mask, scale=scale, enable_gqa=gqa
    )


@functools.cache
def causal_blocks(length, device):
    causal = lambda b, h, i, j: i >= j  # noqa: E731
    return create_block_mask(causal, None, None, length, length, device=device)


@functools.cache
def compiled(function):
    return torch.compile(function, dynamic=False)


def flex_keys(q, k, v, chunks, scale):
    blocks = causal_blocks(q.shape[2], q.device)
    call = compiled(flex_by_key) if q.is_cuda else flex_by_key
    out = call(q, k, v, layout_of(chunks).key_weights, blocks, scale)
    return out.transpose(1, 2).contiguous()


# --- 3: the weight as further features of queries and keys


def extras(chunks, dtype, scale):
    """(B, 1, L, F) for queries and keys; high and low part, for bf16 alone is 0.4 % off."""
    index = torch.arange(chunks.num_chunks - 1, device=chunks.chunk_ids.device)
    ids = chunks.chunk_ids[:, None, :, None]
    weight = chunks.key_weights[:, None, :, None] / scale
    weight = torch.where(ids == index, weight, 0.0)
    high = weight.to(dtype)
    low = (weight - high.float()).to(dtype)
    later = (ids > index).to(dtype)
    pad = (0, -2 * len(index) % 8)
    return F.pad(torch.cat([later, later], -1), pad), F.pad(torch.cat([high, low], -1), pad)


def widened(q, k, chunks, scale):
    chunks = layout_of(chunks)
    by_query, by_key = chunks.once(("extras", q.dtype), lambda: extras(chunks, q.dtype, scale))
    both = ((q, by_query), (k, by_key))
    return [torch.cat([t, more.expand(-1, t.shape[1], -1, -1)], -1) for t, more in both]


def features(q, k, v, chunks, scale):
    wide_q, wide_k = widened(q, k, chunks, scale)
    wide_v = F.pad(v, (0, wide_k.shape[-1] - v.shape[-1]))
    out = with_sdpa(wide_q, wide_k, wide_v, None, scale)
    return out[..., : v.shape[-1]].contiguous()


def cudnn(q, k, v, bias, scale):
    """cuDNN's causal kernel with a bias beside the flag, which sdpa itself does not offer."""
    given = (q, k, v, bias, True, 0.0, True, False)
    return aten._scaled_dot_product_cudnn_attention(*given, scale=scale)[0].transpose(1, 2)


def features_cudnn(q, k, v, chunks, scale):
    return cudnn(*widened(q, k, chunks, scale), v, None, scale).contiguous()


def bias_cudnn(q, k, v, chunks, scale):
    chunks = layout_of(chunks)
    bias = chunks.once(("bias", q.dtype), lambda: chunks.bias().to(q.dtype))
    return cudnn(q, k, v, bias, scale).contiguous()


def bias_cudnn_by_key(q, k, v, chunks, scale):
    bias = layout_of(chunks).key_weights[:, None, None, :].to(q.dtype)
    return cudnn(q, k, v, bias, scale).contiguous()
