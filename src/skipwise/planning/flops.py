"""Operations and hours of a training run, and the memory of an evaluation.

Source: Kaplan et al. 2020, arXiv 2001.08361, table 1 (per token 2N operations forward, 4N
        backward); gradient checkpointing repeats the forward pass. Attention as in PaLM, arXiv
        2204.02311, appendix B, halved if the mask is only causal.

Letters: N = weights that multiply each token, L = tokens per example, T = target_length
"""

from __future__ import annotations

from skipwise.config.batch import EVALUATION_LOGITS
from skipwise.planning.architecture import Architecture
from skipwise.planning.gpus import UTILISATION, Gpu
from skipwise.planning.job import Job
from skipwise.planning.memory import GPU_RUNTIME

_EVALUATION_MASK = 0.05  # share of the cache that the mask of a prefill chunk may take


def step_flops(job: Job) -> float:
    """Operations of one training step."""
    a = job.architecture
    n, head = a.active_parameters, a.vocab_size * a.hidden_size
    weights = 4.0 * n if job.lora is not None else 6.0 * n  # LoRA: frozen weights get no gradient
    weights += 6.0 * job.lora_parameters
    keys = _keys(job)
    attention = 3.0 * keys  # forward, and twice as much backward
    if job.checkpointing:
        weights += 2.0 * (n - head)
        attention += keys
    if job.chunked:
        weights += 2.0 * head
    if job.distilled_fraction:  # the teacher's forward pass; its head runs as often as the model's
        weights += job.taught_share * job.distilled_fraction * 2.0 * (n + head)
        attention += job.taught_share * job.distilled_fraction**2 * keys  # it also has fewer keys
    return job.tokens_per_step * (weights + attention)


def forward_flops(architecture: Architecture, tokens: int) -> float:
    """Operations of a forward pass over a context, with logits of its last tokens only."""
    n, head = architecture.active_parameters, architecture.vocab_size * architecture.hidden_size
    return tokens * (2.0 * (n - head) + _pairs(architecture, tokens / 2))


def _keys(job: Job) -> float:
    """Forward operations of attention for one token, in all layers."""
    masked = job.importance or job.attention == "eager"
    return _pairs(job.architecture, job.length if masked else job.length / 2)


def _pairs(a: Architecture, full: float) -> float:
    """As `_keys`, for the number of keys in a layer that sees all of them."""
    pair = 2.0 * a.num_heads * (a.head_dim + a.value_dim)
    near = min(full, a.sliding_window or full)
    return pair * ((a.num_layers - a.sliding_layers) * full + a.sliding_layers * near)


def seconds_per_step(job: Job, gpu: Gpu) -> float | None:
    """Assumes gpus.UTILISATION of the GPU's peak rate. None where that is not known."""
    if gpu.tflops is None:
        return None
    return step_flops(job) / (job.num_gpus * gpu.tflops * 1e12 * UTILISATION)


def hours(job: Job, gpu: Gpu) -> float | None:
    seconds = seconds_per_step(job, gpu)
    return None if seconds is None else job.num_steps * seconds / 3600


def cache_bytes(architecture: Architecture, tokens: int) -> int:
    """Bytes of the KV cache of one context in 16 bits; sliding layers keep only their window."""
    a = architecture
    near = min(tokens, a.sliding_window or tokens)
    full = a.num_layers - a.sliding_layers
    return a.kv_width * 2 * (full * tokens + a.sliding_layers * near)


def evaluation_bytes(architecture: Architecture, tokens: int) -> float:
    """Peak GPU memory to evaluate one context: weights, cache, a slice of logits, a mask."""
    a = architecture
    logits = min(EVALUATION_LOGITS, tokens * a.vocab_size) * (2 + 4.0)  # and in float32
    cache = cache_bytes(a, tokens)
    return a.num_parameters * 2.0 + cache * (1 + _EVALUATION_MASK) + logits + GPU_RUNTIME
