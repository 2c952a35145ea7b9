"""The training loops of real_size.py: a base model from scratch, and its extension.

Plain PyTorch on the library's own samplers, data set and collator; float32 weights under bf16
autocast, fused AdamW. The decoder layers are compiled one by one: what is around them (masks,
loss) stays eager: in a fully compiled model transformers makes masks that leave the flash kernel.

Shapes:  R = rows a pass, L = tokens of a row
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from skipwise.config.recipe import Recipe
from skipwise.config.samplers import make_sampler
from skipwise.data.collator import ExampleCollator
from skipwise.data.corpus import build_corpus
from skipwise.data.dataset import PoSEDataset
from skipwise.data.token_cache import TokenStore
from skipwise.models.attention.masks import with_chunk_weights

PASS_TOKENS = 32768  # R x L: float32 logits of 16k take 2 GiB
BETAS = (0.9, 0.95)
_LOG_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    length: int  # L
    seconds: float
    step_tokens: int
    learning_rate: float
    warmup_steps: int
    prompt_share: float


def make_model(
    config: Any,
    device: torch.device,
    *,
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Random weights on the device.

    Made in their dtype, for `model.to(bfloat16)` would round `inv_freq` as well.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    model.config.use_cache = False
    if compiled:
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled stays eager
        torch._dynamo.config.recompile_limit = 64  # kinds of mask, lengths; layers if need be
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    return model.to(device).train()


def pretrain(
    model: Any, tokens: np.ndarray, prompts: np.ndarray, settings: Pretraining
) -> dict[str, Any]:
    """Train on windows of the tokens and on prompts, for as long as it may take.

    The learning rate falls to 0 with the time, not the steps. The clock starts after the first
    step, which compiles.
    """
    L, device = settings.length, model.device
    rows = max(1, min(PASS_TOKENS, settings.step_tokens) // L)
    passes = max(1, settings.step_tokens // (rows * L))
    num_prompts = round(rows * settings.prompt_share)
    stream = torch.from_numpy(tokens.astype(np.int32)).to(device)
    asked = torch.from_numpy(prompts.astype(np.int32)).to(device)
    window = torch.arange(L, device=device)
    generator = torch.Generator(device).manual_seed(0)
    optimizer = _optimizer(model, settings.learning_rate, weight_decay=0.1)
    begun = started = time.monotonic()
    step, logged, losses = 0, 0, []
    while step < 2 or time.monotonic() - started < settings.seconds:
        progress = (time.monotonic() - started) / settings.seconds if step > 1 else 0.0
        share = min((step + 1) / settings.warmup_steps, max(0.0, 1 - progress))
        total = torch.zeros((), device=device)
        for _ in range(passes):
            starts = torch.randint(
                len(stream) - L, (rows - num_prompts, 1), device=device, generator=generator
            )
            picked = torch.randint(len(asked), (num_prompts,), device=device, generator=generator)
            ids = torch.cat([stream[starts + window], asked[picked]]).long()
            batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
            total += _backward(model, batch, passes)
        _update(model, optimizer, settings.learning_rate * share)
        step += 1
        if step == 1:
            total.item()
            started = time.monotonic()
        if step % _LOG_EVERY == 0 or step <= 4:
            losses.append((step, round(total.item(), 4)))
            rate = (step - 1) * rows * passes * L / (time.monotonic() - started)
            if step >= 2 * logged:
                logged = step
                print(
                    f"  step {step}: loss {losses[-1][1]}, {rate:,.0f} tokens a second", flush=True
                )
    final = total.item()
    seconds = time.monotonic() - started
    return {
        "steps": step,
        "tokens": step * rows * passes * L,
        "epochs": round(step * passes * (rows - num_prompts) * L / len(tokens), 2),
        "prompt_rows": step * passes * num_prompts,
        "seconds": round(seconds, 1),
        "first_step_seconds": round(started - begun, 1),
        "tokens_per_second": round((step - 1) * rows * passes * L / seconds),
        "final_loss": round(final, 4),
        "losses": losses,
    }


def extend(
    model: Any,
    recipe: Recipe,
    original_length: int,
    stores: list[TokenStore],
    prompt_share: float,
    teacher: Any = None,
) -> dict[str, Any]:
    """Train the model at the recipe's positions, for the recipe's steps.

    Args:
        stores: the text; passkey prompts of the training length.
        teacher: the base model, for self-distillation on the first chunks.
    """
    sampler, settings = make_sampler(recipe, original_length), recipe.training
    L, device = sampler.train_length, model.device
    corpus = build_corpus(
        stores,
        [1 - prompt_share, prompt_share],
        min_length=L,
        target_length=recipe.target_length,
    )
    batch_size = settings.global_batch_size
    rows = max(1, min(PASS_TOKENS // L, batch_size))
    dataset = PoSEDataset(
        corpus, sampler, seed=recipe.seed, num_examples=settings.num_steps * batch_size
    )
    collate = ExampleCollator(recipe.positions.key_weights)
    optimizer = _optimizer(model, settings.learning_rate, settings.weight_decay)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    begun = started = time.monotonic()
    losses: list[torch.Tensor] = []
    for step in range(settings.num_steps):
        share = min((step + 1) / settings.warmup_steps, 1 - step / settings.num_steps)
        total = torch.zeros((), device=device)
        examples = range(step * batch_size, (step + 1) * batch_size)
        parts = [examples[i : i + rows] for i in range(0, batch_size, rows)]
        for part in parts:
            items = [dataset[k] for k in part]
            batch = {key: value.to(device) for key, value in collate(items).items()}
            lesson = None
            if teacher is not None:
                first = np.stack([item["example"].chunk_ids() == 0 for item in items])
                lesson = (teacher, torch.from_numpy(first).to(device), recipe.distillation.weight)
            total += _backward(model, with_chunk_weights(batch, dtype), len(parts), lesson)
        _update(model, optimizer, settings.learning_rate * share)
        losses.append(total)
        if step == 0:
            total.item()
            started = time.monotonic()
    values = torch.stack(losses).tolist()
    seconds = time.monotonic() - started
    num_tokens = settings.num_steps * batch_size * L
    assert np.isfinite(values).all(), "the loss is not finite"
    return {
        "train_length": L,
        "steps": settings.num_steps,
        "tokens": num_tokens,
        "documents": corpus.num_documents,
        "seconds": round(seconds, 1),
        "first_step_seconds": round(started - begun, 1),
        "tokens_per_second": round(num_tokens * (1 - 1 / settings.num_steps) / seconds),
        "loss": [
            round(float(np.mean(part)), 4) for part in np.array_split(values, min(10, len(values)))
        ],
    }


def _backward(
    model: Any,
    batch: dict[str, Any],
    passes: int,
    lesson: tuple[Any, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """One pass; returns its share of the step's loss.

    Args:
        lesson: the teacher, (R, L) whether a token is taught, and the weight of its KL divergence.
    """
    kind = model.device.type
    with torch.autocast(kind, torch.bfloat16, kind == "cuda"):
        out = model(**batch, use_cache=False)
        loss = out.loss
        if lesson is not None:
            teacher, first, weight = lesson
            with torch.no_grad():
                wanted = teacher(input_ids=batch["input_ids"], use_cache=False).logits[first]
                wanted = wanted.float().log_softmax(-1)
            mine = out.logits[first].float().log_softmax(-1)
            apart = kl_div(mine, wanted, log_target=True, reduction="sum")
            loss = loss + weight * apart / first.numel()
    (loss / passes).backward()
    return loss.detach() / passes


def _update(model: Any, optimizer: Any, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _optimizer(model: Any, learning_rate: float, weight_decay: float) -> Any:
    return torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=BETAS, weight_decay=weight_decay, fused=True
    )
