"""A model folder on disk: its JSON files, and what its config class would add.

A config.json is enough. No weights are opened, and neither torch nor transformers is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipwise.config.recipe import ModelSettings
from skipwise.errors import SkipwiseError
from skipwise.models.compatibility import LENGTH_KEYS
from skipwise.models.hf_config import defaults, read_config, read_json, shard_names

_UNSET = 10**12  # a tokenizer without a length has 1e30


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """The contents of the files, before any runtime reads them."""

    path: Path
    raw: dict[str, Any]  # config.json of the language model, unchanged
    known: dict[str, Any]  # defaults of its config class in transformers 5; {} if it has none
    tokenizer: dict[str, Any] | None  # tokenizer_config.json
    generation: dict[str, Any]  # generation_config.json
    base: str | None  # the base model that an adapter's folder names
    own_config: dict[str, Any] | None  # the config.json beside an adapter, which peft does not read
    weights: tuple[str, ...]
    missing_weights: tuple[str, ...]  # listed in an index, but not in the folder

    @property
    def family(self) -> str:
        return self.raw.get("model_type", "unknown")

    def value(self, key: str, default: Any = None) -> Any:
        """The value in config.json, or else the config class's default."""
        return self.raw[key] if key in self.raw else self.known.get(key, default)

    @property
    def length(self) -> int:
        """max_position_embeddings, under any of its names."""
        names = ("max_position_embeddings", "n_positions", "max_seq_len", *LENGTH_KEYS)
        found = next((self.raw[n] for n in names if self.raw.get(n)), None)
        return found or self.known.get("max_position_embeddings") or 2048

    @property
    def nested(self) -> bool:
        """Whether RoPE is set per layer type."""
        given = self.raw.get("rope_parameters") or self.known.get("rope_parameters") or {}
        known = self.known.get("rope_parameters") or {}
        return any(isinstance(p.get("full_attention"), dict) for p in (given, known))

    @property
    def latent_attention(self) -> bool:
        """DeepSeek's attention (MLA), which vLLM and llama.cpp scale in DeepSeek's own way."""
        return bool(self.raw.get("qk_rope_head_dim")) and self.family != "minicpm3"

    @property
    def dual_chunks(self) -> dict[str, Any] | None:
        """The key for which vLLM and SGLang compute another RoPE, in the classes that read it."""
        found = self.raw.get("dual_chunk_attention_config")
        return found if self.family.startswith(("qwen2", "qwen3", "glm4")) else None

    @property
    def head_dim(self) -> int | None:
        """Dimensions of a head. None if the config does not give it, directly or by its width."""
        if found := self.raw.get("qk_rope_head_dim") or self.value("global_head_dim"):
            return found  # DeepSeek: only these dimensions rotate; Gemma 4: of the full layers
        keys = self.known.get("keys", {})
        own = next((self.raw[k] for k, n in keys.items() if n == "head_dim" and k in self.raw), 0)
        if own or self.value("head_dim"):
            return own or self.value("head_dim")
        width = self._shape("hidden_size", "n_embd", "d_model")
        heads = self._shape("num_attention_heads", "n_head", "n_heads")
        ratio = self.known.get("head_dim_ratio", 1)
        return ratio * width // heads if width and heads else None

    def _shape(self, *names: str) -> int | None:
        return next((self.value(n) for n in names if self.value(n)), None)

    @property
    def tokenizer_length(self) -> int | None:
        """The tokenizer's model_max_length. None if it has none."""
        length = (self.tokenizer or {}).get("model_max_length")
        ok = isinstance(length, int | float) and not isinstance(length, bool) and length < _UNSET
        return int(length) if ok and length is not None else None


def read_folder(path: Path) -> ModelFolder:
    """The files of a folder.

    Raises:
        SkipwiseError: no folder, no config.json, broken JSON, an adapter whose base is not here,
            a model without rotary positions.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise SkipwiseError(f"{path}: no such folder\ngive the folder that holds config.json")
    adapter = _json(path / "adapter_config.json")
    base = None if adapter is None else str(adapter.get("base_model_name_or_path") or "")
    own = _json(path / "config.json") if adapter is not None else None
    if base is None or (not _has_config(base) and own is not None):
        raw = read_config(str(path), ModelSettings())
    elif _has_config(base):
        raw = read_config(base, ModelSettings())
    else:
        raise SkipwiseError(
            f"{path} is an adapter of {base or 'a base that it does not name'}. Runtimes load that "
            "base's RoPE, and its config is not on this machine\ngive the base's folder, or "
            "merge the adapter into it (peft: merge_and_unload) and give that"
        )
    text = raw.get("text_config")
    if isinstance(text, dict):
        raw = {key: raw[key] for key in ("quantization_config",) if key in raw} | text
    folder = ModelFolder(
        path=path,
        raw=raw,
        known=defaults().get(raw.get("model_type", ""), {}),
        tokenizer=_json(path / "tokenizer_config.json"),
        generation=_json(path / "generation_config.json") or {},
        base=base,
        own_config=own,
        weights=_weights(path),
        missing_weights=_missing_weights(path),
    )
    _require_rope(folder)
    return folder


def _require_rope(folder: ModelFolder) -> None:
    raw, keys = folder.raw, ("rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base")
    has_rope = folder.known.get("rope_parameters") or any(raw.get(key) for key in keys)
    if raw.get("alibi") or not has_rope:
        raise SkipwiseError(
            f"the config of the {folder.family} model in {folder.path} has no RoPE settings: there "
            "is nothing that runtimes could read\ngive the folder of a model whose config has them"
        )
    if folder.head_dim is None:
        raise SkipwiseError(
            f"the config.json of {folder.path} has neither head_dim nor hidden_size and "
            "num_attention_heads: it is incomplete"
        )


def _json(file: Path) -> dict[str, Any] | None:
    """The object in a file. None if there is no such file."""
    if not file.is_file():
        return None
    found = read_json(file)
    if not isinstance(found, dict):
        raise SkipwiseError(f"{file} should map keys to values\nfix or remove it")
    return found


def _has_config(base: str) -> bool:
    return bool(base) and (Path(base).expanduser() / "config.json").is_file()


def _weights(path: Path) -> tuple[str, ...]:
    patterns = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
    return tuple(sorted(file.name for p in patterns for file in path.glob(p)))


def _missing_weights(path: Path) -> tuple[str, ...]:
    """Shards that an index lists and the folder lacks."""
    names: set[str] = set()
    for index in path.glob("*.index.json"):
        names |= shard_names(index)
    return tuple(sorted(name for name in names if not (path / name).is_file()))
