"""The toy world of nano-blip3o: coloured shapes with captions, questions, plans and edits.

    python notebooks/shapes.py --out data/shapes --count 30000 --seed 0

It writes a prepared set, as data.py does of real pictures. The four files import nothing from it.
"""

import sys
from collections import Counter, namedtuple
from dataclasses import asdict, dataclass
from itertools import combinations, permutations, product
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data as D  # noqa: E402  (found through the line above)

# ---------------------------------------------------------------------------------- the pictures

SIDE = 64  # px
BACKGROUND = (244, 244, 244)
TALL = 3**0.5 / 2  # height of the triangle divided by its width

# height of the bounding box divided by its width; distance (dx, dy, width) from a point, as seen
# from the box's centre, to the edge of the shape, negative inside; px
Shape = namedtuple("Shape", "height distance")


def triangle(dx, dy, width):
    bottom = dy - width * TALL / 2
    flank = TALL * np.abs(dx) - (dy + width * TALL / 2) / 2
    return np.maximum(bottom, flank)


SHAPES = {
    "circle": Shape(1, lambda dx, dy, width: np.hypot(dx, dy) - width / 2),
    "square": Shape(1, lambda dx, dy, width: np.maximum(np.abs(dx), np.abs(dy)) - width / 2),
    "triangle": Shape(TALL, triangle),
}
COLORS = {"red": (220, 45, 45), "green": (50, 165, 70), "blue": (50, 90, 220)}
COLORS |= {"yellow": (240, 215, 40), "purple": (150, 60, 185), "orange": (240, 125, 20)}
HELD_OUT = {("triangle", "red"), ("square", "green"), ("circle", "purple")}  # in no training scene
SEEN = [pair for pair in product(SHAPES, COLORS) if pair not in HELD_OUT]
# The direction of the first object from the second; y points down, as in the image.
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = ("zero", "one", "two", "three", "four")
KINDS = ("single", "color", "counting", "two", "attribution", "position", "free")

# A shape in a picture; x, y = centre of its bounding box and w, h = its size, in px.
Object = namedtuple("Object", "shape color x y w h")


def noun(shape, color=None, count=1):
    """`noun("circle", "orange")` is "an orange circle", with count 2 "two orange circles"."""
    name = f"{color} {shape or 'shape'}" if color else shape or "shape"
    if count > 1:
        return f"{NUMBERS[count]} {name}s"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def relations(a, b, least=0.5):
    """The relations of object a to object b by GenEval's formula: a subset of RELATIONS."""
    delta = np.subtract(a[2:4], b[2:4])
    beyond = np.maximum(np.abs(delta) - 0.1 * np.add(a[4:], b[4:]), 0)
    offset = np.sign(delta) * beyond / max(np.linalg.norm(delta), 1e-6)
    return {name for name, direction in RELATIONS.items() if offset @ direction > least}


def place(pairs, rng, relation=None, beside=(), width=None, tries=10**9):
    """Random Objects of these (shape, color), then those of `beside`, which stay where they are.

    Each is 1 px from the border. A relation holds from object 0 to object 1, with a margin. A
    scene that jams starts again with the same sizes: size must not betray the count. After so many
    tries of a hundred layouts the answer is [].
    """
    ratios = np.array([(1, SHAPES[shape].height) for shape, _ in pairs])
    sizes = (width or rng.uniform(14, 26, (len(pairs), 1))) * ratios  # (objects, 2)
    for _ in range(tries):
        layouts = rng.uniform(1 + sizes / 2, SIDE - 1 - sizes / 2, (100, *sizes.shape))
        for centres in layouts.tolist():
            placed = zip(pairs, centres, sizes.tolist())
            objects = [*(Object(*pair, *at, *size) for pair, at, size in placed), *beside]
            free = all(apart(a, b) for a, b in combinations(objects, 2))
            if free and (not relation or relation in relations(*objects[:2], least=0.55)):
                return objects
    return []


def apart(a, b):
    """Whether 2 px lie between the boxes of two objects."""
    return abs(a.x - b.x) >= (a.w + b.w) / 2 + 2 or abs(a.y - b.y) >= (a.h + b.h) / 2 + 2


def random_scene(rng):
    """Random objects, and the prompt in GenEval's wording that asks for them.
    Equal shares of its six kinds and of free scenes, whose prompt is "". What a prompt does not
    name is random. No held-out pair occurs."""
    kind = str(rng.choice(KINDS))
    counts = {"single": 1, "color": 1, "counting": rng.integers(2, 5), "free": rng.integers(1, 5)}
    count = counts.get(kind, 2)
    while True:
        pairs = [SEEN[i] for i in rng.integers(len(SEEN), size=count)]
        shapes, colors = (len(set(names)) for names in zip(*pairs))
        fine = shapes == (1 if kind == "counting" else count)
        if kind == "free" or fine and (kind != "attribution" or colors == 2):
            break
    relation = str(rng.choice(list(RELATIONS))) if kind == "position" else None
    objects = place(pairs, rng, relation)
    if kind == "free":
        return objects, ""
    if kind == "counting":
        return objects, noun(pairs[0][0], None, count)
    if kind not in ("color", "attribution"):
        pairs = [(shape, None) for shape, _ in pairs]
    return objects, f" {relation or 'and'} ".join(noun(*pair) for pair in pairs)


def called(o, objects, rng):
    """One of the ways to name an object so that no other of the scene is meant."""
    names = {"it": objects, f"the {o.shape}": [p for p in objects if p.shape == o.shape]}
    names = [name for name, meant in names.items() if len(meant) == 1]
    return str(rng.choice([*names, f"the {o.color} {o.shape}"]))


def change(objects, rng):
    """Changes a scene: -> (objects after, the instruction, the instruction that undoes it).
    An object gets another color, or is removed (to undo it is to add it), or moves. None if chance
    picks a change that this scene does not allow. No held-out pair occurs."""
    counts = Counter(o[:2] for o in objects)
    alone = [o for o in objects if counts[o[:2]] == 1]
    if not alone:
        return None
    rng.shuffle(alone)
    a, others = alone[0], [o for o in objects if o is not alone[0]]
    kind = rng.choice(["color", "remove", "move", "move"])  # few scenes allow a move
    name = called(a, objects, rng)
    if kind == "color":
        new = a._replace(color=str(rng.choice(list(COLORS))))
        if new[:2] in counts or new[:2] in HELD_OUT:
            return None
        after = [*others, new]
        return after, f"make {name} {new.color}", f"make {called(new, after, rng)} {a.color}"
    links = sorted(relations(a, alone[1])) if len(alone) > 1 else []
    if not links:
        return None
    b = alone[1]
    if kind == "remove":
        there, back = f"remove {name}", f"add {noun(*a[:2])} {links[0]} {called(b, others, rng)}"
        return others, there, back
    relation = str(rng.choice([r for r in RELATIONS if r not in links]))
    beside = [b, *(o for o in others if o is not b)]
    after = place([a[:2]], rng, relation, beside, a.w, tries=10)
    lost = [r for r in links if after and r not in relations(*after[:2])]
    if not lost:  # the way back would be no change
        return None
    there = f"move {name} {relation} {called(b, objects, rng)}"
    back = f"move {called(a, objects, rng)} {lost[0]} {called(b, objects, rng)}"
    return after, there, back


def coverage(shape, dx, dy, width):
    """Share inside a shape of this width of pixels at (dx, dy), seen from its box's centre."""
    return np.clip(0.5 - SHAPES[shape].distance(dx, dy, width), 0, 1)


def render(objects, rng):
    """The picture of a scene: (64, 64, 3) uint8, each color up to 8 steps off."""
    canvas = np.full((SIDE, SIDE, 3), BACKGROUND, np.float32)
    grid = np.arange(SIDE) + 0.5  # centres of pixels
    for o in objects:
        color = COLORS[o.color] + rng.integers(-8, 9, 3)
        share = coverage(o.shape, grid - o.x, (grid - o.y)[:, None], o.w)[..., None]
        canvas += share * (color - canvas)
    return canvas.round().astype(np.uint8)


# ------------------------------------------------------------------------------------- the texts

FRAMES = ("{}", "{}", "a picture of {}", "an image with {}", "{} on a plain background")
FRAMES += ("{n}: {}", "a simple drawing of {}", "a white scene with {}", "you can see {}")


def scene_texts(prompt, objects, rng):
    """The texts of a scene, as `data.PreparedSet` has them; the edits are missing."""
    links = [(a, r, b) for a, b in permutations(objects, 2) for r in sorted(relations(a, b))]
    caption = whole = long_caption(objects, links, rng)
    if rng.random() < 0.1:  # a part of the scene, as in real captions
        shape, color = objects[0][:2]
        caption = noun(shape, color if rng.random() < 0.5 else None)
    texts = {"caption": caption, "whole": whole, "plan": plan(objects)}
    said = (caption, prompt or caption)
    texts["prompts"] = [[text, in_order(texts["plan"], text)] for text in said]
    return texts | {"qa": questions(objects, links, rng), "edits": []}


COLUMNS = "abcdefgh"  # of a plan's grid
LINE = rf"({'|'.join(SHAPES)}) ({'|'.join(COLORS)}) {D.CELL}"  # of a plan, as a pattern


def plan(objects):
    """A short line for each object: what it is, and which cell of an 8 x 8 grid holds its centre.
    "circle green c4; square red f2": columns a to h from the left, rows 1 to 8 from the top."""
    cells = [f"{COLUMNS[int(o.x * 8 / SIDE)]}{int(o.y * 8 / SIDE) + 1}" for o in objects]
    lines = sorted(zip(cells, objects))  # one order, from left to right, for each scene
    return "; ".join(f"{o.shape} {o.color} {cell}" for cell, o in lines)


def long_caption(objects, links, rng):
    """Names every object with its color, and up to two relations between unique objects."""
    counts = Counter(o[:2] for o in objects)
    names = [noun(*pair, count) for pair, count in counts.items()]
    rng.shuffle(names)
    text = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    facts = [(a, r, b) for a, r, b in links if counts[a[:2]] == counts[b[:2]] == 1]
    rng.shuffle(facts)
    if len(objects) == 2 and facts and rng.random() < 0.5:
        a, r, b = facts[0]
        text, facts = f"{noun(*a[:2])} {r} {noun(*b[:2])}", []
    text = str(rng.choice(FRAMES)).format(text, n=noun(None, None, len(objects)))
    facts = facts[: rng.integers(3)]
    clauses = [f"the {a.color} {a.shape} {r} the {b.color} {b.shape}" for a, r, b in facts]
    return f"{text}, with {' and '.join(clauses)}" if clauses else text


def questions(objects, links, rng):
    """4 to 6 [question, answer] with one right answer each; "is there" is balanced."""
    shapes = Counter(o.shape for o in objects)
    pool = [["how many objects are there?", NUMBERS[len(objects)]]]
    for shape in SHAPES:
        pool.append([f"how many {shape}s are there?", NUMBERS[shapes[shape]]])
    for o in objects:
        pool.append([f"what color is the {o.shape}?", o.color])
        pool.append([f"what shape is the {o.color} object?", o.shape])
    for a, r, b in links:
        if shapes[b.shape] == 1:
            pool.append([f"what is {r} the {b.shape}?", f"{a.color} {a.shape}"])
        if shapes[a.shape] == shapes[b.shape] == 1:
            pool.append([f"where is the {a.shape} relative to the {b.shape}?", r])
    times = Counter(question for question, _ in pool)
    pool = [pair for pair in pool if times[pair[0]] == 1]
    rng.shuffle(pool)
    chosen = pool[: rng.integers(2, 5)]
    there = [o[:2] for o in objects]
    absent = [pair for pair in SEEN if pair not in there]
    for pairs, answer in ((there, "yes"), (absent, "no")):
        chosen.append([f"is there {noun(*rng.choice(pairs))}?", answer])
    rng.shuffle(chosen)
    return chosen


def alike(plan, rng):
    """Equal objects at a plan's places: -> (their prompt, their plan). No held-out pair occurs."""
    shape, color = SEEN[rng.integers(len(SEEN))]
    cells = [line[-2:] for line in plan.split("; ")]
    lines = [f"{shape} {color} {cell}" for cell in cells]
    return noun(shape, color, len(lines)), "; ".join(lines)


def in_order(plan, text):
    """The lines of a plan in the order in which a text has or names them."""

    def found(line):
        shape, color, _ = line.split()
        # what is not named, -1, comes last
        return [text.find(w) % 10**6 for w in (line, f"{color} {shape}", shape)]

    return "; ".join(sorted(plan.split("; "), key=found))


# --------------------------------------------------------------------------------------- the set


@dataclass(frozen=True)
class Shapes:
    """Scenes of coloured shapes with texts, a thousand to a part."""

    out: str = "data/shapes"  # folder to write
    count: int = 30_000  # scenes
    seed: int = 0  # other scenes for another seed

    def prepare(self):
        """Draws the scenes -> PreparedSet."""
        facts = {"kind": "shapes", "line": LINE, "side": SIDE, "channels": None} | asdict(self)
        parts = {f"part-{i // 1000:05d}.safetensors": i for i in range(0, self.count, 1000)}
        return D.prepare(facts, parts, self.read)

    def read(self, start):
        rng = np.random.default_rng([self.seed, start])
        count, texts, images = min(1000, self.count - start), [], []
        while len(texts) < count:
            objects, prompt = random_scene(rng)
            changed = change(objects, rng) if len(texts) < count - 1 else None
            texts.append(scene_texts(prompt, objects, rng))
            images.append(render(objects, rng))
            if changed:  # the row after is the scene after
                after, there, back = changed
                texts.append(scene_texts("", after, rng))
                images.append(render(after, rng))
                before, after = texts[-2]["plan"], texts[-1]["plan"]
                texts[-2]["edits"].append([there, 1, in_order(after, before)])
                texts[-1]["edits"].append([back, -1, in_order(before, after)])
        (chance,) = rng.spawn(1)
        for text in texts:
            text["prompts"].append(alike(text["plan"], chance))
        return texts, {"images": torch.from_numpy(np.stack(images))}, {}


def main(arguments=None):
    with D.plain_errors("shapes.py"):
        D.parse(Shapes, __doc__, arguments).prepare()


if __name__ == "__main__":
    main()
