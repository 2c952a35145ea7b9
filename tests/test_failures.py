"""Failures of engines end with the setting to change."""

import errno

import pytest
import torch

from skipwise.config.parse import parse_recipe
from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError
from skipwise.training.error_hints import explain_error, is_out_of_memory


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


def make(**keys):
    return parse_recipe({"model": "m", "target_length": 256, **keys})


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Candidate to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "python", "cpu", "cublas"])
def test_out_of_memory_names_the_next_setting(run, error):
    assert is_out_of_memory(error)
    said = str(explain_error(error, make(training={"micro_batch_size": 4}), run))
    assert "out of memory at 4 x" in said and "training.micro_batch_size=1" in said
    said = str(explain_error(error, make(training={"gradient_checkpointing": False}), run))
    assert "training.gradient_checkpointing=true" in said


def test_each_step_down_the_ladder_is_another_setting(run):
    error, recipe, seen = MemoryError(), make(training={"micro_batch_size": 2}), []
    for overrides in (
        {"training": {"micro_batch_size": 1}},
        {"training": {"micro_batch_size": 1}, "lora": {}},
        {"training": {"micro_batch_size": 1}, "lora": {"train_embeddings": False}},
    ):
        seen.append(str(explain_error(error, recipe, run)).splitlines()[1])
        recipe = make(**overrides)
    seen.append(str(explain_error(error, recipe, run)).splitlines()[1])
    assert len(set(seen)) == len(seen), seen


KNOWN = [
    ("Watchdog caught collective operation timeout: NCCL", "ddp_timeout"),
    ("Timed out waiting 15000ms for recv operation to complete", "step 0 (no checkpoint yet)"),
    ("Application timeout caused pair closure", "one hangs or is out of reach"),
    ("Connection closed by peer [127.0.0.1]:40000", "the first error of the other ranks"),
    ("writev [127.0.0.1]:40000: Broken pipe", "see the first error"),
    ("The server socket has failed to listen: Address already in use", "MASTER_PORT"),
    ("NCCL error in: ProcessGroupNCCL.cpp:1970, unhandled system error", "NCCL_DEBUG=INFO"),
    ("CUDA error: device-side assert triggered", "CUDA_LAUNCH_BLOCKING=1"),
    ("CUDA_HOME does not exist, unable to compile CUDA op(s)", "--engine fsdp2"),
    ("Error building extension 'cpu_adam'", "CUDA toolkit"),
    ("Using `bitsandbytes` 4-bit quantization requires bitsandbytes", "'.[qlora]'"),
    ("FlashAttention2 has been toggled on, but flash_attn is not installed", "=sdpa"),
    ("CUDA error: no kernel image is available for execution on the device", "pytorch.org"),
    ("LoweringException: RuntimeError: Failed to find C compiler", "load.attn_implementation"),
]


@pytest.mark.parametrize(("words", "mend"), KNOWN, ids=[mend for _, mend in KNOWN])
def test_a_known_failure_says_what_to_type(run, words, mend):
    error = RuntimeError(f"first line\n{words}\n  at frame 1\n  at frame 2")
    said = explain_error(error, make(), run)
    assert isinstance(said, SkipwiseError)
    assert mend in str(said).splitlines()[1] and words[:40] in str(said)
    assert len(str(said).splitlines()) == 2


def test_a_hub_that_is_slow_is_no_rank_that_does_not_answer(run):
    error = RuntimeError("HTTPSConnectionPool: Read timed out. (read timeout=10)")
    assert "another rank" not in str(explain_error(error, make(), run))


def test_a_full_disk_says_where_it_goes_on(run):
    said = str(explain_error(OSError(errno.ENOSPC, "No space left on device"), make(), run))
    assert "is full" in said and "step 0 (no checkpoint yet)" in said


def test_an_unknown_failure_keeps_its_trace(run):
    assert explain_error(RuntimeError("some bug"), make(), run) is None
    own = SkipwiseError("mine")
    assert explain_error(own, make(), run) is own
