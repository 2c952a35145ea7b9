"""Exact conversions of families that transformers cannot rescale to ones that it can.

GPT-J has no RoPE settings in its config, but is a Phi with other names: one LayerNorm before
parallel attention and MLP, partial rotary embeddings, a head with bias. Only the rotary rows of q
and k are laid out otherwise. Baichuan-7B and Baichuan2-7B are a Llama whose q, k and v are one
matrix; Baichuan2 normalises the rows of its head in every pass, which is done once here. So what is
trained and handed over is a stock Phi or Llama, and no code of the source is run. On request the
text model of a multimodal wrapper is taken out the same way: its tensors, under its own names.

Weights go through a tensor at a time and are written in shards, so that memory holds a shard of
`_SHARD_BYTES` and not the model.

Source:  transformers, models/gptj and models/phi; baichuan-inc/Baichuan-7B and Baichuan2-7B-Base,
         modeling_baichuan.py (W_pack, NormHead)
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipwise.config.recipe import ModelSettings
from skipwise.errors import SkipwiseError
from skipwise.models.hf_config import SHAPE, defaults, first_line

if TYPE_CHECKING:
    from torch import Tensor

_SHARD_BYTES = 2 << 30
_DROPPED = re.compile(r"\.(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)$")  # buffers
_BAICHUAN_NAME = re.compile(
    r"(lm_head|model\.(embed_tokens|norm|layers\.\d+\."
    r"(self_attn\.(W_pack|o_proj)|mlp\.(gate|up|down)_proj|(input|post_attention)_layernorm)))"
    r"\.weight"
)
_SAMPLES = (
    "The pass key is 81501. Remember it.",
    "  two  spaces\tand\n\nlines ",
    "def f(x):\n    return {x: 1.5e-3}  # ok",
    "北京是中国的首都。今天天气很好！",
    "naïve café – “quotes” … ½ 😀",
)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One family to another, exactly."""

    source: str
    target: str
    config: Callable[[dict[str, Any]], dict[str, Any]]
    tensors: Callable[[str, Tensor, dict[str, Any]], Iterator[tuple[str, Tensor]]]
    sentencepiece: bool = False  # the tokenizer is code around a SentencePiece model
    frozen: tuple[str, ...] = ()  # parameters that should not be trained


def conversion_for(config: dict[str, Any], text_only: bool = False) -> Conversion | None:
    """The conversion that a config.json needs; None for most.

    Args:
        text_only: take the text model out of a multimodal wrapper.

    Raises:
        SkipwiseError: Baichuan-13B, which has no RoPE; a text model that transformers has no class
            for; nothing to take out.
    """
    if text_only:
        return _text_model(config)
    match config.get("model_type"):
        case "gptj":
            return Conversion(
                source="GPT-J", target="Phi", config=_phi_config, tensors=_phi_tensors
            )
        case "baichuan":
            # 13B states model_max_length alone; 7B states max_position_embeddings
            if "max_position_embeddings" not in config or config.get("hidden_size") == 5120:
                raise SkipwiseError(
                    "Baichuan-13B has ALiBi, and PoSE extends rotary position embeddings (RoPE) "
                    "only\nchoose Baichuan-7B or Baichuan2-7B, or another RoPE model"
                )
            normed = _has_norm_head(config)
            return Conversion(
                source="Baichuan2-7B" if normed else "Baichuan-7B",
                target="Llama",
                config=_llama_config,
                tensors=_llama_tensors,
                sentencepiece=True,
                frozen=("lm_head.weight",) if normed else (),
            )
    return None


def convert_model(
    model: str, config: dict[str, Any], settings: ModelSettings, out: Path, tokenizer: Any
) -> None:
    """Write the converted model to a folder: config, weights in safetensors, tokenizer.

    Args:
        model: folder or hub name of the source.
        config: its config.json.
        out: the folder; it exists only when all of it was written.

    Raises:
        SkipwiseError: no weights of the wanted kind, a tensor that is not the family's, full disk.
    """
    conversion = conversion_for(config, settings.text_only)
    assert conversion is not None
    source = _fetch(model, settings)
    files = _weight_files(source, settings)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    print(f"converting {conversion.source} to {conversion.target}: {out}", file=sys.stderr)
    try:
        names = _write_shards(files, conversion, config, part)
        # a head that is not there is tied, whatever the config says (wrappers differ in that)
        target = {**conversion.config(config), "tie_word_embeddings": "lm_head.weight" not in names}
        text = json.dumps(target, indent=2) + "\n"
        (part / "config.json").write_text(text, encoding="utf-8")
        for name in ("generation_config.json", "tokenizer.model"):
            if (source / name).is_file():
                shutil.copyfile(source / name, part / name)
        tokenizer.save_pretrained(part)
        part.rename(out)
    except OSError as error:
        raise SkipwiseError(f"{out} could not be written: {error.strerror or error}") from error


def load_sentencepiece(model: str, settings: ModelSettings) -> Any:
    """A tokenizer that gives the same ids as a family's own code around its tokenizer.model.

    Raises:
        SkipwiseError: no tokenizer.model, or one that tokenizes otherwise in transformers.
    """
    from sentencepiece import SentencePieceProcessor

    source = _fetch(model, settings, ("tokenizer*", "special_tokens_map.json"))
    file = source / "tokenizer.model"
    if not file.is_file():
        raise SkipwiseError(f"{model} has no tokenizer.model, which its tokenizer is made from")
    stated = source / "tokenizer_config.json"
    options = json.loads(stated.read_text(encoding="utf-8")) if stated.is_file() else {}
    tokenizer = _sentencepiece_bpe(file, options)
    reference = SentencePieceProcessor(model_file=str(file))
    for text in _SAMPLES:
        if tokenizer(text, add_special_tokens=False)["input_ids"] != reference.encode(text):
            raise SkipwiseError(
                f"the tokenizer.model of {model} gives other tokens in transformers than in "
                f"SentencePiece, for {text!r}: it cannot be kept usable\n"
                "give a folder whose tokenizer transformers reads (tokenizer.json)"
            )
    return tokenizer


def _sentencepiece_bpe(file: Path, options: dict[str, Any]) -> Any:
    """A fast tokenizer with the pieces of a SentencePiece BPE model.

    Not a LlamaTokenizer: that puts no space before a text that begins with one, which
    SentencePiece does, and when loaded again it is built anew from the pieces.
    """
    from tokenizers import Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    extractor: Any = SentencePieceExtractor(str(file))
    trained = extractor.proto.trainer_spec
    pieces: Any = extractor.extract(BPE)
    prefix = extractor.proto.normalizer_spec.add_dummy_prefix
    backend = Tokenizer(
        BPE(
            vocab=pieces["vocab"],
            merges=pieces["merges"],
            unk_token=trained.unk_piece,
            fuse_unk=True,
            byte_fallback=trained.byte_fallback,
        )
    )
    space = normalizers.Replace(" ", "▁")
    before = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, space])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    backend.add_tokens(pieces["additional_special_tokens"])
    ends = [(name, options.get(f"add_{name}_token", name == "bos")) for name in ("bos", "eos")]
    names = {"bos": trained.bos_piece, "eos": trained.eos_piece}
    around = {name: [names[name]] if added else [] for name, added in ends}
    backend.post_processor = processors.TemplateProcessing(
        single=[*around["bos"], "$A", *around["eos"]],
        special_tokens=[(piece, pieces["vocab"][piece]) for piece in names.values()],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=trained.bos_piece,
        eos_token=trained.eos_piece,
        unk_token=trained.unk_piece,
        model_max_length=options.get("model_max_length"),
        clean_up_tokenization_spaces=False,
    )


def _phi_config(config: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = config["n_embd"], config["n_head"]
    rotary = config.get("rotary_dim")
    if not rotary:
        raise SkipwiseError("this GPT-J has no rotary_dim, so no rotary position embeddings")
    share = rotary / (hidden // heads)
    if int(hidden // heads * share) != rotary:  # Phi cuts the product off
        share = (rotary + 0.5) / (hidden // heads)
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "vocab_size": config["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": config.get("n_inner") or 4 * hidden,
        "num_hidden_layers": config["n_layer"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": config.get("activation_function", "gelu_new"),
        "max_position_embeddings": config.get("n_positions", 2048),
        "layer_norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": share,
        },
        "attention_dropout": config.get("attn_pdrop", 0.0),
        "embd_pdrop": config.get("embd_pdrop", 0.0),
        "resid_pdrop": config.get("resid_pdrop", 0.0),
        "qk_layernorm": False,
        **_shared(config),
    }


def _llama_config(config: dict[str, Any]) -> dict[str, Any]:
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    kept += ("num_attention_heads", "max_position_embeddings", "rms_norm_eps")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: config[key] for key in kept},
        "num_key_value_heads": config["num_attention_heads"],
        "hidden_act": config.get("hidden_act", "silu"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "mlp_bias": False,
        **_shared(config),
    }


def _shared(config: dict[str, Any]) -> dict[str, Any]:
    """What both targets take over as it is."""
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
    return {
        **{key: config[key] for key in kept if key in config},
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
        "use_cache": True,
    }


_PHI_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.final_layernorm",
    "ln_1": "input_layernorm",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.out_proj": "self_attn.dense",
    "mlp.fc_in": "mlp.fc1",
    "mlp.fc_out": "mlp.fc2",
    "lm_head": "lm_head",
}


def _phi_tensors(name: str, tensor: Tensor, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """A tensor of GPT-J under Phi's name; attention gets biases of zero.

    GPT-J turns neighbours (2j, 2j+1), Phi turns (j, j + d/2): rows are reordered to match.
    """
    module, kind = name.rsplit(".", 1)
    found = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", module)
    place, inner = (f"model.layers.{found[1]}.", found[2]) if found else ("", module)
    if inner not in _PHI_NAMES:
        raise SkipwiseError(f"{name} is not a tensor of GPT-J: the checkpoint cannot be converted")
    if inner in ("attn.q_proj", "attn.k_proj"):
        heads, rotary = config["n_head"], config["rotary_dim"]
        rows = tensor.reshape(heads, -1, tensor.shape[-1])  # (heads, head_dim, hidden)
        order = [*range(0, rotary, 2), *range(1, rotary, 2), *range(rotary, rows.shape[1])]
        tensor = rows[:, order].reshape(tensor.shape)
    yield f"{place}{_PHI_NAMES[inner]}.{kind}", tensor
    if inner.startswith("attn."):
        yield f"{place}{_PHI_NAMES[inner]}.bias", tensor.new_zeros(tensor.shape[0])


def _llama_tensors(
    name: str, tensor: Tensor, config: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """A tensor of Baichuan under Llama's name."""
    if not _BAICHUAN_NAME.fullmatch(name):
        raise SkipwiseError(
            f"{name} is not a tensor of Baichuan-7B: the checkpoint cannot be converted"
        )
    if name.endswith("W_pack.weight"):
        for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
            yield name.replace("W_pack", f"{letter}_proj"), rows.clone()
    elif name == "lm_head.weight" and _has_norm_head(config):
        rows = tensor.float()
        yield name, (rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)).to(tensor.dtype)
    else:
        yield name, tensor


def _text_model(config: dict[str, Any]) -> Conversion:
    wrapper, text = config.get("model_type", "this model"), config.get("text_config") or {}
    if not text:
        raise SkipwiseError(f"load.text_only: {wrapper} wraps no text model\nleave it out")
    if text.get("model_type") not in defaults():
        raise SkipwiseError(
            f"load.text_only: {wrapper} wraps {text.get('model_type')}, which transformers cannot "
            "load as a causal language model\nchoose another model"
        )
    return Conversion(
        source=wrapper, target=text["model_type"], config=_text_config, tensors=_text_tensors
    )


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The text model's own config, with what it leaves to its class or to the wrapper."""
    text = dict(config["text_config"])
    known = defaults()[text["model_type"]]
    text = {key: known[key] for key in SHAPE if key in known} | text
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key not in text and key in config:
            text[key] = config[key]
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype and not (text.get("dtype") or text.get("torch_dtype")):
        text["dtype"] = dtype
    return {**text, "use_cache": True}


_TEXT_NAME = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(?P<inner>.+)")


def _text_tensors(
    name: str, tensor: Tensor, config: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """A tensor of the text model under its own name; those of other parts are left out.

    transformers 4 and 5 and the families place it differently: `language_model.model.X`,
    `model.language_model.X`, and the head inside or beside it. What is missed is missing when the
    model is loaded, which is an error.
    """
    found = _TEXT_NAME.fullmatch(name)
    inner = found["inner"] if found else name
    if inner.startswith("lm_head."):
        yield inner, tensor
    elif found:
        yield f"model.{inner}", tensor


def _has_norm_head(config: dict[str, Any]) -> bool:
    """Baichuan2: its configs have a z-loss, and its vocabulary is twice as large."""
    return "z_loss_weight" in config or config.get("vocab_size") == 125696


def _fetch(model: str, settings: ModelSettings, patterns: tuple[str, ...] = ()) -> Path:
    """The folder of the source; of a hub name, its files in the hub's cache."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    weights = "*.safetensors" if settings.use_safetensors else "*.bin"
    wanted = patterns or (weights, f"{weights}.index.json", "*.json", "tokenizer*")
    try:
        return Path(
            snapshot_download(model, revision=settings.revision, allow_patterns=list(wanted))
        )
    except Exception as error:  # the hub raises many kinds
        raise SkipwiseError(f"{model} could not be fetched\n{first_line(error)}") from error


def _weight_files(folder: Path, settings: ModelSettings) -> list[Path]:
    """The shards of the source, as its index lists them.

    Raises:
        SkipwiseError: none of the wanted kind, or one that the index names is missing.
    """
    name = "model.safetensors" if settings.use_safetensors else "pytorch_model.bin"
    index = folder / f"{name}.index.json"
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / file for file in sorted(set(listed))]
    else:
        files = [folder / name]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        other = sorted(p.name for p in folder.glob("*.bin"))
        mend = (
            f"it holds {other[0]}: type load.use_safetensors=false to read that (with "
            "weights_only: nothing in it is run)"
            if other and settings.use_safetensors
            else "give a folder or hub name with all its weights"
        )
        raise SkipwiseError(f"{folder} lacks {missing[0]}\n{mend}")
    return files


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one file, a tensor in memory at a time."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    yield name, opened.get_tensor(name)
            return
        try:
            stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            stored = torch.load(file, map_location="cpu", weights_only=True)
        yield from stored.items()
    except SkipwiseError:
        raise
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise SkipwiseError(f"{file} is broken\n{first_line(error)}") from error
    except Exception as error:  # pickle.UnpicklingError: something else than weights
        if type(error).__name__ != "UnpicklingError":
            raise
        raise SkipwiseError(f"{file} holds more than weights, and is not read") from error


def _write_shards(
    files: list[Path], conversion: Conversion, config: dict[str, Any], out: Path
) -> set[str]:
    """Write the converted tensors, at most `_SHARD_BYTES` in memory at once; return their names."""
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
            if _DROPPED.search(name):
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
        places = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return {name for keys in shards for name in keys}
