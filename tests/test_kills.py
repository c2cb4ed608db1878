"""kill -9 at any instant of preparing and training, then the same command again: same bits."""

import hashlib
import io
import multiprocessing
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import victim
from safetensors.torch import load_file
from test_photos import shard

PAUSE = 0.02  # seconds between the two halves of a write, and before its rename
CONTEXT = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(folder of a run left in peace, shards, the seconds it took)."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for i in range(3):
        shard(folder / f"{i}.tar", 100 * i, 5 + i, i)
    CONTEXT.set_forkserver_preload(["victim"])  # imported once: later processes fork from it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        start(folder / "warm", folder)
    begun = time.monotonic()
    assert start(folder / "whole", folder) == "finished"
    return folder / "whole", folder, time.monotonic() - begun


def start(folder, shards, patience=None):
    """Works in the folder, is killed after `patience` seconds -> where; "finished" if sooner.

    Where is what victim.py told last, and the disk has to agree: a write that had begun has left
    a file that is not yet whole, younger than the process.
    """
    folder.mkdir(exist_ok=True)
    where = folder / "where"
    where.unlink(missing_ok=True)
    begun = time.time()
    process = CONTEXT.Process(target=victim.work, args=(folder, f"{shards}/*.tar", PAUSE))
    process.start()
    process.join(patience)
    process.kill()
    process.join()
    if process.exitcode == 0:
        return "finished"
    assert process.exitcode == -signal.SIGKILL, (folder / "said").read_text()
    place = where.read_text().strip() if where.exists() else ""
    stage, _, doing = place.partition(": ")
    torn = {path.name for path in folder.rglob("*.tmp") if path.stat().st_mtime >= begun}
    if doing.startswith("writing "):
        name = doing.removeprefix("writing ")
        grows = name.endswith(".npy") and stage in ("photos", "shapes")
        assert grows or f"{name}.tmp" in torn, (place, torn)
    elif not doing.startswith(("making ", "flushing ")):
        assert not torn, (place, torn)
    return place or "python: before the start"


def assert_same(ours, theirs):
    """Equal bit for bit, through dicts and lists; wall-clock seconds and folders are no result."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds", "metadata"}:
            assert_same(ours[name], theirs[name])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs):
            assert_same(*pair)
    else:
        assert torch.equal(ours, theirs) if torch.is_tensor(ours) else ours == theirs


def read(path):
    if path.suffix == ".partial":
        raw = path.read_bytes()
        assert hashlib.sha256(raw[32:]).digest() == raw[:32]
        return torch.load(io.BytesIO(raw[32:]), weights_only=True)
    return load_file(path) if path.suffix == ".safetensors" else path.read_bytes()


def compare(folder, whole):
    """Every file of a run: weights, averages, optimisers, logs, caches, pictures, sets."""
    for part in (".", "run", "shapes", "photos"):
        names = {path.name for path in (whole / part).iterdir() if path.is_file()}
        assert names == {path.name for path in (folder / part).iterdir() if path.is_file()}
        for name in names - {"where", "said"}:  # what victim.py tells
            assert_same(read(folder / part / name), read(whole / part / name))
    assert len([name for name in (whole).glob("kept-*.partial")]) == 6


def survive(uninterrupted, tmp_path, kills):
    """Kills at times uniform over the whole run's -> Counter of where; all ends are compared."""
    whole, shards, seconds = uninterrupted
    rng, places, folder, ends = np.random.default_rng(), Counter(), tmp_path / "run", 0
    while places.total() < kills:
        place = start(folder, shards, rng.uniform(0, seconds))
        if place == "finished":
            compare(folder, whole)
            shutil.rmtree(folder)
            ends += 1
        else:
            places[place] += 1
    assert start(folder, shards) == "finished", (folder / "said").read_text()
    compare(folder, whole)
    return places, ends + 1


def report(places, ends):
    """Prints where the kills landed: the writes, the stages, then each place."""
    words = Counter({"a write under way": 0})
    for place, n in places.items():
        stage, doing = place.split(": ")
        words[f"in stage {stage}"] += n
        words["a write under way"] += n * doing.startswith("writing ")
    print(f"\n{places.total()} kills survived, {ends} runs ended the same:")
    for counter in (words, places):
        print("; ".join(f"{n} {place}" for place, n in sorted(counter.items())))
    return words["a write under way"]


def test_a_few_kills_lose_nothing(uninterrupted, tmp_path, capsys):
    """Four kills, in each `make test` at other times."""
    survived = survive(uninterrupted, tmp_path, 4)
    with capsys.disabled():
        report(*survived)


@pytest.mark.long
def test_a_hundred_kills_lose_nothing(uninterrupted, tmp_path, capsys):
    """A hundred; at least ten in a write that is under way."""
    survived = survive(uninterrupted, tmp_path, 100)
    with capsys.disabled():
        assert report(*survived) >= 10
