"""What all tests share: --long, two threads or OMP_NUM_THREADS, a finished run of a second."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

import train  # noqa: E402
from notebooks import shapes as world  # noqa: E402

STAGES = ("clip", "vae", "decode", "understand", "generate", "tune")
WIDTHS = ("clip_width", "width", "head_width", "decoder_width")
SIZES = {f"{stage}_steps": 6 for stage in STAGES} | dict.fromkeys(WIDTHS, 32)
SIZES |= {f"{stage}_batch": 4 for stage in STAGES if stage != "tune"}
SIZES |= {"clip_batch": 8, "generate_draws": 2, "depth": 1, "head_depth": 1, "decoder_depth": 1}
SIZES |= {"vae_width": 16, "save_every": 4, "device": "cpu", "precision": "fp32"}


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run what takes minutes too")


@pytest.fixture(scope="session")
def micro_flags(tmp_path_factory) -> list[str]:
    """Flags of train.py for a run of a second on a prepared set of 600 scenes; --out is missing."""
    folder = str(tmp_path_factory.mktemp("set"))
    world.main(["--out", folder, "--count", "600"])
    return ["--data", folder, *(f"--{name}={value}" for name, value in SIZES.items())]


@pytest.fixture(scope="session")
def micro_run(micro_flags, tmp_path_factory) -> Path:
    """Folder of a finished run with those flags; tests read it and change only copies."""
    out = tmp_path_factory.mktemp("run")
    train.main([*micro_flags, "--out", str(out)])
    return out
