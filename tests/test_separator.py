"""What stands between documents: one beginning and end each, and what the base knows."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from skipwise.config.parse import parse_recipe
from skipwise.config.run_folder import RunFolder
from skipwise.data import tokenize
from skipwise.data.readers import parse_sources
from skipwise.data.tokenize import encode, tokenize_source
from skipwise.errors import SkipwiseError
from skipwise.evaluation import evaluator
from skipwise.evaluation.run import evaluate, evaluation_documents
from skipwise.evaluation.tasks.passkey import passkey_trials
from skipwise.models.prepared import prepare_model
from skipwise.models.separator import (
    Separator,
    added_tokens,
    candidates,
    describe,
    find_separator,
    with_begin,
)
from skipwise.pipeline import choose_separator as choice
from skipwise.pipeline.checks import check
from skipwise.pipeline.choose_separator import choose_separator, with_chosen_separator
from skipwise.pipeline.quickstart import MODEL
from skipwise.training.inputs import check_data, load_training_data

BOS, EOS, LINE = 1, 2, 13  # <s>, </s> and the line end of the bundled tokenizer
TEMPLATES = {"none": "$A", "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>"}
NAMES = ("Ann", "Bob", "Cid", "Dot", "Eve", "Fay", "Gus", "Hal")
L = 128


def bundled(adds="none"):
    """The bundled tokenizer, which puts BOS, EOS or both around each text by itself."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    post = TemplateProcessing(single=TEMPLATES[adds], special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = Sequence([ByteLevel(), post])
    return tokenizer


def bare(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def stories(count, seed):
    """Short texts about one name each, so that a model profits from knowing where one begins."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        name = NAMES[rng.integers(len(NAMES))]
        out.append(" ".join(f"{name} is {['in', 'out', 'up'][rng.integers(3)]}." for _ in range(4)))
    return out


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A story model for each separator, trained with it alone, and its tokenizer's own habit."""
    made = {}
    habits = {"bos": "none", "eos": "bos", "blank-line": "both"}
    around = {"bos": ([BOS], []), "eos": ([], [EOS]), "blank-line": ([], [LINE, LINE])}
    for name, (begin, end) in around.items():
        tokenizer = bundled(habits[name])
        ids = [[*begin, *bare(tokenizer, text), *end] for text in stories(600, 0)]
        stream = torch.tensor([*itertools.chain(*ids)])
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=L,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
        for step in range(100):
            optimizer.param_groups[0]["lr"] = 6e-3 * min(1, (100 - step) / 50)
            starts = torch.randint(len(stream) - 64, (8,))
            batch = torch.stack([stream[s : s + 64] for s in starts])
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        folder = tmp_path_factory.mktemp("bases") / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[name] = folder
    return made


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("stories") / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories(300, 1)))
    return file


def recipe_of(model, texts, *overrides):
    tree = {
        "model": str(model),
        "target_length": 256,
        "load": {"dtype": "float32"},
        "data": {"sources": [str(texts)], "short_documents": "pack"},
        "training": {"num_steps": 2, "global_batch_size": 2},
    }
    return parse_recipe(tree, list(overrides))


def run_in(folder, **metadata):
    folder.mkdir(exist_ok=True)
    run = RunFolder(folder)
    run.update(name="run", **metadata)
    return run


JOINED = {  # of the texts "a" and "b", by name: what is between them, and before the first
    "bos": ([BOS], [BOS]),
    "eos": ([EOS], []),
    "blank-line": ([LINE, LINE], []),
}


@pytest.mark.extended
@pytest.mark.parametrize("name", JOINED)
def test_auto_takes_the_separator_that_the_base_was_trained_with(
    bases, texts, tmp_path, name, monkeypatch
):
    recipe = recipe_of(bases[name], texts)
    prepared = prepare_model(recipe)
    own = describe(prepared.separator, prepared.tokenizer)
    assert prepared.separator.name != name  # the tokenizer's own is another one
    run = run_in(tmp_path / "run")
    chosen = choose_separator(prepared, run)
    entry = run.metadata()["separator"]
    assert chosen.separator.name == entry["name"] == name, entry
    words = {"bos": "BOS", "eos": "EOS", "blank-line": "a blank line"}
    values = entry["perplexity"]
    assert set(values) == {"BOS", "EOS", "EOS+BOS", "a blank line"}
    best = values[words[name]]
    assert best == min(values.values()) and best < 0.97 * values[own]
    assert entry["detail"].startswith(f"{words[name]} between documents, perplexity {best:.4g}; ")

    # what is trained on: every document but the held-out ones, each with the separator once
    data = load_training_data(chosen, run)
    between, first = JOINED[name]
    end = [] if first else between
    own = [[*first, *bare(prepared.tokenizer, text), *end] for text in stories(300, 1)]
    want = [*itertools.chain(*own)]
    packed = data.corpus.stores[1]
    assert packed.read(0, len(want)).tolist() == want

    # what is measured on: the same tokens from the run folder, and prompts that begin alike
    held_out = evaluation_documents(recipe, chosen.tokenizer, run, separator=chosen.separator)
    assert held_out and all(len(tokens) >= 256 for tokens in held_out)
    whole = np.array(want)
    for tokens in held_out:
        assert any(
            np.array_equal(whole[at : at + len(tokens)], tokens)
            for at in np.flatnonzero(whole == tokens[0])
        )
    trial = passkey_trials(chosen.prompt_tokenizer, 128, num_trials=1, num_depths=1)[0]
    assert [i for i in trial.input_ids if i in (BOS, EOS)] == first
    assert trial.input_ids[: len(first)] == first

    # it is measured once
    monkeypatch.setattr(choice, "_measure", lambda *_: pytest.fail("measured again"))
    assert choose_separator(prepared, run).separator == chosen.separator
    assert with_chosen_separator(prepared, run).separator == chosen.separator


@pytest.mark.extended
def test_check_says_what_the_separator_is_and_what_the_others_give(bases, texts):
    lines = {one.name: str(one) for one in check(recipe_of(bases["bos"], texts))}
    assert lines["separator"].startswith("ok   separator: BOS between documents, perplexity ")
    lines = {one.name: one for one in check(recipe_of(bases["bos"], texts, "method=none"))}
    assert lines["separator"].detail.startswith("BOS between") and lines["separator"].numbers
    given = recipe_of(bases["bos"], texts, "data.separator=eos")
    lines = {one.name: one.detail for one in check(given)}
    assert lines["separator"] == "EOS between documents, as data.separator says"


def test_the_perplexity_is_that_of_the_texts_own_tokens_in_a_plain_forward_pass(tiny):
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    windows = [[[30, 31, 32], [33, 34]], [[35, 36]]]
    separator = Separator(name="x", begin=(5,), end=(6, 7), between=(8,))
    rows = [[5, 30, 31, 32, 6, 7, 8, 5, 33, 34, 6, 7, 8], [5, 35, 36, 6, 7, 8]]
    own = [[2, 3, 8, 9], [2]]  # places of the texts' tokens but the first of a window
    losses = []
    for row, places in zip(rows, own, strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([row])).logits[0].log_softmax(-1)
        losses += [-float(log_p[at - 1, row[at]]) for at in places]
    found = choice._perplexity(model, windows, separator)
    assert found == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)


def test_the_tokenizers_own_stays_unless_another_is_half_a_percent_better(
    tiny, texts, tmp_path, monkeypatch
):
    prepared = prepare_model(recipe_of(tiny, texts))
    eos, bos = Separator(name="eos", end=(EOS,)), Separator(name="bos", begin=(BOS,))
    for value, name in ((9.96, "eos"), (9.94, "bos"), (11.0, "eos")):
        monkeypatch.setattr(choice, "_measure", lambda *_, v=value: [(eos, 10.0), (bos, v)])
        run = run_in(tmp_path / str(value))
        assert choose_separator(prepared, run).separator.name == name
        detail = {
            "eos": f"EOS between documents, perplexity 10; BOS {value:.4g}",
            "bos": f"BOS between documents, perplexity {value:.4g}; EOS 10",
        }
        assert run.metadata()["separator"]["detail"] == detail[name]


def test_without_text_or_after_training_began_the_tokenizers_own_is_taken_and_said(
    tiny, texts, tmp_path, monkeypatch
):
    monkeypatch.setattr(choice, "load_for_evaluation", lambda *_, **__: pytest.fail("loaded"))
    prepared = prepare_model(recipe_of(tiny, texts))
    bare_recipe = dataclasses.replace(prepared, recipe=recipe_of(tiny, texts, "data.sources=[]"))
    (tmp_path / "one.txt").write_text("one text")
    one = dataclasses.replace(prepared, recipe=recipe_of(tiny, tmp_path / "one.txt"))
    for given, words in ((bare_recipe, "there is no text"), (one, "there are not two documents")):
        run = run_in(tmp_path / words)
        assert choose_separator(given, run).separator == prepared.separator
        want = f"EOS between documents, not measured: {words}"
        assert run.metadata()["separator"]["detail"] == want
    monkeypatch.setattr(choice, "last_checkpoint", lambda _: tmp_path)
    run = run_in(tmp_path / "trained")
    choose_separator(prepared, run)
    assert "training had started with it" in run.metadata()["separator"]["detail"]


def test_a_model_that_runs_out_of_memory_is_not_measured(tiny, texts, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(choice, "load_for_evaluation", full)
    run = run_in(tmp_path / "run")
    choose_separator(prepare_model(recipe_of(tiny, texts)), run)
    assert "not measured: CUDA out of memory" in run.metadata()["separator"]["detail"]


@pytest.mark.parametrize("separator", ["bos", "eos", "eos-bos", "blank-line", "none", "auto"])
@pytest.mark.parametrize("adds", TEMPLATES)
def test_a_document_begins_and_ends_once_whatever_the_tokenizer_adds(
    adds, separator, tmp_path, monkeypatch
):
    tokenizer = bundled(adds)
    monkeypatch.setattr(tokenize, "_PIECE", 40)  # a long text goes through in pieces
    long = "".join(f"line {i}\n" for i in range(30))
    written = ["x = 1", long, "<s>x = 1", "x = 1</s>", "<s>x = 1</s>"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in written))
    found = find_separator(separator, tokenizer)
    (source,) = parse_sources([str(tmp_path / "x.jsonl")])
    store = tokenize_source(source, tokenizer, separator=found, cache=tmp_path / "cache")
    own = {"none": "eos", "bos": "eos-bos", "eos": "eos", "both": "eos-bos"}
    name = own[adds] if separator == "auto" else separator
    begin = [BOS] if name in ("bos", "eos-bos") else []
    end = [EOS] if name in ("eos", "eos-bos") else []
    text = bare(tokenizer, "x = 1")
    want = [
        [*begin, *text, *end],
        [*begin, *bare(tokenizer, long), *end],
        [BOS, *text, *end],
        [*begin, *text, EOS],
        [BOS, *text, EOS],
    ]
    assert [store.document(i).tolist() for i in range(5)] == want
    assert encode(tokenizer, "x = 1", found) == want[0]
    assert found.between == ((LINE, LINE) if name == "blank-line" else ())
    prompts = with_begin(tokenizer, found.begin)
    assert prompts("x = 1")["input_ids"] == [*begin, *text]
    assert tokenizer("x = 1")["input_ids"] == [
        *([BOS] if adds in ("bos", "both") else []),
        *text,
        *([EOS] if adds in ("eos", "both") else []),
    ]  # unchanged


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True)])
def test_add_bos_token_and_add_eos_token_of_a_llama_tokenizer_are_not_added_twice(bos, eos):
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "b", "\n"])}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=[], add_bos_token=bos, add_eos_token=eos)
    around = added_tokens(tokenizer)
    assert around == ((1,) * bos, (2,) * eos)
    own = find_separator("auto", tokenizer)
    assert own.name == ("eos-bos" if bos else "eos")
    text = bare(tokenizer, "ab")
    assert encode(tokenizer, "ab", own) == [*[1] * bos, *text, 2]
    assert encode(tokenizer, "ab", find_separator("bos", tokenizer)) == [1, *text]
    assert with_begin(tokenizer, (1,))("ab")["input_ids"] == [1, *text]


def word_level(words, **special):
    words = ["?", *special.values(), "a", "b", *words]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", **special)


def test_a_tokenizer_without_bos_and_eos_packs_with_nothing_between_and_says_so():
    """The config names ids 1 and 2 by default, which are words here."""
    tokenizer = word_level(["c"])
    (only,) = candidates(tokenizer, LlamaConfig())
    assert only == Separator(name="none") and describe(only, tokenizer) == "nothing"
    assert encode(tokenizer, "a b") == bare(tokenizer, "a b")
    with pytest.raises(SkipwiseError, match=r"data\.separator: eos: .*\nchoose from auto, none"):
        find_separator("eos", tokenizer, LlamaConfig())


def test_one_token_for_bos_eos_and_unknown_text_stands_once_between_documents():
    tokenizer = word_level([], bos_token="<|end|>", eos_token="<|end|>")
    tokenizer.unk_token = "<|end|>"
    i = tokenizer.eos_token_id
    found = {separator.name: separator for separator in candidates(tokenizer)}
    assert set(found) == {"bos", "eos"} and found["eos"].end == found["bos"].begin == (i,)
    assert list(found) == ["eos", "bos"]
    post = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", i)])
    tokenizer.backend_tokenizer.post_processor = post
    assert [separator.name for separator in candidates(tokenizer)] == ["bos", "eos"]


def test_the_eos_of_config_and_generation_config_are_candidates_where_they_are_special():
    """A chat tokenizer ends turns with its EOS; the documents of the pretraining had another."""
    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    tokenizer = word_level(special, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    document_end, turn_end, _ = tokenizer.convert_tokens_to_ids(special)
    config = LlamaConfig(eos_token_id=document_end, bos_token_id=document_end)
    generation = GenerationConfig(eos_token_id=[turn_end, document_end, 4])
    found = candidates(tokenizer, config, generation)
    assert [(s.name, s.begin, s.end) for s in found] == [
        ("eos", (), (turn_end,)),
        ("eos", (), (document_end,)),
        ("bos", (document_end,), ()),
        ("eos-bos", (document_end,), (turn_end,)),
    ]
    names = [describe(separator, tokenizer) for separator in found]
    assert names == ["EOS", "EOS (<|endoftext|>)", "BOS", "EOS+BOS"]


def test_special_tokens_that_the_text_spells_are_counted_and_said_or_read_as_text(tiny, tmp_path):
    texts = [f"x{i} = 1\n" * 30 for i in range(30)]
    texts[3] += "</s> is the end </s> of <s>"
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def lines_and_ids(*overrides):
        recipe = recipe_of(tiny, file, "data.short_documents=drop", *overrides)
        prepared = prepare_model(recipe)
        data = load_training_data(prepared, None)
        lines = {one.name: one.detail for one in check_data(prepared, data, [])}
        return lines, data.corpus.stores[0].document(3)

    lines, ids = lines_and_ids()
    assert "the text spells 3 special tokens" in lines["special tokens"]
    assert "data.special_tokens=text" in lines["special tokens"]
    assert np.isin(ids, [BOS, EOS]).sum() == 4  # with the document's own end
    lines, ids = lines_and_ids("data.special_tokens=text")
    assert "special tokens" not in lines
    assert np.flatnonzero(np.isin(ids, [BOS, EOS])).tolist() == [len(ids) - 1]
    assert AutoTokenizer.from_pretrained(tiny).decode(ids[:-1]) == texts[3]


def test_each_separator_has_tokens_of_its_own_in_the_cache(tmp_path):
    tokenizer = bundled()
    (tmp_path / "x.txt").write_text("x = 1")
    (source,) = parse_sources([str(tmp_path / "x.txt")])
    stores = [
        tokenize_source(
            source, tokenizer, separator=find_separator(n, tokenizer), cache=tmp_path / "cache"
        )
        for n in ("bos", "eos", "bos")
    ]
    text = bare(tokenizer, "x = 1")
    assert [store.document(0).tolist() for store in stores] == [
        [BOS, *text],
        [*text, EOS],
        [BOS, *text],
    ]
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


def test_the_evaluation_of_a_run_reads_texts_and_prompts_as_its_training_did(
    tiny, texts, tmp_path, monkeypatch
):
    """The run's model and base; a baseline of another name keeps its tokenizer's own."""
    import shutil

    from skipwise.config.parse import dump_recipe

    (tmp_path / "base").mkdir()
    shutil.copytree(tiny, tmp_path / "other")
    recipe = recipe_of(tiny, texts, "data.short_documents=drop")
    run = run_in(
        tmp_path / "run",
        separator={"name": "bos", "begin": [BOS], "end": [], "between": [], "detail": ""},
        training={},
        original_length=64,
    )
    run.recipe_file.write_text(dump_recipe(recipe))
    shutil.copytree(tiny, run.model)
    seen = {}

    def evaluate_model(eval_model, texts, *_, **__):
        first = eval_model.tokenizer("x")["input_ids"][0]
        seen[eval_model.label] = [texts.documents[0][0], texts.documents[0][-1], first]
        return [{"model": eval_model.label}]

    monkeypatch.setattr(evaluator, "evaluate_model", evaluate_model)
    options = {"lengths": [64], "tasks": ["perplexity"], "data": [str(texts)], "overrides": []}
    evaluate(str(run.path), **options, baseline="base")
    evaluate(str(run.path), **options, baseline=str(tmp_path / "other"))
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    first, last = (bare(tokenizer, stories(300, 1)[0])[i] for i in (0, -1))
    x = bare(tokenizer, "x")[0]
    assert seen == {
        "before": [BOS, last, BOS],
        "after": [BOS, last, BOS],
        "other": [first, last, x],
    }
    alone = {**options, "overrides": ["data.separator=bos"]}
    evaluate(str(tmp_path / "other"), **alone, out=tmp_path / "out")
    assert seen["other"] == [BOS, last, BOS]


@pytest.mark.parametrize(
    ("begin", "end"),
    [((), ()), ((1,), ()), ((), (2,)), ((1,), (1,)), ((1, 2), (2, 1)), ((3,), (1,))],
)
def test_many_documents_get_what_each_alone_would(begin, end):
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 4, rng.integers(0, 5)).tolist() for _ in range(300)]
    wanted = [
        [
            *([] if tuple(text[: len(begin)]) == begin else begin),
            *text,
            *([] if tuple(text[max(0, len(text) - len(end)) :]) == end else end),
        ]
        for text in texts
    ]
    flat = np.array([token for text in texts for token in text], np.uint32)
    separator = Separator(name="any", begin=begin, end=end)
    tokens, lengths = separator.documents(flat, np.array([len(text) for text in texts]))
    assert tokens.dtype == np.uint32 and lengths.tolist() == [len(text) for text in wanted]
    assert tokens.tolist() == [token for text in wanted for token in text]
    nothing = separator.documents(flat[:0], np.zeros(0, np.int64))
    assert [len(part) for part in nothing] == [0, 0]
