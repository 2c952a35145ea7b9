"""What a run costs: tokens, operations, hours; and what an evaluation holds.

Source: Kaplan et al. 2020, arXiv 2001.08361, table 1 (2N operations forward, 4N backward for a
        token); with gradient checkpointing the forward pass is done twice. Attention as in PaLM,
        arXiv 2204.02311, appendix B, halved where the mask is causal and nothing else.

Letters: N = weights a token is multiplied with, L = tokens of an example, T = target_length
"""

from __future__ import annotations

from skipwise.config.batch import EVALUATION_LOGITS
from skipwise.planning.architecture import Architecture
from skipwise.planning.gpus import UTILISATION, Gpu
from skipwise.planning.job import Job
from skipwise.planning.memory import GIB, GPU_RUNTIME

_EVALUATION_MASK = 0.05  # share of the cache that the mask of a prefill chunk may take


def step_flops(job: Job) -> float:
    """Operations of one step of the global batch."""
    a = job.architecture
    n = a.active_parameters
    head = a.vocab_size * a.hidden_size
    weights = 4.0 * n if job.lora is not None else 6.0 * n  # LoRA: no gradients of frozen weights
    weights += 6.0 * job.lora_parameters
    keys = _keys(job)
    attention = 3.0 * keys  # forward, and twice as much backward
    if job.checkpointing:
        weights += 2.0 * (n - head)
        attention += keys
    if job.chunked:
        weights += 2.0 * head
    if job.taught_share:  # the teacher's forward pass, its head as often as the model's own
        weights += job.taught_share * 2.0 * (n + head)
        attention += job.taught_share**2 * keys  # of as many fewer keys
    return job.tokens_per_step * (weights + attention)


def _keys(job: Job) -> float:
    """Operations of a token's forward attention in all layers."""
    a = job.architecture
    pair = 2.0 * a.num_heads * (a.head_dim + a.value_dim)
    full = job.length if job.importance or job.attention == "eager" else job.length / 2
    near = min(full, a.sliding_window or full)
    return pair * ((a.num_layers - a.sliding_layers) * full + a.sliding_layers * near)


def seconds_per_step(job: Job, gpu: Gpu) -> float:
    """At the assumed share of the peak (gpus.UTILISATION); on a CPU nothing is known."""
    return step_flops(job) / (job.num_gpus * gpu.tflops * 1e12 * UTILISATION)


def hours(job: Job, gpu: Gpu) -> float:
    return job.num_steps * seconds_per_step(job, gpu) / 3600


def cache_bytes(architecture: Architecture, tokens: int, width: int = 2) -> int:
    """Keys and values of a context in all layers; sliding layers hold their window.

    Args:
        width: bytes of a number.
    """
    a = architecture
    near = min(tokens, a.sliding_window or tokens)
    full = a.num_layers - a.sliding_layers
    return a.kv_width * width * (full * tokens + a.sliding_layers * near)


def evaluation_bytes(architecture: Architecture, tokens: int, width: int = 2) -> float:
    """Peak of a GPU that evaluates one context: weights, cache, a slice of logits, a mask."""
    a = architecture
    logits = min(EVALUATION_LOGITS, tokens * a.vocab_size) * (width + 4.0)
    cache = cache_bytes(a, tokens, width)
    return a.num_parameters * width + cache * (1 + _EVALUATION_MASK) + logits + GPU_RUNTIME


def gib(size: float) -> float:
    return size / GIB
