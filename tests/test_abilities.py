"""The judges of plans, edits and dialogues accept what is right and refuse near misses."""

import abilities
import numpy as np
import pytest
import shapeseval
import torch
from abilities import judge_edit

from notebooks import shapes as world
from notebooks.shapes import Object

RED = Object("circle", "red", 20.0, 20.0, 16.0, 16.0)
BLUE = Object("square", "blue", 44.0, 22.0, 18.0, 18.0)
GREEN = Object("triangle", "green", 20.0, 46.0, 20.0, 17.3)


CASES = [
    ("make the circle green", [RED._replace(color="green"), BLUE]),
    ("remove the circle", [BLUE]),
    ("move the circle below the square", [RED._replace(x=42.0, y=50.0), BLUE]),
    ("add a green triangle below the red circle", [RED, BLUE, GREEN]),
]


@pytest.mark.parametrize("instruction, after", CASES)
def test_an_edit_is_judged_exactly(instruction, after):
    """Right is what is asked, up to a few px, in any order. Every near miss is refused."""
    before = [RED, BLUE]

    def right(found):
        return judge_edit(before, after, instruction, found)

    assert right(after) and right(after[::-1])
    assert right([o._replace(x=o.x + 2, y=o.y - 2) for o in after])
    assert not right(before) and not right([]) and not right([*after, None])
    assert not right([*after, RED._replace(y=60.0)])  # one too many
    for i, o in enumerate(after):
        rest = after[:i] + after[i + 1 :]
        assert not right(rest)
        assert not right([*rest, o._replace(color="purple")])
        assert not right([*rest, o._replace(shape="square" if o.shape != "square" else "circle")])
        away = o._replace(y=o.y - 40 if o.y > 40 else o.y + 30)
        assert not right([*rest, away])


def test_real_edits_are_judged_right_and_their_beginnings_wrong():
    """By the pictures of the scenes, as drawings are judged; with held-out pairs too."""
    rng = np.random.default_rng(0)
    for held in (False, True):
        cases = abilities.edit_cases(0, 20, held)
        assert len(cases) == 80
        for kind, before, after, there, _ in cases:
            assert there.split()[0] == kind
            images = np.stack([world.render(objects, rng) for objects in (after, before)])
            right, wrong = shapeseval.find_objects(images)
            assert judge_edit(before, after, there, right)
            assert not judge_edit(before, after, there, wrong)
    held = [{o[:2] for o in before} & world.HELD_OUT for _, before, *_ in cases]
    assert np.mean([bool(pairs) for pairs in held]) > 0.5


@pytest.mark.parametrize("broken", [None, "answer", "picture", "side"])
def test_a_dialogue_counts_if_every_turn_is_right(monkeypatch, broken):
    """There are ten of four turns, with pairs of training only. The side that is asked for has room
    for the second object: at the first one's centre or beyond."""

    class Perfect:
        """Says and draws what the script wants, but for one turn of each dialogue."""

        def __init__(self, studio):
            self.turns, self.first = iter(next(scripts)), None

        def say(self, text):
            turn, wanted = next(self.turns)
            if isinstance(wanted, str):
                assert text == turn
                return ("many" if broken == "answer" else wanted), None
            assert not world.HELD_OUT & set(wanted)
            side = text.split(turn.partition("{}")[0])[-1].removesuffix(" it")
            assert text == turn.format(side)
            pairs = wanted[: 1 if broken == "picture" else None]
            if "{}" not in turn or len(pairs) < 2:
                objects = world.place(pairs, rng)
                self.first = objects[0]
            else:
                asked.append(side)
                opposite = {"left of": "right of", "above": "below"}
                opposite |= {b: a for a, b in opposite.items()}
                side = opposite[side] if broken == "side" else side
                objects = world.place(pairs, rng, side)
                x, y = self.first[2:4]
                room = {"left of": x, "right of": 64 - x, "above": y, "below": 64 - y}
                assert room[asked[-1]] >= 31  # px; the checker's centre may be half a pixel off
            return "plan", world.render(objects, rng)

    rng, scripts, asked = np.random.default_rng(0), iter(abilities.dialogues() * 2), []
    assert [len(script) for script in abilities.dialogues()] == [4] * 10
    monkeypatch.setattr(abilities, "Chat", Perfect)
    monkeypatch.setattr(abilities, "TIMES", 2)
    scores = abilities.evaluate_dialogues(None)
    assert scores["dialogues_right"] == (0 if broken else 20) and scores["dialogues"] == 20
    assert (scores["turns"] == 1) == (broken is None)
    assert broken == "picture" or set(asked) == set(world.RELATIONS)


def test_mmd_tells_two_distributions_from_one():
    torch.manual_seed(0)
    a, b, c = torch.randn(300, 4), torch.randn(300, 4), torch.randn(300, 4) + 0.5
    assert abs(abilities.mmd(a, b)) < 0.01 < 0.03 < abilities.mmd(a, c)


def test_a_micro_run_gets_all_scores(micro_run, tmp_path, monkeypatch):
    out = tmp_path / "scores.json"
    monkeypatch.setattr(abilities, "TRIPS", 4)
    monkeypatch.setattr(abilities, "TIMES", 1)
    abilities.main(["--run", str(micro_run), "--out", str(out), "--edits=2"])
    for name in ("edits_seen", "undo", "dialogues_right", "mmd_real", "remove"):
        assert f'"{name}"' in out.read_text()
