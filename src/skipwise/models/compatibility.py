"""A saved folder that every runtime reads right: configs and tokenizer, whoever saved the weights.

transformers 5 saves RoPE in a spelling that transformers 4 and others do not know, and they load
such a model as unscaled without a word. So every folder that is saved, in the middle of training
as well, gets both spellings here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from skipwise.config.run_folder import write_json
from skipwise.pose.rope_config import with_legacy_rope_keys


def make_portable(folder: Path, target_length: int | None = None) -> None:
    """Mend the configs of a saved model in place.

    Both spellings of RoPE in config.json, the cache on (training turns it off), the lengths of the
    tokenizer and of generation, and a tokenizer class that transformers 4 knows.

    Args:
        target_length: T, for the tokenizer; None: as it is.
    """
    file = folder / "config.json"
    config = with_legacy_rope_keys(json.loads(file.read_text(encoding="utf-8")))
    config.pop("model_max_length", None)
    config["use_cache"] = True
    write_json(file, config)
    file = folder / "generation_config.json"
    if file.exists() and target_length is not None:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if "max_length" in settings:  # Llama 2 has its window there, and generate() stops at it
            write_json(file, {**settings, "max_length": target_length})
    file = folder / "tokenizer_config.json"
    if file.exists():
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if target_length is not None:
            settings["model_max_length"] = target_length
        write_json(file, settings)


def save_tokenizer(tokenizer: Any, source: str, folder: Path) -> None:
    """The tokenizer, and its SentencePiece file where the source has one."""
    tokenizer.save_pretrained(folder)
    for name in ("tokenizer.model",):
        file = Path(source).expanduser() / name
        if file.is_file() and not (folder / name).exists():
            shutil.copyfile(file, folder / name)
