"""A GGUF file as a source: unpacked once into a folder of the cache, with weights in safetensors.

transformers reads and dequantizes the file. What it does not read is added here: RoPE scalings, ids
of special tokens, rules of pre-tokenizers. A difference that is left (other frequencies, another
number of weights) is an error. Nothing of the file is executed.

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

from skipwise.config.machine import cache_folder, check_disk_space
from skipwise.errors import SkipwiseError, first_line, is_no_memory, system_errors
from skipwise.models.compatibility import make_portable
from skipwise.models.convert import gguf_file
from skipwise.models.hf_config import to_dict
from skipwise.models.model_info import read_model_info
from skipwise.models.scaled_config import scaled_config
from skipwise.pose.rope import Unscaled, keeps_length

_GPT2_RULE = {"gpt-2", "mpt", "olmo", "jais", "phi-2"}  # llama.cpp's names
_DIGITS_FIRST = {"smollm", "starcoder", "refact", "command-r", "codeshell"}  # and then GPT-2's rule
_UNSPLIT_WORDS = {"llama3", "llama-v3", "llama-bpe"}
_GIVE = "give the model in safetensors: its folder or hub name"
_VERSION = 1  # of what is written here


def local_source(model: str) -> str:
    """What to load: the unpacked folder of a GGUF file, or of a folder with nothing else; else the
    name itself.

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
    """The folder of a GGUF file: config, tokenizer, weights; made once.

    Quantized weights become bfloat16; those of a file without any stay exact, in float32.

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
    keys, tables = gguf_file.read_file(file)
    if keys.get("split.count", 1) > 1:
        raise SkipwiseError(f"{file} is one of several parts\njoin them: llama-gguf-split --merge")
    print(f"unpacking {file} into {folder}", file=sys.stderr, flush=True)
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    fix = "free some space, or set SKIPWISE_CACHE to a folder on a larger disk"
    try:
        with system_errors(folder, fix):
            part.mkdir(parents=True)
            _save_model(file, keys, tables, part)
            _tokenizer(file, keys).save_pretrained(part)
            make_portable(part)
            card = f"---\nlicense: {keys.get('general.license', 'unknown')}\n---\n"
            (part / "README.md").write_text(card, encoding="utf-8")
            if not folder.is_dir():  # else another process was faster
                part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _save_model(file: Path, keys: dict[str, Any], tables: dict[str, np.ndarray], out: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    tensors = gguf_file.open_gguf(file).tensors
    exact = all(t.tensor_type in (0, 1) for t in tensors if len(t.shape) > 1)  # F32, F16
    options: dict[str, Any] = {
        "gguf_file": file.name,
        "dtype": torch.float32 if exact else torch.bfloat16,
    }
    architecture = keys["general.architecture"]
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        _complete_config(config, keys, tables)
        result: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, config=config, output_loading_info=True, **options
        )
    except SkipwiseError:
        raise
    except Exception as error:  # transformers raises many types
        if is_no_memory(error):
            raise
        raise SkipwiseError(
            f"{file}: transformers cannot read the architecture {architecture!r} from a GGUF file: "
            f"{first_line(error)}\n{_GIVE}"
        ) from error
    loaded, info = result
    blocks = {f"blk.{i}." for i in range(config.num_hidden_layers)}  # later ones: multi-token heads
    have = sum(
        int(t.n_elements)
        for t in tensors
        if not t.name.startswith(("rope_", "blk.")) or t.name[: t.name.find(".", 4) + 1] in blocks
    )
    used = sum(p.numel() for p in loaded.parameters())
    check_disk_space(out.parent, used * (4 if exact else 2), f"{file.name} unpacked")
    missing = sorted(info["missing_keys"])
    if missing or have != used:
        why = f"no {missing[0]}" if missing else f"{used:,} of its {have:,} weights"
        raise SkipwiseError(f"transformers reads {why} from {file} ({architecture})\n{_GIVE}")
    own = ("quantization_config", "_model_name_or_path")
    config = AutoConfig.for_model(**{k: v for k, v in config.to_dict().items() if k not in own})
    with torch.device("meta"):  # the loaded one cannot be saved
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    ends = {config.eos_token_id, keys.get("tokenizer.ggml.eot_token_id")} - {None}
    ids = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None, **ids)
    model.save_pretrained(out)


def _complete_config(config: Any, keys: dict[str, Any], tables: dict[str, np.ndarray]) -> None:
    """Set in place what transformers does not read: scaling, theta, head size, special tokens.

    Raises:
        SkipwiseError: the config's frequencies differ from the file's.
    """
    key = gguf_file.own_keys(keys)
    for name, value in config.to_dict().items():
        if isinstance(value, float):
            setattr(config, name, float(f"{value:.7g}"))  # float32 in the file
    for name, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        setattr(config, f"{name}_token_id", keys.get(f"tokenizer.ggml.{stored}_token_id"))
    if hasattr(config, "head_dim") and "attention.key_length" in key:
        config.head_dim = key["attention.key_length"]
    parameters = getattr(config, "rope_parameters", None) or {}
    inner = parameters.get("full_attention", parameters)
    if inner and "rope.freq_base" in key:
        inner["rope_theta"] = float(key["rope.freq_base"])
    scaling, window = gguf_file.scaling_of(keys, tables), key["context_length"]
    if not isinstance(scaling, Unscaled):
        L = key.get("rope.scaling.original_context_length")
        if L is None and keeps_length(scaling, config.model_type):
            L, window = window, round(window * scaling.factor)
        config.max_position_embeddings = L or window
        changed = scaled_config(config, read_model_info(to_dict(config)), scaling, window)
        config.max_position_embeddings = changed.max_position_embeddings
        config.rope_parameters = changed.rope_parameters
    info = read_model_info(to_dict(config), ask=False)  # a linear one is asked about when extended
    have = info.scaling.inv_freq(info.rope_theta, info.rotary_dim)
    want, factor = gguf_file.llama_cpp_rope(keys, tables)
    same = len(have) == len(want) and np.allclose(have, want, rtol=1e-4, atol=0)
    if not same or abs(info.scaling.attention_factor - factor) > 1e-4 * factor:
        why = f"the frequencies of this {info.family} in GGUF differ from those of transformers"
        raise SkipwiseError(f"{why}\n{_GIVE}")


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
    unread = ""
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):  # GPT-2's rule
        if rule in _DIGITS_FIRST:
            digits, words = pre_tokenizers.Digits(individual_digits=True), tokenizer.pre_tokenizer
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
        else:
            unread = "" if rule in _GPT2_RULE else f"splits words by the rule {rule!r}"
    elif not keys.get("tokenizer.ggml.add_space_prefix", True):
        begins = tokenizer.encode("a", add_special_tokens=False).tokens[0]
        unread = "puts no space before a text" if begins.startswith("▁") else ""
    if unread:
        raise SkipwiseError(
            f"{file}: its tokenizer {unread}, which transformers does not read from it\n"
            f"put the original model's tokenizer.json into {file.parent}"
        )
    if rule in _UNSPLIT_WORDS:  # words of the vocabulary
        tokenizer.model.ignore_merges = True
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")
    length = gguf_file.own_keys(keys)["context_length"]
    options: dict[str, Any] = {
        "model_max_length": length,
        **{name: getattr(read, name) for name in names},
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
