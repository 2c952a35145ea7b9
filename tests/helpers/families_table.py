"""docs/families.md from the outcome of the conformance suite (`make families`)."""

import textwrap
from pathlib import Path

import transformers
from released import count_line

from skipwise.errors import SkipwiseError
from skipwise.models.convert import conversion_for
from skipwise.models.hf_config import model_info_of

FILE = Path(__file__).parents[2] / "docs/families.md"
REFUSED = [  # config class, models
    ("GPT2Config", "GPT-2"),
    ("GPTBigCodeConfig", "StarCoder, SantaCoder"),
    ("OPTConfig", "OPT"),
    ("BloomConfig", "BLOOM"),
    ("MptConfig", "MPT"),
    ("T5Config", "T5 and other encoder-decoders"),
    ("MambaConfig", "Mamba"),
    ("RecurrentGemmaConfig", "RecurrentGemma"),
    ("Llama4TextConfig", "Llama 4"),
    ("Cohere2Config", "Command R7B, Command A"),
    ("Exaone4Config", "EXAONE 4 32B"),
    ("GraniteMoeHybridConfig", "Granite 4 H (the ones without positions)"),
    ("Qwen2VLConfig", "Qwen 2 VL, Qwen 2.5 VL, Qwen 3 VL"),
    ("KimiLinearConfig", "Kimi Linear"),
    ("JambaConfig", "Jamba"),
    ("NemotronHConfig", "Nemotron H"),
]
HEAD = """\
# Model families

Written by `make families` from the outcome of `tests/test_families.py`: each family below was built as a tiny random
model and went through all of it, for each scaling named: facts read from its config and compared with what the model
computes; preflight passed, and failed with the mask dropped (where the family cuts at skips) and with the scaling not
applied; two steps of full training and of LoRA by the Trainer; export; reload by plain transformers in another process;
logits up to the target length equal to 1e-5; evaluation in pieces equal to one forward pass. Llama 3's
scaling (`llama3`), which `rope.type: auto` measures as well, was not part of it.

A family is found by what its config holds, not by this list: any other decoder with RoPE settings is tried, and the
preflight says what does not hold. `ntk` is the default RoPE with a larger theta.

"""
AFTER = """
Sliding windows: a window in every layer would hide what lies further back, so it is taken out of training and of the
saved model (Mistral 7B v0.1). Layers with a window beside full ones keep it; see "Hybrid models" in method.md.

State layers (Gated DeltaNet in Qwen 3 Next and 3.5, Mamba 2 in Bamba, Falcon H1, Granite 4 and Zamba 2, short
convolutions in LFM 2, lightning attention in MiniMax) know no positions: their state runs on over a skip, as if the text
went on. Whether it does or starts again after the skip changed perplexity by 0.03 % at most in tiny Qwen 3 Next, Bamba
and LFM 2 models (`benchmarks/hybrid_layers.py`; see "State layers" in method.md), so nothing in the model is changed. Skips do not
show these layers a longer text.

**Settings that stay as they were trained**: the sections of Qwen 3.5's multimodal RoPE, which do nothing in text, and
Ministral 3's `llama_4_scaling_beta` with its length of 16,384. Gemma 4 and LFM 3 have proportional RoPE: its theta is
raised (`ntk`), which every runtime reads; other scalings have no place in its settings.

**Models that are scaled already** are carried on, not scaled twice: yarn, llama3 and linear reach the new target with
their own options (Llama 3.1 from 131,072 tokens: llama3 with a larger factor, counted from its 8,192). What a linear
config means by its length has to be said (`original_length=...`); a scaling that was never trained is replaced when
`original_length` is the length before it; searched longrope factors (Phi 3 long) are refused.

**Keys of the config** are read as the family's config class reads them: `rotary_dim` of MiniMax M2, `qk_rope_head_dim`
of DeepSeek, `global_rope_theta` of ModernBERT. `alpha` of Hunyuan is a larger theta, and no scaling. `check` names the
keys that transformers ignores, with the runtime where another one computes something from them (`attn_factor`). A
config whose lengths disagree (`model_max_length` of Command R) is a question: type `original_length=...`. Qwen 2.5 1M
counts as the 262,144 tokens it was trained on (`dual_chunk_attention_config`).

**Converted families** become a stock Phi or Llama in the run folder, a shard in memory at a time, with logits equal to
1e-5 (`tests/test_convert.py`). Checkpoints that have only `.bin` files: `load.use_safetensors=false`.

## Refused, with the reason

"""


def table(outcomes: dict[str, dict]) -> str:
    """The page."""
    rows = ["| family | models | scalings | sliding windows |", "|---|---|---|---|"]
    for family, found in outcomes.items():
        name = f"`{family}`" + (f", converted to {found['as']}" if found["as"] else "")
        scalings = ", ".join(found["scalings"]) + (" (its own)" if found["carried"] else "")
        rows.append(f"| {name} | {found['models']} | {scalings} | {found['sliding']} |")
    counted = f"{count_line()}\n\n{len(outcomes)} families:\n\n"
    return HEAD + counted + "\n".join(rows) + "\n" + AFTER + _refusals()


def _refusals() -> str:
    lines = ["| models | what is said |", "|---|---|"]
    for name, models in REFUSED:
        lines.append(f"| {models} | {_refusal(lambda name=name: _facts(name))} |")
    baichuan = {"model_type": "baichuan", "hidden_size": 5120}
    lines.append(f"| Baichuan 13B | {_refusal(lambda: conversion_for(baichuan))} |")
    rest = """
Also refused, each with what to do instead: quantised checkpoints, LoRA adapters given as models, folders without
weights, code in the checkpoint's folder or repository unless `load.trust_remote_code=true`, and multimodal wrappers
(Gemma 3 4B and larger, Mistral Small 3, LLaVA) unless `load.text_only=true`, which takes their text model out, exactly,
and extends that.
"""
    return "\n".join(lines) + "\n" + textwrap.dedent(rest)


def _facts(name: str) -> None:
    model_info_of(getattr(transformers, name)())


def _refusal(read) -> str:
    try:
        read()
    except SkipwiseError as error:
        return str(error).splitlines()[0].replace("|", "/")
    raise AssertionError("this is not refused")
