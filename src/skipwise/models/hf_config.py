"""Read a model's config: quickly as plain JSON, or with transformers.

A config.json omits its class's defaults, and older ones spell RoPE differently. `complete` fixes
both without transformers, from a table of the config classes' defaults (`config_defaults.json`,
written by tools/make_config_defaults.py).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skipwise.config.recipe import ModelSettings
from skipwise.errors import SkipwiseError, first_line
from skipwise.models.model_info import (
    LENGTHS,
    ModelInfo,
    check_positions,
    defaults,
    explains_wrong_types,
    read_model_info,
)

SHAPE = ("hidden_size", "num_attention_heads", "vocab_size")  # every complete config.json has these
READ_BIN = "type load.use_safetensors=false to read it (weights_only: it cannot run code)"
_LAYER_TYPES = ("full_attention", "sliding_attention")
_OBJECTS = ("rope_parameters", "rope_scaling", "text_config", "dual_chunk_attention_config")
_THETAS = ("rope_theta", "rope_local_base_freq", "rotary_emb_base")
_BEFORE = "original_max_position_embeddings"
_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim", "qk_rope_head_dim")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
_EXPERTS = ("num_experts", "num_local_experts")
_WHOLE, _NUMBER, _SHARE = "a whole number", "a number", "a number above 0 and at most 1"
# (what the values of these keys must be, their type, lowest, highest, keys); a list of whole
# numbers holds one for each layer
_KINDS: tuple[tuple[str, Any, float, float, tuple[str, ...]], ...] = (
    ("a JSON object", dict, 0, 0, (*_OBJECTS, *_LAYER_TYPES)),
    ("a list", list, 0, 0, ("layer_types",)),
    (_NUMBER, int | float, -1e31, 1e31, LENGTHS),
    (f"{_NUMBER} above 0", int | float, 1e-30, 1e30, ("factor", "alpha", _BEFORE)),
    (f"{_NUMBER} above 0", int | float, 1e-30, 1e18, _THETAS),
    (_SHARE, int | float, 1e-6, 1, ("partial_rotary_factor", "rotary_pct")),
    (f"{_WHOLE} above 0", int, 1, 1 << 20, ("hidden_size", "d_model", "n_embd")),
    (f"{_WHOLE} above 0", int, 1, 10_000, _LAYERS),
    (f"{_WHOLE} above 0", int, 1, 1 << 16, _HEADS),
    (f"{_WHOLE} above 0", int, 1, 1 << 26, ("vocab_size",)),
    (f"{_WHOLE} above 0", int, 1, 2**31 - 1, ("max_position_embeddings",)),
    (_WHOLE, int, 0, 1 << 24, ("intermediate_size", *_EXPERTS)),
    (_NUMBER, int | float, 0, 2**31 - 1, ("sliding_window",)),
)
_CONNECT_SECONDS = 4.0
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.safetensors.index.json")
_COPIED = (".jinja", ".json", ".txt", ".model")  # files whose text goes into an export


def is_local(model: str) -> bool:
    return Path(model).expanduser().exists()


def is_config_alone(model: str) -> bool:
    """Whether this is a folder with a config.json but no weights."""
    folder = Path(model).expanduser()
    return (folder / "config.json").is_file() and not any(
        next(folder.glob(pattern), None) for pattern in _WEIGHTS
    )


def read_config(model: str, settings: ModelSettings) -> dict[str, Any]:
    """The config.json of a folder or hub name, unchanged.

    Raises:
        SkipwiseError: no such folder or hub name, an adapter, broken JSON, a value of a wrong type.
    """
    config = _read_raw_config(model, settings)
    if not config.get("auto_map") or config.get("model_type") in defaults():
        _check_values(config)
    return config


def _read_raw_config(model: str, settings: ModelSettings) -> dict[str, Any]:
    folder = Path(model).expanduser()
    if folder.is_dir():
        if settings.revision is not None:
            raise SkipwiseError(
                f"load.revision: {settings.revision} is for a hub name, and {model} is a folder"
                "\nleave it out"
            )
        check_inside(folder)
        return _read_local_config(folder)
    if folder.exists() or model.startswith((".", "/", "~")):
        raise SkipwiseError(f"{model}: no such folder\ngive the folder of a model, or its hub name")
    from transformers import PreTrainedConfig

    address = unreachable_hub()
    try:
        config, _ = PreTrainedConfig.get_config_dict(model, revision=settings.revision)
    except Exception as error:  # the hub raises many types
        why = f"no connection to {address}" if address else first_line(error)
        raise SkipwiseError(
            f"{model} could not be read: it is not a local folder, and the download failed\n{why}"
        ) from error
    return config


@functools.cache
def unreachable_hub() -> str:
    """The Hub's address if no connection opens in time; otherwise empty, as behind a proxy.

    The libraries then read only what was downloaded before, and do not try again and again.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return ""
    url, opened = urllib.parse.urlsplit(constants.ENDPOINT), []
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
    except ValueError as error:
        raise SkipwiseError(f"HF_ENDPOINT={constants.ENDPOINT} is no address: {error}") from error

    def connect() -> None:
        with contextlib.suppress(OSError):
            opened.append(socket.create_connection((url.hostname, port), _CONNECT_SECONDS))

    thread = threading.Thread(target=connect, daemon=True)  # the name server may hang
    thread.start()
    thread.join(_CONNECT_SECONDS)
    if opened:
        opened[0].close()
        return ""
    os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries and processes that start later
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return constants.ENDPOINT


def load_config(model: str, settings: ModelSettings) -> Any:
    """The model's transformers config; raises as `config_of`."""
    return config_of(model, read_config(model, settings), settings)


def config_of(
    model: str,
    raw: dict[str, Any],
    settings: ModelSettings,
    converted: dict[str, Any] | None = None,
) -> Any:
    """The transformers config of a model, or of the `converted` config.json.

    Raises:
        SkipwiseError: custom code without trust_remote_code, a config that transformers rejects.
    """
    if converted is None:
        _check_code(raw, model, settings)
    from transformers import AutoConfig

    try:
        if converted is not None:
            config = AutoConfig.for_model(**converted)
        else:
            config = AutoConfig.from_pretrained(
                str(Path(model).expanduser()) if is_local(model) else model,
                revision=settings.revision,
                trust_remote_code=settings.trust_remote_code,
            )
    except Exception as error:  # transformers raises many types
        lines = str(error).split("\n")[1:2] if first_line(error).endswith(":") else []
        why = " ".join([first_line(error), *map(str.strip, lines)])
        if not isinstance(error, ImportError | OSError):  # those say what to do
            why = f"{why[:300]}\ncompare its config.json with the one that was published"
        raise SkipwiseError(f"{model} could not be read: {why}") from error
    return without_kernels(config)


def without_kernels(config: Any) -> Any:
    """The config without the kernels that config.json names: `load.` decides, and they are code."""
    config._attn_implementation = config._experts_implementation = None  # of sub-configs as well
    return config


def model_info_of(
    config: Any, original_length: int | None = None, raw: dict[str, Any] | None = None
) -> ModelInfo:
    """`read_model_info` of a transformers config.

    Args:
        raw: its config.json, if it is to be compared with what transformers made of it.

    Raises:
        SkipwiseError: as `read_model_info`; the installed transformers does not know a key.
    """
    info = read_model_info(to_dict(config), original_length)
    named = defaults().get(config.model_type, {}).get("keys", {})
    keys = [key for key in named if raw and key in raw]
    alone = read_model_info(complete(raw), original_length) if raw and keys else info
    if alone.rotary_dim != info.rotary_dim:
        from transformers import __version__

        raise SkipwiseError(
            f"transformers {__version__} rotates {info.rotary_dim} dimensions of a head, and "
            f"config.json says {alone.rotary_dim} ({', '.join(keys)}): the model would compute "
            "wrong positions\ninstall a newer transformers"
        )
    return info


def to_dict(config: Any) -> dict[str, Any]:
    """transformers' `to_dict()`, with the keys that a class keeps under a name of its own."""
    read = config.to_dict()
    for key in (*SHAPE, "max_position_embeddings", "head_dim", "layer_types"):
        with contextlib.suppress(RuntimeError):  # it differs between layers
            read[key] = getattr(config, key, None)
    return read


@explains_wrong_types
def complete(raw: dict[str, Any]) -> dict[str, Any]:
    """A config.json with its class's defaults, and with RoPE spelled as in transformers 5.

    Source: transformers 5, `RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`.

    Raises:
        SkipwiseError: the model has custom code, whose defaults are unknown.
    """
    family = raw.get("model_type", "unknown")
    known = defaults().get(family, {})
    if raw.get("auto_map") and not known:
        check_positions(raw)
        raise _own_code(f"this {family} model")
    keys = known.get("keys", {})  # what the class calls them; None if it ignores them
    read = {key: value for key, value in raw.items() if keys.get(key, key)}
    read |= {name: raw[key] for key, name in keys.items() if name and raw.get(key) is not None}
    config = {k: v for k, v in known.items() if k not in SHAPE} | read
    if "rotary_width" in read:  # minimax_m2's rotary_dim
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        read.setdefault("partial_rotary_factor", read["rotary_width"] / width)
    if "head_dim_ratio" in known and "head_dim" not in read:
        heads = config["num_attention_heads"]
        config["head_dim"] = known["head_dim_ratio"] * config["hidden_size"] // heads
    parameters = raw.get("rope_scaling") or raw.get("rope_parameters")  # the older key wins
    default = known.get("rope_parameters")
    if default is None and parameters is None and "rope_theta" not in raw:
        return config
    if default and isinstance(default.get("full_attention"), dict):
        config["rope_parameters"] = _per_layer_type(read, parameters or {}, default)
    else:
        config["rope_parameters"] = _rope_parameters(read, parameters or {}, default or {})
    if "layer_types" not in read:
        config["layer_types"] = _layer_types(config, known)
    return config


def _read_local_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if (folder / "adapter_config.json").exists() and not file.exists():
        raise SkipwiseError(
            f"{folder} is a LoRA adapter, which has no context window of its own\n"
            "merge it into its base model (peft: merge_and_unload), and give the merged model"
        )
    if not file.is_file():
        raise SkipwiseError(f"{folder} has no config.json: it is not a model folder")
    config = read_json(file)
    if not isinstance(config, dict):
        raise SkipwiseError(f"{file} is not a config: it must map keys to values")
    return config


def _check_values(config: Mapping[str, Any], inside: str = "config.json") -> None:
    """SkipwiseError for values that transformers passes over, computes from, or fails at."""
    for what, kind, low, high, keys in _KINDS:
        for key in keys:
            value: Any = config.get(key)
            per_layer = isinstance(value, list) and kind is int
            one: Any
            for one in value if per_layer else [value]:
                good = isinstance(one, kind) and not isinstance(one, bool)
                if good and kind not in (dict, list) and not low <= one <= high:
                    good = False
                    what = what if not one > high else f"at most {high:,}"
                if not good and one is not None:
                    given = f"{key} in {inside} is {json.dumps(one)[:40]}"
                    raise SkipwiseError(f"{given}: give {what}, or remove it")
    for key, value in config.items():
        if isinstance(value, dict) and (key in (*_OBJECTS, *_LAYER_TYPES) or "_config" in key):
            _check_values(value, key)
    if inside not in ("config.json", "text_config"):
        return
    family, layers = config.get("model_type"), config.get("layer_types")
    if not family:
        raise SkipwiseError(f'{inside} has no model_type: add it, such as "model_type": "llama"')
    if layers and len(layers) != config.get("num_hidden_layers", len(layers)):
        num = f"{config['num_hidden_layers']} num_hidden_layers and {len(layers)} layer_types"
        raise SkipwiseError(f"{inside} has {num}: give a layer type for each layer")
    heads, shared = (config.get(key) for key in _HEADS[:2])
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        num = f"{heads} num_attention_heads and {shared} num_key_value_heads"
        raise SkipwiseError(f"{inside} has {num}: the second must divide the first")
    default = defaults().get(family, {}).get("rope_parameters") or {}
    flat = default and "full_attention" not in default
    if "full_attention" in (config.get("rope_scaling") or (flat and config.get(_OBJECTS[0])) or {}):
        how = "takes one for all layers\nwrite one"
        if not flat:
            how = "takes those from rope_parameters alone\nrename rope_scaling to rope_parameters"
        raise SkipwiseError(f"RoPE settings in {inside} are per layer type, and {family} {how}")


def read_json(file: Path) -> Any:
    """The value in a JSON file of a model folder; SkipwiseError if there is none."""
    try:
        if file.stat().st_size > 1 << 28:
            raise ValueError("it is larger than 256 MiB")
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else error
        raise SkipwiseError(f"{file} is not JSON: {why}\nfix or remove it") from error


def stays_inside(file: Path, model: Path | None = None) -> bool:
    """Whether a file is no link out of its folder, or one of the Hub's cache into its blobs."""
    folder, target = (model or file.parent).resolve(), file.resolve()
    cache = folder.parent.parent if folder.parent.name == "snapshots" else folder
    return target.is_relative_to(folder) or target.is_relative_to(cache / "blobs")


def shard_names(index: Path) -> set[str]:
    """The weight files of an index; SkipwiseError if one is outside of its folder."""
    found = read_json(index)
    listed = found.get("weight_map") if isinstance(found, dict) else None
    names: list[Any] = list(listed.values()) if isinstance(listed, dict) else [None]
    for name in names:
        if not isinstance(name, str) or os.path.isabs(name) or ".." in Path(name).parts:
            raise SkipwiseError(
                f"{index}: weight_map lists {str(name)[:80]!r}, which is no file of that folder\n"
                "give a model folder with a valid index"
            )
    return set(names)


def check_inside(folder: Path) -> None:
    """Refuse a model folder that leads to other files of this machine.

    Weights may be links: only tensors are read from them. Text would end up in the export.
    """
    for index in folder.glob("*.index.json"):
        shard_names(index)
    for file in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise SkipwiseError(f"{file} is not a regular file\nremove it from the model folder")
        if file.suffix in _COPIED and not stays_inside(file, folder):
            raise SkipwiseError(
                f"{file} is a link out of its folder, and its text would be exported\n"
                "copy the file there if it belongs to the model, or remove the link"
            )


def _check_code(raw: dict[str, Any], model: str, settings: ModelSettings) -> None:
    family = raw.get("model_type")
    if not raw.get("auto_map") or settings.trust_remote_code or family in defaults():
        return
    from transformers import CONFIG_MAPPING

    if family not in CONFIG_MAPPING:
        raise _own_code(f"{model} ({raw.get('model_type', 'no model_type')})")


def _own_code(what: str) -> SkipwiseError:
    return SkipwiseError(
        f"{what} brings its own code, which does not run without your permission\n"
        "read it, and type load.trust_remote_code=true if you trust it"
    )


def _rope_parameters(
    raw: dict[str, Any], parameters: dict[str, Any], default: dict[str, Any]
) -> dict[str, Any]:
    """One layer type's rope_parameters, as transformers 5 spells them."""
    out = {**parameters}
    name = out.pop("type", None)
    out.setdefault("rope_type", name or default.get("rope_type", "default"))
    if out["rope_type"] == "su":  # longrope's first name
        out["rope_type"] = "longrope"
    if not parameters:  # the class's own scaling, as for Llama-3.1
        out = {**{k: v for k, v in default.items() if k != "partial_rotary_factor"}, **out}
    if parameters.get("rope_theta") is None:
        theta = raw.get("rope_theta")
        out["rope_theta"] = default.get("rope_theta", 10000.0) if theta is None else theta
    share = raw.get("partial_rotary_factor")
    share = default.get("partial_rotary_factor") if share is None else share
    if share is not None:
        out.setdefault("partial_rotary_factor", share)
    if "original_max_position_embeddings" in raw and out["rope_type"] == "longrope":
        out.setdefault("original_max_position_embeddings", raw["original_max_position_embeddings"])
    return out


def _per_layer_type(
    raw: dict[str, Any], parameters: dict[str, Any], default: dict[str, Any]
) -> dict[str, Any]:
    """rope_parameters by layer type, from that form or from the older keys."""
    if any(key in default for key in parameters):
        filled = {key: parameters.get(key) or value for key, value in default.items()}
        for key, older in zip(_LAYER_TYPES, ("rope_theta", "rope_local_base_freq"), strict=True):
            given = {k: v for k, v in (parameters.get(key) or {}).items() if v is not None}
            theta = raw.get(older) or (default.get(key) or {}).get("rope_theta", 10000.0)
            filled |= {key: {"rope_theta": theta, **given}} if given else {}
        return filled
    out = {key: dict(value) for key, value in default.items()}
    out["full_attention"] = _rope_parameters(raw, parameters, default["full_attention"])
    if "rope_local_base_freq" in raw:
        out["sliding_attention"]["rope_theta"] = raw["rope_local_base_freq"]
    elif "rope_theta" in raw and len({v["rope_theta"] for v in default.values()}) == 1:
        out["sliding_attention"]["rope_theta"] = raw["rope_theta"]  # olmo3: one theta
    return out


def _layer_types(config: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """The layer types that occur, if config.json does not list them by layer."""
    types = set(known.get("layer_types", []))
    if "full_layers" in config:  # the numbers of those with attention; others are recurrent
        full = set(config["full_layers"])
        types = {"full_attention"} if full else set()
        types |= set() if len(full) == config.get("num_hidden_layers") else {"recurrent"}
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        types -= {"sliding_attention"}
    elif config.get("use_sliding_window") and "max_window_layers" in config:  # Qwen2
        full, layers = config["max_window_layers"], config.get("num_hidden_layers", 0)
        types = {"full_attention"} if full >= layers else {"sliding_attention"}
        types |= {"full_attention"} if full > 0 else set()
    return sorted(types)
