"""PoSE in Axolotl, as a plugin: `plugins: [skipwise.integrations.axolotl.SkipwisePlugin]`.

The `skipwise:` section of Axolotl's YAML takes the keys of a recipe that say what is extended and
how: `target_length`, `train_length`, `original_length`, `method`, `rope`, `positions`. The model is
loaded into the scaled config, batches come from `PoSECollator`, the preflight runs before the first
step, the saved folder is made portable. Evaluation keeps Axolotl's collator and plain positions.

Source: axolotl 0.19.0, `integrations/base.py` (the hooks), `loaders/utils.py` (`model_config:`),
`core/builders/causal.py` (how a collator and callbacks are asked for)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel

from skipwise.config.parse import parse_recipe
from skipwise.config.samplers import make_sampler
from skipwise.errors import SkipwiseError
from skipwise.integrations.collator import PoSECollator
from skipwise.integrations.preflight_callback import PreflightCallback, finalize_checkpoint
from skipwise.models.prepared import PreparedModel, prepare_model

_KEYS = (
    "target_length",
    "train_length",
    "original_length",
    "method",
    "rope",
    "positions",
    "seed",
)
_REFUSED = {  # keys of Axolotl that make positions of their own
    "sample_packing": "packs records into a row, each at positions of its own",
    "batch_flattening": "flattens a batch into a row, each record at positions of its own",
    "use_pose": "is Axolotl's own PoSE",
}


class SkipwiseArgs(BaseModel):
    """What the plugin adds to Axolotl's YAML."""

    skipwise: dict[str, Any] | None = None


class SkipwisePlugin(BasePlugin):
    """Axolotl's hooks, in the order in which it calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared: PreparedModel | None = None
        self.collator: PoSECollator | None = None

    def get_input_args(self) -> str:
        return f"{__name__}.SkipwiseArgs"

    def register(self, cfg: Any) -> None:
        """Write the scaled RoPE into the YAML as read, from which Axolotl makes the config.

        Raises:
            SkipwiseError: settings that do not fit PoSE, a model that cannot be extended so.
        """
        section = dict(cfg.get("skipwise") or {})
        if "target_length" not in section:
            raise SkipwiseError(
                "the YAML has Skipwise's plugin, and no target\n"
                "write skipwise: {target_length: 32768}"
            )
        unknown = [key for key in section if key not in _KEYS]
        if unknown:
            raise SkipwiseError(
                f"skipwise.{unknown[0]} is set by Axolotl, or unknown\n"
                f"the section takes {', '.join(_KEYS)}"
            )
        for key, what in _REFUSED.items():
            if cfg.get(key):
                raise SkipwiseError(f"{key} {what}\nset {key}: false")
        load = {
            "revision": cfg.get("revision_of_model") or None,
            "trust_remote_code": bool(cfg.get("trust_remote_code")),
        }
        seed = {"seed": cfg["seed"]} if cfg.get("seed") is not None else {}
        positions = {
            "key_weights": "none",
            **(section.get("positions") or {}),
        }  # its attention: any
        tree = {**seed, **section, "positions": positions}
        tree |= {"model": cfg["base_model"], "load": load}
        prepared = prepare_model(parse_recipe(tree))
        if prepared.conversion is not None:
            raise SkipwiseError(
                f"{cfg['base_model']} has to be converted before it can be rescaled\n"
                "type skipwise extend for it; Axolotl loads it as it is"
            )
        before, after = prepared.config.to_dict(), prepared.scaled.to_dict()
        changes = {k: v for k, v in after.items() if before.get(k) != v}
        name = "overrides_of_model_config" if cfg.get("overrides_of_model_config") else None
        given = dict(cfg.get(name or "model_config") or {})
        for key in ("rope_scaling", "rope_theta", *changes):
            if key in given and given[key] != changes.get(key):
                raise SkipwiseError(
                    f"model_config.{key} is set by the skipwise section\nleave it out"
                )
        cfg[name or "model_config"] = {**given, **changes}
        sampler = make_sampler(prepared.recipe, prepared.info.original_length)
        if cfg.get("sequence_len") is None:
            cfg["sequence_len"] = prepared.recipe.target_length
        if cfg["sequence_len"] < sampler.train_length:
            raise SkipwiseError(
                f"sequence_len {cfg['sequence_len']:,} cuts the records below train_length "
                f"{sampler.train_length:,}\nleave it out: it becomes the target length"
            )
        self.prepared = prepared

    def post_model_load(self, cfg: Any, model: Any) -> None:
        assert self.prepared is not None
        recipe = self.prepared.recipe
        self.collator = PoSECollator(
            make_sampler(recipe, self.prepared.info.original_length),
            seed=recipe.seed,
            key_weights=recipe.positions.key_weights,  # pyright: ignore[reportArgumentType]
            config=model.config,
        )

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False) -> Any:
        """A maker of the collator, which Axolotl calls with its tokenizer and its padding."""
        return None if is_eval else (lambda *args, **kwargs: self.collator, {})

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        assert self.prepared is not None and self.collator is not None
        return [PreflightCallback(self.collator, info=self.prepared.info)]

    def post_train(self, cfg: Any, model: Any) -> None:
        """Finish the folder; Axolotl calls this once before it saves the weights, once after."""
        assert self.prepared is not None
        folder, target = Path(cfg["output_dir"]), self.prepared.recipe.target_length
        if int(cfg.get("local_rank") or 0) != 0 or not any(folder.glob("*.safetensors")):
            return
        if hasattr(model, "peft_config"):
            print(
                f"{folder} holds an adapter, which does not carry the rescaled positions: merge it "
                "(axolotl merge-lora with merge_method: legacy), then "
                f"skipwise.finalize_checkpoint('{folder / 'merged'}', {target})",
                flush=True,
            )
        else:
            finalize_checkpoint(folder, target)
