"""Scores what a run can do besides ShapesEval: edits, their undoing, dialogues and round trips.

python tests/abilities.py --run out/demo          writes abilities.json beside the checkpoint
"""

import math
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import shapeseval as se  # noqa: E402  (found through the line above)
from shapeseval import data, share, world  # noqa: E402

from sample import Chat, Studio  # noqa: E402

SAME = 5  # px, of an object that was to stay
TIMES = 5  # that each dialogue is played
TRIPS = 400  # captions and pictures of the round trips


def judge_edit(before, after, instruction, found):
    """Whether the objects found in a picture are `before` with the instruction carried out.

    What `before` and `after` share must be there, within SAME px, and nothing else but what is
    new. That has its kind, and its relation if the instruction names one, else its place.
    """
    kept = [o for o in after if o in before]
    new = [o for o in after if o not in before]
    hits, left = se.take_nearest(kept, found, SAME)
    if hits < len(kept) or len(left) != len(new):
        return False
    if not new:
        return True
    (item,), (wanted,) = left, new
    if not item or item[:2] != wanted[:2]:
        return False
    relation = re.search("|".join(world.RELATIONS), instruction)
    if not relation:
        return math.dist(item[2:4], wanted[2:4]) <= SAME
    name = instruction.split(relation[0])[-1].removeprefix(" the ").strip()
    (anchor,) = [o for o in kept if name in ("it", o.shape, f"{o.color} {o.shape}")]
    return relation[0] in world.relations(item, anchor)


def edit_cases(seed, count, held=False):
    """`count` changes of each kind: (kind, objects before, after, instruction, way back). With
    `held`, of scenes with a pair that training never shows."""
    rng, cases = np.random.default_rng([seed, 2]), defaultdict(list)
    while len(cases) < 4 or min(map(len, cases.values())) < count:
        objects, _ = world.random_scene(rng)
        if held:
            objects = swap_in_held(objects, rng)
        changed = world.change(objects, rng)
        if not changed:
            continue
        after, there, back = changed
        cases[there.split()[0]].append((objects, after, there, back))
        cases[back.split()[0]].append((after, objects, back, there))
    return [(kind, *case) for kind, rows in cases.items() for case in rows[:count]]


def swap_in_held(objects, rng):
    """The scene, one object of which gets the color that its shape never has in training."""
    i = rng.integers(len(objects))
    color = next(color for shape, color in world.HELD_OUT if shape == objects[i].shape)
    return [o._replace(color=color) if n == i else o for n, o in enumerate(objects)]


def evaluate_edits(studio, seed, count, held=False, planned=True):
    """{"edit": {kind: share}, "undo": {kind: share}}: the undoing reads the drawn picture."""
    cases = edit_cases(seed, count, held)
    kinds, before, after, there, back = zip(*cases)
    rng = np.random.default_rng([seed, 3])
    images = np.stack([world.render(objects, rng) for objects in before])
    seeds = [seed * 1_000_000 + i for i in range(len(cases))]
    table = {}
    for name, texts, start, end in (("edit", there, before, after), ("undo", back, after, before)):
        vectors = se.in_batches(studio.see, images)
        plans = [None] * len(cases)
        if planned:
            plans = se.in_batches(lambda t, v: studio.plan(t, None, v), texts, vectors)
            right = [Counter(o[:2] for o in se.parse_plan(p)) for p in plans]
            hits = [p == Counter(o[:2] for o in objects) for p, objects in zip(right, end)]
            table[f"{name}_plan"] = share(hits)
        images = se.in_batches(studio.draw, texts, seeds, plans, vectors)
        found = se.find_objects(images)
        judged = defaultdict(list)
        for kind, *row in zip(kinds, start, end, texts, found):
            judged[kind].append(judge_edit(*row))
        rows = {kind: share(hits) for kind, hits in judged.items()}
        table[name] = rows | {"mean": float(np.mean(list(rows.values())))}
    return table


SIDES = (("left of", "right of"), ("above", "below"))


def dialogues():
    """Ten scripts of four turns: what is said, and the answer, or the objects. {} stands for the
    side of the first object on which there is more room: beside the other one there may be none."""
    pairs = [("red", "circle"), ("blue", "square"), ("green", "triangle"), ("orange", "circle")]
    pairs += [("yellow", "square"), ("purple", "triangle"), ("blue", "circle"), ("red", "square")]
    pairs += [("orange", "triangle"), ("green", "circle")]
    scripts = []
    for i, (color, shape) in enumerate(pairs):
        other_color, other = next(p for p in pairs[i + 1 :] + pairs if p[1] != shape)
        new_color = [c for c in world.COLORS if (shape, c) in world.SEEN and c != color][i % 4]
        one, two = (shape, color), (other, other_color)
        endings = [(f"what color is the {other}?", other_color)]
        endings.append((f"make the {shape} {new_color}", [(shape, new_color), two]))
        endings.append((f"remove the {shape}", [two]))
        script = [(f"draw {world.noun(*one)}", [one]), ("how many objects are there?", "one")]
        script.append((f"add {world.noun(*two)} {{}} it", [two, one]))
        scripts.append([*script, endings[i % 3]])
    return scripts


def evaluate_dialogues(studio):
    """Share of the turns that are right, and the number of dialogues right in all turns. Each is
    played TIMES, with other noise. Half of the scripts ask for above or below, half for a side."""
    turns, whole, scripts = [], 0, dialogues() * TIMES
    for n, script in enumerate(scripts):
        chat, hits, side = Chat(studio), [], None
        chat.seed = 100 * n
        for text, wanted in script:
            said, picture = chat.say(text.format(side))
            if isinstance(wanted, str):
                hits.append(picture is None and said == wanted)
            elif picture is None:
                hits.append(False)
            else:
                found = se.find_objects(picture[None])[0]
                relation = side if "{}" in text else None
                prompt = se.Prompt(text, "two", tuple(wanted), relation)
                hits.append(se.judge(prompt, found))
            if side is None:
                axis = 1 - n % 2
                near = hits[0] and found[0][2 + axis] < world.SIDE / 2
                side = SIDES[axis][bool(near)]
        turns += hits
        whole += all(hits)
    return {"turns": share(turns), "dialogues_right": whole, "dialogues": len(scripts)}


def mmd(a, b):
    """Squared maximum mean discrepancy of two sets of rows (n, D), with a Gaussian kernel whose
    width is the median distance."""
    rows = torch.cat([a, b])
    squares = torch.cdist(rows, rows).square()
    kernel = (-squares / squares.median()).exp()
    n = len(a)
    parts = kernel[:n, :n], kernel[n:, n:]
    same = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in parts)
    return float(same - 2 * kernel[:n, n:].mean())


def evaluate_round_trips(studio, seed, limit):
    """Text -> vectors -> text, text -> picture -> text, picture -> text -> picture: shares whose
    objects are the same; and how far drawn vectors lie from real ones, beside two real sets."""
    prompts = se.long_prompts(limit)
    texts = [p.text for p in prompts]
    seeds = [seed * 1_000_000 + i for i in range(limit)]
    wanted = [Counter(p.objects) for p in prompts]
    made = se.in_batches(studio.generate, [[("user", text)] for text in texts], seeds)
    describe = [data.DESCRIBE] * limit
    scores = {}
    again = se.in_batches(studio.decode, made, seeds)
    for name, vectors in (("vectors", made), ("picture", se.in_batches(studio.see, again))):
        said = se.in_batches(studio.answer, vectors, describe)
        hits = [se.parse_caption(text) == pairs for text, pairs in zip(said, wanted)]
        scores[f"text_{name}_text"] = share(hits)
    rng = np.random.default_rng([seed, 4])
    scenes = [world.random_scene(rng)[0] for _ in range(2 * limit)]
    images = np.stack([world.render(objects, rng) for objects in scenes])
    real = se.in_batches(studio.see, images)
    said = se.in_batches(studio.answer, real[:limit], describe)
    drawn = se.find_objects(se.in_batches(studio.draw, said, seeds))
    hits = [
        Counter(item and item[:2] for item in found) == Counter(o[:2] for o in objects)
        for found, objects in zip(drawn, scenes)
    ]
    scores["picture_text_picture"] = share(hits)
    flat = [v.cpu().flatten(1) for v in (made, real[:limit], real[limit:])]
    scores["mmd_generated"], scores["mmd_real"] = mmd(*flat[:2]), mmd(*flat[1:])
    return scores


@dataclass(frozen=True)
class Settings:
    """What to score: the fields are the flags, the comments their help."""

    run: str = ""  # folder of a run, or a checkpoint; without, the newest below out/
    out: str = ""  # file to write; without, abilities.json beside the checkpoint
    seed: int = 0  # of the noise
    edits: int = 100  # changes of each kind


def evaluate_abilities(studio, seed, edits):
    """All scores of a run, as a dictionary."""
    kinds = {"seen": {}, "heldout": {"held": True}, "unplanned": {"planned": False}}
    scores = {f"edits_{k}": evaluate_edits(studio, seed, edits, **how) for k, how in kinds.items()}
    scores["dialogues"] = evaluate_dialogues(studio)
    return scores | {"round_trips": evaluate_round_trips(studio, seed, TRIPS)}


def main(arguments=None):
    with data.plain_errors("abilities.py"):
        s = data.parse(Settings, __doc__, arguments)

        def evaluate(path):
            return evaluate_abilities(Studio(path), s.seed, s.edits)

        se.write_scores(s.run, s.out, "abilities.json", evaluate)


if __name__ == "__main__":
    main()
