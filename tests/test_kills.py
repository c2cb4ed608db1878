"""kill -9 at any moment, then the same command again: nothing is lost, and the end is the same."""

import multiprocessing
import os
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import assert_equal, weights_of

import train

CONTEXT = multiprocessing.get_context("forkserver")
ORDER = "clip vae cache decode understand generate tune done".split()


def work(flags):
    """Runs in a process of its own."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        train.main(flags)


def start(flags, patience=None):
    """Runs the command, killed after `patience` seconds -> whether it ended by itself."""
    process = CONTEXT.Process(target=work, args=(flags,))
    process.start()
    process.join(patience)
    process.kill()
    process.join()
    assert process.exitcode in (0, -9)
    return process.exitcode == 0


@pytest.fixture(scope="module")
def uninterrupted(micro_flags, tmp_path_factory):
    """(weights of a run left in peace, seconds that it took)."""
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:  # imported once: later processes fork from it
        patch.setenv("PYTHONPATH", f"{here.parent}{os.pathsep}{here}")
        CONTEXT.set_forkserver_preload(["train"])
        assert start([*micro_flags, "--out", str(tmp_path_factory.mktemp("warm"))])
    out, begun = tmp_path_factory.mktemp("whole"), time.monotonic()
    assert start([*micro_flags, "--out", str(out)])
    seconds = time.monotonic() - begun
    return weights_of(out), seconds


def place_of(out):
    """(stage, step) of the checkpoint, which has to be whole."""
    path = out / "checkpoint.pt"
    if not path.exists():
        return 0, 0
    progress = train.load_checkpoint(path)["progress"]
    return ORDER.index(progress["stage"]), progress["step"]


LONG = pytest.mark.skipif("not config.getoption('--long')", reason="needs --long")


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=LONG)])
def test_kills_lose_nothing(micro_flags, uninterrupted, tmp_path, kills):
    """At times uniform over a whole run's. -s prints after which checkpoints they came."""
    weights, seconds = uninterrupted
    rng, places, run = np.random.default_rng(), [], 0
    flags = [*micro_flags, "--save_every=1"]
    while len(places) < kills:
        out = tmp_path / f"run{run}"
        before = place_of(out)
        ended = start([*flags, "--out", str(out)], rng.uniform(0, seconds))
        assert place_of(out) >= before
        if ended:
            assert_equal(weights_of(out), weights)
            run += 1
        else:
            places.append(place_of(out))
    assert start([*flags, "--out", str(out)])
    assert_equal(weights_of(out), weights)
    assert not list(tmp_path.glob("*/*.tmp"))
    print("killed after", *(f"{ORDER[stage]}:{step}" for stage, step in places))
    assert len(set(places)) > 4 * (kills == 20)
