"""The collator for other trainers: what it draws, and what it keeps of a record."""

import subprocess
import sys

import pytest
import torch
from other_trainers import POSE, L, T, loaded, make_records
from torch.utils.data import DataLoader

from skipwise import CREAM, PoSECollator, RandPos, SkipwiseError
from skipwise.preflight.batch import check_batch


@pytest.mark.parametrize(
    "sampler",
    [POSE, CREAM(train_length=L, target_length=T), RandPos(train_length=L, target_length=T)],
)
def test_a_batch_holds_the_records_own_tokens_at_skipping_positions_with_a_mask_of_ones(sampler):
    batch = PoSECollator(sampler)(make_records(4))
    keys = ("input_ids", "labels", "position_ids", "attention_mask")
    assert {k: tuple(v.shape) for k, v in batch.items()} == dict.fromkeys(keys, (4, L))
    assert (batch["attention_mask"] == 1).all()
    steps = batch["position_ids"].diff(dim=1)
    assert (steps >= 1).all() and (steps > 1).any() and batch["position_ids"].max() < T
    kept = batch["labels"] != -100
    assert (batch["labels"][kept] == batch["input_ids"][kept]).all() and kept.float().mean() > 0.9


def test_the_label_after_each_jump_of_the_text_is_masked():
    batch = PoSECollator(POSE)(make_records(8))
    jumps = batch["input_ids"].diff(dim=1) % 1000 != 1
    assert jumps.any()
    assert ((batch["labels"][:, 1:] == -100) == jumps).all()


def test_draws_depend_on_seed_epoch_and_tokens_alone():
    records = make_records(6)
    whole = PoSECollator(POSE, seed=3)(records)["position_ids"]
    alone = PoSECollator(POSE, seed=3)
    for row in (4, 0, 5):  # another order, another batch size, another collator
        assert torch.equal(alone([records[row]])["position_ids"][0], whole[row])
    assert len({tuple(row.tolist()) for row in whole}) == 6
    assert not torch.equal(PoSECollator(POSE, seed=4)(records)["position_ids"], whole)
    alone.set_epoch(1)
    assert not torch.equal(alone(records)["position_ids"], whole)
    alone.set_epoch(0)
    assert torch.equal(alone(records)["position_ids"], whole)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_what_one_process_draws_and_others_in_the_next_epoch(persistent):
    records = make_records(8)
    collator = PoSECollator(POSE)
    loader = DataLoader(
        records, batch_size=2, collate_fn=collator, num_workers=2, persistent_workers=persistent
    )
    for epoch in (0, 1):
        collator.set_epoch(epoch)
        positions = torch.cat([batch["position_ids"] for batch in loader])
        want = PoSECollator(POSE)
        want.set_epoch(epoch)
        assert torch.equal(positions, want(records)["position_ids"])


def test_a_masked_prompt_is_cut_as_the_tokens_are_and_stays_masked():
    records = make_records(8, 200)
    for record in records:
        record["labels"] = [-100] * 120 + record["input_ids"][120:]
    batch = PoSECollator(POSE)(records)
    for row, record in enumerate(records):
        index = (batch["input_ids"][row] - record["input_ids"][0]) % 1000  # place in the record
        want = torch.tensor(record["labels"])[index]
        jumps = torch.cat([torch.tensor([False]), index.diff() != 1])
        assert torch.equal(batch["labels"][row], want.where(~jumps, -100))
    assert (batch["labels"] != -100).any(1).all()


@pytest.mark.parametrize("key", ["completion_mask", "assistant_masks"])
def test_masks_that_older_trl_leaves_to_its_collator_become_labels(key):
    (record,) = make_records(1, 100)
    want = PoSECollator(POSE)([{**record, "labels": [-100] * 70 + record["input_ids"][70:]}])
    have = PoSECollator(POSE)([{**record, key: [0] * 70 + [1] * 30}])
    assert torch.equal(have["labels"], want["labels"])


def test_an_example_holds_a_label_however_short_the_answer():
    for length, answer in ((400, 20), (4000, 1)):
        records = make_records(16, length)
        for record in records:
            record["labels"] = [-100] * (length - answer) + record["input_ids"][-answer:]
        labels = PoSECollator(POSE)(records)["labels"]
        assert (labels[:, 1:] != -100).any(1).all()


def test_padding_of_a_record_is_taken_off():
    (record,) = make_records(1, 100)
    padded = {
        "input_ids": [5] * 3 + record["input_ids"] + [5] * 7,
        "attention_mask": [0] * 3 + [1] * 100 + [0] * 7,
    }
    want, have = PoSECollator(POSE)([record]), PoSECollator(POSE)([padded])
    assert all(torch.equal(want[key], have[key]) for key in want)


def test_a_short_record_stays_whole_at_plain_positions_and_its_padding_is_masked():
    short, long = {"input_ids": list(range(10, 30))}, make_records(1)[0]
    batch = PoSECollator(POSE, pad_token_id=9)([short, long])
    assert batch["input_ids"][0].tolist() == [*range(10, 30)] + [9] * (L - 20)
    assert batch["labels"][0].tolist() == [*range(10, 30)] + [-100] * (L - 20)
    assert batch["attention_mask"][0].tolist() == [1] * 20 + [0] * (L - 20)
    assert batch["position_ids"][0].tolist() == [*range(L)]  # counts on, without a zero
    assert (batch["attention_mask"][1] == 1).all()
    alone = PoSECollator(POSE)([short])
    assert alone["input_ids"].shape == (1, 20)
    with pytest.raises(SkipwiseError, match="20 tokens is shorter than train_length 64"):
        PoSECollator(POSE, short_records="raise")([short])


def test_a_short_record_gives_the_loss_that_it_has_alone(tiny):
    model = loaded(tiny)[0].eval()
    short = {"input_ids": list(range(10, 30))}
    for weights in ("none", "importance"):
        batch = PoSECollator(POSE, key_weights=weights)([short, make_records(1)[0]])
        row = {key: value[:1] for key, value in batch.items()}
        ids = torch.tensor([short["input_ids"]])
        with torch.no_grad():
            assert torch.isclose(model(**row).loss, model(ids, labels=ids).loss, atol=1e-6)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "words"}, "has text, and no input_ids"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2]}, "labels"),
        ({"input_ids": [[1, 2, 3]]}, "one sequence per record"),
        ({"input_ids": []}, "one sequence per record"),
    ],
)
def test_records_that_are_none_say_so(record, said):
    with pytest.raises(SkipwiseError, match=said):
        PoSECollator(POSE)([record])


def test_importance_weights_pass_the_preflight(tiny):
    model = loaded(tiny)[0]
    batch = PoSECollator(POSE, key_weights="importance")(make_records(4))
    assert batch["attention_mask"].shape == (4, 1, L, L)
    assert all(check.passed for check in check_batch(model, batch))
    with pytest.raises(SkipwiseError, match="choose one of none, importance"):
        PoSECollator(POSE, key_weights="some")  # type: ignore[arg-type]


def test_the_package_gives_the_collator_without_loading_torch_before():
    code = "import sys, skipwise; assert 'torch' not in sys.modules; skipwise.PoSECollator; "
    code += "assert 'torch' in sys.modules; skipwise.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "has no attribute 'nothing'" in done.stderr
