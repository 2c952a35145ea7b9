"""Do our exports and our readings hold in transformers 4? Runs both, one process each.

    python -m venv /tmp/old && /tmp/old/bin/pip install transformers==4.57.6 torch==2.13.0
    python benchmarks/old_transformers.py /tmp/old/bin/python

Writes tiny models in each portable method as the export does, compares logits within the window and
at its far end (and those of the same weights without the older spelling, to see that the comparison
can fail), and records what transformers 4 computes of every config of
tests/helpers/verify_cases.py, which tests/test_verify.py compares `skipwise.export.runtimes` with.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
from common import BENCHMARKS, SMOKE, make_parser, write_result

from skipwise.config.parse import parse_recipe
from skipwise.export.runtimes import verify_folder
from skipwise.models.compatibility import make_portable, save_tokenizer
from skipwise.models.hf_config import model_info_of
from skipwise.models.scaled_config import scaled_config, scaling_for

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/helpers"))
from verify_cases import BASE, CASES  # noqa: E402

METHODS = ("linear", "ntk", "yarn", "llama3")
L, T = 256, 2048
PAIRS = (0, 5, 8, 11, 15, 31)  # of 32: both ends of the ramps and what lies between
_CHILD = """
import json, sys
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
job, out = sys.argv[1:]
job, done = json.load(open(job)), {"version": transformers.__version__, "cases": {}, "logits": {}}
for name, folder in job["cases"].items():
    try:
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config)
        inner = getattr(model, "model", getattr(model, "gpt_neox", None))
        rotary, T = inner.rotary_emb, 8 * 4096
        kept = vars(rotary) | dict(rotary.named_buffers())
        prefix = "" if "inv_freq" in kept else "full_attention_"  # per layer type
        inv_freq = kept[prefix + "inv_freq"]
        A = kept.get(prefix + "attention_scaling", kept.get("attention_scaling"))
        if rotary.rope_type in ("longrope", "dynamic"):
            inv_freq, A = ROPE_INIT_FUNCTIONS[rotary.rope_type](config, "cpu", seq_len=T)
        pairs = [k for k in job["pairs"] if k < len(inv_freq)]
        values = [float(inv_freq[k]) for k in pairs]
        done["cases"][name] = {"inv_freq": values, "attention": float(A)}
    except Exception as error:
        done["cases"][name] = {"error": f"{type(error).__name__}: {error}"[:100]}
for name, folder in job["models"].items():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode(job["text"])])[:, :64]
    done["tokens"] = ids.tolist()
    rows = []
    for start in job["starts"]:
        half = ids.shape[1] // 2
        positions = torch.arange(ids.shape[1])[None]
        positions[:, half:] += start
        with torch.no_grad():
            rows.append(model(ids, position_ids=positions, attention_mask=torch.ones_like(ids),
                              use_cache=False).logits[0].tolist())
    done["logits"][name] = rows
json.dump(done, open(out, "w"))
"""


def export(method: str, folder: Path) -> None:
    """A tiny model in this method, written by the functions of the export."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "src/skipwise/pipeline/quickstart/model")
    config = AutoConfig.for_model(
        **{**BASE, "vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 2},
        initializer_range=0.2,  # so that attention is far from uniform, and positions show
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config.max_position_embeddings = L
    facts = model_info_of(config)
    recipe = parse_recipe({"model": "-", "target_length": T, "rope": {"type": method}})
    scaled = scaled_config(config, facts, scaling_for(recipe, facts), T)
    AutoModelForCausalLM.from_config(scaled).save_pretrained(folder)
    save_tokenizer(tokenizer, str(ROOT / "src/skipwise/pipeline/quickstart/model"), folder)
    make_portable(folder, T)


def run(python: str, job: dict, scratch: Path) -> dict:
    """The child's answer from this Python."""
    files = scratch / "job.json", scratch / "out.json"
    files[0].write_text(json.dumps(job))
    command = [python, "-c", _CHILD, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(files[1].read_text())


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("python", nargs="?", help="of an environment with transformers 4")
    args = parser.parse_args()
    if not args.python and not args.smoke:
        parser.error("which Python has transformers 4?")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        models = {method: str(scratch / method) for method in METHODS}
        for method, folder in models.items():
            export(method, Path(folder))
            config = json.loads((Path(folder) / "config.json").read_text())
            newer = {k: v for k, v in config.items() if k not in ("rope_scaling", "rope_theta")}
            shutil.copytree(folder, f"{folder} newer only")
            Path(f"{folder} newer only", "config.json").write_text(json.dumps(newer))
        models |= {f"{method} newer only": f"{scratch / method} newer only" for method in METHODS}
        cases = {}
        for number, (name, changes) in enumerate(islice(CASES.items(), 3 if args.smoke else None)):
            folder = scratch / f"case{number}"
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps({**BASE, **changes}))
            cases[name] = str(folder)
        text = "def main(arguments):\n    return [int(a) for a in arguments]\n" * 4
        job = {"cases": cases, "models": models, "pairs": PAIRS, "text": text}
        job["starts"] = [0, L, T - 64]
        here = run(sys.executable, job, scratch)
        old = here if args.smoke else run(args.python, job, scratch)
        exports = {}
        for method in METHODS:
            a, b = np.array(here["logits"][method]), np.array(old["logits"][method])
            unscaled = np.array(old["logits"][f"{method} newer only"])
            exports[method] = {
                "largest_difference_within_L": float(np.abs(a[0] - b[0]).max()),
                "largest_difference_beyond_L": float(np.abs(a[1:] - b[1:]).max()),
                "largest_difference_newer_only": float(np.abs(a[1:] - unscaled[1:]).max()),
                "spread_of_logits": float(a.std()),
                "faults": [issue.name for issue in verify_folder(scratch / method).issues],
                "faults_newer_only": [
                    issue.name for issue in verify_folder(scratch / f"{method} newer only").issues
                ],
            }
        assert here["tokens"] == old["tokens"], "the tokenizers differ"
    write_result(
        "old_transformers",
        {
            "transformers": [here["version"], old["version"]],
            "positions": {"L": L, "T": T},
            "exports": exports,
            "pairs": PAIRS,
            "transformers 5": here["cases"],
            "transformers 4": old["cases"],
        },
        folder=SMOKE if args.smoke else BENCHMARKS,
    )


if __name__ == "__main__":
    main()
