"""The exported model in llama.cpp: GGUF of three types, and the passkeys that each finds.

    python research/real_model/serve_gguf.py RUN/model [--length 12288] [--trials 5]

f16 and q8_0 are written as `skipwise export --to gguf` does; Q4_K_M is llama.cpp's quantize of the
f16 file. The questions are those of `skipwise eval --tasks passkey`. It needs llama-cpp-python
(the extras `gguf` and `llama-cpp`) and the converter (tools/fetch_converter.py).
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
from common import make_parser, write_result  # noqa: E402

from skipwise.config.machine import num_cores  # noqa: E402

TYPES = ("f16", "q8_0", "Q4_K_M")


def quantize(source: Path, target: Path) -> Path:
    """Q4_K_M by llama.cpp; tensors whose rows are no multiple of 256 get another type."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings)
    if code:
        sys.exit(f"error: llama.cpp's quantize ended with {code}")
    return target


def ask(file: Path, tokenizer: Any, trials: list[Any], length: int) -> list[int]:
    """1 for each passkey that is found."""
    import llama_cpp

    threads = num_cores()
    model = llama_cpp.Llama(
        str(file),
        n_ctx=length,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    found = []
    for trial in trials:
        text, answer = (
            tokenizer.decode(ids) for ids in (trial.prompt, trial.input_ids[-trial.num_answer :])
        )
        if model.tokenize(text.encode()) != list(trial.prompt):
            sys.exit("error: llama.cpp reads the prompt as other tokens")
        model.reset()
        said = model.create_completion(text, max_tokens=trial.num_answer, temperature=0)
        found.append(int(said["choices"][0]["text"].strip() == answer.strip()))
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", type=Path, help="the folder that was exported")
    parser.add_argument("--length", type=int, default=12288, help="tokens of the prompt")
    parser.add_argument("--trials", type=int, default=5)
    args = parser.parse_args()
    if not (args.model / "config.json").exists():
        parser.error(f"{args.model} holds no exported model")
    try:
        import llama_cpp
    except ImportError:
        parser.error("no llama-cpp-python: pip install '.[gguf,llama-cpp]'")
    from transformers import AutoTokenizer

    from skipwise.evaluation.tasks.passkey import passkey_trials
    from skipwise.export.gguf import find_converter, to_gguf
    from skipwise.report.intervals import wilson

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    amounts = {"num_trials": args.trials, "num_depths": args.trials}
    trials = passkey_trials(tokenizer, args.length, **amounts)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        files = {kind: Path(scratch) / f"{kind}.gguf" for kind in TYPES}
        for kind, file in files.items():
            if kind == "Q4_K_M":
                quantize(files["f16"], file)
            else:
                to_gguf(args.model, file, kind, converter=find_converter())
            started = time.monotonic()
            found = ask(file, tokenizer, trials, args.length + 16)
            row = {"type": kind, "mib": round(file.stat().st_size / 2**20), "found": found}
            row |= {"interval": wilson(sum(found), len(found))}
            rows.append({**row, "seconds": round(time.monotonic() - started)})
            print(f"{kind}: {sum(found)} of {len(found)}, {row['mib']} MiB", flush=True)
    about = {"llama_cpp": llama_cpp.__version__, "length": args.length, "rows": rows}
    write_result("serve_gguf", about, folder=HERE / "results", show=False)


if __name__ == "__main__":
    main()
