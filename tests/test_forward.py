"""Forward passes in pieces, from shared prefixes and in slices: the numbers of one plain pass."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from skipwise.evaluation import prefill
from skipwise.pipeline.quickstart import MODEL

HYBRID = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.fixture(scope="module")
def llama():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def hybrid():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **HYBRID))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tokens(*shape):
    return torch.from_numpy(np.random.default_rng(0).integers(3, 1000, shape))


def plain(model, ids, positions):
    with torch.no_grad():
        ones = torch.ones_like(ids)
        return model(ids, attention_mask=ones, use_cache=False).logits[:, positions]


@pytest.mark.parametrize("count", [5, 64, 200])
@pytest.mark.parametrize("family", ["llama", "hybrid"])
@torch.no_grad()
def test_chunked_prefill_gives_the_logits_of_one_forward_pass(family, count, request, monkeypatch):
    model = request.getfixturevalue(family)
    monkeypatch.setattr(prefill, "PREFILL", 24)
    ids, positions = tokens(2, count), torch.arange(max(0, count - 40), count)
    have = prefill.logits_at(model, ids, positions)
    assert torch.allclose(have, plain(model, ids, positions), atol=2e-5)


@torch.no_grad()
def test_logits_in_slices_are_those_of_one_pass_and_never_more_than_asked(llama, monkeypatch):
    monkeypatch.setattr(prefill, "_LOGITS", 2 * 1024 * 7)  # seven positions of two rows
    seen = []
    handle = llama.lm_head.register_forward_hook(lambda m, i, out: seen.append(out.shape[1]))
    ids, positions = tokens(2, 100), torch.arange(60, 100)
    slices = list(prefill.logits_in_slices(llama, ids, positions))
    handle.remove()
    assert max(seen) == 7 and len(slices) == 6
    assert torch.allclose(torch.cat(slices, 1), plain(llama, ids, positions), atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "hybrid"])
@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_several_go_on_from_one_prefix_as_if_each_had_read_it(family, rows, request):
    model = request.getfixturevalue(family)
    prefix, rests = tokens(1, 40), tokens(2, rows, 30)
    base = prefill.new_cache(model, 80)
    prefill.prefill(model, prefix, base)
    for rest in rests:  # twice: the first must leave the prefix as it was
        cache = prefill.batch_repeat(base, rows)
        have = prefill.logits_at(model, rest, torch.arange(30), past=cache)
        prefill.crop(base, 40)
        ids = torch.cat([prefix.expand(rows, -1), rest], 1)
        want = plain(model, ids, torch.arange(40, 70))
        assert torch.allclose(have, want, atol=2e-5), float((have - want).abs().max())
    assert base.get_seq_length() == 40


@torch.inference_mode()
def test_a_cache_that_is_too_small_grows_and_keeps_what_it_holds(llama):
    ids, cache = tokens(1, 50), prefill.new_cache(llama, 10)
    prefill.prefill(llama, ids[:, :8], cache)
    have = prefill.logits_at(llama, ids[:, 8:], torch.arange(42), past=cache)
    assert torch.allclose(have, plain(llama, ids, torch.arange(8, 50)), atol=2e-5)


def test_hybrid_caches_keep_their_windows_and_cannot_be_padded(llama, hybrid):
    assert prefill.holds_all(prefill.new_cache(llama, 10))
    cache = prefill.new_cache(hybrid, 100)
    assert not prefill.holds_all(cache)
    with torch.inference_mode():
        prefill.prefill(hybrid, tokens(1, 60), cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [15, 60]


@pytest.mark.parametrize(("total", "rows"), [(2048, 8), (32768, 1), (131072, 1)])
def test_a_pieces_mask_stays_a_small_part_of_the_cache(llama, total, rows):
    piece = prefill.prefill_chunk_size(llama, total, rows)
    cache = 2 * 4 * 256 * 4 * total * rows
    assert 64 <= piece <= prefill.PREFILL
    assert piece == 64 or piece * total * rows * 5 <= max(12 << 20, cache / 20)


def test_a_large_model_is_read_in_large_pieces():
    config = AutoConfig.for_model("llama")  # 7B
    stub = type("Stub", (), {"config": config, "dtype": torch.bfloat16})()
    assert prefill.prefill_chunk_size(stub, 131072) > 2000


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, True),
        ("llama", {"num_key_value_heads": 8}, True),  # Llama 3 8B
        ("llama", {"num_key_value_heads": 2}, False),  # a cache smaller than one MLP
        ("llama", {"attn_implementation": "eager"}, False),
        ("mistral", {"sliding_window": 4096}, False),
        ("mistral", {"sliding_window": None}, True),
        ("gemma3_text", {}, False),
        ("mixtral", {"sliding_window": None}, False),
        ("gpt_neox", {}, True),
    ],
)
def test_a_long_context_goes_through_at_once_where_that_takes_less_than_its_cache(
    family, changes, expected
):
    stub = SimpleNamespace(config=AutoConfig.for_model(family, **changes))
    for device in ("cpu", "cuda", "mps"):  # on the last, a pass may hold all scores of a head
        stub.device = torch.device(device)
        assert prefill._one_pass(stub, 4096) is (changes.get("attn_implementation") != "eager")
        assert prefill._one_pass(stub, 32768) is (expected and device != "mps")


@torch.inference_mode()
def test_a_deep_narrow_model_is_read_at_once_beyond_the_piece(monkeypatch):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 6}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    monkeypatch.setattr(prefill, "PREFILL", 24)
    prefill.reading(model)
    ids, positions, seen = tokens(2, 90) % 64, torch.arange(60, 89), []
    model.model.register_forward_pre_hook(
        lambda module, given, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    have = prefill.logits_at(model, ids, positions)
    assert seen == [89]
    assert torch.allclose(have, plain(model, ids, positions), atol=2e-5)
