"""The adapter to lm-evaluation-harness: wraps a model for it and stops it from running remote code.

Everything here depends on internals of lm_eval 0.4.13. `benchmarks` uses its public API.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from skipwise.errors import SkipwiseError, first_line, install
from skipwise.evaluation import processes


def wrap(
    model: Any, tokenizer: Any, batch_size: int, max_length: int | None, at_least: int = 0
) -> Any:
    """A loaded model as the harness's `HFLM`, which also counts truncated prompts.

    Args:
        max_length: tokens that it reads at most. Defaults to the window of its config.
        at_least: tokens that it reads even so.
    """
    from lm_eval.models import huggingface

    base: Any = huggingface.HFLM

    class Model(base):
        num_truncated = 0

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            room = self.max_length + 1  # the last token is predicted, not read
            self.num_truncated += sum(len(start) + len(end) > room for _, start, end in requests)
            longest = max((len(end) for *_, end in requests), default=0)
            if longest > self.max_length:
                why = f"an answer of {longest} tokens does not fit into {self.max_length}"
                raise SkipwiseError(f"{why}\nleave this benchmark out, or give a longer window")
            quiet = disable_tqdm or not sys.stderr.isatty()
            score = super()._loglikelihood_tokens
            indices = range(len(requests))
            return processes.shared(requests, lambda own: score(own, quiet, override_bs), indices)

        def generate_until(self, requests, disable_tqdm=False):
            generate = super().generate_until
            indices = range(len(requests))
            return processes.shared(requests, lambda own: generate(own, disable_tqdm), indices)

        def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, **other):
            if left_truncate_len:
                lengths = [len(self.tok_encode(string)) for string in strings]
                self.num_truncated += sum(length > left_truncate_len for length in lengths)
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, **other)

        def _model_call(self, inps, attn_mask=None, labels=None):
            with torch.no_grad():
                return self.model(inps, use_cache=False).logits  # a KV cache would only use memory

    lm = Model(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # lm-eval adds a padding token
        backend="causal",
        batch_size=batch_size,
        max_length=max_length,
        # lm-eval sums log-probabilities in their own dtype: bfloat16 rounds -80 to 0.5
        softmax_dtype="float32",
    )
    lm._max_length = max(lm.max_length, at_least)
    return lm


def with_metadata(manager: Any, metadata: dict[str, Any] | None) -> Any:
    """The harness's TaskManager with metadata for its tasks; a new one would read all names."""
    from lm_eval.tasks._factory import TaskFactory

    changed = copy.copy(manager)
    changed._factory = TaskFactory(meta={**(manager.metadata or {}), **(metadata or {})})
    return changed


@contextlib.contextmanager
def guarded(model: Any = None) -> Iterator[list[str]]:
    """Block scripts and templates that run code, send stdout to stderr, restore all state at exit.

    Yields:
        names of the metric scripts that were requested and refused.
    """
    try:
        import evaluate
        import lm_eval.utils
    except ImportError as error:
        raise SkipwiseError(
            f"benchmarks need lm-eval ({first_line(error)}): {install('bench')}"
        ) from error
    from jinja2.sandbox import SandboxedEnvironment

    # otherwise a metric that is not a mean forks one process per CPU, each with the CUDA context
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    refused: list[str] = []

    def refuse(path: str, *_: Any, **__: Any) -> None:
        refused.append(path)
        raise SkipwiseError(script_refusal(path))

    before = lm_eval.utils.env
    sandbox = SandboxedEnvironment(undefined=before.undefined, keep_trailing_newline=True)
    sandbox.filters.update(before.filters)
    modes = [(m, m.training) for m in model.modules()] if model is not None else []
    states = random.getstate(), np.random.get_state()
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(sys.stderr),
            torch.random.fork_rng(cuda),
            _patched(evaluate, "load", refuse),  # it runs scripts from the hub
            _patched(lm_eval.utils, "env", sandbox),  # lm-eval templates can run Python
        ):
            yield refused
    finally:
        log.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def script_refusal(metric: str) -> str:
    return f"the metric {metric} is a hub script, and scripts are not run: use another task"
