"""What the verbs do: options to a recipe, the work, and what is printed of it.

Heavy imports stand inside the bodies, so that help and mistakes come at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipwise.config.machine import is_main_process, world_size
from skipwise.errors import SkipwiseError
from skipwise.training.distributed.launcher import FAILED, launched, num_gpus

if TYPE_CHECKING:
    from skipwise.config.recipe import Recipe


def _recipe(given: argparse.Namespace) -> Recipe:
    """The recipe that the command names: a file, a run's own, or defaults around a model."""
    from skipwise.config.parse import load_recipe, load_run_recipe, parse_recipe
    from skipwise.config.run_folder import RunFolder

    data, overrides = given.data, given.overrides
    path = Path(given.thing).expanduser()
    options: list[str] = [f"target_length={given.to}"] if given.to else []
    options += [f"data.sources={json.dumps(data)}"] if data else []
    options += ["lora={}"] if given.lora else []
    options += [f"engine={given.engine}"] if getattr(given, "engine", None) else []
    if path.suffix in (".yaml", ".yml"):
        return load_recipe(path, options + overrides)
    run = RunFolder(path)
    if run.recipe_file.exists():
        return load_run_recipe(run.recipe_file, options + overrides)
    if not given.to and not any(o.startswith("target_length=") for o in overrides):
        raise SkipwiseError("how far should it reach? type --to 32k")
    return parse_recipe({"model": given.thing}, options + overrides)


def _command() -> str:
    return shlex.join(["skipwise", *sys.argv[1:]])


def _default_out(recipe: Recipe, given: argparse.Namespace) -> Path:
    if given.out:
        return Path(given.out)
    if (Path(getattr(given, "thing", "")) / "recipe.yaml").exists():
        return Path(given.thing)
    return Path("runs") / recipe.run_name


def _finish(run: Any, table: str) -> None:
    print(table)
    print(f"\nmodel   {run.model}\nreport  {run.report / 'index.html'}")
    print(f"\nnext: skipwise eval {run.path} --lengths ..., or load {run.model} with transformers")


def quickstart_verb(given: argparse.Namespace) -> int:
    _quiet()
    from skipwise.pipeline.extend import extend
    from skipwise.pipeline.quickstart import make_recipe
    from skipwise.report import format_table

    out = Path(given.out or "runs/quickstart")
    run = extend(make_recipe(given.overrides), out, command=_command())
    _finish(run, format_table(run.results()))
    return 0


def extend_verb(given: argparse.Namespace) -> int:
    if launched():
        raise SkipwiseError(
            "extend starts its processes itself: type skipwise extend ... --gpus N\n"
            "or accelerate launch -m skipwise train RECIPE, and skipwise extend RUN after it"
        )
    recipe = _recipe(given)
    _quiet()
    from skipwise.pipeline.extend import extend
    from skipwise.report import format_table

    run = extend(
        recipe,
        _default_out(recipe, given),
        command=_command(),
        num_processes=_num_processes(given, recipe),
    )
    _finish(run, format_table(run.results()))
    return 0


def _num_processes(given: argparse.Namespace, recipe: Recipe) -> int:
    """Processes to start, 0 for none: training in this one."""
    if launched():
        if given.gpus is not None:
            raise SkipwiseError(
                f"--gpus {given.gpus}: a launcher has started {world_size()} processes "
                "already\nleave --gpus out, or start skipwise without the launcher"
            )
        return 0
    if given.gpus is not None and given.gpus < 1:
        raise SkipwiseError("--gpus: 1 or more; leave it out for all of this machine")
    from skipwise.config.recipe import SHARDED_ENGINES

    found = num_gpus()
    if given.gpus is not None and 0 < found < given.gpus:
        raise SkipwiseError(f"--gpus {given.gpus}: this machine has {found}")
    wanted = given.gpus or max(1, found)
    return wanted if wanted > 1 or recipe.engine in SHARDED_ENGINES else 0


def check_verb(given: argparse.Namespace) -> int:
    from skipwise.models.hf_config import is_config_alone

    recipe = _recipe(given)
    config_alone = is_config_alone(recipe.model)
    if config_alone:
        from skipwise.preflight.config import check_config_alone as check
    else:
        _quiet()
        from skipwise.pipeline.checks import check
    checks = check(recipe)
    if given.json:
        print(json.dumps([dataclasses.asdict(c) for c in checks], indent=1))
    else:
        print("\n".join(str(c) for c in checks))
        if config_alone:
            print("\nthere are no weights, so neither the loaded model nor the text was checked")
        elif all(c.passed for c in checks):
            data = " ".join(given.data or ["FOLDER"])
            print(f"\nnext: skipwise extend {given.thing} --to {given.to or 'T'} --data {data}")
    return 0 if all(c.passed for c in checks) else 2


def plan_verb(given: argparse.Namespace) -> int:
    from skipwise.planning import find_gpu, format_measured, format_plan, make_plan, plan_to_dict

    recipe = _recipe(given)
    gpu = find_gpu(given.gpu) if given.gpu else None
    plan = make_plan(recipe, num_gpus=1 if given.gpus is None else given.gpus, gpu=gpu)
    measured = None
    if not given.json:
        print(format_plan(plan), flush=True)
    if given.measure:
        from skipwise.pipeline.profile import measure

        print("measuring three steps ...", file=sys.stderr, flush=True)
        measured = measure(recipe)
    if given.json:
        taken = {"measured": dataclasses.asdict(measured)} if measured else {}
        print(json.dumps({**plan_to_dict(plan), **taken}, indent=1))
    elif measured:
        print(f"\n{format_measured(plan, measured)}")
    return 0


def positions_verb(given: argparse.Namespace) -> int:
    from skipwise.config.lengths import parse_length
    from skipwise.config.parse import parse_recipe
    from skipwise.config.samplers import make_sampler
    from skipwise.pose.preview import describe_positions, draw_text

    L, T = parse_length(given.length), parse_length(given.to)
    overrides = [o if o.startswith("method=") else f"positions.{o}" for o in given.overrides]
    recipe = parse_recipe({"model": "-", "target_length": T}, overrides)
    sampler = make_sampler(recipe, L)
    metadata = describe_positions(sampler, given.seed)
    if given.json:
        print(json.dumps(metadata))
    else:
        print(draw_text(metadata, sampler.train_length, T))
    if given.draw:
        from skipwise.report import plot_positions

        pairs = list(zip(metadata["distances"], metadata["coverage"], strict=True))
        figure = plot_positions(metadata["examples"], pairs, sampler.train_length, T)
        try:
            figure.savefig(given.draw, dpi=150, bbox_inches="tight")
        except (OSError, ValueError) as error:
            raise SkipwiseError(f"{given.draw} could not be written: {error}") from error
        print(f"wrote {given.draw}", file=sys.stderr)
    return 0


def train_verb(given: argparse.Namespace) -> int:
    recipe = _recipe(given)
    out = _default_out(recipe, given)
    _quiet()
    from skipwise.pipeline.stages import launch_training, open_training, prepare_training, train_run
    from skipwise.training.distributed.engines import Turn

    num_processes = _num_processes(given, recipe)
    if num_processes:
        run = open_training(recipe, out, _command(), num_processes)
        launch_training(run, num_processes, only_check=given.dry_run)
    else:
        with Turn(recipe):
            plan, data, run = prepare_training(recipe, out, _command())
        train_run(plan, data, run, record=True, only_check=given.dry_run)
    if is_main_process():
        if given.dry_run:
            print("checked, nothing trained")
        else:
            last = run.finish if recipe.full_length.fraction else run
            print(f"trained: {last.checkpoints}\nnext: skipwise export {run.path}")
    return 0


def eval_verb(given: argparse.Namespace) -> int:
    from skipwise.config.lengths import parse_lengths

    lengths = parse_lengths(given.lengths) if given.lengths else []
    tasks = [t.strip() for t in given.tasks.split(",")] if given.tasks is not None else []
    limit = [f"eval.limit={given.limit}"] if given.limit is not None else []
    if given.limit is not None and given.limit < 1:
        raise SkipwiseError("--limit: 1 document or more; leave it out for all")
    _quiet()
    from skipwise.evaluation.run import evaluate
    from skipwise.report import format_table, write_report

    rows, run = evaluate(
        given.thing,
        lengths=lengths,
        tasks=tasks,
        data=given.data or [],
        baseline=given.baseline,
        overrides=limit + given.overrides,
        out=given.out,
        command=_command(),
    )
    page = write_report(run.path)
    print(json.dumps(rows, indent=1) if given.json else format_table(rows))
    where = sys.stderr if given.json else sys.stdout
    print(f"\nresults {run.path / 'results.json'}\nreport  {page}", file=where)
    return 0


def report_verb(given: argparse.Namespace) -> int:
    from skipwise.config.run_folder import RunFolder
    from skipwise.report import compare_runs, format_table, write_report

    if len(given.things) > 1:
        page = Path(given.out or "comparison.html")
        table = compare_runs([Path(thing) for thing in given.things], page)
        print(f"{table}\n\nreport  {page}")
        return 0
    if given.out:
        raise SkipwiseError("--out is for several runs: a run's page is in its report folder")
    run = RunFolder(given.things[0])
    if run.metadata().get("kind") != "evaluation":
        run.recipe()
    page = write_report(run.path)
    print(format_table(run.results()))
    print(f"\nreport  {page}")
    return 0


def export_verb(given: argparse.Namespace) -> int:
    if given.verify:
        return _verify(given)
    kinds = [kind.strip() for kind in given.to.split(",")]
    unknown = [kind for kind in kinds if kind not in ("hf", "gguf", "adapter")]
    if unknown:
        raise SkipwiseError(f"--to {unknown[0]}: choose from hf, gguf, adapter")
    _quiet()
    from skipwise.config.run_folder import RunFolder
    from skipwise.pipeline.stages import export_again

    run = RunFolder(given.thing)
    for path in export_again(run, kinds, given.outtype, given.llama_cpp):
        print(path)
    print(f"next: skipwise eval {run.path}, or skipwise publish {run.path} USER/NAME")
    return 0


def _verify(given: argparse.Namespace) -> int:
    from skipwise.config.run_folder import RunFolder
    from skipwise.export.runtimes import as_json, format_verdict, verify_folder

    folder = Path(given.thing).expanduser()
    run = RunFolder(folder)
    files = sorted(folder.glob("*.gguf"))
    if run.recipe_file.exists():
        folder = run.model
        files = sorted(run.gguf.glob("*.gguf"))
    verdict = verify_folder(folder)
    checks = []
    for file in files:
        from skipwise.export.gguf import check_gguf

        checks += [(file.name, check) for check in check_gguf(file, folder)]
    well = verdict.well and all(check.passed for _, check in checks)
    if given.json:
        found = [{"file": name, **dataclasses.asdict(check)} for name, check in checks]
        print(json.dumps({**as_json(verdict), "gguf": found, "well": well}, indent=1))
    else:
        print(format_verdict(verdict))
        for name, check in checks:
            print(f"{name}: {check}")
    return 0 if well else FAILED


def publish_verb(given: argparse.Namespace) -> int:
    from skipwise.config.run_folder import RunFolder
    from skipwise.export.hub import confirm, describe_upload, plan_upload, upload_files
    from skipwise.export.model_card import write_card

    run = RunFolder(given.thing)
    run.recipe()
    plan_upload(run, given.name, given.private)  # nothing is written where it would be refused
    write_card(run, given.name)
    upload = plan_upload(run, given.name, given.private)
    print(describe_upload(upload), file=sys.stderr, flush=True)
    if given.dry_run:
        print("nothing uploaded")
    elif given.yes or confirm(upload):
        print(upload_files(upload))
    else:
        print("nothing uploaded")
    return 0


def _quiet() -> None:
    """Our own progress is enough; warnings stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not num_gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed complains on stdout
    for library in ("transformers", "peft", "torch"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    from transformers.utils import logging

    logging.disable_progress_bar()
