"""One training of the study: the library's samplers and masks in a plain PyTorch loop.

Not the Trainer of `skipwise train`, of which a step of so small a model is mostly overhead: here a
step is one CUDA graph where there is a GPU. The learning rate is that of the next step over there,
and self-distillation is weighted by the mean over taught tokens, not by their number.

Shapes:  B = batch, L = tokens of an example
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from samplers import VariantDataset
from settings import BATCH, L, Setting
from text import Text
from torch.nn.functional import cross_entropy, kl_div

from skipwise.config.parse import parse_recipe
from skipwise.config.recipe import LoRASettings, ModelSettings
from skipwise.config.samplers import make_sampler
from skipwise.data.collator import ExampleCollator
from skipwise.data.corpus import build_corpus
from skipwise.data.dataset import PoSEDataset
from skipwise.data.token_cache import TokenStore
from skipwise.models.attention.masks import with_chunk_weights
from skipwise.models.load import best_device, compute_dtype, load_model
from skipwise.models.prepared import prepare_model
from skipwise.pipeline.quickstart import MODEL
from skipwise.pose.samplers import Example, FullLength, Sampler

DTYPE = compute_dtype(ModelSettings())  # of the arithmetic; weights stay float32


def trained(
    setting: Setting, text: Text, each: Callable[[int, Any], None] | None = None
) -> tuple[Any, list[float]]:
    """The model after training, and the loss of every step.

    Args:
        each: is called with the number of steps done and the model, at a tenth of them each.
    """
    torch.manual_seed(setting.seed)
    model = load_base(setting)
    if setting.method == "none":
        return model, []
    if setting.lora_rank:
        from skipwise.models.lora import add_lora

        model = add_lora(model, LoRASettings(rank=setting.lora_rank, alpha=2 * setting.lora_rank))
    losses = []
    finish = round(setting.steps * setting.finish)
    sampler, full = _sampler(setting), FullLength(target_length=setting.target)
    last = dataclasses.replace(setting, end=0.0, learning_rate=setting.finish_learning_rate)
    if not setting.finish_distil:
        last = dataclasses.replace(last, distil=0.0)
    if finish and setting.finish_at != "end":
        losses += _phase(model, setting, text, sampler, setting.steps, each, among=(full, last))
    else:
        if setting.steps > finish:
            losses += _phase(model, setting, text, sampler, setting.steps - finish, each)
        if finish:
            losses += _phase(model, last, text, full, finish)
    if setting.lora_rank:
        model = model.merge_and_unload()
    return model, losses


def load_base(setting: Setting, target: int | None = None) -> Any:
    """The quickstart's base in float32 with the setting's RoPE."""
    target = target or setting.target
    rope: dict[str, Any] = {"type": setting.rope}
    if setting.rope_stretch != 1.0:
        rope["factor"] = setting.rope_stretch * target / L
    if setting.beta_fast:
        rope["options"] = {"beta_fast": setting.beta_fast}
    tree = {"model": str(MODEL), "target_length": target, "rope": rope}
    prepared = prepare_model(parse_recipe(tree))
    config = copy.deepcopy(prepared.config if setting.rope_off else prepared.scaled)
    model = load_model(str(MODEL), config, prepared.load, dtype=torch.float32)
    return model.to(best_device())


def _sampler(setting: Setting) -> Sampler:
    tree: dict[str, Any] = {
        "model": "-",
        "target_length": setting.target,
        "method": setting.method,
        **({"train_length": setting.train_length} if setting.train_length else {}),
    }
    if setting.method == "pose":
        keys = {"cut": "chunk_lengths", "gaps": "skips", "plain_fraction": "unskipped_fraction"}
        names = ("num_chunks", "cut", "gaps", "content", "plain_fraction")
        tree["positions"] = {keys.get(name, name): getattr(setting, name) for name in names}
    return make_sampler(parse_recipe(tree), L)


def _corpus(text: Text, sampler: Sampler, count: int, seed: int) -> Any:
    """Source and passkey prompts, three to one in tokens."""
    length = sampler.train_length
    passkeys = text.long_passkeys(length, count // 4 + 8, seed) if length != L else None
    stores: list[TokenStore] = [text.source, passkeys or text.passkeys]
    return build_corpus(
        stores, [3, 1], min_length=sampler.train_length, target_length=sampler.target_length
    )


def _phase(
    model: Any,
    setting: Setting,
    text: Text,
    sampler: Sampler,
    steps: int,
    each: Callable[[int, Any], None] | None = None,
    among: tuple[Sampler, Setting] | None = None,
) -> list[float]:
    """Train on `steps` x BATCH x L tokens, whatever the length of an example.

    Args:
        among: a sampler and its setting that make some of the steps: see `is_full`.
    """
    device = best_device()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate = torch.tensor(setting.learning_rate, device=device)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=rate if device.type == "cuda" else setting.learning_rate,
        betas=(0.9, setting.beta2),
        weight_decay=0.0,
        capturable=device.type == "cuda",
    )
    model.train()
    batch = max(1, min(BATCH, BATCH * L // sampler.train_length))
    if setting.full_batch and sampler.train_length > L:
        batch = setting.full_batch
    num_steps = max(1, round(steps * BATCH * L / (batch * sampler.train_length)))
    run = _stepper(model, optimizer, setting, text, sampler, num_steps, batch)
    run_among = run
    if among is not None:
        few = max(1, BATCH * L // among[0].train_length)
        run_among = _stepper(model, optimizer, among[1], text, among[0], num_steps, few)

    def rate_at(k: int) -> float:
        rising = min(1.0, (k + 1) / max(1, setting.warmup))
        left = 1 - k / num_steps
        return setting.learning_rate * min(rising, setting.end + (1 - setting.end) * left)

    losses = []
    for k in range(num_steps):
        for group in optimizer.param_groups:
            if device.type == "cuda":
                rate.fill_(rate_at(k))
            else:
                group["lr"] = rate_at(k)
        full = among is not None and is_full(k, num_steps, setting)
        losses.append((run_among if full else run)(k).clone())
        if each is not None and (k + 1) % max(1, num_steps // 10) == 0:
            each(k + 1, model)
            model.train()
    return torch.stack(losses).float().tolist()


def is_full(k: int, num_steps: int, setting: Setting) -> bool:
    """Whether step k of a schedule with full-length steps in it is one of them."""
    count = round(num_steps * setting.finish)
    if setting.finish_at == "first":
        return k < count
    if setting.finish_at == "last":
        return k >= num_steps - count
    return (k + 1) * count // num_steps > k * count // num_steps


def _stepper(
    model: Any,
    optimizer: Any,
    setting: Setting,
    text: Text,
    sampler: Sampler,
    num_steps: int,
    batch: int,
) -> Callable[[int], torch.Tensor]:
    """What trains on the k-th batch of a sampler's examples and returns the loss."""
    corpus = _corpus(text, sampler, num_steps * batch, setting.seed)
    numbers: dict[str, Any] = {"seed": setting.seed, "num_examples": num_steps * batch}
    full = isinstance(sampler, FullLength)
    if setting.variant and not full:
        dataset = VariantDataset(setting.variant, corpus, sampler, **numbers)
    else:
        dataset = PoSEDataset(corpus, sampler, **numbers)
    weighted = setting.strength > 0 and setting.method in ("pose", "cream") and not full
    collator = ExampleCollator("importance" if weighted else "none")
    device = best_device()
    parameters = [p for p in model.parameters() if p.requires_grad]
    teacher = load_base(dataclasses.replace(setting, rope_off=True)) if setting.distil else None

    def step(given: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(
            device.type, DTYPE, enabled=torch.float32 != DTYPE, cache_enabled=False
        ):
            loss = _loss(model, teacher, given, setting, full)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    def given(k: int) -> dict[str, torch.Tensor]:
        items = [dataset[k * batch + i] for i in range(batch)]
        made = collator(items)
        made.pop("attention_mask")
        if teacher is not None:
            made["taught"] = torch.stack([_taught(item["example"], setting) for item in items])
        if "key_weights" in made:
            made["key_weights"] = made["key_weights"] * setting.strength
        return made

    run = _graph(step, given(0), model, optimizer) if device.type == "cuda" else step
    return lambda k: run({name: value.to(device) for name, value in given(k).items()})


def _loss(
    model: Any, teacher: Any, given: dict[str, torch.Tensor], setting: Setting, full: bool
) -> Any:
    """Next-token loss, and self-distillation where it is asked for."""
    arguments: dict[str, Any] = {"use_cache": False}
    plain = given["position_ids"]
    if not full:
        batch = {k: v for k, v in given.items() if k in ("chunk_ids", "key_weights")}
        arguments |= with_chunk_weights(batch, DTYPE) or {"attention_mask": _causal(plain)}
        arguments["position_ids"] = plain
    logits = model(given["input_ids"], **arguments).logits[:, :-1].float()
    labels = given["labels"][:, 1:]
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    if teacher is None:
        return loss
    near = slice(0, L)  # what the base can read
    with torch.no_grad():
        if not full:  # without weights: a first chunk has none
            plain = torch.arange(min(L, plain.shape[1]), device=plain.device).expand_as(
                plain[:, near]
            )
            arguments |= {"position_ids": plain, "attention_mask": _causal(plain)}
        wanted = teacher(given["input_ids"][:, near], **arguments).logits[:, :-1]
        wanted = wanted.float().log_softmax(-1)
    mine = logits[:, : wanted.shape[1]].log_softmax(-1)  # M - 1 of them where M < L
    apart = kl_div(mine, wanted, log_target=True, reduction="none").sum(-1)
    taught = given["taught"][:, : wanted.shape[1]]
    return loss + setting.distil * (apart * taught).sum() / taught.sum().clamp_min(1.0)


def _taught(example: Example, setting: Setting) -> torch.Tensor:
    """(L,) 1 where the base's own prediction holds: plain examples, or every first chunk."""
    chunks = torch.from_numpy(example.chunk_ids())
    plain = len(example.lengths) == 1
    return (chunks == 0).float() * float(plain or setting.distil_on == "first")


def _causal(position_ids: torch.Tensor) -> torch.Tensor:
    """(B, 1, L, L): what lies ahead is hidden, nothing is weighted."""
    rows, length = position_ids.shape
    lowest = torch.finfo(torch.bfloat16).min
    mask = torch.full((length, length), lowest, dtype=DTYPE, device=position_ids.device)
    return mask.triu(1).expand(rows, 1, -1, -1).contiguous()


def _graph(step: Any, first: dict[str, torch.Tensor], model: Any, optimizer: Any) -> Any:
    """The step captured once; a call copies a batch in and replays it."""
    static = {name: value.cuda() for name, value in first.items()}
    kept = [p.detach().clone() for p in model.parameters()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(static)
    with torch.no_grad():
        for parameter, old in zip(model.parameters(), kept, strict=True):
            parameter.copy_(old)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()

    def run(given: dict[str, torch.Tensor]) -> torch.Tensor:
        for name, value in given.items():
            static[name].copy_(value)
        graph.replay()
        return loss

    return run
