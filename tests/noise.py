"""Does the noise decide how many objects are drawn? (Numerosity, arXiv 2510.11117.)

    python tests/noise.py --run weights/shapes.safetensors --out notebooks/noise.png

Each seed draws one to four circles, squares and triangles, at once and by a plan. The figure shows
how many objects the checker finds. The printed correlation is over seeds, between pictures of one
seed and shape whose prompts ask for different numbers. At 0 the noise has no say in the number.
"""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import shapeseval as se
from shapeseval import data, world
from tqdm import tqdm

from sample import Studio, find_run

NUMBERS = (1, 2, 3, 4)


def count(studio, seeds, planned):
    """Objects found in pictures of each shape, number and seed: (shapes, numbers, seeds)."""
    counts = np.zeros((len(world.SHAPES), len(NUMBERS), len(seeds)), int)
    for s, shape in enumerate(tqdm(world.SHAPES)):
        for n, number in enumerate(NUMBERS):
            prompts = [world.noun(shape, None, number)] * len(seeds)
            plans = studio.plan(prompts, seeds) if planned else None
            found = se.find_objects(studio.draw(prompts, seeds, plans))
            counts[s, n] = [len(objects) for objects in found]
    return counts


def correlation(counts):
    """Mean correlation over seeds between the rows of different numbers; constant rows are out."""
    pairs = [pair for rows in counts for pair in combinations(rows, 2)]
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs if a.std() and b.std()] or [0]))


@dataclass(frozen=True)
class Settings:
    """What to draw: the fields are the flags, the comments their help."""

    run: str = ""  # folder of a run, or a checkpoint; without, the newest below out/
    out: str = "out/noise.png"  # the figure
    seeds: int = 48  # noises for each prompt


def main(arguments=None):
    with data.plain_errors("noise.py"):
        s = data.parse(Settings, __doc__, arguments)
        Path(s.out).parent.mkdir(parents=True, exist_ok=True)
        studio, panels = Studio(find_run(s.run)), {}
        for name, planned in (("at once", False), ("by a plan", True)):
            panels[name] = count(studio, range(s.seeds), planned)
            right = np.mean(panels[name] == np.array(NUMBERS)[:, None])
            r = correlation(panels[name])
            print(f"{name}: the right number in {right:.3f}, correlation over seeds {r:.2f}")
        figure, axes = plt.subplots(1, 2, figsize=(8, 2.4), layout="constrained")
        for ax, (name, counts) in zip(axes, panels.items()):
            ax.imshow(counts.mean(0), vmin=0, vmax=5, cmap="viridis", aspect="auto")
            ax.set(title=name, xlabel="seed", ylabel="asked", yticks=range(4), yticklabels=NUMBERS)
        figure.colorbar(axes[1].images[0], ax=axes, label="objects found")
        data.write_whole(Path(s.out), lambda temporary: figure.savefig(temporary, format="png"))
        print(s.out)


if __name__ == "__main__":
    main()
