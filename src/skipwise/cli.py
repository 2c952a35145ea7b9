"""The command line: `skipwise VERB THING [key=value ...]`; what the verbs do is in verbs.py.

Results go to stdout, progress to stderr. Exit code 2 and one to three lines for what a user can
mend, 75 for a run that was stopped and saved.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from skipwise import __version__, commands
from skipwise.config.machine import is_main_process
from skipwise.errors import RunStopped, SkipwiseError
from skipwise.pose.samplers import SAMPLERS
from skipwise.training.distributed.launcher import FAILED, STOPPED

_KEYS = "any key of the recipe, as training.num_steps=200 rope.type=linear"

_EXAMPLES = """\
examples:
  skipwise quickstart                                  the whole job on a bundled model, in minutes
  skipwise extend ./my-model --to 32k --data ./books   your model to 32k tokens, with proof
  skipwise check ./my-model --to 32k                   can it be extended? what would go wrong?
  skipwise plan ./my-model --to 32k                    memory, hours, and on which GPU it fits
  skipwise positions --length 8k --to 32k              what training sees, and how much it covers
  skipwise eval ./my-model --lengths 4k..32k --data ./books     how well does it read, and how far?
  skipwise export runs/my-model-32k --to hf,gguf       the model for transformers, vLLM, llama.cpp
  skipwise export --verify ./any-model                 what would each runtime load?

A THING is a model's folder or hub name, a recipe (.yaml) or a run folder.
Any recipe key can be set behind it: training.num_steps=200 rope.type=linear
"""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    settings = [a for a in arguments if _is_setting(a)]
    parser = build_parser()
    given = parser.parse_args([a for a in arguments if a not in settings])
    if given.verb is None:
        parser.print_help()
        return 0
    given.overrides = settings
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminated) if in_main_thread else None
    try:
        if settings and not given.takes_settings:
            raise SkipwiseError(f"{settings[0]}: {given.verb} takes no settings")
        return given.run(given) or 0
    except RunStopped as stopped:
        if is_main_process():
            print(stopped, file=sys.stderr)
        return STOPPED
    except SkipwiseError as error:
        print(f"skipwise: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\nstopped; type the same command again to go on", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: Any) -> None:
    """SIGTERM as Ctrl-C: what is done stays, and the exit code says to try again."""
    raise KeyboardInterrupt


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skipwise",
        description="Extend the context window of a RoPE language model, and prove that it worked.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"skipwise {__version__}")
    parsers = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")

    def verb(
        name: str, run: Any, text: str, example: str, settings: str = ""
    ) -> argparse.ArgumentParser:
        sub = parsers.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=(f"key=value: {settings}\n\n" if settings else "") + f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run, takes_settings=bool(settings))
        return sub

    sub = verb(
        "quickstart",
        commands.quickstart_verb,
        "the whole job on the bundled model",
        "skipwise quickstart",
        _KEYS,
    )
    _out(sub, "runs/quickstart")

    sub = verb(
        "extend",
        commands.extend_verb,
        "check, train, evaluate before and after, report and export",
        "skipwise extend ./my-model --to 32k --data ./books --out runs/my-model-32k",
        _KEYS,
    )
    _recipe_options(sub)
    _engine_options(sub)
    _out(sub, "runs/NAME")

    sub = verb(
        "check",
        commands.check_verb,
        "the preflight: what would waste a training run",
        "skipwise check ./my-model --to 32k --data ./books",
        _KEYS,
    )
    _recipe_options(sub)
    sub.add_argument("--json", action="store_true", help="print the checks as JSON")

    sub = verb(
        "plan",
        commands.plan_verb,
        "memory, time and the GPUs that a run needs, from a config alone",
        "skipwise plan ./my-model --to 32k --engine fsdp2 --gpus 8 --gpu A100-80GB",
        _KEYS,
    )
    _recipe_options(sub)
    sub.add_argument("--engine", metavar="E", help="ddp, fsdp2, zero3 or zero3-offload (ddp)")
    sub.add_argument("--gpus", type=int, metavar="N", help="GPUs of a machine (1)")
    sub.add_argument("--gpu", metavar="NAME", help="look at this GPU only, as A100-80GB (all)")
    sub.add_argument("--measure", action="store_true", help="run three steps and compare")
    sub.add_argument("--json", action="store_true", help="print the plan as JSON")

    sub = verb(
        "positions",
        commands.positions_verb,
        "print and draw training positions and their coverage",
        "skipwise positions --length 8k --to 32k num_chunks=3 skips=sorted",
        f"a key of `positions:`, or method={' | '.join(SAMPLERS)}",
    )
    sub.add_argument("--length", default="2k", metavar="L", help="training length (2k)")
    sub.add_argument("--to", default="16k", metavar="T", help="target length (16k)")
    sub.add_argument("--seed", type=int, default=0, help="of the examples (0)")
    sub.add_argument("--draw", metavar="FILE", help="write a picture: .png or .svg")
    sub.add_argument("--json", action="store_true", help="print examples and coverage as JSON")

    sub = verb(
        "train",
        commands.train_verb,
        "train a recipe, or go on with a run",
        "skipwise train recipes/mine.yaml --engine fsdp2 --gpus 8 --out runs/mine",
        _KEYS,
    )
    _recipe_options(sub)
    _engine_options(sub)
    _out(sub, "runs/NAME")
    sub.add_argument("--dry-run", action="store_true", help="stop after the preflight")

    sub = verb(
        "eval",
        commands.eval_verb,
        "measure any model, or a run's, at every context length",
        "skipwise eval ./my-model --lengths 4k..32k --data ./books --baseline ./base",
        "a key of `eval:` or `load:`, as eval.passkey_samples=100 load.device_map=auto",
    )
    sub.add_argument("thing", metavar="MODEL|RUN", help="model folder, hub name or run folder")
    sub.add_argument("--lengths", metavar="L,L,...", help="4k..32k or 4k,20k; of a run: its own")
    sub.add_argument(
        "--tasks",
        metavar="T,T,...",
        help="perplexity, passkey, needle, ruler or one of its tasks; short-benchmarks or any task "
        "of lm-evaluation-harness (perplexity,passkey,needle,ruler)",
    )
    sub.add_argument("--data", nargs="+", metavar="PATH", help="text for perplexity and haystacks")
    sub.add_argument(
        "--baseline",
        nargs="?",
        const="base",
        metavar="MODEL",
        help="measure this one before it; of a run: its own base",
    )
    sub.add_argument("--limit", type=int, metavar="N", help="documents of each lm-eval task (all)")
    sub.add_argument(
        "--out", metavar="FOLDER", help="evaluation folder of a model (runs/eval-NAME)"
    )
    sub.add_argument("--json", action="store_true", help="print the rows as JSON")

    sub = verb(
        "report",
        commands.report_verb,
        "write a run's page again, or one page of several side by side",
        "skipwise report runs/a runs/b --out comparison.html",
    )
    sub.add_argument("things", nargs="+", metavar="RUN", help="run or evaluation folders")
    sub.add_argument("--out", metavar="FILE", help="page of several (comparison.html)")

    sub = verb(
        "export",
        commands.export_verb,
        "write a run's model again, as GGUF or the adapter alone; or verify any folder",
        "skipwise export runs/my-model-32k --to hf,gguf --outtype q8_0",
    )
    sub.add_argument("thing", metavar="RUN|FOLDER", help="run folder; with --verify any model's")
    sub.add_argument("--to", default="hf", metavar="F,F", help="hf, gguf, adapter (hf)")
    sub.add_argument("--outtype", default="f16", help="of GGUF: f32, f16, bf16 or q8_0 (f16)")
    sub.add_argument("--llama-cpp", metavar="PATH", help="of llama.cpp, for its converter (found)")
    sub.add_argument("--verify", action="store_true", help="say what each runtime would load")
    sub.add_argument("--json", action="store_true", help="print what --verify finds as JSON")

    sub = verb(
        "publish",
        commands.publish_verb,
        "upload a run's model to the Hugging Face Hub, once you have seen what and said yes",
        "skipwise publish runs/my-model-32k me/my-model-32k --private",
    )
    sub.add_argument("thing", metavar="RUN", help="run folder")
    sub.add_argument("name", metavar="USER/NAME", help="of the model on the Hub")
    sub.add_argument("--private", action="store_true", help="for you and your organisation alone")
    sub.add_argument("--yes", action="store_true", help="do not ask")
    sub.add_argument("--dry-run", action="store_true", help="show what would be uploaded")
    return parser


def _recipe_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("thing", metavar="MODEL|RECIPE|RUN", help="folder, hub name or recipe (.yaml)")
    sub.add_argument("--to", metavar="T", help="target length, as 32k")
    sub.add_argument("--data", nargs="+", metavar="PATH", help="text: files, folders or hub names")
    sub.add_argument("--lora", action="store_true", help="train LoRA, norms and embeddings only")


def _engine_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--engine", metavar="E", help="ddp, fsdp2, zero3 or zero3-offload (ddp over several GPUs)"
    )
    sub.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs of this machine, a process each (all)"
    )


def _out(sub: argparse.ArgumentParser, default: str) -> None:
    sub.add_argument("--out", metavar="FOLDER", help=f"run folder ({default})")


def _is_setting(argument: str) -> bool:
    """`training.num_steps=200`, wherever it stands; a file of that name is a file."""
    return bool(re.match(r"[A-Za-z_][\w.]*=", argument)) and not Path(argument).exists()
