"""Batches of both tasks: what they hold, what their loss is, and that reading is trained too."""

import joint
import numpy as np
import pytest
import torch

import data
import train


@pytest.fixture
def run(micro_flags, micro_run):
    return train.Run(data.parse(train.Config, "", [*micro_flags, "--out", str(micro_run)]))


@pytest.mark.parametrize("stage", ["generate", "tune"])
@pytest.mark.parametrize("mix", [1, 3])
def test_a_mixed_batch_draws_the_same_and_reads_the_same_pool(run, monkeypatch, stage, mix):
    asked, understand_batch = [], train.understand_batch

    def recorded(run, ids, rng):
        asked.append(ids)
        return understand_batch(run, ids, rng)

    monkeypatch.setattr(train, "understand_batch", recorded)
    for pool in (run.data.train_ids, run.data.val_ids):
        plain, seed = train.Batches(run, stage, pool)[5]
        with monkeypatch.context() as patch:
            patch.setattr(train, "STAGES", joint.mixed_stages(mix))
            both, same_seed = train.Batches(run, stage, pool)[5]
        assert seed == same_seed and plain.keys() < both.keys()
        assert all(torch.equal(x, both[name]) for name, x in plain.items())
        assert len(both["read_ids"]) == len(asked[-1]) == mix * run.config.generate_batch
        assert set(asked[-1]) <= set(pool) and both["read_learn"].any()


def test_the_mean_of_a_mixed_loss_is_the_sum_of_the_means(run):
    """Also where a step reads no pictures, and where it holds edits."""
    run.model.eval()
    kinds = set()
    for i in range(8):
        ids, rng = run.data.train_ids[i : i + 4], np.random.default_rng(i)
        both = joint.mixed_batch(train.tune_batch, 3)(run, ids, rng)
        read = {name[5:]: x for name, x in both.items() if name.startswith("read_")}
        draw = {name: x for name, x in both.items() if not name.startswith("read_")}
        kinds.add(("vectors" in read, "edit_ids" in draw))
        with torch.no_grad():
            sums = [
                train.generate_loss(run.model, torch.Generator().manual_seed(i), **draw).mean(),
                train.understand_loss(run.model, None, **read).mean(),
            ]
            noise = torch.Generator().manual_seed(i)
            mixed = run.model(joint.mixed_loss, noise, both)
        torch.testing.assert_close(mixed, sum(sums))
        assert min(sums) > 0
    assert {reads for reads, _ in kinds} == {True, False} and any(edits for _, edits in kinds)


def test_only_mixed_batches_train_what_writes(micro_flags, micro_run, tmp_path, monkeypatch):
    """The backbone's last layer makes words. Drawing alone has no use for it."""
    start = str(micro_run / "checkpoint.pt")
    flags = [*micro_flags, "--init", start, "--save_every=100"]
    flags += [f"--{stage}_steps=0" for stage in ("clip", "vae", "decode", "understand")]
    flags += ["--generate_steps=2", "--tune_steps=2"]
    weights = [torch.load(start, weights_only=True)["model"]]
    for mix in (0, 1):
        monkeypatch.setattr(train, "STAGES", train.STAGES)
        joint.main(["--mix", str(mix), *flags, "--out", str(tmp_path / str(mix))])
        weights.append(train.load_checkpoint(tmp_path / str(mix) / "checkpoint.pt")["model"])
        monkeypatch.undo()
    moved = [{k for k, x in weights[0].items() if not torch.equal(x, w[k])} for w in weights[1:]]
    assert moved[1] - moved[0] == {"backbone.head.weight"}
    assert "backbone.words.weight" in moved[0]


def test_a_wrong_ratio_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        joint.main(["--mix", "-1"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "joint.py: --mix -1: expected 0 or more\n"
