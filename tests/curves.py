"""Learning curves to expect: each stage's loss over its seconds, and what it makes on the way.

    python tests/curves.py --data data/shapes --out out/curves

The flags are train.py's. Checkpoints at 10, 50 and 100 % of each stage are copied, and looked at
when all is trained: that costs no stage any seconds. The figure is curves.png in the run's folder.
"""

import shutil
import sys
from pathlib import Path
from textwrap import fill
from unittest.mock import patch

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data as D  # noqa: E402  (found through the line above)
import model as M  # noqa: E402
import train as T  # noqa: E402
from sample import Studio  # noqa: E402

PROMPT = "a red circle left of a blue square"


def stops(c, stage):
    """The steps at 10 and 50 % of a stage, and 0 for its end; () if it has no steps."""
    steps = getattr(c, f"{stage}_steps", 0)
    return (-(-steps // 10), -(-steps // 2), 0) if steps else ()


def save_some(run, stage, step=0, *rest, save=T.Run.save):
    """Run.save at the stops of stages alone, with a copy of each checkpoint."""
    if step in (0, *stops(run.config, stage)):
        save(run, stage, step, *rest)
        made = stage if step else T.ORDER[T.ORDER.index(stage) - 1]
        shutil.copy(run.path, run.out / f"{made}-{step}.pt")


def look(studio, stage, picture):
    """What a stage makes of a picture (1, S, S, 3) or of PROMPT: a picture (S, S, 3) or a text."""
    net, pixels = studio.net, M.to_pixels(M.torch.from_numpy(picture)).to(studio.device)
    if stage == "clip":
        return M.to_images(net.clip.rebuild(net.clip.vectors(pixels)))[0].numpy(force=True)
    if stage == "vae":
        return M.to_images(net.vae.decode(net.vae.encode(pixels)))[0].numpy(force=True)
    if stage == "decode":
        return studio.decode(studio.see(picture), [0])[0]
    if stage == "understand":
        return studio.answer(studio.see(picture), [D.DESCRIBE])[0]
    return studio.draw([PROMPT], [0], studio.plan([PROMPT], [0]))[0]


def draw_curve(axis, table, at):
    """The loss of each step and its running mean, from STAGE.csv; lines at the stops."""
    rows = {row[0]: row for row in np.loadtxt(table, delimiter=",", ndmin=2)}
    _, loss, *_, seconds = np.array([rows[step] for step in sorted(rows)]).T
    width = -(-len(loss) // 50)
    smooth = np.convolve(loss, np.full(width, 1 / width), "valid")
    axis.semilogy(seconds, loss, "0.85", seconds[width - 1 :], smooth, "C0")
    axis.vlines(seconds[np.array(at) - 1], 1e-4, 1e4, "0.6", linewidth=0.5)
    axis.set_title(f"{table.stem}: loss\n{len(loss)} steps, {seconds[-1]:.0f} s", fontsize=9)
    ticks = [digit * 10.0**power for power in range(-4, 4) for digit in (1, 2, 3, 5)]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(0.9 * smooth.min(), 1.1 * smooth.max())


def make_figure(c):
    """Columns are stages; rows are the curve, what is given, what is made at each stop."""
    made = D.PreparedSet(c.data)
    several = [i for i in made.val_ids if ";" in made.texts[i]["plan"]]
    picture = made.rows("images", several[:1]).numpy()
    stages = [stage for stage in T.STAGES if stops(c, stage)]
    figure = Figure((1.7 * len(stages), 8.5), dpi=90, layout="constrained")
    axes = figure.subplots(5, len(stages), squeeze=False)
    for stage, (curve, *panels) in zip(stages, axes.T):
        draw_curve(curve, Path(c.out, f"{stage}.csv"), stops(c, stage))
        shown = [PROMPT if stage in ("generate", "tune") else picture[0]]
        copies = [Path(c.out, f"{stage}-{step}.pt") for step in stops(c, stage)]
        shown += [look(Studio(copy), stage, picture) for copy in copies]
        for axis, what, label in zip(panels, shown, ("given", "10 %", "50 %", "100 %")):
            if isinstance(what, str):
                axis.text(0.5, 0.5, fill(what, 16), fontsize=8, ha="center", va="center")
            else:
                axis.imshow(what)
            axis.set(xticks=[], yticks=[], box_aspect=1, ylabel=label)
    return figure


def main(arguments):
    with D.plain_errors("curves.py"):
        c = D.parse(T.Config, __doc__, arguments)
        if D.PreparedSet(c.data).facts["kind"] != "shapes":
            raise ValueError(f"--data {c.data} is no set of shapes")
        if Path(c.out, "checkpoint.pt").exists() and not [*Path(c.out).glob("*-*.pt")]:
            raise ValueError(f"--out {c.out} has a run without copies: take another")
        with patch.object(T.Run, "save", save_some):
            T.main([*arguments, "--save_every=1"])
        path = Path(c.out, "curves.png")
        make_figure(c).savefig(path)
        Image.open(path).convert("RGB").quantize().save(path)  # half the bytes


if __name__ == "__main__":
    main(sys.argv[1:])
