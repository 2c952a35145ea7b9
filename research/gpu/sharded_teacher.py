"""Memory of the sharded teacher under NCCL, beside the teacher that every process holds in full.

torchrun --nproc-per-node N research/gpu/sharded_teacher.py [--width 4096] [--layers 8]

Under an engine that shards (FSDP2, ZeRO-3) the teacher of self-distillation is loaded by the first
process and sharded layer by layer. For both kinds: GiB allocated once it is loaded, the peak while
it is loaded, and the peak of a forward pass over the first tokens, beside what was there before.
`expected_gib` is what one process should hold: its share of the layers, and embedding and head in
full. Without torchrun it is one process on one GPU: nothing is saved, but every call is made.
"""

import gc
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from common import RESEARCH, SMOKE, make_parser, write_result

from skipwise.config.machine import is_main_process, world_size
from skipwise.config.recipe import ModelSettings
from skipwise.models.load import best_device
from skipwise.training.chunked_loss import Distillation
from skipwise.training.teacher import load_sharded_teacher, load_teacher

GIB = 2**30
CUDA = torch.cuda.is_available()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=8192, help="tokens of the forward pass")
    args = parser.parse_args()
    if args.smoke:
        args.width, args.layers, args.length = 128, 2, 64
    if CUDA:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with tempfile.TemporaryDirectory() as folder:
        start_processes(folder)
        try:
            figures = measure(args, folder)
        finally:
            distributed.destroy_process_group()
    if is_main_process():
        write_result("sharded_teacher", figures, folder=SMOKE if args.smoke else RESEARCH)


def start_processes(folder: str) -> None:
    """torchrun's process group, or one of this process alone."""
    backend = "nccl" if CUDA else "gloo"
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group(backend)
        return
    rendezvous = f"file://{folder}/rendezvous"
    distributed.init_process_group(backend, init_method=rendezvous, rank=0, world_size=1)


def measure(args, folder: str) -> dict:
    """Both kinds of teacher, one after the other."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=args.width,
        intermediate_size=args.width * 7 // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=max(1, args.width // 256),
        max_position_embeddings=args.length,
    )
    source = [folder]
    distributed.broadcast_object_list(source, device=best_device())
    if is_main_process():
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source[0])
    distributed.barrier()
    with torch.device("meta"):
        student = LlamaForCausalLM(config)  # the teacher takes its class and attention from it
    of_layers = sum(p.numel() for p in student.model.layers.parameters())
    others = sum(p.numel() for p in student.parameters()) - of_layers
    rows, outputs = {}, []
    for kind, load, shares in (
        ("full", load_teacher, 1),
        ("sharded", load_sharded_teacher, world_size()),
    ):
        gc.collect()
        before = memory(reset=True)[0]
        teacher = load(source[0], config, ModelSettings(), torch.bfloat16, student)
        if kind == "full":
            teacher.to(best_device())
        loaded, peak_of_loading = memory(reset=True)
        outputs.append(read(teacher, args.length))
        after, peak = memory()
        rows[kind] = {
            "loaded_gib": round((loaded - before) / GIB, 3),
            "expected_gib": round(2 * (of_layers / shares + others) / GIB, 3),
            "peak_of_loading_gib": round((peak_of_loading - before) / GIB, 3),
            "peak_of_forward_gib": round((peak - before) / GIB, 3),
            "after_forward_gib": round((after - before) / GIB, 3),
        }
        del teacher
    apart = float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())
    assert apart < 2e-2, f"the two teachers differ by {apart}"
    return {
        "gpu": torch.cuda.get_device_name() if CUDA else None,
        "num_processes": world_size(),
        "shape": {"width": args.width, "layers": args.layers, "length": args.length},
        "largest_relative_difference": apart,
        "rows": rows,
    }


@torch.no_grad()
def read(teacher, length: int) -> torch.Tensor:
    """Hidden states of the first tokens, as the loss asks for them; on the CPU."""
    ids = torch.arange(length, device=best_device())[None] % 1000
    lengths = torch.tensor([length], device=best_device())
    return Distillation(teacher=teacher, weight=1.0).run_teacher(ids, lengths)[0].float().cpu()


def memory(reset: bool = False) -> tuple[int, int]:
    """(allocated, peak) in bytes on this GPU; zeros on a CPU."""
    if not CUDA:
        return 0, 0
    torch.cuda.synchronize()
    found = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    if reset:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return found


if __name__ == "__main__":
    main()
