"""The data of nano-blip3o: a world of coloured shapes with captions, questions, an exact checker,
the ShapesEval prompts; a reader of real photos; and the prepared set on disk both are turned into.

    python data.py shapes --out data/shapes --count 60000 --seed 0
    python data.py photos 'shards/*.tar' --out data/photos --size 64 [--tower NAME]
"""

import glob
import inspect
import io
import json
import math
import os
import random
import re
import sys
import tarfile
import time
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, cycle, groupby, islice, permutations, product
from pathlib import Path

import numpy as np
import timm
import torch
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from torch.utils.data import BatchSampler
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from model import resize_grid


def require(condition, message):
    """ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def find_device(name="auto"):
    """The kind of device of that name; ValueError if there is none here."""
    here = [d for d in ("cuda", "mps", "cpu") if getattr(torch, d).is_available()]
    require(name in ("auto", *here), f"--device {name}: expected auto or {' or '.join(here)}")
    return here[0] if name == "auto" else name


# ------------------------------------------------------------------------------------ the world

SIDE = 64  # px
BACKGROUND = (244, 244, 244)
SHAPES = ("circle", "square", "triangle")
COLORS = {"red": (220, 45, 45), "green": (50, 165, 70), "blue": (50, 90, 220)}
COLORS |= {"yellow": (240, 215, 40), "purple": (150, 60, 185), "orange": (240, 125, 20)}
HELD_OUT = frozenset({("triangle", "red"), ("square", "green"), ("circle", "purple")})
# "red triangle"; "three triangles, one blue and two red"
HELD_OUT_NAMES = re.compile("|".join(f"{c} {s}|{s}s?, [^,]*{c}" for s, c in sorted(HELD_OUT)))
SEEN = [pair for pair in product(SHAPES, COLORS) if pair not in HELD_OUT]
# The direction of the first object from the second; y points down, as in the image.
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = ("zero", "one", "two", "three", "four")
TALL = math.sqrt(3) / 2  # height of the triangle's bounding box divided by its width
WINDOW = 30  # px, holds the largest object (26 px) and its soft edge

# A shape in a picture; x, y = centre of its bounding box and w, h = its size, in px.
Object = namedtuple("Object", "shape color x y w h")
# A text and what it asks for: (shape, color) pairs, None = not named; relation: first to second.
Prompt = namedtuple("Prompt", "text category objects relation", defaults=[None])


def noun(shape, color=None, count=1):
    """`noun("circle", "orange")` is "an orange circle", with count 2 "two orange circles"."""
    name = f"{color} {shape or 'shape'}" if color else shape or "shape"
    if count > 1:
        return f"{NUMBERS[count]} {name}s"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def joined(pairs, word):
    """The two (shape, color) with a word between: "a circle left of a blue square"."""
    return f" {word} ".join(noun(*pair) for pair in pairs)


def grammar(first, second):
    """All prompts, in GenEval's wording, on one of `first`, or on one of it and one of `second`."""
    couples = [(a, b) for a in first for b in second if a[0] != b[0] and (not a[1] or a[1] != b[1])]
    couples = list(dict.fromkeys(couples + [(b, a) for a, b in couples]))
    category = {c: "attribution" if c[0][1] or c[1][1] else "two" for c in couples}
    return {
        "single": [Prompt(noun(*a), "colors" if a[1] else "single", (a,)) for a in first],
        "counting": [Prompt(noun(*a, n), "counting", (a,) * n) for n in (2, 3, 4) for a in first],
        "two": [Prompt(joined(c, "and"), category[c], c) for c in couples],
        "position": [Prompt(joined(c, r), "position", c, r) for c in couples for r in RELATIONS],
    }


PLAIN = [(shape, None) for shape in SHAPES]
NAMED = PLAIN + SEEN + sorted(HELD_OUT)
PLAIN_PROMPTS, SEEN_PROMPTS = grammar(PLAIN, PLAIN), grammar(SEEN, SEEN)
# every prompt that this grammar has, by its text
PROMPTS = {p.text: p for prompts in grammar(NAMED, NAMED).values() for p in prompts}
FREE = [Prompt("", "free", ((None, None),) * n) for n in (1, 2, 3, 4)]
TRAINING_PROMPTS = [SEEN_PROMPTS["single"], SEEN_PROMPTS["two"], FREE, *PLAIN_PROMPTS.values()]


def deal(prompts, count, rng):
    """`count` prompts balanced over relation, number and held-out pair; repeated if too few."""
    mixed = [prompts[i] for i in rng.permutation(len(prompts))]
    strata = [(p.relation, len(p.objects), HELD_OUT.intersection(p.objects)) for p in mixed]
    turns = [strata[:i].count(stratum) for i, stratum in enumerate(strata)]
    return list(islice(cycle(mixed[i] for i in np.argsort(turns, kind="stable")), count))


def eval_prompts():
    """ShapesEval: {"seen": 553, "heldout": 198, "composed": 198 prompts}, the same for ever."""
    rng = np.random.RandomState(0)  # the legacy generator, because its stream is frozen
    plain, seen, held = PLAIN_PROMPTS, SEEN_PROMPTS, grammar(sorted(HELD_OUT), SEEN)
    parts = [(plain["single"], 80), (plain["two"], 99), (plain["position"], 100)]
    parts += [(seen["single"], 94), (seen["two"], 100)]
    parts += [(plain["counting"][3 * i : 3 * i + 3], n) for i, n in enumerate((26, 28, 26))]
    sets = {"seen": parts, "heldout": zip(held.values(), (48, 48, 54, 48))}
    sets["composed"] = zip(seen.values(), (48, 48, 54, 48))
    dealt = {name: [p for part in parts for p in deal(*part, rng)] for name, parts in sets.items()}
    return {name: [p[i] for i in rng.permutation(len(p))] for name, p in dealt.items()}


def category_prompts(rng, n):
    """n training prompts: equal shares of the six categories and of free scenes, none held out."""
    kinds = [TRAINING_PROMPTS[i % 7] for i in rng.permutation(n)]
    return [kind[int(u * len(kind))] for kind, u in zip(kinds, rng.random(n))]


def fits(wanted, item):
    """Whether an object, or a (shape, color), is the one that is wanted; None = any."""
    return wanted[0] in (None, item[0]) and wanted[1] in (None, item[1])


def box_offset(delta, sizes):
    """GenEval's offset of two boxes from their distance and summed sizes (..., 2): .5 = holds."""
    beyond = np.maximum(np.abs(delta) - 0.1 * sizes, 0)
    return np.sign(delta) * beyond / np.maximum(np.linalg.norm(delta, axis=-1), 1e-6)[..., None]


def relation(a, b):
    """The relations of object a to object b by GenEval's formula: a subset of RELATIONS."""
    offset = box_offset(np.subtract(a[2:4], b[2:4]), np.add(a[4:], b[4:]))
    return {name for name, direction in RELATIONS.items() if offset @ direction > 0.5}


def place(sizes, wanted, rng, tries=16):
    """Centres for objects of size (B, 4, 2), NaN = none: 1 px from the border, boxes 2 px apart.

    `wanted` (B, 2) is the direction of object 0 from object 1, or zeros. A scene that jams starts
    again with new positions and the same sizes: size must not betray the count.
    """
    centres, todo = np.zeros_like(sizes), np.arange(len(sizes))
    while len(todo):
        size, want = sizes[todo, :, None], wanted[todo, None]  # (b, 4, 1, 2), (b, 1, 2)
        spots = 1 + size / 2 + rng.random((len(todo), 4, tries, 2)) * (SIDE - 2 - size)
        centre, fine = spots[:, :, :1].copy(), np.ones(len(todo), bool)
        for k in range(4):
            delta, total = centre[:, :k] - spots[:, k, None], size[:, :k] + size[:, k, None]
            clash = ((np.abs(delta) - total / 2).max(-1) < 2).any(1)  # (b, tries); false for NaN
            if k == 1:  # 0.55, not 0.5: a tenth of a pixel in the checker must not turn the truth
                held = (box_offset(delta[:, 0], total[:, 0]) * want).sum(-1)
                clash |= held < 0.55 * np.abs(want).sum(-1)
            centre[:, k, 0] = spots[np.arange(len(todo)), k, clash.argmin(1)]
            fine &= ~clash.all(1)
        centres[todo[fine]] = centre[fine, :, 0]
        todo = todo[~fine]
    return centres


def coverage(shape, dx, dy, size):
    """Share of each pixel inside a shape of width `size` whose box centre lies (dx, dy) away."""
    if shape == "circle":
        distance = np.sqrt(dx * dx + dy * dy) - size / 2
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - size / 2
    else:
        side = TALL * np.abs(dx) - (dy + size * TALL / 2) / 2
        distance = np.maximum(side, dy - size * TALL / 2)
    return np.clip(0.5 - distance, 0, 1)


def paint(images, rows, shape, centre, size, rgb):
    """Adds one object of the same `shape` to each of images[rows]; centre (n, 2), size (n,) px."""
    corner = np.clip(np.round(centre - WINDOW / 2), 0, SIDE - WINDOW).astype(int)
    pixel = corner[:, None] + np.arange(WINDOW)[:, None]  # (n, WINDOW, 2)
    away = (pixel + 0.5 - centre[:, None]).astype(np.float32)
    share = coverage(shape, away[:, None, :, 0], away[:, :, None, 1], size[:, None, None])
    change = np.rint(share[..., None] * (rgb - BACKGROUND)[:, None, None])
    # uint8 addition wraps, so a negative change is exact too, and windows may overlap: the soft
    # shapes in them do not. Much faster than a float canvas.
    change = change.astype(np.int16).astype(np.uint8)
    images[rows[:, None, None], pixel[:, :, None, 1], pixel[:, None, :, 0]] += change


def draw_scenes(prompts, rng):
    """One random picture for each prompt -> uint8 (B, 64, 64, 3) and the list of its objects."""
    total, pairs = len(prompts), []
    for prompt, draws in zip(prompts, rng.random((total, 4))):
        # What is not named never becomes a held-out pair.
        choices = [[p for p in SEEN if fits(pair, p)] or [pair] for pair in prompt.objects]
        pairs.append([c[int(u * len(c))] for c, u in zip(choices, draws)])
    kinds = np.array([row + [("", "")] * (4 - len(row)) for row in pairs])  # (B, 4, 2)
    width = rng.uniform(14, 26, (total, 4)).astype(np.float32)
    width[kinds[..., 0] == ""] = np.nan
    height = np.where(kinds[..., 0] == "triangle", np.float32(TALL), 1) * width
    sizes = np.stack([width, height], -1)
    centres = place(sizes, np.array([RELATIONS.get(p.relation, (0, 0)) for p in prompts]), rng)
    jitter = rng.integers(-8, 9, (total, 4, 3))
    images = np.full((total, SIDE, SIDE, 3), BACKGROUND, np.uint8)
    for k, shape, color in product(range(4), SHAPES, COLORS):
        rows = np.flatnonzero((kinds[:, k] == (shape, color)).all(-1))
        rgb = (jitter[rows, k] + COLORS[color]).astype(np.float32)
        paint(images, rows, shape, centres[rows, k], width[rows, k], rgb)
    boxes = np.concatenate([centres, sizes], -1).tolist()
    return images, [[Object(*p, *b) for p, b in zip(row, box)] for row, box in zip(pairs, boxes)]


# ------------------------------------------------------------------------------------ the texts

FRAMES = ("{}", "{}", "a picture of {}", "an image with {}", "{} on a plain background")
FRAMES += ("{n}: {}", "a simple drawing of {}", "a white scene with {}", "you can see {}")
SAY = {name: (name, f"to the {name}") for name in ("left of", "right of")}
SAY |= {"above": ("above", "over"), "below": ("below", "under")}


def listing(parts):
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def long_caption(objects, links, rng):
    """Names every object with its color, and relations between objects that are unique."""
    objects = rng.sample(objects, len(objects))
    shapes, pairs = Counter(o.shape for o in objects), Counter(o[:2] for o in objects)
    parts = []
    for shape, n in shapes.items():
        colors = {color: k for (name, color), k in pairs.items() if name == shape}
        names = [noun(shape, color, k) for color, k in colors.items()]
        if len(colors) > 1 and rng.random() < 0.5:
            each = listing([f"{NUMBERS[k]} {color}" for color, k in colors.items()])
            names = [f"{noun(shape, None, n)}, {each}"]
        parts += names
    facts = [link for link in links if pairs[link[0][:2]] == pairs[link[2][:2]] == 1]
    rng.shuffle(facts)
    facts = list({frozenset(link[::2]): link for link in facts}.values())  # one for each couple
    if len(objects) == 2 and facts and rng.random() < 0.5:
        a, link, b = facts.pop()
        parts = [joined((a[:2], b[:2]), rng.choice(SAY[link]))]

    def name(o):
        return o.shape if shapes[o.shape] == 1 and rng.random() < 0.5 else f"{o.color} {o.shape}"

    text = rng.choice(FRAMES).format(listing(parts), n=noun(None, None, len(objects)))
    facts = facts[: rng.randint(1, 2)]
    clauses = [f"the {name(a)} {rng.choice(SAY[link])} the {name(b)}" for a, link, b in facts]
    return ", with ".join(filter(None, (text, " and ".join(clauses))))


def long_prompts(count=500):
    """Long captions of new scenes as prompts: exactly their objects are asked for."""
    rng, words = np.random.default_rng(2**31), random.Random(2**31)
    _, scenes = draw_scenes(category_prompts(rng, count), rng)
    texts = [long_caption(objects, scene_links(objects), words) for objects in scenes]
    return [Prompt(t, "long", tuple(o[:2] for o in scene)) for t, scene in zip(texts, scenes)]


def scene_links(objects):
    """All (object, relation, object) that hold in a scene."""
    return [(a, r, b) for a, b in permutations(objects, 2) for r in sorted(relation(a, b))]


def short_caption(prompt, objects, rng):
    """GenEval's wording, or only a part of the scene, as in real captions."""
    if prompt.text and rng.random() < 0.5:
        return prompt.text
    if len(objects) == 1:
        return rng.choice([noun(objects[0].shape), noun(None, objects[0].color)])
    part = rng.sample(objects, rng.randint(1, len(objects) - 1))
    return listing(list(dict.fromkeys(noun(o.shape, rng.choice([o.color, None])) for o in part)))


def bindings(objects, links):
    """[question, answer] pairs on what belongs together, with one right answer each."""
    shapes, colors = Counter(o.shape for o in objects), Counter(o.color for o in objects)
    between, ends = Counter((a, b) for a, _, b in links), Counter(link[1:] for link in links)
    pool = []  # (how many things the question could mean, question, answer): unique ones are asked
    for o in objects:
        pool.append((shapes[o.shape], f"what color is the {o.shape}?", o.color))
        pool.append((colors[o.color], f"what shape is the {o.color} object?", o.shape))
    for a, name, b in links:
        one, two = max(shapes[b.shape], ends[name, b]), max(shapes[a.shape], shapes[b.shape])
        where = f"where is the {a.shape} relative to the {b.shape}?"
        pool.append((one, f"what is {name} the {b.shape}?", f"{a.color} {a.shape}"))
        pool.append((max(two, between[a, b]), where, name))
    return [pair for n, *pair in pool if n == 1]


def questions(objects, links, rng):
    """4 to 6 [question, answer] pairs on a picture; "is there" is balanced."""
    shapes, present = Counter(o.shape for o in objects), sorted({o[:2] for o in objects})
    asked = {"yes": present, "no": [pair for pair in SEEN if pair not in present]}
    chosen = [[f"is there {noun(*rng.choice(pairs))}?", yes] for yes, pairs in asked.items()]
    pool = [["how many objects are there?", NUMBERS[len(objects)]]]
    pool += [[f"how many {shape}s are there?", NUMBERS[shapes[shape]]] for shape in SHAPES]
    pool += bindings(objects, links)
    chosen += rng.sample(pool, min(len(pool), rng.randint(2, 4)))
    return rng.sample(chosen, len(chosen))


def scene_texts(prompt, objects, seed, index):
    """The texts of training scene `index`: {"caption": str, "clean": str or None, "qa": [question,
    answer] pairs about the picture}."""
    rng, links = random.Random(seed * 1_000_003 + index), scene_links(objects)
    long = rng.random() < 0.9
    caption = long_caption(objects, links, rng) if long else short_caption(prompt, objects, rng)
    return {"caption": caption, "clean": prompt.text or None, "qa": questions(objects, links, rng)}


# ---------------------------------------------------------------------------------- the checker

PALETTE = np.array(list(COLORS.values()), np.float32)
SPECK = 12  # px2: what is larger counts as an object
SURE, MARGIN = 0.86, 0.05  # the overlap that a template needs, and its lead over the second
NEAR = 50  # greatest distance of a color from its palette entry


def box_sum(values, reach):
    """Sums (..., 64, 64) over the square of pixels within `reach` of each pixel."""
    band = np.tri(SIDE, k=reach, dtype=np.float32) - np.tri(SIDE, k=-reach - 1, dtype=np.float32)
    return band @ values @ band


def color_classes(offset):
    """Image minus background (64, 64, 3) -> palette index of each pixel, -1 = background."""
    rays = PALETTE - np.float32(BACKGROUND)
    length = np.linalg.norm(rays, axis=1)
    along = offset @ (rays / length[:, None]).T  # (64, 64, 6)
    reach, nearest = along.max(-1), along.argmax(-1)
    alpha = reach / length[nearest]
    # A pixel between two colors may look like a third: its neighbours decide, the purest loudest.
    purity = reach / np.maximum(np.linalg.norm(offset, axis=-1), 1)
    weight = np.clip(alpha, 0, 1) * np.clip(10 * purity - 9, 0, 1)
    votes = box_sum((nearest == np.arange(6)[:, None, None]) * weight, 2)  # (6, 64, 64)
    return np.where(alpha > 0.4, votes.argmax(0), -1)


def regions(classes):
    """int (64, 64), -1 = background -> the mask of each 8-connected region that is no speck."""
    padded = np.pad(classes, 1, constant_values=-1).ravel()  # (66 * 66,), so no step wraps around
    pixels = np.flatnonzero(padded >= 0)
    steps = np.add.outer((-SIDE - 2, 0, SIDE + 2), (-1, 0, 1)).ravel()
    near = pixels[:, None] + steps  # (pixels, 9)
    near = np.where(padded[near] == padded[pixels, None], near, pixels[:, None])
    label, before = np.arange(len(padded)), None
    while not np.array_equal(label, before):
        before = label.copy()
        label[pixels] = label[near].min(1)
        label = label[label]  # jumps: few rounds are enough
    numbers, areas = np.unique(label[pixels], return_counts=True)
    label = label.reshape(SIDE + 2, SIDE + 2)[1:-1, 1:-1]  # (64, 64)
    return [label == number for number in numbers[areas > SPECK]]


def fit_object(offset, own, taken):
    """The Object that a region is, or None where no template or color fits.

    offset (64, 64, 3): image minus background; own, taken bool (64, 64): the region, all others.
    """
    inner = own & (box_sum(~own, 1) == 0)
    ray = np.median(offset[inner if inner.any() else own], 0)
    alpha = np.clip(offset @ ray / max(ray @ ray, 1), 0, 1) * ((box_sum(own, 1) > 0) & ~taken)
    area, grid = alpha.sum() + 1e-6, np.arange(SIDE, dtype=np.float32) + 0.5
    x, y = alpha.sum(0) @ grid / area, alpha.sum(1) @ grid / area
    fitted = []
    for shape, filled in zip(SHAPES, (math.pi / 4, 1, TALL / 2)):
        # Area and centroid survive blur; the tips of a triangle, and so its box, do not.
        w = np.sqrt(area / filled)
        h, rise = (w * TALL, w * TALL / 6) if shape == "triangle" else (w, 0)
        template = coverage(shape, grid - x, (grid - y + rise)[:, None], w)
        overlap = np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum()
        fitted.append((overlap, shape, [float(v) for v in (x, y - rise, w, h)]))
    (second, *_), (best, shape, box) = sorted(fitted)[1:]
    apart = np.linalg.norm(ray + BACKGROUND - PALETTE, axis=1)
    if best < SURE or best - second < MARGIN or apart.min() > NEAR or not 11 <= box[2] <= 30:
        return None
    return Object(shape, list(COLORS)[apart.argmin()], *box)


def find_objects(images):
    """uint8 (B, 64, 64, 3) -> for each picture the Objects in it; None = a region of more than
    12 px2 that no template fits. Exact geometry, nothing learned; numpy, as torch's threads wait
    for one another on such small arrays."""
    found = []
    for image in images:
        offset = image - np.float32(BACKGROUND)
        classes = color_classes(offset)
        found.append([fit_object(offset, own, (classes >= 0) & ~own) for own in regions(classes)])
    return found


def judge(prompt, found, strict=True):
    """Whether the objects found in a picture are what the prompt asks for.

    Strict: exactly those objects and nothing else, and a named relation holds. Loose, as GenEval:
    further objects are free, but for more of the counted kind in counting.
    """
    items, n = [item for item in found if item], len(prompt.objects)
    if strict and len(found) != n:
        return False
    if prompt.category == "counting":
        return sum(fits(prompt.objects[0], item) for item in items) == n
    choices = [c for c in permutations(items, n) if all(map(fits, prompt.objects, c))]
    return any(not prompt.relation or prompt.relation in relation(*c) for c in choices)


# --------------------------------------------------------------------------------- image towers

EXAMPLE_TOWER = "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"
torch.set_float32_matmul_precision("high")  # TF32 on cards: for towers, training and sampling


class Tower(torch.nn.Module):
    """A frozen timm model: float (B, 3, side, side) in 0..1 -> patch tokens (B, tokens, C)."""

    def __init__(self, model, tokens):
        super().__init__()
        self.model, self.tokens, self.prefix = model, tokens, model.num_prefix_tokens
        self.normal = {key: list(model.pretrained_cfg[key]) for key in ("mean", "std")}
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        """Stays in evaluation mode: a parent's .train() must not wake its dropout."""
        return super().train(False)

    def forward(self, images):
        """(B, 3, side, side) -> (B, tokens, C), after the model's last norm, if it has one."""
        tokens = self.model.forward_features(v2.functional.normalize(images, **self.normal))
        return resize_grid(tokens[:, self.prefix :], self.tokens)


def open_tower(name, tokens=64, weights=None):
    """A frozen timm tower -> (Tower, {"mean", "std", "side"}).

    weights: None = timm's own from the hub, a file of them, or "untrained" (for tests).
    ValueError where the name, the file or the network does not give the tower that was asked for.
    """
    require(math.isqrt(tokens) ** 2 == tokens, f"--tokens {tokens}: expected a square, such as 64")
    patch = re.search(r"patch(\d+)", name)
    message = f"tower {name!r} is unknown: expected a timm ViT, e.g. {EXAMPLE_TOWER}"
    require(patch and name in timm.list_models() + timm.list_pretrained(), message)
    # timm builds such weights with plain GELU and only notes it; the features are wrong
    notes = str(getattr(timm.models.get_pretrained_cfg(name), "notes", ""))
    right = re.sub(r"_clip_(\d)", r"_clip_quickgelu_\1", name)
    require("QuickGELU" not in notes or right == name, f"use {right}: these weights need QuickGELU")
    eight = 8 * int(patch[1])  # the grid is a multiple of 8 patches, the side near 224 px
    side = eight * max(1, round(224 / eight))
    file = weights and {"file": str(weights)}
    options = {"num_classes": 0, "img_size": side, "pretrained_cfg_overlay": file}

    def create(pretrained):
        torch.manual_seed(0)
        return timm.create_model(name, pretrained=pretrained, **options)

    try:
        model = create(weights != "untrained")
        if weights != "untrained":  # timm takes what fits of any file, and leaves the rest random
            first = dict(create(False).named_parameters())
            left = [n for n, p in model.named_parameters() if p.ndim > 1 and p.equal(first[n])]
            require(not left, f"no weights there for {', '.join(left)}")
        tower = Tower(model, tokens)
    except Exception as error:  # the hub, safetensors and timm each have their own kinds
        source = weights or "timm's hub (go online, or give a file of its weights by --weights)"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"cannot open tower {name} from {source}: {reason:.200}") from error
    return tower, tower.normal | {"side": side}


# ---------------------------------------------------------------------------------- real photos

KINDS = {".txt": "txt"} | dict.fromkeys((".jpg", ".jpeg", ".png", ".webp"), "image")
MAX_BYTES, MAX_PIXELS = 64 * 2**20, 40_000_000
MAX_CAPTION, MAX_ROW = 2**16, 2**17  # bytes; a row of a table is a caption and a path
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # EPS would start Ghostscript
MIN_SIDE, MAX_ASPECT = 8, 3  # px; the longer side divided by the shorter
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit and its warning: ours is lower


def expand_sources(sources):
    """Glob patterns or paths -> sorted paths of tar shards, .tsv tables and folders."""
    patterns = [sources] if isinstance(sources, (str, Path)) else sources
    paths = [path for s in map(str, patterns) for path in sorted(glob.glob(s)) or [s]]
    for path in paths:
        known = os.path.isfile(path) and path.endswith((".tar", ".tar.gz", ".tgz", ".tsv"))
        require(known or os.path.isdir(path), f"{path} is no .tar shard, .tsv table or folder")
    return list(dict.fromkeys(paths))


def decode_image(data):
    """Bytes of an image file -> upright RGB PIL image; ValueError with the reason to drop it."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:
        raise ValueError("not an image") from error
    short, long = sorted(image.size)  # known from the header, before decoding
    require(short * long <= MAX_PIXELS, f"more than {MAX_PIXELS // 1_000_000} megapixels")
    fine = short >= MIN_SIDE and long <= MAX_ASPECT * short
    require(fine, f"a side under {MIN_SIDE} px or aspect beyond {MAX_ASPECT}")
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to white
            image = Image.fromarray(np.clip(np.asarray(image) / 257, 0, 255).astype(np.uint8))
        if image.mode != "RGB" or "transparency" in image.info:
            white, image = Image.new("RGBA", image.size, "white"), image.convert("RGBA")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise nearly anything on broken data
        raise ValueError("broken image") from error


def head(file):
    """The bytes of an open file, cut beyond MAX_BYTES."""
    with file:
        return file.read(MAX_BYTES + 1)


def read_file(path):
    """The bytes of a file, cut likewise, or None where the disk or its rights forbid it."""
    with suppress(OSError):
        return head(open(path, "rb"))


def files_of(folder):
    """Its files, those of one sample ("photo 1.2.jpg", "photo 1.2.txt") side by side."""
    return sorted(filter(os.path.isfile, Path(folder).rglob("*")), key=os.path.splitext)


class Header(tarfile.TarInfo):
    """A header of a tar; ValueError if it is a long name or the like, which is read whole."""

    @classmethod
    def frombuf(cls, *arguments):
        member = super().frombuf(*arguments)
        require(member.type not in b"xgXLK" or member.size <= MAX_ROW, "a header too long")
        return member


def entries(path):
    """(key, ending, bytes, None if unreadable) of the files of a tar, a table or a folder."""
    if os.path.isdir(path):
        names = [n for n in map(os.path.splitext, files_of(path)) if n[1].lower() in KINDS]
        yield from ((*name, read_file("".join(name))) for name in names)
    elif path.endswith(".tsv"):
        with open(path, "rb") as table:  # not csv, which merges rows that begin with a quote
            for number, line in enumerate(iter(lambda: table.readline(MAX_ROW), b"")):
                caption, _, name = line.rstrip(b"\r\n").partition(b"\t")
                image = Path(path).parent / os.fsdecode(name)
                yield str(number), ".txt", caption
                if os.path.isfile(image):
                    yield str(number), image.suffix, read_file(image)
                while line and not line.endswith(b"\n"):  # the rest of a row that is too long
                    line = table.readline(MAX_ROW)
    else:
        with tarfile.open(path, "r|*", tarinfo=Header) as shard:
            for member in filter(tarfile.TarInfo.isfile, shard):
                shard.members = []  # tarfile remembers every member otherwise
                data = head(shard.extractfile(member))
                require(len(data) == min(member.size, MAX_BYTES + 1), "a file that is cut")
                folder, name = os.path.split(member.name)
                stem, dot, ending = name.partition(".")  # at the first dot, as webdataset does
                yield os.path.join(folder, stem), dot + ending, data
            # tarfile takes a broken header for the end
            require(shard.fileobj.read(512) == bytes(512), "no end")


def members(path, dropped):
    """(key, "image" or "txt", bytes or None) of each file that matters; a broken tar ends early."""
    try:
        for key, ending, data in entries(path):
            # not what is hidden: macOS puts ._photo.jpg beside a file
            if os.path.basename(key)[:1] not in ("", ".") and ending.lower() in KINDS:
                yield key, KINDS[ending.lower()], data
    except Exception:  # tarfile raises nearly anything on broken headers
        dropped["truncated shard"] += 1


def read_groups(path, dropped):
    """Yields (key, {"image": bytes, "txt": bytes}) of each sample of a source."""
    seen = set()
    for key, group in groupby(members(path, dropped), key=lambda member: member[0]):
        parts = {}
        for _, kind, raw in group:  # thousands of one name must not be held at once
            dropped.update(["duplicate key"] * (kind in parts))
            parts.setdefault(kind, raw)
        if key not in seen:
            yield key, parts
        dropped.update(["duplicate key"] * (key in seen))
        seen.add(key)


def open_sample(sides, sample):
    """A sample of `read_groups` -> (key, image or its squares, caption), or a reason to drop it."""
    key, parts = sample
    try:
        require("image" in parts, "missing image")
        require("txt" in parts, "missing caption")
        require(None not in parts.values(), "unreadable file")
        require(max(map(len, parts.values())) <= MAX_BYTES, f"file over {MAX_BYTES // 2**20} MB")
        require(len(parts["txt"]) <= MAX_CAPTION, f"caption over {MAX_CAPTION} bytes")
        caption = " ".join(parts["txt"].decode("utf-8-sig", "replace").split())
        require(caption, "empty caption")
        require("\ufffd" not in caption, "caption is not UTF-8")
        image = decode_image(parts["image"])
    except ValueError as reason:
        return str(reason)
    return key, [square(image, side) for side in sides] or image, caption


def read_samples(sources, dropped, sides=(), workers=1):
    """Yields (key, RGB PIL image, caption) of every sound sample, in the order of the sources.

    What is wrong with a sample drops it and is counted by reason in `dropped`, a Counter. With
    `sides` the image is a list of its squares. So many threads (Pillow lets them run at once) open
    the next samples while the ones before are used.
    """
    with ThreadPoolExecutor(workers) as pool:
        for path in expand_sources(sources):
            opened = ()
            for samples in chain(BatchSampler(read_groups(path, dropped), BATCH, False), [()]):
                ready, opened = opened, pool.map(partial(open_sample, sides), samples)
                for sample in ready:
                    if isinstance(sample, str):
                        dropped[sample] += 1
                    else:
                        yield sample


def square(image, side):
    """The central square of a PIL image, resized -> uint8 (side, side, 3)."""
    image = v2.functional.center_crop(image, [min(image.size)] * 2)
    return np.asarray(v2.functional.resize(image, [side, side], InterpolationMode.BICUBIC))


# ------------------------------------------------------------------------------ the prepared set

FORMAT = {"shapes": 4, "photos": 5}  # raise one where an older folder must not be read
LIMITS = {"count": (2, 10**9), "seed": (0, 2**63), "size": (8, 1024), "tokens": (1, 4096)}
LIMITS |= {"workers": (1, 256)}
CHUNK, BATCH = 1000, 32  # scenes between two commits; photos opened, or stored, at once


def lock(folder):
    """Holds the folder inside of a `with`; ValueError if another process does."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(Path(folder) / ".lock").acquire(blocking=False)
    except Timeout as error:
        raise ValueError(f"{folder} is in use by another process") from error


def flush(path):
    """Waits until the file is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_whole(path: Path, write) -> None:
    """`write(temporary path)`, flush, rename: the file appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error


def write_json(path, value):
    """Writes JSON whole or not at all."""
    text = json.dumps({"crc32": zlib.crc32(json.dumps(value).encode()), **value}, indent=1)
    write_whole(Path(path), lambda temporary: temporary.write_text(text))


def read_json(path):
    """What `write_json` wrote; ValueError if anything in it has changed since."""
    # what no JSON raises, or none of ours
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        value = json.loads(path.read_text())
        if value.pop("crc32") == zlib.crc32(json.dumps(value).encode()):
            return value
    raise ValueError(f"{path} is damaged or was edited: delete its folder and prepare it again")


def append(path, rows, size):
    """Writes rows behind the first `size` bytes of rows in a .npy file; what was there is cut.

    Not through a memory map: a full disk would end the process without a word.
    """
    shape = (size // rows[0].nbytes + len(rows), *rows.shape[1:])
    facts = {"descr": rows.dtype.str, "fortran_order": False, "shape": shape}
    with open(path, "rb+" if size else "wb") as file:
        np.lib.format.write_array_header_1_0(file, facts)  # as long for any number of rows
        file.seek(size, os.SEEK_CUR)
        file.write(rows.tobytes())
        file.truncate()


def write_array(path, parts):
    """Writes a .npy file of arrays that follow each other, whole or not at all."""

    def write(temporary):
        size = 0
        for rows in parts:
            append(temporary, rows, size)
            size += rows.nbytes

    write_whole(path, write)


def open_array(path):
    """A memory map of a .npy file; ValueError if that is damaged."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy's parser of headers raises nearly anything
        advice = "delete meta.json or cache.safetensors beside it to make it again"
        raise ValueError(f"{path} is damaged ({type(error).__name__}): {advice}") from error


def write_set(out, settings, sources, read):
    """Writes what read(source, dropped) yields: [texts], {name: rows} -> PreparedSet.

    meta.json holds the files' sizes after each source, from which a later run goes on, and the
    version once the set is finished. ValueError where a set of other settings lies in the folder.
    """
    out, settings = Path(out), settings | {"format": FORMAT[settings["kind"]]}
    state = {"settings": settings, "units": 0, "count": 0, "arrays": {}, "dropped": {}}
    if (out / "meta.json").is_file():
        state = read_json(out / "meta.json")
        old = state["settings"]
        other = {k: old.get(k) for k in old | settings if old.get(k) != settings.get(k)}
        require(
            not other, f"{out} was prepared with other settings, {other!s:.200}: delete it first"
        )
    if "version" in state:
        return PreparedSet(out)
    arrays, dropped = Counter(state["arrays"]), Counter(state["dropped"])
    begun, old = time.perf_counter(), state["count"]
    with tqdm(initial=old, unit="image", desc=settings["kind"]) as bar:
        for source in sources[state["units"] :]:
            bar.set_postfix_str(f"part {state['units'] + 1} of {len(sources)}")
            for texts, rows in read(source, dropped):
                lines = [json.dumps(text, ensure_ascii=False).encode() for text in texts]
                ends = arrays["text"] + np.cumsum([len(line) for line in lines])
                rows |= {"text": np.frombuffer(b"".join(lines), np.uint8), "text_index": ends}
                for name, array in rows.items():
                    append(out / f"{name}.npy", array, arrays[name])
                    arrays[name] += array.nbytes
                state["count"] += len(texts)
                bar.update(len(texts))
            for name in arrays:
                flush(out / f"{name}.npy")  # before the commit, for a machine without power
            state |= {"units": state["units"] + 1, "arrays": arrays}
            state |= {"dropped": dict(sorted(dropped.items()))}
            write_json(out / "meta.json", state)
    lost, kept, size = dropped.total(), state["count"], arrays.total()
    facts = f"{size / max(kept, 1):,.0f} bytes each, {size / 1e6:,.1f} MB"
    rate = f"{(kept - old) / (time.perf_counter() - begun):,.1f} images/s"
    warning = "WARNING: MORE THAN HALF OF THE SAMPLES ARE LOST:" if lost > kept else ""
    reasons = f" {dict(dropped.most_common())}" if lost else ""
    print(warning, f"{kept} samples kept, {lost} dropped{reasons}; {facts}, {rate}")
    found = dict(dropped) or "no pictures; from a folder of shards 'FOLDER/*.tar' takes them"
    require(kept, f"no usable sample: {found}; delete {out} to try again")
    write_json(out / "meta.json", state | {"version": settings["format"]})
    return PreparedSet(out)


class PreparedSet:
    """A finished folder of `prepare_shapes` or `prepare_photos`, opened as memory maps.

    images: uint8 (N, S, S, 3); channels: C of a tower's `vectors`, None without; train_ids and
    val_ids: the split, 2 % or 500 or half, each photo on one side. ValueError if unfinished.
    """

    def __init__(self, folder):
        self.folder, path = folder, Path(folder) / "meta.json"
        self.meta = read_json(path) if path.is_file() else {}
        wanted = FORMAT.get(self.meta.get("settings", {}).get("kind"), 0)
        message = f"{folder} is not a finished set of this format: run data.py first"
        require(self.meta.get("version") == wanted, message)
        maps = {name: open_array(path.with_name(f"{name}.npy")) for name in self.meta["arrays"]}
        self.maps, self.images = maps, maps["images"]
        self.channels = math.prod(maps["features"].shape[2:]) if "features" in maps else None
        ranks, count = np.arange(len(self)), min(max(len(self) // 50, 500), len(self) // 2)
        if "pictures" in maps:  # one rank for a photo's rows, at random: the last shard may differ
            _, picture = np.unique(maps["pictures"], return_inverse=True)
            ranks = np.random.default_rng(0).permutation(len(self))[picture]
        first = max(np.sort(ranks)[-max(1, count)], np.unique(ranks)[:2].max())  # one photo trains
        self.train_ids, self.val_ids = np.flatnonzero(ranks < first), np.flatnonzero(ranks >= first)

    def __len__(self):
        return len(self.images)

    def vectors(self, ids):
        """A tower's features of these rows: float32 (B, tokens, C), however they are stored."""
        features = self.maps["features"][ids].astype(np.float32)
        if "scales" in self.maps:
            features *= self.maps["scales"][ids]
        return features.reshape(*features.shape[:2], self.channels)

    def texts(self, i):
        """{"caption": str, "clean": str or None, "qa": [[question, answer], ...]} of row i."""
        start, end = self.maps["text_index"][i - 1] if i else 0, self.maps["text_index"][i]
        return json.loads(self.maps["text"][start:end].tobytes())


def prepare_shapes(out="data/shapes", count=60000, seed=0):
    """Draws coloured shapes with texts into a folder.

    out: folder to write
    count: scenes
    seed: other scenes for another seed
    """

    def read(start, _):
        rng = np.random.default_rng([seed, start])
        prompts = category_prompts(rng, min(CHUNK, count - start))
        images, scenes = draw_scenes(prompts, rng)
        rows = enumerate(zip(prompts, scenes), start)
        yield [scene_texts(*row, seed, i) for i, row in rows], {"images": images}

    settings = {"kind": "shapes", "count": count, "seed": seed, "size": SIDE}
    with lock(out):
        return write_set(out, settings, range(0, count, CHUNK), read)


def fingerprint(path):
    """Changes with a source: the checksum of its files' names, sizes and times."""
    files = files_of(path) if os.path.isdir(path) else [Path(path)]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return zlib.crc32(repr(facts).encode())


def pack(features, int8):
    """float (B, N, C) -> the arrays that hold it: float16, or int8 and scales of 32 channels."""
    if not int8:
        return {"features": features.half().cpu().numpy()}
    blocks = features.unflatten(2, (-1, math.gcd(32, features.shape[2])))  # (B, N, C / 32, 32)
    scales = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-7).half()
    values = (blocks / scales.float()).round().clamp(-127, 127).to(torch.int8)
    return {"features": values.cpu().numpy(), "scales": scales.cpu().numpy()}


def prepare_photos(
    sources,
    out="data/photos",
    size=64,
    tower=None,
    tokens=64,
    weights=None,
    device="auto",
    int8=False,
    workers=8,
):
    """Reads photos with captions into a folder; see `read_samples`.

    sources: .tar shards, .tsv tables, folders; globs too
    out: folder to write
    size: px, square
    tower: timm tower whose features are stored too, e.g. vit_base_patch16_clip_224.laion2b
    tokens: vectors of the tower for an image
    weights: file of the tower's weights, or untrained; timm's hub without
    device: of the tower: auto, cpu, cuda or mps
    int8: store the features as int8 with scales, in 53 % of the bytes of float16
    workers: threads that open pictures
    """
    require(tower or not (weights or int8), "--weights and --int8 need --tower")
    paths, sides = expand_sources(sources), [size]
    names = [[os.path.basename(path), fingerprint(path)] for path in paths]
    settings = {"kind": "photos", "sources": names, "size": size, "tower": tower, "tokens": tokens}
    settings |= {"weights": weights and str(weights), "int8": int8}
    settings["weights_of"] = fingerprint(weights) if os.path.isfile(weights or "") else None
    if tower:
        device = find_device(device)
        model, facts = open_tower(tower, tokens, weights)
        model.to(device)
        settings |= facts
        sides.append(facts["side"])

    def read(path, dropped):
        for batch in BatchSampler(read_samples(path, dropped, sides, workers), BATCH, False):
            _, squares, captions = zip(*batch)
            images, *views = map(np.stack, zip(*squares))
            rows = {"images": images, "pictures": np.array([*map(zlib.crc32, images)], np.uint32)}
            if tower:
                pixels = torch.from_numpy(views[0]).to(device) / 255
                rows |= pack(model(pixels.permute(0, 3, 1, 2)), int8)  # of (B, 3, side, side)
            yield [{"caption": text, "clean": None, "qa": []} for text in captions], rows

    with lock(out):
        return write_set(out, settings, paths, read)


# ------------------------------------------------------------------------------ the command line


def add_flags(parser, function):
    """A flag for each parameter: default and type of the signature, help of the docstring."""
    texts = dict(re.findall(r"^ +(\w+): (.+)", function.__doc__, re.M))
    for name, parameter in inspect.signature(function).parameters.items():
        default, text = parameter.default, texts[name].replace("%", "%%")
        if default is False:
            parser.add_argument(f"--{name}", action="store_true", help=text)
        elif default in ((), parameter.empty):
            parser.add_argument(name, nargs="+" if default else "*", help=text)
        else:
            text += "" if default is None else f" (default {default})"
            kind = str if default is None else type(default)
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.set_defaults(function=function)


@contextmanager
def plain_errors(program, after=""):
    """What a user can get wrong inside of the `with` ends in one line and exit code 2, Ctrl-C in
    one with `after`."""
    try:
        yield
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        said = str(error) or type(error).__name__
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate", said):
            raise  # not the machine's limit but a mistake of ours
        ArgumentParser().exit(2, f"{program}: {said.splitlines()[0]}\n")
    except KeyboardInterrupt:
        ArgumentParser().exit(130, f"interrupted{after}\n")


def command_line(about, arguments, limits, function=None, **commands):
    """Calls `function` or the command that is named; what is wrong ends in one line and code 2."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # answers may hold any character
    parser = ArgumentParser(description=about, formatter_class=RawDescriptionHelpFormatter)
    if function:
        add_flags(parser, function)
    else:
        choices = parser.add_subparsers(required=True, metavar="|".join(commands))
        for name, command in commands.items():
            add_flags(choices.add_parser(name, help=command.__doc__.split("\n")[0]), command)
    options = vars(parser.parse_args(arguments))
    for name, (low, high) in limits.items():
        if not low <= options.get(name, low) <= high:  # nan is outside too
            parser.error(f"--{name} {options[name]}: expected {low} to {high}")
    with plain_errors(parser.prog, "" if function else ": the same command continues"):
        return options.pop("function")(**options)


def main(arguments=None):
    """Prepares the set that the command line describes."""
    made = command_line(__doc__, arguments, LIMITS, shapes=prepare_shapes, photos=prepare_photos)
    print(f"{made.folder}: {len(made)} images of {made.images.shape[1]} px")


if __name__ == "__main__":
    main()
