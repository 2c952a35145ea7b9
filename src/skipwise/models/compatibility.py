"""Make a saved folder readable for every runtime: config.json, generation config, tokenizer.

transformers 5 saves RoPE under keys that transformers 4 and other runtimes do not know, so they
silently load the model unscaled. Every saved folder, including checkpoints, gets both spellings.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from skipwise.config.machine import give_umask_mode
from skipwise.config.run_folder import write_json
from skipwise.config.trust import secret_in
from skipwise.models.hf_config import stays_inside
from skipwise.pose.rope_config import with_legacy_rope_keys

LENGTH_KEYS = (  # other names of the window: vLLM takes the smallest, SGLang the first of four
    *("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "n_positions"),
    *("max_target_positions", "max_seq_length", "seq_len"),
)
_LOADING = ("is_local", "local_files_only", "name_or_path", "_name_or_path", "_commit_hash")
_LOADING += ("token", "use_auth_token", "hub_token")


def make_portable(folder: Path, target_length: int | None = None) -> None:
    """Update the configs of a saved model in place.

    config.json gets both RoPE spellings and the cache, which training turned off. It loses keys
    that transformers ignores and a server prefers to the scaling or the length. The tokenizer and
    generation configs get the new length, and a tokenizer class that transformers 4 knows. No
    config keeps how it was loaded, or a path of this machine. The umask decides who reads it.

    Args:
        target_length: T. By default the lengths do not change.
    """
    file = folder / "config.json"
    config = with_legacy_rope_keys(json.loads(file.read_text(encoding="utf-8")))
    config.pop("dual_chunk_attention_config", None)  # vLLM, SGLang: instead of the scaling
    if "max_position_embeddings" in config:
        config = {key: value for key, value in config.items() if key not in LENGTH_KEYS}
    config["use_cache"] = True
    write_json(file, config)
    file = folder / "generation_config.json"
    if file.exists() and target_length is not None:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if "max_length" in settings:  # Llama 2 keeps its window there, and generate() stops at it
            write_json(file, {**settings, "max_length": target_length})
    file = folder / "tokenizer_config.json"
    if file.exists():
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if target_length is not None:
            settings["model_max_length"] = target_length
        write_json(file, settings)
    for file in folder.glob("*config.json"):
        write_json(file, _without_paths(json.loads(file.read_text(encoding="utf-8"))))
    give_umask_mode(folder)


def _without_paths(value: Any) -> Any:
    """The JSON without keys that say how it was loaded, or whose value is an absolute path."""
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if not isinstance(value, dict):
        return value
    own = ("_token", "template", "content", "base_model_name_or_path")  # peft loads an adapter's
    return {
        key: _without_paths(item)
        for key, item in value.items()
        if key not in _LOADING
        and not secret_in(item)
        and (key.endswith(own) or not (isinstance(item, str) and Path(item).is_absolute()))
    }


def save_tokenizer(tokenizer: Any, source: str, folder: Path) -> None:
    """Save the tokenizer, and its SentencePiece file if the source has one."""
    tokenizer.save_pretrained(folder)
    file = Path(source).expanduser() / "tokenizer.model"
    if file.is_file() and stays_inside(file) and not (folder / file.name).exists():
        shutil.copyfile(file, folder / file.name)
