"""The benchmark's rows that need no peers, at the micro size: that they run, not how fast."""

import re

import bench_peers
import pytest
import torch

TOWER = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def one_thread():
    """So small a size gains nothing from more, and beside other work it loses much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("row", ["d", "e"])
def test_rows_without_peers(row, capsys):
    """The command prints its one table with a line for the row."""
    bench_peers.main(["--rows", row, "--sizes", "micro", "--rounds", "1", "--tower", TOWER])
    head, rule, line = capsys.readouterr().out.strip().split("\n")[-3:]
    assert head.count("|") == rule.count("|") == line.count("|") == 6
    assert re.match(rf"\| {row} .*, micro \|( \d+\.\d \|){{2}} \d+\.\d\d \(", line)
    assert "data" in line or TOWER in line


def test_a_row_is_medians_and_their_ratio():
    """Ours takes 2 ms in two rounds of three, the peer 3: the peer's is 1.5 times as much."""
    times = bench_peers.np.array([[0.002, 0.003], [0.002, 0.003], [0.004, 0.003]])
    assert bench_peers.table_row("x", times, "r") == "| x | 2.0 | 3.0 | 1.50 (1.12-1.50) | r |"


def test_share_of_a_matmul():
    """The part meant for GPUs runs on a CPU as well, and counts its multiplications."""
    bench = bench_peers.Bench(rounds=1)
    (line,) = bench_peers.utilisation(bench, "micro", side=64, batches=[2])
    _, images, _, _, share = line.strip("| ").split(" | ")
    assert float(images) > 0 and float(share.rstrip("%")) > 0
