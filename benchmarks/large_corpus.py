"""Memory, speed and resuming of a corpus' way to examples, at two sizes.

python benchmarks/large_corpus.py [--mb 200]

Makes JSON lines of documents cut from the source text of this Python's standard library, and in a
process of its own tokenizes them, builds the packed corpus with documents held out, and reads 1,000
examples. Peaks are resident memory of that process and of its largest worker. They include mapped
pages of the token file, which the kernel takes back when it needs them; anonymous memory, what a
stage leaves that cannot be taken back, is given beside them. So is the process before any text.

Bars: memory does not grow with the corpus; a run killed at 70 % has the rest to do, and its files
are those of a run that was not killed.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHARD = 8_000_000  # bytes of a file
L, T = 2048, 16384


def make_corpus(folder, num_bytes):
    """Documents of some hundred to some hundred thousand characters, half of them under 4,000."""
    from skipwise.pipeline.quickstart import corpus

    text = "".join(source for _, source in corpus.modules())
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    written = 0
    while written < num_bytes:
        with (folder / f"{written:015}.jsonl").open("w") as file:
            while file.tell() < SHARD and written + file.tell() < num_bytes:
                size = int(np.clip(np.exp(rng.normal(8.3, 1.2)), 200, 400_000))
                start = int(rng.integers(0, len(text) - size))
                file.write(json.dumps({"text": text[start : start + size]}) + "\n")
            written += file.tell()


def status():
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = dict(line.split(":", 1) for line in lines if line.endswith("kB"))
    return {key: int(value.split()[0]) / 1024 for key, value in sizes.items()}


def stage(work):
    """What a stage gives, its seconds, its peak of resident memory and what it leaves (MiB)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    memory = {"peak_mib": round(status()["VmHWM"]), "anonymous_mib": round(status()["RssAnon"])}
    return result, {"seconds": round(seconds, 2), **memory}


def measure(folder, cache, num_proc, examples):
    """In a process of its own: one line of JSON."""
    from transformers import AutoTokenizer

    from skipwise.data.corpus import build_corpus
    from skipwise.data.dataset import PoSEDataset
    from skipwise.data.readers import parse_sources
    from skipwise.data.tokenize import tokenize_source
    from skipwise.pipeline.quickstart import MODEL
    from skipwise.pose.samplers import PoSE

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    (source,) = parse_sources([str(folder)])
    figures = {"before_mib": round(status()["VmRSS"])}
    figures["before_anonymous_mib"] = round(status()["RssAnon"])
    store, figures["tokenize"] = stage(
        lambda: tokenize_source(source, tokenizer, num_proc=num_proc, cache=cache, progress=False)
    )
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    figures["tokenize"]["largest_worker_mib"] = round(children)
    figures["num_tokens"] = int(store.offsets[-1])
    figures["num_documents"] = store.num_documents
    if examples:
        corpus, figures["build_corpus"] = stage(
            lambda: build_corpus(
                [store],
                [None],
                min_length=L,
                target_length=T,
                short_documents="pack",
                between=(2,),
                num_held_out="auto",
            )
        )
        _, figures["count_leaks"] = stage(lambda: corpus.count_leaks(corpus.held_out))

        def read():
            sampler = PoSE(train_length=L, target_length=T)
            data = PoSEDataset(corpus, sampler, seed=0, num_examples=1000)
            for k in range(1000):
                data[k]

        _, figures["read_1000_examples"] = stage(read)
    print(json.dumps(figures))


def command(folder, cache, num_proc, examples=False):
    given = ["--measure", str(folder), str(cache), str(num_proc), "examples" if examples else ""]
    return [sys.executable, __file__, *given]


def run(*args, threads=True, **options):
    env = {**os.environ, "TOKENIZERS_PARALLELISM": str(threads).lower()}
    done = subprocess.run(command(*args, **options), env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def files_of(cache):
    (folder,) = [path for path in (cache / "tokens").iterdir() if path.is_dir()]
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def killed_at(share, folder, cache, num_tokens):
    """Kill a run once so much of the tokens is saved; the share that was."""
    process = subprocess.Popen(command(folder, cache, 2))
    saved = 0
    while saved < share * num_tokens and process.poll() is None:
        time.sleep(0.05)
        for file in (cache / "tokens").glob("*.part/progress.json"):
            saved = json.loads(file.read_text())["num_tokens"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    return saved / num_tokens


def main():
    from common import BENCHMARKS, SMOKE, make_parser, write_result

    parser = make_parser(__doc__)
    parser.add_argument("--mb", type=int, default=200, help="size of the larger corpus")
    given = parser.parse_args()
    megabytes = 2 if given.smoke else given.mb
    work = Path(tempfile.mkdtemp(prefix="large_corpus"))
    try:
        figures = {"train_length": L, "target_length": T, "sizes": []}
        for size in [megabytes] if given.smoke else [megabytes // 4, megabytes]:
            text = work / f"text{size}"
            make_corpus(text, size * 1_000_000)
            rows = {"2_processes": run(text, work / f"two{size}", 2, examples=True)}
            if not given.smoke:
                rows |= {
                    "1_process_1_thread": run(text, work / f"one{size}", 1, threads=False),
                    "1_process_all_threads": run(text, work / f"threads{size}", 1, examples=True),
                }
            for row in rows.values():
                seconds = row["tokenize"]["seconds"]
                row["tokens_per_second"] = round(row["num_tokens"] / seconds)
            figures["sizes"].append({"text_mb": size, **rows})
        whole = figures["sizes"][-1]["2_processes"]
        share = killed_at(0.7, text, work / "killed", whole["num_tokens"])
        resumed = run(text, work / "killed", 2)
        figures["resumed"] = {
            "share_done_when_killed": round(share, 3),
            "seconds_whole": whole["tokenize"]["seconds"],
            "seconds_resumed": resumed["tokenize"]["seconds"],
            "same_bytes": files_of(work / "killed") == files_of(work / f"two{megabytes}"),
        }
        results = SMOKE if given.smoke else BENCHMARKS
        print(write_result("large_corpus", figures, folder=results))
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), bool(sys.argv[5]))
    else:
        main()
