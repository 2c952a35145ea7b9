"""A stand-in of a hub kernel: FlashAttention's two functions in plain torch, for transformers."""

from types import ModuleType

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations import hub_kernels
from transformers.utils import import_utils

NAME = "kernels-community/flash-attn2"


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **_):
    """q, k, v: (B, L, heads, width), as FlashAttention takes them."""
    assert dropout_p == 0.0
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None
    if causal:  # at the end of the keys, as FlashAttention aligns it
        queries, keys = q.shape[2], k.shape[2]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    out = scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, dropout_p=0.0,
    softmax_scale=None, causal=False, **_,
):  # fmt: skip
    """q, k, v: (tokens of all sequences, heads, width)."""
    limits = zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False)
    others = zip(cu_seqlens_k.tolist(), cu_seqlens_k.tolist()[1:], strict=False)
    parts = [
        flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], dropout_p, softmax_scale, causal)
        for (a, b), (c, d) in zip(limits, others, strict=True)
    ]
    return torch.cat([part[0] for part in parts])


def install(monkeypatch):
    """Let transformers find the kernels package, and in it this kernel; what it loads is listed."""
    loaded = []

    def get_kernel(name, **options):
        loaded.append((name, bool(options.get("allow_all_kernels"))))
        kernel = ModuleType("stand_in_kernel")
        kernel.flash_attn_func = flash_attn_func
        kernel.flash_attn_varlen_func = flash_attn_varlen_func
        return kernel

    monkeypatch.setattr(import_utils, "is_kernels_available", lambda *_: True)
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *_: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", get_kernel)
    return loaded
