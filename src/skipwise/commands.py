"""The verbs of the command line: turn options into a recipe, run it, print the result.

Heavy imports are inside the functions, so that help and error messages appear at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from skipwise.config.machine import is_main_process, world_size
from skipwise.errors import READ_ONLY, SkipwiseError, did_you_mean
from skipwise.training.distributed.launcher import FAILED, launch, launched, num_gpus

if TYPE_CHECKING:
    from skipwise.config.recipe import Recipe
    from skipwise.config.run_folder import RunFolder


def _load_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe, whose model on the Hub is there: asked before the imports that take seconds."""
    from skipwise.models.hf_config import is_local, read_config

    recipe = _read_recipe(args)
    is_path = recipe.model.startswith((".", "/", "~")) or recipe.model.endswith(".gguf")
    if not is_path and not is_local(recipe.model):
        read_config(recipe.model, recipe.load)
    return recipe


def _read_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe of a .yaml file or a run folder, or the default recipe of a model."""
    from skipwise.config.bundled import find_recipe
    from skipwise.config.parse import load_recipe, load_run_recipe, parse_recipe
    from skipwise.config.run_folder import RunFolder

    data, overrides = args.data, args.overrides
    path = Path(args.thing).expanduser()
    options: list[str] = [f"target_length={args.to}"] if args.to else []
    options += [f"data.sources={json.dumps(data)}"] if data else []
    options += ["lora={}"] if args.lora else []
    options += [f"train_length={args.train_length}"] if args.train_length else []
    options += [f"engine={args.engine}"] if getattr(args, "engine", None) else []
    if (file := find_recipe(args.thing)) is not None:
        return load_recipe(file, options + overrides)
    run = RunFolder(path)
    if run.recipe_file.exists():
        return load_run_recipe(run.recipe_file, options + overrides, run.metadata().get("consent"))
    if not args.to and not any(o.startswith("target_length=") for o in overrides):
        raise SkipwiseError("missing target length: pass --to 32k")
    return parse_recipe({"model": args.thing}, options + overrides)


def _command_line(args: argparse.Namespace) -> str:
    from skipwise.config.trust import without_secrets

    return without_secrets(shlex.join(["skipwise", *args.argv]))


def _next_command(args: argparse.Namespace, verb: str, *, without: str = "") -> str:
    """The command line as typed, with another verb."""
    words = [word for word in args.argv if word != without]
    words[words.index(args.verb)] = verb
    return shlex.join(["skipwise", *words])


def _out_folder(recipe: Recipe, args: argparse.Namespace) -> Path:
    if args.out:
        parts = Path(args.out).parts
        if not args.out.isprintable() or any(len(os.fsencode(part)) > 255 for part in parts):
            raise SkipwiseError(f"--out {args.out[:80]!r}: give the name of a folder")
        return Path(args.out).expanduser()  # a shell leaves --out=~/runs as it is
    thing = Path(getattr(args, "thing", "")).expanduser()
    if (thing / "recipe.yaml").exists():
        return thing
    return Path("runs") / recipe.run_name


def print_summary(run: RunFolder) -> None:
    from skipwise.report import format_table, verdict
    from skipwise.report.area import ends_of

    print(format_table(run.results(), ends=ends_of(run.metadata())))
    print(f"\nmodel   {run.model}\nreport  {run.report / 'index.html'}")
    gguf = f"skipwise export {shlex.quote(str(run.path))} --to gguf"
    print(f"next: load the model with transformers, or {gguf}\n\n{verdict(run.path)}")


def quickstart_verb(args: argparse.Namespace) -> None:
    _silence_libraries()
    from skipwise.pipeline.extend import extend
    from skipwise.pipeline.quickstart import make_recipe

    out = Path(args.out or "runs/quickstart").expanduser()
    print_summary(extend(make_recipe(args.overrides), out, command=_command_line(args)))


def extend_verb(args: argparse.Namespace) -> None:
    if launched():
        raise SkipwiseError(
            "extend starts its own processes: run skipwise extend ... --gpus N\n"
            "or accelerate launch -m skipwise train RECIPE, then skipwise extend RUN"
        )
    recipe = _load_recipe(args)
    _silence_libraries()
    from skipwise.pipeline.extend import extend

    out, num_processes = _out_folder(recipe, args), _num_processes(args, recipe)
    print_summary(extend(recipe, out, command=_command_line(args), num_processes=num_processes))


def _num_processes(args: argparse.Namespace, recipe: Recipe) -> int:
    """Number of processes to start; 0: train in this process."""
    if launched():
        if args.gpus is not None:
            raise SkipwiseError(
                f"--gpus {args.gpus}: a launcher has already started {world_size()} processes\n"
                "remove --gpus, or run skipwise without the launcher"
            )
        return 0
    from skipwise.config.recipe import SHARDED_ENGINES

    found = _found_gpus(args.gpus)
    wanted = args.gpus or max(1, found)
    return wanted if wanted > 1 or recipe.engine in SHARDED_ENGINES else 0


def _found_gpus(asked: int | None) -> int:
    """The GPUs of this machine; SkipwiseError if there are fewer than are asked for."""
    found = num_gpus()
    if asked is not None and asked < 1:
        raise SkipwiseError("--gpus must be 1 or more")
    if asked is not None and 0 < found < asked:
        raise SkipwiseError(f"--gpus {asked}: this machine has {found} GPUs")
    return found


def check_verb(args: argparse.Namespace) -> int:
    from skipwise.models.hf_config import is_config_alone

    recipe = _load_recipe(args)
    config_alone = is_config_alone(recipe.model)
    if config_alone:
        from skipwise.preflight.config import check_config_alone as check
    else:
        _silence_libraries()
        from skipwise.pipeline.checks import check
    checks = check(recipe)
    if args.json:
        print(json.dumps([dataclasses.asdict(c) for c in checks], indent=1))
    else:
        print("\n".join(str(c) for c in checks))
        if config_alone:
            print("\nthere are no weights, so neither the loaded model nor the text was checked")
        elif all(c.passed for c in checks):
            data = "" if recipe.data.sources or recipe.method == "none" else " --data FOLDER"
            print(f"\nnext: {_next_command(args, 'extend')}{data}")
    return 0 if all(c.passed for c in checks) else 2


def recipes_verb(args: argparse.Namespace) -> None:
    from skipwise.config.bundled import bundled, describe_bundled

    files = {**bundled("recipes"), **bundled("examples")}
    if args.name and args.name not in files:
        raise SkipwiseError(f"{args.name} is unknown: choose from {', '.join(files)}")
    print(files[args.name].read_text(encoding="utf-8") if args.name else describe_bundled())


def plan_verb(args: argparse.Namespace) -> None:
    from skipwise.config.recipe import context_lengths
    from skipwise.planning import find_gpu, format_measured, format_plan, make_plan, plan_to_dict
    from skipwise.planning.memory import with_micro_batch

    recipe = _load_recipe(args)
    context_lengths(recipe, recipe.target_length)
    gpu = find_gpu(args.gpu) if args.gpu else None
    cpu = find_gpu("cpu") if gpu is None and not args.gpus and not num_gpus() else None
    plan = make_plan(recipe, num_gpus=1 if args.gpus is None else args.gpus, gpu=gpu, cpu=cpu)
    measured = None
    if not args.json:
        print(format_plan(plan), flush=True)
    if args.measure:
        from skipwise.pipeline.profile import measure

        print("measuring three steps ...", file=sys.stderr, flush=True)
        recipe = plan.recipe if recipe.train_length == "auto" else recipe
        measured = measure(with_micro_batch(recipe, plan.job.batch_size))
    if args.json:
        measurement = {"measured": dataclasses.asdict(measured)} if measured else {}
        print(json.dumps({**plan_to_dict(plan), **measurement}, indent=1))
    elif measured:
        print(f"\n{format_measured(plan, measured)}")


def positions_verb(args: argparse.Namespace) -> None:
    from skipwise.config.lengths import parse_length
    from skipwise.config.parse import parse_recipe
    from skipwise.config.recipe import SEED
    from skipwise.config.samplers import make_sampler
    from skipwise.pose.preview import describe_positions, draw_text

    L, T = parse_length(args.length), parse_length(args.to)
    if args.seed not in SEED:
        raise SkipwiseError(f"--seed {args.seed}: give {SEED}")
    if args.draw and Path(args.draw).suffix not in (".png", ".svg", ".pdf"):
        raise SkipwiseError(f"--draw {args.draw}: give the name of a .png or .svg file")
    names = [o.removeprefix("positions.") for o in args.overrides]
    overrides = [o if o.startswith("method=") else f"positions.{o}" for o in names]
    recipe = parse_recipe({"model": "-", "target_length": T}, overrides)
    sampler = make_sampler(recipe, L)
    metadata = describe_positions(sampler, args.seed)
    if args.json:
        print(json.dumps(metadata))
    else:
        print(draw_text(metadata, sampler.train_length, T))
    if args.draw:
        from skipwise.report import plot_positions

        pairs = list(zip(metadata["distances"], metadata["coverage"], strict=True))
        figure = plot_positions(metadata["examples"], pairs, sampler.train_length, T)
        try:
            figure.savefig(args.draw, dpi=150, bbox_inches="tight")
        except (OSError, ValueError) as error:
            raise SkipwiseError(f"cannot write {args.draw}: {error}") from error
        print(f"wrote {args.draw}", file=sys.stderr)


def train_verb(args: argparse.Namespace) -> None:
    recipe = _load_recipe(args)
    out = _out_folder(recipe, args)
    _silence_libraries()
    from skipwise.pipeline.stages import launch_training, open_training, prepare_training, train_run
    from skipwise.training.distributed.engines import main_process_first

    num_processes = _num_processes(args, recipe)
    if num_processes:
        run = open_training(recipe, out, _command_line(args), num_processes)
        launch_training(run, num_processes, only_check=args.dry_run)
    else:
        with main_process_first(recipe):
            plan, data, run = prepare_training(recipe, out, _command_line(args))
        train_run(plan, data, run, record=True, only_check=args.dry_run)
    if is_main_process():
        if args.dry_run:
            print("checks passed, nothing trained")
            print(f"next: {_next_command(args, 'train', without='--dry-run')}")
        else:
            last = run.finish if recipe.full_length.fraction else run
            folder = shlex.quote(str(run.path))
            print(f"trained: {last.checkpoints}\nnext: skipwise export {folder}")


def eval_verb(args: argparse.Namespace) -> None:
    from skipwise.config.lengths import parse_lengths

    lengths = parse_lengths(args.lengths) if args.lengths else []
    tasks = [t.strip() for t in args.tasks.split(",")] if args.tasks is not None else []
    limit = [f"eval.limit={args.limit}"] if args.limit is not None else []
    if args.limit is not None and args.limit < 1:
        raise SkipwiseError("--limit must be 1 or more; the default is all documents")
    if args.gpus is not None and not launched():
        _found_gpus(args.gpus)
        if args.gpus > 1:  # what they measure is known below
            launch(args.argv, args.gpus)
    _silence_libraries()
    from skipwise.evaluation.processes import joined
    from skipwise.evaluation.run import evaluate
    from skipwise.report import format_table, verdict
    from skipwise.report.area import ends_of

    with joined():
        rows, run = evaluate(
            args.thing,
            lengths=lengths,
            tasks=tasks,
            data=args.data or [],
            baseline=args.baseline,
            overrides=limit + args.overrides,
            out=args.out,
            command=_command_line(args),
        )
    if not is_main_process():
        return
    page = _write_report(run)
    print(
        json.dumps(rows, indent=1)
        if args.json
        else format_table(rows, ends=ends_of(run.metadata()))
    )
    where = sys.stderr if args.json else sys.stdout
    results = run.path / "results.json"
    print(f"\nresults {results}\nreport  {page}\n\n{verdict(run.path)}", file=where)


def report_verb(args: argparse.Namespace) -> None:
    from skipwise.config.run_folder import RunFolder
    from skipwise.report import compare_runs, format_table, verdict, write_report
    from skipwise.report.area import ends_of

    if len(args.things) > 1:
        page = Path(args.out or "comparison.html").expanduser()
        table = compare_runs([Path(thing).expanduser() for thing in args.things], page)
        print(f"{table}\n\nreport  {page}")
        return
    run = RunFolder(args.things[0])
    if run.metadata().get("kind") != "evaluation":
        run.recipe()
    page = write_report(run.path, Path(args.out).expanduser()) if args.out else _write_report(run)
    print(format_table(run.results(), ends=ends_of(run.metadata())))
    print(f"\nreport  {page}\n\n{verdict(run.path)}")


def _write_report(run: RunFolder) -> str:
    """The page's path; in a folder that is only read, how to write it elsewhere."""
    from skipwise.report import write_report

    try:
        return str(write_report(run.path))
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        return f"not written: {run.path} is read-only; skipwise report RUN --out page.html"


def export_verb(args: argparse.Namespace) -> int:
    if args.verify:
        return _verify_folder(args)
    kinds = [kind.strip() for kind in args.to.split(",")]
    unknown = [kind for kind in kinds if kind not in ("hf", "gguf", "adapter")]
    if unknown:
        names = "hf, gguf, adapter" + did_you_mean(unknown[0], ("gguf", "adapter"))
        raise SkipwiseError(f"--to {unknown[0]}: choose from {names}")
    _silence_libraries()
    from skipwise.config.run_folder import RunFolder
    from skipwise.pipeline.stages import export_again

    run = RunFolder(args.thing)
    for path in export_again(run, kinds, args.outtype, args.llama_cpp):
        print(path)
    folder = shlex.quote(str(run.path))
    print(f"next: skipwise eval {folder}, or skipwise publish {folder} USER/NAME")
    return 0


def _verify_folder(args: argparse.Namespace) -> int:
    from skipwise.config.run_folder import RunFolder
    from skipwise.export.runtimes import as_json, format_verdict, verify_folder
    from skipwise.models.identity import changed_note

    folder = Path(args.thing).expanduser()
    run = RunFolder(folder)
    files = sorted(folder.glob("*.gguf"))
    if run.recipe_file.exists():
        folder = run.model
        files = sorted(run.gguf.glob("*.gguf"))
        if note := changed_note(run.model, run.metadata()):
            print(note, file=sys.stderr)
    verdict = verify_folder(folder)
    checks = []
    for file in files:
        from skipwise.export.gguf import check_gguf

        checks += [(file.name, check) for check in check_gguf(file, folder)]
    well = verdict.well and all(check.passed for _, check in checks)
    if args.json:
        found = [{"file": name, **dataclasses.asdict(check)} for name, check in checks]
        print(json.dumps({**as_json(verdict), "gguf": found, "well": well}, indent=1))
    else:
        print(format_verdict(verdict))
        for name, check in checks:
            print(f"{name}: {check}")
    return 0 if well else FAILED


def publish_verb(args: argparse.Namespace) -> None:
    from skipwise.config.run_folder import RunFolder
    from skipwise.export.hub import confirm, describe_upload, plan_upload, upload_files
    from skipwise.export.model_card import write_card
    from skipwise.report import verdict

    run = RunFolder(args.thing)
    run.recipe()
    plan_upload(run, args.name, args.private)  # raises before anything is written
    if not args.dry_run:
        write_card(run, args.name)
    upload = plan_upload(run, args.name, args.private)
    print(f"{verdict(run.path)}\n{describe_upload(upload)}", file=sys.stderr, flush=True)
    if not args.dry_run and (args.yes or confirm(upload)):
        print(upload_files(upload))
    else:
        print("nothing uploaded")


def _silence_libraries() -> None:
    """Hide libraries' progress bars, FutureWarnings and notes on optional kernels."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not num_gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns on stdout
    for library in ("transformers", "peft", "torch"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_kernel_note)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _is_no_kernel_note(record: logging.LogRecord) -> bool:
    """bitsandbytes asks for an optional kernel whenever it is imported on some CPUs."""
    return "gemm_4bit_forward" not in record.getMessage()
