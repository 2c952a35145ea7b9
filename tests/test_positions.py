"""Positions: invariants of every sampler, the paper's statistics, coverage against brute force."""

import numpy as np
import pytest
from additive_mask import additive_mask

from skipwise.errors import SkipwiseError
from skipwise.pose.coverage import coverage
from skipwise.pose.samplers import CREAM, EndPrompt, FullLength, PoSE, RandPos

L, T = 16, 64
SAMPLERS = [
    PoSE(train_length=L, target_length=T, num_chunks=n, skips=gaps, content=content)
    for n in (1, 2, 3, 5, L)
    for gaps in ("sequential", "sorted")
    for content in ("uniform", "contiguous", "aligned")
] + [
    PoSE(train_length=L, target_length=T, chunk_lengths="first-half"),
    PoSE(train_length=L, target_length=T, unskipped_fraction=0.5),
    RandPos(train_length=L, target_length=T),
    FullLength(target_length=T),
    CREAM(train_length=L, target_length=T),
    CREAM(train_length=L, target_length=T, content="aligned"),
]


def draw(sampler, k, num_tokens=100):
    return sampler.sample(np.random.default_rng([7, k]), num_tokens)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
@pytest.mark.parametrize("num_tokens", [T, 100, 500])
def test_positions_increase_inside_the_target_and_text_inside_the_document(sampler, num_tokens):
    document = np.arange(num_tokens)
    for k in range(200):
        example = draw(sampler, k, num_tokens)
        position_ids = example.position_ids()
        assert position_ids.shape == (sampler.train_length,)
        assert position_ids[0] == 0 or isinstance(sampler, RandPos)
        assert (np.diff(position_ids) >= 1).all()
        assert position_ids[-1] < T
        assert (example.lengths >= 1).all()
        input_ids, labels = example.take(document)  # token = its index, so text is checked as well
        assert input_ids.shape == labels.shape == (sampler.train_length,)
        assert (np.diff(input_ids) >= 1).all(), "text only moves forward"
        assert input_ids[-1] - input_ids[0] < max(T, sampler.train_length)


def test_endprompt_puts_the_same_prompt_at_the_end_of_the_window():
    prompt = (901, 902, 903)
    sampler = EndPrompt(train_length=L, target_length=T, prompt=prompt)
    starts = set()
    for k in range(400):
        example = draw(sampler, k, 40)
        start = int(example.text_starts[0])
        input_ids, labels = example.take(np.arange(40))
        assert input_ids.tolist() == [*range(start, start + 13), *prompt]
        assert labels.tolist() == input_ids.tolist()  # none is masked
        assert example.position_ids().tolist() == [*range(13), 61, 62, 63]
        masked, _ = example.take(np.arange(40) >= 20)  # which tokens are masked: not the prompt's
        assert set(masked.tolist()) <= {0, 1}
        starts.add(start)
    assert starts == set(range(40 - L + 1))
    without = EndPrompt(train_length=24, target_length=T)
    assert draw(without, 0, 40).lengths.tolist() == [4, 20]
    with pytest.raises(SkipwiseError, match="more than the 20 tokens of its prompt"):
        EndPrompt(train_length=20, target_length=T)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_example_k_is_a_pure_function_of_seed_and_k(sampler):
    first, again, other = draw(sampler, 3), draw(sampler, 3), draw(sampler, 4)
    for name in ("lengths", "position_starts", "text_starts"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert first.text_starts.tolist() != other.text_starts.tolist() or (
        first.position_starts.tolist() != other.position_starts.tolist()
    )


def test_labels_are_masked_exactly_where_the_text_jumps():
    sampler = PoSE(train_length=L, target_length=T, num_chunks=3, content="uniform")
    for k in range(300):
        input_ids, labels = draw(sampler, k).take(np.arange(100))
        jumped = np.concatenate([[False], np.diff(input_ids) != 1])
        np.testing.assert_array_equal(labels == -100, jumped)
        np.testing.assert_array_equal(labels[~jumped], input_ids[~jumped])


def test_contiguous_text_has_no_jump_and_aligned_text_stands_at_its_positions():
    for k in range(100):
        example = draw(PoSE(train_length=L, target_length=T, content="contiguous"), k)
        assert (np.diff(example.take(np.arange(100))[0]) == 1).all()
        example = draw(PoSE(train_length=L, target_length=T, content="aligned", num_chunks=3), k)
        offset = example.take(np.arange(100))[0] - example.position_ids()
        assert (offset == offset[0]).all()


def test_biases_are_uniform_for_two_chunks():
    sampler = PoSE(train_length=L, target_length=T)
    biases = np.array(
        [e.position_starts[1] - e.lengths[0] for e in (draw(sampler, k) for k in range(9800))]
    )
    counts = np.bincount(biases, minlength=T - L + 1)
    assert len(counts) == T - L + 1 == 49
    assert abs(counts - 200).max() < 75  # five standard deviations of a binomial count


def test_first_half_cut_follows_the_released_code():
    sampler = PoSE(train_length=9, target_length=36, chunk_lengths="first-half")
    lengths = {int(draw(sampler, k).lengths[0]) for k in range(300)}
    assert lengths == {1, 2, 3, 4, 5}
    sampler = PoSE(train_length=9, target_length=36, chunk_lengths="random")
    assert {int(draw(sampler, k).lengths[0]) for k in range(300)} == set(range(1, 9))


def test_sequential_gaps_pile_up_at_the_far_end_and_sorted_gaps_do_not():
    def middle(gaps):
        sampler = PoSE(train_length=L, target_length=T, num_chunks=5, skips=gaps)
        examples = [draw(sampler, k) for k in range(2000)]
        return np.mean([e.position_starts[2] - e.lengths[:2].sum() for e in examples])

    assert middle("sorted") == pytest.approx(0.4 * 48, abs=1.0)  # 2nd of 4 order statistics
    assert middle("sequential") == pytest.approx(0.75 * 48, abs=1.0)  # 1 - 1/4


def test_all_chunks_of_one_token_is_randpos_up_to_its_start():
    assert coverage(PoSE(train_length=L, target_length=T, num_chunks=L, skips="sorted"))[
        1:40
    ] == pytest.approx(coverage(RandPos(train_length=L, target_length=T))[1:40], abs=0.12)


def test_cream_shows_both_ends_of_the_window_and_its_middle_follows_the_factor():
    for target in (64, 256):
        sampler = CREAM(train_length=L, target_length=target)
        examples = [draw(sampler, k, 500) for k in range(2000)]
        assert all(e.position_ids()[-1] == target - 1 for e in examples)
        ends = [(e.position_starts[1] + e.lengths[1] + e.lengths[0]) / L for e in examples]
        f = target / L
        assert np.mean(ends) == pytest.approx((1 + f) / 2 + 0.4, abs=0.5)


def brute_force(sampler):
    """Every cut and every bias of a two-chunk PoSE, each as likely as the others."""
    length, target = sampler.train_length, sampler.target_length
    cuts = range(1, (length + 1) // 2 + 1 if sampler.chunk_lengths == "first-half" else length)
    shown, total = np.zeros(target), 0
    for first in cuts:
        for bias in range(target - length + 1):
            p = np.concatenate([np.arange(first), np.arange(first, length) + bias])
            shown[np.unique(np.abs(p[:, None] - p[None, :]))] += 1
            total += 1
    return shown / total


@pytest.mark.parametrize("cut", ["random", "first-half"])
@pytest.mark.parametrize(("length", "target"), [(8, 8), (8, 16), (9, 40), (16, 64)])
def test_exact_coverage_equals_brute_force(cut, length, target):
    sampler = PoSE(train_length=length, target_length=target, chunk_lengths=cut)
    np.testing.assert_allclose(coverage(sampler), brute_force(sampler), atol=1e-12)


def test_sampled_coverage_agrees_with_brute_force():
    sampler = PoSE(train_length=8, target_length=32, num_chunks=3, skips="sorted")
    rng, shown = np.random.default_rng(1), np.zeros(32)
    for _ in range(4000):
        p = sampler.sample(rng, 32).position_ids()
        shown[np.unique(np.abs(p[:, None] - p[None, :]))] += 1
    sampled = coverage(sampler, num_samples=4000)
    np.testing.assert_allclose(sampled, shown / 4000, atol=0.05)


def test_coverage_of_the_far_end_is_the_published_figure():
    # METHOD section 5: a far distance is seen in ~13 % of examples at f = 8, ~1.5 % at f = 64
    assert coverage(PoSE(train_length=256, target_length=2048))[1200] == pytest.approx(
        0.142, abs=2e-3
    )
    assert coverage(PoSE(train_length=256, target_length=256 * 64))[9000] == pytest.approx(
        0.0158, abs=1e-3
    )


def test_importance_weights_restore_the_number_of_keys_by_hand():
    # two chunks of 2 and 2 tokens at positions 0, 1 and 6, 7: chunk 0 stands for positions 0 .. 5
    sampler = PoSE(train_length=4, target_length=8)
    example = next(
        e
        for e in (draw(sampler, k, 8) for k in range(500))
        if e.lengths.tolist() == [2, 2] and e.position_starts.tolist() == [0, 6]
    )
    w = np.log(6 / 2)
    expected = np.array([[0, -9, -9, -9], [0, 0, -9, -9], [w, w, 0, -9], [w, w, 0, 0]], np.float32)
    np.testing.assert_allclose(additive_mask([example], -9.0)[0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS[:30], ids=repr)
def test_softmax_denominator_of_flat_logits_counts_every_position(sampler):
    """With equal logits, the last query's denominator is the number of positions before the last
    chunk plus its own keys: what the full-length sequence has."""
    for k in range(50):
        example = draw(sampler, k)
        row = additive_mask([example], -np.inf)[0, 0, -1]
        assert np.exp(row).sum() == pytest.approx(example.position_ids()[-1] + 1, rel=1e-5)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: PoSE(train_length=64, target_length=32), "below train_length"),
        (lambda: PoSE(train_length=8, target_length=32, num_chunks=9), "1 .. 8 chunks"),
        (
            lambda: PoSE(
                train_length=8, target_length=32, num_chunks=3, chunk_lengths="first-half"
            ),
            "chunk_lengths=ran",
        ),
        (lambda: PoSE(train_length=8, target_length=32, skips="odd"), "sequential, sorted"),
        (lambda: PoSE(train_length=8, target_length=32, unskipped_fraction=2), "0 .. 1"),
        (lambda: draw(PoSE(train_length=8, target_length=32), 0, 7), "too short"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(build, words):
    with pytest.raises(SkipwiseError, match=words):
        build()
