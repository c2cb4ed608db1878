"""kill -9 at any instant of preparing and training, then the same command again: same bits."""

import hashlib
import io
import multiprocessing
import shutil
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
    """Works in the folder, is killed after `patience` seconds -> where that was."""
    folder.mkdir(exist_ok=True)
    where = folder / "where"
    where.unlink(missing_ok=True)
    process = CONTEXT.Process(target=victim.work, args=(folder, f"{shards}/*.tar", PAUSE))
    process.start()
    process.join(patience)
    process.kill()
    process.join()
    return where.read_text().strip() if where.exists() else "before the start"


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
        for name in names - {"where", "said"}:
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


def test_a_few_kills_lose_nothing(uninterrupted, tmp_path, capsys):
    """Four kills, in each `make test` at other times."""
    places, ends = survive(uninterrupted, tmp_path, 4)
    with capsys.disabled():
        print(f"\n4 kills survived, {ends} runs ended the same: {dict(places)}")


@pytest.mark.long
def test_a_hundred_kills_lose_nothing(uninterrupted, tmp_path, capsys):
    """A hundred; at least ten land in a write that has begun and not yet come to its end."""
    places, ends = survive(uninterrupted, tmp_path, 100)
    inside = sum(n for place, n in places.items() if place.startswith(("writing", "renaming")))
    assert inside >= 10
    with capsys.disabled():
        print(f"\n100 kills survived, {inside} in a write, {ends} runs ended the same:")
        for place, n in sorted(places.items()):
            print(f"{n:4} {place}")
