"""A tiny random chat model and made-up texts, so that run.py --smoke runs in seconds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"


def make_model(folder: Path) -> Path:
    """A Llama of two layers for 64 tokens, made in a process of its own."""
    if not (folder / "config.json").exists():
        pid = os.fork()
        if not pid:
            _write(folder)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    return folder


def _write(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from skipwise.pipeline.quickstart import MODEL

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=1024, max_position_embeddings=64, **shape, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def make_texts(folder: Path) -> Path:
    """Four documents to train on and two held out, of words that are made up."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(200)]
    for part, count in (("train", 6), ("held_out", 2)):
        texts = [" ".join(rng.choice(words, 1500)) for _ in range(count)]
        lines = [json.dumps({"package": part, "text": text}) + "\n" for text in texts]
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
