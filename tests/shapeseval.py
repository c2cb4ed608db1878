"""Scores a trained run: pictures by an exact checker, understanding by questions and captions.

    python tests/shapeseval.py --run out/demo          writes scores.json beside the checkpoint

ShapesEval's prompts ask for coloured shapes, as GenEval's do. A picture passes where the checker
finds what its prompt asks for. Nothing in the checker is learned. Photos have scores of their own.
"""

import json
import math
import platform
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice, permutations, product
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch.utils.benchmark import Timer
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402  (found through the line above)
import model as M  # noqa: E402
from notebooks import shapes as world  # noqa: E402
from sample import Settings as Drawing  # noqa: E402
from sample import Studio, find_run  # noqa: E402

# A text and what it asks for. objects: (shape, color) pairs, where None means any.
# relation: where the first object lies from the second, or None.
Prompt = namedtuple("Prompt", "text category objects relation", defaults=[None])


def grammar(first, second):
    """Every prompt on one of `first`, or on it beside one of `second`: lists of (shape, color)."""
    sets = {"single": [], "counting": [], "two": [], "position": []}
    for a in first:
        sets["single"].append(Prompt(world.noun(*a), "colors" if a[1] else "single", (a,)))
    for count, a in product((2, 3, 4), first):
        sets["counting"].append(Prompt(world.noun(*a, count), "counting", (a,) * count))
    couples = [(a, b) for a, b in product(first, second) if a[0] != b[0]]
    couples = [(a, b) for a, b in couples if a[1] is None or a[1] != b[1]]
    couples += [(b, a) for a, b in couples]
    for a, b in dict.fromkeys(couples):  # each couple once
        one, two = world.noun(*a), world.noun(*b)
        category = "attribution" if a[1] or b[1] else "two"
        sets["two"].append(Prompt(f"{one} and {two}", category, (a, b)))
        for name in world.RELATIONS:
            sets["position"].append(Prompt(f"{one} {name} {two}", "position", (a, b), name))
    return sets


def deal(prompts, count, rng):
    """`count` prompts, balanced over relation, number and held-out pair; repeated if too few."""
    mixed = [prompts[i] for i in rng.permutation(len(prompts))]
    dealt, turns = Counter(), []
    for prompt in mixed:
        held = frozenset(world.HELD_OUT.intersection(prompt.objects))
        stratum = (prompt.relation, len(prompt.objects), held)
        turns.append(dealt[stratum])
        dealt[stratum] += 1
    order = np.argsort(turns, kind="stable")  # the first of each stratum, then the second, ...
    return list(islice(cycle(mixed[i] for i in order), count))


def eval_prompts():
    """ShapesEval: {"seen": 553, "heldout": 198, "composed": 198 prompts}, the same for ever."""
    rng = np.random.RandomState(0)  # the legacy generator, because its stream is frozen
    known = [pair for pair in product(world.SHAPES, world.COLORS) if pair not in world.HELD_OUT]
    shapes = [(shape, None) for shape in world.SHAPES]
    plain, seen = grammar(shapes, shapes), grammar(known, known)
    held = grammar(sorted(world.HELD_OUT), known)
    sets = {"seen": [(plain["single"], 80), (plain["two"], 99), (plain["position"], 100)]}
    sets["seen"] += [(seen["single"], 94), (seen["two"], 100)]
    for number, size in ((2, 26), (3, 28), (4, 26)):
        part = [prompt for prompt in plain["counting"] if len(prompt.objects) == number]
        sets["seen"].append((part, size))
    sets["heldout"] = zip(held.values(), (48, 48, 54, 48))
    sets["composed"] = zip(seen.values(), (48, 48, 54, 48))
    for name, parts in sets.items():
        sets[name] = [prompt for part, size in parts for prompt in deal(part, size, rng)]
    return {name: [p[i] for i in rng.permutation(len(p))] for name, p in sets.items()}


def long_prompts(count=500):
    """Long captions of new scenes as prompts. They ask for exactly the scene's objects."""
    rng, prompts = np.random.default_rng(2**31), []
    while len(prompts) < count:
        objects, prompt = world.random_scene(rng)
        caption = world.scene_texts(prompt, objects, rng)["caption"]
        pairs = tuple(o[:2] for o in objects)
        if parse_caption(caption) == Counter(pairs):  # else a short one, which leaves things out
            prompts.append(Prompt(caption, "long", pairs))
    return prompts


PALETTE = np.array(list(world.COLORS.values()), np.float32)  # (colors, 3)
SPECK = 12  # px2; a larger region counts as an object
SURE, MARGIN = 0.86, 0.05  # the overlap that a template needs, and its lead over the second
NEAR = 50  # greatest distance of a color from its palette entry
WIDTHS = (11, 30)  # px, of what counts as an object
SQUARE = np.ones((3, 3), bool)  # a pixel and its eight neighbours
GRID = np.arange(world.SIDE, dtype=np.float32) + 0.5  # centres of pixels


@cache
def template_moments(shape, width=256):
    """(area, how far the centroid lies below the box's centre) of a shape of width 1, measured on
    a large drawing of it, so that a new shape needs no constants here."""
    away = np.arange(-width, width, dtype=np.float32) + 0.5
    inside = world.coverage(shape, away, away[:, None], np.float32(width))  # (2 width, 2 width)
    area = float(inside.sum(dtype=np.float64))
    return area / width**2, float(inside.sum(1) @ away / area / width)


def color_classes(offset):
    """Image minus background (64, 64, 3) -> palette index of each pixel, -1 = background."""
    rays = PALETTE - np.float32(world.BACKGROUND)
    length = np.linalg.norm(rays, axis=1)
    along = offset @ (rays / length[:, None]).T  # (64, 64, colors)
    reach, nearest = along.max(-1), along.argmax(-1)
    alpha = reach / length[nearest]
    # A pixel between two colors may look like a third. Its neighbours decide, the purest loudest.
    purity = reach / np.maximum(np.linalg.norm(offset, axis=-1), 1)
    weight = np.clip(alpha, 0, 1) * np.clip(10 * purity - 9, 0, 1)
    votes = (nearest == np.arange(len(PALETTE))[:, None, None]) * weight  # (colors, 64, 64)
    for axis in (1, 2):
        votes = ndimage.convolve1d(votes, np.ones(5), axis, mode="constant")
    return np.where(alpha > 0.4, votes.argmax(0), -1)


def regions(classes):
    """int (64, 64), -1 = background -> the mask of each 8-connected region that is no speck."""
    masks = []
    for color in np.unique(classes[classes >= 0]):
        labels, count = ndimage.label(classes == color, SQUARE)
        areas = np.bincount(labels.ravel(), minlength=count + 1)
        masks += [labels == i for i in range(1, count + 1) if areas[i] > SPECK]
    return masks


def fit_object(offset, own, taken):
    """The Object that a region is, or None where no template or color fits.

    offset (64, 64, 3): image minus background; own, taken bool (64, 64): the region, all others.
    """
    inner = ndimage.binary_erosion(own, SQUARE, border_value=1)
    ray = np.median(offset[inner if inner.any() else own], 0)  # the object's color
    near = ndimage.binary_dilation(own, SQUARE) & ~taken
    alpha = np.clip(offset @ ray / max(ray @ ray, 1), 0, 1) * near
    total = alpha.sum() + 1e-6
    x, y = float(alpha.sum(0) @ GRID / total), float(alpha.sum(1) @ GRID / total)
    fitted = [(0.0, None, 0.0, 0.0)]
    for shape in world.SHAPES:
        # Area and centroid survive blur. The tips of a triangle, and so its box, do not.
        area, below = template_moments(shape)
        width = math.sqrt(total / area)
        middle = y - below * width
        template = world.coverage(shape, GRID - x, (GRID - middle)[:, None], width)
        overlap = np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum()
        fitted.append((float(overlap), shape, middle, width))
    (second, *_), (best, shape, middle, width) = sorted(fitted, key=lambda row: row[0])[-2:]
    apart = np.linalg.norm(ray + world.BACKGROUND - PALETTE, axis=1)
    clear = best >= SURE and best - second >= MARGIN and apart.min() <= NEAR
    if not clear or not WIDTHS[0] <= width <= WIDTHS[1]:
        return None
    box = (x, middle, width, width * world.SHAPES[shape].height)
    return world.Object(shape, list(world.COLORS)[apart.argmin()], *box)


def find_objects(images):
    """uint8 (B, 64, 64, 3) -> the Objects of each picture; None = a region that is no object."""
    found = []
    for image in images:
        offset = image - np.float32(world.BACKGROUND)
        classes = color_classes(offset)
        masks = regions(classes)
        found.append([fit_object(offset, own, (classes >= 0) & ~own) for own in masks])
    return found


def fits(wanted, item):
    """Whether an Object, or a (shape, color), is the wanted (shape, color); None = any."""
    return wanted[0] in (None, item[0]) and wanted[1] in (None, item[1])


def judge(prompt, found, strict=True):
    """Whether the objects found in a picture are what the prompt asks for. Strict: they and nothing
    else. Loose, as GenEval: further objects are free, in counting of another kind."""
    items = [item for item in found if item]
    count = len(prompt.objects)
    if strict and len(found) != count:
        return False
    if prompt.category == "counting":
        return sum(fits(prompt.objects[0], item) for item in items) == count
    for chosen in permutations(items, count):
        right = all(fits(wanted, item) for wanted, item in zip(prompt.objects, chosen))
        if right and (prompt.relation is None or prompt.relation in world.relations(*chosen)):
            return True
    return False


def in_batches(function, *columns, size=128):
    """What function(*columns) gives, asked for `size` rows at a time: it bounds the memory."""
    starts = tqdm(range(0, len(columns[0]), size), function.__name__, unit="batch", leave=False)
    parts = [function(*(column[i : i + size] for column in columns)) for i in starts]
    if torch.is_tensor(parts[0]):
        return torch.cat(parts)
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else sum(parts, [])


def share(hits):
    """The share of true ones, 0 of none."""
    return float(np.mean(list(hits) or [False]))


def score_prompts(prompts, images):
    """ShapesEval of pictures (B, 64, 64, 3), one for each prompt: {rule: {category: share}}.

    "floor" is judged by another prompt of the category. Also the "mean" over categories, and the
    "entropy" of the colors that color-free prompts got: 1 means all equally often.
    """
    found, rows = find_objects(images), defaultdict(list)
    for i, prompt in enumerate(prompts):
        rows[prompt.category].append(i)
    table = {"strict": {}, "geneval": {}, "floor": {}}
    for kind, ids in rows.items():
        table["strict"][kind] = share(judge(prompts[i], found[i]) for i in ids)
        table["geneval"][kind] = share(judge(prompts[i], found[i], strict=False) for i in ids)
        others = list(zip(ids, np.roll(ids, len(ids) // 2)))  # prompt i judges picture j
        others = [(i, j) for i, j in others if prompts[i].text != prompts[j].text]
        table["floor"][kind] = share(judge(prompts[i], found[j]) for i, j in others)
    for shares in table.values():
        shares["mean"] = float(np.mean(list(shares.values())))
    free = [i for i, p in enumerate(prompts) if not any(color for _, color in p.objects)]
    counts = Counter(item.color for i in free for item in found[i] if item)
    shares = np.array(list(counts.values())) / max(1, counts.total())
    table["entropy"] = float((shares * -np.log(shares)).sum() / math.log(len(world.COLORS)))
    return table


REACH = 6  # px, from the centre of a planned cell
CELL = world.SIDE / 8


def parse_plan(text):
    """A plan as Objects without size: x, y = centres of cells. [] where it is no plan."""
    if not re.fullmatch(f"{world.LINE}(; {world.LINE})*", text):
        return []
    objects = []
    for shape, color, cell in (line.split() for line in text.split("; ")):
        x, y = world.COLUMNS.index(cell[0]) + 0.5, int(cell[1]) - 0.5
        objects.append(world.Object(shape, color, x * CELL, y * CELL, 0, 0))
    return objects


def take_nearest(wanted, found, reach):
    """How many of the wanted Objects are found within `reach` px, and the items that are left.
    Each takes the nearest of its kind."""
    left, hits = list(found), 0
    for o in wanted:
        near = [item for item in left if item and item[:2] == o[:2]]
        item = min(near, key=lambda item: math.dist(item[2:4], o[2:4]), default=None)
        if item and math.dist(item[2:4], o[2:4]) <= reach:
            left.remove(item)
            hits += 1
    return hits, left


def score_plans(prompts, plans, images):
    """Shares of plans that are what their prompts ask for, and of planned objects that stand
    within REACH px of their cells in the pictures (B, 64, 64, 3)."""
    plans = [parse_plan(text) for text in plans]
    right = [judge(prompt, plan) for prompt, plan in zip(prompts, plans)]
    kept = [take_nearest(*row, REACH)[0] for row in zip(plans, find_objects(images))]
    return {"plans_right": share(right), "places_kept": sum(kept) / max(1, sum(map(len, plans)))}


def real_picture(prompt, rng):
    """A rendered scene (64, 64, 3) that fits a prompt. What is not named is never held out."""
    pairs = []
    for wanted in prompt.objects:
        choices = [pair for pair in world.SEEN if fits(wanted, pair)] or [wanted]
        pairs.append(choices[rng.integers(len(choices))])
    return world.render(world.place(pairs, rng, prompt.relation), rng)


def evaluate_shapes(studio, seed, count):
    """ShapesEval with `count` pictures a prompt: the first ones drawn, nothing is chosen.

    Prompts are planned first, unless the studio's settings say otherwise. The ceilings are judged
    on a real scene for each seen prompt, and on its reconstruction.
    """
    once, tables, planned = eval_prompts(), {}, {}
    sets = {name: [p for p in prompts for _ in range(count)] for name, prompts in once.items()}
    sets["long"] = long_prompts()
    for name, prompts in sets.items():
        seeds = [seed * 1_000_000 + i for i in range(len(prompts))]
        texts, plans = [p.text for p in prompts], [None] * len(prompts)
        if studio.settings.plan:
            plans = in_batches(studio.plan, texts, seeds)
        images = in_batches(studio.draw, texts, seeds, plans)
        tables[name] = score_prompts(prompts, images)
        if studio.settings.plan:
            planned[name] = score_plans(prompts, plans, images)
    scores = {f"{name}_strict": table["strict"]["mean"] for name, table in tables.items()}
    scores["seen_geneval"] = tables["seen"]["geneval"]["mean"]
    scores["floor"] = tables["seen"]["floor"]["mean"]
    scores["color_entropy"] = tables["seen"]["entropy"]
    rng = np.random.default_rng(seed)
    real = np.stack([real_picture(prompt, rng) for prompt in once["seen"]])
    again = in_batches(studio.decode, in_batches(studio.see, real), range(len(real)))
    for name, images in (("render", real), ("reconstruction", again)):
        scores[f"ceiling_{name}"] = score_prompts(once["seen"], images)["strict"]["mean"]
    categories = {name: table["strict"] for name, table in tables.items()}
    return scores | {"plans": planned, "per_category": categories}


def kind_of(question):
    """The kind of a question is its first two words: "how many", "what color", "is there"."""
    return " ".join(question.split()[:2])


def blind_answers(pairs, questions):
    """What one answers who sees nothing: the commonest training answer of each question, or of its
    kind if training never asks it. pairs: [question, answer] of training."""
    counts = defaultdict(Counter)
    for question, answer in pairs:
        counts[question][answer] += 1
        counts[kind_of(question)][answer] += 1
    tables = [counts.get(q) or counts.get(kind_of(q)) or {"": 1} for q in questions]
    return [max(table, key=table.get) for table in tables]


def score_answers(questions, truth, given):
    """Share of right answers: {"all": share, and each kind of question: share}."""
    hits = defaultdict(list)
    for question, right, said in zip(questions, truth, given):
        for kind in ("all", kind_of(question)):
            hits[kind].append(right == said)
    return {kind: share(found) for kind, found in hits.items()}


def parse_caption(text):
    """The (shape, color) pairs that a caption names, as a Counter; None = left open.

    "three circles, one red and two blue" -> {("circle", "red"): 1, ("circle", "blue"): 2}
    """
    text = text.split(", with the ")[0]  # after it stands where the objects lie
    text = text.split(": ")[-1]  # before it stands the number of all shapes
    counts = {word: i for i, word in enumerate(world.NUMBERS)} | {"a": 1, "an": 1}
    numbers, colors, shapes = map("|".join, (counts, world.COLORS, [*world.SHAPES, "shape"]))
    pattern = rf"\b({numbers}) (?:({colors})\b ?)?(?:({shapes})s?\b)?"
    named, group = Counter(), None
    for number, color, shape in re.findall(pattern, text):
        if shape:
            group = None if shape == "shape" else shape
            named[group, color or None] += counts[number]
        elif color:  # "one red": of the group before
            named[group, color] += counts[number]
            named[group, None] -= counts[number]
    return Counter({pair: count for pair, count in named.items() if count})


def understanding(studio, scenes, training):
    """Scores of questions and captions about scenes: (picture, its (shape, color)s, its [question,
    answer]s). Beside the model stand `blind_answers` and what it answers about an empty picture."""
    images, objects, asked = zip(*scenes)
    vectors = in_batches(studio.see, np.stack(images))  # (B, N, C)
    which, questions, truth = zip(*((n, *pair) for n, row in enumerate(asked) for pair in row))
    once = list(dict.fromkeys(questions))
    empty = studio.see(np.full_like(images[:1], world.BACKGROUND)).expand(len(once), -1, -1)
    blank = dict(zip(once, in_batches(studio.answer, empty, once)))
    answers = {"model": in_batches(studio.answer, vectors[list(which)], questions)}
    answers["blind"] = blind_answers(training, questions)
    answers["blank"] = [blank[question] for question in questions]
    scores = {name: score_answers(questions, truth, given) for name, given in answers.items()}
    captions = in_batches(studio.answer, vectors, [data.DESCRIBE] * len(images))
    rows = zip(captions, objects)
    scores["captions"] = share(parse_caption(text) == Counter(pairs) for text, pairs in rows)
    return scores | {"questions": dict(Counter(map(kind_of, questions)))}


def heldout_scene(i, rng):
    """Scene i with one held-out pair and up to three others; see `understanding`. "is there" is
    asked of that pair, and of another held-out one that is not there."""
    held = sorted(world.HELD_OUT)
    there, absent = held[i % len(held)], held[(i + 1) % len(held)]
    others = [world.SEEN[j] for j in rng.integers(len(world.SEEN), size=i % 4)]
    objects = world.place([there, *others], rng)
    asked = world.scene_texts(None, objects, rng)["qa"]
    asked = [pair for pair in asked if kind_of(pair[0]) != "is there"]
    for pair, answer in ((there, "yes"), (absent, "no")):
        asked.append([f"is there {world.noun(*pair)}?", answer])
    return world.render(objects, rng), [there, *others], asked


def evaluate_understanding(studio, dataset, seed, limit=500):
    """Validation pictures, and new scenes with pairs that training never shows."""
    training = [pair for i in dataset.train_ids for pair in dataset.texts[i]["qa"]]
    ids, rng = dataset.val_ids[:limit], np.random.default_rng([seed, 1])
    images = dataset.rows("images", ids).numpy()
    objects = [[item and item[:2] for item in found] for found in find_objects(images)]
    scenes = {"seen": zip(images, objects, (dataset.texts[i]["qa"] for i in ids))}
    scenes["heldout"] = [heldout_scene(i, rng) for i in range(limit)]
    tables = {name: understanding(studio, rows, training) for name, rows in scenes.items()}
    scores = {"understanding": tables}
    for name, end in (("seen", ""), ("heldout", "_heldout")):
        scores[f"captions{end}"] = tables[name]["captions"]
        for who, by in (("model", ""), ("blind", "_blind"), ("blank", "_blank")):
            scores[f"vqa{end}{by}"] = tables[name][who]["all"]
    return scores


@torch.no_grad()
def evaluate_clip(studio, dataset, limit=100):
    """Is the tiny CLIP still a CLIP? The right picture among those of 100 captions, and the R^2 of
    the pixels that its vectors rebuild."""
    ids = dataset.val_ids[: 10 * limit]
    images = dataset.rows("images", ids).numpy()
    rows = {image.tobytes(): n for n, image in enumerate(images)}.values()  # each picture once
    rows = {dataset.texts[ids[n]]["caption"]: n for n in rows}  # each caption once
    rows = dict(islice(rows.items(), limit))
    pixels = M.to_pixels(torch.from_numpy(images[list(rows.values())]).to(studio.device))
    tokens = studio.sequences([[("user", text), ("bot", None)] for text in rows])
    clip, vectors = studio.net.clip, studio.net.clip.vectors(pixels)
    chosen = clip.logits(vectors, tokens).argmax(0).tolist()  # the picture of each caption
    error = (clip.rebuild(vectors) - pixels).square().mean() / pixels.var()
    right = share(n == picture for n, picture in enumerate(chosen))
    return {"clip_top1_of_100": right, "clip_pixel_r2": float(1 - error)}


def see_rows(studio, dataset, ids):
    """Normalised vectors (B, N, C) of rows of a set, from a tower's stored features if it has."""
    if studio.net.clip is not None:
        return in_batches(studio.see, dataset.rows("images", ids).numpy())

    def see(some):
        features = dataset.rows("features", some).float().to(studio.device)
        return studio.net.normalise["clip"](features)

    return in_batches(see, ids)


def evaluate_photos(studio, dataset, seed, limit=500):
    """Do vectors made from validation captions look like their class, and pictures like pictures?

    The class is a caption's last word; see `class_accuracy`. With --target vae the vectors are
    those seen in the pictures that were drawn. The reconstruction's baseline is the training
    picture with the nearest vectors, of 5,000.
    """
    steps = np.linspace(0, len(dataset.val_ids) - 1, limit).astype(int)
    val, train = dataset.val_ids[np.unique(steps)], dataset.train_ids[:5000]
    captions = [dataset.texts[i]["caption"] for i in val]
    seeds = [seed * 1_000_000 + i for i in range(len(val))]
    images, truth = dataset.rows("images", val).numpy(), see_rows(studio, dataset, val)
    scores = {"psnr_reconstruction": psnr(images, in_batches(studio.decode, truth, seeds))}
    known, truth = see_rows(studio, dataset, train).cpu().flatten(1), truth.cpu().flatten(1)
    nearest = train[torch.cdist(truth, known).argmin(1).numpy()]
    scores["psnr_nearest_neighbour"] = psnr(images, dataset.rows("images", nearest).numpy())
    if studio.config.target == "clip":
        rows = [[("user", text)] for text in captions]
        made = in_batches(studio.generate, rows, seeds)
    else:
        drawn = torch.from_numpy(in_batches(studio.draw, captions, seeds)).permute(0, 3, 1, 2)
        side = drawn.shape[-1] if studio.net.clip is not None else studio.tower.side
        drawn = resize(drawn, [side, side], antialias=True).permute(0, 2, 3, 1)
        made = in_batches(studio.see, drawn.numpy())
    words = [dataset.texts[i]["caption"].split()[-1] for i in train]
    for name, vectors in (("real", truth), ("generated", made.cpu().flatten(1))):
        accuracy = class_accuracy(known, words, vectors, [text.split()[-1] for text in captions])
        if accuracy is not None:  # captions of free text, or few of them, have no classes
            scores[f"class_accuracy_{name}"] = accuracy
    return scores


def class_accuracy(known, words, vectors, truth, least=20):
    """Share of vectors (B, D) whose nearest class mean is that of their class in `truth`.

    known (n, D) are training vectors, words their classes. The 100 commonest count that have
    `least` members; a vector of another class does not. None if no vector counts.
    """
    classes = [word for word, n in Counter(words).most_common(100) if n >= least]
    rows = [i for i, word in enumerate(truth) if word in classes]
    if not rows:
        return None
    means = [known[[w == word for w in words]].mean(0) for word in classes]
    nearest = torch.cdist(vectors[rows], torch.stack(means)).argmin(1).tolist()
    return share(classes[n] == truth[i] for n, i in zip(nearest, rows))


def psnr(a, b):
    """Mean over pictures of the peak signal-to-noise ratio of uint8 pictures, in dB."""
    error = np.square(a.astype(np.float32) - b.astype(np.float32)).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-3))))


def matmul_rate(device, side=2048):
    """TFLOP/s of matmuls in float32 (a card's TF32): the machine's own rate."""
    names = {"matrix": torch.rand(side, side, device=device)}
    timer = Timer("matrix @ matrix", globals=names, num_threads=torch.get_num_threads())
    return 2 * side**3 / timer.blocked_autorange().median / 1e12


def evaluate_run(studio, seed, count):
    """All scores of a run, as a dictionary."""
    begun, dataset = time.perf_counter(), data.PreparedSet(studio.config.data)
    same = dataset.fingerprint == studio.facts["fingerprint"]
    if dataset.facts["kind"] == "photos" and not same:  # all sets of shapes are of one world
        raise ValueError(f"{studio.config.data} is not the set that this run learned from")
    scores = evaluate_clip(studio, dataset) if studio.net.clip is not None else {}
    if dataset.facts["kind"] == "shapes":
        scores |= evaluate_understanding(studio, dataset, seed)
        scores |= evaluate_shapes(studio, seed, count)
    else:
        scores |= evaluate_photos(studio, dataset, seed)
    stages = {name: round(seconds, 1) for name, seconds in studio.seconds.items()}
    scores |= {"seconds_total": round(sum(stages.values()), 1), "seconds_by_stage": stages}
    scores |= {"seconds_eval": round(time.perf_counter() - begun, 1), "seed": seed, "count": count}
    rate = matmul_rate(studio.device)
    machine = f"{platform.machine()}, {studio.device}, {torch.get_num_threads()} threads"
    return scores | {"machine": f"{machine}, {rate:.2f} TFLOP/s", "torch": torch.__version__}


def write_scores(run, out, name, evaluate):
    """Writes evaluate(checkpoint of the run) to `out`, or to `name` beside the checkpoint."""
    path = find_run(run)
    target = Path(out or path.with_name(name))
    if target.is_dir():
        raise ValueError(f"--out {target} is a folder: expected a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=target.parent).close()  # fails now rather than after the work
    print(f"checkpoint {path}")
    text = json.dumps(evaluate(path), indent=2)
    data.write_whole(target, lambda temporary: temporary.write_text(text))
    print(f"{text}\n{target}")


@dataclass(frozen=True)
class Settings:
    """What to score: the fields are the flags, the comments their help."""

    run: str = ""  # folder of a run, or a checkpoint; without, the newest below out/
    out: str = ""  # file to write; without, scores.json beside the checkpoint
    seed: int = 0  # of the noise
    count: int = 4  # pictures for each prompt
    plan: bool = True  # plan before drawing

    def __post_init__(self):
        if not (0 <= self.seed <= 2000 and 1 <= self.count <= 1000):
            raise ValueError("expected --seed 0 to 2000 and --count 1 to 1000")


def main(arguments=None):
    with data.plain_errors("shapeseval.py"):
        s = data.parse(Settings, __doc__, arguments)

        def evaluate(path):
            return evaluate_run(Studio(path, Drawing(plan=s.plan)), s.seed, s.count)

        write_scores(s.run, s.out, "scores.json", evaluate)


if __name__ == "__main__":
    main()
