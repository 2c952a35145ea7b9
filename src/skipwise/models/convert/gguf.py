"""A GGUF file as a source: unpacked once into a folder of the cache, with weights in safetensors.

transformers reads and dequantizes the file. What it does not read is added here: RoPE scalings, the
ids of special tokens, pre-tokenizers it has no rule for. What then still differs from the file
(frequencies, number of weights) is an error. Nothing of the file is executed.

Source:  ggml-org/llama.cpp, src/llama-vocab.cpp for the pre-tokenizers
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from skipwise.config.machine import cache_folder
from skipwise.errors import SkipwiseError
from skipwise.models.compatibility import make_portable
from skipwise.models.convert.gguf_file import llama_cpp_rope, open_file, read_file, scaling_of
from skipwise.models.hf_config import first_line, model_info_of
from skipwise.models.scaled_config import scaled_config
from skipwise.pose.rope import Unscaled, keeps_length

_GPT2_RULE = {"gpt-2", "mpt", "olmo", "jais", "phi-2"}  # names of pre-tokenizers in llama.cpp
_DIGITS_FIRST = {"smollm", "starcoder", "refact", "command-r", "codeshell"}  # and then GPT-2's
_WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe"}
_VERSION = 1  # of what is written here


def local_source(model: str) -> str:
    """The folder or hub name to load: of a GGUF file, or a folder with nothing else, its unpacked
    form; of everything else the name itself.

    Raises:
        SkipwiseError: as `unpack_gguf`; several files, of which one has to be named.
    """
    path = Path(model).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise SkipwiseError(f"{model} holds {len(files)} GGUF files: give one, {files[0]}")
        path = files[0] if files else path
    if path.suffix != ".gguf":
        return model
    if not path.is_file():
        raise SkipwiseError(f"{model}: no such file")
    return str(unpack_gguf(path))


def unpack_gguf(file: Path) -> Path:
    """The folder of a GGUF file: config, tokenizer, weights. Made once, kept in the cache.

    Weights that the file quantizes are written in bfloat16, others exactly, in float32.

    Raises:
        SkipwiseError: not a complete file; an architecture, tokenizer or tensor that transformers
            does not read.
    """
    stat = file.stat()
    identity = f"{_VERSION} {file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    digest = hashlib.sha1(identity.encode(), usedforsecurity=False).hexdigest()[:12]
    folder = cache_folder() / "gguf" / f"{file.stem}-{digest}"
    if folder.is_dir():
        return folder
    keys, tables = read_file(file)
    if keys.get("split.count", 1) > 1:
        raise SkipwiseError(
            f"{file} is one of several parts: join them with llama-gguf-split --merge"
        )
    print(f"unpacking {file} into {folder}", file=sys.stderr, flush=True)
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        _save_model(file, keys, tables, part)
        _tokenizer(file, keys).save_pretrained(part)
        make_portable(part)
        licence = keys.get("general.license", "unknown")
        (part / "README.md").write_text(f"---\nlicense: {licence}\n---\n", encoding="utf-8")
        part.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # another process was faster
            raise SkipwiseError(f"{folder} could not be written: {first_line(error)}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _save_model(file: Path, keys: dict[str, Any], tables: dict[str, np.ndarray], out: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    tensors = open_file(file).tensors
    exact = all(t.tensor_type in (0, 1) for t in tensors if len(t.shape) > 1)  # F32, F16
    dtype = torch.float32 if exact else torch.bfloat16
    architecture = keys["general.architecture"]
    give = "give the model in safetensors: its folder or hub name"
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        _complete_config(config, keys, tables)
        options: dict[str, Any] = {"gguf_file": file.name, "output_loading_info": True}
        result: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, config=config, dtype=dtype, **options
        )
    except SkipwiseError:
        raise
    except Exception as error:  # transformers raises many types
        raise SkipwiseError(
            f"{file}: transformers cannot read the architecture {architecture!r} from a GGUF file: "
            f"{first_line(error)}\n{give}"
        ) from error
    loaded, info = result
    depth = config.num_hidden_layers  # blocks after the last layer predict further tokens
    read = [t for t in tensors if not t.name.startswith("rope_") and _block(t.name) < depth]
    have, used = sum(int(t.n_elements) for t in read), sum(p.numel() for p in loaded.parameters())
    if info["missing_keys"] or have != used:
        raise SkipwiseError(
            f"{file} holds {have:,} weights, and transformers reads {used:,} of a {architecture}\n"
            f"{give}"
        )
    own = ("quantization_config", "_model_name_or_path")
    kept = {key: value for key, value in config.to_dict().items() if key not in own}
    config = AutoConfig.for_model(**kept)
    with torch.device("meta"):  # the loaded one cannot be saved
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ends = {ids["eos_token_id"], keys.get("tokenizer.ggml.eot_token_id")} - {None}
    model.generation_config = GenerationConfig(**{**ids, "eos_token_id": sorted(ends) or None})
    model.save_pretrained(out)


def _block(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def _complete_config(config: Any, keys: dict[str, Any], tables: dict[str, np.ndarray]) -> None:
    """Set in place what transformers does not read: scaling, theta, head size, special tokens.

    Raises:
        SkipwiseError: the config's frequencies differ from the file's.
    """
    prefix = f"{keys['general.architecture']}."
    for key, value in config.to_dict().items():
        if isinstance(value, float):
            setattr(config, key, float(f"{value:.7g}"))  # float32 in the file
    for name in ("bos", "eos", "pad"):
        stored = "padding" if name == "pad" else name
        setattr(config, f"{name}_token_id", keys.get(f"tokenizer.ggml.{stored}_token_id"))
    if hasattr(config, "head_dim") and f"{prefix}attention.key_length" in keys:
        config.head_dim = keys[f"{prefix}attention.key_length"]
    parameters = config.rope_parameters or {}
    inner = parameters.get("full_attention", parameters)
    if f"{prefix}rope.freq_base" in keys and inner:
        inner["rope_theta"] = float(keys[f"{prefix}rope.freq_base"])
    scaling = scaling_of(keys, tables)
    if not isinstance(scaling, Unscaled):
        window = keys[f"{prefix}context_length"]
        L = keys.get(f"{prefix}rope.scaling.original_context_length")
        if L is None and keeps_length(scaling, config.model_type):
            L, window = window, round(window * scaling.factor)
        config.max_position_embeddings = L or window
        info = model_info_of(config)
        changed = scaled_config(config, info, scaling, window)
        for key in ("max_position_embeddings", "rope_parameters"):
            setattr(config, key, getattr(changed, key))
    info = model_info_of(config)
    have = info.scaling.inv_freq(info.rope_theta, info.rotary_dim), info.scaling.attention_factor
    want = llama_cpp_rope(keys, tables)
    same = len(have[0]) == len(want[0]) and np.allclose(have[0], want[0], rtol=1e-4, atol=0)
    if not same or abs(have[1] - want[1]) > 1e-4 * want[1]:
        raise SkipwiseError(
            f"this {info.family} turns its heads by other frequencies in GGUF than transformers "
            "would compute\ngive the model in safetensors: its folder or hub name"
        )


def _tokenizer(file: Path, keys: dict[str, Any]) -> Any:
    """The tokenizer beside the file, else the file's own.

    Raises:
        SkipwiseError: the file names a rule for words that is not known here.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (file.parent / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(file.parent)
    try:
        read: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # transformers raises many types
        raise SkipwiseError(f"{file}: its tokenizer cannot be read: {first_line(error)}") from error
    tokenizer, rule = read.backend_tokenizer, keys.get("tokenizer.ggml.pre", "default")
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):  # GPT-2's rule
        if rule in _DIGITS_FIRST:
            digits, words = pre_tokenizers.Digits(individual_digits=True), tokenizer.pre_tokenizer
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
        elif rule not in _GPT2_RULE:
            raise SkipwiseError(
                f"{file}: its tokenizer splits words by the rule {rule!r}, which transformers does "
                f"not read from it\nput the original model's tokenizer.json into {file.parent}"
            )
    if rule in _WHOLE_WORDS:  # words of the vocabulary are not split
        tokenizer.model.ignore_merges = True
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=keys[f"{keys['general.architecture']}.context_length"],
        **{name: getattr(read, name) for name in names},
    )
