# /// script
# requires-python = ">=3.10"
# dependencies = ["skipwise[hub]"]
#
# [tool.uv.sources] # this clone, until Skipwise is on a package index
# skipwise = { path = "..", editable = true }
# ///
"""Extend a model in one file, on this machine or as a job on another, and push the result.

uv run examples/hub_job.py HuggingFaceTB/SmolLM2-135M --to 16k --data ./books
uv run examples/hub_job.py MODEL --to 32k --data USER/TEXTS --push USER/NAME training.num_steps=500

On the Hugging Face Hub, with the two lines below [tool.uv.sources] changed to where a job finds
Skipwise (a git repository or a wheel):

hf jobs uv run --flavor a10g-large --secrets HF_TOKEN examples/hub_job.py MODEL --to 32k \
    --data USER/TEXTS --push USER/NAME

A job's disk is gone when it ends, so name --push there. Nothing is pushed without it.
"""

import argparse
import re
import shlex
import sys

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from skipwise.config.parse import parse_recipe
from skipwise.errors import SkipwiseError
from skipwise.export.hub import describe_upload, plan_upload, upload_files
from skipwise.export.model_card import write_card
from skipwise.pipeline.extend import extend
from skipwise.report import format_table


def main() -> None:
    about = f"{__doc__.splitlines()[0]} Append recipe keys: training.num_steps=500"
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("--to", required=True, help="target length in tokens, such as 32k")
    parser.add_argument("--data", nargs="+", required=True, help="files, folders or hub data sets")
    parser.add_argument("--push", metavar="USER/NAME", help="push the model there when it is done")
    parser.add_argument("--public", action="store_true", help="push to a public repository")
    parser.add_argument("--out", default="run", help="folder of the run (default: run)")
    settings = [word for word in sys.argv[1:] if re.match(r"[a-z_.]+=", word)]  # recipe keys
    args = parser.parse_args([word for word in sys.argv[1:] if word not in settings])
    if args.push:  # hours later would be too late
        validate_repo_id(args.push)
        HfApi().whoami()
    tree = {"model": args.model, "target_length": args.to, "data": {"sources": args.data}}
    recipe = parse_recipe(tree, settings)
    run = extend(recipe, args.out, command=shlex.join(sys.argv))
    print(format_table(run.results(), brief=True))
    print(f"\nmodel   {run.model}\nreport  {run.report / 'index.html'}")
    if args.push:
        write_card(run, args.push)
        upload = plan_upload(run, args.push, private=not args.public)
        print(describe_upload(upload))
        print(upload_files(upload))


if __name__ == "__main__":
    try:
        main()
    except SkipwiseError as error:
        sys.exit(f"hub_job: {error}")
