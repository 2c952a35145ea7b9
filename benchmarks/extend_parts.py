"""What each part of `skipwise extend` costs: its seconds, and its share of the run.

python benchmarks/extend_parts.py [key=value ...]

The bundled model, the quickstart's recipe with all choices at `auto`, and all three evaluations.
run.json has the seconds of each stage; here the choices that are measured inside of them are timed
too: what stands between documents (choose_separator), the scaling (choose_scaling), the attention
temperature of the rescaled model before training (untrained_temperature) and of the trained one
(chosen_temperature). A part is counted without the parts that it contains.
"""

import json
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from common import BENCHMARKS, SMOKE, make_parser, write_result

from skipwise.config.parse import parse_recipe
from skipwise.config.recipe import Recipe
from skipwise.pipeline import extend, stages
from skipwise.pipeline.quickstart import MODEL, make_recipe
from skipwise.pipeline.quickstart.corpus import modules

PARTS = {  # function: what it does
    "choose_separator": "separator",
    "load_training_data": "tokenize",
    "choose_scaling": "scaling",
    "check_run": "preflight",
    "evaluate_run": "evaluation",
    "evaluate_untrained": "evaluation untrained",
    "untrained_temperature": "temperature untrained",
    "train_run": "train",
    "chosen_temperature": "temperature trained",
    "export_run": "export",
    "report_run": "report",
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = make_smoke_recipe(folder) if args.smoke else make_recipe(args.overrides)
        seconds: dict[str, float] = {}
        started = time.perf_counter()
        run = timed(seconds, lambda: extend.extend(recipe, folder / "run"))
        total = time.perf_counter() - started
        found = {"stages": run.metadata()["stages"], "chosen": chosen(run.metadata())}
    seconds["rest"] = total - sum(seconds.values())
    figures = {
        "target_length": recipe.target_length,
        "steps": recipe.training.num_steps,
        "seconds": round(total, 1),
        "seconds_by_part": {name: round(s, 2) for name, s in seconds.items()},
        "share_by_part": {name: round(s / total, 4) for name, s in seconds.items()},
        **found,
    }
    write_result("extend_parts", figures, folder=SMOKE if args.smoke else BENCHMARKS)


def chosen(metadata: dict[str, Any]) -> dict[str, Any]:
    """What the measured parts have chosen."""
    keys = ("separator", "rope_choice", "temperature", "untrained")
    return {key: metadata[key] for key in keys if key in metadata}


def timed(seconds: dict[str, float], work: Callable[[], Any]) -> Any:
    """The result of `work`, with the seconds of each of PARTS, without those inside of it."""
    inside = [0.0]

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            label = PARTS[name]
            if name == "evaluate_run":
                label = f"{label} {arguments[2]}"
            inside.append(0.0)
            started = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                spent = time.perf_counter() - started
                seconds[label] = seconds.get(label, 0.0) + spent - inside.pop()
                inside[-1] += spent

        return run

    originals = [
        (m, name, getattr(m, name)) for m in (extend, stages) for name in PARTS if hasattr(m, name)
    ]
    for module, name, function in originals:
        setattr(module, name, wrap(name, function))
    try:
        return work()
    finally:
        for module, name, function in originals:
            setattr(module, name, function)


def make_smoke_recipe(folder: Path) -> Recipe:
    texts = islice((text for _, text in modules() if len(text) > 20_000), 6)
    lines = [json.dumps({"text": text[:20_000]}) + "\n" for text in texts]
    (folder / "text.jsonl").write_text("".join(lines))
    return parse_recipe(
        {
            "model": str(MODEL),
            "target_length": 512,
            "rope": {"type": "yarn"},  # the search takes most of a minute
            "data": {"sources": [str(folder / "text.jsonl")]},
            "training": {"num_steps": 1, "global_batch_size": 2, "micro_batch_size": 2},
            "eval": {"tasks": ["perplexity"], "perplexity_windows": 1},
        }
    )


if __name__ == "__main__":
    main()
