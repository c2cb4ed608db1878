"""Laws of drawing and reading: the command line, and what no picture may depend on."""

import io
import os
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import STAGES
from PIL import Image
from ship import ship
from test_train import train_until

import data
import sample
import train

ROOT = Path(__file__).parents[1]
PROMPTS = ["a red circle left of a blue square", "three green circles", "a triangle"]
FEW = ["--steps=2", "--decoder_steps=2", "--count=2"]


def draw(run, out, *flags):
    """Runs the command line and returns the picture that it wrote."""
    sample.main(["--run", str(run), "--out", str(out), *FEW, *flags])
    return np.asarray(Image.open(out))


def studio_of(run, **changes):
    settings = replace(sample.Settings(), **{"steps": 2, "decoder_steps": 2, **changes})
    return sample.Studio(sample.find_run(str(run)), settings)


@pytest.fixture(scope="module")
def designs(micro_flags, tmp_path_factory):
    """Finished runs of the other designs."""
    out, steps = tmp_path_factory.mktemp("designs"), [f"--{stage}_steps=2" for stage in STAGES]
    flags = {"vae": "--target=vae", "mse": "--objective=mse"}
    flags["v"] = "--predicts=v --no-self_conditioning --joint"
    for name, line in flags.items():
        train.main([*micro_flags, *steps, *line.split(), "--out", str(out / name)])
    return out


@pytest.fixture
def picture(tmp_path):
    """A file with noise."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def tile(grid, row, column):
    """One picture of a grid: doubled, 4 px around it, 18 px for the label."""
    y, x = row * (2 * 64 + 4 + 18) + 4, column * (2 * 64 + 4) + 4
    return grid[y : y + 128 : 2, x : x + 128 : 2]


def test_prompts_become_a_labelled_grid(micro_run, tmp_path, capsys):
    """A row of pictures each; the weights and the path are printed."""
    out = tmp_path / "x/grid.png"
    grid = draw(micro_run, out, *PROMPTS[:2], "--count=4", "--seed=3", "--no-plan")
    said = capsys.readouterr().out.splitlines()
    assert said == [f"weights {micro_run / 'checkpoint.pt'}", str(out)]
    assert grid.shape == (2 * 150 + 4, 4 * 132 + 4, 3)
    studio = studio_of(micro_run)
    images = [*studio.draw([PROMPTS[0]] * 4, range(3, 7))]
    images += [*studio.draw([PROMPTS[1]] * 4, range(7, 11))]
    assert all(np.array_equal(tile(grid, *divmod(i, 4)), image) for i, image in enumerate(images))
    labels = [grid[i * 150 + 134 : (i + 1) * 150] for i in range(2)]
    assert all(label.min() < 100 for label in labels) and not np.array_equal(*labels)


@pytest.mark.parametrize("run", ["micro", "vae", "mse", "v"])
def test_no_picture_depends_on_its_batch(request, designs, run):
    """Three prompts of different lengths are three singles; the same call gives the same bytes."""
    path = request.getfixturevalue("micro_run") if run == "micro" else designs / run
    studio = studio_of(path)
    three = studio.draw(PROMPTS, [7, 8, 9])
    assert np.array_equal(three, studio.draw(PROMPTS, [7, 8, 9]))
    for prompt, seed, image in zip(PROMPTS, [7, 8, 9], three):
        single = studio.draw([prompt], [seed])[0]
        assert np.abs(single.astype(int) - image).max() <= 1
    assert not np.array_equal(three, studio.draw(PROMPTS, [4, 5, 6]))


def test_a_seed_decides_the_noise_of_its_row(micro_run, monkeypatch):
    """Each draw is another one. The decoder's noise is not the head's; torch keeps 32 bits."""
    pair, single = (sample.row_noise(seeds, (5, 6), "cpu") for seeds in ([3, 4], [4]))
    first, second = pair(), pair()
    assert torch.equal(first[1:], single()) and torch.equal(second[1:], single())
    assert len({x.sum().item() for x in (*first, *second)}) == 4
    used, row_noise = [], sample.row_noise
    monkeypatch.setattr(sample, "row_noise", lambda s, *a: used.extend(s) or row_noise(s, *a))
    studio_of(micro_run).draw(PROMPTS, [0, 1, 2])
    assert len({seed % 2**32 for seed in used}) == len(used) == 6


def test_the_shipped_weights_draw_colors():
    """Many pixels are red or blue, as asked, and few the other way round."""
    studio = sample.Studio(ROOT / "weights/shapes.safetensors", sample.Settings(steps=10))
    red, blue = studio.draw(["a red circle", "a blue circle"], [0, 1]).astype(int)
    for asked, other, image in ((0, 2, red), (2, 0, blue)):
        excess = image[..., asked] - image[..., other]
        assert (excess > 80).sum() > 100 > (excess < -80).sum()


def test_shipped_weights_are_the_run_in_half_precision(micro_run, tmp_path):
    ship(micro_run, tmp_path / "x.safetensors")
    ours, theirs = (studio_of(path) for path in (micro_run, tmp_path / "x.safetensors"))
    assert theirs.tokenizer.words == ours.tokenizer.words and theirs.config == ours.config
    half = {name: x.half().float() for name, x in ours.net.state_dict().items()}
    assert all(torch.equal(x, half[name]) for name, x in theirs.net.state_dict().items())


def test_prompts_questions_and_instructions_are_tidied(micro_run):
    studio = studio_of(micro_run)
    assert np.array_equal(*(studio.draw([t], [0]) for t in ("A Red  circle.", "a red circle")))
    vectors, asked = torch.zeros(1, 64, 12), []
    studio.sequences = lambda rows: asked.append(rows) or sample.Studio.sequences(studio, rows)
    studio.answer(vectors, ["  Describe. "])
    studio.draw(["Make it red. "], [0], None, vectors)
    (look, *said), (again, *drawn) = asked[1][0], asked[3][0]
    assert look == again == ("image", None)
    assert said[2:] == [("user", "describe"), ("bot", None)]
    assert drawn[2:] == [("user", "make it red"), ("queries", None)]


def test_a_row_on_a_picture_begins_with_what_is_seen_where(micro_run, monkeypatch):
    """Of shapes. Other pictures have no plans."""
    studio, asked = studio_of(micro_run), []
    plans, vectors = ["circle red c4", "square blue f2"], torch.zeros(2, 64, 12)
    monkeypatch.setattr(studio, "write", lambda rows, v: asked.append((rows, v)) or plans)
    image, question = ("image", None), ("user", data.LOCATE)
    wanted = [[image, question, ("bot", plan), ("user", "a b")] for plan in plans]
    assert studio.begin(["A b.", "a  b"], vectors) == wanted
    assert asked == [([[image, question, ("bot", None)]] * 2, vectors)]
    studio.facts["kind"] = "photos"
    assert studio.begin(["a", "b"], vectors) == [[image, ("user", "a")], [image, ("user", "b")]]
    assert len(asked) == 1 and studio.begin(["a"]) == [[("user", "a")]]


@pytest.mark.parametrize("prompt", ["猫 \U0001f600", "a\x00b", "?" * 400])
def test_any_prompt_is_drawn_and_labelled(micro_run, tmp_path, prompt):
    """Bytes stand in for words that are not known, and a long text is cut."""
    assert draw(micro_run, tmp_path / "x.png", prompt, "--count=1").shape == (154, 424, 3)


def test_latents_need_no_decoder(designs):
    studio = studio_of(designs / "vae")
    studio.net.decoder = None
    assert studio.draw(PROMPTS, [0, 1, 2]).shape == (3, 64, 64, 3)


def test_the_given_run_then_the_newest_then_the_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "weights/shapes.safetensors"
    assert sample.find_run() == shipped
    old, new = (Path("out") / name / "checkpoint.pt" for name in ("b", "a"))
    for path, seconds in ((old, 1000), (new, 2000)):
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (seconds, seconds))
    (tmp_path / "out/unfinished").mkdir()
    assert sample.find_run() == new
    assert sample.find_run("out/b") == sample.find_run(str(old)) == old
    assert sample.find_run(str(shipped)) == shipped


@pytest.mark.parametrize("place", [("vae", 4), ("generate", 4), ("tune", 0)])
def test_a_run_on_its_way_draws_its_averages(micro_flags, tmp_path, capsys, place):
    """And names the stages that are not finished."""
    train_until(micro_flags, tmp_path, place)
    capsys.readouterr()
    draw(tmp_path, tmp_path / "x.png", "a circle")
    order = ["clip", "vae", "cache", "decode", "understand", "generate", "tune"]
    missing = ", ".join(order[order.index(place[0]) :])
    said = capsys.readouterr().out.splitlines()
    assert said[1] == f"{tmp_path / 'checkpoint.pt'} is on its way; not finished: {missing}"
    state = train.load_checkpoint(tmp_path / "checkpoint.pt")
    net = studio_of(tmp_path).net.state_dict()
    averages = state["progress"]["averages"]
    assert all(torch.equal(net[name], average) for name, average in averages.items())
    moved = [name for name in averages if not torch.equal(net[name], state["model"][name])]
    assert bool(moved) == (place[1] > 0)


def test_a_tower_is_opened_where_a_picture_is_read(micro_flags, tmp_path, picture, monkeypatch):
    """Not to draw."""
    (tmp_path / "photos").mkdir()
    for i in range(20):
        Image.new("RGB", (40, 40), (i, 9 * i, 99)).save(tmp_path / f"photos/{i}.png")
        (tmp_path / f"photos/{i}.txt").write_text(f"photo number {i}")
    tower = ["--tower=test_vit", "--weights=untrained"]
    folder = ["--out", str(tmp_path / "set"), "--size=32"]
    torch.manual_seed(0)
    data.main([str(tmp_path / "photos"), *folder, *tower])
    flags = [*micro_flags, *(f"--{stage}_steps=1" for stage in STAGES)]
    train.main([*flags, "--data", str(tmp_path / "set"), "--out", str(tmp_path / "run")])
    opened, open_tower = [], data.open_tower
    monkeypatch.setattr(data, "open_tower", lambda *a: opened.append(a) or open_tower(*a))
    draw(tmp_path / "run", tmp_path / "x.png", "a circle | a bar")  # no plan: all is the prompt
    with pytest.raises(SystemExit):
        draw(tmp_path / "run", tmp_path / "x.png", "--chat")
    assert not opened
    grid = draw(tmp_path / "run", tmp_path / "x.png", "--reconstruct", "--image", str(picture))
    assert opened == [("test_vit", 64, "untrained")] and grid.shape == (128 + 26, 424, 3)


def test_captions_and_answers_are_printed(micro_run, picture, capsys, monkeypatch):
    """Without a question, the caption."""
    tell = lambda studio, vectors, questions: [f"{questions} {len(vectors)}"]  # noqa: E731
    monkeypatch.setattr(sample.Studio, "answer", tell)
    for flags, asked in (([], "describe"), (["--ask", "how many?"], "how many?")):
        sample.main(["--run", str(micro_run), "--image", str(picture), *flags])
        assert capsys.readouterr().out.splitlines()[1:] == [f"['{asked}'] 1"]


def test_latents_are_not_edited(designs, picture, tmp_path, capsys):
    for flags in (["a circle", f"--image={picture}"], ["--chat"]):
        with pytest.raises(SystemExit):
            draw(designs / "vae", tmp_path / "x.png", *flags)
        assert "did not learn to edit" in capsys.readouterr().err


def test_a_reconstruction_shows_the_picture_first(micro_run, picture, tmp_path):
    grid = draw(micro_run, tmp_path / "x.png", "--reconstruct", "--image", str(picture))
    studio = studio_of(micro_run)
    _, vectors = studio.open(picture)
    shown = [np.asarray(Image.open(picture)), *studio.decode(vectors.expand(2, -1, -1), [0, 1])]
    assert all(np.array_equal(tile(grid, 0, i), image) for i, image in enumerate(shown))


def test_a_plan_is_printed_and_can_be_given(micro_run, tmp_path, capsys, monkeypatch):
    """What is printed draws the same picture again, from the plan that stands in it."""
    rows, generate = [], sample.Studio.generate
    watch = lambda self, r, *a: rows.append([row[-1] for row in r]) or generate(self, r, *a)  # noqa: E731
    monkeypatch.setattr(sample.Studio, "generate", watch)
    plans = ["circle red c4", "circle red f2"]
    monkeypatch.setattr(sample.Studio, "write", lambda *_: plans)
    grid = draw(micro_run, tmp_path / "x.png", "a circle", "--count=2")
    lines = capsys.readouterr().out.splitlines()[1:3]
    assert lines == [f"a circle | {plan}" for plan in plans]
    again = draw(micro_run, tmp_path / "x.png", lines[0], "--count=2")
    assert np.array_equal(tile(grid, 0, 0), tile(again, 0, 0))
    first, second = (("bot", plan) for plan in plans)
    assert rows == [[first, second], [first, first]]


def test_plans_answers_and_edits_do_not_depend_on_their_batch(micro_run):
    """Nor does chance: a plan has a seed of its own. Answers and edits depend on the picture."""
    studio = studio_of(micro_run)
    for p in studio.net.backbone.parameters():  # else all say the same
        p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    vectors, plans, seeds = torch.randn(3, 64, 12), ["a b c1"] * 3, (1, 2, 3)
    planned, answers = studio.plan(PROMPTS, seeds), studio.answer(vectors, PROMPTS)
    edits = studio.draw(PROMPTS, seeds, plans, vectors)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, seeds)):
        assert studio.plan([prompt], [seed]) == [planned[i]]
        assert studio.answer(vectors[i, None], [prompt]) == [answers[i]]
        alone = studio.draw([prompt], [seed], plans[:1], vectors[i, None])
        assert np.abs(alone[0].astype(int) - edits[i]).max() <= 1
    assert planned != studio.plan(PROMPTS, [4, 5, 6]) and len(set(answers)) == 3
    assert answers != studio.answer(-vectors, PROMPTS)
    assert not np.array_equal(edits, studio.draw(PROMPTS, seeds, plans))


def test_an_instruction_edits_the_picture(micro_run, picture, tmp_path):
    """The picture comes first."""
    flags = ["make the circle red", "remove the square", "--image", str(picture), "--no-plan"]
    grid = draw(micro_run, tmp_path / "x.png", *flags)
    shown = np.asarray(Image.open(picture))
    assert np.array_equal(tile(grid, 0, 0), shown) and np.array_equal(tile(grid, 1, 0), shown)
    studio = studio_of(micro_run)
    _, vectors = studio.open(picture)
    edits = studio.draw(["remove the square"] * 2, [2, 3], None, vectors.expand(2, -1, -1))
    assert np.array_equal(tile(grid, 1, 1), edits[0]) and np.array_equal(tile(grid, 1, 2), edits[1])


def test_a_chat_draws_answers_and_edits_in_its_context(micro_run, monkeypatch, tmp_path, capsys):
    """A plan draws, but not where it is asked for; a drawing begins anew; what is said stays in the
    context until the next picture. It ends with the input."""
    looks = ["circle red b4", "circle red b4; square blue c7", "circle blue a1"]
    said = ["circle red c4", "one", looks[0], "circle red b4; square blue c6", "circle blue a2"]
    write = iter([said[0], looks[0], *said[1:4], looks[1], said[4], looks[2]])
    rows, generate = [], sample.Studio.generate
    monkeypatch.setattr(sample.Studio, "write", lambda self, r, *_: [next(write)])
    watch = lambda self, r, *a: rows.append((list(r[0]), a[-1])) or generate(self, r, *a)  # noqa: E731
    monkeypatch.setattr(sample.Studio, "generate", watch)
    turns = ["Draw a red circle.", "how many objects?", data.LOCATE, "add a blue square below it"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*turns, "draw a blue circle"])))
    sample.main(["--run", str(micro_run), "--out", str(tmp_path / "x.png"), "--chat", *FEW])
    heard = capsys.readouterr().out.replace("> ", "").splitlines()
    assert [line for line in heard if line in said] == said
    (first, none), (second, some), (third, anew) = rows
    assert first == [("user", "a red circle"), ("bot", said[0])] and none is None
    pairs = [(data.LOCATE, looks[0]), *zip(turns[1:], said[1:])]
    answers = [turn for pair in pairs for turn in zip(("user", "bot"), pair)]
    assert second == [("image", None), *answers] and some.shape == (1, 64, 12)
    assert third == [("user", "a blue circle"), ("bot", said[4])] and anew is None


def test_a_chat_can_begin_with_a_picture(micro_run, picture, monkeypatch):
    studio, asked = studio_of(micro_run), []
    _, vectors = studio.open(picture)
    monkeypatch.setattr(studio, "write", lambda rows, v, *_: asked.append((rows, v)) or ["one"])
    assert sample.Chat(studio, vectors).say("how many?") == ("one", None)
    rows, given = asked[1]
    assert rows[0][:3] == [("image", None), ("user", data.LOCATE), ("bot", "one")]
    assert rows[0][3:] == [("user", "how many?"), ("bot", None)] and given is vectors


@pytest.mark.parametrize("plan", ["red circle c4", "circle red c4; c5", "circle pink a1"])
def test_a_line_that_is_nearly_a_plan_is_refused(micro_run, tmp_path, capsys, monkeypatch, plan):
    """Before anything is drawn. What ends in no cell is text; see above."""
    monkeypatch.delattr(sample.Studio, "draw")
    with pytest.raises(SystemExit, match="2"):
        draw(micro_run, tmp_path / "x.png", "a square", f"a circle | {plan}")
    assert plan in capsys.readouterr().err and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("words", [[], [""], ["a circle", " . "]])
def test_nothing_to_do_and_empty_prompts_are_refused(micro_run, tmp_path, capsys, words):
    with pytest.raises(SystemExit, match="2"):
        draw(micro_run, tmp_path / "x.png", *words)
    assert "expected" in capsys.readouterr().err


BAD = "--steps=0 --count=0 --decoder_steps=-1 --guidance=many --stepz=3 --run=HERE/none --run=HERE"
BAD += " --image=HERE/none.png --image=HERE/text.png --out=HERE/text.png/x.png --seed=-1"


@pytest.mark.parametrize("flag", BAD.split())
def test_what_a_user_gets_wrong_ends_in_one_line(micro_run, tmp_path, capsys, flag):
    """Which has the flag's name or its value."""
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "checkpoint.pt").write_bytes(b"no weights")
    flag, value = flag.replace("HERE", str(tmp_path)).split("=")
    task = [] if flag == "--image" else ["a circle"]
    with pytest.raises(SystemExit) as stop:
        draw(micro_run, tmp_path / "x.png", *task, flag, value)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and (flag in line or value in line)
    assert not (tmp_path / "x.png").exists()


ALIVE = "seed=1 count=1 steps=3 guidance=9 ode decoder_steps=3 decoder_guidance=9"
ALIVE = {flag.split("=")[0]: f"--{flag}" for flag in ALIVE.split()}
ALIVE["prompts"] = "a square"
ELSEWHERE = "run out image ask reconstruct chat plan".split()  # shown by the tests above
SHOWN = [f.name for f in fields(sample.Settings) if f.name not in ELSEWHERE]


@pytest.mark.parametrize("name", SHOWN)
def test_every_flag_is_alive(micro_run, tmp_path, name):
    """Another value draws another grid."""
    grids = [draw(micro_run, tmp_path / "x.png", "a circle", *f) for f in ([], [ALIVE[name]])]
    assert not np.array_equal(*grids)
