"""Exact conversion of families that transformers cannot rescale to families that it can.

GPT-J has no RoPE settings in its config, but it is a Phi with other names: one LayerNorm before
parallel attention and MLP, partial rotary embeddings, a head with bias. Only the order of the
rotary rows of q and k differs. Baichuan-7B and Baichuan2-7B are a Llama whose q, k and v are one
matrix; Baichuan2 normalises the rows of its head in every forward pass, here it is done once. The
result is a stock Phi or Llama, and the source's code never runs. On request the text model of a
multimodal wrapper is extracted the same way: its tensors, under their own names.

Tensors are read one at a time and written in shards, so memory holds at most `_SHARD_BYTES`.

Source:  transformers, models/gptj and models/phi; baichuan-inc/Baichuan-7B and Baichuan2-7B-Base,
         modeling_baichuan.py (W_pack, NormHead)
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipwise.config.machine import check_disk_space, give_umask_mode
from skipwise.config.recipe import ModelSettings
from skipwise.errors import SkipwiseError, first_line, system_errors
from skipwise.models.convert import families
from skipwise.models.convert.families import Conversion
from skipwise.models.hf_config import READ_BIN, shard_names
from skipwise.pose.rope import SCALINGS

if TYPE_CHECKING:
    from torch import Tensor

_SHARD_BYTES = 2 << 30
_SAMPLES = (
    "The pass key is 81501. Remember it.",
    "  two  spaces\tand\n\nlines ",
    "def f(x):\n    return {x: 1.5e-3}  # ok",
    "北京是中国的首都。今天天气很好！",
    "naïve café – “quotes” … ½ 😀",
)


def conversion_for(config: dict[str, Any], text_only: bool = False) -> Conversion | None:
    """The conversion that a config.json needs. Most need none.

    Args:
        text_only: extract the text model of a multimodal wrapper.

    Raises:
        SkipwiseError: Baichuan-13B, which has no RoPE; no text model to extract, or one that
            transformers has no class for; two RoPE settings that differ.
    """
    _refuse_conflicts(config)
    if text_only:
        return families.text_model(config)
    match config.get("model_type"):
        case "gptj":
            make_config, convert = families.phi_config, families.phi_tensors
            return Conversion(source="GPT-J", target="Phi", config=make_config, tensors=convert)
        case "baichuan":
            # 13B has only model_max_length; 7B has max_position_embeddings
            if "max_position_embeddings" not in config or config.get("hidden_size") == 5120:
                raise SkipwiseError(
                    "Baichuan-13B has ALiBi, and PoSE extends rotary position embeddings (RoPE) "
                    "only\nchoose Baichuan-7B or Baichuan2-7B, or another RoPE model"
                )
            normed = families.has_norm_head(config)
            return Conversion(
                source="Baichuan2-7B" if normed else "Baichuan-7B",
                target="Llama",
                config=families.llama_config,
                tensors=families.llama_tensors,
                sentencepiece=True,
                frozen=("lm_head.weight",) if normed else (),
            )
    return None


def _refuse_conflicts(config: dict[str, Any]) -> None:
    """SkipwiseError where keys of a config.json set RoPE twice, and differently."""
    older, newer = (config.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
    if config.get("model_type") in ("phi3", "phi4_multimodal") or "full_attention" in newer:
        return  # Phi-3 says yarn for longrope
    top = config.get("rope_theta") or config.get("rotary_emb_base")
    given = [str(p.get(key)) for p in (older, newer) for key in ("type", "rope_type")]
    names = {*given} & SCALINGS.keys()
    thetas = [top, *(p.get("rope_theta") or top or "unset" for p in (older, newer) if p)]
    found: dict[str, list[Any]] = {
        "rope_type": sorted(names),
        "rope_theta": sorted({*thetas} - {None}, key=str),
    }
    for key, values in found.items():
        if len(values) > 1:
            raise SkipwiseError(
                f"config.json has two values of {key}, {values[0]} and {values[1]}, and runtimes "
                "differ in which one they read\nremove the one that was not trained with"
            )


def convert_model(
    model: str, config: dict[str, Any], settings: ModelSettings, out: Path, tokenizer: Any
) -> None:
    """Write the converted model to a folder: config, weights in safetensors, tokenizer.

    Args:
        model: folder or hub name of the source.
        config: its config.json.
        out: the folder; created only once everything is written.

    Raises:
        SkipwiseError: no weights in the requested format, an unknown tensor, a full disk.
    """
    conversion = conversion_for(config, settings.text_only)
    assert conversion is not None
    source = _fetch(model, settings)
    files = _weight_files(source, settings)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    num_bytes = sum(file.stat().st_size for file in files)
    check_disk_space(out.parent, num_bytes, "the converted model")
    print(f"converting {conversion.source} to {conversion.target}: {out}", file=sys.stderr)
    with system_errors(out):
        names = _write_shards(files, conversion, config, part)
        # a missing head is tied, whatever the config says (wrappers differ in that)
        target = {**conversion.config(config), "tie_word_embeddings": "lm_head.weight" not in names}
        text = json.dumps(target, indent=2) + "\n"
        (part / "config.json").write_text(text, encoding="utf-8")
        for name in ("generation_config.json", "tokenizer.model"):
            if (source / name).is_file():
                shutil.copyfile(source / name, part / name)
        tokenizer.save_pretrained(part)
        give_umask_mode(part)
        part.rename(out)


def load_sentencepiece(model: str, settings: ModelSettings) -> Any:
    """A tokenizer with the same ids as the family's own code around its tokenizer.model.

    Raises:
        SkipwiseError: no tokenizer.model, or transformers gives other ids for it.
    """
    from sentencepiece import SentencePieceProcessor

    source = _fetch(model, settings, ("tokenizer*", "special_tokens_map.json"))
    file = source / "tokenizer.model"
    if not file.is_file():
        raise SkipwiseError(f"{model} has no tokenizer.model, which is needed for its tokenizer")
    options = source / "tokenizer_config.json"
    text = options.read_text(encoding="utf-8") if options.is_file() else "{}"
    tokenizer = families.sentencepiece_bpe(file, json.loads(text))
    reference = SentencePieceProcessor(model_file=str(file))
    for text in _SAMPLES:
        if tokenizer(text, add_special_tokens=False)["input_ids"] != reference.encode(text):
            raise SkipwiseError(
                f"the tokenizer.model of {model} gives other tokens in transformers than in "
                f"SentencePiece, for {text!r}\n"
                "give a folder with a tokenizer that transformers reads (tokenizer.json)"
            )
    return tokenizer


def _fetch(model: str, settings: ModelSettings, patterns: tuple[str, ...] = ()) -> Path:
    """The source folder; for a hub name, the folder in the hub's cache."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    weights = "*.safetensors" if settings.use_safetensors else "*.bin"
    wanted = list(patterns or (weights, f"{weights}.index.json", "*.json", "tokenizer*"))
    try:
        return Path(snapshot_download(model, revision=settings.revision, allow_patterns=wanted))
    except Exception as error:  # the hub raises many types
        raise SkipwiseError(f"{model} could not be fetched\n{first_line(error)}") from error


def _weight_files(folder: Path, settings: ModelSettings) -> list[Path]:
    """The source's weight files, as listed in its index; SkipwiseError if one is missing."""
    name = "model.safetensors" if settings.use_safetensors else "pytorch_model.bin"
    index = folder / f"{name}.index.json"
    if index.is_file():
        files = [folder / file for file in sorted(shard_names(index))]
    else:
        files = [folder / name]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        other = sorted(p.name for p in folder.glob("*.bin"))
        fix = "give a folder or hub name with all its weights"
        if other and settings.use_safetensors:
            fix = f"it has {other[0]}: {READ_BIN}"
        raise SkipwiseError(f"{folder} has no {missing[0]}\n{fix}")
    return files


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one file, with one tensor in memory at a time."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    yield name, opened.get_tensor(name)
            return
        try:
            stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be memory-mapped
            stored = torch.load(file, map_location="cpu", weights_only=True)
        yield from stored.items()
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise SkipwiseError(f"{file} is broken\n{first_line(error)}") from error
    except Exception as error:  # pickle.UnpicklingError: other objects than weights
        if type(error).__name__ != "UnpicklingError":
            raise
        raise SkipwiseError(f"{file} holds more than weights, so it is not loaded") from error


def _write_shards(
    files: list[Path], conversion: Conversion, config: dict[str, Any], out: Path
) -> set[str]:
    """Write the converted tensors, with `_SHARD_BYTES` in memory at most; return their names."""
    from safetensors.torch import save_file
    from tqdm import tqdm

    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        if held:
            save_file(held, out / f"{len(shards)}.part", metadata={"format": "pt"})
            shards.append(list(held))
            held.clear()
            size = 0

    for file in tqdm(files, desc="converting", unit=" files", disable=None):
        for name, tensor in _tensors(file):
            if families.DROPPED_BUFFERS.search(name):
                continue
            for new, value in conversion.tensors(name, tensor, config):
                held[new] = value.contiguous()
                size += value.nbytes
                total += value.nbytes
                if size >= _SHARD_BYTES:
                    flush()
    flush()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(names) == 1:
        names = ["model.safetensors"]
    for i, name in enumerate(names):
        (out / f"{i}.part").rename(out / name)
    if len(names) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return {name for keys in shards for name in keys}
