"""The transformers Trainer with sequential data, PoSE's attention masks, and safe checkpoints.

It reads the data set in order of the example numbers. So the examples of a step depend neither on
the number of processes nor on where a run was resumed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer

from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError
from skipwise.models.attention.masks import (
    FLEX,
    pack_key_weights,
    with_chunk_weights,
    with_layer_masks,
)
from skipwise.training.checkpoints import check_disk_space, checkpoint_bytes, complete_checkpoints


class PoSETrainer(Trainer):
    """The Trainer, reading the data set in order of the example numbers."""

    base_config: Any = None  # config of the model, without peft or other wrappers
    run_folder: RunFolder

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        dataset: Any = train_dataset or self.train_dataset
        return SequentialSampler(dataset)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        if self.base_config._attn_implementation == FLEX:
            inputs = pack_key_weights(inputs)  # before DeepSpeed casts them to bf16
        inputs = with_chunk_weights(super()._prepare_inputs(inputs), dtype)
        return with_layer_masks(self.base_config, inputs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Hide config.json: the Trainer would read it as a generic config and fail on its keys."""
        with tempfile.TemporaryDirectory() as view:
            for file in Path(resume_from_checkpoint).resolve().iterdir():
                if file.name != "config.json":
                    (Path(view) / file.name).symlink_to(file)
            super()._load_from_checkpoint(view, model)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self.run_folder.recipe_file.exists():
            raise SkipwiseError(
                f"{self.run_folder.path} was removed during training: cannot save a checkpoint"
            )
        last = next(reversed(complete_checkpoints(self.run_folder)), None)
        check_disk_space(self.run_folder, checkpoint_bytes(self.model, self.optimizer, last))
        super()._save_checkpoint(model, trial)
