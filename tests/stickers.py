"""Scores a run on scenes of stickers: are the right things drawn?

    python tests/stickers.py --run out/stickers --data data/stickers

Captions have GenEval's wording ("a bell", "two bats", "a bell left of a bat"). Pictures have a
plain background. The judge cuts a picture into its connected parts. It names each part by the
nearest class mean of a tower's features, from training pictures of one object. It looks at real
pictures (its ceiling), at those of other captions (its floor), at pictures after the VAE, after
encoders and decoders (redrawn), and at pictures drawn from captions.
"""

import re
from dataclasses import dataclass

import numpy as np
import shapeseval as se
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from shapeseval import data, share

import model as M
from sample import Settings as Drawing
from sample import Studio, find_run

LINKS = re.compile(" (?:left of|right of|above|below|and) ")
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3}
GROUPS = ("one", "two different", "two or three equal")


def things(caption, known):
    """The names of a caption's objects, sorted: "two bats" is ["bat", "bat"]."""
    found = []
    for part in LINKS.split(caption):
        number, name = part.split(" ", 1)
        name = name if name in known else name.removesuffix("s")
        found += [name] * NUMBERS[number]
    return sorted(found)


def group_of(names):
    """Which of GROUPS a scene with these objects belongs to."""
    if len(names) == 1:
        return "one"
    return "two or three equal" if len(set(names)) == 1 else "two different"


def parts(picture, size=128):
    """The connected parts of a picture (S, S, 3), each in a square of its own (size, size, 3)."""
    background = np.median(picture[[0, -1]].reshape(-1, 3), 0)
    drawn = np.abs(picture - background).max(-1) > 24
    labels, _ = ndimage.label(ndimage.binary_dilation(drawn))
    wide = Image.fromarray(np.pad(picture, ((64, 64), (64, 64), (0, 0)), mode="edge"))
    found = []
    for rows, columns in ndimage.find_objects(labels):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if height * width * 64**2 >= 60 * picture.shape[0] ** 2:  # else it is a speck
            half = max(height, width) / 2 + 1
            x, y = (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2
            box = wide.crop((x - half + 64, y - half + 64, x + half + 64, y + half + 64))
            found.append(np.array(box.resize((size, size), Image.BICUBIC)))
    return found


class Judge:
    """Names the parts of pictures. `known` is the sorted list of names."""

    def __init__(self, tower, dataset, limit=2500):
        self.tower = tower
        captions = [dataset.texts[i]["caption"] for i in dataset.train_ids]
        single = re.compile("(?:an?) ((?:(?!" + LINKS.pattern + ").)+)")
        names = [single.fullmatch(caption) for caption in captions]
        chosen = [(i, m[1]) for i, m in zip(dataset.train_ids, names) if m][:limit]
        pictures = dataset.rows("images", [i for i, _ in chosen]).numpy()
        cut = [parts(picture) for picture in pictures]
        kept = [(found[0], name) for found, (_, name) in zip(cut, chosen) if len(found) == 1]
        features = self.features([part for part, _ in kept])
        self.mean, self.std = features.mean(0), features.std(0) + 1e-3
        features = F.normalize((features - self.mean) / self.std, dim=1)
        self.known = sorted({name for _, name in kept})
        rows = [[n for n, (_, name) in enumerate(kept) if name == k] for k in self.known]
        self.centres = torch.stack([F.normalize(features[r].mean(0), dim=0) for r in rows])

    def features(self, squares):
        made = se.in_batches(lambda some: self.tower(torch.from_numpy(np.stack(some))), squares)
        return made[..., : -M.PATCH_PIXELS].mean(1)  # the pixels themselves do not count

    def name(self, pictures):
        """The sorted names of what each picture (B, S, S, 3) shows."""
        cut = [parts(picture) for picture in pictures]
        squares = sum(cut, [])
        if not squares:
            return [[] for _ in cut]
        features = F.normalize((self.features(squares) - self.mean) / self.std, dim=1)
        names = iter((features @ self.centres.T).argmax(1).tolist())
        return [sorted(self.known[next(names)] for _ in found) for found in cut]

    def score(self, pictures, wanted):
        """Shares of pictures that show exactly the wanted things, by their number and kind."""
        scores, seen = {}, self.name(pictures)
        for group in GROUPS:
            rows = [n for n, names in enumerate(wanted) if group_of(names) == group]
            scores[group] = round(share(seen[n] == wanted[n] for n in rows), 3)
            number = share(len(seen[n]) == len(wanted[n]) for n in rows)
            scores[f"{group}, number"] = round(number, 3)
        return scores


@dataclass(frozen=True)
class Settings:
    """What to score: the fields are the flags, the comments their help."""

    run: str = ""  # folder of a run, or a checkpoint; without, the newest below out/
    data: str = "data/stickers"  # the prepared set, of data.py
    tower: str = "tf_efficientnet_lite0"  # timm model of the judge
    weights: str = ""  # file of its weights; timm's hub without
    seed: int = 0  # of the noise
    out: str = "out/stickers.png"  # real pictures, redrawn and drawn ones to look at


def evaluate(s):
    se.Path(s.out).parent.mkdir(parents=True, exist_ok=True)
    dataset, studio = data.PreparedSet(s.data), Studio(find_run(s.run), Drawing(plan=False))
    judge = Judge(data.open_tower(s.tower, 64, s.weights), dataset)
    real = dataset.rows("images", dataset.val_ids).numpy()
    captions = [dataset.texts[i]["caption"] for i in dataset.val_ids]
    if not all(LINKS.split(caption)[0].split(" ")[0] in NUMBERS for caption in captions):
        raise ValueError(f"{s.data}: expected captions such as 'a bell' or 'two bats'")
    wanted = [things(caption, judge.known) for caption in captions]
    seeds = [s.seed * 1_000_000 + i for i in range(len(real))]
    pixels = M.to_pixels(torch.from_numpy(real)).to(studio.device)
    shown = {"real": real, "floor": np.roll(real, 1, 0)}
    shown["vae"] = M.to_images(studio.net.vae.decode(studio.net.vae.encode(pixels))).cpu().numpy()
    vectors = se.see_rows(studio, dataset, dataset.val_ids)
    shown["redrawn"] = se.in_batches(studio.decode, vectors, seeds)
    shown["drawn"] = se.in_batches(studio.draw, captions, seeds)
    for name, pictures in shown.items():
        print(f"{name}: PSNR {se.psnr(real, pictures):.1f} dB, {judge.score(pictures, wanted)}")
    rows = []
    for i in range(0, 50, 10):
        rows += [shown[name][i : i + 10] for name in ("real", "redrawn", "drawn")]
    sheet = Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in rows]))
    data.write_whole(se.Path(s.out), lambda temporary: sheet.save(temporary, "PNG"))
    print(s.out)


def main(arguments=None):
    with data.plain_errors("stickers.py"):
        evaluate(data.parse(Settings, __doc__, arguments))


if __name__ == "__main__":
    main()
