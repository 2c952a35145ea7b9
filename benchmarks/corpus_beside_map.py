"""A large corpus to tokens, beside `load_dataset` and `Dataset.map` as trainers use them.

python benchmarks/corpus_beside_map.py [--mb 2000]

The documents of large_corpus.py as JSON lines, with the quickstart's tokenizer, each in a process
of its own with two workers. Peaks are resident memory of that process, with the pages of its files
that are mapped, and of its largest worker. No bar: the figures are given beside each other.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from large_corpus import make_corpus, run, stage, status


def measure_map(folder, cache):
    """In a process of its own: one line of JSON."""
    import datasets
    from transformers import AutoTokenizer

    from skipwise.pipeline.quickstart import MODEL

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    files = [str(file) for file in sorted(folder.iterdir())]
    options = {"split": "train", "cache_dir": str(cache), "num_proc": 2}
    figures = {"before_mib": round(status()["VmRSS"])}
    texts, figures["load_dataset"] = stage(
        lambda: datasets.load_dataset("json", data_files=files, **options)
    )

    def ids(batch):
        return {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}

    tokens, figures["map"] = stage(
        lambda: texts.map(ids, batched=True, num_proc=2, remove_columns=["text"])
    )
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    figures["map"]["largest_worker_mib"] = round(children)
    figures["num_documents"] = len(tokens)
    print(json.dumps(figures))


def run_map(folder, cache):
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    arguments = [sys.executable, __file__, "--measure", str(folder), str(cache)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main():
    from common import BENCHMARKS, SMOKE, make_parser, write_result

    parser = make_parser(__doc__)
    parser.add_argument("--mb", type=int, default=2000, help="size of the corpus")
    given = parser.parse_args()
    megabytes = 1 if given.smoke else given.mb
    work = Path(tempfile.mkdtemp(prefix="corpus_beside_map"))
    try:
        text = work / "text"
        make_corpus(text, megabytes * 1_000_000)
        rows = {"skipwise": run(text, work / "skipwise", 2, threads=False)}
        rows["datasets"] = run_map(text, work / "datasets")
        for name, row in rows.items():
            row["disk_mb"] = round(size_of(work / name) / 1e6, 1)
        theirs = rows["datasets"]["load_dataset"]["seconds"] + rows["datasets"]["map"]["seconds"]
        ratio = round(theirs / rows["skipwise"]["tokenize"]["seconds"], 2)
        figures = {"text_mb": megabytes, "time_ratio": ratio, **rows}
        results = SMOKE if given.smoke else BENCHMARKS
        print(write_result("corpus_beside_map", figures, folder=results))
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure_map(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
