"""What all tests share: `--long`, two threads, and one run of the micro preset."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(2)

import data  # noqa: E402  (found through the line above)
import train  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests marked long too")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes, runs only with --long")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="needs --long"))


@pytest.fixture(scope="session")
def micro_flags(tmp_path_factory) -> list[str]:
    """Flags of train.py for the micro preset on a prepared set of 600 scenes; --out is missing."""
    folder = tmp_path_factory.mktemp("data")
    data.prepare_shapes(folder, count=600)
    machine = ["--device", "cpu", "--precision", "fp32"]
    return ["--preset", "micro", "--data", str(folder), *machine]


@pytest.fixture(scope="session")
def micro_run(micro_flags, tmp_path_factory) -> Path:
    """Folder of a finished run of the micro preset; tests read it and change only copies."""
    out = tmp_path_factory.mktemp("run")
    train.main([*micro_flags, "--out", str(out)])
    return out
