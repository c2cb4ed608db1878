"""Whether the noise decides the number: the correlation, and the command on a micro run."""

import noise
import numpy as np
import pytest


def test_the_correlation_is_over_seeds_and_within_a_shape():
    seeds = np.array([0, 1, 2, 1])
    assert noise.correlation(np.array([[seeds, seeds + 1, seeds + 2]])) == pytest.approx(1)
    assert noise.correlation(np.array([[seeds, 3 - seeds]])) == pytest.approx(-1)
    assert noise.correlation(np.array([[seeds, [1, 2, 1, 0]]])) == pytest.approx(0)
    assert noise.correlation(np.array([[seeds, [2, 2, 2, 2]], [[3] * 4] * 2])) == 0
    assert noise.correlation(np.array([[seeds, seeds], [seeds, 3 - seeds]])) == pytest.approx(0)


def test_the_command(micro_run, tmp_path, capsys):
    noise.main(["--run", str(micro_run), "--out", str(tmp_path / "n.png"), "--seeds", "2"])
    said = capsys.readouterr().out
    assert said.count("correlation over seeds") == 2 and (tmp_path / "n.png").stat().st_size > 5000
