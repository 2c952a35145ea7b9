"""What tokenization says while it works: too little room, and who is waited for."""

import subprocess
import sys

import pytest

from skipwise.data.progress import warn_of_disk_space
from skipwise.data.token_cache import StoreProgress, lock_unfinished


def test_too_little_room_for_the_rest_is_told_once_it_can_be_foreseen():
    half = StoreProgress(num_tokens=10**9, num_bytes=4 * 10**9)
    needed = 2 * 10**9  # as many tokens again, of two bytes
    assert not warn_of_disk_space(half, 8 * 10**9, 2, needed)
    with pytest.warns(UserWarning, match=r"about 2 GB.*1 GB are free.*SKIPWISE_CACHE"):
        assert warn_of_disk_space(half, 8 * 10**9, 2, needed // 2)
    assert not warn_of_disk_space(half, None, 2, 0)  # of a stream the end is not known
    assert not warn_of_disk_space(
        StoreProgress(num_tokens=1, num_bytes=1), 10**12, 2, 0
    )  # too early to tell


def test_a_second_process_says_that_it_waits(tmp_path):
    with lock_unfinished(tmp_path / "tokens/x") as part:
        code = (
            "from pathlib import Path; from skipwise.data.token_cache import lock_unfinished\n"
            f"with lock_unfinished(Path({str(tmp_path / 'tokens/x')!r})): print('mine')"
        )
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        second = subprocess.Popen([sys.executable, "-c", code], **pipes)
        assert "waiting for it" in second.stderr.readline()
        assert second.poll() is None and part.name == "x.part"
    assert second.communicate()[0] == "mine\n"
