"""The judge of sticker scenes: it reads captions, cuts pictures, and refuses near misses."""

import numpy as np
import stickers
import torch

import data


def scene(*boxes):
    """A picture of 64 px with one rectangle for each (x, y, w, h, color), and a set's row of it."""
    picture = np.full((64, 64, 3), 244, np.uint8)
    for x, y, w, h, color in boxes:
        picture[y : y + h, x : x + w] = color
    return picture


def test_captions_are_read():
    known = {"bell", "shopping bags", "gear"}
    for caption, wanted in {
        "a bell": ["bell"],
        "three bells": ["bell"] * 3,
        "a shopping bags below an gear": ["gear", "shopping bags"],
        "two shopping bagss": ["shopping bags"] * 2,
        "a gear and a bell": ["bell", "gear"],
    }.items():
        assert stickers.things(caption, known) == wanted


def test_parts_are_cut_apart():
    picture = scene((4, 4, 20, 10, 0), (40, 30, 10, 10, 90), (60, 60, 2, 2, 0))
    found = stickers.parts(picture)  # the speck of 2 px is none
    assert len(found) == 2 and all(part.shape == (128, 128, 3) for part in found)
    assert (found[0][60:68, 20:108] < 30).all() and (found[0][:30] > 230).all()  # in its middle
    assert stickers.parts(scene()) == []


class Colours(torch.nn.Module):
    """A tower by hand: an image's mean colour, then pixels that the judge is to leave out."""

    def forward(self, images):
        mean = images.float().mean((1, 2))[:, None]  # (B, 1, 3)
        return torch.cat([mean, torch.zeros(len(images), 1, 192)], dim=-1)


def test_the_judge_names_parts_and_refuses_near_misses(tmp_path):
    colors = {"bell": (250, 0, 0), "gear": (0, 250, 0), "bat": (0, 0, 250)}
    places = [(4 + i, 8 + i) for i in range(12)]
    texts, images = [], []
    for name, color in colors.items():
        texts += [data.captioned(f"a {name}") for _ in places]
        images += [scene((x, y, 16, 16, color)) for x, y in places]
    rows = {"images": torch.from_numpy(np.stack(images))}
    settings = {"kind": "photos", "side": 64, "channels": None, "out": str(tmp_path)}
    made = data.prepare(settings, {"a.safetensors": 0}, lambda _: (texts, rows, {}))
    judge = stickers.Judge(Colours(), made)
    red, green = colors["bell"], colors["gear"]
    one, two = scene((9, 9, 14, 14, red)), scene((5, 5, 14, 14, red), (40, 40, 14, 14, green))
    assert judge.name(np.stack([one, two, scene()])) == [["bell"], ["bell", "gear"], []]
    right = judge.score(np.stack([one, two]), [["bell"], ["bell", "gear"]])
    assert right["one"] == right["two different"] == 1
    wrong = judge.score(np.stack([two, one, one]), [["bell"], ["bell", "gear"], ["bell", "bell"]])
    assert wrong["one"] == wrong["two different"] == wrong["two or three equal"] == 0
    assert judge.score(np.stack([one]), [["bat"]])["one, number"] == 1
