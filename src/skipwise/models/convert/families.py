"""How each converted family's config, tensors and tokenizer map to the target family.

Source:  transformers, models/gptj and models/phi; baichuan-inc/Baichuan-7B and Baichuan2-7B-Base,
         modeling_baichuan.py (W_pack, NormHead)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipwise.errors import SkipwiseError
from skipwise.models.hf_config import SHAPE, defaults
from skipwise.models.model_info import has_other_parts, refuse_text_model

if TYPE_CHECKING:
    from torch import Tensor


DROPPED_BUFFERS = re.compile(r"\.(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)$")
_BAICHUAN_NAME = re.compile(
    r"(lm_head|model\.(embed_tokens|norm|layers\.\d+\."
    r"(self_attn\.(W_pack|o_proj)|mlp\.(gate|up|down)_proj|(input|post_attention)_layernorm)))"
    r"\.weight"
)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """An exact conversion from one family to another."""

    source: str
    target: str
    config: Callable[[dict[str, Any]], dict[str, Any]]
    tensors: Callable[[str, Tensor, dict[str, Any]], Iterator[tuple[str, Tensor]]]
    sentencepiece: bool = False  # the tokenizer is custom code around a SentencePiece model
    frozen: tuple[str, ...] = ()  # parameters that must not be trained


def sentencepiece_bpe(file: Path, options: dict[str, Any]) -> Any:
    """A fast tokenizer with the pieces of a SentencePiece BPE model.

    LlamaTokenizer is no substitute: unlike SentencePiece it adds no space before a text that begins
    with one, and loading it rebuilds it from the pieces.
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


def phi_config(config: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = config["n_embd"], config["n_head"]
    rotary = config.get("rotary_dim")
    if not rotary:
        raise SkipwiseError("this GPT-J has no rotary_dim, so no rotary position embeddings")
    share = rotary / (hidden // heads)
    if int(hidden // heads * share) != rotary:  # Phi truncates the product
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


def llama_config(config: dict[str, Any]) -> dict[str, Any]:
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
    """Keys that both targets keep unchanged."""
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


def phi_tensors(name: str, tensor: Tensor, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """A GPT-J tensor under its Phi name; attention biases are zero.

    GPT-J rotates dimensions (2j, 2j+1) together, Phi (j, j + d/2): rows are reordered to match.
    """
    module, kind = name.rsplit(".", 1)
    found = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", module)
    prefix, inner = (f"model.layers.{found[1]}.", found[2]) if found else ("", module)
    if inner not in _PHI_NAMES:
        raise SkipwiseError(f"{name} is not a tensor of GPT-J: the checkpoint cannot be converted")
    if inner in ("attn.q_proj", "attn.k_proj"):
        heads, rotary = config["n_head"], config["rotary_dim"]
        rows = tensor.reshape(heads, -1, tensor.shape[-1])  # (heads, head_dim, hidden)
        order = [*range(0, rotary, 2), *range(1, rotary, 2), *range(rotary, rows.shape[1])]
        tensor = rows[:, order].reshape(tensor.shape)
    yield f"{prefix}{_PHI_NAMES[inner]}.{kind}", tensor
    if inner.startswith("attn."):
        yield f"{prefix}{_PHI_NAMES[inner]}.bias", tensor.new_zeros(tensor.shape[0])


def llama_tensors(
    name: str, tensor: Tensor, config: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """A Baichuan tensor under its Llama name."""
    if not _BAICHUAN_NAME.fullmatch(name):
        raise SkipwiseError(
            f"{name} is not a tensor of Baichuan-7B: the checkpoint cannot be converted"
        )
    if name.endswith("W_pack.weight"):
        for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
            yield name.replace("W_pack", f"{letter}_proj"), rows.clone()
    elif name == "lm_head.weight" and has_norm_head(config):
        rows = tensor.float()
        yield name, (rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)).to(tensor.dtype)
    else:
        yield name, tensor


def text_model(config: dict[str, Any]) -> Conversion:
    wrapper, text = config.get("model_type", "this model"), config.get("text_config") or {}
    if not text and not has_other_parts(config):
        raise SkipwiseError(f"load.text_only: {wrapper} contains no text model\nleave it out")
    refuse_text_model(wrapper, text)
    return Conversion(
        source=wrapper, target=text["model_type"], config=_text_config, tensors=_text_tensors
    )


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The text model's config, completed from its class's defaults and the wrapper."""
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
    """A tensor of the text model under its own name; other tensors are skipped.

    The prefix differs by family and transformers version: `language_model.model.X`,
    `model.language_model.X`, with the head inside or outside. If a tensor were skipped by mistake,
    loading the model would fail.
    """
    found = _TEXT_NAME.fullmatch(name)
    inner = found["inner"] if found else name
    if inner.startswith("lm_head."):
        yield inner, tensor
    elif found:
        yield f"model.{inner}", tensor


def has_norm_head(config: dict[str, Any]) -> bool:
    """Whether this is Baichuan2: its config has a z-loss, or its larger vocabulary."""
    return "z_loss_weight" in config or config.get("vocab_size") == 125696
