"""A name on the Hub without a connection: an answer within five seconds, and no retries."""

import importlib
import importlib.util
import os
import socket
import subprocess
import sys
import time

import pytest

from skipwise.cli import main
from skipwise.models import hf_config


@pytest.fixture
def online(monkeypatch):
    """As on a machine where nobody has set HF_HUB_OFFLINE; returns how to set the Hub's address."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    hf_config.unreachable_hub.cache_clear()
    yield lambda url: monkeypatch.setattr(constants, "ENDPOINT", url)
    hf_config.unreachable_hub.cache_clear()


@pytest.fixture
def refused():
    """The address of a port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("verb", ["check", "plan", "extend", "eval"])
def test_a_hub_model_fails_in_two_lines_within_five_seconds(verb, online, refused, capfd):
    for module in ("pipeline.extend", "pipeline.stages", "evaluation.run", "planning", "report"):
        importlib.import_module(f"skipwise.{module}")  # imports are not what is timed
    online(refused)
    lengths = ["--lengths", "64"] if verb == "eval" else ["--to", "32k", "--data", __file__]
    started = time.monotonic()
    assert main([verb, "nobody/no-such-model", *lengths]) == 2
    seconds = time.monotonic() - started
    said = capfd.readouterr().err.splitlines()
    assert seconds < 5 and len(said) == 2, (seconds, said)
    assert said[1] == f"no connection to {refused}"


@pytest.mark.parametrize(
    "verb",
    ["plan", "extend", *(pytest.param(v, marks=pytest.mark.extended) for v in ("check", "train"))],
)
def test_a_hub_model_is_asked_for_before_the_slow_imports(verb):
    program = (
        "import sys; from skipwise.cli import main; "
        f"status = main(['{verb}', 'nobody/no-such-model', '--to', '32k', '--data', 'x.txt']); "
        "sys.exit(status + 10 * ('peft' in sys.modules or 'skipwise.pipeline' in sys.modules))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
    assert done.returncode == 2, done.stderr.decode()


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")
def test_a_hub_dataset_fails_without_retries(online, refused):
    from skipwise.data.readers import open_hub, parse_sources
    from skipwise.errors import SkipwiseError

    online(refused)
    (source,) = parse_sources(["nobody/no-such-books"])
    started = time.monotonic()
    with pytest.raises(SkipwiseError, match=r"nobody/no-such-books: no local file or folder"):
        open_hub(source)
    assert time.monotonic() - started < 5


def test_a_hub_that_answers_slowly_is_not_given_up(online):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()  # a connection opens, and no answer comes
        online(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hf_config.unreachable_hub() == ""


@pytest.mark.parametrize("hangs", ["create_connection", "getaddrinfo"])
def test_a_network_that_swallows_packets_is_given_up(hangs, online, monkeypatch):
    def hang(*arguments, **options):
        time.sleep(10)
        raise OSError("no answer")

    monkeypatch.setattr(socket, hangs, hang)
    monkeypatch.setattr(hf_config, "_CONNECT_SECONDS", 0.2)
    online("https://hub.invalid")
    started = time.monotonic()
    assert hf_config.unreachable_hub() == "https://hub.invalid"
    assert time.monotonic() - started < 2


def test_what_was_downloaded_is_still_read(online, refused, monkeypatch, tmp_path, tiny):
    from huggingface_hub import constants

    from skipwise.config.recipe import ModelSettings

    snapshot = tmp_path / "models--me--tiny" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (tmp_path / "models--me--tiny" / "refs").mkdir()
    (tmp_path / "models--me--tiny" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.HF_HUB_CACHE", str(tmp_path), raising=False)
    online(refused)
    assert hf_config.read_config("me/tiny", ModelSettings())["model_type"] == "llama"


def test_a_proxy_and_an_offline_machine_are_not_tried(online, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *arguments: pytest.fail("tried"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert hf_config.unreachable_hub() == ""
    hf_config.unreachable_hub.cache_clear()
    monkeypatch.delenv("HTTPS_PROXY")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hf_config.unreachable_hub() == ""
