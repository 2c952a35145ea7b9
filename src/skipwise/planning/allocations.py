"""What a training step holds, tensor by tensor: weights, gradients, states, activations, logits.

Found by listing what autograd saves in transformers' layers (torch.autograd.graph.saved_tensors
hooks) with and without autocast, LoRA, checkpointing and masks; no constant is fitted.

Letters:  B, L = examples a device holds, their tokens; d, H, K, h, F, V as in architecture.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from skipwise.config.distillation import shards
from skipwise.planning.architecture import Layer, Matrix
from skipwise.planning.job import Job

# bytes of a number: 4 bits, a scale for 64 of them in 8 bits, a float32 for 256 scales
_NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8


@dataclass(frozen=True)
class Allocation:
    """Memory of one kind, in blocks of one size."""

    kind: str
    total: float  # bytes
    block: float  # bytes of one tensor


def base_bytes(job: Job) -> int:
    """Bytes of a number in the weights that are not LoRA's."""
    if job.engine.startswith("zero3") and job.bf16:
        return 2  # DeepSpeed's bf16 mode; the float32 copy counts as optimizer state
    return 2 if job.lora is not None and job.bf16 else 4


def _tensors(job: Job) -> Iterator[tuple[int, Matrix | None, int]]:
    """(how many, matrix or None, numbers in one) of the layers' weights."""
    a = job.architecture
    for count, matrix in a.matrices():
        yield count, matrix, matrix.size
    for layer in a.layers:
        yield layer.count * layer.norms, None, layer.vectors // max(1, layer.norms)


def weights(job: Job) -> list[Allocation]:
    """All weights on a device before sharding, in their training precision."""
    a, size = job.architecture, base_bytes(job)
    nf4 = job.lora is not None and job.lora.quantization == "nf4"
    found = [
        Allocation("weights", number * each * width, each * width)
        for number, matrix, each in _tensors(job)
        for width in [_NF4 if nf4 and matrix is not None and matrix.linear else size]
    ]
    found += [Allocation("weights", n * size, n * size) for n in (a.embedding, a.head, a.final)]
    if job.lora is not None:  # beside the frozen ones
        found += [Allocation("weights", n * 4, n * 4) for n in _lora_blocks(job)]
    return found


def teacher(job: Job) -> list[Allocation]:
    """The base once more, frozen, where it teaches; under LoRA it is there already, if whole.

    Its layers are sharded where the engine shards (models/teacher.py).
    """
    if not job.taught_share or (job.lora is not None and not shards(job.engine)):
        return []
    a, size = job.architecture, 2 if job.bf16 else 4
    share = 1.0 / job.num_gpus if shards(job.engine) else 1.0
    if job.engine == "zero3-offload":
        share = 0.0
    found = [
        Allocation("teacher", share * number * each * size, each * size)
        for number, _, each in _tensors(job)
    ]
    return found + [
        Allocation("teacher", n * size, n * size) for n in (a.embedding, a.head, a.final)
    ]


def _lora_blocks(job: Job) -> list[int]:
    """Numbers in what trains beside the frozen weights: adapters, copies of norms and embedding."""
    assert job.lora is not None
    a = job.architecture
    copies = [a.embedding] if job.lora.train_embeddings else []
    norms = a.final + sum(layer.count * layer.vectors for layer in a.layers)
    return [*copies, job.lora_parameters] + ([norms] if job.lora.train_norms else [])


def trained(job: Job) -> list[tuple[int, int]]:
    """(numbers, numbers in a block) of what trains; a gradient has the same."""
    a = job.architecture
    if job.lora is None:
        found = [(number * each, each) for number, _, each in _tensors(job)]
        return found + [(n, n) for n in (a.embedding, a.head, a.final) if n]
    largest = max((job.lora.rank * max(m.rows_in, m.rows_out) for _, m in a.matrices()), default=1)
    blocks = _lora_blocks(job)
    return [(n, min(n, largest) if n == job.lora_parameters else n) for n in blocks if n]


def gradients(job: Job) -> list[Allocation]:
    size = 2 if job.engine.startswith("zero3") and job.bf16 else 4
    return [Allocation("gradients", n * size, block * size) for n, block in trained(job)]


def states(job: Job) -> list[Allocation]:
    """The optimizer's states; under DeepSpeed's bf16 the float32 weights as well."""
    a = job.architecture
    master = 4 if job.engine.startswith("zero3") and job.bf16 else 0
    if job.optimizer == "adafactor":
        sums = sum(count * m.copies * (m.rows_in + m.rows_out) for count, m in a.matrices())
        sums = 4 * (sums + a.vectors + 2 * (a.vocab_size + a.hidden_size))
        sums = min(sums, 8 * job.trainable_parameters)
        numbers = job.trainable_parameters
        return [
            Allocation("optimizer", float(sums + master * numbers), sums / max(1, a.num_layers))
        ]
    each = job.state_bytes
    found = []
    for n, block in trained(job):
        # bitsandbytes keeps an embedding's states in 32 bits, as transformers asks it to
        embedding = "8bit" in job.optimizer and n == a.embedding and job.trains_embeddings
        width = (8.0 if "adam" in job.optimizer else 4.0) if embedding else each
        found.append(Allocation("optimizer", n * (width + master), block * 4))
    return found


def optimizer_temporaries(job: Job) -> float:
    """Bytes an optimizer's step holds for a moment; fused AdamW none."""
    largest = max((block for _, block in trained(job)), default=0)
    if job.optimizer == "adafactor":
        return 3 * 4 * largest  # the update, its square and its product
    if job.optimizer == "adamw_torch":  # foreach on a GPU: all at once
        return 4.0 * job.trainable_parameters
    return 0.0


def head_copy(job: Job) -> list[Allocation]:
    """The head's bf16 copy, where the head trains (tied to an embedding that does, or in full)."""
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
        n = sum(m.rows_in + m.rows_out for m in layer.matrices if job.adapted(m)) * job.lora.rank
        found = [(n, n / max(1, len(layer.matrices)))]
    return [Allocation("bf16 copies", n * 2, block * 2) for n, block in found]


def stream_bytes(job: Job) -> int:
    """Bytes of a number between layers: float32, unless the embedding is frozen in bf16."""
    if not job.bf16:
        return 4
    if job.engine != "ddp":  # the weights are cast to bf16 before the layers see them
        return 2
    return 4 if job.trains_embeddings else 2


def layer_activations(job: Job, layer: Layer, tokens: int, batch_size: int) -> list[Allocation]:
    """What one layer keeps for its backward pass, its own weights aside.

    Args:
        tokens: B x L of the pass.
    """
    a, c, s = job.architecture, 2 if job.bf16 else 4, stream_bytes(job)
    d, H, K, h = a.hidden_size, a.num_heads, a.num_kv_heads, a.head_dim
    lora = job.lora
    widths: list[float] = []  # bytes a token, one tensor each

    norm_trains = lora is None or lora.train_norms
    for _ in range(layer.norms):
        widths.append(4 * d)  # its input in float32
        if a.rms_norm and norm_trains:
            widths.append(s * d)  # and normalised, for the gradient of its weight
    # what the matrices read: with autocast each has a cast of its own from the float32 stream
    reading = [m for m in layer.matrices if m.rows_in == d and m.name != "router"]
    if lora is not None:
        reading = [m for m in reading if job.adapted(m)]
    casts = len(reading) if job.bf16 and s == 4 else min(len(reading), 2)
    widths += [c * d] * casts
    if lora is not None:
        widths += [c * lora.rank] * sum(job.adapted(m) for m in layer.matrices)
    masked = job.importance or job.attention == "eager" or a.sliding_layers > 0
    shared = not masked and a.kv_width == 2 * K * h
    keys = K if shared else H  # the kernel shares grouped heads; with a mask they are repeated
    widths += [c * H * h, c * keys * h, c * keys * a.value_dim, c * H * a.value_dim]
    if a.qk_norm:
        widths += [4 * H * h, 4 * K * h, c * H * h, c * K * h]
    if job.attention == "eager":
        widths += [c * H * a.value_dim]
    else:
        widths += [4 * H]
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
    """What the backward pass of one layer holds for a moment beside what was saved."""
    a, c = job.architecture, 2 if job.bf16 else 4
    wide = tokens * c * layer.mlp_width
    largest = max(m.copies * m.weight for m in layer.matrices) if job.lora is None else 0
    return [
        Allocation("activations", 2 * wide, wide),
        Allocation("activations", 2 * tokens * 4 * a.hidden_size, tokens * 4 * a.hidden_size),
        Allocation("gradients", c * largest, c * largest),
    ]


def lora_temporaries(job: Job, layer: Layer, tokens: int) -> list[Allocation]:
    """What LoRA makes beside an adapted matrix's output: what B gives and that scaled, both ways.

    None of it is kept. A GPU's allocator takes the same room for the next matrix; malloc does not,
    for the small outputs of A, which are kept, come to lie between.
    """
    if job.lora is None:
        return []
    width = 2 if job.bf16 else 4
    blocks = [(m.copies, width * tokens * m.rows_out) for m in layer.matrices if job.adapted(m)]
    return [Allocation("activations", 4.0 * copies * block, block) for copies, block in blocks]


def checkpoints(job: Job, tokens: int) -> list[Allocation]:
    """The inputs of the layers, all that checkpointing keeps of them."""
    block = tokens * stream_bytes(job) * job.architecture.hidden_size
    return [Allocation("activations", block * job.architecture.num_layers, block)]


def head_activations(job: Job, tokens: int) -> list[Allocation]:
    """The last norm and the head's input."""
    d, c = job.architecture.hidden_size, 2 if job.bf16 else 4
    blocks = [4 * d * tokens, stream_bytes(job) * d * tokens, c * d * tokens]
    return [Allocation("activations", block, block) for block in blocks]


def logits(job: Job, *, backward: bool) -> list[Allocation]:
    """Logits and what the loss makes of them, of the tokens whose logits stand at once.

    Forward: as computed, in float32, and their log-softmax. Backward: log-softmax, the gradient of
    the loss on it, and that on the logits, all in float32.
    """
    n = job.loss_tokens * job.architecture.vocab_size
    sizes = [4, 4, 4] if backward else [4, 4] + ([2] if job.bf16 else [])
    if job.taught_share:  # the teacher's, their divergence, and what it is made of
        sizes += [4, 4] if backward else [4, 4, 4]
    if job.architecture.softcap:  # divided, capped, multiplied
        sizes += [2 if job.bf16 else 4] * (1 if backward else 3)
    return [Allocation("logits and loss", n * size, n * size) for size in sizes]


def batch(job: Job, on_cpu: bool) -> list[Allocation]:
    """Token ids and masks: the Trainer fetches the batches of a whole step before it starts."""
    pairs = job.batch_size * job.length**2
    number = job.accumulation + on_cpu  # the loader is one batch ahead, in the host's memory
    found = [Allocation("batch", 4 * 8 * job.tokens * number, 8 * job.tokens)]
    if job.importance:  # of the pass at work, and while it is made a boolean one
        size = (2 if job.bf16 else 4) * pairs
        found.append(Allocation("mask", size, size))
    a = job.architecture
    if a.sliding_layers:  # a boolean mask for each kind of layer
        found.append(Allocation("mask", 2 * pairs, pairs))
    return found
