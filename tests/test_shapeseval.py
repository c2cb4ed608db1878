"""ShapesEval's prompts, checker and scores, on real scenes: no trained run is needed."""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parent))
import shapeseval as S

import data
from notebooks import shapes as world

PROMPTS = S.eval_prompts()
ALL = [prompt for prompts in PROMPTS.values() for prompt in prompts]
NAMED = {prompt.text: prompt for prompt in ALL}
GOLDEN = {"seen": (553, "ff5d18b745a3"), "heldout": (198, "c24e66882aae")}
GOLDEN["composed"] = (198, "f9b0bb8f6877")
RED, BLUE = ("circle", "red", 16, 20, 18), ("square", "blue", 46, 20, 18)
SPOTS = [(16, 16), (46, 16), (16, 46), (46, 46)]


def scene(*objects):
    """A picture (1, 64, 64, 3) of objects (shape, color, x, y, width)."""
    boxes = [(*o, o[4] * world.SHAPES[o[0]].height) for o in objects]
    return world.render([world.Object(*box) for box in boxes], np.random.default_rng(0))[None]


def passes(prompt, picture, strict=True):
    """Whether a picture passes a prompt, or the one of ShapesEval with that text."""
    return S.judge(NAMED.get(prompt, prompt), S.find_objects(picture)[0], strict)


@pytest.mark.parametrize("name", GOLDEN)
def test_prompts_never_change(name):
    """Their texts and order are those of commit 80034cb, so that scores stay comparable."""
    texts = [prompt.text for prompt in PROMPTS[name]]
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    assert (len(texts), digest[:12]) == GOLDEN[name]
    held = [bool(world.HELD_OUT.intersection(p.objects)) for p in PROMPTS[name]]
    assert all(held) if name == "heldout" else not any(held)


def test_ceiling():
    """Clean pictures of what is asked for pass, and so do they with noise or a slight blur."""
    rng = np.random.default_rng(7)
    images = np.stack([S.real_picture(prompt, rng) for prompt in ALL]).astype(np.float32)
    noisy = images + rng.normal(0, 15, images.shape)
    blurred = ndimage.gaussian_filter(images, (0, 0.5, 0.5, 0))
    for kind, made in (("clean", images), ("noisy", noisy[::3]), ("blurred", blurred[::3])):
        prompts = ALL if kind == "clean" else ALL[::3]
        found = S.find_objects(made.clip(0, 255).astype(np.uint8))
        hits = [S.judge(prompt, items) for prompt, items in zip(prompts, found)]
        assert S.share(hits) >= (0.995 if kind == "clean" else 0.98), kind


def dome(dx, dy, width):
    """Signed distance of the upper half of a disc."""
    return np.maximum(np.hypot(dx, dy - width / 4) - width / 2, dy - width / 4)


def test_a_new_shape_needs_one_entry_of_the_table(monkeypatch):
    """Boxes are found to a quarter of a pixel, also of a shape that the checker has never met."""
    monkeypatch.setitem(world.SHAPES, "dome", world.Shape(0.5, dome))
    rng = np.random.default_rng(1)
    pairs = [("dome", "red"), ("triangle", "blue"), ("circle", "orange"), ("square", "green")]
    for _ in range(20):
        placed = world.place(pairs, rng)
        found = S.find_objects(world.render(placed, rng)[None])[0]
        for wanted, item in zip(sorted(placed), sorted(found)):
            assert wanted[:2] == item[:2]
            assert np.abs(np.subtract(wanted[2:], item[2:])).max() < 0.25
    assert S.Prompt("two domes", "counting", (("dome", None),) * 2) in S.eval_prompts()["seen"]
    assert S.parse_caption("two domes, one red and one blue")["dome", "red"] == 1


def test_near_misses_are_refused():
    prompt = S.Prompt("", "position", (RED[:2], BLUE[:2]), "left of")
    assert passes(prompt, scene(RED, BLUE))
    misses = [[("circle", "blue", *RED[2:]), ("square", "red", *BLUE[2:])]]  # colors swapped
    misses += [[("circle", "red", *BLUE[2:]), ("square", "blue", *RED[2:])]]  # sides swapped
    misses += [[("circle", "orange", *RED[2:]), BLUE], [("square", *RED[1:]), BLUE], [RED]]
    misses += [[RED, BLUE, ("triangle", "green", 32, 50, 16)]]  # one too many
    misses += [[RED, ("square", "blue", 20, 46, 18)]]  # above, not left of
    for objects in misses:
        assert not passes(prompt, scene(*objects)), objects


def test_counts_must_be_exact():
    pictures = [scene(*(("circle", "red", *xy, 18) for xy in SPOTS[:n])) for n in (1, 2, 3, 4)]
    for n, word in ((2, "two"), (3, "three"), (4, "four")):
        passed = [passes(f"{word} circles", picture) for picture in pictures]
        assert passed == [i == n for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("a, b", [("circle", "square"), ("square", "triangle")])
def test_a_shape_half_way_to_another_is_refused(a, b):
    """The upper half of one and the lower half of the other are neither."""
    one, other = (scene((shape, "red", 32, 32, 20)) for shape in (a, b))
    assert [S.find_objects(picture)[0][0].shape for picture in (one, other)] == [a, b]
    one[:, :32] = other[:, :32]
    assert S.find_objects(one)[0] == [None]


def test_specks_are_free_and_blots_are_not():
    picture = scene(RED)
    picture[0, 50:53, 50:54] = world.COLORS["red"]  # 12 px2
    assert passes("a circle", picture)
    picture[0, 50:53, 50:55] = world.COLORS["red"]
    assert not passes("a circle", picture) and passes("a circle", picture, strict=False)
    for value in (0, 128, 255):
        assert not any(S.find_objects(np.full_like(picture, value))[0])


def test_geneval_lets_further_objects_be_but_not_of_the_counted_kind():
    circles = [("circle", color, *xy, 18) for color, xy in zip(("red", "blue", "green"), SPOTS)]
    mixed, three = scene(*circles[:2], ("square", "green", 16, 46, 18)), scene(*circles)
    assert not passes("two circles", mixed) and passes("two circles", mixed, strict=False)
    assert not passes("two circles", three, strict=False)
    assert passes("a circle", three, strict=False)


def test_score_prompts_by_hand():
    """Shares by category, their mean, the floor, and the entropy of colors nobody named."""
    prompts = [NAMED[text] for text in ("a circle", "a square", "a red circle")]
    red, blue = scene(("circle", "red", 32, 32, 20)), scene(("circle", "blue", 32, 32, 20))
    table = S.score_prompts(prompts, np.concatenate([red, blue, red]))
    assert table["strict"] == {"single": 0.5, "colors": 1.0, "mean": 0.75}
    # "a circle" gets the second picture, "a square" the first; "colors" has no other prompt
    assert table["floor"] == {"single": 0.5, "colors": 0.0, "mean": 0.25}
    assert np.isclose(table["entropy"], np.log(2) / np.log(6))


def test_captions_are_parsed():
    cases = {"a red circle": {RED[:2]: 1}, "a red shape": {(None, "red"): 1}, "a picture of": {}}
    cases["an orange square and a circle"] = {("square", "orange"): 1, ("circle", None): 1}
    cases["a red circle to the left of a blue square"] = {RED[:2]: 1, BLUE[:2]: 1}
    text = "three shapes: two red circles and a blue square, with the square below the red circle"
    cases[text] = {RED[:2]: 2, BLUE[:2]: 1}
    text = "you can see three squares, one blue and two red and a red circle"
    cases[text] = {BLUE[:2]: 1, ("square", "red"): 2, RED[:2]: 1}
    cases["two circles, one red"] = {RED[:2]: 1, ("circle", None): 1}
    for text, pairs in cases.items():
        assert S.parse_caption(text) == pairs, text


def test_long_prompts_never_change_nor_name_a_held_out_pair():
    prompts = S.long_prompts(60)
    assert prompts == S.long_prompts(60)
    assert all(set(prompt.objects) <= set(world.SEEN) for prompt in prompts)


def test_answers_and_blind_baseline_by_hand():
    training = [["how many circles are there?", number] for number in ("one", "two", "two")]
    training += [["how many squares are there?", "zero"]] * 4
    asked = ["how many circles are there?", "how many triangles are there?", "where is it?"]
    blind = S.blind_answers(training, asked)
    assert blind == ["two", "zero", ""]  # of the question, of its kind, of nothing
    scores = S.score_answers(asked, ["two", "one", "above"], blind)
    assert scores == {"all": pytest.approx(1 / 3), "how many": 0.5, "where is": 0.0}


def test_scenes_with_held_out_pairs():
    """Each has exactly one. "is there" is answered yes as often as no."""
    rng, said = np.random.default_rng(0), Counter()
    for i in range(24):
        picture, pairs, asked = S.heldout_scene(i, rng)
        assert len(pairs) == 1 + i % 4 and sum(pair in world.HELD_OUT for pair in pairs) == 1
        found = S.find_objects(picture[None])[0]
        assert Counter(item[:2] for item in found) == Counter(pairs)
        said.update(answer for question, answer in asked if S.kind_of(question) == "is there")
    assert said == {"yes": 24, "no": 24}


class Reader:
    """Stands in for a Studio. It knows two pictures and is silent about an empty one."""

    def see(self, images):
        return torch.from_numpy(images).float().std((1, 2, 3))[:, None, None]

    def answer(self, vectors, questions):
        texts = ["", "one", "two", "", "a red circle", "a red circle and a red square"]
        seen = (vectors[:, 0, 0] > 0).long() + (vectors[:, 0, 0] > 45)  # 0, 1 or 2 objects
        rows = zip(seen.tolist(), questions)
        return [texts[count + 3 * (question == data.DESCRIBE)] for count, question in rows]


def test_understanding_beside_its_baselines():
    asked = [[["how many objects are there?", number]] for number in ("one", "two")]
    one, two = (scene(RED)[0], [RED[:2]]), (scene(RED, BLUE)[0], [RED[:2], BLUE[:2]])
    scores = S.understanding(Reader(), [(*one, asked[0]), (*two, asked[1])], asked[0])
    assert [scores[who]["all"] for who in ("model", "blind", "blank")] == [1, 0.5, 0]
    assert scores["captions"] == 0.5 and scores["questions"] == {"how many": 2}


def test_class_accuracy_and_psnr_by_hand():
    known = torch.tensor([[0.0, 0.0]] * 20 + [[1.0, 1.0]] * 20 + [[9.0, 9.0]] * 3)
    words = ["cat"] * 20 + ["dog"] * 20 + ["emu"] * 3
    vectors = torch.tensor([[0.1, 0.0], [0.9, 1.0], [0.2, 0.0], [9.0, 9.0]])
    accuracy = S.class_accuracy(known, words, vectors, ["cat", "dog", "dog", "emu"])
    assert accuracy == pytest.approx(2 / 3)
    assert S.class_accuracy(known, words, vectors, ["emu"] * 4) is None
    grey = np.full((2, 4, 4, 3), 100, np.uint8)
    assert S.psnr(grey, grey + 5) == pytest.approx(10 * np.log10(255**2 / 25))


def test_wrong_input_ends_in_one_line_before_anything_is_computed(tmp_path, capsys, monkeypatch):
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    monkeypatch.setattr(S, "Studio", lambda path: pytest.fail("computed"))
    wrong = [["--run", "nowhere"], ["--count", "0"], ["--seed", "-1"], ["--out", str(tmp_path)]]
    wrong += [["--out", str(tmp_path / "checkpoint.pt/scores.json")]]  # below a file
    for flags in wrong:
        with pytest.raises(SystemExit) as stop:
            S.main(["--run", str(tmp_path), *flags])
        assert stop.value.code == 2, flags
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_scores_are_written_and_printed(tmp_path, capsys, monkeypatch):
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    monkeypatch.setattr(S, "Studio", lambda path, drawing: drawing)
    monkeypatch.setattr(
        S, "evaluate_run", lambda drawing, seed, count: {"seed": seed + count, "plan": drawing.plan}
    )
    S.main(["--run", str(tmp_path), "--seed", "2", "--count", "3", "--no-plan"])
    assert json.loads((tmp_path / "scores.json").read_text()) == {"seed": 5, "plan": False}
    assert str(tmp_path / "scores.json") in capsys.readouterr().out


# -------------------------------------------------------------------------------------- the plans

REAL_RED = world.Object("circle", "red", 20.0, 20.0, 16.0, 16.0)
REAL_BLUE = world.Object("square", "blue", 44.0, 22.0, 18.0, 18.0)


def test_plans_are_read_back():
    """Cells have their centres; objects stand within half a cell of them."""
    assert S.parse_plan("circle red c3; square blue f8")[1][:4] == ("square", "blue", 44, 60)
    rng = np.random.default_rng(0)
    for _ in range(100):
        objects, _ = world.random_scene(rng)
        plan = S.parse_plan(world.plan(objects))
        assert sorted(o[:2] for o in plan) == sorted(o[:2] for o in objects)
        assert S.take_nearest(plan, objects, S.REACH) == (len(objects), [])
    for text in ("two", "circle red", "circle red c3;", ""):
        assert S.parse_plan(text) == []


def test_what_is_wanted_takes_the_nearest_of_its_kind_once():
    near, far = REAL_RED._replace(x=22.0), REAL_RED._replace(x=24.0)
    assert S.take_nearest([REAL_RED], [far, near, None], 5) == (1, [far, None])
    assert S.take_nearest([REAL_RED, REAL_RED], [near, REAL_BLUE], 5) == (1, [REAL_BLUE])
    assert S.take_nearest([REAL_RED], [REAL_RED._replace(x=27.0)], 5)[0] == 0


def test_plans_are_scored_by_their_prompts_and_their_pictures():
    """The second plan is wrong; the third picture has its object elsewhere."""
    prompts = [S.Prompt("a red circle", "single", (("circle", "red"),))] * 3
    plans = ["circle red c3", "circle blue c3", "circle red g7"]
    blue = REAL_RED._replace(color="blue")
    rng = np.random.default_rng(0)
    images = np.stack([world.render([o], rng) for o in (REAL_RED, blue, REAL_RED)])
    scores = S.score_plans(prompts, plans, images)
    assert scores == {"plans_right": 2 / 3, "places_kept": 2 / 3}
