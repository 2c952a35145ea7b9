"""The data set: a pure function of the example number, and honest about what it leaves out."""

import json
import pickle

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from skipwise.data import PositionCollator, PositionDataset, build_corpus
from skipwise.documents import parse_sources
from skipwise.errors import SkipwiseError
from skipwise.positions import FullLength, PoSE
from skipwise.quickstart import MODEL
from skipwise.tokens import TokenStore, encode, tokenize_source

L, T = 16, 64


def store_of(*lengths: int) -> TokenStore:
    """Documents whose tokens tell document and place: 1000 * document + index."""
    documents = [1000 * i + np.arange(n) for i, n in enumerate(lengths)]
    return TokenStore(
        tokens=np.concatenate(documents).astype(np.uint32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
    )


def corpus_of(*stores: TokenStore, weights=None, **options):
    weights = weights or [None] * len(stores)
    options = {"min_length": L, "target_length": T, **options}
    return build_corpus(list(stores), weights, **options)


def dataset_of(corpus, seed=0, num_examples=10_000, **sampler):
    pose = PoSE(train_length=L, target_length=T, **sampler)
    return PositionDataset(corpus, pose, seed=seed, num_examples=num_examples)


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in ("input_ids", "labels", "position_ids"))


def test_example_k_is_the_same_whatever_was_read_before_and_after_pickling():
    corpus = corpus_of(store_of(100, 40, 300))
    straight = [dataset_of(corpus)[k] for k in range(50)]
    backwards = dataset_of(corpus)
    for k in reversed(range(50)):
        assert same(straight[k], backwards[k])
    assert same(pickle.loads(pickle.dumps(backwards))[7], straight[7])


def test_another_seed_gives_other_examples_and_another_epoch_other_cuts():
    corpus = corpus_of(store_of(100, 40, 300))
    a, b = dataset_of(corpus), dataset_of(corpus, seed=1)
    assert sum(same(a[k], b[k]) for k in range(50)) < 5
    slots = 1 + 1 + 4
    assert sum(same(a[k], a[k + slots]) for k in range(slots)) == 0


def test_an_epoch_shows_each_document_once_for_every_target_length_it_holds():
    data = dataset_of(corpus_of(store_of(100, 40, 300)))
    slots = 100 // T + 1 + 300 // T
    for epoch in range(3):
        shown = [int(data.document(epoch * slots + i)[0]) // 1000 for i in range(slots)]
        assert sorted(shown) == [0, 1, 2, 2, 2, 2]


def test_every_epoch_has_an_order_of_its_own():
    data = dataset_of(corpus_of(store_of(*[50] * 40)))
    orders = [[int(data.document(e * 40 + i)[0]) for i in range(40)] for e in range(3)]
    assert orders[0] != orders[1] and orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])


def test_weights_decide_the_shares_of_the_sources_exactly_over_a_cycle():
    corpus = corpus_of(store_of(100, 100), store_of(*[50] * 40), weights=[3, 1])
    data = dataset_of(corpus)
    sizes = [len(data.document(k)) for k in range(2000)]
    assert sizes.count(100) == 1500
    first = [k for k in range(1000) if sizes[k] == 50]  # the small source in its own order
    shown = [int(data.document(k)[0]) for k in first[:40]]
    assert len(set(shown)) == 40


def test_tokens_come_from_one_document_where_the_sampler_says():
    data = dataset_of(corpus_of(store_of(100, 40, 300)), content="aligned")
    for k in range(100):
        item = data[k]
        example = item["example"]
        assert len({int(t) // 1000 for t in item["input_ids"]}) == 1
        first = item["input_ids"][np.cumsum(example.lengths) - example.lengths] % 1000
        assert np.array_equal(first, example.text_starts)


def test_short_documents_are_dropped_and_counted_or_packed_with_a_separator():
    store = store_of(5, 100, 9, 7, 60, 8)
    dropped = corpus_of(store)
    assert (dropped.num_documents, dropped.num_short) == (2, 4)
    packed = corpus_of(store, short_documents="pack", separator=7, target_length=20)
    data = packed.stores[1]
    assert data.num_documents == 1  # 5+1 + 9+1 + 7+1 tokens reach T = 20; 8+1 stay under L
    expected = [*range(5), 7, *range(2000, 2009), 7, *range(3000, 3007), 7]
    assert data.document(0).tolist() == expected


def test_no_document_long_enough_says_how_long_they_are():
    with pytest.raises(SkipwiseError, match=r"16 tokens.*3 documents, the longest of 12") as error:
        corpus_of(store_of(5, 12, 9))
    assert "pack" in str(error.value)


def test_held_out_documents_and_their_copies_are_never_trained_on():
    lengths = [70 + i for i in range(60)]
    documents = [1000 * i + np.arange(n) for i, n in enumerate(lengths)]
    documents += [documents[i].copy() for i in range(60)]  # every one twice
    store = TokenStore(
        tokens=np.concatenate(documents).astype(np.uint32),
        offsets=np.concatenate([[0], np.cumsum([len(d) for d in documents])]),
    )
    corpus = corpus_of(store, num_held_out=4)
    held = {int(d[0]) for d in corpus.held_out}
    assert len(held) == 4
    assert corpus.num_documents == 120 - 8
    data = dataset_of(corpus)
    assert not held & {int(data.document(k)[0]) for k in range(500)}


def test_of_a_single_book_the_last_part_is_held_out():
    corpus = corpus_of(store_of(4000), num_held_out=8)
    (tail,) = corpus.held_out
    assert tail[-1] == 3999 and len(tail) == 200
    data = dataset_of(corpus, content="aligned")
    assert max(int(data[k]["input_ids"].max()) for k in range(300)) < 3800


def test_the_collator_always_sends_a_mask():
    data = dataset_of(corpus_of(store_of(100, 300)))
    plain = PositionCollator()([data[0], data[1]])
    assert plain["attention_mask"].tolist() == torch.ones(2, L).tolist()
    weighted = PositionCollator("importance")([data[0], data[1]])["attention_mask"]
    assert weighted.shape == (2, 1, L, L)
    example = data[0]["example"]
    cut, gap = int(example.lengths[0]), int(example.position_starts[1])
    row = weighted[0, 0, L - 1]
    assert row[:cut].tolist() == pytest.approx([np.log(gap / cut)] * cut)
    assert row[cut:].tolist() == [0.0] * (L - cut)
    assert (weighted[0, 0].triu(1) <= 0).all() and weighted[0, 0, 0, 1] < -1e30


def test_full_length_takes_whole_windows_at_plain_positions():
    data = PositionDataset(
        corpus_of(store_of(100, 300), min_length=T),
        FullLength(target_length=T),
        seed=0,
        num_examples=9,
    )
    assert data[3]["position_ids"].tolist() == list(range(T))
    assert len(data) == 9


def make_text(folder, lines):
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    return parse_sources([str(folder / "x.jsonl")])[0]


def test_tokens_are_cached_until_the_text_or_the_tokenizer_changes(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    source = make_text(tmp_path, ["def f(): pass", "x = 1"])
    cache = tmp_path / "cache"

    def folders():
        return sorted(p.name for p in (cache / "tokens").iterdir())

    first = tokenize_source(source, tokenizer, cache=cache)
    assert first.document(1).tolist() == encode(tokenizer, "x = 1")
    (only,) = folders()
    tokenize_source(source, tokenizer, cache=cache)
    assert folders() == [only]
    tokenizer.add_tokens(["f(): p"])
    other = tokenize_source(source, tokenizer, cache=cache)
    assert other.document(0).tolist() != first.document(0).tolist()
    source = make_text(tmp_path, ["def f(): pass", "x = 12"])
    assert len(tokenize_source(source, tokenizer, cache=cache).document(1)) > 0
    assert len(folders()) == 3


def test_processes_and_pieces_give_the_same_tokens_as_one_call(tmp_path, monkeypatch):
    monkeypatch.setattr("skipwise.tokens._PIECE", 40)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = ["".join(f"line {i}\n" for i in range(n)) for n in (3, 50, 7)]
    source = make_text(tmp_path, texts)
    one = tokenize_source(source, tokenizer, cache=tmp_path / "a")
    two = tokenize_source(source, tokenizer, cache=tmp_path / "b", num_proc=2)
    for i, text in enumerate(texts):
        # this tokenizer merges nothing over a line end, so cuts there leave no trace
        assert one.document(i).tolist() == tokenizer(text, verbose=False)["input_ids"]
        assert two.document(i).tolist() == one.document(i).tolist()
