"""The figure of learning curves in its smallest form."""

import csv
import shutil
from itertools import product

import curves
import numpy as np
import pytest
import torch
from conftest import STAGES
from matplotlib.figure import Figure
from PIL import Image

import data
import model as M
import sample
import train

LOOKS = ("given", "10 %", "50 %", "100 %")


@pytest.fixture(scope="module")
def made(micro_flags, tmp_path_factory):
    """The flags of a run with copies, its folder and {(row's label, stage): panel}."""
    out = tmp_path_factory.mktemp("curves")
    flags = [*micro_flags, "--out", str(out)]
    curves.main(flags)
    axes = curves.make_figure(data.parse(train.Config, "", flags)).axes
    return flags, out, dict(zip(product(("curve", *LOOKS), STAGES), axes))


def content(panel):
    """What a panel shows: an array, or a text on one line."""
    if panel.images:
        return np.asarray(panel.images[0].get_array())
    return " ".join(panel.texts[0].get_text().split())


def test_every_stage_has_its_curve_and_looks(made):
    """The curves are the numbers in STAGE.csv, a step each."""
    _, out, panels = made
    assert Image.open(out / "curves.png").size == (918, 765)
    for stage in STAGES:
        raw, smooth = panels["curve", stage].lines
        rows = [*csv.reader((out / f"{stage}.csv").open())]
        assert [int(row[0]) for row in rows] == list(range(6))
        assert raw.get_ydata().tolist() == [float(row[1]) for row in rows]
        assert raw.get_xdata().tolist() == [float(row[4]) for row in rows]
        assert np.array_equal(smooth.get_ydata(), raw.get_ydata())  # a mean of one at six steps
        assert panels["curve", stage].get_title().startswith(f"{stage}: loss")
        for kind in LOOKS:
            what, written = content(panels[kind, stage]), stage == "understand" and kind != "given"
            prompted = stage in ("generate", "tune") and kind == "given"
            assert isinstance(what, str) == (written or prompted)
            assert isinstance(what, str) or what.shape == (64, 64, 3)


def test_the_last_looks_are_those_of_the_final_weights(made, micro_run):
    """What is copied changes nothing: the weights are those of a run that only trains. The looks
    at 100 % of all stages but generate, which tune goes on with, are what these weights make."""
    _, out, panels = made
    final = train.load_checkpoint(out / "checkpoint.pt")["model"]
    plain = train.load_checkpoint(micro_run / "checkpoint.pt")["model"]
    assert all(torch.equal(final[name], weights) for name, weights in plain.items())
    studio = sample.Studio(micro_run / "checkpoint.pt")
    picture = content(panels["given", "clip"])[None].copy()
    pixels = M.to_pixels(torch.from_numpy(picture))
    vectors, net, prompt = studio.see(picture), studio.net, [curves.PROMPT]
    rebuilt = net.clip.rebuild(net.clip.vectors(pixels))
    expected = {"clip": M.to_images(rebuilt)[0].numpy(), "decode": studio.decode(vectors, [0])[0]}
    expected["vae"] = M.to_images(net.vae.decode(net.vae.encode(pixels)))[0].numpy()
    expected["understand"] = studio.answer(vectors, ["describe"])[0]
    expected["tune"] = studio.draw(prompt, [0], studio.plan(prompt, [0]))[0]
    for stage, what in expected.items():
        assert np.array_equal(content(panels["100 %", stage]), what), stage
    for stage in set(STAGES) - {"understand"}:  # each stage's looks are of three checkpoints
        looks = [content(panels[kind, stage]).tobytes() for kind in LOOKS[1:]]
        assert len(set(looks)) == 3, stage


def test_the_same_command_draws_again(made):
    """Nothing is trained twice. Steps that a continued run has logged twice count once."""
    flags, out, _ = made
    before = (out / "checkpoint.pt").read_bytes()
    table = out / "clip.csv"
    table.write_text(table.read_text() + "5,7.0,1.0,0.0,9.0\n")
    curves.main(flags)
    assert (out / "checkpoint.pt").read_bytes() == before
    axis = Figure().subplots()
    curves.draw_curve(axis, table, (1, 3, 0))
    raw, *_ = axis.lines
    assert len(raw.get_ydata()) == 6 and raw.get_xydata()[-1].tolist() == [9, 7]


def test_the_running_mean(tmp_path):
    """Of 100 steps it is over two: a loss of 2, 4, 2, 4 ... has the mean 3 from step 2 on."""
    rows = [f"{i},{2 + i % 2 * 2},1,0,{i / 2}\n" for i in range(100)]
    (tmp_path / "vae.csv").write_text("".join(rows))
    axis = Figure().subplots()
    curves.draw_curve(axis, tmp_path / "vae.csv", (10, 50, 0))
    _, smooth = axis.lines
    assert np.allclose(smooth.get_ydata(), np.full(99, 3))
    assert smooth.get_xdata()[0] == 0.5
    (lines,) = axis.collections
    assert [line[0, 0] for line in lines.get_segments()] == [4.5, 24.5, 49.5]


def test_runs_without_copies_and_photos_are_refused(made, micro_run, tmp_path, capsys):
    flags, *_ = made
    other = shutil.copytree(micro_run, tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        curves.main([*flags, "--out", str(other)])
    assert stop.value.code == 2 and "take another" in capsys.readouterr().err
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text("a wall")
    data.main([str(photos), "--out", str(tmp_path / "set")])
    with pytest.raises(SystemExit) as stop:
        curves.main([*flags, "--data", str(tmp_path / "set")])
    assert stop.value.code == 2 and "is no set of shapes" in capsys.readouterr().err
