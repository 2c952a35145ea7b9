"""Weighted attention in pieces of one weight each, merged by their log-sum-exps, as in a ring.

Candidates 4 of weighted_attention.py. cuDNN's kernels were tried for the pieces as well and left
out: infinite gradients, 40 times the time (results/weighted_attention_2026-11-26.json).

Shapes:  B = batch, L = tokens, N = chunks, H = heads (K of keys), D = their width, T = B x L
"""

import math
import os
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from weighted_kernels import layout_of

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU wheel of torch
    triton = None

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some tokens' queries on some tokens' keys; `weight` is added to all logits of a query."""

    causal: bool
    queries: slice  # of the T tokens
    keys: slice
    ends_q: torch.Tensor | None  # (sequences + 1,) int32 cumulative; None: one sequence
    ends_k: torch.Tensor | None
    max_q: int
    max_k: int
    weight: torch.Tensor | None = None  # (queries,), -inf: the piece has no key for the query
    shift: torch.Tensor | None = None  # (queries,), the weight, 0 where that is -inf
    keys_used: torch.Tensor | None = None  # (keys,) int32; None: all


def cumulative(lengths):
    return F.pad(lengths.flatten().cumsum(0), (1, 0)).int()


def device_pieces(chunks):
    """N varlen calls over all tokens; lengths stay on the device, so nothing waits for them.

    In a row a chunk's keys meet the later queries alone: other tokens are in sequences without
    keys or without queries.
    """
    ids, L, N = chunks.chunk_ids, chunks.chunk_ids.shape[1], chunks.num_chunks
    everything = slice(0, ids.numel())
    index = torch.arange(N, device=ids.device)
    lengths = (ids[:, :, None] == index).sum(1)  # (B, N)
    ends = lengths.cumsum(1)
    weights = chunks.key_weights.gather(1, (ends - 1))  # (B, N)
    sizes = {"queries": everything, "keys": everything, "max_q": L, "max_k": L}
    whole = cumulative(lengths)
    pieces = [Piece(causal=True, ends_q=whole, ends_k=whole, **sizes)]
    for c in range(N - 1):
        end, length = ends[:, c], lengths[:, c]
        none, rest = torch.zeros_like(end), L - end
        later = ids > c
        weight = torch.where(later, weights[:, c : c + 1], -math.inf).flatten()
        pieces.append(
            Piece(
                causal=False,
                ends_q=cumulative(torch.stack([none, end, rest, none], 1)),
                ends_k=cumulative(torch.stack([end - length, none, length, rest], 1)),
                weight=weight,
                shift=torch.where(later.flatten(), weight, 0.0),
                keys_used=(ids == c).int().flatten(),
                **sizes,
            )
        )
    return pieces


def host_pieces(chunks):
    """The diagonal as above; then a dense call on slices for each chunk of each row."""
    L = chunks.chunk_ids.shape[1]
    pieces = device_pieces(chunks)[:1]
    for row, lengths in enumerate(chunks.host):
        start, at = 0, row * L
        for length in lengths[:-1]:
            end = start + length
            weight = chunks.key_weights[row, start].expand(L - end).contiguous()
            pieces.append(
                Piece(
                    causal=False,
                    queries=slice(at + end, at + L),
                    keys=slice(at + start, at + end),
                    ends_q=None,
                    ends_k=None,
                    max_q=L - end,
                    max_k=length,
                    weight=weight,
                    shift=weight,
                )
            )
            start = end
    return pieces


def flash_forward(q, k, v, piece, scale):
    dense = piece.ends_q is None
    q, k, v = (t[None] if dense else t for t in (q, k, v))
    sizes = (piece.ends_q, piece.ends_k, piece.max_q, piece.max_k)
    out, lse, *state = aten._flash_attention_forward(
        q, k, v, *sizes, 0.0, piece.causal, False, scale=scale
    )
    out, lse = (out[0], lse[0]) if dense else (out, lse)
    assert lse.shape == (out.shape[1], out.shape[0]), f"log-sum-exp of shape {tuple(lse.shape)}"
    return out, lse, state[:2]


def flash_backward(grad, q, k, v, out, lse, state, piece, scale):
    dense = piece.ends_q is None
    given = [t[None] if dense else t for t in (grad, q, k, v, out, lse)]
    sizes = (piece.ends_q, piece.ends_k, piece.max_q, piece.max_k)
    grads = aten._flash_attention_backward(*given, *sizes, 0.0, piece.causal, *state, scale=scale)
    return [g[0] for g in grads] if dense else grads


def sequences(piece, q, k):
    if piece.ends_q is None:
        return [(slice(0, len(q)), slice(0, len(k)))]
    both = zip(*(pairwise(ends.tolist()) for ends in (piece.ends_q, piece.ends_k)), strict=True)
    return [(slice(*a), slice(*b)) for a, b in both]


def plain_logits(q, k, piece, scale):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = torch.einsum("ihd,jhd->hij", q, k) * scale
    return logits.tril().masked_fill_(ones_above(logits), -math.inf) if piece.causal else logits


def ones_above(logits):
    return torch.ones_like(logits, dtype=torch.bool).triu(1)


def plain_forward(q, k, v, piece, scale):
    """The stand-in of the checks; what a kernel may leave unwritten is NaN."""
    out, lse = torch.full_like(q, math.nan), torch.full((q.shape[1], len(q)), math.inf)
    for at, of in sequences(piece, q, k):
        if at.stop > at.start and of.stop > of.start:
            logits = plain_logits(q[at], k[of], piece, scale)
            values = v[of].repeat_interleave(q.shape[1] // v.shape[1], 1)
            lse[:, at] = logits.logsumexp(-1)
            out[at] = torch.einsum("hij,jhd->ihd", logits.softmax(-1), values)
    return out, lse, ()


def plain_backward(grad, q, k, v, out, lse, state, piece, scale):
    """As flash does it: P from the given log-sum-exp, dS from the given out."""
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.full_like(t, math.nan) for t in (q, k, v))
    for at, of in sequences(piece, q, k):
        if at.stop > at.start and of.stop > of.start:
            P = (plain_logits(q[at], k[of], piece, scale) - lse[:, at, None]).exp()
            keys, values = (t[of].repeat_interleave(group, 1) for t in (k, v))
            dP = torch.einsum("ihd,jhd->hij", grad[at], values)
            dS = P * (dP - (grad[at] * out[at]).sum(-1).t()[:, :, None]) * scale
            dq[at] = torch.einsum("hij,jhd->ihd", dS, keys)
            by_head = (
                torch.einsum("hij,ihd->jhd", dS, q[at]),
                torch.einsum("hij,ihd->jhd", P, grad[at]),
            )
            dk[of], dv[of] = (t.unflatten(1, (-1, group)).sum(2) for t in by_head)
    return dq, dk, dv


KERNELS = {"flash": (flash_forward, flash_backward), "plain": (plain_forward, plain_backward)}

if triton is not None:

    @triton.jit
    def merge_kernel(
        out, lse, more, more_lse, weight, stride, more_stride,
        H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0)
        add = tl.load(weight + token)
        if add > -1e30:
            h, d = tl.arange(0, HEADS), tl.arange(0, WIDTH)
            a = tl.load(lse + h * stride + token, h < H, 0.0)
            b = tl.load(more_lse + h * more_stride + token, h < H, 0.0) + add
            top = tl.maximum(a, b)
            total = top + tl.log(tl.exp(a - top) + tl.exp(b - top))
            at = token * H * D + h[:, None] * D + d[None, :]
            inside = (h[:, None] < H) & (d[None, :] < D)
            x = tl.load(out + at, inside, 0.0).to(tl.float32) * tl.exp(a - total)[:, None]
            y = tl.load(more + at, inside, 0.0).to(tl.float32) * tl.exp(b - total)[:, None]
            tl.store(out + at, (x + y).to(out.dtype.element_ty), inside)
            tl.store(lse + h * stride + token, total, h < H)

    @triton.jit
    def add_kernel(into, more, used, ROW: tl.constexpr, WIDTH: tl.constexpr):
        token = tl.program_id(0)
        if tl.load(used + token) != 0:
            i = tl.arange(0, WIDTH)
            at = token * ROW + i
            x = tl.load(into + at, i < ROW, 0.0).to(tl.float32)
            y = tl.load(more + at, i < ROW, 0.0).to(tl.float32)
            tl.store(into + at, (x + y).to(into.dtype.element_ty), i < ROW)


def by_triton(tensor):
    return triton is not None and (tensor.is_cuda or "TRITON_INTERPRET" in os.environ)


def merge_(out, lse, more, more_lse, weight):
    """Take a piece into out (T, H, D) and lse (H, T), in place, for the queries it has keys for."""
    if by_triton(out):
        T, H, D = out.shape
        assert out.is_contiguous() and more.is_contiguous() and weight.is_contiguous()
        assert lse.stride(1) == more_lse.stride(1) == 1
        sizes = (H, D, triton.next_power_of_2(H), triton.next_power_of_2(D))
        strides = (lse.stride(0), more_lse.stride(0))
        merge_kernel[(T,)](out, lse, more, more_lse, weight, *strides, *sizes)
        return
    used = weight > -math.inf
    more_lse = torch.where(used, more_lse + weight, -math.inf)
    total = torch.logaddexp(lse, more_lse)
    a, b = ((x - total).exp().t()[:, :, None] for x in (lse, more_lse))
    out.copy_(out * a + torch.where(used[:, None, None], more, 0.0) * b)
    lse.copy_(total)


def add_(into, more, used):
    """into += more for the tokens in use; a kernel need not have written the others."""
    if used is None:
        into.add_(more)
    elif by_triton(into):
        row = into[0].numel()
        assert into.is_contiguous() and more.is_contiguous()
        add_kernel[(len(into),)](into, more, used, row, triton.next_power_of_2(row))
    else:
        into.add_(torch.where(used[:, None, None] != 0, more, 0.0))


class Merged(torch.autograd.Function):
    """Attention of (T, H, D) tokens in pieces, as ring attention does it.

    P = exp(s + w - LSE) with the merged LSE: a piece's backward gets LSE - w and the merged out.
    """

    @staticmethod
    def forward(ctx, q, k, v, pieces, kernel, scale):
        forward, _ = KERNELS[kernel]
        ctx.pieces, ctx.kernel, ctx.scale = pieces, kernel, scale
        out, lse, state = forward(q, k, v, pieces[0], scale)
        ctx.states = [state]
        for p in pieces[1:]:
            more, more_lse, state = forward(q[p.queries], k[p.keys], v[p.keys], p, scale)
            merge_(out[p.queries], lse[:, p.queries], more, more_lse, p.weight)
            ctx.states.append(state)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        _, backward = KERNELS[ctx.kernel]
        grad = grad.contiguous()
        first, *others = ctx.pieces
        grads = backward(grad, q, k, v, out, lse, ctx.states[0], first, ctx.scale)
        dq, dk, dv = (g.contiguous() for g in grads)
        for p, state in zip(others, ctx.states[1:], strict=True):
            at, of = p.queries, p.keys
            given = (grad[at], q[at], k[of], v[of], out[at], lse[:, at] - p.shift)
            more = backward(*given, state, p, ctx.scale)
            more_q, more_k, more_v = (g.contiguous() for g in more)
            queries_used = None if p.keys_used is None else p.weight.isfinite().int()
            add_(dq[at], more_q, queries_used)
            add_(dk[of], more_k, p.keys_used)
            add_(dv[of], more_v, p.keys_used)
        return dq, dk, dv, None, None, None


def pieces(kernel, make):
    def flex_attention_forward(q, k, v, chunks, scale):
        chunks = layout_of(chunks)
        parts = chunks.once(make.__name__, lambda: make(chunks))
        tokens = [t.transpose(1, 2).reshape(-1, t.shape[1], t.shape[3]) for t in (q, k, v)]
        tokens = [t.contiguous() for t in tokens]
        out = Merged.apply(*tokens, parts, kernel, scale)
        return out.view(q.shape[0], q.shape[2], *out.shape[1:])

    return flex_attention_forward
