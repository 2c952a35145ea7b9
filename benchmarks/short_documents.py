"""What a short document costs beside the tokenizer itself: one JSON line a document.

python benchmarks/short_documents.py [--documents 200000]

Processor seconds of `Tokenizer.encode_batch` on a list of strings, and of `tokenize_source` on the
same texts as JSON lines, into a new cache; one thread, in turns. Bar: 1.4 of the first (not met).
"""

import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from common import BENCHMARKS, SMOKE, make_parser, write_result

ROUNDS = 3
LENGTHS = {"about_30_characters": (15, 45), "about_100_characters": (60, 140)}


def measure(tokenizer, text, count, shortest, longest, folder):
    from skipwise.data.readers import parse_sources
    from skipwise.data.tokenize import tokenize_source

    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(text) - longest, count).tolist()
    sizes = rng.integers(shortest, longest + 1, count).tolist()
    lines = [text[a : a + n] for a, n in zip(starts, sizes, strict=True)]
    file = folder / "lines.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (source,) = parse_sources([str(file)])
    seconds, backend = {"encode_batch": [], "tokenize_source": []}, tokenizer.backend_tokenizer
    for number in range(ROUNDS):
        start = time.process_time()
        encoded = backend.encode_batch(lines, add_special_tokens=False)
        num_tokens = sum(len(one.ids) for one in encoded)
        seconds["encode_batch"].append(time.process_time() - start)
        del encoded
        start = time.process_time()
        store = tokenize_source(
            source, tokenizer, num_proc=1, cache=folder / f"cache{number}", progress=False
        )
        seconds["tokenize_source"].append(time.process_time() - start)
        assert int(store.offsets[-1]) == num_tokens and store.num_documents == count
    pairs = zip(seconds["tokenize_source"], seconds["encode_batch"], strict=True)
    found = {name: round(median(times), 2) for name, times in seconds.items()}
    return {**found, "ratio": round(median(a / b for a, b in pairs), 2), "num_tokens": num_tokens}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--documents", type=int, default=200_000)
    given = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    from skipwise.pipeline.quickstart import MODEL, corpus

    count = 2000 if given.smoke else given.documents
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = " ".join("".join(source for _, source in corpus.modules()).split())
    figures = {"documents": count}
    for name, (shortest, longest) in LENGTHS.items():
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = measure(tokenizer, text, count, shortest, longest, Path(folder))
    print(write_result("short_documents", figures, folder=SMOKE if given.smoke else BENCHMARKS))


if __name__ == "__main__":
    main()
