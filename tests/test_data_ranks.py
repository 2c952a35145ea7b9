"""What each rank of a training reads, through accelerate as the Trainer does."""

import numpy as np
import pytest
import torch

from skipwise.data.corpus import build_corpus
from skipwise.data.dataset import PoSEDataset
from skipwise.data.token_cache import TokenStore
from skipwise.pose.samplers import PoSE

L, T = 16, 64


def dataset() -> PoSEDataset:
    """96 examples of 40 documents."""
    offsets = np.arange(0, 40 * 50 + 1, 50)
    store = TokenStore(tokens=np.arange(40 * 50, dtype=np.uint32), offsets=offsets)
    corpus = build_corpus([store], [None], min_length=L, target_length=T)
    pose = PoSE(train_length=L, target_length=T)
    return PoSEDataset(corpus, pose, seed=0, num_examples=16 * 6)


class Numbered(torch.utils.data.Dataset):
    """Tells which examples are read."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, k):
        return {"k": torch.tensor(k), "input_ids": torch.from_numpy(self.data[k]["input_ids"])}


def steps_read(data, num_processes, batch_size, num_steps, start=0, global_batch=16):
    """The examples that each step of each process reads, through accelerate as the Trainer does."""
    from accelerate.data_loader import prepare_data_loader, skip_first_batches

    accumulation = global_batch // (batch_size * num_processes)
    steps = [[] for _ in range(num_steps)]
    for rank in range(num_processes):
        loader = torch.utils.data.DataLoader(
            data, batch_size=batch_size, sampler=torch.utils.data.SequentialSampler(data)
        )
        shard = prepare_data_loader(
            loader, num_processes=num_processes, process_index=rank, put_on_device=False
        )
        if start:
            shard = skip_first_batches(shard, start * accumulation)
        batches = [batch["k"].tolist() for batch in shard]
        assert len(batches) == (num_steps - start) * accumulation
        for i, batch in enumerate(batches):
            steps[start + i // accumulation] += batch
    return steps


@pytest.fixture
def no_rng_exchange(monkeypatch):
    """Ranks are played one after another here, with no one to exchange random states with."""
    monkeypatch.setattr("accelerate.data_loader.synchronize_rng_states", lambda *args: None)


def test_every_example_is_read_once_by_one_rank_in_the_same_step_for_1_2_and_4_processes(
    no_rng_exchange,
):
    data = Numbered(dataset())
    for num_processes, batch_size in ((1, 16), (1, 2), (2, 8), (2, 1), (4, 2), (4, 4)):
        steps = steps_read(data, num_processes, batch_size, 6)
        assert [sorted(step) for step in steps] == [
            list(range(16 * i, 16 * (i + 1))) for i in range(6)
        ]


def test_a_run_resumed_with_another_number_of_processes_goes_on_with_the_next_examples(
    no_rng_exchange,
):
    data = Numbered(dataset())
    first = steps_read(data, 2, 2, 6)[:3]
    for num_processes, batch_size in ((1, 4), (4, 2), (2, 2)):
        rest = steps_read(data, num_processes, batch_size, 6, start=3)[3:]
        read = sorted(k for step in first + rest for k in step)
        assert read == list(range(16 * 6))
        assert [min(step) for step in rest] == [48, 64, 80]
