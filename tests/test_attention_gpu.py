"""Importance weights through flex_attention on a GPU, as compiled: against the mask of pairs."""

from types import SimpleNamespace

import pytest
import torch
from test_attention import batch_of, distance, examples_of, gradients, model_of, set_up_run

from skipwise.models.attention.flex import flex_attention_forward, unsupported_by_machine
from skipwise.models.attention.masks import FLEX, is_packed, pack_key_weights, with_chunk_weights
from skipwise.pipeline.stages import train_run
from skipwise.training.callbacks import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(unsupported_by_machine()), reason=unsupported_by_machine()),
]


@pytest.fixture(autouse=True)
def _new_shapes():
    torch._dynamo.reset()  # it compiles for 8 shapes, and then no more


def on_gpu(batch):
    return {key: value.cuda() for key, value in batch.items()}


def attention_of(shape, examples, dtype, carried):
    """The output and the gradients of queries, keys and values, on the GPU."""
    heads, key_heads, width = shape
    batch = on_gpu(batch_of(examples))
    rows, length = batch["input_ids"].shape
    generator = torch.Generator().manual_seed(0)
    qkv = [
        torch.randn(rows, length, h, width, generator=generator).cuda().to(dtype).transpose(1, 2)
        for h in (heads, key_heads, key_heads)
    ]
    for tensor in qkv:
        tensor.requires_grad_()
    made = pack_key_weights(batch) if carried else with_chunk_weights(batch, dtype)
    module = SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = flex_attention_forward(module, *qkv, made["attention_mask"], scaling=width**-0.5)
    upstream = torch.randn(out.shape, generator=generator).to(out)
    grads = torch.autograd.grad(out, qkv, upstream)
    peak = torch.cuda.max_memory_allocated() - before
    return [t.float() for t in (out.detach(), *grads)], peak


@pytest.mark.parametrize(
    ("shape", "length"),
    [((8, 2, 64), 1000), ((4, 4, 128), 1024), ((3, 1, 16), 64), ((4, 2, 256), 300)],
    ids=str,
)
def test_it_is_as_exact_as_the_mask(shape, length):
    for num_chunks in (2, 4):
        examples = examples_of(num_chunks, length=length)
        wanted, _ = attention_of(shape, examples, torch.float32, carried=False)
        by_mask, _ = attention_of(shape, examples, torch.bfloat16, carried=False)
        found, _ = attention_of(shape, examples, torch.bfloat16, carried=True)
        for name, a, b, c in zip(("out", "dq", "dk", "dv"), found, by_mask, wanted, strict=True):
            assert distance(a, c) < 1.5 * distance(b, c) + 1e-3, name
            assert distance(a, c) < 0.02, name


@pytest.mark.parametrize("dtype", ["autocast", "bfloat16", "float32"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_model_learns_with_it_what_it_learns_with_the_mask(family, dtype):
    shape = {"head_dim": 128, "hidden_size": 512, "sliding_window": 32}
    batch = on_gpu(batch_of(examples_of(2, length=512)))
    wanted = gradients(
        model_of(family, "sdpa", **shape).cuda(), with_chunk_weights(batch, torch.float32)
    )
    for implementation in ("sdpa", FLEX):
        model = model_of(family, implementation, **shape).cuda()
        weights = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        for parameter in model.parameters():
            parameter.data = parameter.data.to(weights)
        carried = implementation == FLEX
        mask = torch.float32 if dtype == "float32" else torch.bfloat16
        made = pack_key_weights(batch) if carried else with_chunk_weights(batch, mask)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == "autocast"):
            loss, found = gradients(model, made)
        off = distance(found.float(), wanted[1])
        if not carried:
            bound = 1.5 * off + 1e-3
        assert abs(float(loss - wanted[0])) < 0.01
    assert off < bound


def test_it_holds_no_mask_and_no_repeated_keys():
    examples = examples_of(2, rows=1, length=8192)
    for carried in (True, False):  # compiled, and once more to measure
        attention_of((16, 4, 64), examples, torch.bfloat16, carried=carried)
    _, by_mask = attention_of((16, 4, 64), examples, torch.bfloat16, carried=False)
    _, by_carrier = attention_of((16, 4, 64), examples, torch.bfloat16, carried=True)
    assert by_carrier < 0.7 * by_mask


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_a_gpu_chooses_it_and_trains(tiny, text_folder, tmp_path, dtype):
    losses = {}
    for asked in ("auto", "sdpa"):
        training, job = set_up_run(
            tiny,
            text_folder,
            tmp_path / asked,
            f"load.attn_implementation={asked}",
            f"load.dtype={dtype}",
        )
        assert all(check.passed for check in training.checks), training.checks
        said = {c.name: c.detail for c in training.checks}["importance weights"]
        assert said.endswith("by flex_attention") == (asked == "auto")
        batch = next(iter(training.trainer.get_train_dataloader()))
        mask = training.trainer._prepare_inputs(batch)["attention_mask"]
        assert is_packed(mask) == (asked == "auto")
        train_run(*job)
        losses[asked] = [m["loss"] for m in read_metrics(job[2])]
    assert losses["auto"] == pytest.approx(losses["sdpa"], abs=5e-3)
