"""Passkey and needle grid against one full forward pass per trial with `generate()`.

python benchmarks/evaluation_speed.py [--lengths 256..2048]

The bundled model, rescaled to 2,048 tokens, answers the evaluation's own trials twice: as Skipwise
does, and prompt by prompt with transformers' `generate()`, greedy, as many new tokens as the answer
has. Both in turns, a length at a time; the answers are compared trial by trial.

Bars: 5 times faster over both tasks, same answers.
"""

import time
from itertools import islice

import torch
from common import BENCHMARKS, SMOKE, make_parser, write_result

from skipwise.config.lengths import parse_lengths
from skipwise.config.recipe import EvalSettings
from skipwise.data.tokenize import encode
from skipwise.evaluation.scoring import Trial, exact_match
from skipwise.evaluation.tasks.passkey import needle_trials, passkey_trials
from skipwise.evaluation.tasks.prompts import haystack_words
from skipwise.models.prepared import load_scaled
from skipwise.pipeline.quickstart import MODEL, corpus


def generated_right(model, trials: list[Trial]) -> list[bool]:
    right = []
    for trial in trials:
        asked = torch.tensor([trial.prompt])
        out = model.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=trial.num_answer,
            do_sample=False,
        )
        said = out[0, asked.shape[1] :].tolist()
        right.append(said == trial.input_ids[len(trial.prompt) :])
    return right


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--lengths", default="256..2048")
    args = parser.parse_args()
    lengths, settings = parse_lengths(args.lengths), EvalSettings()
    if args.smoke:
        lengths = [512]
        settings = EvalSettings(passkey_samples=2, needle_samples=2, num_depths=2)
    model, tokenizer, _ = load_scaled(str(MODEL), max(lengths), rope_type="yarn")
    model.eval()
    held_out = (source for name, source in corpus.modules() if corpus.held_out(name))
    text = "".join(islice(held_out, 2 if args.smoke else None))
    words = haystack_words(
        tokenizer, [encode(tokenizer, text[: 8 * max(lengths)])], 2 * max(lengths)
    )
    depths = {"num_depths": settings.num_depths}
    rows, seconds = [], {"skipwise": 0.0, "generate": 0.0}
    exact_match(model, passkey_trials(tokenizer, 256, num_trials=2, **depths), 16384)  # warm up
    for length in lengths:
        tasks = {
            "passkey": passkey_trials(
                tokenizer, length, num_trials=settings.passkey_samples, **depths
            ),
            "needle": needle_trials(
                tokenizer,
                length,
                num_trials=settings.needle_samples,
                words=words,
                per_haystack=settings.needles_per_haystack,
                **depths,
            ),
        }
        for task, trials in tasks.items():
            started = time.perf_counter()
            ours = exact_match(model, trials, settings.batch_tokens)
            between = time.perf_counter()
            theirs = generated_right(model, trials)
            ended = time.perf_counter()
            took = {"skipwise": between - started, "generate": ended - between}
            seconds = {name: seconds[name] + took[name] for name in seconds}
            rows.append(
                {
                    "task": task,
                    "length": length,
                    "trials": len(trials),
                    "right": sum(ours),
                    "same_answers": ours == theirs,
                    "ratio": round(took["generate"] / took["skipwise"], 2),
                    **{f"{name}_seconds": round(took[name], 2) for name in took},
                }
            )
            print(rows[-1], flush=True)
    ratio = seconds["generate"] / seconds["skipwise"]
    print(f"both tasks at all lengths: {ratio:.2f} times faster")
    figures = {"ratio": round(ratio, 2), "rows": rows}
    write_result("evaluation_speed", figures, folder=SMOKE if args.smoke else BENCHMARKS)


if __name__ == "__main__":
    main()
