"""Laws of training: schedule, optimiser, what moves, what resumes, what is refused."""

import csv
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model as M
import train

TRAINED = {  # stage -> names of what it trains, and nothing else
    "clip": r"clip\.",
    "vae": r"vae\.",
    "understand": r"backbone\.",
    "generate": r"head\.|backbone\.queries",
    "tune": r"head\.|backbone\.queries",
    "decode": r"decoder\.",
}
# and `understand` in both of its kinds: it looks at pictures, or its queries repeat prompts
KINDS = [*((stage, "0") for stage in TRAINED), ("understand", "1")]
JOINT = r"head\.|backbone\.(queries|words|trunk)"  # what generation reads of the backbone
STAGES = pytest.mark.parametrize(
    "stage, flags, names",
    [*((stage, [], names) for stage, names in TRAINED.items()), ("generate", ["--joint"], JOINT)],
    ids=[*TRAINED, "joint"],
)


@pytest.fixture
def copy(micro_run, tmp_path):
    """A copy of the finished run, to be changed."""
    return shutil.copytree(micro_run, tmp_path / "run")


@pytest.fixture
def start(copy, micro_flags):
    """start(STAGE, flags ...) -> a Trainer at step 0 on top of the finished run's weights, with
    new ones where flags ask for more blocks."""

    def make(stage, *flags):
        run = train.Run(train.parse_config([*micro_flags, "--out", str(copy), *flags]))
        deeper = any("depth" in flag for flag in flags)
        run.model.load_state_dict(load_file(copy / "model.safetensors"), strict=not deeper)
        return train.Trainer(run, stage)

    return make


def rows_of(ids):
    """A whole batch of these rows of the set."""
    rngs = np.random.default_rng(0).spawn(len(ids))
    return train.Rows(np.arange(len(ids)), ids, rngs, len(ids), 0.5, 0)


def refused(capsys, arguments):
    """What a command that ends with exit code 2 says."""
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


# -------------------------------------------------------------------------------- settings, machine


def test_help_lists_every_setting(capsys):
    """--help names each field of the config with its default."""
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in train.fields(train.Config):
        described = rf"--{field.name} .*?\(default {re.escape(str(field.default))}\)"
        assert re.search(described, text), field.name


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--step", "3"], "--step"),
        (["--dept", "3"], "--dept"),  # no abbreviations
        (["--clip_steps", "1.5"], "--clip_steps"),
        (["--preset", "large"], "demo"),
        (["--predicts", "noise"], "--predicts"),
        (["--lr", "nan"], "--lr"),
        (["--draws", "-1"], "--draws"),
        (["--draws", "0"], "--draws"),
        (["--save_every", "0"], "--save_every"),
        (["--head_dim", "0"], "--head_dim"),
        (["--head_dim", "6"], "--head_dim"),  # positions on a grid have four parts
        (["--tokens", "63"], "--tokens"),
        (["--width", "100"], "--width"),
        (["--drop", "1.5"], "--drop"),
        (["--vae_width", "20"], "--vae_width"),
        (["--dit_patch", "3"], "--dit_patch"),
        (["--accumulate", "3"], "--understand_batch"),
        (
            ["--accumulate", "4", "--generate_batch", "4"],
            "--generate_batch 4: expected a multiple of 8",
        ),
        (["--data", "/nowhere"], "/nowhere"),
        (["--data=--", "--depth", "0"], "--depth"),  # a value that argparse loses
    ],
)
def test_impossible_settings_are_named(capsys, tmp_path, flags, named):
    """An unknown flag or impossible value ends with exit code 2 and a line that names it."""
    assert named in refused(capsys, ["--out", str(tmp_path / "run"), *flags])


def test_the_preset_follows_the_set(tmp_path):
    """Without --preset photos get theirs, all else the demo's; a flag beats both."""
    command = ["--data", str(tmp_path), "--clip_steps", "7"]
    for kind, preset in (("photos", "photos"), ("shapes", "demo")):
        data.write_json(tmp_path / "meta.json", {"settings": {"kind": kind}})
        expected = train.Config(**train.PRESETS[preset] | {"data": str(tmp_path), "clip_steps": 7})
        assert train.parse_config(command) == expected
    assert train.parse_config([*command, "--preset", "micro"]).width == 32
    assert train.parse_config(["--data", str(tmp_path / "none")]).draws == 4


@pytest.mark.parametrize(
    "flag, value", [("device", "cuda"), ("device", "mps"), ("tokens", "49"), ("seed", f"{2**64}")]
)
def test_settings_that_do_not_fit_are_named(
    capsys, monkeypatch, micro_flags, tmp_path, flag, value
):
    """What this machine or set can't do is named too: a missing device, 7 x 7 vectors of 64 px."""
    for device in (torch.cuda, torch.mps):
        monkeypatch.setattr(device, "is_available", lambda: False)
    command = [*micro_flags, "--out", str(tmp_path / "run"), "--dit_patch", "1"]
    assert f"--{flag} {value}" in refused(capsys, [*command, f"--{flag}", value])


@pytest.mark.parametrize(
    "device, capability, bf16, dtype",
    [
        ("cuda", (7, 5), True, torch.float16),  # a T4 emulates bf16
        ("cuda", (8, 0), False, torch.bfloat16),
        ("cuda", (9, 0), False, torch.bfloat16),
        ("mps", None, False, None),
        ("cpu", None, False, None),
        ("cpu", None, True, torch.bfloat16),  # where it compiles
    ],
)
def test_precision_is_native(monkeypatch, capsys, device, capability, bf16, dtype):
    """auto means bf16 where the hardware has it, else fp16 on CUDA, else fp32; compiled where that
    pays."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    for module in (torch.backends.mps, torch.mps):
        monkeypatch.setattr(module, "is_available", lambda: device == "mps")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(train.Path, "is_file", lambda path: True)  # Python.h
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(train.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setenv("LOCAL_RANK", "3")  # of torchrun: which card
    where = torch.device("cuda:3" if device == "cuda" else device)
    for steps in (20, 1000):  # a CPU compiles for a long run only
        machine = train.resolve_machine(train.Config(generate_steps=steps, tune_steps=0))
        compiled = device == "cuda" or (device == "cpu" and steps == 1000)
        wanted = None if device == "cpu" and not compiled else dtype
        assert machine == (where, wanted, compiled)
    assert f"device {device}, precision" in capsys.readouterr().out
    asked = train.resolve_machine(train.Config(precision="fp32", compile="off"))
    assert asked == (where, None, False)


@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_no_compiler_means_eager(monkeypatch, capsys, missing):
    """Without a C++ compiler or Python's headers nothing is compiled, even if asked for, and one
    line says so."""
    if missing == "compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(train.sysconfig, "get_path", lambda name: "/nowhere")
    assert not train.resolve_machine(train.Config(device="cpu", compile="on"))[2]
    (line,) = capsys.readouterr().out.splitlines()
    assert "compile off (no C++ compiler or Python.h)" in line


# --------------------------------------------------------------------------------------- optimisers


def test_learning_rate_by_hand():
    """Up in 4 steps, flat, down over the last 3 of 10, and above zero at every step taken."""
    rates = [train.learning_rate(step, 10, peak=12, warmup=4, cooldown=0.3) for step in range(10)]
    assert rates == pytest.approx([3, 6, 9, 12, 12, 12, 12, 12, 8, 4])
    for steps, warmup, cooldown in ((1, 0, 0.0), (1, 30, 1.0), (7, 0, 1.0), (5, 100, 0.3)):
        for step in range(steps):
            assert 0 < train.learning_rate(step, steps, 1.0, warmup, cooldown) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_is_torchs(dtype):
    """Five steps on several shapes follow torch.optim.Muon, which rounds its iteration to bf16."""
    torch.manual_seed(0)
    mine = [
        torch.nn.Parameter(torch.randn(shape)) for shape in ((16, 16), (32, 8), (8, 48), (8, 48))
    ]
    start = [p.detach().clone() for p in mine]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    ours = train.Muon(mine, **options, dtype=dtype)
    reference = torch.optim.Muon(theirs, **options, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for p, q in zip(mine, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        reference.step()
    for p, q, origin in zip(mine, theirs, start):
        assert (p - q).norm() < 0.02 * (q - origin).norm()


def test_muon_takes_the_matrices_of_blocks(start):
    """Of the flow head, Muon gets every matrix of its blocks but adaLN's; AdamW the rest."""
    trainer = start("generate")
    adamw, muon = ({id(p) for g in o.param_groups for p in g["params"]} for o in trainer.optimizers)
    named = {n: p for n, p in trainer.trained.items() if p.ndim == 2}
    inside = {n for n in named if re.search(r"(attention|cross|mlp)\.(q|kv|out|gate_up|down)\.", n)}
    assert {n for n, p in named.items() if id(p) in muon} == inside
    assert inside and not adamw & muon


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("shape", [(16, 16), (64, 8), (8, 64)])
def test_orthogonalise(shape, dtype, error):
    """Each matrix keeps its singular vectors, and its values move near 1, whatever its scale."""
    torch.manual_seed(0)
    matrices = torch.randn(2, *shape) * torch.tensor([1e3, 1e-3])[:, None, None]
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    moved = u.mT @ train.orthogonalise(matrices, dtype) @ v.mT
    values = moved.diagonal(dim1=1, dim2=2)
    assert (moved - values.diag_embed()).abs().max() < error
    assert ((0.6 < values) & (values < 1.3))[s > 0.1 * s[:, :1]].all()


def test_overflow_skips_the_whole_step(start):
    """With fp16's scaler, an infinite or undefined gradient changes no weight; the scale falls."""
    trainer = start("generate")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = {n: p.detach().clone() for n, p in trainer.trained.items()}
    for name, value in (("head.out.bias", torch.inf), ("backbone.queries", torch.nan)):
        hook = trainer.trained[name].register_hook(lambda grad, value=value: grad * 0 + value)
        trainer.update()
        hook.remove()
        for n, p in trainer.trained.items():
            assert torch.equal(p, before[n]), n
    assert trainer.scaler.get_scale() == 256


@pytest.mark.parametrize("stage", TRAINED)
def test_half_precision_learns(start, stage):
    """fp16 gains on a stage's loss at least half of what fp32 does in as many steps, some of which
    overflow while the scale is found."""
    gains = []
    for precision in ("fp32", "fp16"):
        trainer = start(stage, f"--{stage}_steps", "60", "--precision", precision)
        assert trainer.scaler.is_enabled() == (precision == "fp16")

        def held(trainer=trainer):
            batches = [trainer.batches(2**20 + i)[0] for i in range(8)]
            return np.mean([trainer.loss(batch)[0].item() for batch in batches])

        before = held()
        for _ in range(60):
            trainer.update()
        gains.append(before - held())
        assert trainer.skipped < 20
    assert gains[0] > 0 and gains[1] > gains[0] / 2


@pytest.mark.parametrize("first, second", [("fp32", "fp16"), ("fp16", "fp32")])
def test_a_stage_goes_on_in_another_precision(start, first, second):
    """As where a run begun on one card is continued on another."""
    trainer = start("vae", "--precision", first)
    trainer.update()
    trainer.save()
    run = train.Run(replace(trainer.config, precision=second))
    again = train.Trainer(run, "vae")
    again.restore()
    assert again.step == 1 and again.scaler.is_enabled() == (second == "fp16")
    again.update()


class Syncs(TorchDispatchMode):
    """Counts what waits for a device: values read, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        waits = "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique"
        self.count += any(name in str(function) for name in waits)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("stage", TRAINED)
def test_a_step_waits_for_no_value(start, stage):
    """No step reads a number back from the device; those that are logged are read by the loop."""
    trainer = start(stage)
    trainer.update()
    with Syncs() as syncs:
        trainer.update()
    assert syncs.count == 0
    with Syncs() as syncs:
        float(trainer.skipped)
    assert syncs.count == 1


# ---------------------------------------------------------------------------- what each stage does


@STAGES
def test_stage_moves_what_it_trains(start, capsys, stage, flags, names):
    """After a stage what it trains has moved, the rest is equal bit for bit; it prints which."""
    trainer = start(stage, *flags)
    net = trainer.run.model
    before = {n: tensor.clone() for n, tensor in net.state_dict().items()}
    train.train_stage(trainer.run, stage)
    moved = {n for n, tensor in net.state_dict().items() if not torch.equal(tensor, before[n])}
    assert moved == {n for n in before if re.match(names, n)}
    printed = re.search(rf"stage {stage}: trains (.+) \(.+ are frozen", capsys.readouterr().out)
    assert all(n.startswith(tuple(printed[1].split(", "))) for n in moved)


@STAGES
def test_gradients_where_they_should_be(start, stage, flags, names):
    """A backward pass reaches everything that the stage trains, and nothing else."""
    trainer = start(stage, "--drop", "0", *flags)
    for step in range(4 if stage == "understand" else 1):  # prompts repeated, and dialogues
        trainer.loss(*trainer.batches(step))[0].backward()
    parameters = dict(trainer.run.model.named_parameters())
    reached = {n for n, p in parameters.items() if p.grad is not None and p.grad.any()}
    assert reached == {n for n in parameters if re.match(names, n)}


def test_averages_are_no_graph(start):
    """The averaged weights follow the weights by the decay, and remember no history of steps."""
    trainer = start("decode")
    for decay in (1 / 10, 2 / 11):
        old = {n: p.detach().clone() for n, p in trainer.averages.items()}
        trainer.update()
        for n, p in trainer.trained.items():
            assert not trainer.averages[n].requires_grad
            expected = decay * old[n] + (1 - decay) * p
            torch.testing.assert_close(trainer.averages[n], expected.detach())


@pytest.mark.parametrize("stage, repeats", KINDS)
def test_stage_overfits_a_handful(start, stage, repeats):
    """Sixty steps on eight samples lower their loss clearly, measured at the same noise."""
    flags = ["--lr", "0.01", "--tune_lr", "0.01", "--repeat_share", repeats]
    trainer = start(stage, f"--{stage}_steps", "60", *flags)
    run = trainer.run
    run.data.train_ids = run.data.train_ids[:8]
    run.model.load_state_dict(train.Run(run.config).model.state_dict())  # as before any training

    @torch.no_grad()
    def loss():
        return np.mean([trainer.loss(*trainer.batches(2**20 + i))[0].item() for i in range(8)])

    before = loss()
    for _ in range(60):
        trainer.update()
    assert loss() < 0.8 * before


def test_batches_and_noise_depend_on_seed_stage_step(start):
    """Ids, choices and noise of a step are the same whatever ran before; other steps, stages and
    seeds have others."""

    def drawn(stage, seed, step):
        trainer = start(stage, "--seed", str(seed))
        np.random.seed(len(seen))
        torch.manual_seed(len(seen))
        batches = trainer.batches(step)
        return str([(name, part.sum().item()) for name, part in batches[0].items()])

    seen = []
    for key in [("vae", 0, 3), ("vae", 0, 3), ("vae", 0, 4), ("decode", 0, 3), ("vae", 1, 3)]:
        seen.append(drawn(*key))
    assert seen[0] == seen[1] and len(set(seen)) == 4


def test_noise_of_parts_is_that_of_the_whole(start):
    """Each row keeps its noise however a batch is divided; each stream has its own."""
    run, rows = start("generate").run, rows_of(np.arange(6))
    parts = [rows._replace(places=rows.places[i : i + 2]) for i in (0, 2, 4)]
    whole = run.noise(rows, (5, 7), draws=3)
    assert whole.shape == (18, 5, 7)
    assert torch.equal(torch.cat([run.noise(part, (5, 7), draws=3) for part in parts]), whole)
    assert not torch.isclose(run.noise(rows, (5, 7), draws=3, stream=1), whole).any()


@pytest.mark.parametrize("stage, repeats", [kind for kind in KINDS if kind[0] != "clip"])
def test_a_batch_can_be_divided(start, stage, repeats):
    """In one part, in two or in four, activations kept or not: loss and gradients are the same."""
    results = []
    size = [f"--{stage}_batch=8"] if stage not in ("generate", "tune") else []
    size += ["--generate_batch=8", "--repeat_share", repeats]
    for flags in (["1"], ["2"], ["4", "--checkpoint"]):
        trainer = start(stage, *size, "--accumulate", *flags)
        values = trainer.backward()
        results.append((values, {n: p.grad for n, p in trainer.trained.items()}))
    for values, gradients in results[1:]:
        torch.testing.assert_close(values["loss"], results[0][0]["loss"])
        torch.testing.assert_close(gradients, results[0][1], rtol=1e-3, atol=1e-5)


def test_what_is_read_ahead_is_the_next_step(start):
    """The batches that come while the step before is computed are those of their own step."""
    trainer = start("decode")
    trainer.run.ahead = 3  # a CPU does not read ahead
    for step in range(trainer.steps):
        made = trainer.next_batches()
        for name, value in trainer.batches(step)[0].items():
            assert torch.equal(made[0][name], value), (step, name)
        trainer.step += 1
        assert len(trainer.ahead) == min(3, trainer.steps - trainer.step)


@pytest.mark.parametrize("stage", TRAINED)
def test_one_graph_and_no_other(start, stage):
    """torch.compile takes a stage's loss as one graph, whole, and never again after the second
    length of a text. (The graph alone: generating code from it takes a minute a stage.)"""
    torch._dynamo.reset()
    graphs = []
    trainer = start(stage, f"--{stage}_steps", "40")

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    trainer.loss_of = torch.compile(trainer.loss_of, fullgraph=True, backend=backend)
    for _ in range(12):
        trainer.update()
    warm = len(graphs)
    assert warm <= 4  # with gradient and, for the first guess, without, at two lengths
    for _ in range(20):
        trainer.update()
    assert len(graphs) == warm


def test_blocks_compile_once(start, monkeypatch):
    """On a CPU each kind of block is one graph, whatever the length of a text, and no break."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: compiled(f, backend=backend, **o))
    trainer = start("understand", "--understand_steps", "40", "--depth", "3")
    trainer.compile()
    for _ in range(30):
        trainer.update()
    assert 1 <= len(graphs) <= 2
    trainer = start("generate", "--generate_steps", "40", "--depth", "3", "--dit_depth", "3")
    trainer.compile()
    graphs.clear()
    for _ in range(10):
        trainer.update()
    warm = len(graphs)
    for _ in range(20):
        trainer.update()
    # trunk and head, with gradient and without; a first block's input needs none, the others' does
    assert len(graphs) == warm <= 8


def torchrun(*command):
    """What two processes of torchrun leave, one thread each."""
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    return subprocess.run([*two, *command], env=environment, capture_output=True)


def test_two_processes_are_one(micro_flags, tmp_path):
    """torchrun with two, each batch in two parts in each, gives the losses and weights of one with
    the same batch, to rounding; the second process leaves no file."""
    flags = [*micro_flags, "--vae_steps", "8", "--generate_batch", "8"]
    done = torchrun("train.py", *flags, "--out", str(tmp_path / "two"), "--accumulate", "2")
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert done.stdout.count(b"stage vae: trains") == 1 and b"2 processes" in done.stdout
    torch.set_num_threads(1)  # as in each of the two: with others, sums round otherwise
    try:
        train.main([*flags, "--out", str(tmp_path / "one")])
    finally:
        torch.set_num_threads(2)
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    for stage in TRAINED:
        rows = [list(csv.DictReader(open(tmp_path / n / f"{stage}.csv"))) for n in ("one", "two")]
        values = [[[float(x) for x in row.values()] for row in each] for each in rows]
        np.testing.assert_allclose(*values, rtol=1e-3)


def test_one_process_continues_what_two_began(micro_run, micro_flags, tmp_path):
    """Two processes end in the middle of a stage, behind a checkpoint; one process finishes the
    run, with the weights of one that did it all, to rounding."""
    broken, out = tmp_path / "broken.py", tmp_path / "run"
    broken.write_text(
        "import os, train\n"
        "update = train.Trainer.update\n"
        "def until(self):\n"
        "    return os._exit(3) if (self.stage, self.step) == ('vae', 5) else update(self)\n"
        "train.Trainer.update = until\n"
        "train.main()\n"
    )
    assert torchrun(str(broken), *micro_flags, "--out", str(out)).returncode
    assert (out / "vae.partial").exists() and not (out / "vae.safetensors").exists()
    train.main([*micro_flags, "--out", str(out)])
    one, two = (load_file(folder / "model.safetensors") for folder in (micro_run, out))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_weights_of_the_tiny_clips_losses(start):
    """Pixels and edges count with their weights beside the contrastive loss, which has none."""
    trainer = start("clip", "--pixel_weight", "3", "--edge_weight", "0.5")
    loss, parts = trainer.loss(*trainer.batches(0))
    by_hand = parts["contrastive"] + 3 * parts["pixels"] + 0.5 * parts["edges"]
    torch.testing.assert_close(loss.detach(), by_hand)


def test_dropped_conditions(start):
    """A tenth of the conditions is dropped; where all are, nothing flows back to the queries."""
    trainer = start("generate")
    kept = torch.cat([trainer.batches(step)[0]["kept"] for step in range(2500)]).float()
    assert kept.unique().tolist() == [0, 1] and abs(kept.mean() - 0.9) < 0.01
    trainer = start("generate", "--drop", "1")
    trainer.loss(*trainer.batches(0))[0].backward()
    assert not trainer.trained["backbone.queries"].grad.any()


@pytest.mark.parametrize(
    "stage, share, key", [("generate", 0, "caption"), ("tune", 0, "clean"), ("tune", 1, "caption")]
)
def test_captions_of_generation(start, stage, share, key):
    """Tuning asks in the clean wording, where there is one, but for the broad share."""
    flags = ("--broad_share", str(share), "--thin", "0")
    run, ids, asked = start(stage, *flags).run, np.arange(12), []
    build = run.build
    run.build = lambda rows: asked.extend(rows) or build(rows)
    getattr(run, f"{stage}_batch")(rows_of(ids))
    texts = [run.data.texts(i) for i in ids]
    assert any(text["clean"] is None for text in texts)
    wanted = [text[key] or text["caption"] for text in texts]
    assert asked == [[("user", text), ("queries", None)] for text in wanted]


def test_draws_share_their_prompt(start):
    """Draws of a clean prompt are training pictures of it; those of any other caption its own."""
    trainer = start("tune", "--broad_share", "0", "--draws", "8")
    run, asked = trainer.run, []
    cached, clean = run.cached, lambda i: run.data.texts(i)["clean"]
    run.cached = lambda name, ids: asked.append(ids) or cached(name, ids)
    for ids in (run.data.train_ids[:16], run.data.val_ids[:16]):
        run.tune_batch(rows_of(ids))
        for i, drawn in zip(ids, asked[-1].reshape(16, 8)):
            if clean(i) is None or i in run.data.val_ids:
                assert set(drawn) == {i}
            else:
                assert {clean(j) for j in drawn} == {clean(i)} and np.isin(
                    drawn, run.data.train_ids
                ).all()
    assert len(set(asked[0])) > 2 * 16 > 16 == len(set(asked[1]))


def test_noise_levels():
    """Losses are summed and counted in five equal bins of time; t = 1 belongs to the last."""
    losses, t = torch.tensor([1.0, 3, 5, 7]), torch.tensor([0.0, 0.1, 0.5, 1])
    levels = {name: value.item() for name, value in train.noise_levels(losses, t).items()}
    bins = [f"loss_t0.{i}" for i in (0, 2, 4, 6, 8)]
    by_hand = dict(zip(bins, (1.0, 0, 1.25, 0, 1.75)))  # sums of a batch of four, over four
    assert levels == by_hand | dict(zip((f"rows_{n}" for n in bins), (0.5, 0, 0.25, 0, 0.25)))


def test_dialogues_never_read_the_answer():
    """An image is followed by four of its questions and, last, its caption."""
    entry = {"caption": "a red circle", "qa": [[f"q{i}", f"a{i}"] for i in range(10)]}
    asked = Counter()
    for seed in range(200):
        first, *turns = train.dialogue(entry, np.random.default_rng(seed))
        pairs = [[q, a] for (_, q), (_, a) in zip(turns[::2], turns[1::2])]
        assert first == ("image", None) and [role for role, _ in turns] == ["user", "bot"] * 5
        assert pairs.pop() == [train.DESCRIBE, "a red circle"]
        assert len({tuple(pair) for pair in pairs}) == 4
        assert all(pair in entry["qa"] for pair in pairs)
        asked.update(q for q, _ in pairs)
    assert len(asked) == 10
    short = train.dialogue(entry | {"qa": []}, np.random.default_rng(0))
    assert short == [("image", None), ("user", train.DESCRIBE), ("bot", "a red circle")]


def test_thinned_texts():
    """A share of the texts loses words, each with 0.3, in any place, and nothing is put in."""
    text, rngs = " ".join(map(str, range(20))), map(np.random.default_rng, range(1000))
    made = [train.thinned(text, rng, 0.4) for rng in rngs]
    thin = [[int(word) for word in each.split()] for each in made if each != text]
    assert 350 < len(thin) < 450 and all(words == sorted(set(words)) for words in thin)
    left = np.bincount(sum(thin, []), minlength=20) / len(thin)
    assert len(left) == 20 and ((0.6 < left) & (left < 0.8)).all()
    assert train.thinned(text, np.random.default_rng(0), 0.0) == text


@pytest.mark.parametrize(
    "text, named",
    [
        ("a red circle over a triangle", "red triangle"),
        ("two red circles and two triangles", "red triangle"),
        ("two triangles, one blue and one yellow, and a red circle", "triangles, one blue and red"),
    ],
)
def test_thinning_names_no_held_out_pair(text, named):
    """Where the words left would name one, all stay; elsewhere words go."""
    rngs = [np.random.default_rng(i) for i in range(4000)]
    made = Counter(train.thinned(text, rng, 1.0) for rng in rngs)
    assert not any(named in each for each in made) and len(made) > 20
    assert made[text] > 4000 * 0.7 ** len(text.split()) + 10  # more than by chance


def test_understanding_repeats_and_looks(start):
    """A step's rows all are prompts with the queries behind, or all dialogues about an image, in
    the shares asked for."""
    trainer, kinds = start("understand"), Counter()
    for step in range(200):
        (batch,) = trainer.batches(step)
        ends = batch["ids"][:, -trainer.config.queries :] == M.QUERY
        assert ends.all() if "learn" not in batch else not ends.any()
        assert ("learn" in batch) == ("vectors" in batch)
        kinds["learn" in batch] += 1
    assert 30 < kinds[False] < 70


# --------------------------------------------------------------------------------- files of a run


def test_cache_is_the_encoders(start):
    """Cached features and latents are those of encoding the pictures again, and standardised."""
    run = start("decode").run
    m, ids = run.model, np.array([0, 7, 128, 599])
    features = m.treatment(m.clip.vectors(run.pixels(ids)))
    latents = m.latent_treatment(m.vae.encode(run.pixels(ids)))
    for name, encoded in (("features", features), ("latents", latents)):
        torch.testing.assert_close(run.cached(name, ids), encoded, rtol=2e-3, atol=2e-3)
        channels = run.cached(name, run.data.train_ids).flatten(0, 1)
        torch.testing.assert_close(
            channels.mean(0), torch.zeros(len(channels.T)), rtol=0, atol=0.02
        )
        torch.testing.assert_close(channels.std(0), torch.ones(len(channels.T)), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "stage, compiled",
    [(stage, False) for stage in TRAINED]
    + [pytest.param(stage, True, marks=pytest.mark.long) for stage in ("understand", "generate")],
)
def test_resumed_is_uninterrupted(
    monkeypatch, micro_run, micro_flags, copy, tmp_path, stage, compiled
):
    """A stage killed at step 5 and continued from step 4 ends with the same weights and log, also
    where its blocks are compiled."""
    command = [*micro_flags, "--out", str(copy)]
    update, taken = train.Trainer.update, []

    def dies(trainer):
        taken.append(trainer.step)
        if taken == [0, 1, 2, 3, 4]:
            raise GeneratorExit  # nothing of ours catches it
        return update(trainer)

    def begin_again():
        for name in (f"{stage}.safetensors", f"{stage}.csv", "model.safetensors"):
            (copy / name).unlink()

    begin_again()
    if compiled:
        command += ["--compile", "on", "--precision", "bf16"]
        train.main(command)
        whole = shutil.copytree(copy, tmp_path / "whole")
        begin_again()
    else:
        whole = micro_run
    monkeypatch.setattr(train.Trainer, "update", dies)
    with pytest.raises(GeneratorExit):
        train.main(command)
    assert not (copy / f"{stage}.safetensors").exists()
    train.main(command)
    assert taken[5:] == [4, 5]
    for name in (f"{stage}.safetensors", "model.safetensors"):
        ours, theirs = load_file(copy / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert (copy / f"{stage}.csv").read_bytes() == (whole / f"{stage}.csv").read_bytes()
    assert not list(copy.glob("*.partial")) and not list(copy.glob("*.tmp"))


def test_strips_change_nothing(micro_run, micro_flags, copy):
    """More pictures on the way, drawn with the averaged weights, leave training as it was."""
    (copy / "decode.safetensors").unlink()
    train.main([*micro_flags, "--out", str(copy), "--strip_every", "2"])
    assert len(list(copy.glob("decode-*.png"))) == 3
    ours, theirs = (load_file(run / "decode.safetensors") for run in (copy, micro_run))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_finished_run_does_nothing(monkeypatch, micro_flags, copy):
    """The command of a finished run takes no step and leaves every file as it is."""
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    monkeypatch.setattr(train, "train_stage", None)
    monkeypatch.setattr(train, "fill_cache", None)
    train.main([*micro_flags, "--out", str(copy)])
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


@pytest.mark.parametrize("flag, value", [("lr", "0.5"), ("seed", "9"), ("predicts", "v")])
def test_changed_settings_are_refused(capsys, micro_flags, copy, flag, value):
    """Another setting in a folder that has a run is refused by name; a harmless one is not."""
    command = [*micro_flags, "--out", str(copy)]
    train.main([*command, "--strip_every", "5"])
    assert f"made with {flag} " in refused(capsys, [*command, f"--{flag}", value])


def test_partial_with_other_settings_is_refused(capsys, monkeypatch, micro_flags, copy):
    """A checkpoint in the middle of a stage is held to the settings too."""
    trainer = train.Trainer(
        train.Run(train.parse_config([*micro_flags, "--out", str(copy), "--lr", "0.5"])), "clip"
    )
    trainer.save()
    (copy / "clip.safetensors").unlink()
    error = refused(capsys, [*micro_flags, "--out", str(copy)])
    assert "clip.partial was made with lr 0.5" in error


@pytest.mark.parametrize("name", ["clip.safetensors", "clip.partial"])
def test_other_versions_are_refused(capsys, monkeypatch, micro_flags, copy, name):
    """A checkpoint of another version is refused by name, whole or in the middle of a stage."""
    command = [*micro_flags, "--out", str(copy)]
    with monkeypatch.context() as older:
        older.setattr(train, "VERSION", 0)
        (copy / "clip.safetensors").unlink()
        if name == "clip.partial":
            train.Trainer(train.Run(train.parse_config(command)), "clip").save()
        else:
            train.save_weights(copy / name, {}, {"version": 0})
    error = refused(capsys, command)
    assert name in error and "version 0" in error


def test_load_model_is_the_run(micro_run, micro_flags):
    """The loaded model has the run's weights, words and settings, is frozen, and zeros are gone."""
    net, tokenizer, config, metadata = train.load_model(micro_run / "model.safetensors")
    assert config == train.parse_config([*micro_flags, "--out", str(micro_run)])
    assert " circle" in tokenizer.words and metadata["seconds"].keys() == set(train.STAGES)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    saved = load_file(micro_run / "model.safetensors")
    assert all(torch.equal(tensor, saved[n]) for n, tensor in net.state_dict().items())
    stages = {}
    for stage in train.STAGES:
        stages |= load_file(micro_run / f"{stage}.safetensors")
    assert saved.keys() == stages.keys()
    assert all(torch.equal(stages[n], saved[n]) for n in saved)


def test_settings_of_another_version(micro_run, tmp_path):
    """A setting that weights do not know has its default; one that only they know is refused."""
    weights, metadata = train.load_weights(micro_run / "model.safetensors")
    del metadata["config"]["init"]
    train.save_weights(tmp_path / "older", weights, metadata)
    assert train.load_model(tmp_path / "older")[2].init == ""
    metadata["config"]["mixture"] = 3
    train.save_weights(tmp_path / "newer", weights, metadata)
    with pytest.raises(ValueError, match="mixture.*unknown"):
        train.load_model(tmp_path / "newer")


def test_init_goes_on_from_a_run(capsys, micro_flags, micro_run, tmp_path):
    """Weights and words are those of the run; a stage with steps changes what it trains."""
    weights, metadata = train.load_weights(micro_run / "model.safetensors")
    metadata["words"].reverse()  # those of the set would come in the other order
    train.save_weights(tmp_path / "start", weights, metadata)
    command = [*micro_flags, "--init", str(tmp_path / "start"), "--out"]
    zeros = [part for stage in TRAINED for part in (f"--{stage}_steps", "0")]
    train.main([*command, str(tmp_path / "same"), *zeros])
    train.main([*command, str(tmp_path / "tuned"), *zeros, "--tune_steps", "3"])
    same, tuned = (
        train.load_weights(tmp_path / run / "model.safetensors") for run in ("same", "tuned")
    )
    assert same[1]["words"] == tuned[1]["words"] == metadata["words"]
    assert all(torch.equal(weights[n], same[0][n]) for n in weights)
    changed = {n for n in weights if not torch.equal(weights[n], tuned[0][n])}
    assert changed == {n for n in weights if re.match(TRAINED["tune"], n)}
    wide = refused(capsys, [*command, str(tmp_path / "wide"), "--dit_width", "64"])
    assert "other sizes" in wide and "head." in wide
    shutil.move(tmp_path / "start", tmp_path / "moved")
    goes_on = ["--out", str(tmp_path / "tuned"), *zeros, "--tune_steps", "3"]
    train.main([*micro_flags, *goes_on, "--init", str(tmp_path / "moved")])
    other = [*micro_flags, *goes_on, "--init", str(micro_run / "model.safetensors")]
    assert "with start" in refused(capsys, other)  # its words come in another order
    assert "none" in refused(capsys, [*micro_flags, "--init", str(tmp_path / "none")])


def test_logs_and_strips(micro_run):
    """Each stage leaves a CSV, flow stages with loss by noise level, and strips of eight pairs."""
    levels = [f"loss_t0.{i}" for i in range(0, 10, 2)]
    parts = {
        "clip": ["contrastive", "pixels", "edges"],
        "vae": ["error", "kl"],
        "understand": ["repeats"],
    }
    for stage in TRAINED:
        with open(micro_run / f"{stage}.csv") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == [
            "step",
            "loss",
            "rate",
            "norm",
            "skipped",
            *parts.get(stage, levels),
        ]
        assert [row["step"] for row in rows] == ["1", "6"]
        assert all(np.isfinite(float(value)) for row in rows for value in row.values())
        strips = sorted(micro_run.glob(f"{stage}-*.png"))
        drawn = stage not in ("clip", "understand")
        assert [p.name for p in strips] == [f"{stage}-{n:06d}.png" for n in (4, 6) if drawn]
        for strip in strips:
            width, height = Image.open(strip).size
            assert width // 64 == 8 and height // 64 == 2


def test_presets_are_possible():
    """Each preset is a valid Config; cc3m's flow head is as wide as a tower's features."""
    for name in train.PRESETS:
        config = train.parse_config(["--preset", name])
        assert config.generate_steps > 0
    config = train.parse_config(["--preset", "cc3m"])
    assert config.dit_width >= config.channels == 768
