"""PoSE in Axolotl, as a plugin: `plugins: [skipwise.integrations.axolotl.SkipwisePlugin]`.

The `skipwise:` section of Axolotl's YAML takes the recipe keys that say what is extended and how:
`target_length`, `train_length`, `original_length`, `method`, `rope`, `positions`. The model is
loaded with the scaled config, batches come from `PoSECollator`, the preflight runs before the first
step, and the saved folder is made portable. Evaluation uses Axolotl's collator and plain positions.

Source: axolotl 0.19.0, `integrations/base.py` (the hooks), `loaders/utils.py` (`model_config:`),
`core/builders/causal.py` (how it gets a collator and callbacks)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel

from skipwise.config.parse import parse_recipe
from skipwise.errors import SkipwiseError
from skipwise.integrations.collator import PoSECollator
from skipwise.integrations.preflight_callback import PreflightCallback, finalize_checkpoint
from skipwise.models.prepared import PreparedModel, prepare_model

_KEYS = ("target_length", "train_length", "original_length", "method", "rope", "positions", "seed")
_REFUSED = {  # Axolotl keys that set positions of their own
    "sample_packing": "packs records into a row, each with its own positions",
    "batch_flattening": "flattens a batch into a row, each record with its own positions",
    "use_pose": "is Axolotl's own PoSE",
}


class SkipwiseArgs(BaseModel):
    """The plugin's section in Axolotl's YAML."""

    skipwise: dict[str, Any] | None = None


class SkipwisePlugin(BasePlugin):
    """Axolotl's hooks, in the order of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared: PreparedModel | None = None
        self.collator: PoSECollator | None = None

    def get_input_args(self) -> str:
        return f"{__name__}.SkipwiseArgs"

    def register(self, cfg: Any) -> None:
        """Write the scaled RoPE into the parsed YAML, from which Axolotl makes the config.

        Raises:
            SkipwiseError: settings that do not fit PoSE, or a model that cannot be extended.
        """
        section = dict(cfg.get("skipwise") or {})
        if "target_length" not in section:
            fix = "write skipwise: {target_length: 32768}"
            raise SkipwiseError(f"the YAML has Skipwise's plugin, but no target length\n{fix}")
        unknown = [key for key in section if key not in _KEYS]
        if unknown:
            fix = f"the section takes {', '.join(_KEYS)}"
            raise SkipwiseError(f"skipwise.{unknown[0]} is set by Axolotl, or unknown\n{fix}")
        for key, what in _REFUSED.items():
            if cfg.get(key):
                raise SkipwiseError(f"{key} {what}\nset {key}: false")
        load = {
            "revision": cfg.get("revision_of_model") or None,
            "trust_remote_code": bool(cfg.get("trust_remote_code")),
        }
        seed = {"seed": cfg["seed"]} if cfg.get("seed") is not None else {}
        # key weights need an attention that takes a mask, and Axolotl may use any
        positions = {"key_weights": "none", **(section.get("positions") or {})}
        tree = {**seed, **section, "positions": positions}
        tree |= {"model": cfg["base_model"], "load": load}
        if section.get("train_length") == "auto":
            fix = "write a length such as train_length: 8192"
            raise SkipwiseError(f"train_length: auto is chosen by skipwise extend\n{fix}")
        prepared = prepare_model(parse_recipe(tree))
        if prepared.conversion is not None:
            raise SkipwiseError(
                f"{cfg['base_model']} must be converted before it can be rescaled, and Axolotl "
                "loads it unconverted\ntype skipwise extend for it"
            )
        before, after = prepared.config.to_dict(), prepared.scaled.to_dict()
        changes = {k: v for k, v in after.items() if before.get(k) != v}
        name = "overrides_of_model_config" if cfg.get("overrides_of_model_config") else None
        given = dict(cfg.get(name or "model_config") or {})
        for key in ("rope_scaling", "rope_theta", *changes):
            if key in given and given[key] != changes.get(key):
                fix = "leave it out"
                raise SkipwiseError(f"model_config.{key} is set by the skipwise section\n{fix}")
        cfg[name or "model_config"] = {**given, **changes}
        sampler = prepared.sampler()
        if cfg.get("sequence_len") is None:
            cfg["sequence_len"] = prepared.recipe.target_length
        if cfg["sequence_len"] < sampler.train_length:
            raise SkipwiseError(
                f"sequence_len {cfg['sequence_len']:,} cuts records shorter than train_length "
                f"{sampler.train_length:,}\nleave it out: it becomes the target length"
            )
        self.prepared = prepared

    def post_model_load(self, cfg: Any, model: Any) -> None:
        assert self.prepared is not None
        recipe = self.prepared.recipe
        self.collator = PoSECollator(
            self.prepared.sampler(),
            seed=recipe.seed,
            key_weights=recipe.positions.key_weights,  # pyright: ignore[reportArgumentType]
            config=model.config,
        )

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False) -> Any:
        """A function that Axolotl calls with its tokenizer and padding to make the collator."""
        return None if is_eval else (lambda *args, **kwargs: self.collator, {})

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        assert self.prepared is not None and self.collator is not None
        return [PreflightCallback(self.collator, info=self.prepared.info)]

    def post_train(self, cfg: Any, model: Any) -> None:
        """Make the folder portable. Axolotl calls this before it saves the weights, and after."""
        assert self.prepared is not None
        folder, target = Path(cfg["output_dir"]), self.prepared.recipe.target_length
        if int(cfg.get("local_rank") or 0) != 0 or not any(folder.glob("*.safetensors")):
            return
        if hasattr(model, "peft_config"):
            print(
                f"{folder} has an adapter, which does not contain the rescaled RoPE: merge it "
                "(axolotl merge-lora with merge_method: legacy), then "
                f"skipwise.finalize_checkpoint('{folder / 'merged'}', {target})",
                flush=True,
            )
        else:
            finalize_checkpoint(folder, target)
