"""Pictures, captions and scores from a run: the command line on a micro run, and the scores."""

import dataclasses
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import sample

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["a red circle left of a blue square", "three green circles", "a triangle"]
FEW = {
    name: [data.PROMPTS[text] for text in texts]
    for name, texts in {
        "seen": ["a circle", "a circle and a square", "two circles", "a red circle"]
        + ["a circle above a square", "a red circle and a blue square"],
        "heldout": ["a red triangle", "two green squares"],
        "composed": ["a blue triangle", "two red squares"],
    }.items()
}


def draw(run, out, *arguments):
    """Runs the command line and returns the picture that it wrote."""
    sample.main(["--run", str(run), "--out", str(out), *arguments])
    return np.asarray(Image.open(out))


@pytest.fixture(scope="module")
def studio(micro_run):
    path = sample.find_run(str(micro_run))
    options = dict(steps=2, guidance=2.0), dict(steps=2, guidance=1.0)
    return sample.Studio(path, *options)


@pytest.fixture
def picture(tmp_path):
    """A picture file with one red circle."""
    images, _ = data.draw_scenes([data.PROMPTS["a red circle"]], np.random.default_rng(0))
    Image.fromarray(images[0]).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def test_prompts_become_a_labelled_grid(micro_run, tmp_path, capsys):
    """One row of pictures for each prompt; the path is printed, and which weights drew it."""
    grid = draw(micro_run, tmp_path / "x/grid.png", *PROMPTS[:2], "--count", "3")
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(tmp_path / "x/grid.png")
    assert printed[0] == f"weights {micro_run}/model.safetensors"
    tile = 128 + 4
    assert grid.shape == (2 * (tile + 18) + 4, 3 * tile + 24 + 4, 3)  # 420 px at least, for labels
    for row in range(2):
        label = grid[row * (tile + 18) + tile + 2 : (row + 1) * (tile + 18) + 2]
        assert label.min() < 100  # something is written below the row


def test_the_same_seed_gives_the_same_picture(micro_run, tmp_path):
    """Same seed, same bytes; another seed, steps or guidance, another picture."""
    first = draw(micro_run, tmp_path / "0.png", PROMPTS[0])
    assert np.array_equal(first, draw(micro_run, tmp_path / "1.png", PROMPTS[0], "--seed", "0"))
    for other in (
        ["--seed", "1"],
        ["--steps", "3"],
        ["--decoder_steps", "2"],
        ["--ode"],
        ["--guidance", "1"],
        ["--decoder_guidance", "1"],
        ["--shift", "1"],
    ):
        changed = draw(micro_run, tmp_path / "2.png", PROMPTS[0], *other)
        assert not np.array_equal(first, changed), other


def test_a_row_does_not_depend_on_its_neighbours(studio, monkeypatch):
    """A prompt's vectors are the same to rounding in any batch, and its noise exactly."""
    together = studio.imagine(PROMPTS, [7, 8, 9])
    pictures = studio.paint(together, [7, 8, 9])
    for i, prompt in enumerate(PROMPTS):
        assert torch.allclose(studio.imagine([prompt], [7 + i])[0], together[i], atol=1e-4)
    monkeypatch.setattr(sample, "BATCH", 2)
    assert torch.allclose(studio.imagine(PROMPTS, [7, 8, 9]), together, atol=1e-4)
    apart = np.abs(studio.paint(together, [7, 8, 9]).astype(int) - pictures)
    assert apart.max() <= 1
    pair, single = (sample.row_noise(torch.tensor(s), (5, 6), "cpu") for s in ([3, 4], [4]))
    for _ in range(2):  # the second draw is another one
        noise = pair()
        assert torch.equal(single()[0], noise[1])
        assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(pair(), noise)


def test_seeing_and_answering_work_in_batches(studio, monkeypatch):
    """Vectors and answers are the same whatever the batch."""
    images = data.draw_scenes(FEW["seen"], np.random.default_rng(0))[0]
    vectors = studio.see(images)
    answers = studio.answer(vectors, ["describe"] * len(images))
    monkeypatch.setattr(sample, "BATCH", 4)
    assert torch.allclose(studio.see(images), vectors, atol=1e-4)
    assert studio.answer(vectors, ["describe"] * len(images)) == answers
    assert vectors.shape == (6, 64, studio.config.channels)


@pytest.mark.filterwarnings("error")
def test_captions_and_answers_are_printed(micro_run, picture, capsys, monkeypatch):
    """--caption and --ask print what the run answers to that question, after the weights."""
    answer = sample.Studio.answer
    monkeypatch.setattr(
        sample.Studio, "answer", lambda *a: [f"{a[2]} {len(q)}" for q in answer(*a)]
    )
    for question, flags in (
        ("describe", ["--caption", picture]),
        ("how many circles are there?", ["--ask", "how many circles are there?"]),
    ):
        image = ["--image", picture] if "--ask" in flags else []
        sample.main(["--run", str(micro_run), *flags, *image])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"weights {micro_run}/model.safetensors" and len(lines) == 2
        assert lines[1].startswith(f"['{question}'] ")


def test_a_picture_is_reconstructed(micro_run, picture, tmp_path):
    """--reconstruct shows the original first, then what is drawn from its vectors."""
    grid = draw(micro_run, tmp_path / "again.png", "--reconstruct", picture, "--count", "2")
    original = np.asarray(Image.open(picture).resize((128, 128), Image.Resampling.NEAREST))
    assert np.array_equal(grid[4:132, 4:132], original)
    assert (grid[4:132, 136:264] != 255).any() and (grid[4:132, 268:396] != 255).any()


def test_any_picture_can_be_shown(studio, tmp_path):
    """Gray, transparent and oblong pictures arrive as one square of the run's size."""
    Image.new("LA", (90, 40), (0, 0)).save(tmp_path / "x.png")
    opened = studio.open(str(tmp_path / "x.png"))
    assert opened.shape == (1, 64, 64, 3) and (opened == 255).all()


KEYS = "seen_strict heldout_strict composed_strict long_strict seen_geneval ceiling_render"
KEYS += " ceiling_reconstruction floor color_entropy per_category seconds_total seconds_by_stage"
KEYS += " seconds_eval seed machine"


def test_evaluation_writes_every_score(micro_run, tmp_path, monkeypatch):
    """scores.json lies beside the weights with every key, each score a share, and all seconds."""
    shutil.copy(micro_run / "model.safetensors", tmp_path)
    monkeypatch.setattr(data, "eval_prompts", lambda: FEW)
    monkeypatch.setattr(data, "long_prompts", lambda: FEW["composed"][:2])
    sample.main(
        ["--run", str(tmp_path), "--evaluate", "--count", "1", "--steps", "1", "--seed", "5"]
    )
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(KEYS.split()) <= set(scores) and "TFLOP/s" in scores["machine"]
    for key in KEYS.split()[:9]:
        if key != "per_category":
            assert 0 <= scores[key] <= 1, key
    assert scores["ceiling_render"] == 1 and scores["seed"] == 5 and scores["seconds_eval"] > 0
    assert set(scores["per_category"]) == {"seen", "heldout", "composed", "long"}
    assert set(scores["per_category"]["seen"]) - {"mean"} == {p.category for p in FEW["seen"]}
    stages = {"clip", "vae", "cache", "understand", "generate", "tune", "decode"}
    assert set(scores["seconds_by_stage"]) == stages
    assert scores["seconds_total"] == pytest.approx(sum(scores["seconds_by_stage"].values()), abs=1)
    assert {"clip_top1_of_100", "clip_pixel_r2", "vqa", "vqa_majority"} <= set(scores)


def test_share_of_the_extra_losses(studio, monkeypatch):
    """Odds of the extra losses against the contrastive one add up, each with its weight."""
    config, dataset = studio.config, data.PreparedSet(studio.config.data)

    def odds(pixels, edges):
        weights = {"pixel_weight": pixels, "edge_weight": edges}
        monkeypatch.setattr(studio, "config", dataclasses.replace(config, **weights))
        share = sample.evaluate_clip(studio, dataset)["clip_extra_loss_share"]
        return share / (1 - share)

    assert odds(0.0, 0.0) == 0 and min(odds(1.0, 0.0), odds(0.0, 1.0)) > 0
    assert odds(2.0, 3.0) == pytest.approx(2 * odds(1.0, 0.0) + 3 * odds(0.0, 1.0), rel=1e-4)


def test_what_is_scored_is_what_is_first_drawn(studio, monkeypatch):
    """One call of the sampler for each set, one picture for each (prompt, seed), no second try."""
    calls = []

    def draw_once(prompts, seeds):
        calls.append((prompts, seeds))
        parsed = [data.PROMPTS[text] for text in prompts]
        return data.draw_scenes(parsed, np.random.default_rng(0))[0]

    seen = []
    real_see = studio.see
    monkeypatch.setattr(studio, "draw", draw_once)
    monkeypatch.setattr(studio, "see", lambda x: seen.append(len(x)) or real_see(x))
    monkeypatch.setattr(data, "eval_prompts", lambda: FEW)
    monkeypatch.setattr(data, "long_prompts", lambda: FEW["composed"][:2])
    scores = sample.evaluate_shapes(studio, 2, 4)
    assert [len(prompts) for prompts, _ in calls] == [24, 8, 8, 2]
    assert seen == [len(FEW["seen"])]  # the ceiling of the reconstruction
    assert calls[1][1] == [2_000_000 + i for i in range(8)] and len(set(calls[0][1])) == 24
    assert scores["seen_strict"] == scores["heldout_strict"] == scores["composed_strict"] == 1


def test_photo_scores_on_a_run(studio, micro_run):
    """Every score for photos lies in its range; another set than the run's is refused."""
    dataset = data.PreparedSet(studio.config.data)
    dataset.val_ids = dataset.val_ids[:40]
    scores = sample.evaluate_photos(studio, dataset, micro_run / "model.safetensors", 0)
    names = ("class_accuracy_real", "class_accuracy_generated")
    assert all(0 <= scores[name] <= 1 for name in names)
    assert scores["psnr_nearest_neighbour"] > 5 and scores["psnr_reconstruction"] > 0


def test_photos_are_scored_by_a_bounded_number_of_rows(studio, micro_run, monkeypatch):
    """However many validate: at most `limit` of them, from all over the set."""
    dataset = data.PreparedSet(studio.config.data)
    drawn = []
    blank = np.zeros((7, 64, 64, 3), np.uint8)
    monkeypatch.setattr(studio, "paint", lambda vectors, seeds: drawn.append(vectors) or blank)
    monkeypatch.setattr(dataset, "texts", lambda i: {"caption": f"word{i}"})
    sample.evaluate_photos(studio, dataset, micro_run / "model.safetensors", 0, limit=7)
    rows = np.linspace(0, len(dataset.val_ids) - 1, 7).astype(int)
    cached = np.load(micro_run / "features.npy")[dataset.val_ids[rows]]
    assert len(set(rows)) == 7 and np.array_equal(drawn[0], cached.astype(np.float32))


def test_retrieval_is_among_different_pictures(studio, monkeypatch):
    """Of pictures that come with several captions each is one of the hundred once: a tower that
    tells them apart is right in all cases."""
    dataset = data.PreparedSet(studio.config.data)
    dataset.images, dataset.val_ids = np.repeat(dataset.images[:4], 5, 0), np.arange(20)
    monkeypatch.setattr(dataset, "texts", lambda i: {"caption": f"text {i}"})
    seen = []
    vectors = studio.net.clip.vectors
    monkeypatch.setattr(studio.net.clip, "vectors", lambda x: seen.append(len(x)) or vectors(x))
    sample.evaluate_clip(studio, dataset)
    assert seen[0] == 4


def test_captions_without_a_class_do_not_count(studio, micro_run, monkeypatch):
    """Half of the validation captions end in a word of no class: vectors that hit every class of
    the other half score 1."""
    dataset = data.PreparedSet(studio.config.data)
    dataset.val_ids = dataset.train_ids[:10]
    texts = {i: {"caption": "a ship"} for i in dataset.train_ids}
    texts |= {i: {"caption": f"a word{i}"} for i in dataset.train_ids[:5]}
    monkeypatch.setattr(dataset, "texts", texts.get)
    scores = sample.evaluate_photos(studio, dataset, micro_run / "model.safetensors", 0)
    assert scores["class_accuracy_real"] == scores["class_accuracy_generated"] == 1


@pytest.mark.parametrize("kind", ["shapes", "photos"])
def test_another_set_than_the_run_s_is_refused(studio, micro_run, monkeypatch, kind):
    """Prepared again with another seed, its validation rows may have been trained on."""
    prepared = data.PreparedSet

    def other(folder):
        dataset = prepared(folder)
        dataset.meta["settings"] |= {"seed": 5, "kind": kind}
        return dataset

    monkeypatch.setattr(data, "PreparedSet", other)
    with pytest.raises(
        ValueError, match="was made with (seed 0, not 5|kind shapes, not photos): other set"
    ):
        sample.evaluate_run(studio, micro_run / "model.safetensors", 0, 1)


def test_the_decoder_s_noise_is_its_own(studio, monkeypatch):
    """Of any seed that can be given, the flow head and the decoder draw different noise: a
    generator of torch keeps 32 bits of a seed."""
    drawn = []
    kept = sample.row_noise

    def spy(*arguments):
        source = kept(*arguments)
        return lambda: drawn.append(source()) or drawn[-1]

    monkeypatch.setattr(sample, "row_noise", spy)
    low, high = sample.LIMITS["seed"]
    studio.draw(["a circle"] * 3, [low, low + 1, high])
    first = {part.flatten()[:99].numpy().tobytes() for noise in drawn for part in noise}
    assert len(first) == sum(map(len, drawn)) >= 6


def test_photos_without_classes_have_no_class_accuracy(studio, micro_run, monkeypatch):
    """Captions of free text: no last word is common, and the other scores still stand."""
    dataset = data.PreparedSet(studio.config.data)
    dataset.val_ids = dataset.val_ids[:4]
    monkeypatch.setattr(dataset, "texts", lambda i: {"caption": f"word{i}"})
    scores = sample.evaluate_photos(studio, dataset, micro_run / "model.safetensors", 0)
    assert set(scores) == {"psnr_reconstruction", "psnr_nearest_neighbour"}


# -------------------------------------------------------------------------------------- scores


def test_real_renders_score_one():
    """Clean pictures of all seen prompts: every rule near 1, the floor far below, colors even."""
    prompts = data.eval_prompts()["seen"]
    images, _ = data.draw_scenes(prompts, np.random.default_rng(3))
    result = sample.score_prompts(prompts, images)
    assert result["strict"]["mean"] >= 0.995 and result["geneval"]["mean"] >= 0.995
    assert result["floor"]["mean"] < 0.15
    assert 0.98 < result["entropy"] <= 1 + 1e-9


def test_the_score_is_the_mean_of_the_categories():
    """Two of two single and one of four counting give (1 + 1/4) / 2, not 3 / 6."""
    texts = ["a circle", "a square", "two circles", "two squares", "two triangles", "three circles"]
    drawn = ["a circle", "a square", "two circles", "a circle", "two circles", "two circles"]
    images, _ = data.draw_scenes([data.PROMPTS[t] for t in drawn], np.random.default_rng(0))
    result = sample.score_prompts([data.PROMPTS[t] for t in texts], images)
    assert result["strict"] == {"single": 1.0, "counting": 0.25, "mean": 0.625}


def test_the_floor_mismatches_every_picture():
    """The floor asks another text of the category: right pictures of few prompts give 0."""
    prompts = [data.PROMPTS[text] for text in ("a circle", "a square") * 4]
    images, _ = data.draw_scenes(prompts, np.random.default_rng(0))
    result = sample.score_prompts(prompts, images)
    assert result["strict"]["mean"] == 1 and result["floor"]["mean"] == 0


def test_entropy_by_hand():
    """One color gives 0, two in equal shares log 2 / log 6; prompts with colors don't count."""

    def entropy(*texts, asked="a circle"):
        parsed = [data.PROMPTS[text] for text in texts]
        images, _ = data.draw_scenes(parsed, np.random.default_rng(0))
        return sample.score_prompts([data.PROMPTS[asked]] * len(texts), images)["entropy"]

    assert entropy("a red circle", "a red circle") == 0
    two = entropy("a red circle", "a blue circle", "a red circle", "a blue square")
    assert two == pytest.approx(math.log(2) / math.log(6))
    assert entropy("a red circle", "a blue circle", asked="a red circle") == 0


def test_empty_and_broken_pictures_score_nothing():
    """White, gray and noise are wrong for every prompt; no crash without any object."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    for images in (np.full_like(noise, 244), np.full_like(noise, 120), noise):
        result = sample.score_prompts(FEW["seen"], images)
        assert result["strict"]["mean"] == result["geneval"]["mean"] == result["entropy"] == 0


def test_psnr_by_hand():
    """An error of 5 everywhere is 20 log10(255 / 5) = 34.15 dB; the mean is over pictures."""
    a = np.full((2, 4, 4, 3), 100, np.uint8)
    assert sample.psnr(a, a - 5) == pytest.approx(20 * math.log10(51), abs=1e-4)
    half = a.copy()
    half[1] += 50
    expected = (10 * math.log10(255**2 / 1e-3) + 20 * math.log10(5.1)) / 2
    assert sample.psnr(a, half) == pytest.approx(expected, abs=1e-3)


# -------------------------------------------------------------------------------------- choices


def test_the_newest_finished_run_then_the_shipped_weights(tmp_path, monkeypatch):
    """A given run; else the newest below out/ that is finished; else weights/; else an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "__file__", str(tmp_path / "sample.py"))
    with pytest.raises(ValueError, match="no finished run"):
        sample.find_run(None)
    shipped = tmp_path / "weights/best.safetensors"
    runs = [tmp_path / "out" / name / "model.safetensors" for name in ("b", "a")]
    for path in (shipped, *runs, tmp_path / "out/unfinished/clip.safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for age, path in enumerate(runs):
        os.utime(path, (1000 - age, 1000 - age))
    assert sample.find_run(None).absolute() == runs[0]
    os.utime(runs[1], (2000, 2000))
    assert sample.find_run(None).absolute() == runs[1]
    assert sample.find_run(str(runs[0].parent)) == sample.find_run(str(runs[0])) == runs[0]
    shutil.rmtree(tmp_path / "out")
    assert sample.find_run(None) == shipped


WRONG = {
    "nothing to do": [],
    "--steps 0": ["a circle", "--steps", "0"],
    "--count 0": ["a circle", "--count", "0"],
    "--decoder_steps -1": ["a circle", "--decoder_steps", "-1"],
    "many": ["a circle", "--steps", "many"],
    "--stepz": ["a circle", "--stepz", "3"],
    "--image": ["--ask", "what is it?"],
    "same picture": ["a circle", "--reconstruct", "EMPTY/text.png"],
    "EMPTY": ["a circle", "--run", "EMPTY"],
    "EMPTY/none.png": ["--caption", "EMPTY/none.png"],
    "EMPTY/text.png": ["--reconstruct", "EMPTY/text.png"],
    "EMPTY/broken": ["a circle", "--run", "EMPTY/broken"],
}


@pytest.mark.parametrize("named", WRONG)
def test_what_a_user_gets_wrong_ends_in_one_line(micro_run, tmp_path, capsys, named):
    """Exit code 2 and one last line on stderr that names the value; nothing is written."""
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/model.safetensors").write_bytes(b"no weights")
    arguments = [word.replace("EMPTY", str(tmp_path)) for word in WRONG[named]]
    out = tmp_path / "out/x.png"
    with pytest.raises(SystemExit) as stop:
        sample.main(["--run", str(micro_run), "--out", str(out), *arguments])
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and line.startswith(("sample.py: ", os.path.basename(sys.argv[0])))
    assert named.replace("EMPTY", str(tmp_path)) in line
    assert not out.exists()


@pytest.mark.parametrize("prompt", ["", " ", "猫 \U0001f600", "a\x00b", "?" * 60])
def test_any_prompt_is_drawn(studio, prompt):
    """Any text is a prompt: bytes stand in for words that are not known."""
    assert studio.draw([prompt], [0]).shape == (1, 64, 64, 3)


def test_the_shipped_weights_draw():
    """They are small and in half precision, and the checker accepts most of what they draw."""
    path = ROOT / "weights/shapes.safetensors"
    assert path.stat().st_size < 20e6
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    flow, decoder = dict(steps=25, guidance=2.5, shift=4.0), dict(steps=4, guidance=1.5)
    prompts = [p for p in data.eval_prompts()["seen"] if p.category == "colors"][:24]
    images = sample.Studio(path, flow, decoder).draw([p.text for p in prompts], list(range(24)))
    assert sample.score_prompts(prompts, images)["strict"]["mean"] > 0.8
    shuffled = sample.score_prompts(prompts[1:] + prompts[:1], images)
    assert shuffled["strict"]["mean"] < 0.3
