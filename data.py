"""
The data of nano-blip3o: a world of coloured shapes with captions, questions, an exact checker and
the ShapesEval prompts; a reader of real photos; and the prepared set on disk both are turned into.

    python data.py shapes --out data/shapes --count 60000 --seed 0
    python data.py photos 'shards/*.tar' --out data/photos --size 64 [--tower NAME]
"""

import argparse
import glob
import io
import json
import math
import os
import random
import re
import sys
import tarfile
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import combinations, islice, permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as V
from tqdm import tqdm

# ------------------------------------------------------------------------------------ the world

SIDE = 64  # px
BACKGROUND = (244, 244, 244)
SHAPES = ("circle", "square", "triangle")
COLORS = {"red": (220, 45, 45), "green": (50, 165, 70), "blue": (50, 90, 220)}
COLORS |= {"yellow": (240, 215, 40), "purple": (150, 60, 185), "orange": (240, 125, 20)}
HELD_OUT = {("triangle", "red"), ("square", "green"), ("circle", "purple")}
SEEN = [(shape, color) for shape in SHAPES for color in COLORS if (shape, color) not in HELD_OUT]
CATEGORIES = ("single", "two", "counting", "colors", "position", "attribution")
# The direction of the first object from the second; y points down, as in the image.
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = ("zero", "one", "two", "three", "four")
PALETTE = np.array(list(COLORS.values()), np.float32)
TALL = math.sqrt(3) / 2  # height of the triangle's bounding box divided by its width
WINDOW = 30  # px, holds the largest object (26 px) and its soft edge


class Object(NamedTuple):
    """A shape in a picture; x, y = centre of its bounding box and w, h = its size, in px."""

    shape: str
    color: str
    x: float
    y: float
    w: float
    h: float


@dataclass(frozen=True)
class Prompt:
    """A text and what it asks for; None in an object = not named; relation: first to second."""

    text: str
    category: str
    objects: tuple
    relation: "str | None" = None


def noun(shape, color=None, count=1):
    """`noun("circle", "orange")` is "an orange circle", with count 2 "two orange circles"."""
    name = " ".join(word for word in (color, shape or "shape") if word)
    if count > 1:
        return f"{NUMBERS[count]} {name}s"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def make_prompt(objects, relation=None):
    """The prompt for a tuple of (shape, color or None) in GenEval's wording and category."""
    colored = any(color for _, color in objects)
    if relation:
        category, text = "position", f" {relation} ".join(noun(*pair) for pair in objects)
    elif len(set(objects)) < len(objects):
        category, text = "counting", noun(*objects[0], count=len(objects))
    elif len(objects) == 1:
        category, text = "colors" if colored else "single", noun(*objects[0])
    else:
        category = "attribution" if colored else "two"
        text = " and ".join(noun(*pair) for pair in objects)
    return Prompt(text, category, tuple(objects), relation)


def grammar(first, second):
    """All prompts that name one pair of `first`, or one of `first` and one of `second`."""
    couples = [(a, b) for a in first for b in second if a[0] != b[0] and (not a[1] or a[1] != b[1])]
    couples = list(dict.fromkeys(couples + [(b, a) for a, b in couples]))
    return {
        "single": [make_prompt((pair,)) for pair in first],
        "counting": [make_prompt((pair,) * n) for n in (2, 3, 4) for pair in first],
        "two": [make_prompt(couple) for couple in couples],
        "position": [make_prompt(couple, name) for couple in couples for name in RELATIONS],
    }


PLAIN = [(shape, None) for shape in SHAPES]
PLAIN_PROMPTS, SEEN_PROMPTS = grammar(PLAIN, PLAIN), grammar(SEEN, SEEN)
HELD_PROMPTS = grammar(sorted(HELD_OUT), SEEN)
NAMED = PLAIN + SEEN + sorted(HELD_OUT)
ALL_PROMPTS = {p.text: p for prompts in grammar(NAMED, NAMED).values() for p in prompts}
TRAINING_PROMPTS = {name: PLAIN_PROMPTS[name] for name in ("single", "two", "counting", "position")}
TRAINING_PROMPTS |= {"colors": SEEN_PROMPTS["single"], "attribution": SEEN_PROMPTS["two"]}
TRAINING_PROMPTS["free"] = [Prompt("", "free", ((None, None),) * n) for n in (1, 2, 3, 4)]


def parse_prompt(text):
    """The Prompt with this text, e.g. "two red triangles"; ValueError on any other wording."""
    if text not in ALL_PROMPTS:
        raise ValueError(f"cannot parse {text!r}: expected e.g. 'a red circle left of a square'")
    return ALL_PROMPTS[text]


def deal(prompts, count, rng):
    """`count` prompts balanced over relation, number and held-out pair; repeated if too few."""
    dealt, turn = Counter(), {}
    for prompt in (prompts[i] for i in rng.permutation(len(prompts))):
        held = tuple(pair for pair in prompt.objects if pair in HELD_OUT)
        stratum = (prompt.relation, len(prompt.objects), held)
        turn[prompt] = dealt[stratum]
        dealt[stratum] += 1
    ordered = sorted(turn, key=turn.get)
    return [ordered[i % len(ordered)] for i in range(count)]


def eval_prompts():
    """ShapesEval: {"seen": 553, "heldout": 198, "composed": 198 prompts}, the same for ever."""
    rng = np.random.RandomState(0)  # the legacy generator, because its stream is frozen
    plain, seen = PLAIN_PROMPTS, SEEN_PROMPTS
    parts = [(plain["single"], 80), (plain["two"], 99), (plain["position"], 100)]
    parts += [(seen["single"], 94), (seen["two"], 100)]
    for number, n in ((2, 26), (3, 28), (4, 26)):
        parts.append(([p for p in plain["counting"] if len(p.objects) == number], n))
    sets = {"seen": parts}
    for name, kinds in (("heldout", HELD_PROMPTS), ("composed", seen)):
        sets[name] = [(prompts, 54 if kind == "two" else 48) for kind, prompts in kinds.items()]
    dealt = {name: [p for part in parts for p in deal(*part, rng)] for name, parts in sets.items()}
    return {name: [p[i] for i in rng.permutation(len(p))] for name, p in dealt.items()}


def category_prompts(rng, n):
    """n training prompts: equal shares of the six categories and of free scenes, none held out."""
    names = [list(TRAINING_PROMPTS)[i % 7] for i in rng.permutation(n)]
    draws = rng.random(n)
    return [TRAINING_PROMPTS[k][int(u * len(TRAINING_PROMPTS[k]))] for k, u in zip(names, draws)]


def box_offset(a, b):
    """GenEval's offset of boxes a from b: (..., 4) as x, y, w, h -> (..., 2), beyond .5 = holds."""
    offset = a[..., :2] - b[..., :2]
    beyond = np.maximum(np.abs(offset) - 0.1 * (a[..., 2:] + b[..., 2:]), 0)
    return np.sign(offset) * beyond / np.maximum(np.linalg.norm(offset, axis=-1), 1e-6)[..., None]


def relation(a, b):
    """The relations of object a to object b by GenEval's formula: a subset of RELATIONS."""
    offset = box_offset(np.array(a[2:]), np.array(b[2:]))
    return {name for name, direction in RELATIONS.items() if offset @ direction > 0.5}


def place(sizes, present, wanted, rng, tries=16):
    """Centres (B, 4, 2) for objects of size (B, 4, 2): 1 px from the border, boxes 2 px apart.

    `wanted` (B, 2) is the direction of object 0 from object 1, or zeros. A scene that jams starts
    again with new positions and the same sizes: size must not betray the count.
    """
    centres = np.zeros_like(sizes)
    todo = np.arange(len(sizes))
    while len(todo):
        size, here, want = sizes[todo], present[todo], wanted[todo]
        centre, fits = np.zeros_like(size), np.ones(len(todo), bool)
        for k in range(4):
            own = size[:, k, None]  # (b, 1, 2)
            spots = 1 + own / 2 + rng.random((len(todo), tries, 2)) * (SIDE - 2 - own)
            free = np.ones((len(todo), tries), bool)
            for j in range(k):
                gap = np.abs(spots - centre[:, j, None]) - (own + size[:, j, None]) / 2
                free &= (gap.max(-1) >= 2) | ~here[:, j, None]
            if k == 1:
                boxes = np.concatenate([spots, np.broadcast_to(own, spots.shape)], -1)
                first = np.concatenate([centre[:, :1], size[:, :1]], -1)
                # 0.55, not 0.5: a tenth of a pixel in the checker must not turn a true picture.
                held = (box_offset(first, boxes) * want[:, None]).sum(-1) > 0.55
                free &= held | ~want.any(-1)[:, None]
            centre[:, k] = spots[np.arange(len(todo)), free.argmax(1)]
            fits &= free.any(1) | ~here[:, k]
        centres[todo[fits]] = centre[fits]
        todo = todo[~fits]
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
    color = (rgb - BACKGROUND).astype(np.float32)[:, None, None]
    # uint8 addition wraps, so a negative change is exact too, and windows may overlap: the soft
    # shapes in them do not. Much faster than a float canvas.
    change = np.rint(share[..., None] * color).astype(np.int16).astype(np.uint8)
    images[rows[:, None, None], pixel[:, :, None, 1], pixel[:, None, :, 0]] += change


@cache
def options(shape, color):
    """The (shape, color) pairs that an object may become: what is not named is never held out."""
    if shape and color:
        return [(shape, color)]
    return [pair for pair in SEEN if shape in (None, pair[0]) and color in (None, pair[1])]


def draw_scenes(prompts, rng):
    """One random picture for each prompt -> uint8 (B, 64, 64, 3) and the list of its objects."""
    total = len(prompts)
    draws = rng.random((total, 4))
    width = rng.uniform(14, 26, (total, 4)).astype(np.float32)
    jitter = rng.integers(-8, 9, (total, 4, 3))
    choices = [[options(*pair) for pair in prompt.objects] for prompt in prompts]
    pairs = [[c[int(u * len(c))] for c, u in zip(row, us)] for row, us in zip(choices, draws)]
    shapes = np.array([[pair[0] for pair in row] + [""] * (4 - len(row)) for row in pairs])
    colors = np.array(
        [[COLORS[pair[1]] for pair in r] + [BACKGROUND] * (4 - len(r)) for r in pairs]
    )
    height = np.where(shapes == "triangle", np.float32(TALL), 1) * width
    sizes = np.stack([width, height], -1)
    wanted = np.array([RELATIONS.get(prompt.relation, (0, 0)) for prompt in prompts])
    centres = place(sizes, shapes != "", wanted, rng)
    images = np.full((total, SIDE, SIDE, 3), BACKGROUND, np.uint8)
    for k in range(4):
        for shape in SHAPES:
            chosen = np.flatnonzero(shapes[:, k] == shape)
            for start in range(0, len(chosen), 64):  # blocks that stay in the cache
                rows = chosen[start : start + 64]
                rgb = colors[rows, k] + jitter[rows, k]
                paint(images, rows, shape, centres[rows, k], width[rows, k], rgb)
    boxes = np.concatenate([centres, sizes], -1).tolist()
    scenes = [[Object(*p, *b) for p, b in zip(row, box)] for row, box in zip(pairs, boxes)]
    return images, scenes


# ------------------------------------------------------------------------------------ the texts

FRAMES = ("{}", "{}", "a picture of {}", "an image with {}", "{} on a plain background")
FRAMES += ("{n}: {}", "a simple drawing of {}", "a white scene with {}", "you can see {}")
SAY = {"left of": ("left of", "to the left of"), "right of": ("right of", "to the right of")}
SAY |= {"above": ("above", "over"), "below": ("below", "under")}


def listing(parts):
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def say(names, rng):
    """One of several ways to say one of these relations."""
    return rng.choice(SAY[rng.choice(names)])


def long_caption(objects, links, rng):
    """Names every object with its color, and relations between objects that are unique."""
    objects = rng.sample(objects, len(objects))
    shapes = Counter(o.shape for o in objects)
    pairs = Counter((o.shape, o.color) for o in objects)
    unique = [o for o in objects if pairs[o.shape, o.color] == 1]
    facts = [(a, b, links[a, b]) for a, b in combinations(unique, 2) if links[a, b]]
    rng.shuffle(facts)
    groups = []
    for shape, n in shapes.items():
        colors = {color: k for (name, color), k in pairs.items() if name == shape}
        if len(colors) > 1 and rng.random() < 0.5:
            each = listing([f"{NUMBERS[k]} {color}" for color, k in colors.items()])
            groups.append(f"{noun(shape, None, n)}, {each}")
        else:
            groups += [noun(shape, color, k) for color, k in colors.items()]
    if len(objects) == 2 and facts and rng.random() < 0.5:
        a, b, names = facts.pop()
        groups = [f" {say(names, rng)} ".join((noun(*a[:2]), noun(*b[:2])))]
    count = f"{NUMBERS[len(objects)]} shape{'s' if len(objects) > 1 else ''}"
    text = rng.choice(FRAMES).format(listing(groups), n=count)
    clauses = []
    for a, b, names in facts[: rng.randint(1, 2)]:
        short = [o.shape if shapes[o.shape] == 1 and rng.random() < 0.5 else "" for o in (a, b)]
        one, two = (name or f"{o.color} {o.shape}" for name, o in zip(short, (a, b)))
        clauses.append(f"the {one} {say(names, rng)} the {two}")
    return ", with ".join(filter(None, (text, " and ".join(clauses))))


def short_caption(prompt, objects, rng):
    """GenEval's wording, or only a part of the scene, as in real captions."""
    if prompt.text and rng.random() < 0.5:
        return prompt.text
    if len(objects) == 1:
        return rng.choice([noun(objects[0].shape), noun(None, objects[0].color)])
    part = rng.sample(objects, rng.randint(1, len(objects) - 1))
    names = [noun(o.shape, o.color if rng.random() < 0.5 else None) for o in part]
    return listing(list(dict.fromkeys(names)))


def questions(objects, links, rng):
    """4 to 6 [question, answer] pairs with one right answer each; "is there" is balanced."""
    shapes, colors = (Counter(o[k] for o in objects) for k in (0, 1))
    present = {o[:2] for o in objects}
    asked = [("yes", pair) for pair in rng.sample(sorted(present), min(2, len(present)))]
    asked += [("no", pair) for pair in rng.sample([p for p in SEEN if p not in present], 3)]
    chosen = [(f"is there {noun(*pair)}?", answer) for answer, pair in (asked[0], asked[-1])]
    pool = [("how many objects are there?", NUMBERS[len(objects)])]
    pool += [(f"how many {shape}s are there?", NUMBERS[shapes[shape]]) for shape in SHAPES]
    pool += [(f"what color is the {o.shape}?", o.color) for o in objects if shapes[o.shape] == 1]
    lone = [o for o in objects if colors[o.color] == 1]
    pool += [(f"what shape is the {o.color} object?", o.shape) for o in lone]
    for (a, b), names in links.items():
        if shapes[b.shape] > 1:
            continue
        if shapes[a.shape] == 1 and len(names) == 1:
            pool.append((f"where is the {a.shape} relative to the {b.shape}?", names[0]))
        for name in names:
            if sum(name in links[c, b] for c in objects if c != b) == 1:
                pool.append((f"what is {name} the {b.shape}?", f"{a.color} {a.shape}"))
    chosen += rng.sample(pool, min(len(pool), rng.randint(2, 4)))
    return [list(pair) for pair in rng.sample(chosen, len(chosen))]


def scene_texts(prompt, objects, seed, index):
    """The texts of training scene `index`: {"caption": str, "clean": str or None, "qa": pairs}."""
    rng = random.Random(seed * 1_000_003 + index)
    links = {(a, b): sorted(relation(a, b)) for a, b in permutations(objects, 2)}
    long = rng.random() < 0.9
    caption = long_caption(objects, links, rng) if long else short_caption(prompt, objects, rng)
    return {"caption": caption, "clean": prompt.text or None, "qa": questions(objects, links, rng)}


# ---------------------------------------------------------------------------------- the checker

SPECK = 12  # px2: what is larger counts as an object
SURE, MARGIN = 0.86, 0.05  # the overlap that a template needs, and its lead over the second
NEAR = 50  # greatest distance of a color from its palette entry


def color_classes(images):
    """uint8 (B, 64, 64, 3) -> palette index (B, 64, 64) of each pixel, -1 = background."""
    rays = torch.from_numpy(PALETTE - np.float32(BACKGROUND))
    offset = torch.from_numpy(images).float() - torch.tensor(BACKGROUND)
    reach, nearest = (offset @ (rays / rays.norm(dim=1, keepdim=True)).T).max(-1)  # (B, 64, 64)
    alpha = reach / rays.norm(dim=1)[nearest]
    # A pixel between two colors may look like a third: its neighbours decide, the purest loudest.
    weight = alpha.clamp(0, 1) * (10 * reach / offset.norm(dim=-1).clamp(1) - 9).clamp(0, 1)
    colors = torch.arange(len(PALETTE)).view(6, 1, 1)
    votes = (nearest[:, None] == colors) * weight[:, None]  # (B, 6, 64, 64)
    votes = F.avg_pool2d(F.avg_pool2d(votes, (5, 1), 1, (2, 0)), (1, 5), 1, (0, 2))
    return torch.where(alpha > 0.4, votes.argmax(1), -1).numpy()


def regions(classes):
    """int (B, H, W), -1 = background -> the same with a number for each 8-connected region."""
    solid = classes >= 0
    begins = solid & (classes != np.pad(classes, ((0, 0), (0, 0), (1, 0)))[..., :-1])
    begins[..., 0] = solid[..., 0]
    run = np.cumsum(begins).reshape(classes.shape) - 1  # the nodes are horizontal runs of a class
    upper, lower = [], []
    for dx in (-1, 0, 1):
        here = np.s_[:, :-1, max(0, -dx) : classes.shape[2] - max(0, dx)]
        there = np.s_[:, 1:, max(0, dx) : classes.shape[2] + min(0, dx)]
        # Two runs that touch do so at the first pixel of one of them: few edges are enough.
        linked = solid[here] & (classes[here] == classes[there]) & (begins[here] | begins[there])
        upper.append(run[here][linked])
        lower.append(run[there][linked])
    upper, lower = np.concatenate(upper), np.concatenate(lower)
    label, before = np.arange(begins.sum()), None
    while not np.array_equal(label, before):
        before = label.copy()
        np.minimum.at(label, upper, label[lower])
        np.minimum.at(label, lower, label[upper])
        label = label[label]
    label = np.unique(label, return_inverse=True)[1]
    return np.where(solid, label[run] if len(label) else -1, -1)


def grow(mask):
    """Dilates bool (n, H, W) by one pixel in all eight directions."""
    return F.max_pool2d(mask[:, None].float(), 3, 1, 1)[:, 0] > 0


def fit_objects(images, own, taken):
    """The Object that each region is, or None where no template or color fits.

    images float (n, 64, 64, 3); own, taken bool (n, 64, 64): the region and all others.
    """
    inner = ~grow(~own)
    inner = torch.where(inner.any(2).any(1).view(-1, 1, 1), inner, own)
    color = torch.stack([image[mask].median(0).values for image, mask in zip(images, inner)])
    ray = color - torch.tensor(BACKGROUND)
    alpha = torch.einsum("nhwc,nc->nhw", images - torch.tensor(BACKGROUND), ray)
    alpha = (alpha / ray.square().sum(1).clamp(1).view(-1, 1, 1)).clamp(0, 1)
    alpha = (alpha * (grow(own) & ~taken)).numpy()
    area, grid = alpha.sum((1, 2)) + 1e-6, np.arange(SIDE, dtype=np.float32) + 0.5
    x, y = (alpha.sum(1) @ grid) / area, (alpha.sum(2) @ grid) / area
    scores, boxes = [], []
    for shape, filled in (("circle", math.pi / 4), ("square", 1), ("triangle", TALL / 2)):
        # Area and centroid survive blur; the tips of a triangle, and so its box, do not.
        w = np.sqrt(area / filled)
        h = w * TALL if shape == "triangle" else w
        boxes.append(np.stack([x, y - h / 6 if shape == "triangle" else y, w, h], -1))  # (n, 4)
        dx, dy = (grid - boxes[-1][:, k, None] for k in (0, 1))
        template = coverage(shape, dx[:, None], dy[:, :, None], w[:, None, None])
        overlap = np.minimum(alpha, template).sum((1, 2)) / np.maximum(alpha, template).sum((1, 2))
        scores.append(overlap)
    second, best = np.sort(scores, 0)[1:]
    shape = np.argmax(scores, 0)
    box = np.stack(boxes)[shape, np.arange(len(own))]
    apart = np.linalg.norm(color.numpy()[:, None] - PALETTE, axis=-1)  # (n, 6)
    good = (best >= SURE) & (best - second >= MARGIN) & (apart.min(1) <= NEAR)
    good &= (box[:, 2] >= 11) & (box[:, 2] <= 30)
    names = [(SHAPES[s], list(COLORS)[c]) for s, c in zip(shape, apart.argmin(1))]
    return [Object(*n, *b) if fine else None for n, b, fine in zip(names, box.tolist(), good)]


def find_objects(images):
    """uint8 (B, 64, 64, 3) -> for each picture the Objects in it; None = a region of more than
    12 px2 that no template fits. Exact geometry, nothing learned."""
    found = [[] for _ in images]
    for start in range(0, len(images), 16):  # small blocks stay in the cache
        block = images[start : start + 16]
        label = regions(color_classes(block))
        solid = label >= 0
        area = np.bincount(label[solid])
        owner = np.zeros(len(area), int)
        owner[label[solid]] = np.nonzero(solid)[0]
        number = np.flatnonzero(area > SPECK)
        if len(number):
            owner = owner[number]
            own = label[owner] == number[:, None, None]  # (n, 64, 64)
            masks = (torch.from_numpy(mask) for mask in (own, solid[owner] & ~own))
            view = torch.from_numpy(block).float()[owner]
            for index, item in zip(owner, fit_objects(view, *masks)):
                found[start + index].append(item)
    return found


def judge(prompt, found, strict=True):
    """Whether the objects found in a picture are what the prompt asks for.

    Strict: exactly those objects and nothing else, and a named relation holds. Loose, as GenEval:
    further objects are free, but for more of the counted kind in counting.
    """

    def fits(pair, item):
        return item and pair[0] in (None, item.shape) and pair[1] in (None, item.color)

    if strict and len(found) != len(prompt.objects):
        return False
    if prompt.category == "counting":
        return sum(bool(fits(prompt.objects[0], o)) for o in found) == len(prompt.objects)
    for chosen in permutations(found, len(prompt.objects)):
        named = all(fits(pair, item) for pair, item in zip(prompt.objects, chosen))
        if named and (not prompt.relation or prompt.relation in relation(*chosen)):
            return True
    return False


# --------------------------------------------------------------------------------- image towers


class Tower(nn.Module):
    """A frozen timm model: float (B, 3, side, side) in 0..1 -> patch tokens (B, tokens, C)."""

    def __init__(self, model, tokens, mean, std):
        super().__init__()
        self.model, self.tokens = model, tokens
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        """Stays in evaluation mode: a parent's .train() must not wake its dropout."""
        return super().train(False)

    def forward(self, images):
        """(B, 3, side, side) -> (B, tokens, C), after the model's last norm."""
        tokens = self.model.forward_features((images - self.mean) / self.std)
        return pool_tokens(tokens[:, self.model.num_prefix_tokens :], self.tokens)


def pool_tokens(tokens, n):
    """Averages a square grid of tokens (B, N, C) to n = k * k tokens (B, n, C)."""
    side, target = math.isqrt(tokens.shape[1]), math.isqrt(n)
    if side * side != tokens.shape[1] or target * target != n:
        raise ValueError(f"expected square grids, got {tokens.shape[1]} tokens to pool to {n}")
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))  # (B, C, side, side)
    return F.adaptive_avg_pool2d(grid, target).flatten(2).transpose(1, 2)  # (B, n, C)


EXAMPLE_TOWER = "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"


def open_tower(name, tokens=64, weights=None):
    """A frozen timm tower -> (Tower, {"mean", "std", "side"}).

    weights: None = timm's own from the hub, a file of them, or "untrained" (for tests).
    ValueError where the name, the file or the network does not give the tower that was asked for.
    """
    patch = re.search(r"patch(\d+)", name)
    if not patch or not timm.is_model(name.split(".")[0]):
        raise ValueError(f"tower {name!r} is unknown: expected a timm ViT, e.g. {EXAMPLE_TOWER}")
    eight = 8 * int(patch[1])  # the grid is a multiple of 8 patches, the side near 224 px
    side = eight * max(1, round(224 / eight))
    config = timm.models.get_pretrained_cfg(name)
    tagged = name if "." in name else f"{name}.{config.tag if config else None}"
    right = tagged.replace("_clip_2", "_clip_quickgelu_2").replace("_clip_3", "_clip_quickgelu_3")
    if right != tagged and right in timm.list_pretrained():
        # timm builds these weights with plain GELU and says nothing; the features are wrong.
        raise ValueError(f"these weights need QuickGELU: use {right} instead of {name}")
    overlay = None if weights in (None, "untrained") else {"file": str(weights)}
    if overlay and not os.path.isfile(weights):
        raise ValueError(f"no weights file {weights}")
    try:
        options = {"num_classes": 0, "img_size": side, "pretrained_cfg_overlay": overlay}
        model = timm.create_model(name, pretrained=weights != "untrained", **options)
    except Exception as error:  # the hub, safetensors and timm each have their own kinds
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"cannot open tower {name}: {reason}") from error
    facts = {"mean": model.pretrained_cfg["mean"], "std": model.pretrained_cfg["std"], "side": side}
    return Tower(model, tokens, facts["mean"], facts["std"]), facts


# ---------------------------------------------------------------------------------- real photos

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
MAX_BYTES, MAX_PIXELS = 64 * 2**20, 40_000_000
MIN_SIDE, MAX_ASPECT = 8, 3  # px; the longer side divided by the shorter


def expand_sources(sources):
    """Glob patterns or paths -> sorted paths of tar shards, .tsv tables and folders."""
    paths = []
    for pattern in [sources] if isinstance(sources, (str, Path)) else sources:
        pattern = str(pattern)
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not found:
            raise ValueError(f"no file or folder matches {pattern!r}")
        paths += found
    for path in paths:
        if not (os.path.isdir(path) or path.endswith((".tar", ".tar.gz", ".tgz", ".tsv"))):
            raise ValueError(f"{path} is not a .tar shard, a .tsv table or a folder")
    return list(dict.fromkeys(paths))


def decode_image(data):
    """Bytes of an image file -> upright RGB PIL image; ValueError with the reason to drop it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warnings on size and palettes are handled here
        too_large = f"more than {MAX_PIXELS // 1_000_000} megapixels"
        try:
            image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError as error:
            raise ValueError(too_large) from error
        except Exception as error:
            raise ValueError("not an image") from error
        if image.width * image.height > MAX_PIXELS:  # known from the header, before decoding
            raise ValueError(too_large)
        if min(image.size) < MIN_SIDE:
            raise ValueError(f"a side under {MIN_SIDE} px")
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise ValueError(f"aspect beyond {MAX_ASPECT}")
        try:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
        except Exception as error:  # Pillow's plugins raise nearly anything on broken data
            raise ValueError("broken image") from error


def to_rgb(image):
    """Any mode of PIL image -> RGB: 16 bits scaled, transparency on white."""
    if image.mode.startswith("I"):
        # 16 bits: Pillow's own conversion clips, which makes nearly all of it white.
        image = Image.fromarray(np.clip(np.asarray(image) / 257, 0, 255).astype(np.uint8))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def entries(path):
    """(name, size, function that reads it) of each file in a tar, a table's rows or a folder."""
    if os.path.isdir(path):
        for file in sorted(Path(path).rglob("*")):
            if file.is_file():
                yield str(file), file.stat().st_size, file.read_bytes
    elif path.endswith(".tsv"):
        with open(path, "rb") as table:  # not csv, which merges rows that begin with a quote
            for number, line in enumerate(table):
                caption, _, name = line.rstrip(b"\r\n").partition(b"\t")
                image = Path(path).parent / os.fsdecode(name)
                yield f"{number}.txt", len(caption), io.BytesIO(caption).read
                if image.is_file():
                    yield f"{number}{image.suffix}", image.stat().st_size, image.read_bytes
    else:
        with tarfile.open(path, "r|*") as shard:
            for member in shard:
                shard.members = []  # tarfile remembers every member otherwise
                if member.isfile():
                    yield member.name, member.size, shard.extractfile(member).read
        if path.endswith(".tar"):  # tarfile takes a cut within a header for the end
            with open(path, "rb") as file:
                file.seek(-512, os.SEEK_END)
                if any(file.read()):
                    raise EOFError


def raw_samples(path, dropped):
    """(key, {"image": bytes, "txt": bytes}) of neighbouring files of one name; None = too large."""
    key, parts, seen = None, {}, set()
    try:
        for name, size, read in entries(path):
            stem, _, kind = os.path.basename(name).partition(".")
            kind = "image" if kind.lower() in IMAGE_KINDS else kind.lower()
            if not stem or kind not in ("image", "txt"):
                continue
            if (own := os.path.join(os.path.dirname(name), stem)) != key:
                if parts:
                    yield key, parts
                seen.add(key)
                key, parts = own, {}
            if kind in parts or key in seen:
                dropped["duplicate key"] += kind == "image"
                continue
            data = read() if size <= MAX_BYTES else None
            if data is not None and len(data) < size:
                raise EOFError
            parts[kind] = data
    except (tarfile.TarError, EOFError, OSError, zlib.error):
        dropped["truncated shard"] += 1
        parts = parts if len(parts) == 2 else {}
    if parts:
        yield key, parts


def open_sample(parts):
    """{"image": bytes, "txt": bytes} -> RGB image, caption; ValueError with the reason to drop."""
    if None in parts.values():
        raise ValueError(f"file over {MAX_BYTES // 2**20} MB")
    if len(parts) < 2:
        raise ValueError("missing caption" if "image" in parts else "missing image")
    try:
        caption = " ".join(parts["txt"].decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ValueError("caption is not UTF-8") from error
    if not caption:
        raise ValueError("empty caption")
    return decode_image(parts["image"]), caption


def read_samples(sources, dropped):
    """Yields (key, RGB PIL image, caption) of every sound sample, in the order of the sources.

    What is wrong with a sample drops it and is counted by reason in `dropped`, a Counter.
    """
    for path in expand_sources(sources):
        for key, parts in raw_samples(path, dropped):
            try:
                sample = open_sample(parts)
            except ValueError as error:
                dropped[str(error)] += 1
            else:
                yield key, *sample


def square(image, side):
    """The central square of a PIL image, resized -> uint8 (side, side, 3)."""
    image = V.center_crop(image, [min(image.size)] * 2)
    return np.asarray(V.resize(image, [side, side], InterpolationMode.BICUBIC, antialias=True))


# ------------------------------------------------------------------------------ the prepared set

FORMAT = 1  # of the folder; raise it when an older folder must not be read
CHUNK = 1000  # scenes between two commits


def write_json(path, value):
    """Writes JSON whole or not at all."""
    temporary = Path(f"{path}.part")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def is_finished(out, settings):
    """True for a finished set with these settings; ValueError where others lie in the folder."""
    for path in (Path(out) / "meta.json", Path(out) / "progress.json"):
        if path.is_file():
            old = json.loads(path.read_text(encoding="utf-8"))["settings"]
            wrong = [f"{k} {old.get(k)}, not {v}" for k, v in settings.items() if old.get(k) != v]
            if wrong:
                advice = "choose another --out, or delete the folder"
                raise ValueError(f"{out} was prepared with {', '.join(wrong)}: {advice}")
    if (Path(out) / "meta.json").is_file():
        print(f"{out}: already prepared, reused")
        return True
    return False


class SetWriter:
    """Writes a prepared set row by row; what was committed survives a kill.

    Each array is a growing .npy file: rows are appended raw, the header is filled in at the end.
    """

    HEADER = 128  # bytes, what numpy writes for short shapes

    def __init__(self, out, settings):
        self.out, path = Path(out), Path(out) / "progress.json"
        self.out.mkdir(parents=True, exist_ok=True)
        self.state = {"settings": settings, "units": 0, "arrays": {}, "dropped": {}}
        if path.is_file():
            self.state = json.loads(path.read_text(encoding="utf-8"))
        self.dropped = self.state["dropped"] = Counter(self.state["dropped"])
        self.arrays = self.state["arrays"]  # name -> [dtype, shape]
        for name, (dtype, shape) in self.arrays.items():
            size = math.prod(shape) * np.dtype(dtype).itemsize
            os.truncate(self.out / f"{name}.npy", self.HEADER + size)

    def append(self, texts, arrays):
        """Adds n samples: n dicts, and {name: array (n, ...)}."""
        lines = [json.dumps(text, ensure_ascii=False).encode() + b"\n" for text in texts]
        ends = self.rows("text") + np.cumsum([len(line) for line in lines], dtype=np.int64)
        text = np.frombuffer(b"".join(lines), np.uint8)
        for name, array in {**arrays, "text": text, "text_index": ends}.items():
            first = name not in self.arrays
            _, shape = self.arrays.setdefault(name, [array.dtype.str, [0, *array.shape[1:]]])
            with open(self.out / f"{name}.npy", "wb" if first else "ab") as file:
                file.write(bytes(self.HEADER if first else 0) + array.tobytes())
            shape[0] += len(array)

    def rows(self, name):
        """How many rows an array has so far."""
        return self.arrays[name][1][0] if name in self.arrays else 0

    def commit(self):
        """One more unit (a chunk of scenes, a shard) is whole: a later run goes on after it."""
        self.state["units"] += 1
        write_json(self.out / "progress.json", self.state)

    def finish(self, features=None):
        """Writes the headers; the folder counts as finished once meta.json exists."""
        if not self.rows("images"):
            raise ValueError(f"no usable sample: {dict(self.dropped)}")
        for name, (dtype, shape) in self.arrays.items():
            with open(self.out / f"{name}.npy", "r+b") as file:
                header = {"descr": dtype, "fortran_order": False, "shape": tuple(shape)}
                np.lib.format.write_array_header_1_0(file, header)
                assert file.tell() == self.HEADER, file.tell()
        meta = {"version": FORMAT, "features": features, "count": self.rows("images")}
        write_json(self.out / "meta.json", {**meta, **self.state})
        (self.out / "progress.json").unlink()
        return PreparedSet(self.out)


class PreparedSet:
    """A finished folder of `prepare_shapes` or `prepare_photos`, opened as memory maps.

    images: uint8 (N, S, S, 3); features: float16 (N, tokens, C) or None; train_ids, val_ids:
    the rows of each split (the last 2 % or 500 validate, at most half). ValueError if unfinished.
    """

    def __init__(self, folder):
        folder = Path(folder)
        if not (folder / "meta.json").is_file():
            raise ValueError(f"{folder} is not a prepared set: run data.py first")
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if self.meta["version"] != FORMAT:
            raise ValueError(
                f"{folder} has format {self.meta['version']}, not {FORMAT}: prepare anew"
            )
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        self._text = np.load(folder / "text.npy", mmap_mode="r")
        self._ends = np.load(folder / "text_index.npy", mmap_mode="r")
        name = self.meta["features"]
        self.features = np.load(folder / f"{name}.npy", mmap_mode="r") if name else None
        validation = min(max(len(self) // 50, 500), len(self) // 2)
        self.train_ids = np.arange(len(self) - validation)
        self.val_ids = np.arange(len(self) - validation, len(self))

    def __len__(self):
        return len(self.images)

    def texts(self, i):
        """{"caption": str, "clean": str or None, "qa": [[question, answer], ...]} of row i."""
        start = self._ends[i - 1] if i else 0
        return json.loads(self._text[start : self._ends[i]].tobytes())


def prepare_shapes(out, count=60000, seed=0):
    """Draws `count` training scenes with their texts into the folder `out` -> PreparedSet."""
    settings = {"kind": "shapes", "count": count, "seed": seed, "size": SIDE, "format": FORMAT}
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    if is_finished(out, settings):
        return PreparedSet(out)
    writer = SetWriter(out, settings)
    done = writer.state["units"]
    with tqdm(total=count, initial=min(count, done * CHUNK), unit="scene", desc="shapes") as bar:
        for start in range(done * CHUNK, count, CHUNK):
            rng = np.random.default_rng([seed, start])
            prompts = category_prompts(rng, min(CHUNK, count - start))
            images, scenes = draw_scenes(prompts, rng)
            rows = enumerate(zip(prompts, scenes), start)
            texts = [scene_texts(*row, seed, index) for index, row in rows]
            writer.append(texts, {"images": images})
            writer.commit()
            bar.update(len(images))
    return writer.finish()


def prepare_photos(sources, out, size=64, tower=None, tokens=64, weights=None, device="cpu"):
    """Reads photos and captions into the folder `out` -> PreparedSet; see `read_samples`.

    With a `tower`, its features of each picture at its own size are stored in the same pass.
    """
    paths = expand_sources(sources)
    names = [[os.path.basename(path), os.path.getsize(path)] for path in paths]
    settings = {"kind": "photos", "sources": names, "size": size, "format": FORMAT}
    settings |= {"tower": tower, "tokens": tokens, "weights": weights and str(weights)}
    if size < MIN_SIDE:
        raise ValueError(f"size must be at least {MIN_SIDE} px, got {size}")
    if is_finished(out, settings):
        return PreparedSet(out)
    writer, name = SetWriter(out, settings), None
    if tower:
        model, facts = open_tower(tower, tokens, weights)
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"cannot use device {device!r}: {error}".split("\n")[0]) from error
        name = f"features-{tower}-{facts['side']}px-{tokens}"
        write_json(writer.out / f"{name}.json", {**settings, **facts, "timm": timm.__version__})
    with tqdm(initial=writer.rows("images"), unit="image", desc="photos") as bar:
        for path in paths[writer.state["units"] :]:
            samples = read_samples(path, writer.dropped)
            while batch := list(islice(samples, 32)):
                arrays = {"images": np.stack([square(image, size) for _, image, _ in batch])}
                if tower:
                    views = np.stack([square(image, facts["side"]) for _, image, _ in batch])
                    arrays[name] = tower_features(model, views, device)
                texts = [{"caption": text, "clean": None, "qa": []} for _, _, text in batch]
                writer.append(texts, arrays)
                bar.update(len(batch))
            writer.commit()
    report_dropped(writer.dropped, writer.rows("images"))
    return writer.finish(name)


@torch.inference_mode()
def tower_features(model, views, device):
    """uint8 (B, side, side, 3) -> float16 array (B, tokens, C)."""
    pixels = torch.from_numpy(views).to(device).permute(0, 3, 1, 2).float() / 255
    return model(pixels).half().cpu().numpy()


def report_dropped(dropped, kept):
    """Prints how many samples were kept and lost, and why; loudly if more than half are lost."""
    lost = sum(dropped.values())
    reasons = ", ".join(f"{reason}: {n}" for reason, n in dropped.most_common())
    print(f"{kept} samples kept, {lost} dropped" + (f" ({reasons})" if lost else ""))
    if lost > kept:
        print(f"WARNING: MORE THAN HALF OF THE SAMPLES ARE LOST ({reasons})", file=sys.stderr)


def main(arguments=None):
    """The command line; what a user can get wrong ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description="Prepare a training set once, as memory maps.")
    commands = parser.add_subparsers(dest="kind", required=True)
    shapes = commands.add_parser("shapes", help="draw coloured shapes with captions and questions")
    shapes.add_argument(
        "--out", default="data/shapes", help="folder to write (default %(default)s)"
    )
    shapes.add_argument("--count", type=int, default=60000, help="scenes (default %(default)s)")
    shapes.add_argument("--seed", type=int, default=0, help="other scenes (default %(default)s)")
    photos = commands.add_parser("photos", help="read photos with captions")
    photos.add_argument("sources", nargs="+", help=".tar shards, .tsv tables, folders; globs too")
    photos.add_argument(
        "--out", default="data/photos", help="folder to write (default %(default)s)"
    )
    photos.add_argument("--size", type=int, default=64, help="px, square (default %(default)s)")
    photos.add_argument("--tower", help=f"timm tower to store features of, e.g. {EXAMPLE_TOWER}")
    photos.add_argument("--weights", help="file of its weights, or untrained (default: timm's hub)")
    photos.add_argument("--tokens", type=int, default=64, help="vectors an image (default 64)")
    photos.add_argument("--device", default="cpu", help="of the tower (default %(default)s)")
    options = vars(parser.parse_args(arguments))
    prepare = {"shapes": prepare_shapes, "photos": prepare_photos}[options.pop("kind")]
    try:
        prepared = prepare(**options)
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"{options['out']}: {len(prepared)} images of {prepared.images.shape[1]} px")


if __name__ == "__main__":
    main()
