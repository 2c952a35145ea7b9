"""Token ids are the tokenizer's own, whatever pieces and batches the text is cut in."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from skipwise.data import tokenize
from skipwise.data.chat import ChatSpans
from skipwise.data.readers import parse_sources
from skipwise.data.token_cache import StoreProgress, TokenWriter, open_store
from skipwise.data.tokenize import encode, tokenize_source
from skipwise.models.separator import own_separator
from skipwise.pipeline.quickstart import MODEL


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_pieces_and_batches_of_any_size_give_the_same_tokens(tmp_path, monkeypatch, tokenizer):
    texts = ["".join(f"line {i}\n" for i in range(n)) for n in (3, 50, 7, 1, 200)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (source,) = parse_sources([str(tmp_path / "x.jsonl")])
    for piece, batch in ((40, 1 << 22), (40, 60), (1 << 20, 1)):
        monkeypatch.setattr(tokenize, "_PIECE", piece)
        monkeypatch.setattr(tokenize, "_BATCH", batch)
        cache = tmp_path / f"{piece}-{batch}"
        store = tokenize_source(source, tokenizer, cache=cache)
        for i, text in enumerate(texts):
            # this tokenizer merges nothing over a line end, so cuts there leave no trace
            assert store.document(i).tolist() == tokenizer(text, verbose=False)["input_ids"]


@pytest.mark.parametrize("special_tokens", ["control", "text"])
def test_the_ids_are_those_of_the_tokenizer_whatever_it_was_used_for_before(
    tmp_path, special_tokens
):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    spelled = tokenizer.all_special_tokens[0]
    texts = [
        "one line",
        f"a {spelled} in it{spelled}",
        "x" * 300,
        "\u00e9\u4e2d",
        spelled,
        " a  b ",
    ]
    wanted = AutoTokenizer.from_pretrained(MODEL)(
        texts, add_special_tokens=False, split_special_tokens=special_tokens == "text"
    )["input_ids"]
    assert wanted[4] == [tokenizer.convert_tokens_to_ids(spelled)] or special_tokens == "text"
    tokenizer(texts, truncation=True, max_length=2)
    tokenizer(texts, padding=True, split_special_tokens=special_tokens != "text")
    assert [encode(tokenizer, x, special_tokens=special_tokens) for x in texts] == [
        own_separator(tokenizer).documents(np.array(ids), np.array([len(ids)]))[0].tolist()
        for ids in wanted
    ]


def test_a_tokenizer_that_reads_text_in_its_own_way_is_asked(monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    class Shouting(type(tokenizer)):
        def __call__(self, text, **options):
            return super().__call__([one.upper() for one in text], **options)

    expected = encode(tokenizer, "SOME TEXT")
    assert encode(tokenizer, "some text") != expected
    tokenizer.__class__ = Shouting
    assert encode(tokenizer, "some text") == expected


def test_the_special_token_of_a_start_stands_only_at_the_start_of_a_text_cut_in_pieces(
    monkeypatch, tokenizer
):
    class Starting:
        def __call__(self, pieces, add_special_tokens=True, verbose=True):
            ids = tokenizer(pieces, verbose=False)["input_ids"]
            return {"input_ids": [[1, *i] if add_special_tokens else i for i in ids]}

    monkeypatch.setattr(tokenize, "_PIECE", 40)
    text = "".join(f"line {i}\n" for i in range(50))
    assert encode(Starting(), text) == [1, *tokenizer(text, verbose=False)["input_ids"]]


def test_ids_beyond_the_number_of_tokens_are_kept_whole(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 70_000, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    (tmp_path / "x.txt").write_text("a b a")
    (source,) = parse_sources([str(tmp_path / "x.txt")])
    store = tokenize_source(source, tokenizer, cache=tmp_path / "cache")
    assert store.document(0).tolist() == [0, 70_000, 0]


def test_the_second_of_two_that_finish_leaves_the_first_ones_store(tmp_path):
    stores = []
    for name in ("x.part1", "x.part2"):  # no locks: each process has a part of its own
        writer = TokenWriter(tmp_path / name, np.dtype(np.uint16))
        writer.append(np.arange(5), np.array([2, 3]), ChatSpans())
        writer.save(StoreProgress(num_tokens=5, num_documents=2))
        writer.finish(tmp_path / "x", "text")
        stores.append((tmp_path / "x" / "meta.json").stat().st_ino)
    assert stores[0] == stores[1] and not list(tmp_path.glob("*.part*"))
    assert open_store(tmp_path / "x").document(1).tolist() == [2, 3, 4]
