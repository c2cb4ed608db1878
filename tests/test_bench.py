"""The benchmark in its smallest form: that it runs, not how fast."""

import re

import bench_peers
import numpy as np
import pytest


@pytest.mark.parametrize("row", bench_peers.ROWS)
def test_peers(row, capsys):
    """A row prints lines of one form. All but e need the packages of requirements-bench.txt."""
    for package in ("diffusers", "transformers") if row != "e" else ():
        pytest.importorskip(package)
    bench_peers.main(["--rows", row, "--sizes", "micro", "--rounds", "1"])
    lines = re.findall(rf"^\| {row} .*", capsys.readouterr().out, re.M)
    assert lines
    for line in lines:
        assert re.fullmatch(r"\| .*, micro( \| \d+\.\d){2} \| \d+\.\d\d \(.*\) \| .* \|", line)


def test_a_row_is_medians_and_their_ratio():
    """Ours takes 2 ms in two rounds of three, the peer 3: the peer's is 1.5 times as much."""
    times = np.array([[0.002, 0.003], [0.002, 0.003], [0.004, 0.003]])
    assert bench_peers.table_row("x", times, "r") == "| x | 2.0 | 3.0 | 1.50 (1.12-1.50) | r |"
