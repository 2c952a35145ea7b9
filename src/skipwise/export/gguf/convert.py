"""Run llama.cpp's converter on a model folder, in a separate process, and check its file.

The converter gets the folder's files without code, and a config with the target length. The new
file replaces the old one only if it is complete and llama.cpp will compute from it what config.json
requires.

Source: ggml-org/llama.cpp, convert_hf_to_gguf.py and conversion/
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from skipwise.config.machine import cache_folder, check_disk_space
from skipwise.config.parse import load_run_recipe
from skipwise.config.run_folder import write_json
from skipwise.errors import SkipwiseError, system_errors
from skipwise.export.gguf.keys import check_gguf, fix_rope_keys
from skipwise.export.gguf.requirements import Requirements, read_requirements, refuse
from skipwise.export.gguf.tokenizer import pre_tokenizer, text_ends
from skipwise.models.convert.gguf_file import gguf_package

OUTTYPES = {"f16": 2, "bf16": 2, "q8_0": 34 / 32, "f32": 4}  # bytes of a weight
_SCRIPT = "convert_hf_to_gguf.py"
_WITHOUT = (".py", ".pyc", ".gguf")  # not copied: no code of the folder runs
_NAMED = """
import runpy, sys
name, script = sys.argv[1:3]
sys.argv = sys.argv[2:]
folder = script.rpartition("/")[0]
sys.path[:1] = [folder, folder + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: name
runpy.run_path(script, run_name="__main__")
"""


def find_converter(given: str | None = None) -> Path:
    """llama.cpp's converter script: given, in $LLAMA_CPP, on the PATH, or in a usual folder.

    Args:
        given: A checkout of llama.cpp, or the script.

    Raises:
        SkipwiseError: it was not found; says what to type.
    """
    for source, place in (("", given), ("$LLAMA_CPP: ", os.environ.get("LLAMA_CPP"))):
        if place:
            path = Path(place).expanduser()
            script = path / _SCRIPT if path.is_dir() else path
            if script.is_file() and script.suffix == ".py":
                return script.resolve()
            raise SkipwiseError(
                f"{source}{place} has no {_SCRIPT}\ngive a checkout of llama.cpp, or the script"
            )
    usual = [Path.home() / "llama.cpp", cache_folder() / "llama.cpp"]  # no folder of strangers
    on_path = shutil.which(_SCRIPT)
    for script in [*([Path(on_path)] if on_path else []), *(folder / _SCRIPT for folder in usual)]:
        if script.is_file():
            return script.resolve()
    raise SkipwiseError(
        f"llama.cpp's {_SCRIPT} was not found, and it writes the GGUF file\n"
        "type git clone --depth 1 https://github.com/ggml-org/llama.cpp ~/llama.cpp, "
        "or give yours: --llama-cpp FOLDER, or $LLAMA_CPP"
    )


def to_gguf(
    folder: Path, out: Path, outtype: str = "f16", *, converter: Path, name: str | None = None
) -> Path:
    """Write an exported model folder as one GGUF file, and check what llama.cpp will compute.

    Args:
        out: The file to write. Replaced only by a file that passed the checks.
        outtype: f16, bf16, q8_0 or f32.
        converter: From `find_converter`.
        name: The model's name in the file. Defaults to the recipe's, else the folder's.

    Raises:
        SkipwiseError: llama.cpp does not know the architecture or tokenizer, or cannot compute the
            scaling; the `gguf` package is missing; the disk is full.
    """
    if outtype not in OUTTYPES:
        raise SkipwiseError(f"{outtype!r} is not a GGUF output type: choose {', '.join(OUTTYPES)}")
    gguf_package()  # before minutes of work
    requirements = read_requirements(folder)
    refuse(requirements)
    part = out.with_name(out.name + ".part")
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    each = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
    check_disk_space(out.parent, stored / each * OUTTYPES[outtype], out.name)
    try:
        with system_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as scratch:
                staged = Path(scratch) / "model"
                _stage(folder, staged, requirements)
                _convert(converter, staged, part, outtype, name or _name(folder))
            fix_rope_keys(part, folder)
            failed = [check for check in check_gguf(part, folder) if not check.passed]
            if failed:
                lines = "\n".join(f"{check.name}: {check.detail}" for check in failed)
                raise SkipwiseError(f"llama.cpp would not compute what {folder} requires\n{lines}")
            os.replace(part, out)
    finally:
        with suppress(OSError):
            part.unlink()
    return out


def _stage(folder: Path, staged: Path, requirements: Requirements) -> None:
    """The folder for the converter: without code, with T, and with the tokenizer's BOS setting.

    The converter loads the tokenizer with trust_remote_code. If the tokenizer does not set BOS,
    llama.cpp uses its own default: SentencePiece models would get a BOS that training never saw.
    """
    staged.mkdir()
    edited = {"config.json", "tokenizer_config.json"}
    for path in folder.iterdir():
        if path.is_file() and path.suffix not in _WITHOUT and path.name not in edited:
            try:
                (staged / path.name).symlink_to(path.resolve())
            except OSError:  # Windows lets few users do this
                shutil.copyfile(path, staged / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    if requirements.scaling.keeps_length:
        config["max_position_embeddings"] = requirements.target_length
    write_json(staged / "config.json", config)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    settings.pop("auto_map", None)
    write_json(staged / "tokenizer_config.json", {**settings, **text_ends(folder)})


def _name(folder: Path) -> str:
    recipe = folder / "skipwise_recipe.yaml"
    return (
        load_run_recipe(recipe, ["load.trust_remote_code=false"]).run_name
        if recipe.is_file()
        else folder.resolve().name
    )


def _convert(converter: Path, staged: Path, part: Path, outtype: str, name: str) -> None:
    arguments = [str(staged), "--outfile", str(part), "--outtype", outtype, "--model-name", name]
    errors = _run([str(converter), *arguments])
    known = pre_tokenizer(staged) if errors and "pre-tokenizer" in errors else None
    if known and (converter.parent / "conversion").is_dir():
        errors = _run(["-c", _NAMED, known, converter.as_posix(), *arguments])
    if errors is not None:
        raise SkipwiseError(_explain(errors, converter))


def _run(arguments: list[str]) -> str | None:
    """What it wrote to stderr. None if it succeeded."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        # the converter imports what lies beside it
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": ""},
    )
    return (done.stderr or "no message") if done.returncode else None


def _explain(errors: str, converter: Path) -> str:
    """One to three lines on why the converter failed."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    last = lines[-1] if lines else "no message"
    if "No module named" in last:
        module = last.split("'")[1].partition(".")[0] if "'" in last else "?"
        names = {"google": "protobuf", "mistral_common": "mistral-common"}
        return f"{converter} needs {module}\ntype pip install {names.get(module, module)}"
    if "pre-tokenizer" in errors:
        return (
            "llama.cpp does not know this tokenizer's pre-tokenizer, and would split text "
            "differently\nserve the safetensors folder with vLLM or transformers; SentencePiece "
            "models (tokenizer.model) and published byte-level tokenizers convert"
        )
    unknown = [line for line in lines if "not supported" in line]
    if unknown:
        return f"{unknown[-1]}\ntake a newer llama.cpp, or serve the folder with vLLM"
    if "No space left" in errors:
        return "the disk is full: the GGUF file needs 2 bytes a parameter, and q8_0 half of that"
    return f"{converter.name} failed: {last}\ntry a newer llama.cpp, or run it yourself for more"
