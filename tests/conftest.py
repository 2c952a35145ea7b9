"""Small models and texts that the tests share; everything is made here, nothing is downloaded."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from forked import plain

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
_STATE = tempfile.TemporaryDirectory(prefix="skipwise-state-")  # for keys of signatures
os.environ["XDG_STATE_HOME"] = _STATE.name
if sys.platform != "win32":  # tests send it, also under nohup, which ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if "PYTEST_XDIST_WORKER" in os.environ:  # workers beside each other, so one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# Files that take longest come first, so that no worker is left alone with one at the end.
_LONGEST = ("test_scripts", "test_engines", "test_extend", "test_report_page", "test_families")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: i for i, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish() -> None:
    """What the imports made stays: accelerate collects garbage often, half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _plain_processes() -> None:
    """Exports are loaded again by processes that have imported transformers already."""
    export = sys.modules.get("skipwise.export.hf")
    if export is not None:  # else no test here exports
        export.subprocess = plain  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPWISE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers, window 64, with the bundled tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from skipwise.pipeline.quickstart import MODEL

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve documents of some hundred to some thousand tokens, as JSON lines."""
    folder = tmp_path_factory.mktemp("text")
    lines = []
    for i in range(12):
        words = [f"def f{i}_{j}(x): return x + {i * j}\n" for j in range(60 + 10 * i)]
        lines.append(json.dumps({"text": "".join(words)}))
    (folder / "part.jsonl").write_text("\n".join(lines) + "\n")
    return folder
