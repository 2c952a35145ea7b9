"""The data set: a pure function of the example number, and honest about what it leaves out."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from additive_mask import additive_mask
from transformers import AutoTokenizer

from skipwise.config.parse import parse_recipe
from skipwise.data.collator import ExampleCollator
from skipwise.data.corpus import build_corpus
from skipwise.data.dataset import PoSEDataset
from skipwise.data.readers import parse_sources
from skipwise.data.token_cache import TokenStore
from skipwise.data.tokenize import tokenize_source
from skipwise.errors import SkipwiseError
from skipwise.models.attention.masks import with_chunk_weights
from skipwise.pipeline.quickstart import MODEL
from skipwise.pose.samplers import FullLength, PoSE
from skipwise.training.inputs import _check_files, _check_held_out, find_sources

L, T = 16, 64
BASE = {"model": "m", "target_length": "32k"}


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
    return PoSEDataset(corpus, pose, seed=seed, num_examples=num_examples)


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
    packed = corpus_of(store, short_documents="pack", between=(7,), target_length=20)
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


def test_records_that_could_not_be_read_are_named_where_nothing_is_long_enough():
    store = dataclasses.replace(store_of(3), num_bad_records=2, bad_records=["a.jsonl:2: not JSON"])
    with pytest.raises(SkipwiseError, match=r"2 records could not be read \(a.jsonl:2: not JSON\)"):
        corpus_of(store)


def test_the_collator_always_sends_a_mask():
    data = dataset_of(corpus_of(store_of(100, 300)))
    plain = ExampleCollator()([data[0], data[1]])
    assert plain["attention_mask"].tolist() == torch.ones(2, L).tolist()
    batch = ExampleCollator("importance")([data[0], data[1]])
    assert "position_ids" in batch and batch["chunk_ids"].shape == batch["input_ids"].shape
    made = with_chunk_weights(batch, torch.float32)
    assert set(made) == {"input_ids", "labels", "position_ids", "attention_mask"}
    low = torch.finfo(torch.bfloat16).min
    weighted = torch.from_numpy(additive_mask([data[k]["example"] for k in (0, 1)], low))
    assert torch.equal(made["attention_mask"], weighted)
    assert weighted.shape == (2, 1, L, L)
    example = data[0]["example"]
    cut, gap = int(example.lengths[0]), int(example.position_starts[1])
    row = weighted[0, 0, L - 1]
    assert row[:cut].tolist() == pytest.approx([np.log(gap / cut)] * cut)
    assert row[cut:].tolist() == [0.0] * (L - cut)
    assert (weighted[0, 0].triu(1) <= 0).all() and weighted[0, 0, 0, 1] < -1e30


def test_full_length_takes_whole_windows_at_plain_positions():
    data = PoSEDataset(
        corpus_of(store_of(100, 300), min_length=T),
        FullLength(target_length=T),
        seed=0,
        num_examples=9,
    )
    assert data[3]["position_ids"].tolist() == list(range(T))
    assert len(data) == 9


def packed_by_hand(store, min_length, target_length, between):
    """Short documents joined one by one in memory, as a reference."""
    joined, out = [], []
    for i in range(store.num_documents):
        if len(store.document(i)) < min_length:
            joined += [*store.document(i).tolist(), *between]
            if len(joined) >= target_length:
                out.append(joined)
                joined = []
    return [*out, joined] if len(joined) >= min_length else out


@pytest.mark.parametrize("between", [(7,), (7, 8, 9), ()])
def test_packed_documents_are_those_joined_in_memory_and_read_alike_from_any_place(between):
    rng = np.random.default_rng(0)
    for target_length in (L, 20, 64, 10_000):
        lengths = rng.integers(0, 30, 200)
        lengths[-2:] = 0  # nothing to read at the end
        store = store_of(*lengths)
        packed = corpus_of(
            store, short_documents="pack", between=between, target_length=target_length
        ).stores[1]
        expected = packed_by_hand(store, L, target_length, between)
        assert [d.tolist() for d in map(packed.document, range(packed.num_documents))] == expected
        whole = np.concatenate([np.array(d, np.int64) for d in expected])
        places = rng.integers(0, len(whole), (5, 9))
        assert packed.take(places).tolist() == whole[places].tolist()
        assert packed.read(3, 3).tolist() == []


def test_empty_documents_alone_pack_to_their_separators():
    store = TokenStore(tokens=np.zeros(0, np.uint16), offsets=np.zeros(41, np.int64))
    packed = corpus_of(store, short_documents="pack", between=(7,), target_length=20).stores[1]
    assert packed.document(1).tolist() == [7] * 20


def text_store(documents):
    """Documents as they are given."""
    return TokenStore(
        tokens=np.concatenate(documents).astype(np.uint32),
        offsets=np.concatenate([[0], np.cumsum([len(d) for d in documents])]),
    )


def passages(tokens, size):
    """All runs of so many tokens, as hashes of their bytes."""
    data = np.asarray(tokens, np.uint32).tobytes()
    return {hash(data[i : i + 4 * size]) for i in range(0, len(data) - 4 * size + 1, 4)}


def documents_of(corpus):
    (starts,), (lengths,) = corpus.starts, corpus.lengths
    return [corpus.stores[0].read(s, s + n) for s, n in zip(starts, lengths, strict=True)]


@pytest.mark.parametrize("num_documents", [10, 60, 300])
def test_documents_that_share_a_licence_and_differ_later_are_held_out_and_trained_on(
    num_documents,
):
    rng = np.random.default_rng(0)
    licence = rng.integers(0, 50_000, 600)
    documents = [
        np.concatenate([licence, rng.integers(0, 50_000, rng.integers(1500, 4000))])
        for _ in range(num_documents)
    ]
    corpus = corpus_of(text_store(documents), num_held_out="auto")
    assert len(corpus.held_out) == min(16, num_documents // 5)
    assert corpus.num_documents == num_documents - len(corpus.held_out)
    assert overlaps(corpus, corpus.held_out) == (0, 0)


def test_copies_and_overlapping_documents_of_evaluation_text_are_not_trained_on():
    rng = np.random.default_rng(1)
    books = [rng.integers(0, 50_000, 5000) for _ in range(40)]
    licence = rng.integers(50_000, 60_000, 700)
    documents = []
    for i, book in enumerate(books):
        documents.append(np.concatenate([licence, book]))
        other = rng.integers(0, 50_000, 3000)
        if i % 4 == 0:  # a copy under another licence
            documents.append(np.concatenate([licence[::-1], book]))
        if i % 4 == 1:  # 600 tokens quoted at any place
            documents.append(np.insert(other, int(rng.integers(0, 3000)), book[2000:2600]))
        if i % 4 == 2:  # a chapter, and the book with a chapter more
            documents += [book[3000:4000], np.concatenate([book, other])]
    corpus = corpus_of(text_store(documents), num_held_out="auto")
    assert len(corpus.held_out) >= 4
    bare = [tokens[~np.isin(tokens, licence)] for tokens in corpus.held_out]
    own = set().union(*(passages(tokens, 600) for tokens in bare))
    left = documents_of(corpus)
    assert own and not any(own & passages(tokens, 600) for tokens in left)
    dropped = len(documents) - len(left) - len(corpus.held_out)
    assert dropped <= 2 * len(corpus.held_out)  # only what overlaps


def test_a_document_shared_at_least_576_tokens_at_any_place_is_found():
    rng = np.random.default_rng(2)
    book, other = (rng.integers(0, 50_000, 5000) for _ in range(2))
    corpus = corpus_of(store_of(100))
    for place in (0, 1, 63, 511, 2000, 5000):
        documents = [np.insert(other, place, book[300 : 300 + 576]), book[:64], other]
        corpus = corpus_of(text_store(documents))
        assert overlaps(corpus, [book]) == (1, 1)  # the short one is part of the book
        assert overlaps(corpus, [other]) == (2, 0)


def test_what_is_no_evaluation_text_says_its_true_reason():
    same = [np.arange(700)] * 10
    assert (
        "10 documents of at least 64 tokens begin alike"
        in corpus_of(text_store(same), num_held_out="auto").none_held_out
    )
    assert (
        "no document has 64 tokens"
        in corpus_of(store_of(*[50] * 10), num_held_out="auto").none_held_out
    )
    assert "fewer than 128 tokens" in corpus_of(store_of(100), num_held_out=8).none_held_out
    assert corpus_of(store_of(100), num_held_out=0).none_held_out == "data.held_out=0"
    assert corpus_of(store_of(4000), num_held_out="auto").none_held_out == ""


@pytest.mark.parametrize(
    ("held_out", "count"), [("auto", 16), (3, 3), (40, 40), (0.25, 50), (0.001, 1)]
)
def test_held_out_is_a_number_or_a_share_of_the_documents(held_out, count):
    corpus = corpus_of(store_of(*[100] * 200), num_held_out=held_out)
    assert len(corpus.held_out) == count and corpus.num_documents == 200 - count


def test_held_out_beyond_what_there_is_is_an_error():
    with pytest.raises(SkipwiseError, match=r"data\.held_out=5 means 5 documents, and only 3 can"):
        corpus_of(store_of(*[50] * 10, 100, 100, 100), num_held_out=5)
    with pytest.raises(SkipwiseError, match=r"data\.held_out=10 means 10 documents, and only 9"):
        corpus_of(store_of(*[100] * 10), num_held_out=10)


def test_a_share_of_a_single_document_is_held_out_at_its_end():
    corpus = corpus_of(store_of(4000), num_held_out=0.25)
    assert len(corpus.held_out[0]) == 1000 and corpus.num_tokens == 3000


def test_the_check_warns_of_missing_evaluation_text_and_fails_where_it_is_trained_on():
    alike = corpus_of(text_store([np.arange(700)] * 10), num_held_out="auto")
    line = str(_check_held_out(alike, [], T, is_given=False))
    assert line.startswith("warn evaluation text: perplexity is not measured: 10 documents of at ")
    short = str(_check_held_out(alike, [np.arange(50) + 9000], T, is_given=True))
    assert short.startswith("warn evaluation text: 1 held-out documents, 0 of at least the target")
    copies = str(_check_held_out(alike, [np.arange(700)], T, is_given=True))
    assert copies.startswith("FAIL evaluation text: 10 of its documents are also trained on")
    other = corpus_of(store_of(1000, 1000), num_held_out="auto")
    line = str(_check_held_out(other, other.held_out, T, is_given=False))
    assert line == "ok   evaluation text: 1 held-out documents, 1 of at least the target length"
    quoted = np.concatenate([np.arange(300), 50_000 + np.arange(900)])
    line = str(_check_held_out(corpus_of(store_of(1000)), [quoted], T, is_given=True))
    assert (
        line.startswith("ok ")
        and "0 documents of data.sources share most of their text with one, and 1 a passage" in line
    )


def test_a_line_of_the_check_names_what_is_left_out_of_a_folder(tmp_path):
    for name in ("a.txt", "README.md", "load.sh", ".hidden"):
        (tmp_path / name).write_text(name)
    recipe = parse_recipe(BASE, [f"data.sources=[{tmp_path}]"])
    (check,) = _check_files(recipe)
    names = ".hidden, README.md, load.sh"
    assert str(check) == f"ok   left out: 3 files that are not texts: {names}"
    assert _check_files(parse_recipe(BASE, [f"data.sources=[{tmp_path / 'load.sh'}]"])) == []


def test_a_wrong_data_held_out_is_an_error():
    for value, word in (("-1", "give above 0"), ("1.5", "a share such as 0.05")):
        with pytest.raises(SkipwiseError, match=word):
            find_sources(parse_recipe(BASE, [f"data.held_out={value}", "data.sources=[.]"]))
    both = ["data.held_out=3", "data.sources=[.]", "data.eval_sources=[.]"]
    with pytest.raises(SkipwiseError, match=r"no effect with data\.eval_sources"):
        find_sources(parse_recipe(BASE, both))


def test_held_out_documents_do_not_depend_on_their_order():
    rng = np.random.default_rng(3)
    documents = [rng.integers(0, 1000, 300) for _ in range(100)]
    first = corpus_of(text_store(documents), num_held_out="auto")
    again = corpus_of(text_store(documents[::-1]), num_held_out="auto")
    held = [sorted(map(tuple, corpus.held_out)) for corpus in (first, again)]
    assert held[0] == held[1] and len(held[0]) == 16


def overlaps(corpus, documents):
    """How many documents are copies of one of these, and how many share a passage with one."""
    same, near, others = corpus.count_leaks(documents)
    return same + near, others


def copies(corpus, documents):
    return overlaps(corpus, documents)[0]


def test_a_copy_is_told_by_most_of_a_document():
    long = np.arange(1000)
    store = store_of(1000, 700, 512, 511, 30)
    corpus = corpus_of(store)
    assert copies(corpus, []) == 0
    assert copies(corpus, [long]) == 1
    assert copies(corpus, [np.concatenate([long[:600], 9000 + long[:400]])]) == 1
    assert overlaps(corpus, [np.concatenate([long[:300], 9000 + long[:700]])]) == (0, 1)
    short = 4000 + np.arange(30)
    assert copies(corpus, [short.astype(np.uint16)]) == 1
    assert copies(corpus, [short[:29], np.append(short, 1)]) == 0
    swapped = short[[1, 0, *range(2, 30)]]
    assert copies(corpus, [swapped]) == 0
    assert copies(corpus, [short, long, short]) == 2


def test_documents_are_compared_in_parts_where_they_are_many(monkeypatch):
    corpus = corpus_of(store_of(*[300] * 40))
    documents = [1000 * i + np.arange(300) for i in range(0, 40, 3)]
    whole = overlaps(corpus, documents)
    monkeypatch.setattr("skipwise.data.corpus._TOKENS", 500)
    monkeypatch.setattr("skipwise.data.corpus._ROWS", 7)
    assert overlaps(corpus, documents) == whole == (14, 0)
    assert len(corpus_of(store_of(*[300] * 40), num_held_out=4).held_out) == 4


def test_the_order_of_an_epoch_does_not_depend_on_the_width_of_its_numbers():
    data = dataset_of(corpus_of(store_of(*[50] * 1000)), seed=3)
    wide = np.random.default_rng([3, 5, 0, 1]).permutation(1000)  # int64
    assert [int(data.document(5000 + i)[0]) // 1000 for i in range(1000)] == wide.tolist()


def test_a_data_set_goes_to_its_workers_without_the_corpus(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text("".join(f"x{i}_{j} = {j}\n" for j in range(40)))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    store = tokenize_source(parse_sources([str(folder)])[0], tokenizer, cache=tmp_path / "cache")
    for min_length in (L, 10_000):  # as they are, and packed
        corpus = corpus_of(
            store, min_length=min_length, target_length=12_000, short_documents="pack"
        )
        data = PoSEDataset(corpus, PoSE(train_length=L, target_length=T), seed=0, num_examples=10)
        pickled = pickle.dumps(data)
        assert len(pickled) < store.tokens.nbytes / 2
        assert same(pickle.loads(pickled)[3], data[3])


def test_a_copy_fails_the_check_and_a_document_that_shares_much_is_counted():
    rng = np.random.default_rng(5)
    book, other = (rng.integers(0, 50_000, 5000) for _ in range(2))
    edition = np.concatenate([other[:700], book])  # the same book behind another preface
    corpus = corpus_of(text_store([book, edition, other]))
    assert corpus.count_leaks([book]) == (1, 1, 0)
    assert corpus.count_leaks([np.append(book, other[:50])]) == (1, 1, 0)
    assert corpus.count_leaks([rng.integers(0, 50_000, 5000)]) == (0, 0, 0)
    only_edition = corpus_of(text_store([edition, other]))
    line = str(_check_held_out(only_edition, [book], T, is_given=True))
    assert line.startswith("warn evaluation text: 1 held-out documents")
    assert "1 documents of data.sources share most of their text with one, and 0 a passage" in line
