"""Memory and speed of common GPUs.

Sources: NVIDIA's datasheets and architecture whitepapers, named at each GPU. Rates are for dense
matrices, without sparsity. Memory is the total that the driver reports, a bit below the nominal.
"""

from __future__ import annotations

from dataclasses import dataclass

from skipwise.errors import SkipwiseError, did_you_mean

UTILISATION = 0.40  # assumed fraction of the peak: usual for dense decoders of 1 B and more


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    memory_gib: float
    tflops: float  # dense matrix products a second in bf16, float32 accumulation; V100: float32
    bandwidth: float  # GB/s
    bf16: bool = True


GPUS = (
    # GeForce RTX 3090: Ampere GA102 whitepaper, appendix A (71 TFLOP/s with float32 accumulation)
    Gpu(name="RTX3090", memory_gib=23.7, tflops=71, bandwidth=936),
    # GeForce RTX 4090: Ada whitepaper v2.1, appendix A (165.2 TFLOP/s with float32 accumulation)
    Gpu(name="RTX4090", memory_gib=23.6, tflops=165.2, bandwidth=1008),
    # V100-SXM2 32 GB: datasheet; its tensor cores support only float16, so 15.7 TFLOP/s in float32
    Gpu(name="V100-32GB", memory_gib=31.7, tflops=15.7, bandwidth=900, bf16=False),
    # A100-SXM4: datasheet, 312 TFLOP/s bf16; 1,555 GB/s with 40 GB, 2,039 GB/s with 80 GB
    Gpu(name="A100-40GB", memory_gib=39.4, tflops=312, bandwidth=1555),
    # RTX A6000: Ampere GA102 whitepaper, 154.8 TFLOP/s bf16
    Gpu(name="A6000", memory_gib=47.5, tflops=154.8, bandwidth=768),
    # L40S: datasheet, 362 TFLOP/s bf16 (733 with sparsity)
    Gpu(name="L40S", memory_gib=44.5, tflops=362, bandwidth=864),
    Gpu(name="A100-80GB", memory_gib=79.2, tflops=312, bandwidth=2039),
    # H100 SXM5: datasheet, 989 TFLOP/s bf16 (1,979 with sparsity)
    Gpu(name="H100", memory_gib=79.1, tflops=989, bandwidth=3350),
    # H200 SXM: datasheet, the same tensor cores, 141 GB
    Gpu(name="H200", memory_gib=139.8, tflops=989, bandwidth=4800),
)


def find_gpu(name: str) -> Gpu:
    """Find a GPU by name, ignoring case, spaces and dashes.

    Raises:
        SkipwiseError: not in the table; lists those that are.
    """

    def normalized(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    aliases = {"a100": "A100-80GB", "v100": "V100-32GB", "3090": "RTX3090", "4090": "RTX4090"}
    wanted = normalized(aliases.get(normalized(name), name))
    for gpu in GPUS:
        if wanted in (normalized(gpu.name), normalized(gpu.name).removesuffix("gb")):
            return gpu
    names = ", ".join(gpu.name for gpu in GPUS)
    names += did_you_mean(name, [gpu.name for gpu in GPUS])
    raise SkipwiseError(f"--gpu {name} is unknown: choose one of {names}")
