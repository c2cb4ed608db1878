"""The world of shapes, its texts and its set on disk, and the helpers of the command line."""

import math
import re
from collections import Counter
from dataclasses import fields
from itertools import product

import numpy as np
import pytest
import torch
from abilities import judge_edit
from shapeseval import Prompt, fits, judge, parse_caption

import data
import sample
import train
from notebooks import shapes as world
from notebooks.shapes import COLORS, HELD_OUT, SEEN, SHAPES, Object

SCENES = 3000


@pytest.fixture(scope="module")
def scenes():
    """(prompt, objects, texts) of many random scenes from several seeds."""
    made = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        for _ in range(SCENES // 6):
            objects, prompt = world.random_scene(rng)
            made.append((prompt, objects, world.scene_texts(prompt, objects, rng)))
    return made


# ------------------------------------------------------------------------------------- the world


def test_no_held_out_pair_is_drawn_or_named(scenes):
    names = re.compile("|".join(f"{color} {shape}" for shape, color in HELD_OUT))
    seen = Counter()
    for _, objects, texts in scenes:
        seen.update(o[:2] for o in objects)
        said = [texts["caption"], texts["prompts"][1][0], *(" ".join(pair) for pair in texts["qa"])]
        assert not [text for text in said if names.search(text)]
    assert set(seen) == set(SEEN) and not HELD_OUT & set(seen)
    assert names.search("is there a red triangle?")  # the search would find one


def test_an_object_is_placed_beside_those_that_stay():
    """In its relation to the first of them, in its width, or nowhere where there is no room."""
    rng = np.random.default_rng(0)
    fixed = [Object("circle", "red", 32.0, 32.0, 16.0, 16.0)]
    for relation in world.RELATIONS:
        new, *rest = world.place([("square", "blue")], rng, relation, fixed, 15.0)
        assert rest == fixed and new.w == 15 and relation in world.relations(new, fixed[0])
        gaps = np.abs(np.subtract(new[2:4], fixed[0][2:4])) - np.add(new[4:], fixed[0][4:]) / 2
        assert gaps.max() >= 2
    full = [Object("square", "red", 32.0, 32.0, 60.0, 60.0)]
    assert world.place([("square", "blue")], rng, None, full, tries=50) == []


def test_a_change_is_what_its_instruction_says():
    """Both ways. It names one object; all others stay; no held-out pair comes up."""
    rng, kinds = np.random.default_rng(0), Counter()
    scenes = (world.random_scene(rng)[0] for _ in range(1200))
    made = [(objects, *changed) for objects in scenes if (changed := world.change(objects, rng))]
    for before, after, there, back in made:
        assert not HELD_OUT & {o[:2] for o in after}
        for old, new, said in ((before, after, there), (after, before, back)):
            gone, come = (Counter(a) - Counter(b) for a, b in ((old, new), (new, old)))
            verb, rest = said.split(" ", 1)
            kinds[verb] += 1
            sizes = {"make": (1, 1), "move": (1, 1), "remove": (1, 0), "add": (0, 1)}
            assert (len(gone), len(come)) == sizes[verb]
            if verb != "add":  # one object answers to the name
                (target,) = gone
                name = re.match(r"it|the (\w+ )?(circle|square|triangle)", rest)[0]
                names = {o: ("it", f"the {o.shape}", f"the {o.color} {o.shape}") for o in old}
                assert [o for o in old if name in names[o]] == [target]
            if verb == "make":
                assert [*come][0] == target._replace(color=said.split()[-1])
            elif verb == "move":
                assert [*come][0][:2] == target[:2] and [*come][0].w == target.w
            elif verb == "add":
                assert said.startswith(f"add {world.noun(*[*come][0][:2])} ")
            assert judge_edit(old, new, said, new)  # the relation, to the one object of its name
    assert set(kinds) == {"make", "move", "add", "remove"} and min(kinds.values()) > 40


def test_a_plan_has_a_line_for_each_object_from_left_to_right():
    objects = [Object("square", "red", 43.0, 9.0, 15, 15)]
    objects.append(Object("circle", "green", 20.0, 31.9, 20, 20))
    assert world.plan(objects) == "circle green c4; square red f2"
    plans = re.compile(f"{world.LINE}(; {world.LINE})*")
    assert plans.fullmatch("circle green c4; square red f2")
    wrong = ["circle green", "two", "circle green c9", "circle green i1", "green circle c4", ""]
    wrong += ["circle green c4square red f2", "circle green c4; "]
    for text in wrong:
        assert not plans.fullmatch(text)
    assert world.plan([]) == ""


def test_a_plan_is_put_in_the_order_of_a_text():
    plan = "circle red b3; square blue c4; circle red f6"
    right = "circle red b3; circle red f6; square blue c4"
    assert world.in_order(plan, "two red circles and a blue square") == right
    assert world.in_order(plan, "a square and two circles").startswith("square blue c4; ")
    assert world.in_order(plan, "three objects") == plan
    assert world.in_order(plan, "a blue square").startswith("square blue c4; ")


def test_a_plan_after_an_edit_keeps_the_order_before_and_ends_with_what_is_new():
    before = "circle red b3; square blue c4; circle red f6"
    after = "circle red a1; circle red f6; square blue c4"
    assert world.in_order(after, before) == "square blue c4; circle red f6; circle red a1"
    removed = "square blue c4; circle red f6"
    assert world.in_order(removed, before) == removed


def test_a_set_with_older_texts_is_refused(tmp_path):
    world.Shapes(out=str(tmp_path), count=4).prepare()
    note = tmp_path / "settings.json"
    note.write_text(note.read_text().replace(f'"texts": {data.TEXTS}', '"texts": 2'))
    with pytest.raises(ValueError, match="another version"):
        data.PreparedSet(tmp_path)


def test_a_plan_of_equal_objects_keeps_the_places(tmp_path):
    rng, seen = np.random.default_rng(0), set()
    for _ in range(300):
        said, plan = world.alike("circle red b3; square blue c4; circle red f6", rng)
        (shape, color, _), *_ = lines = [line.split() for line in plan.split("; ")]
        assert lines == [[shape, color, cell] for cell in ("b3", "c4", "f6")]
        assert said == f"three {color} {shape}s"
        seen.add((shape, color))
    assert seen == set(world.SEEN)  # and nothing that is held out
    said, plan = world.alike("circle red b3", rng)
    assert said == world.noun(*plan.split()[:2])
    for text in world.Shapes(out=str(tmp_path), count=50).prepare().texts:
        (_, _, (said, plan)), cells = text["prompts"], re.findall(data.CELL, text["plan"])
        assert re.findall(data.CELL, plan) == cells
        assert said == world.noun(*plan.split()[:2], len(cells))


def test_seven_kinds_have_equal_shares(scenes):
    kinds = Counter()
    for prompt, _, _ in scenes:
        colored = any(color in prompt for color in COLORS)
        word = next((w for w in (" and ", " of ", " above ", " below ") if w in prompt), "")
        counted = prompt.split(" ")[0] in world.NUMBERS
        kinds[(prompt == "", colored, word == " and ", word not in ("", " and "), counted)] += 1
    assert len(kinds) == 7
    # five standard deviations of a binomial count
    allowed = 5 * math.sqrt(SCENES * 6 / 49)
    assert all(abs(count - SCENES / 7) < allowed for count in kinds.values())


def test_a_prompt_names_its_scene(scenes):
    for prompt, objects, _ in scenes:
        named = tuple(parse_caption(prompt).elements())
        relation = re.search("|".join(world.RELATIONS), prompt)
        assert not prompt or judge(Prompt(prompt, "", named, relation and relation[0]), objects)


def test_objects_keep_their_distances(scenes):
    counts = Counter(len(objects) for _, objects, _ in scenes)
    assert set(counts) == {1, 2, 3, 4}
    for _, objects, _ in scenes:
        for i, a in enumerate(objects):
            assert 14 <= a.w <= 26 and a.h == pytest.approx(a.w * SHAPES[a.shape].height)
            assert 1 <= a.x - a.w / 2 and a.x + a.w / 2 <= 63
            assert 1 <= a.y - a.h / 2 and a.y + a.h / 2 <= 63
            for b in objects[:i]:
                apart_x = abs(a.x - b.x) - (a.w + b.w) / 2
                apart_y = abs(a.y - b.y) - (a.h + b.h) / 2
                assert max(apart_x, apart_y) >= 2


def test_place():
    rng = np.random.default_rng(0)
    widths = [o.w for _ in range(300) for o in world.place([("circle", "red")] * 4, rng)]
    # uniform from 14 to 26, however crowded: mean 20, standard deviation 3.46
    assert np.mean(widths) == pytest.approx(20, abs=5 * 3.46 / math.sqrt(len(widths)))
    pairs = [("circle", "red"), ("square", "blue"), ("square", "blue")]
    for relation in list(world.RELATIONS) * 30:
        a, b, _ = world.place(pairs, rng, relation)
        assert relation in world.relations(a, b, 0.55)


def test_relations_by_hand():
    def at(x, y, size=10):
        return Object("circle", "red", x, y, size, size)

    assert world.relations(at(10, 30), at(50, 30)) == {"left of"}
    assert world.relations(at(50, 30), at(10, 30)) == {"right of"}
    assert world.relations(at(30, 10), at(30, 50)) == {"above"}
    assert world.relations(at(30, 50), at(30, 10)) == {"below"}
    # offset (20 - 2) / hypot(20, 20) = 0.64 in both directions
    assert world.relations(at(10, 10), at(30, 30)) == {"left of", "above"}
    # across: (12 - 2) / hypot(20, 12) = 0.43, down: (20 - 2) / 23.3 = 0.77
    assert world.relations(at(18, 10), at(30, 30)) == {"above"}
    assert world.relations(at(30, 30), at(31, 30)) == set()  # within a tenth of the sizes


def test_coverage_has_the_area_and_the_place_of_the_shape():
    areas = {"circle": math.pi / 4, "square": 1, "triangle": math.sqrt(3) / 4}
    assert set(areas) == set(SHAPES)
    grid = np.arange(64) + 0.5
    for shape, width in product(SHAPES, (14, 20.3, 26)):
        share = world.coverage(shape, grid - 31.7, grid[:, None] - 32.4, width)
        assert share.min() == 0 and share.max() == 1
        assert share.sum() == pytest.approx(areas[shape] * width**2, rel=0.02)
        x, y = share.sum(0) @ grid / share.sum(), share.sum(1) @ grid / share.sum()
        # the centroid of a triangle lies a sixth of its height below the centre of its box
        rise = math.sqrt(3) / 12 * width if shape == "triangle" else 0
        assert (x, y) == pytest.approx((31.7, 32.4 + rise), abs=0.1)


def test_render_by_pixels():
    objects = [Object("square", "blue", 20, 20, 16, 16), Object("circle", "red", 44, 40, 20, 20)]
    image = world.render(objects, np.random.default_rng(0))
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert (image[0, 0] == world.BACKGROUND).all() and (image[40, 28] == world.BACKGROUND).all()
    for color, (x, y) in (("blue", (20, 20)), ("red", (44, 40))):
        assert abs(image[y, x].astype(int) - COLORS[color]).max() <= 8
    assert (image[13, 13] == image[20, 20]).all()  # a pixel inside the corner
    colors = {tuple(world.render(objects, np.random.default_rng(s))[20, 20]) for s in range(40)}
    assert len(colors) > 30  # each scene has its own shade


# ------------------------------------------------------------------------------------- the texts


def answers(question, objects):
    """All answers that are right, by going through the objects."""

    def the(shape):
        [only] = [o for o in objects if o.shape == shape]  # "the circle" must not be one of two
        return only

    shapes, nouns = Counter(o.shape for o in objects), {world.noun(*o[:2]) for o in objects}
    if match := re.fullmatch("is there (.+)[?]", question):
        return {"yes" if match[1] in nouns else "no"}
    if question == "how many objects are there?":
        return {world.NUMBERS[len(objects)]}
    if match := re.fullmatch("how many (.+)s are there[?]", question):
        return {world.NUMBERS[shapes[match[1]]]}
    if match := re.fullmatch("what color is the (.+)[?]", question):
        return {the(match[1]).color}
    if match := re.fullmatch("what shape is the (.+) object[?]", question):
        [only] = [o for o in objects if o.color == match[1]]
        return {only.shape}
    if match := re.fullmatch("what is (.+) the (.+)[?]", question):
        b = the(match[2])
        [only] = [a for a in objects if a != b and match[1] in world.relations(a, b)]
        return {f"{only.color} {only.shape}"}
    match = re.fullmatch("where is the (.+) relative to the (.+)[?]", question)
    return world.relations(the(match[1]), the(match[2]))


def test_every_answer_is_the_only_right_one(scenes):
    kinds, there = Counter(), Counter()
    for _, objects, texts in scenes:
        assert 4 <= len(texts["qa"]) <= 6
        for question, answer in texts["qa"]:
            assert answers(question, objects) == {answer}
            kinds[" ".join(question.split(" ")[:2])] += 1
            if question.startswith("is there"):
                there[answer] += 1
    assert there == {"yes": SCENES, "no": SCENES}
    wanted = ("how many", "what color", "what shape", "what is", "where is")
    assert all(kinds[kind] > 100 for kind in wanted)
    how_many = [a for _, _, t in scenes for q, a in t["qa"] if "s are" in q and "objects" not in q]
    assert {"zero", "one", "two", "three"} <= set(how_many)


def test_captions_list_every_object_and_true_relations(scenes):
    clause = re.compile(rf"the (\w+) (\w+) ({'|'.join(world.RELATIONS)}) the (\w+) (\w+)")
    form = re.compile(clause.pattern.replace("the ", "an? "))
    whole = relations = 0
    for _, objects, texts in scenes:
        caption, pairs = texts["caption"], Counter(o[:2] for o in objects)
        named = parse_caption(caption)
        short = named.total() == 1 and any(fits(*named, o) for o in objects)
        assert named == pairs or short, caption
        whole += named == pairs
        for color_a, a, word, color_b, b in clause.findall(caption) + form.findall(caption):
            [first] = [o for o in objects if o[:2] == (a, color_a)]
            [second] = [o for o in objects if o[:2] == (b, color_b)]
            assert word in world.relations(first, second)
            relations += 1
        assert len(caption.split(", with ")) - 1 == bool(clause.findall(caption))
    assert 0.85 * SCENES < whole < 0.97 * SCENES  # one of ten is short, some of these are whole
    assert relations > 0.3 * SCENES


def test_tidy():
    forms = [
        "A red  circle",
        " a red circle\n",
        "a\u00a0red circle.",
        "a RED\tcircle",
        "a red circle",
    ]
    assert {data.tidy(text) for text in forms} == {"a red circle"}
    assert data.tidy("Cafe\u0301 e.g. one..") == "caf\u00e9 e.g. one."
    assert data.tidy(" . ") == ""
    assert data.tidy("a circle to the left of a square") == "a circle left of a square"


# ---------------------------------------------------------------------------- the prepared shapes


def test_shapes_are_the_same_for_ever_and_split(tmp_path, capsys):
    """How a set goes on after a kill is shown with photos."""

    def make(folder, seed):
        return world.Shapes(out=str(tmp_path / folder), count=1100, seed=seed).prepare()

    one, again, other = make("a", 3), make("b", 3), make("c", 4)
    assert "1100 kept, 0 dropped" in capsys.readouterr().out
    assert one.fingerprint == again.fingerprint != other.fingerprint
    ids = np.array([0, 1099, 1000, 999, 5])
    assert torch.equal(one.rows("images", ids), again.rows("images", ids))
    assert one.texts == again.texts and len(one) == len(one.texts) == 1100
    assert sorted([*one.train_ids, *one.val_ids]) == list(range(1100)) and len(one.val_ids) == 22
    held = np.isin(range(1100), one.val_ids)
    for i, text in enumerate(one.texts):  # no edit leads from one side to the other
        assert all(held[i + offset] == held[i] for _, offset, _ in text["edits"])
    assert [one.facts[name] for name in ("kind", "side", "channels")] == ["shapes", 64, None]
    with pytest.raises(ValueError, match="another seed, 3"):
        make("a", 5)


def test_damaged_and_foreign_folders_are_named(tmp_path):
    world.Shapes(out=str(tmp_path), count=50).prepare()
    part, note = tmp_path / "part-00000.safetensors", tmp_path / "settings.json"
    for path, content in ((part, part.read_bytes()[:-100]), (note, b"{")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"not a finished set, {path.name} is missing or dam"):
            data.PreparedSet(tmp_path)
    with pytest.raises(ValueError, match="not a finished set, settings.json is missing"):
        data.PreparedSet(tmp_path / "nowhere")


# ------------------------------------------------------------------------------ the command line


def test_flags():
    """Some of sample.py's. Files of flags are in README's commands, which are parsed too."""
    assert data.parse(sample.Settings, "", []) == sample.Settings() and sample.Settings().plan
    line = ["a b", "c", "--run", "y", "--count=7", "--guidance", "2", "--no-plan", "--ode"]
    wanted = {"run": "y", "count": 7, "guidance": 2.0, "plan": False, "ode": True}
    assert data.parse(sample.Settings, "", line) == sample.Settings(["a b", "c"], **wanted)


@pytest.mark.parametrize("settings", [train.Config, sample.Settings, world.Shapes, data.Photos])
def test_help_names_every_flag_and_its_default(settings, capsys):
    with pytest.raises(SystemExit, match="0"):
        data.parse(settings, "the first\n    second line", ["--help"])
    said = capsys.readouterr().out
    assert "the first\n    second line" in said
    for f in fields(settings):
        assert re.search(rf"^  (--)?{f.name}\b[^\n]*\s+\w", said, re.M), f.name
        assert f"(default {f.default})" in " ".join(said.split())


@pytest.mark.parametrize("line", [[], ["nonsense"], ["--size", "none"], ["--count", "1"]])
def test_wrong_commands_end_in_one_line(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        data.main(line)
    assert capsys.readouterr().err.split("\n")[-2].startswith(("data.py: ", "pytest: ", "__main__"))


def test_what_a_user_can_get_wrong_ends_in_one_line(capsys):
    """Mistakes of ours do not."""
    errors = {ValueError("two\nlines"): "two lines", OSError("disk"): "disk"}
    errors |= {MemoryError(): "MemoryError", torch.OutOfMemoryError("card"): "card"}
    errors[KeyboardInterrupt()] = "interrupted; the same command continues"
    for error, said in errors.items():
        with pytest.raises(SystemExit) as ended, data.plain_errors("p"):
            raise error
        assert ended.value.code == (130 if "interrupted" in said else 2)
        assert capsys.readouterr().err == f"p: {said}\n"
    with pytest.raises(ZeroDivisionError), data.plain_errors("p"):
        raise ZeroDivisionError


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    data.write_whole(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="cannot write .*file: disk full"):
        data.write_whole(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
