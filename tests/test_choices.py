"""The paper's design choices beside the default, which is CLIP's vectors by flow matching: latents
of the VAE (`--target vae`), and regression (`--objective mse`)."""

import shutil

import numpy as np
import pytest
import torch
from test_train import rows_of

import data
import model as M
import sample
import train

OPTIONS = dict(steps=3, guidance=2.0), dict(steps=2, guidance=1.0)
PROMPTS = ["a red circle", "two blue squares", "a triangle"]


@pytest.fixture(scope="module")
def runs(micro_flags, tmp_path_factory):
    """Finished micro runs of the two other choices, by the value of their flag."""
    made = {value: tmp_path_factory.mktemp(value) for value in ("vae", "mse")}
    for flag, value in (("--target", "vae"), ("--objective", "mse")):
        train.main([*micro_flags, flag, value, "--out", str(made[value])])
    return made


@pytest.fixture
def studio(runs):
    """studio(value) -> the run of that choice, opened."""
    return lambda value: sample.Studio(sample.find_run(str(runs[value])), *OPTIONS)


def opened(micro_flags, runs, value, *flags):
    """The finished run of that choice, to train on."""
    run = train.Run(train.parse_config([*micro_flags, "--out", str(runs[value]), *flags]))
    run.model.load_state_dict(train.load_weights(runs[value] / "model.safetensors")[0])
    return run


@pytest.mark.parametrize("predicts", ["x", "v"])
@pytest.mark.parametrize("stage", ["generate", "tune"])
def test_regression_by_hand(micro_flags, runs, stage, predicts):
    """Its loss is the mean squared error of what the head makes of the states alone."""
    run = opened(micro_flags, runs, "mse", "--objective", "mse", "--predicts", predicts)
    batch = getattr(run, f"{stage}_batch")(rows_of(run.data.train_ids[:6]))
    losses, _ = getattr(run, f"{stage}_loss")(**batch)
    states = run.model.backbone.query_states(batch["tokens"]) * batch["kept"]
    x = batch["x"]  # two draws of each prompt
    made = run.model.head(torch.zeros_like(x), torch.zeros(len(x)), states)
    torch.testing.assert_close(losses, (made - x).square().mean((1, 2)))


def test_regression_has_no_diversity(studio):
    """The vectors are those that the head makes of the prompt, whatever seed, steps and guidance;
    the decoder's noise is left."""
    one = studio("mse")
    vectors = one.imagine(PROMPTS, [1, 2, 3])
    assert torch.equal(vectors, one.imagine(PROMPTS, [4, 5, 6]))
    one.flow["steps"] = 7
    assert torch.equal(vectors, one.imagine(PROMPTS, [1, 2, 3]))
    ids = one.sequences([[("user", text), ("queries", None)] for text in PROMPTS])
    states, x = one.net.backbone.query_states(ids), torch.zeros_like(vectors)
    made = one.net.head(x, torch.zeros(len(x)), states)
    torch.testing.assert_close(one.imagine(PROMPTS, [1, 2, 3]), made, rtol=1e-4, atol=1e-5)
    assert not np.array_equal(one.paint(vectors, [1, 2, 3]), one.paint(vectors, [4, 5, 6]))


def test_flow_has_diversity(micro_run, studio):
    """Of both targets of flow matching, other seeds make other vectors."""
    for one in (studio("vae"), sample.Studio(micro_run / "model.safetensors", *OPTIONS)):
        first, second = (one.imagine(["a circle"], [seed]) for seed in (1, 2))
        assert not torch.allclose(first, second, atol=1e-2)


def test_latents_are_learned(micro_flags, runs):
    """With the VAE as target, what the head learns is what stage cache made of the pictures."""
    run = opened(micro_flags, runs, "vae", "--target", "vae", "--draws", "1")
    ids = run.data.train_ids[:5]
    batch = run.generate_batch(rows_of(ids))
    assert torch.equal(batch["x"], run.cached("latents", ids))
    assert run.model.head.shape == batch["x"].shape[1:] == (256, 4)


def test_latents_are_developed(studio, monkeypatch):
    """A head that knew the latents of real pictures draws those pictures as the VAE does; the
    decoder has no part in it, and is there for pictures to be drawn again."""
    one = studio("vae")
    images = data.draw_scenes([data.PROMPTS[text] for text in PROMPTS], np.random.default_rng(0))[0]
    pixels = M.to_pixels(torch.from_numpy(images))
    latents = one.net.latent_treatment(one.net.vae.encode(pixels))
    monkeypatch.setattr(one, "imagine", lambda prompts, seeds: latents)
    expected = M.to_images(one.net.vae.decode(one.net.vae.encode(pixels))).numpy()
    assert np.abs(one.draw(PROMPTS, [0, 1, 2]).astype(int) - expected).max() <= 1
    assert one.paint(one.see(images), [0, 1, 2]).shape == images.shape


@pytest.mark.parametrize("value", ["vae", "mse"])
def test_both_are_drawn(runs, tmp_path, value):
    """The command draws, and each stage of the head has left strips."""
    grid = tmp_path / "grid.png"
    sample.main(["--run", str(runs[value]), "--out", str(grid), *PROMPTS, "--count", "2"])
    assert grid.is_file()
    assert all(list(runs[value].glob(f"{stage}-*.png")) for stage in ("generate", "tune"))


def test_pictures_of_latents_are_scored_as_seen(runs, studio, monkeypatch):
    """A head of latents is scored by the vectors seen in its pictures: if those are the real ones,
    so is the score."""
    one, path = studio("vae"), runs["vae"] / "model.safetensors"
    dataset = data.PreparedSet(one.config.data)
    dataset.val_ids = dataset.val_ids[:200]
    monkeypatch.setattr(one, "draw", lambda captions, seeds: dataset.images[dataset.val_ids])
    scores = sample.evaluate_photos(one, dataset, path, 0)
    real, generated = (scores[f"class_accuracy_{kind}"] for kind in ("real", "generated"))
    assert abs(real - generated) < 0.02 and real > 0.1


def test_a_head_of_latents_needs_its_vae(micro_flags, runs, tmp_path, capsys):
    """A VAE that comes out otherwise makes the head of its latents stale, named with the VAE."""
    out = shutil.copytree(runs["vae"], tmp_path / "run")
    weights, metadata = train.load_weights(out / "vae.safetensors")
    weights = {name: tensor + 0.01 for name, tensor in weights.items()}
    train.save_weights(out / "vae.safetensors", weights, metadata)
    (out / "cache.safetensors").unlink()
    with pytest.raises(SystemExit):
        train.main([*micro_flags, "--target", "vae", "--out", str(out)])
    assert "generate.safetensors was made with vae" in capsys.readouterr().err


def test_settings_of_a_run_are_of_one_choice(micro_flags, runs, capsys):
    """A run of one choice does not go on as another."""
    for value, flag in (("vae", "target"), ("mse", "objective")):
        with pytest.raises(SystemExit):
            train.main([*micro_flags, "--out", str(runs[value])])
        assert f"with {flag} {value}" in capsys.readouterr().err
