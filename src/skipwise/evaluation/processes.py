"""Evaluation by several processes: each scores its share of the trials, and all get all scores.

Every process does the same steps in the same order, and only rank 0 writes. Scores are small, so
that they travel by gloo, whatever the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from skipwise.config.machine import of_launcher, world_size
from skipwise.errors import SkipwiseError, first_line

_joined = False  # training has processes too, of which only the first measures


@contextmanager
def joined() -> Iterator[None]:
    """Meet the processes that the launcher started; those of one process alone do nothing."""
    global _joined
    if world_size() == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(of_launcher("LOCAL_RANK", 0))
    _meet(dist.init_process_group, "gloo", timeout=timedelta(days=7))  # for the longest share
    _joined = True
    try:
        yield
        _meet(dist.barrier)  # one that leaves takes its connections with it
    finally:
        _joined = False
        dist.destroy_process_group()


def of_main_process(value: Any) -> Any:
    """The value of rank 0, on every rank."""
    values = [value]
    if _joined:
        _meet(dist.broadcast_object_list, values)
    return values[0]


def shared(
    items: Sequence[Any], measure: Callable[[Sequence[Any]], Sequence[Any]], groups: Sequence[int]
) -> list[Any]:
    """`measure(items)`, one result an item, with the items shared out among the processes.

    Args:
        groups: of each item. Items of a group share work, and stay in one process where there are
            enough groups.

    Raises:
        SkipwiseError: the processes do not measure the same.
    """
    if not _joined:
        return list(measure(items))
    order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    turns = [order[group] for group in groups] if len(order) >= world_size() else range(len(items))
    own = [i for i, turn in enumerate(turns) if turn % world_size() == dist.get_rank()]
    found = measure([items[i] for i in own]) if own else []
    parts: list[Any] = [None] * world_size()
    _meet(dist.all_gather_object, parts, dict(zip(own, found, strict=True)))
    results = {i: result for part in parts for i, result in part.items()}
    if sorted(results) != list(range(len(items))):
        raise SkipwiseError("the processes measure different things: start them all at once again")
    return [results[i] for i in range(len(items))]


def _meet(call: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Of a launcher's variables half may be there; of the processes one may have ended."""
    try:
        call(*args, **options)
    except (ValueError, RuntimeError) as error:
        fix = "start them all at once again, or unset WORLD_SIZE for one process"
        raise SkipwiseError(f"the processes cannot meet: {first_line(error)}\n{fix}") from error
