"""Faults at random file operations of `extend`; `make torture` tries many more."""

import random
import shutil

import pytest
from fault_runs import Bench, differences, is_clear, outcome

pytestmark = pytest.mark.extended


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("faults"), steps=4)
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def straight(bench):
    """The undisturbed run and the number of its operations."""
    out = bench.folder / "straight"
    code, said, operations, _ = bench.run(out, "count:0")
    assert code == 0, said
    return outcome(out), operations


def test_the_injector_sees_every_phase_and_its_fault_hits(bench, straight):
    expected, operations = straight
    assert operations > 300 and expected["parts left"] == []
    out = bench.folder / "seen"
    code, said, count, hit = bench.run(out, "kill:100")
    assert code == -9 and count == 100 and str(out) in hit, said
    code, said, _, hit = bench.run(out, "full:40")
    assert is_clear(code, said) and hit and ("no space left" in said or "is full" in said)


def test_another_end_would_be_seen(bench, straight):
    expected, _ = straight
    out = bench.folder / "other"
    shutil.copytree(bench.folder / "straight", out)
    assert differences(expected, outcome(out)) == []
    file = out / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert differences(expected, outcome(out)) == ["model/model.safetensors"]


@pytest.mark.parametrize("kind", ["kill", "full", "readonly"])
def test_a_chain_of_faults_ends_as_the_undisturbed_run(bench, straight, kind):
    expected, operations = straight
    rng, out, hits = random.Random(kind), bench.folder / kind, []
    for _ in range(2):
        code, said, _, hit = bench.run(out, f"{kind}:{rng.randint(1, operations // 4)}")
        assert code == (-9 if kind == "kill" else 2) and hit, (hit, said)
        assert kind == "kill" or is_clear(code, said), (hit, said)
        hits.append(hit)
    code, said, *_ = bench.run(out)
    assert code == 0, said
    assert differences(expected, outcome(out)) == [], hits


@pytest.mark.parametrize("file", ["run.json", "tokens.bin", "complete", "optimizer.pt"])
def test_a_file_that_was_damaged_meanwhile_changes_nothing(bench, straight, file):
    expected, _ = straight
    out = bench.folder / f"damaged-{file}"
    cache = out.with_name(f"{out.name}-cache")
    for number in (400, 300, 200, 100):  # into training, on a run of any number of operations
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)
        assert bench.run(out, f"kill:{number}")[0] == -9
        if list(out.glob("checkpoints/*/complete")):
            break
    found = [*out.rglob(file), *cache.rglob(file)]
    assert found
    for path in found:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1 << 6
        path.write_bytes(content)
    code, said, *_ = bench.run(out)
    if file == "run.json" and code != 0:
        assert is_clear(code, said) and "remove" in said, said
        (out / file).unlink()
        code, said, *_ = bench.run(out)
    assert code == 0, said
    # What training took was in run.json alone; the card says that it was lost.
    lost = ("run.json", "model/README.md") if file == "run.json" else ("run.json",)
    assert "Rescaled without" not in (out / "model" / "README.md").read_text()
    changed = [k for k in differences(expected, outcome(out)) if not any(one in k for one in lost)]
    assert changed == [], said
