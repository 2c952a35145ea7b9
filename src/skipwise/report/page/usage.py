"""How to load and serve the exported model: the same lines on the page and in the model card."""

from __future__ import annotations

import json
import shlex
from html import escape
from pathlib import Path
from typing import Any

from skipwise.report.page.html import Section, note


def loading_code(model: str) -> str:
    """Python lines that load the model with transformers and generate.

    Args:
        model: folder or Hub name.
    """
    name = json.dumps(model, ensure_ascii=False)
    return f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({name})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"""


def serving_commands(model: str, target_length: int, gguf: str = "MODEL.gguf") -> str:
    """A command for vLLM, SGLang and llama.cpp, each with the full context window."""
    model, T = shlex.quote(model), target_length
    return f"""\
vllm serve {model} --max-model-len {T}
python -m sglang.launch_server --model-path {model} --context-length {T}
llama-server -m {shlex.quote(gguf)} -c {T}"""


def usage_section(folder: Path, run: dict[str, Any]) -> Section | None:
    """The lines for the model of a run; None if the run has nothing to export yet."""
    title, T = "Load and serve the model", run.get("target_length")
    model, run_path = folder / "model", shlex.quote(str(folder))
    if not run.get("exported") or not model.is_dir() or not T:
        trained = run.get("training") or run.get("exported") is not None
        text = f"Not exported yet. To write {model}: skipwise export {run_path}"
        return Section(title, note(text)) if trained else None
    files = sorted((folder / "gguf").glob("*.gguf"))
    gguf = str(files[0] if files else folder / "gguf" / "MODEL.gguf")
    text = "The window is in the model's config.json: Skipwise is not needed."
    if not files:
        text += f" For llama.cpp, write the GGUF file first: skipwise export {run_path} --to gguf"
    if (folder / "adapter").is_dir():
        text += f" The LoRA adapter alone is in {folder / 'adapter'}."
    code, commands = loading_code(str(model)), serving_commands(str(model), T, gguf)
    return Section(title, f"<pre>{escape(code)}</pre><pre>{escape(commands)}</pre>" + note(text))
