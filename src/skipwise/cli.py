"""The command line: `skipwise VERB ARGUMENT [key=value ...]`. commands.py runs the verbs.

Results go to stdout, progress to stderr. Exit codes: 0 success, 2 an error in one to three lines,
75 a run that was stopped and saved. `main` is the one place where an error of the operating system,
or of a library on it, becomes such lines.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import shlex
import signal
import sys
from contextlib import suppress
from typing import Any

from skipwise import __version__, commands
from skipwise.config.machine import is_main_process, on_signals
from skipwise.errors import RunStopped, SkipwiseError, did_you_mean, system_error
from skipwise.pose.samplers import SAMPLERS
from skipwise.training.distributed.launcher import FAILED, STOPPED

_KEYS = "any recipe key, e.g. training.num_steps=200 rope.type=linear"

_EXAMPLES = """\
examples:
  skipwise quickstart                                  all steps on a bundled model, in minutes
  skipwise extend ./my-model --to 32k --data ./books   extend your model to 32k tokens
  skipwise check ./my-model --to 32k                   find errors before training
  skipwise plan ./my-model --to 32k                    estimate memory, hours and GPUs
  skipwise positions --length 8k --to 32k              show the position ids of training
  skipwise eval ./my-model --lengths 4k..32k --data ./books     evaluate at each context length
  skipwise export runs/my-model-32k --to hf,gguf       files for transformers, vLLM, llama.cpp
  skipwise export --verify ./any-model                 show what each runtime would load

MODEL is a folder, a GGUF file or a hub name, RECIPE a .yaml file or a name of `skipwise recipes`,
RUN a run folder.
Recipe keys can be set on the command line: training.num_steps=200 rope.type=linear
In the help of a verb, defaults are in parentheses.
"""


class _Parser(argparse.ArgumentParser):
    def format_help(self) -> str:
        """Show the epilog, which has the examples, before the options."""
        parser = copy.copy(self)
        parser.description, parser.epilog = f"{self.description}\n\n{self.epilog}", None
        return argparse.ArgumentParser.format_help(parser)

    def error(self, message: str) -> Any:
        raise SkipwiseError(f"{message}\ntype {self.prog} --help")


def main(argv: list[str] | None = None) -> int:
    if argv is None:  # a child imports nothing from the current folder, which may be a stranger's
        os.environ.setdefault("PYTHONSAFEPATH", "1")  # of Python 3.11
        argv = sys.argv[1:]
    with on_signals(_interrupt, signal.SIGTERM):
        try:
            args = _parse(argv)
            status = args.run(args) or 0
            if sys.stdout is not None:  # closed, as by >&-
                sys.stdout.flush()
            return status
        except RunStopped as stopped:
            if is_main_process():
                _say(stopped)
            return STOPPED
        except SkipwiseError as error:
            _say(f"skipwise: {error}")
            return FAILED
        except KeyboardInterrupt:
            _say("\nstopped; run the same command again to continue")
            return STOPPED
        except BaseException as error:
            is_pipe = isinstance(error, BrokenPipeError)  # as `skipwise ... | head` has it
            known = system_error(error, "standard output" if isinstance(error, OSError) else None)
            if known is None:
                raise
            _drop_output()
            if not is_pipe:
                _say(f"skipwise: {known}")
            return 0 if is_pipe else FAILED


def _interrupt(number: int) -> None:
    """Treat SIGTERM and SIGHUP like Ctrl-C: finished work is kept, and the exit code says so."""
    raise KeyboardInterrupt


def _say(message: object) -> None:
    from skipwise.config.trust import without_secrets

    with suppress(OSError, ValueError, AttributeError):  # a log on a full disk, a closed stderr
        print(without_secrets(str(message)), file=sys.stderr, flush=True)


def _drop_output() -> None:
    """Drop what stdout does not take; Python would fail on it at its end."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError, ValueError, AttributeError):  # not a file, in a test; closed
            os.dup2(nowhere, sys.stdout.fileno())


def _parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, with `key=value` settings in `overrides` and the whole line in `argv`."""
    overrides = [a for a in argv if _is_override(a)]
    typed = [a for a in argv if a not in overrides]
    parser = build_parser()
    if not typed:
        parser.set_defaults(run=lambda _: parser.print_help())
        return parser.parse_args([])
    verbs: Any = next(a.choices for a in parser._actions if a.dest == "verb")
    verb, given = typed[0], typed[1:]
    if verb.startswith("-"):
        return parser.parse_args(typed)
    if verb not in verbs:
        names = ", ".join(verbs) + did_you_mean(verb, verbs)
        raise SkipwiseError(f"{verb} is not a verb: choose from {names}")
    options = verbs[verb]._option_string_actions
    takes_settings = verbs[verb].get_default("takes_settings")
    for i, argument in enumerate(given):
        name, _, value = argument.partition("=")
        if argument.startswith("-") and argument.strip("-") and name not in options:
            value = value or next((a for a in given[i + 1 :] if not a.startswith("-")), "...")
            raise SkipwiseError(_unknown_option(verb, name, value, options, takes_settings))
    args = parser.parse_args(typed)
    if overrides and not takes_settings:
        raise SkipwiseError(f"{overrides[0]}: {verb} accepts no key=value settings")
    args.overrides, args.argv = overrides, argv
    return args


def _unknown_option(verb: str, name: str, value: str, options: Any, takes_settings: bool) -> str:
    """The error for an option that the verb does not have, which may be the key of a setting."""
    from skipwise.config.parse import keys_like

    word = name.lstrip("-").replace("-", "_")
    keys = keys_like(word.rpartition(".")[2]) if takes_settings else []
    if verb in ("eval", "positions"):
        sections = ("eval.", "load.") if verb == "eval" else ("positions.",)
        keys = [key for key in keys if key.startswith(sections)]
    exact = [key for key in keys if f".{key}".endswith(f".{word}")]
    meant = did_you_mean(name, options)
    if exact or (not meant and keys):
        typed = " or ".join(shlex.quote(f"{key}={value}") for key in exact or keys)
        meant = f"\nsettings are typed as key=value: {typed}"
    known = ", ".join(o for o in options if o.startswith("--"))
    return f"{name} is not an option of {verb}: choose from {known}{meant}"


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="skipwise",
        description="Extend the context window of a RoPE language model, and measure the result.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"skipwise {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    _add_extend_verbs(verbs)
    _add_preview_verbs(verbs)
    _add_train_verb(verbs)
    _add_eval_verb(verbs)
    _add_output_verbs(verbs)
    return parser


def _add_verb(
    verbs: Any, name: str, run: Any, text: str, example: str, settings: str = ""
) -> argparse.ArgumentParser:
    sub = verbs.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  {example}" + (f"\n\nkey=value: {settings}" if settings else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sub.set_defaults(run=run, takes_settings=bool(settings))
    return sub


def _add_extend_verbs(verbs: Any) -> None:
    example, text = "skipwise quickstart", "extend a small bundled model, from check to export"
    sub = _add_verb(verbs, "quickstart", commands.quickstart_verb, text, example, _KEYS)
    _add_out(sub, "runs/quickstart")

    example = "skipwise extend ./my-model --to 32k --data ./books --out runs/my-model-32k"
    text = "check, train, evaluate before and after, report and export"
    sub = _add_verb(verbs, "extend", commands.extend_verb, text, example, _KEYS)
    _add_recipe_options(sub)
    _add_engine_options(sub)
    _add_out(sub, "runs/NAME")


def _add_preview_verbs(verbs: Any) -> None:
    example = "skipwise check ./my-model --to 32k --data ./books"
    text = "run the preflight checks: find errors that would waste a training run"
    sub = _add_verb(verbs, "check", commands.check_verb, text, example, _KEYS)
    _add_recipe_options(sub)
    sub.add_argument("--json", action="store_true", help="print the checks as JSON")

    example = "skipwise plan ./my-model --to 32k --engine fsdp2 --gpus 8 --gpu A100-80GB"
    text = "estimate memory, time and GPUs of a training run, from config.json alone"
    sub = _add_verb(verbs, "plan", commands.plan_verb, text, example, _KEYS)
    _add_recipe_options(sub)
    sub.add_argument("--engine", metavar="E", help="ddp, fsdp2, zero3 or zero3-offload (ddp)")
    sub.add_argument("--gpus", type=int, metavar="N", help="number of GPUs of the machine (1)")
    sub.add_argument("--gpu", metavar="NAME", help="a GPU, e.g. RTX4090, 24GB or cpu (common ones)")
    sub.add_argument("--measure", action="store_true", help="run three steps and compare")
    sub.add_argument("--json", action="store_true", help="print the plan as JSON")

    example = "skipwise recipes mistral-7b-32k-lora-24gb > my-recipe.yaml"
    text = "list the recipes and examples that come with Skipwise, or print one"
    sub = _add_verb(verbs, "recipes", commands.recipes_verb, text, example)
    sub.add_argument("name", nargs="?", metavar="NAME", help="print this one (list all)")

    example = "skipwise positions --length 8k --to 32k num_chunks=3 skips=sorted"
    text = "print and plot the position ids of training examples and their coverage"
    keys = f"a key of `positions:`, or method={' | '.join(SAMPLERS)}"
    sub = _add_verb(verbs, "positions", commands.positions_verb, text, example, keys)
    sub.add_argument("--length", default="2k", metavar="L", help="training length (2k)")
    sub.add_argument("--to", default="16k", metavar="T", help="target length (16k)")
    sub.add_argument("--seed", type=int, default=0, help="random seed of the examples (0)")
    sub.add_argument("--draw", metavar="FILE", help="write a plot: .png or .svg")
    sub.add_argument("--json", action="store_true", help="print examples and coverage as JSON")


def _add_train_verb(verbs: Any) -> None:
    example = "skipwise train recipes/mine.yaml --engine fsdp2 --gpus 8 --out runs/mine"
    text = "train from a recipe, or resume a run"
    sub = _add_verb(verbs, "train", commands.train_verb, text, example, _KEYS)
    _add_recipe_options(sub)
    _add_engine_options(sub)
    _add_out(sub, "runs/NAME")
    sub.add_argument("--dry-run", action="store_true", help="stop after the preflight")


def _add_eval_verb(verbs: Any) -> None:
    example = "skipwise eval ./my-model --lengths 4k..32k --data ./books --baseline ./base"
    text = "evaluate a model or a run at each context length"
    keys = "a key of `eval:` or `load:`, e.g. eval.passkey_samples=100 load.device_map=auto"
    sub = _add_verb(verbs, "eval", commands.eval_verb, text, example, keys)
    sub.add_argument("thing", metavar="MODEL|RUN", help="model folder, hub name or run folder")
    lengths = "4k..32k or 4k,20k (a run: as in its recipe)"
    sub.add_argument("--lengths", metavar="L,L,...", help=lengths)
    tasks = "perplexity, passkey, needle, ruler, babilong, needle_nonliteral, copy_far, mrcr, "
    tasks += "graphwalks, icl, short-benchmarks, any of lm-eval's (perplexity,passkey,needle,ruler)"
    sub.add_argument("--tasks", metavar="T,T,...", help=tasks)
    sub.add_argument("--data", nargs="+", metavar="PATH", help="text for perplexity and haystacks")
    baseline = "also evaluate this model, first (a run: its base model)"
    sub.add_argument("--baseline", nargs="?", const="base", metavar="MODEL", help=baseline)
    sub.add_argument("--limit", type=int, metavar="N", help="documents per lm-eval task (all)")
    sub.add_argument("--gpus", type=int, metavar="N", help="number of GPUs to share trials out (1)")
    sub.add_argument("--out", metavar="FOLDER", help="results folder of a model (runs/eval-NAME)")
    sub.add_argument("--json", action="store_true", help="print the rows as JSON")


def _add_output_verbs(verbs: Any) -> None:
    example = "skipwise report runs/a runs/b --out comparison.html"
    text = "rewrite the HTML report of a run, or compare several runs on one page"
    sub = _add_verb(verbs, "report", commands.report_verb, text, example)
    sub.add_argument("things", nargs="+", metavar="RUN", help="run or evaluation folders")
    sub.add_argument(
        "--out", metavar="FILE", help="the page (in the run; of several: comparison.html)"
    )

    example = "skipwise export runs/my-model-32k --to hf,gguf --outtype q8_0"
    text = "export a run's model for transformers, as GGUF or as a LoRA adapter; or verify a folder"
    sub = _add_verb(verbs, "export", commands.export_verb, text, example)
    sub.add_argument("thing", metavar="RUN|FOLDER", help="run folder; any model with --verify")
    sub.add_argument("--to", default="hf", metavar="F,F", help="hf, gguf, adapter (hf)")
    sub.add_argument("--outtype", default="f16", help="GGUF type: f32, f16, bf16 or q8_0 (f16)")
    sub.add_argument("--llama-cpp", metavar="PATH", help="llama.cpp folder (found automatically)")
    sub.add_argument("--verify", action="store_true", help="show what each runtime would load")
    sub.add_argument("--json", action="store_true", help="print the result of --verify as JSON")

    example = "skipwise publish runs/my-model-32k me/my-model-32k --private"
    text = "upload a run's model to the Hugging Face Hub, after you confirm the list of files"
    sub = _add_verb(verbs, "publish", commands.publish_verb, text, example)
    sub.add_argument("thing", metavar="RUN", help="run folder")
    sub.add_argument("name", metavar="USER/NAME", help="name of the model on the Hub")
    sub.add_argument("--private", action="store_true", help="create a private repository")
    sub.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    sub.add_argument("--dry-run", action="store_true", help="list the files, upload nothing")


def _add_recipe_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "thing", metavar="MODEL|RECIPE|RUN", help="folder, GGUF file, hub name or recipe"
    )
    sub.add_argument("--to", metavar="T", help="target length, e.g. 32k")
    length = "tokens per example, e.g. 16k, or auto (original length)"
    sub.add_argument("--train-length", metavar="M", help=length)
    sub.add_argument("--data", nargs="+", metavar="PATH", help="text: files, folders or hub names")
    sub.add_argument("--lora", action="store_true", help="train LoRA, norms and embeddings only")


def _add_engine_options(sub: argparse.ArgumentParser) -> None:
    engines = "ddp, fsdp2, zero3 or zero3-offload (several GPUs: ddp)"
    sub.add_argument("--engine", metavar="E", help=engines)
    sub.add_argument("--gpus", type=int, metavar="N", help="number of GPUs to train on (all)")


def _add_out(sub: argparse.ArgumentParser, default: str) -> None:
    sub.add_argument("--out", metavar="FOLDER", help=f"run folder ({default})")


def _is_override(argument: str) -> bool:
    """Whether an argument is key=value, e.g. `training.num_steps=200`, and not an existing file."""
    return bool(re.match(r"[A-Za-z_][\w.]*=", argument)) and not os.path.exists(argument)
