"""The tensors of a training step: weights, gradients, optimizer states, activations, logits.

Derived by listing what autograd saves in transformers' layers (saved_tensors_hooks) with and
without autocast, LoRA, checkpointing and masks. No constant is fitted.

Letters:  B, L = examples per device, tokens per example; d, H, K, h, F, V as in architecture.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from skipwise.config.distillation import shards
from skipwise.planning.architecture import Layer, Matrix
from skipwise.planning.job import Job

# bytes per number: 4 bits, an 8-bit scale per 64 numbers, a float32 per 256 scales
_NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8


@dataclass(frozen=True)
class Allocation:
    """Tensors of one kind and size."""

    kind: str
    total: float  # bytes
    block: float  # bytes of one tensor


def base_bytes(job: Job) -> int:
    """Bytes per number of the weights, without LoRA's."""
    if job.engine.startswith("zero3") and job.bf16:
        return 2  # DeepSpeed's bf16 mode; the float32 copy counts as optimizer state
    return 2 if job.lora is not None and job.bf16 else 4


def _tensors(job: Job) -> Iterator[tuple[int, Matrix | None, int]]:
    """(number of tensors, their matrix or None, numbers in each) of the layers' weights."""
    a = job.architecture
    for count, matrix in a.matrices():
        yield count, matrix, matrix.size
    for layer in a.layers:
        yield layer.count * layer.norms, None, layer.vectors // max(1, layer.norms)


def weights(job: Job) -> list[Allocation]:
    """All weights on a device before sharding, in training precision."""
    a, size = job.architecture, base_bytes(job)
    nf4 = job.lora is not None and job.lora.quantization == "nf4"
    found = [
        Allocation("weights", number * each * width, each * width)
        for number, matrix, each in _tensors(job)
        for width in [_NF4 if nf4 and matrix is not None and matrix.linear else size]
    ]
    found += [Allocation("weights", n * size, n * size) for n in (a.embedding, a.head, a.final)]
    if job.lora is not None:  # trainable copies in addition to the frozen weights
        found += [Allocation("weights", n * 4, n * 4) for n in _lora_blocks(job)]
    return found


def teacher(job: Job) -> list[Allocation]:
    """The frozen teacher of distillation. With LoRA, unsharded frozen weights serve as the teacher.

    If the engine shards, so does the teacher (training/teacher.py).
    """
    if not job.distilled_fraction or (job.lora is not None and not shards(job.engine)):
        return []
    a, size = job.architecture, 2 if job.bf16 else 4
    share = 1.0 / job.num_gpus if shards(job.engine) else 1.0
    if job.engine == "zero3-offload":
        share = 0.0
    blocks = [(share * number * each * size, each * size) for number, _, each in _tensors(job)]
    blocks += [(n * size, n * size) for n in (a.embedding, a.head, a.final)]
    return [Allocation("teacher", total, block) for total, block in blocks]


def _lora_blocks(job: Job) -> list[int]:
    """Sizes of what trains with LoRA: adapters, copies of norms and of the embedding."""
    assert job.lora is not None
    a = job.architecture
    copies = [a.embedding] if job.lora.train_embeddings else []
    norms = a.final + sum(layer.count * layer.vectors for layer in a.layers)
    return [*copies, job.lora_parameters] + ([norms] if job.lora.train_norms else [])


def trainable(job: Job) -> list[tuple[int, int]]:
    """(numbers, numbers per tensor) of the trainable parameters and of their gradients."""
    a = job.architecture
    if job.lora is None:
        found = [(number * each, each) for number, _, each in _tensors(job)]
        return found + [(n, n) for n in (a.embedding, a.head, a.final) if n]
    largest = max((job.lora.rank * max(m.rows_in, m.rows_out) for _, m in a.matrices()), default=1)
    blocks = _lora_blocks(job)
    return [(n, min(n, largest) if n == job.lora_parameters else n) for n in blocks if n]


def gradients(job: Job) -> list[Allocation]:
    size = 2 if job.engine.startswith("zero3") and job.bf16 else 4
    return [Allocation("gradients", n * size, block * size) for n, block in trainable(job)]


def optimizer_states(job: Job) -> list[Allocation]:
    """The optimizer's states, with the float32 weights of DeepSpeed's bf16 mode."""
    a = job.architecture
    master = 4 if job.engine.startswith("zero3") and job.bf16 else 0
    if job.optimizer == "adafactor":
        sums = sum(count * m.copies * (m.rows_in + m.rows_out) for count, m in a.matrices())
        sums = 4 * (sums + a.vectors + 2 * (a.vocab_size + a.hidden_size))
        numbers = job.trainable_parameters
        sums = min(sums, 8 * numbers)
        total = float(sums + master * numbers)
        return [Allocation("optimizer", total, sums / max(1, a.num_layers))]
    found = []
    for n, block in trainable(job):
        # transformers tells bitsandbytes to keep an embedding's states in 32 bits
        embedding = "8bit" in job.optimizer and n == a.embedding and job.trains_embeddings
        width = (8.0 if "adam" in job.optimizer else 4.0) if embedding else job.state_bytes
        found.append(Allocation("optimizer", n * (width + master), block * 4))
    return found


def optimizer_temporaries(job: Job) -> float:
    """Temporary bytes of an optimizer step; fused AdamW needs none."""
    largest = max((block for _, block in trainable(job)), default=0)
    if job.optimizer == "adafactor":
        return 3 * 4 * largest  # the update, its square and its product
    if job.optimizer == "adamw_torch":  # foreach on a GPU: all parameters at once
        return 4.0 * job.trainable_parameters
    return 0.0


def head_copy(job: Job) -> list[Allocation]:
    """The head's bf16 copy, if the head trains (in full training, or tied to the embedding)."""
    a = job.architecture
    trains = job.lora is None or (a.tied and job.lora.train_embeddings)
    if not job.bf16 or job.engine != "ddp" or not trains:
        return []
    n = a.vocab_size * a.hidden_size
    return [Allocation("bf16 copies", n * 2, n * 2)]


def layer_copies(job: Job, layer: Layer) -> list[Allocation]:
    """The bf16 copies of one layer's matrices."""
    if not job.bf16 or job.engine != "ddp":
        return []
    if job.lora is None:
        found = [(m.copies * m.weight, m.weight) for m in layer.matrices]
    else:
        n = sum(m.rows_in + m.rows_out for m in layer.matrices if job.has_lora(m)) * job.lora.rank
        found = [(n, n / max(1, len(layer.matrices)))]
    return [Allocation("bf16 copies", n * 2, block * 2) for n, block in found]


def stream_bytes(job: Job) -> int:
    """Bytes per number of the residual stream: float32, unless the embedding is frozen in bf16."""
    if not job.bf16:
        return 4
    if job.engine != "ddp":  # the engine casts the weights to bf16 before the layers use them
        return 2
    return 4 if job.trains_embeddings else 2


def layer_activations(job: Job, layer: Layer, tokens: int, batch_size: int) -> list[Allocation]:
    """What one layer saves for its backward pass, without its weights.

    Args:
        tokens: B x L of the pass.
    """
    a, c, s = job.architecture, 2 if job.bf16 else 4, stream_bytes(job)
    d, H, K, h = a.hidden_size, a.num_heads, a.num_kv_heads, a.head_dim
    lora = job.lora
    widths: list[float] = []  # bytes per token, for each tensor

    norm_trains = lora is None or lora.train_norms
    for _ in range(layer.norms):
        widths.append(4 * d)  # its input in float32
        if a.rms_norm and norm_trains:
            widths.append(s * d)  # the normalised input, for the gradient of the weight
    # the matrices' inputs: under autocast each matrix has its own cast of the float32 stream
    reading = [m for m in layer.matrices if m.rows_in == d and m.name != "router"]
    if lora is not None:
        reading = [m for m in reading if job.has_lora(m)]
    casts = len(reading) if job.bf16 and s == 4 else min(len(reading), 2)
    widths += [c * d] * casts
    if lora is not None:
        widths += [c * lora.rank] * sum(job.has_lora(m) for m in layer.matrices)
    masked = job.has_mask or job.attention == "eager" or a.sliding_layers > 0
    shared = not masked and a.kv_width == 2 * K * h
    keys = K if shared else H  # with a mask, grouped key-value heads are repeated
    widths += [c * H * h, c * keys * h, c * keys * a.value_dim, c * H * a.value_dim]
    if a.qk_norm:
        widths += [4 * H * h, 4 * K * h, c * H * h, c * K * h]
    widths += [c * H * a.value_dim] if job.attention == "eager" else [4 * H]
    F = layer.mlp_width
    widths += [c * F] * ((4 if a.gated else 2) + 3 * a.composed_gelu)
    if a.num_experts and layer.matrices[-1].name != "down":  # rows sorted by expert, and back
        widths += [c * a.experts_per_token * d] * 2
    found = [Allocation("activations", tokens * w, tokens * w) for w in widths]
    pairs = batch_size * job.length**2
    if job.attention == "eager":  # softmax in float32, and its cast
        found.append(Allocation("activations", 4 * H * pairs, 4 * H * pairs))
        if job.bf16:
            found.append(Allocation("activations", 2 * H * pairs, 2 * H * pairs))
    return found


def layer_gradients(job: Job, layer: Layer, tokens: int) -> list[Allocation]:
    """Temporary tensors in the backward pass of one layer."""
    a, c = job.architecture, 2 if job.bf16 else 4
    wide = tokens * c * layer.mlp_width
    largest = max(m.copies * m.weight for m in layer.matrices) if job.lora is None else 0
    return [
        Allocation("activations", 2 * wide, wide),
        Allocation("activations", 2 * tokens * 4 * a.hidden_size, tokens * 4 * a.hidden_size),
        Allocation("gradients", c * largest, c * largest),
    ]


def lora_temporaries(job: Job, layer: Layer, tokens: int) -> list[Allocation]:
    """Temporary tensors of LoRA: the output of B and its scaled copy, forward and backward.

    A GPU's allocator reuses this memory for the next matrix. malloc does not, because the small
    outputs of A, which are saved, lie between these tensors.
    """
    if job.lora is None:
        return []
    width = 2 if job.bf16 else 4
    blocks = [(m.copies, width * tokens * m.rows_out) for m in layer.matrices if job.has_lora(m)]
    return [Allocation("activations", 4.0 * copies * block, block) for copies, block in blocks]


def checkpoints(job: Job, tokens: int) -> list[Allocation]:
    """The inputs of the layers, which is all that gradient checkpointing saves.

    Offloaded, two of them are on the device: the one of the layer, and the one that is copied.
    """
    block = tokens * stream_bytes(job) * job.architecture.hidden_size
    layers = job.architecture.num_layers
    count = min(2, layers) if job.offload and not job.on_cpu else layers
    return [Allocation("activations", block * count, block)]


def head_activations(job: Job, tokens: int) -> list[Allocation]:
    """Tensors saved for the last norm and the head."""
    d, c = job.architecture.hidden_size, 2 if job.bf16 else 4
    blocks = [4 * d * tokens, stream_bytes(job) * d * tokens, c * d * tokens]
    return [Allocation("activations", block, block) for block in blocks]


def logits(job: Job, *, backward: bool) -> list[Allocation]:
    """The logits that exist at the same time, and the loss's tensors of that size.

    Forward: the logits, their float32 copy, and the log-softmax. Backward: the log-softmax, its
    gradient, and the gradient of the logits, all in float32.
    """
    n = job.loss_tokens * job.architecture.vocab_size
    sizes = [4, 4, 4] if backward else [4, 4] + ([2] if job.bf16 else [])
    if job.distilled_fraction:  # the teacher's logits, the KL divergence, and its terms
        sizes += [4, 4] if backward else [4, 4, 4]
    if job.architecture.softcap:  # divided, capped, multiplied
        sizes += [2 if job.bf16 else 4] * (1 if backward else 3)
    return [Allocation("logits and loss", n * size, n * size) for size in sizes]


def batch(job: Job, on_cpu: bool) -> list[Allocation]:
    """Token ids and masks. The Trainer loads all batches of a step before it starts."""
    pairs = job.batch_size * job.length**2
    number = job.accumulation + on_cpu  # the loader is one batch ahead, in CPU memory
    found = [Allocation("batch", 4 * 8 * job.tokens * number, 8 * job.tokens)]
    if job.has_mask:  # of the current pass
        size = (2 if job.bf16 else 4) * pairs
        found.append(Allocation("mask", size, size))
    if job.architecture.sliding_layers:  # a boolean mask for each layer type
        found.append(Allocation("mask", 2 * pairs, pairs))
    return found
