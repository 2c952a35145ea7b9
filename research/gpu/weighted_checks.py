"""weighted_attention.py --tiny: what can be shown of the candidates without a GPU."""

import numpy as np
import torch
from weighted_kernels import carrier_of, reference
from weighted_model import CANDIDATES, Step, errors, fresh, layout, register, run

from skipwise.models.attention.masks import with_chunk_weights, with_layer_masks
from skipwise.pose.samplers import additive_mask


def check(name, value, limit):
    print(f"{'ok  ' if value < limit else 'FAIL'} {name}: {value:.1e}")
    if not value < limit:  # NaN fails as well
        raise SystemExit(f"{name}: {value} is not below {limit}")


def check_formulas():
    rng = np.random.default_rng(1)
    torch.manual_seed(1)
    for (H, K, D), batch, num_chunks in (((4, 2, 16), 3, 2), ((3, 3, 8), 2, 4), ((4, 1, 8), 1, 2)):
        L = 40
        chunks, _ = layout(L, batch, num_chunks, rng, "cpu", plain_row=batch == 3)
        qkv, grad = fresh((H, K, D), L, batch, "cpu", torch.float32)
        expected = reference(*qkv, grad, chunks, D**-0.5)
        bias = chunks.bias().masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -9.0)
        made = torch.from_numpy(additive_mask(chunks.examples, -9.0))
        check("reference's mask, positions.additive_mask", float((bias - made).abs().max()), 1e-6)
        names = ["mask", "features", "pieces plain", "pieces plain host"]
        for name in names:
            for way in (chunks, carrier_of(chunks, host="host" in name)):
                off = errors(run(CANDIDATES[name], qkv, way, grad), expected)
                check(f"{name}, {H}/{K}x{D}, N={num_chunks}", max(off.values()), 2e-5)
        for name in ("flex", "flex keys") if num_chunks == 2 else ("flex",):
            with torch.no_grad():
                out = CANDIDATES[name](*(t.detach() for t in qkv), carrier_of(chunks), D**-0.5)
            off = float((out - expected[0]).norm() / expected[0].norm())
            check(f"{name} forward, {H}/{K}x{D}, N={num_chunks}", off, 2e-5)
        plain = reference(*qkv, grad, chunks.without_weights(), D**-0.5)
        off = errors(plain, expected)
        assert min(off.values()) > 1e-2, "the weights change too little for the checks to count"


def gradients(model, implementation, mask, ids, positions):
    model.config._attn_implementation = implementation
    model.zero_grad()
    given = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    loss = model(input_ids=ids, labels=ids, **given).loss
    loss.backward()
    return torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in model.parameters())])


def check_carrier():
    """transformers hands a (B, 1, 2, L) mask to every layer as the same object."""
    import transformers

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    hybrid = {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    soft = {"attn_logit_softcapping": None, "query_pre_attn_scalar": 8}
    families = {
        "Llama": sizes,
        "Mistral": {**sizes, "sliding_window": None},
        "Qwen3": sizes,
        "Gemma2": {**sizes, **hybrid, **soft},
        "Gemma3": {**sizes, **hybrid, "query_pre_attn_scalar": 8},
    }
    L, batch = 24, 2
    chunks, positions = layout(L, batch, 2, np.random.default_rng(2), "cpu")
    ones = torch.ones(batch, L, dtype=torch.long)
    full = with_chunk_weights(chunks.batch(), torch.float32)["attention_mask"]
    ids = torch.randint(0, 64, (batch, L), generator=torch.Generator().manual_seed(3))
    for family, given in families.items():
        config_class = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
        config = getattr(transformers, config_class)(**given)
        torch.manual_seed(4)
        model = getattr(transformers, f"{family}ForCausalLM")(config).train()
        calls_seen = []
        implementations = {n: register(n, calls_seen) for n in ("features", "pieces plain")}
        for checkpointing in (None, False, True):  # use_reentrant
            if checkpointing is not None:
                model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            masks = {"sdpa": full}
            masks |= {implementations[n]: carrier_of(chunks) for n in implementations}
            if "layer_types" in given:  # a mask for each kind of layer
                batch_ = {"position_ids": positions, "attention_mask": full}
                model.config._attn_implementation = "sdpa"
                both = with_layer_masks(config, batch_)["attention_mask"]
                masks = {n: {**both, "full_attention": m} for n, m in masks.items()}
            expected = gradients(model, "sdpa", masks["sdpa"], ids, positions)
            plain = gradients(model, "sdpa", ones, ids, positions)
            assert (plain - expected).norm() / expected.norm() > 1e-3
            for name, implementation in implementations.items():
                calls_seen.clear()
                mask = masks[implementation]
                found = gradients(model, implementation, mask, ids, positions)
                carrier = mask["full_attention"] if isinstance(mask, dict) else mask
                kinds = given.get("layer_types", ["full_attention"] * 3)
                calls = kinds.count("full_attention") * (1 if checkpointing is None else 2)
                seen = [m for m in calls_seen if m.shape[-2] == 2]
                assert len(seen) == calls, f"{family}: {len(seen)} calls with the carrier"
                assert all(m is carrier for m in seen), f"{family}: the carrier was copied"
                off = float((found - expected).norm() / expected.norm())
                way = {None: "plain", False: "checkpoint", True: "reentrant"}[checkpointing]
                check(f"{family} {way}, {name}", off, 1e-4)
                found = gradients(model, implementation, ones, ids, positions)
                off = float((found - plain).norm() / plain.norm())
                check(f"{family} {way}, {name}, a plain batch", off, 1e-5)


def check_all():
    check_formulas()
    check_carrier()
    rng = np.random.default_rng(5)
    step = Step((32, 48, (4, 2, 8)), 32, 2, num_layers=2, vocabulary=64, device="cpu")
    for num_chunks in (2, 4):
        chunks = step.layouts(1, num_chunks, rng)[0]
        expected = float(step("mask", *chunks))
        for name in ("features", "pieces plain", "pieces plain host"):
            off = abs(float(step(name, *chunks)) - expected)
            check(f"loss of a step, {name}, N={num_chunks}", off, 1e-4)
    print("all checks passed")
