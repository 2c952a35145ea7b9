"""The attention temperature: exact in every family's weights, found by its search, and exported."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_families import FAMILIES, LATENT, SHAPE
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from skipwise.cli import main
from skipwise.config.parse import dump_recipe, parse_recipe
from skipwise.config.run_folder import RunFolder
from skipwise.data.tokenize import encode
from skipwise.errors import SkipwiseError
from skipwise.evaluation.run import documents_for_search, evaluation_documents
from skipwise.export.hf import export_model
from skipwise.models.attention import temperature as folding
from skipwise.models.attention.temperature import QueryWeights, check_foldable, fold_temperature
from skipwise.models.prepared import prepare_model
from skipwise.pipeline import choose_temperature
from skipwise.pipeline.choose_temperature import (
    GRID,
    Candidate,
    golden_section_search,
    search_temperature,
)
from skipwise.pipeline.extend import extend
from skipwise.pipeline.quickstart import MODEL, corpus
from skipwise.pipeline.search import longer_length

REFUSED = {"nanochat": "q_norm follows the projection and has no weight"}
FULL = {"layer_types": ["full_attention"] * 2, "sliding_window": 256}
VARIANTS = [  # of families whose config changes what makes the queries
    ("ministral", FULL),  # as `scaled_config` leaves it
    ("cohere", {"use_qk_norm": True}),
    ("stablelm", {"qk_layernorm": True}),
    ("phi", {"qk_layernorm": True}),  # GPT-J is converted to Phi, Baichuan to Llama
    ("glm4_moe", {"use_qk_norm": True}),
    ("persimmon", {"qk_layernorm": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"multi_query": False}),
    ("deepseek_v2", {"q_lora_rank": None}),
    ("deepseek_v3", {**LATENT, "q_lora_rank": None}),
]
CASES = [
    (family, {})
    for family, (settings, _) in FAMILIES.items()
    if settings is not None and family not in REFUSED and family != "ministral"
] + VARIANTS


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(family, settings=None, dtype=torch.float32):
    """A tiny model with attention that is far from uniform, so that a temperature shows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family][0], **(settings or {})})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn" in name or "attention" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


ATTENDS = ("full_attention", "hybrid")  # the layers that look far back


def logits(model):
    ids = torch.randint(3, 1000, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def with_scaled_logits(monkeypatch, model, t):
    """The model's logits where the attention itself is made to multiply its logits by t."""
    kinds = getattr(model.config, "layer_types", None)
    attention = next(m for m in model.modules() if type(m).__name__.endswith("Attention"))
    modeling = sys.modules[type(attention).__module__]

    def factor(module):
        return t if kinds is None or kinds[module.layer_idx] in ATTENDS else 1.0

    with monkeypatch.context() as patch:
        if model.config.model_type == "falcon":
            plain = modeling.apply_rotary_pos_emb
            patch.setattr(
                modeling,
                "apply_rotary_pos_emb",
                lambda q, k, *more: (t * plain(q, k, *more)[0], plain(q, k, *more)[1]),
            )
        elif model.config.model_type == "gpt_neox_japanese":
            product = type(attention)._attn
            patch.setattr(
                type(attention),
                "_attn",
                lambda self, q, *more, **k: product(self, t * q, *more, **k),
            )
        else:
            eager = modeling.eager_attention_forward

            def scaled(module, query, *more, **kwargs):
                sinks = getattr(module, "sinks", None)
                if sinks is None:
                    return eager(module, factor(module) * query, *more, **kwargs)
                before = sinks.data
                sinks.data = factor(module) * before
                out = eager(module, factor(module) * query, *more, **kwargs)
                sinks.data = before
                return out

            patch.setattr(modeling, "eager_attention_forward", scaled)
        return logits(model)


@pytest.mark.parametrize(
    ("family", "settings"), CASES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_folded_queries_are_scaled_logits(family, settings, monkeypatch):
    model = make_model(family, settings)
    check_foldable(model.config)
    plain, want = logits(model), with_scaled_logits(monkeypatch, model, 1.3)
    others = {n: p.clone() for n, p in model.named_parameters()}
    fold_temperature(model, 1.3)
    have = logits(model)
    error, effect = float((have - want).abs().max()), float((plain - want).abs().max())
    assert error < 1e-3 * effect, (error, effect)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, others[n])}
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 2
    for name in changed:
        layer = next(int(part) for part in name.split(".") if part.isdigit())
        assert kinds[layer] in ATTENDS, f"{name} is of a layer with a window"
    QueryWeights(model).check(1 / 1.3)  # and it is taken back
    assert torch.allclose(logits(model), plain, atol=1e-3 * effect)


def test_what_cannot_carry_it_is_refused_by_its_config_alone():
    for family, settings, why in (
        ("nanochat", {}, REFUSED["nanochat"]),
        ("olmo", {"clip_qkv": 8.0}, "queries are clipped at 8"),
        ("ministral", {}, "has no full layer"),
    ):
        model = make_model(family, settings)
        with pytest.raises(
            SkipwiseError, match=rf"{family} model.*{why}\ntype attention_temperature=1.0"
        ):
            check_foldable(model.config)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(SkipwiseError, match=why):
            fold_temperature(model, 1.2)
        assert all(torch.equal(before[n], x) for n, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "spoil", "found"),
    [
        ("gpt_neox", lambda rows: rows + 16, "queries are not multiplied by it in layer 0"),
        ("gpt_neox", lambda rows: torch.cat([rows, rows + 16]), "keys change in layer 0"),
        ("phi3", lambda rows: torch.cat([rows, torch.arange(96, 128)]), "values change in layer 0"),
        ("phi3", lambda rows: rows[:-1], "queries are not multiplied by it in layer 0"),
    ],
)
def test_the_check_sees_wrong_rows_and_takes_them_back(family, spoil, found, monkeypatch):
    real = folding._query_rows
    monkeypatch.setattr(folding, "_query_rows", lambda *a: spoil(real(*a)))
    model = make_model(family)
    plain = logits(model)
    with pytest.raises(SkipwiseError, match=found):
        fold_temperature(model, 1.2)
    assert torch.equal(logits(model), plain)


def test_the_check_sees_a_norm_taken_for_another_kind(monkeypatch):
    for family, wrong in (("gemma3_text", 0.0), ("qwen3", 1.0)):
        monkeypatch.setattr(folding, "_norm_offset", lambda *a, wrong=wrong: wrong)
        with pytest.raises(SkipwiseError, match="queries are not multiplied by it in layer"):
            fold_temperature(make_model(family), 1.2)


def test_the_check_sees_a_scaled_projection_behind_which_a_norm_stands(monkeypatch):
    monkeypatch.setattr(folding, "_NORMS", ())
    with pytest.raises(SkipwiseError, match="queries are not multiplied by it in layer 0"):
        fold_temperature(make_model("qwen3"), 1.2)


def test_bf16_weights_are_rounded_once():
    model = make_model("llama", dtype=torch.bfloat16)
    weight = model.model.layers[1].self_attn.q_proj.weight.detach()
    want = 1.35 * weight.float()
    fold_temperature(model, 1.35)
    assert weight.dtype == torch.bfloat16
    assert float(((weight.float() - want) / want).abs().max()) <= 2**-8
    states = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    moved = (states @ (weight.float() - want).T).norm() / (states @ want.T).norm()
    assert 0.001 < float(moved) < 0.002  # what docs/method.md says: 0.16 %


def test_the_recipe_takes_auto_or_a_number_above_0():
    def parse(*overrides):
        return parse_recipe({"model": "m", "target_length": 8}, list(overrides))

    assert parse().attention_temperature == "auto"
    for value, want in (("auto", "auto"), ("1.15", 1.15), ("1", 1.0), ("'1.2'", 1.2)):
        recipe = parse(f"attention_temperature={value}")
        assert recipe.attention_temperature == want and isinstance(
            recipe.attention_temperature, str | float
        )
        again = parse(f"attention_temperature={recipe.attention_temperature}")
        assert dump_recipe(again) == dump_recipe(recipe)
    for value in ("0", "-1", "hot", "true", ".inf", ".nan", "null", "[1]"):
        with pytest.raises(
            SkipwiseError, match=r"temperature is .*: give (auto or a number|0\.1 to 10)"
        ):
            parse(f"attention_temperature={value}")


def curve(far, near=lambda t: 5.0):
    """What `golden_section_search` asks, from two functions, and how often it asked."""
    asked = []

    def measure(t):
        asked.append(t)
        return Candidate(temperature=t, near=near(t), far=far(t))

    return measure, asked


@pytest.mark.parametrize("lowest", range(9))
def test_the_search_finds_the_lowest_in_at_most_six_measurements(lowest):
    measure, asked = curve(lambda t: 6 + 10 * (t - GRID[lowest]) ** 2)
    value, tried = golden_section_search(measure)
    assert value == GRID[lowest] and asked[0] == 1.0
    assert len(asked) == len(set(asked)) <= (3 if lowest == 0 else 6)
    assert [one.temperature for one in tried] == sorted(asked)


def test_the_search_keeps_the_short_length():
    def found(near):
        return golden_section_search(curve(lambda t: 6 - t, near)[0])[0]

    assert found(lambda t: 5 * (1 + 0.0999 * (t - 1))) == 1.1  # costs 0.999 % at 1.1
    assert found(lambda t: 5 * (1 + 0.1001 * (t - 1))) == 1.05  # costs 1.001 % at 1.1
    assert found(lambda t: 5 * (1 + t - 1)) == 1.0
    assert found(lambda t: 5 * (1 - (t - 1))) == 1.4  # a gain is no cost


def test_the_search_stays_at_1_where_little_is_gained():
    def found(far):
        return golden_section_search(curve(far)[0])[0]

    assert found(lambda t: 6 * (1 - 0.0019 * min(t - 1, 0.05) / 0.05)) == 1.0
    assert found(lambda t: 6 * (1 - 0.0021 * min(t - 1, 0.05) / 0.05)) == 1.05
    assert found(lambda t: 6 * t) == found(lambda t: math.inf) == 1.0


def test_the_length_is_halved_until_there_is_enough_text():
    def search(*lengths):  # L 1,024: windows of 512 targets, 8 of them
        c, chosen = longer_length(np.array(lengths, int), 1024, 8192)
        return c, chosen.tolist()

    assert search(100, 8192 + 7 * 512) == (8192, [1])
    assert search(100, 8191 + 7 * 512) == (4096, [1])
    assert search(*[8192] * 8, 100) == (8192, list(range(8)))
    assert search(*[8192] * 15)[1] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert search(*[8192] * 7, 4096) == (4096, list(range(8)))
    assert search(2000) == search() == (0, [])


@pytest.fixture(scope="module")
def source_text():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [text for name, text in corpus.modules() if not corpus.held_out(name)][:40]
    return [ids for ids in (np.array(encode(tokenizer, text)) for text in texts) if len(ids) > 512]


@pytest.mark.extended
def test_the_search_finds_what_was_taken_from_the_queries(source_text):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    found = {}
    for divided_by in (1.0, 1.25):
        QueryWeights(model).set(1 / divided_by)
        before = model.model.layers[2].self_attn.q_proj.weight.clone()
        found[divided_by], tried = search_temperature(model, source_text[:8], 64, 128)
        assert tried[0].temperature == 1.0
        assert all(one.far < one.near for one in tried)  # more context, lower perplexity
        assert torch.equal(model.model.layers[2].self_attn.q_proj.weight, before)
    assert found[1.0] <= 1.05 and 1.2 <= found[1.25] <= 1.35, found


def make_recipe(tiny, text_folder, *overrides):
    tree = {
        "model": str(tiny),
        "target_length": 256,
        "rope": {"type": "yarn"},
        "load": {"dtype": "float32"},
        "data": {"sources": [str(text_folder)]},
        "training": {"num_steps": 2, "global_batch_size": 2, "micro_batch_size": 2},
        "eval": {"tasks": ["passkey"], "passkey_samples": 1, "num_depths": 1},
    }
    return parse_recipe(tree, list(overrides))


def queries_over(folder, base):
    """(the factor of every query weight, whether all other weights are equal)."""
    have, want = (load_file(f / "model.safetensors") for f in (folder, base))
    factors = [have[n] / want[n] for n in want if "q_proj" in n]
    rest = all(torch.equal(have[n], want[n]) for n in want if "q_proj" not in n)
    return torch.cat([f.flatten() for f in factors]), rest


def test_without_room_nothing_is_searched_and_a_broken_checkpoint_is_no_such_thing(
    tiny, text_folder, tmp_path, monkeypatch
):
    prepared = prepare_model(
        make_recipe(tiny, text_folder, "attention_temperature=auto", "method=none")
    )
    run = RunFolder(tmp_path)

    def fails(error):
        def load(prepared, checkpoint):
            raise error

        monkeypatch.setattr(choose_temperature, "load_for_scoring", load)
        return choose_temperature.chosen_temperature(prepared, run, None)

    for _ in range(2):  # what was not searched is searched again
        assert fails(torch.OutOfMemoryError("CUDA out of memory")) == 1.0
        assert "no memory to measure" in run.metadata()["temperature"]["detail"]
    with pytest.raises(SkipwiseError, match="is broken"):
        fails(SkipwiseError("the checkpoint is broken"))


@pytest.mark.extended
def test_the_search_of_a_run_is_exported_told_and_made_once(
    tiny, text_folder, tmp_path, monkeypatch, capsys
):
    real, seen, exports = choose_temperature.search_temperature, [], []

    def spy(model, documents, L, c, **more):
        seen.append([len(d) for d in documents])
        _, tried = real(model, documents, L, c, **more)
        return 1.05, [*tried[:1], Candidate(temperature=1.05, near=900.0, far=800.0)]

    def killed(*arguments):
        exports.append(arguments[-1])
        if len(exports) == 1:
            raise KeyboardInterrupt
        return export_model(*arguments)

    monkeypatch.setattr(choose_temperature, "search_temperature", spy)
    monkeypatch.setattr("skipwise.pipeline.stages.export_model", killed)
    recipe = make_recipe(tiny, text_folder, "attention_temperature=auto", "eval.untrained=false")
    with pytest.raises(KeyboardInterrupt):
        extend(recipe, tmp_path / "run")
    run = extend(recipe, tmp_path / "run")
    assert main(["export", str(run.path)]) == 0  # again, by its own verb
    assert len(seen) == 1 and exports == [1.05] * 3
    assert all(length >= 256 for length in seen[0])
    facts = run.metadata()["temperature"]
    assert facts["value"] == 1.05 and facts["context_lengths"] == [64, 256]
    assert [row["temperature"] for row in facts["searched"]] == [1.0, 1.05]
    assert facts["searched"][1]["perplexity"] == [900.0, 800.0]
    assert facts["num_documents"] == len(seen[0]) and "-> 800 at 256 tokens" in facts["detail"]
    assert f"temperature 1.05: {facts['detail']}" in capsys.readouterr().err
    factors, rest = queries_over(run.model, run.checkpoints / "checkpoint-2")
    assert torch.allclose(factors, torch.tensor(1.05), atol=1e-6) and rest
    reload = next(check for check in run.metadata()["checks"] if check["name"] == "reload")
    assert reload["passed"]
    assert "attention temperature 1.05" in (run.model / "README.md").read_text()
    page = (run.report / "index.html").read_text()
    assert "Attention temperature, of the exported model" in page and "800" in page

    def again(digest):
        run.update(data={**run.metadata()["data"], "digest": digest})
        where = run.checkpoints / "checkpoint-2"
        return choose_temperature.chosen_temperature(prepare_model(recipe), run, where)

    was = run.metadata()["data"]["digest"]
    run.update(temperature=None)
    assert again("of another text") == 1.0 and len(seen) == 1
    assert "the text has changed" in run.metadata()["temperature"]["detail"]
    assert any(row["model"] == "after" for row in run.results())
    assert again(was) == 1.05 and len(seen) == 2
    assert {row["model"] for row in run.results()} == {"before"}  # the rest was of another model


@pytest.mark.extended
def test_a_number_is_taken_as_it_is(tiny, text_folder, tmp_path):
    recipe = make_recipe(tiny, text_folder, "method=none", "attention_temperature=1.2")
    run = extend(recipe, tmp_path / "run")
    factors, rest = queries_over(run.model, tiny)
    assert torch.allclose(factors, torch.tensor(1.2), atol=1e-6) and rest
    card = (run.model / "README.md").read_text()
    assert "Rescaled without training.\n\n- attention temperature 1.2" in card
    assert run.metadata()["temperature"]["value"] == 1.2


def test_1_changes_nothing(tiny, tmp_path):
    prepared = prepare_model(
        make_recipe(tiny, "-", "method=none", "data.sources=[]", "attention_temperature=1.0")
    )
    run = RunFolder(tmp_path)
    run.recipe_file.write_text("{}")
    value = choose_temperature.chosen_temperature(prepared, run, None)
    (check,) = export_model(prepared, run, None, value)
    factors, rest = queries_over(run.model, tiny)
    assert check.passed and torch.equal(factors, torch.ones_like(factors)) and rest
    assert "temperature" not in run.metadata()


@pytest.mark.extended
def test_without_training_the_search_has_text_of_its_own(tiny, text_folder, tmp_path):
    overrides = ["method=none", "attention_temperature=auto", "eval.tasks=[perplexity]"]
    recipe = make_recipe(tiny, text_folder, *overrides, "eval.perplexity_windows=2")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    measured = [tuple(d) for d in evaluation_documents(recipe, tokenizer, None)]
    searched = [tuple(d) for d in documents_for_search(recipe, tokenizer)]
    assert len(measured) == len(searched) == 6 and not set(measured) & set(searched)
    plain = make_recipe(tiny, text_folder, "method=none", "attention_temperature=1.0")
    assert len(evaluation_documents(plain, tokenizer, None)) == 12
    run = extend(recipe, tmp_path / "run")
    found = run.metadata()["temperature"]
    assert found["num_documents"] == 6 and found["searched"][0]["temperature"] == 1.0
    assert queries_over(run.model, tiny)[0].mean().item() == pytest.approx(found["value"])


def test_of_one_document_a_half_is_searched_on(tiny, tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("".join(f"x{i} = {i * i}\n" for i in range(400)))
    recipe = make_recipe(tiny, file, "method=none", "attention_temperature=auto")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    (measured,), (searched,) = (
        evaluation_documents(recipe, tokenizer, None),
        documents_for_search(recipe, tokenizer),
    )
    plain = make_recipe(tiny, file, "method=none", "attention_temperature=1.0")
    (whole,) = evaluation_documents(plain, tokenizer, None)
    assert np.array_equal(np.concatenate([measured, searched]), whole) and len(searched) >= 256


def test_auto_says_why_there_was_no_search(tiny, text_folder, tmp_path):
    def chosen(prepared, name):
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        assert choose_temperature.chosen_temperature(prepared, run, None) == 1.0
        return run.metadata()["temperature"]["detail"]

    recipe = make_recipe(tiny, "-", "method=none", "attention_temperature=auto", "data.sources=[]")
    assert "too little text to search on" in chosen(prepare_model(recipe), "none")
    base = tmp_path / "nanochat"
    make_model("nanochat").save_pretrained(base)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(base)
    recipe = make_recipe(base, text_folder, "method=none", "attention_temperature=auto")
    assert REFUSED["nanochat"] in chosen(prepare_model(recipe), "nanochat-run")
    with pytest.raises(SkipwiseError, match="nanochat model cannot absorb it"):
        prepare_model(make_recipe(base, text_folder, "attention_temperature=1.1"))


def test_an_untrained_run_is_not_searched(tiny, text_folder, tmp_path):
    recipe = make_recipe(tiny, text_folder, "attention_temperature=auto")
    with pytest.raises(SkipwiseError, match=r"training of .* is not complete"):
        choose_temperature.chosen_temperature(prepare_model(recipe), RunFolder(tmp_path), None)


@pytest.mark.extended
def test_an_adapter_says_that_it_has_no_temperature(tiny, text_folder, tmp_path):
    recipe = make_recipe(tiny, text_folder, "lora.rank=2", "attention_temperature=1.2")
    run = extend(recipe, tmp_path / "run")
    assert main(["export", str(run.path), "--to", "adapter"]) == 0
    assert "an attention temperature (1.2)" in (run.adapter / "README.md").read_text()
    recipe = make_recipe(tiny, text_folder, "lora.rank=2", "attention_temperature=1.0")
    plain = extend(recipe, tmp_path / "plain")
    assert main(["export", str(plain.path), "--to", "adapter"]) == 0
    assert "temperature" not in (plain.adapter / "README.md").read_text()
    factors, _ = queries_over(run.model, plain.model)  # the same training but for the temperature
    assert torch.allclose(factors, torch.tensor(1.2), atol=1e-5)
