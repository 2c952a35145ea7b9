"""A context beyond `PREFILL` tokens at once, beside pieces in front of a cache.

python benchmarks/long_pass.py [--length 8192]

Seconds of the last 512 logits of a random Llama of SmolLM2-135M's shape, in turns, and the ratio.
"""

import time
from statistics import median

import torch
from common import BENCHMARKS, SMOKE, make_parser, write_result
from transformers import AutoModelForCausalLM, LlamaConfig


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--length", type=int, default=8192)
    given = parser.parse_args()
    from skipwise.evaluation import prefill

    length, rounds, sizes = given.length, 2, (576, 1536, 30, 9, 3)
    if given.smoke:
        length, rounds, sizes, prefill.PREFILL = 96, 1, (16, 16, 6, 2, 1), 24
    hidden, inner, layers, heads, kv_heads = sizes
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids, at_once = torch.randint(1024, (1, length)), prefill._one_pass
    positions = torch.arange(length - min(512, length // 2), length)
    assert at_once(model, length)
    seconds, logits = {"at_once": [], "pieces": []}, {}
    with torch.inference_mode():
        prefill.reading(model)
        for _ in range(rounds):
            for name in seconds:
                pieces = name == "pieces"
                prefill._one_pass = (lambda m, n: n <= prefill.PREFILL) if pieces else at_once
                start = time.perf_counter()
                logits[name] = prefill.logits_at(model, ids, positions)
                seconds[name].append(time.perf_counter() - start)
    assert torch.allclose(logits["at_once"], logits["pieces"], atol=1e-3)
    found = {name: round(median(times), 3) for name, times in seconds.items()}
    figures = {"length": length, "seconds": found}
    figures["ratio"] = round(found["pieces"] / max(1e-9, found["at_once"]), 2)
    write_result("long_pass", figures, folder=SMOKE if given.smoke else BENCHMARKS)


if __name__ == "__main__":
    main()
