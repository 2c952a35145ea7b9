"""A model of real size, made and extended on one GPU: 512 tokens to 32k, by each of some settings.

PYTHONPATH=src python research/gpu/real_size.py --out FOLDER [--minutes 9] [--smoke]
    [--arm NAME key=value ...] ... [--steps 1000] [--full-length 32k] [--pretrain-minutes 5]

A Llama of 126 M parameters (width 768, 16 layers, vocabulary 16,384) is trained from scratch on
the text at hand (real_size_text.py), at 512 tokens, with a share of passkey prompts. Then each arm
extends it by the same number of tokens, and all are evaluated on the same documents and prompts:

  base, none     as it is, and rescaled with YaRN without training
  paper          PoSE as published: N = 2, uniform content, YaRN
  --arm ...      any other settings, keys of `positions` or, with a dot, of the recipe;
                 none given: what `skipwise extend` takes, with Llama 3's scaling
  full-length    --full-length tokens at plain positions, for a target of that length

An arm with temperature=auto is searched for its attention temperature on training text.

FOLDER holds text, base model and figures: a second call does what the first had no time for, and
new arms. Each part is written when it is done. --text-only ends after the text, without a GPU.
"""

import dataclasses
import json
import multiprocessing
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_size_text import Prompts, Text, make_text
from real_size_train import Pretraining, extend, make_model, pretrain
from transformers import LlamaConfig

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from common import RESEARCH, SMOKE, make_parser, write_result

from skipwise.config.lengths import parse_length
from skipwise.config.parse import parse_recipe
from skipwise.config.recipe import Recipe
from skipwise.data.token_cache import TokenStore
from skipwise.evaluation.scoring import exact_match
from skipwise.evaluation.tasks.passkey import passkey_trials, rows_by_depth
from skipwise.evaluation.tasks.perplexity import perplexity
from skipwise.models.attention.temperature import QueryWeights
from skipwise.models.hf_config import model_info_of
from skipwise.models.scaled_config import scaled_config, scaling_for
from skipwise.pipeline.choose_temperature import search_temperature

SEARCHED = 16  # documents, for the temperature
PROMPT_SHARE = 1 / 8  # of the rows, in pre-training and in extension
DEFAULT_ARM = [
    "defaults",
    "rope.type=llama3",
    "content=aligned",
    "key_weights=importance",
    "distillation.weight=3",
    "attention_temperature=auto",
]
_RESERVE = 60  # seconds an arm takes beside its training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Everything that --smoke makes small."""

    vocab_size: int = 16384
    hidden_size: int = 768
    num_layers: int = 16
    length: int = 512  # L
    target: int = 32768  # T
    num_tokens: int = 120_000_000  # of text, at most
    only: str = ""  # packages that the text is taken from
    step_tokens: int = 131072  # of pre-training
    learning_rate: float = 1.5e-3
    warmup_steps: int = 50
    num_prompts: int = 20_000
    windows: int = 48
    trials: int = 50
    batch_tokens: int = 131072  # of an evaluation
    search_tokens: int | None = None  # of a document, in the temperature search; default: all

    @property
    def lengths(self) -> list[int]:
        """L and its doublings to T, of the evaluation."""
        doublings = (self.target // self.length).bit_length()
        return [self.length << i for i in range(doublings)]


TINY = Size(
    vocab_size=1024,
    hidden_size=64,
    num_layers=2,
    length=128,
    target=512,
    num_tokens=2_000_000,
    only="asyncio",
    step_tokens=2048,
    warmup_steps=5,
    num_prompts=50,
    windows=2,
    trials=2,
    batch_tokens=4096,
    search_tokens=2048,
)


class State:
    """The folder and the figures; every part is written as soon as it is done."""

    def __init__(self, folder: Path, results: Path) -> None:
        self.folder, self.results = folder, results
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "figures.json"
        self.figures = json.loads(self.file.read_text()) if self.file.exists() else {"arms": {}}

    def save(self) -> None:
        self.file.write_text(json.dumps(self.figures))
        write_result("real_size", self.figures, folder=self.results, show=False)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9, help="no arm begins that ends later")
    parser.add_argument("--pretrain-minutes", type=float, default=5)
    parser.add_argument("--steps", type=int, default=1000, help="of the extension")
    parser.add_argument("--batch", type=int, default=64, help="examples of L tokens a step")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the extension")
    parser.add_argument("--arm", nargs="+", action="append", metavar="NAME key=value")
    parser.add_argument("--full-length", type=_length, default=32768, help="0: leave it out")
    parser.add_argument("--text-only", action="store_true", help="prepare the text and end")
    parser.add_argument("--eager", action="store_true", help="do not compile the layers")
    args = parser.parse_args()
    ends = time.monotonic() + 60 * args.minutes
    size = TINY if args.smoke else Size()
    if args.smoke:
        args.pretrain_minutes, args.steps, args.batch = 0.05, 5, 4
        args.full_length = min(256, args.full_length)
    state = State(args.out, SMOKE if args.smoke else RESEARCH)
    text, trials, prompts = prepare(state, size)
    if args.text_only:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        state.figures["gpu"] = torch.cuda.get_device_name()
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.hidden_size * 8 // 3,
        num_hidden_layers=size.num_layers,
        num_attention_heads=max(2, size.hidden_size // 64),
        max_position_embeddings=size.length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=text.tokenizer.eos_token_id,
    )
    compiled = device.type == "cuda" and not args.eager
    rate = make_base(state, size, config, text, prompts, args, device, compiled)
    measured = state.figures["arms"]
    for name, overrides in arms(args):
        recipe = recipe_of(name, overrides, size, args)
        settings = settings_of(recipe)
        if name in measured:
            if measured[name]["settings"] != settings:
                raise SystemExit(f"{name} was measured with other settings: give it another name")
            continue
        slower = 1 + settings.get("train_length", 0) / 8192  # attention grows with it
        expected = _RESERVE + slower * settings["tokens"] / (0.7 * rate)
        if time.monotonic() + expected > ends:
            print(f"{name}: not measured: it takes about {expected:.0f} s, and time is short")
            continue
        found = measure(recipe, state, size, config, text, trials, prompts, device, compiled)
        measured[name] = {"settings": settings, **found}
        state.save()
        print(f"{name}: {json.dumps(measured[name])}", flush=True)
    show(measured, size.lengths)


def _length(text: str) -> int:
    return 0 if text == "0" else parse_length(text)


def prepare(state: State, size: Size) -> tuple[Text, dict[int, list[Any]], Prompts]:
    """Text, the evaluation's passkey prompts by length, and prompts to train on."""
    begun = time.monotonic()
    text = make_text(
        state.folder / "text",
        num_tokens=size.num_tokens,
        vocab_size=size.vocab_size,
        only=size.only,
    )
    long = int((np.diff(text.held_out.offsets) >= size.target).sum())
    if not long:
        raise SystemExit(f"no document kept for evaluation has {size.target:,} tokens")
    file = state.folder / "trials.pkl"
    if not file.exists():
        with multiprocessing.get_context("fork").Pool() as pool:  # before CUDA is there
            jobs = [(text.tokenizer, length, size.trials) for length in reversed(size.lengths)]
            found = pool.starmap(_trials, jobs, chunksize=1)
        file.write_bytes(pickle.dumps(dict(zip(reversed(size.lengths), found, strict=True))))
    if "text" not in state.figures:
        seconds = round(time.monotonic() - begun, 1)
        state.figures["text"] = {**text.facts, "long_held_out": long, "seconds": seconds}
        state.save()
        print(f"text: {state.figures['text']}", flush=True)
    trials = pickle.loads(file.read_bytes())
    return text, trials, Prompts(text.tokenizer, np.asarray(text.train.tokens))


def _trials(tokenizer: Any, length: int, count: int) -> list[Any]:
    return passkey_trials(tokenizer, length, num_trials=count, num_depths=10)


def make_base(
    state: State,
    size: Size,
    config: Any,
    text: Text,
    prompts: Prompts,
    args: Any,
    device: torch.device,
    compiled: bool,
) -> float:
    """Pre-train unless it is done; returns tokens a second."""
    if not (state.folder / "base.pt").exists():
        rows = prompts.rows(size.length, size.num_prompts, most=4, seed=1)
        model = make_model(config, device, compiled=compiled)
        count = sum(p.numel() for p in model.parameters())
        print(f"pre-training {count:,} parameters", flush=True)
        settings = Pretraining(
            length=size.length,
            seconds=60 * args.pretrain_minutes,
            step_tokens=size.step_tokens,
            learning_rate=size.learning_rate,
            warmup_steps=size.warmup_steps,
            prompt_share=PROMPT_SHARE,
        )
        found = pretrain(model, np.asarray(text.train.tokens), rows, settings)
        torch.save(model.state_dict(), state.folder / "base.pt")
        state.figures["model"] = {**dataclasses.asdict(size), "parameters": count}
        state.figures["pretraining"] = {**dataclasses.asdict(settings), **found}
        state.save()
        print(f"pretraining: {found}", flush=True)
    return state.figures["pretraining"]["tokens_per_second"]


def arms(args: Any) -> list[tuple[str, list[str]]]:
    """(name, settings) of every arm, in the order of their worth."""
    own = [(name, settings) for name, *settings in args.arm or [DEFAULT_ARM]]
    full = [(f"full-length {args.full_length}", [])] if args.full_length else []
    return [("base", []), ("none", []), ("paper", []), *own, *full]


def recipe_of(name: str, overrides: list[str], size: Size, args: Any) -> Recipe | None:
    """An arm as a recipe; None: the base model as it is."""
    if name == "base":
        return None
    tree: dict[str, Any] = {
        "model": "base",
        "target_length": size.target,
        "train_length": size.length,
        "rope": {"type": "yarn"},
        "positions": {"chunk_lengths": "random", "content": "uniform", "key_weights": "none"},
        "attention_temperature": 1.0,
        "distillation": {"weight": 0.0},
        "training": {
            "num_steps": args.steps,
            "global_batch_size": args.batch,
            "learning_rate": args.learning_rate,
        },
    }
    if name == "none":
        tree["method"] = "none"
    if name.startswith("full-length"):
        full_length = {"target_length": args.full_length, "train_length": None}
        tree |= {"method": "full", **full_length}
        tree["training"]["global_batch_size"] = args.batch * size.length // args.full_length
    top = {field.name for field in dataclasses.fields(Recipe)}
    full = []
    for override in overrides:
        key = override.split("=")[0]
        full.append(override if "." in key or key in top else f"positions.{override}")
    return parse_recipe(tree, full)


def settings_of(recipe: Recipe | None) -> dict[str, Any]:
    """What is written of an arm's recipe."""
    if recipe is None or recipe.method == "none":
        return {"method": "none", "rope": recipe and recipe.rope.type, "tokens": 0}
    training = recipe.training
    length = recipe.target_length if recipe.method == "full" else recipe.train_length or 0
    return {
        "method": recipe.method,
        "train_length": length,
        "target_length": recipe.target_length,
        "rope": recipe.rope.type,
        "positions": dataclasses.asdict(recipe.positions),
        "num_steps": training.num_steps,
        "global_batch_size": training.global_batch_size,
        "learning_rate": training.learning_rate,
        "distillation": recipe.distillation.weight,
        "temperature": recipe.attention_temperature,
        "tokens": training.num_steps * training.global_batch_size * length,
    }


def measure(
    recipe: Recipe | None,
    state: State,
    size: Size,
    config: Any,
    text: Text,
    trials: dict[int, list[Any]],
    prompts: Prompts,
    device: torch.device,
    compiled: bool,
) -> dict[str, Any]:
    """Train one arm from the base model, and evaluate it."""
    begun = time.monotonic()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = config
    if recipe is not None:
        facts = model_info_of(config)
        scaling = scaling_for(recipe, facts)
        config = scaled_config(config, facts, scaling, recipe.target_length)
    weights = torch.load(state.folder / "base.pt", map_location=device, weights_only=True)
    found: dict[str, Any] = {}
    if recipe is not None and recipe.method != "none":
        model = make_model(config, device, compiled=compiled)
        model.load_state_dict(weights)
        L = settings_of(recipe)["train_length"]
        rows = prompts.rows(L, max(20, size.num_prompts * size.length // (8 * L)), most=1, seed=2)
        asked = TokenStore(tokens=rows.reshape(-1), offsets=np.arange(len(rows) + 1) * L)
        teacher = None
        if recipe.distillation.weight:
            teacher = make_model(base, device, compiled=compiled, dtype=dtype).eval()
            teacher.load_state_dict(weights)
        stores = [text.train, asked]
        found |= extend(model, recipe, size.length, stores, PROMPT_SHARE, teacher)
        weights = model.state_dict()
        del model, teacher
    model = make_model(config, device, dtype=dtype).eval()  # not compiled: lengths differ
    model.load_state_dict(weights)
    del weights
    begun_evaluation = time.monotonic()
    if recipe is not None and recipe.attention_temperature == "auto":
        long = np.flatnonzero(np.diff(text.train.offsets) >= size.target)[:SEARCHED].tolist()
        documents = [
            np.asarray(text.train.document(i), np.int64)[: size.search_tokens] for i in long
        ]
        found["temperature"], tried = search_temperature(
            model, documents, size.length, size.target, batch_tokens=size.batch_tokens
        )
        found["search"] = [dataclasses.asdict(one) for one in tried]
        QueryWeights(model).set(found["temperature"])
    found |= evaluate(model, text, trials, size)
    found["evaluation_seconds"] = round(time.monotonic() - begun_evaluation, 1)
    found["all_seconds"] = round(time.monotonic() - begun, 1)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def evaluate(model: Any, text: Text, trials: dict[int, list[Any]], size: Size) -> dict[str, Any]:
    """Perplexity of the same tokens, and passkey, by context length."""
    documents = [text.held_out.document(i) for i in range(text.held_out.num_documents)]
    rows = perplexity(
        model,
        documents,
        size.lengths,
        num_windows=size.windows,
        batch_tokens=size.batch_tokens,
    )
    found: dict[str, Any] = {"perplexity": {}, "passkey": {}, "passkey_by_depth": {}}
    for row in rows:
        if row["metric"] == "perplexity":
            found["perplexity"][str(row["context_length"])] = [
                row[key] and round(row[key], 4) for key in ("value", "low", "high")
            ]
    for length, asked in sorted(trials.items()):
        if not asked:
            continue
        right = exact_match(model, asked, size.batch_tokens)
        found["passkey"][str(length)] = round(float(np.mean(right)), 3)
        by_depth = rows_by_depth("passkey", length, asked, right)
        found["passkey_by_depth"][str(length)] = [round(row["value"], 2) for row in by_depth]
    return found


def show(measured: dict[str, Any], lengths: list[int]) -> None:
    """A table of each quantity, arms by lengths."""
    for quantity in ("perplexity", "passkey"):
        print(f"\n{quantity:24}" + "".join(f"{length:>9}" for length in lengths))
        for name, found in measured.items():
            values = [found[quantity].get(str(length)) for length in lengths]
            values = [value[0] if isinstance(value, list) else value for value in values]
            print(
                f"{name:24}"
                + "".join(f"{v:9.3f}" if v is not None else "        -" for v in values)
            )


if __name__ == "__main__":
    main()
