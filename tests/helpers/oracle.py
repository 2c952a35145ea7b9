"""A model that knows the answers, to hold the tasks against: it must score everything."""

from __future__ import annotations

import types

import numpy as np
import torch
from transformers import LlamaConfig

from skipwise.evaluation.prefill import reading
from skipwise.evaluation.scoring import Trial
from skipwise.evaluation.tasks.prompts import token_ids

MUTE = 5  # the token of a model that has nothing to say


class Oracle(torch.nn.Module):
    """Says what follows each text it was told, token by token, and MUTE after any other.

    It reads what it was given through the cache it is handed, as a real model does: tokens are its
    keys. So a prefix that is lost, doubled or mixed up between rows costs it the answer.
    """

    def __init__(self, vocab_size: int = 1024) -> None:
        super().__init__()
        self.config = LlamaConfig(
            vocab_size=vocab_size, num_hidden_layers=1, hidden_size=8, num_attention_heads=1
        )
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.next: dict[bytes, int] = {}
        self.num_tokens = 0
        reading(self)  # tried now, so that it is not counted
        self.num_tokens = 0  # that went through it

    def tell(self, whole: list[int], num_prompt: int) -> None:
        for end in range(num_prompt, len(whole)):
            self.next[np.array(whole[:end]).tobytes()] = whole[end]

    def tell_trials(self, tokenizer, trials: list[Trial], spoken=lambda t: " ".join(t.answers)):
        for trial in trials:
            if trial.num_answer:
                self.tell(trial.input_ids, len(trial.prompt))
                continue
            answer = token_ids(tokenizer, " " + spoken(trial))
            self.tell([*trial.input_ids, *answer], len(trial.input_ids))

    def forward(
        self,
        input_ids,
        position_ids,
        attention_mask,
        past_key_values=None,
        use_cache=False,
        logits_to_keep=0,
    ):
        self.num_tokens += input_ids.numel()
        seen = input_ids
        before = 0
        if past_key_values is not None:
            before = past_key_values.get_seq_length()
            keys = input_ids[:, None, :, None].float()
            seen = past_key_values.update(keys, keys, 0)[0][:, 0, :, 0].long()
        assert attention_mask.shape == seen.shape
        asked = torch.arange(input_ids.shape[1])[
            logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else slice(None)
        ]
        said = torch.zeros(len(input_ids), len(asked), self.config.vocab_size)
        for row, (tokens, mask) in enumerate(zip(seen, attention_mask.bool(), strict=True)):
            for column, at in enumerate(asked.tolist()):
                end = before + at + 1
                text = tokens[:end][mask[:end]]
                assert int(position_ids[row, at]) <= len(text) - 1  # less: an ended row waits
                said[row, column, self.next.get(text.numpy().tobytes(), MUTE)] = 1.0
        return types.SimpleNamespace(logits=said)
