"""Laws of training: what each stage trains, what continues, what is refused."""

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from conftest import STAGES

import data
import model as M
import train
from notebooks import shapes as world

ROOT = Path(__file__).parents[1]
HEAD = r"head\.|backbone\.queries"
LEARNS = {"clip": r"clip\.", "vae": r"vae\.", "decode": r"decoder\.", "understand": r"backbone\."}
LEARNS |= {"generate": HEAD, "tune": HEAD}
JOINT = r"head\.|backbone\.(queries|words|trunk)"  # what generation reads of the backbone


class Stop(Exception):
    """Stands for a kill; nothing catches it."""


def train_until(flags, out, place=None):
    """Trains until the checkpoint (stage, step) is written, any if None -> that place."""
    save = train.Run.save

    def stopping(run, stage, step=0, *rest):
        save(run, stage, step, *rest)
        if stage != "done" and place in (None, (stage, step)):
            raise Stop(stage, step)

    with patch.object(train.Run, "save", stopping):
        try:
            train.main([*flags, "--out", str(out)])
        except Stop as stop:
            return stop.args
    return ("done", 0)


def refused(capsys, *flags):
    """What a command that ends with exit code 2 says after its bars: one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([*map(str, flags)])
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and ".py: " in line
    return line


def weights_of(out):
    return train.load_checkpoint(out / "checkpoint.pt")["model"]


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def copied(run):
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


@pytest.fixture
def prepared(micro_flags, micro_run, tmp_path):
    """prepared(flags ...) -> a Run with the finished run's weights and caches, before any stage."""
    for path in micro_run.glob("*.npy"):
        shutil.copy(path, tmp_path)

    def make(*flags):
        start = ["--out", tmp_path, "--init", micro_run / "checkpoint.pt"]
        return train.Run(data.parse(train.Config, "", [*micro_flags, *map(str, start), *flags]))

    return make


def a_batch(run, stage, i=0):
    return train.Batches(run, stage, run.data.train_ids)[i]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("flag", ["--no-joint", "--joint"])
def test_a_stage_moves_what_it_trains_and_nothing_else(prepared, stage, flag):
    """Bit for bit; no buffer moves."""
    run = prepared(flag, f"--{stage}_steps=8")
    names = JOINT if (flag, LEARNS[stage]) == ("--joint", HEAD) else LEARNS[stage]
    if stage == "tune" and names == JOINT:  # edits read pictures
        names += r"|backbone\.(projector|position_embedding)"
    before = copied(run)
    train.train_stage(run, stage)
    moved = {name for name, x in copied(run).items() if not torch.equal(x, before[name])}
    assert moved == {name for name, _ in run.model.named_parameters() if re.match(names, name)}


@pytest.mark.parametrize(
    "stage, precision", [*((s, "fp32") for s in STAGES), ("decode", "bf16"), ("decode", "fp16")]
)
def test_a_stage_learns_eight_pictures_by_heart(prepared, stage, precision):
    run = prepared("--init=", f"--{stage}_steps=60", "--lr=0.01", f"--precision={precision}")
    run.data.train_ids, losses, stage_loss = run.data.train_ids[:8], [], train.STAGES[stage].loss
    for _ in range(2):
        with torch.no_grad(), run.autocast:
            ready = [run.ready(a_batch(run, stage, i)) for i in range(1000, 1008)]
            losses.append(np.mean([run.model(stage_loss, *each).item() for each in ready]))
            dtype = run.model.decoder.embed(torch.zeros(1, 256, 16)).dtype
        train.train_stage(run, stage)
    assert losses[1] < 0.9 * losses[0]
    assert dtype.itemsize == 2 + 2 * (precision == "fp32")


def test_the_cache_is_what_the_encoders_make(prepared):
    """Normalised, in half precision: mean 0 and variance 1. Draws share their picture."""
    run, ids = prepared(), np.array([0, 7, 128, 599])
    pixels, model = M.to_pixels(run.data.rows("images", ids)), run.model
    for name, made in (("clip", model.clip.vectors(pixels)), ("vae", model.vae.encode(pixels))):
        made = model.normalise[name](made)
        torch.testing.assert_close(run.cached(name, ids), made, rtol=2e-3, atol=2e-3)
        channels = run.cached(name, run.data.train_ids).flatten(0, 1)
        assert channels.mean(0).abs().max() < 0.02 and (channels.std(0) - 1).abs().max() < 0.02
    x = train.generate_batch(run, ids, np.random.default_rng(0))["x"]
    assert torch.equal(x, run.cached("clip", np.repeat(ids, 2)))


@pytest.mark.parametrize("objective", ["flow", "mse"])
def test_the_loss_of_prompts_and_edits_by_hand(prepared, objective):
    """Prompts, then edits, whose picture is read and is the guess. A regression has no noise."""
    run = prepared(f"--objective={objective}")
    torch.nn.init.normal_(run.model.head.out.weight)
    model, (batch, _) = run.model, a_batch(run, "tune")
    x, seen = batch["x"], batch["vectors"]
    rows = [(batch["ids"], None), (batch["edit_ids"], seen)]
    states = torch.cat([model.backbone.query_states(*row) for row in rows])
    dice, same_dice = (torch.Generator().manual_seed(3) for _ in range(2))
    if objective == "mse":
        made = model.head(torch.zeros_like(x), torch.zeros(len(x)), states)
        wanted = (made - x).square().mean((1, 2))
    else:
        cond, source = M.drop_condition(states, dice), seen.repeat_interleave(2, 0)
        shift = run.config.generate_shift
        wanted = M.flow_loss(model.head, x, cond, dice, shift, source)
    torch.testing.assert_close(train.generate_loss(model, same_dice, **batch), wanted)


def test_a_batch_is_a_function_of_seed_stage_and_step(prepared):
    """Whatever was drawn before. A DataLoader gives them in order, from any step on."""

    three, seen = ("vae", 3), []
    for stage, i, *flags in [three, three, ("vae", 4), ("decode", 3), (*three, "--seed=1")]:
        np.random.seed(len(seen))
        torch.manual_seed(len(seen))
        batch, seed = a_batch(prepared(*flags), stage, i)
        seen.append(str([(name, x.double().sum().item()) for name, x in batch.items()] + [seed]))
    assert seen[0] == seen[1] and len(set(seen)) == 4
    batches = train.Batches(prepared("--accumulate=2"), "vae", np.arange(99))
    for i, (batch, seed) in zip((2, 3, 4, 5), batches.read(1, 3), strict=True):
        assert torch.equal(batch["images"], batches[i][0]["images"]) and seed == batches[i][1]
        assert len(batch["images"]) == 2


def test_prompts_are_captions_in_their_share_else_the_user_s_words(prepared):
    """Without such words always. The queries end every row."""
    run, rng = prepared(), np.random.default_rng(0)
    run.data.texts[0] = data.captioned("a cat")
    assert train.prompt(run, 0, rng, (0, 0, 1)) == [("user", "a cat"), ("queries", None)]
    rows = [i for i, text in enumerate(run.data.texts) if len(set(map(str, text["prompts"]))) == 3]
    for shares in ((1, 0, 0), (0.1, 0.9, 0), (0.4, 0.4, 0.2)):
        chosen, planned = np.zeros(3), []
        for i in rows * 4:
            (role, said), *plan, last = train.prompt(run, i, rng, shares)
            texts, plans = zip(*run.data.texts[i]["prompts"])
            assert (role, last) == ("user", ("queries", None))
            chosen[texts.index(said)] += 1
            assert plan in ([], [("bot", plans[texts.index(said)])])
            planned.append(bool(plan))
        assert np.abs(chosen / chosen.sum() - shares).max() < 0.05
        assert abs(np.mean(planned) - run.config.plan_share) < 0.07
    for stage, shares in (("generate", (1, 0, 0)), ("tune", (0.1, 0.9, 0))):
        with patch.object(train, "prompt", return_value=[("queries", None)]) as prompts:
            train.STAGES[stage].batch(run, np.arange(4), rng)
        assert prompts.call_args.args[-1] == shares


def start(text):
    """How each row on a picture begins."""
    return [("image", None), ("user", data.LOCATE), ("bot", text["plan"])]


def test_an_edit_leads_from_its_picture_to_the_next_or_the_one_before(prepared):
    """After its plan and at most two questions. The new plan is that of the picture it makes, and
    keeps the order of the old one."""
    run, rng, asked = prepared(), np.random.default_rng(0), set()
    for i in [i for i in run.data.train_ids if run.data.texts[i]["edits"]]:
        (row, target), text = train.edit(run, i, rng), run.data.texts[i]
        instruction, offset, _ = text["edits"][0]
        assert target == i + offset and abs(offset) == 1
        assert row[:3] == start(text) and row[-1] == ("queries", None)
        said = row[3:-1]
        place = said.index(("user", instruction))
        pairs = [turn for q, a in text["qa"][: place // 2] for turn in (("user", q), ("bot", a))]
        assert said[:place] == pairs
        plan = world.in_order(run.data.texts[target]["plan"], text["plan"])
        assert said[place + 1 :] in ([], [("bot", plan)])
        asked.add(place // 2)
    assert asked == {0, 1, 2}


def test_a_quarter_of_the_instructions_are_edits(prepared):
    """They come last; their pictures are read, and are the source of what is drawn. A set without
    edits has prompts alone."""
    run, rng = prepared(), np.random.default_rng(0)
    able = [i for i in run.data.train_ids if run.data.texts[i]["edits"]]
    ids = np.array([able[0], *[i for i in run.data.train_ids if i not in able][:5], *able[1:3]])
    batch = train.tune_batch(run, ids, rng)
    plain, changed = [*ids[1:6], ids[7]], [ids[0], ids[6]]
    assert (batch["edit_ids"] == M.IMAGE).sum(1).tolist() == [64, 64] and len(batch["ids"]) == 6
    targets = [i + run.data.texts[i]["edits"][0][1] for i in changed]
    assert torch.equal(batch["x"], run.cached("clip", np.repeat([*plain, *targets], 2)))
    assert torch.equal(batch["vectors"], run.cached("clip", changed))
    latents = prepared("--target=vae")
    assert set(train.tune_batch(latents, ids, rng)) == {"ids", "x"}  # these have no source
    for text in run.data.texts:
        text["edits"] = []
    assert set(train.tune_batch(run, ids, rng)) == {"ids", "x"}


def test_shares_are_flags(prepared):
    """Shares of 0 leave prompts alone, without plans. A step of tune keeps one prompt."""
    alone = "--understand_see_share=0 --understand_told_share=0 --tune_edit_share=0 --plan_share=0"
    run, rng, rows = prepared(*alone.split()), np.random.default_rng(0), []
    run.sequences = lambda some: rows.extend(some) or train.Run.sequences(run, some)
    for make in [train.understand_batch, train.tune_batch] * 20:
        assert "vectors" not in make(run, rng.choice(run.data.train_ids, 4), rng)
    assert {tuple(role for role, _ in row) for row in rows} == {("user", "queries")}
    run = prepared("--understand_see_share=0.9", "--understand_told_share=0.1")
    assert train.understand_batch(run, run.data.train_ids[:4], rng)  # no share is below 0
    run = prepared("--understand_see_share=1", "--understand_told_share=0", "--tune_edit_share=1")
    assert "vectors" in train.understand_batch(run, run.data.train_ids[:4], rng)
    able = np.array([i for i in run.data.train_ids if run.data.texts[i]["edits"]][:4])
    batch = train.tune_batch(run, able, rng)
    assert len(batch["ids"]) == 1 and len(batch["edit_ids"]) == 3


def test_a_run_of_an_older_commit_continues(prepared, tmp_path):
    """Its settings lack the new ones."""
    run = prepared()
    run.save("vae")
    state = train.load_checkpoint(run.path)
    del state["config"]["plan_share"]
    torch.save(state, run.path)
    assert prepared("--plan_share=0.5").progress["stage"] == "vae"


def test_timm_attends_by_the_formula_on_a_cpu(prepared):
    """As model.attention does in training: the fused kernel's gradients are slow there."""
    timm.layers.set_fused_attn(True)
    run = prepared()
    assert not timm.layers.use_fused_attn()
    assert not any(block.attn.fused_attn for block in run.model.clip.tower.blocks)


def test_equal_captions_are_no_negatives(prepared):
    run = prepared()
    for i, caption in enumerate(["a circle", "a square", "a circle"]):
        run.data.texts[i] = run.data.texts[i] | {"caption": caption}
    same = train.clip_batch(run, np.arange(3), None)["same"]
    assert same.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_a_dialogue_begins_with_the_plan_and_ends_with_the_caption(prepared):
    """Between stand at most four questions, each once; one may be for the plan again. A brief one
    has any one of all these."""
    run, rng, again, asked = prepared(), np.random.default_rng(0), 0, []
    for text in run.data.texts[:400]:
        row = train.dialogue(text, rng, brief=False)
        assert row[:3] == start(text)
        assert row[-2:] == [("user", "describe"), ("bot", text["whole"])]
        roles, said = zip(*row[3:-2])
        pairs = [list(pair) for pair in zip(said[::2], said[1::2])]
        assert roles == ("user", "bot") * len(pairs)
        assert 3 <= len({question for question, _ in pairs}) == len(pairs) <= 4
        known = [*text["qa"], [data.LOCATE, text["plan"]]]
        assert all(pair in known for pair in pairs)
        again += [data.LOCATE, text["plan"]] in pairs
        *first, (user, question), (bot, answer) = train.dialogue(text, rng, brief=True)
        assert first == start(text) and (user, bot) == ("user", "bot")
        assert [question, answer] in [*known, ["describe", text["whole"]]]
        asked.append(question)
    assert again > 200 and 40 < asked.count("describe") < 120
    photo = train.dialogue(data.captioned("a cat"), rng, brief=True)
    assert photo == [("image", None), ("user", "describe"), ("bot", "a cat")]


def layout(row):
    """A row as results.md shows it: what carries loss is in brackets."""
    shown = {"image": "<image> x 64 ", "user": "<user> {}", "bot": "<bot>[ {}<eos>]"}
    shown |= {"given": "<bot> {}<eos>", "queries": "<query> x 16"}
    return "<bos>" + "".join(shown[role].format(text) for role, text in row)


def test_the_layouts_of_all_tasks_are_those_of_the_results(prepared):
    """The sequence of each task, drawn in notebooks/results.md."""
    run, rng = prepared(), np.random.default_rng(1)
    question, plan = ["what color is the circle?", "red"], "circle blue c4"
    texts = data.captioned("a red circle") | {"plan": "circle red c4", "qa": [question]}
    texts["prompts"] = [[text, "circle red c4"] for text in ["a red circle", *["a circle"] * 2]]
    texts["edits"] = [["make the circle blue", 1, plan]]
    run.data.texts[0] = texts
    rows, alone = [], np.zeros(4, int)
    run.sequences = lambda some: rows.extend(some) or train.Run.sequences(run, some)
    for share in (0, 1):
        run.config = replace(run.config, plan_share=share)
        for _ in range(60):
            train.understand_batch(run, alone, rng)
    shown = re.findall(r"^    (<bos>.*)", (ROOT / "notebooks/results.md").read_text(), re.M)
    made = {*map(layout, rows)}
    assert len(shown) == 9 and set(shown) <= made, made - set(shown)


def test_understanding_learns_from_prompts_dialogues_and_edits(prepared):
    """Of the steps 45 % have pictures. In 25 % plans stand for them. The others have prompts, a
    fifth for equal objects. Photos, which have no plans, have captions alone."""
    run, rng, rows = prepared(), np.random.default_rng(0), {"image": [], "given": [], "bot": []}
    run.sequences = lambda some: kept.append(some) or train.Run.sequences(run, some)
    for _ in range(600):
        kept = []
        batch = train.understand_batch(run, rng.choice(run.data.train_ids, 4), rng)
        (made,) = kept
        about = {"image", "given"} & {role for row in made for role, _ in row[:2]}
        assert ("vectors" in batch) == ("image" in about)
        rows[about.pop() if about else "bot"] += made
    edits = np.mean([bool(run.data.texts[i]["edits"]) for i in run.data.train_ids])
    plans = {text["plan"] for text in run.data.texts}
    for (task, some), share in zip(rows.items(), (0.45, 0.25, 0.3), strict=True):
        assert abs(len(some) / 2400 - share) < 0.08
        changes = [row for row in some if row[-1] == ("queries", None)]
        if task == "bot":
            assert len(changes) == len(some) and max(map(len, some)) == 3
            counted = np.mean([row[0][1].split()[0] in world.NUMBERS[2:] for row in some])
            assert 0.15 < counted < 0.5
            continue
        assert abs(len(changes) / len(some) - 0.4 * edits) < 0.06
        if task == "image":
            assert {row[0] for row in some} == {("image", None)}
        else:
            assert {row[0] for row in some} == {("user", data.LOCATE)}
            assert all(row[1][1] in plans for row in some)
    run.data.texts[:] = [data.captioned("a cat")] * len(run.data.texts)
    for _ in range(20):
        kept = []
        seen = "vectors" in train.understand_batch(run, run.data.train_ids[:4], rng)
        first, last = (("image", None), ("bot", "a cat")) if seen else (("user", "a cat"),) * 2
        assert all(row[0] == first for row in kept[0])
        assert all(last in row for row in kept[0])


def test_learning_rate_by_hand():
    """Up in 30 steps, flat, down over the last 30 of 100. No step has rate zero."""
    c = train.Config(lr=3.0)
    rates = [train.learning_rate(c, step, 100) for step in (0, 1, 29, 30, 70, 71, 85, 99)]
    assert rates == pytest.approx([0.1, 0.2, 3, 3, 3, 2.9, 1.5, 0.1])
    assert train.learning_rate(c, 0, 1) > 0 and train.learning_rate(c, 49, 10_000) == 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_is_torch_s(dtype):
    """Five steps follow torch.optim.Muon, which rounds its iteration to bf16; at any scale."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((16, 16), (32, 8), (16, 16), (8, 48))]
    mine, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    ours = train.Muon(mine, 0.1, dtype)
    ours.param_groups[0]["lr"] = 0.02
    how = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon(theirs, **how)
    for _ in range(5):
        for p, q, scale in zip(mine, theirs, (1e3, 1, 1e-3, 1)):
            p.grad = torch.randn_like(p) * scale
            q.grad = p.grad.clone()
        ours.step()
        reference.step()
    for p, q, origin in zip(mine, theirs, start):
        assert (p - q).norm() < 0.02 * (q - origin).norm()


def test_matrices_of_blocks_go_to_muon_and_vectors_are_not_decayed(prepared):
    """Modulations, which are wide, and all else are AdamW's."""
    learned = dict(prepared().model.named_parameters())
    names = {id(p): name for name, p in learned.items()}
    groups = {"adamw": {}, "muon": {}}
    optimizers = train.make_optimizers(train.Config(weight_decay=0.2), learned, None)
    for held, optimizer in zip(groups.values(), optimizers, strict=True):
        for group in optimizer.param_groups:
            held |= {names[id(p)]: group["weight_decay"] for p in group["params"]}
    inside = r"blocks\.\d+\..*(q|kv|qkv|out|proj|fc1|fc2|gate_up|down)\.weight"
    assert groups["muon"].keys() == {name for name in learned if re.search(inside, name)}
    assert len(groups["muon"]) > 20 and not any("parts" in name for name in groups["muon"])
    decays = groups["adamw"] | groups["muon"]
    assert decays == {name: 0.2 if p.ndim > 1 else 0.0 for name, p in learned.items()}


def test_averages_by_hand(prepared):
    """Slow at first, then by --ema. They are what a finished stage leaves."""
    run, seen = prepared("--decode_steps=4", "--save_every=1", "--ema=0.15"), []
    bias = run.model.decoder.out.bias
    average = bias.detach().clone()
    run.save = lambda stage, step, averages, keepers: seen.append(
        (bias.detach().clone(), averages["decoder.out.bias"].clone())
    )
    train.train_stage(run, "decode")
    for decay, (now, stored) in zip((0.1, 0.15, 0.15, 0.15), seen, strict=True):
        average = decay * average + (1 - decay) * now
        torch.testing.assert_close(stored, average)
    assert torch.equal(bias, stored) and not torch.equal(now, stored)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["head.out.bias", "head.blocks.0.mlp.down.weight"])
def test_a_step_that_overflows_in_half_precision_changes_no_weight(prepared, name, value):
    """Whichever optimiser's gradient it is."""
    run = prepared("--precision=fp16", "--generate_steps=2")
    before = copied(run)
    run.model.get_parameter(name).register_hook(lambda gradient: gradient * 0 + value)
    train.train_stage(run, "generate")
    assert_equal(copied(run), before)


@pytest.mark.parametrize("step", [0, 3, 5])
def test_numbers_that_are_not_finite_end_the_run_before_its_checkpoint_changes(
    monkeypatch, capsys, micro_flags, micro_run, tmp_path, step
):
    """In one line, at any step: the first, one that is saved, the last."""
    stage, steps = train.STAGES["decode"], [*range(4 if step == 5 else 0, 6)]
    train_until(micro_flags, tmp_path, ("decode", steps[0]))
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def poisoned(*arguments, **batch):
        bad = not steps or steps.pop(0) >= step
        return stage.loss(*arguments, **batch) * (torch.nan if bad else 1)

    with monkeypatch.context() as poison:
        poison.setitem(train.STAGES, "decode", stage._replace(loss=poisoned))
        line = refused(capsys, *micro_flags, "--out", tmp_path)
    assert "decode" in line and "nan" in line
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    train.main([*micro_flags, "--out", str(tmp_path)])
    assert_equal(weights_of(tmp_path), weights_of(micro_run))


def test_the_log_has_step_loss_norm_rate_and_seconds(micro_run):
    """At least every tenth step and at each checkpoint."""
    for stage in STAGES:
        rows = np.loadtxt(micro_run / f"{stage}.csv", delimiter=",")
        step, loss, norm, rate, seconds = rows.T
        assert {0, 3} <= {*step} and np.isfinite(rows).all() and min(*loss, *norm) > 0
        assert rate[:2] == pytest.approx([3e-3 / 30, 4 * 3e-3 / 30])
        assert 0 <= seconds[0] <= seconds[1]


HARDWARE = [("cuda", (7, 5), True, torch.float16), ("cuda", (8, 0), False, torch.bfloat16)]
HARDWARE += [("mps", 0, False, None), ("cpu", 0, False, None), ("cpu", 0, True, torch.bfloat16)]


@pytest.mark.parametrize("kind, capability, native, dtype", HARDWARE)
def test_precision_is_what_the_hardware_has(monkeypatch, capsys, kind, capability, native, dtype):
    """A T4 emulates bf16, whatever the CPU beside it has. A CPU compiles, and computes in bf16,
    for a long run only. A flag beats all that."""
    for name in ("cuda", "mps"):
        monkeypatch.setattr(getattr(torch, name), "is_available", lambda name=name: name == kind)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(train, "can_compile", lambda device: True)
    for steps in (20, 1000):
        machine = train.choose_machine(train.Config(generate_steps=steps, tune_steps=0))
        compiled = kind == "cuda" or (kind == "cpu" and steps == 1000)
        wanted = None if kind == "cpu" and not compiled else dtype
        assert machine == (torch.device(kind), wanted, compiled)
    assert capsys.readouterr().out.startswith(f"{kind}, ")
    asked = train.choose_machine(train.Config(precision="fp16", compile="off"))
    assert asked == (torch.device(kind), torch.float16, False)


def test_where_nothing_compiles_all_runs_without_after_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda f: 1 / 0)
    assert not train.choose_machine(train.Config(device="cpu", compile="on"))[2]
    said, machine = capsys.readouterr().out.splitlines()
    assert "torch.compile does not work here (ZeroDivisionError)" in said


# Each process leaves its own weights beside the checkpoint.
TWO = """
import torch, train
save = train.Run.save
def both(run, stage, *rest):
    torch.save(run.model.state_dict(), run.out / f"{train.RANK}-{stage}.pt")
    save(run, stage, *rest)
train.Run.save = both
train.main()
"""


def test_two_processes_share_one_gradient(micro_flags, tmp_path):
    """And each two parts. They end with the same finite weights. Their gradient is the mean."""
    flags = [*micro_flags, *(f"--{stage}_steps=1" for stage in STAGES)]
    flags += ["--clip_steps=0", "--accumulate=2"]
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [tmp_path / "two.py", *flags, "--out", tmp_path]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=settings, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert done.stdout.count(b"trained in") == 1
    for stage in ("decode", "done"):
        zero, one = (torch.load(tmp_path / f"{rank}-{stage}.pt") for rank in (0, 1))
        assert_equal(zero, one)
        assert all(x.isfinite().all() for x in zero.values())
    run = train.Run(data.parse(train.Config, "", [*flags, "--out", str(tmp_path / "none")]))
    seeds = set()  # of the noise; each has its own pictures too
    for rank, part in np.ndindex(2, 2):
        with patch.object(train, "WORLD", 2), patch.object(train, "RANK", rank):
            batch, seed = a_batch(run, "vae", part)
        seeds.add(seed)
        generator = torch.Generator().manual_seed(seed)
        (train.vae_loss(run.model, generator, **batch).mean() / 4).backward()
    norm = torch.cat([p.grad.flatten() for p in run.model.vae.parameters()]).norm()
    _, _, logged, *_ = np.loadtxt(tmp_path / "vae.csv", delimiter=",")
    assert len(batch["images"]) == 1 and len(seeds) == 4
    assert logged == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("parts", [1, 2])
def test_stopped_after_each_checkpoint_and_continued_is_uninterrupted(
    micro_flags, micro_run, tmp_path, parts
):
    """The same weights bit for bit. A finished run trains no more."""
    flags, out, places = [*micro_flags, f"--accumulate={parts}"], tmp_path / "run", []
    whole = micro_run if parts == 1 else tmp_path / "whole"
    train.main([*flags, "--out", str(whole)])
    while not places or places[-1] != ("done", 0):
        places.append(train_until(flags, out))
    begins = [(stage, 0) for stage in (*STAGES[1:], "cache", "done")]
    assert sorted(places) == sorted([(stage, 4) for stage in STAGES] + begins)
    with patch.object(train, "train_stage") as train_stage:
        train.main([*flags, "--out", str(out)])
    assert not train_stage.called
    assert_equal(weights_of(out), weights_of(whole))


# The command, whose seventh step in stage vae sends a signal to it and to the processes that read
# for it, or never ends.
SIGNALLED = """
import os, runpy, subprocess, sys, time, timm, torch
from torch.utils import data

number, workers = int(sys.argv[1]), int(sys.argv[2])
sys.argv[:3] = ["train.py"]
clip, load, calls = torch.nn.utils.clip_grad_norm_, data.DataLoader, []

def clip_grad_norm_(*arguments):
    calls.append(arguments)
    if len(calls) == 7 and number:
        # from another process: those that read die in peace of their parent's signal
        subprocess.run(["kill", f"-{number}", "--", f"-{os.getpgrp()}"])
        time.sleep(workers * 2)  # who dies of it is noticed
    if len(calls) == 7 and not number:
        print("seven", flush=True)
        time.sleep(600)
    return clip(*arguments)

def reading(*arguments, **how):
    return load(*arguments, **how | {"num_workers": workers, "pin_memory": False})

torch.nn.utils.clip_grad_norm_, data.DataLoader = clip_grad_norm_, reading
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.fixture
def signalled(micro_flags):
    """signalled(number, workers, flags ...) -> a process of that command, in a group of its own."""
    started, how = [], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    how |= {"cwd": ROOT, "start_new_session": True}
    how["env"] = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}

    def start(*arguments):
        command = [sys.executable, "-c", SIGNALLED, *map(str, arguments)]
        started.append(subprocess.Popen(command, **how))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number, workers, code", [(2, 0, 130), (15, 2, 143)])
def test_a_signal_saves_after_the_step_and_the_run_continues(
    micro_flags, tmp_path, signalled, number, workers, code
):
    """The end is one line. Continued, the weights are those of a run left in peace."""
    flags = [*micro_flags, *(f"--{stage}_steps=0" for stage in STAGES), "--vae_steps=12"]
    flags += [f"--accumulate={1 + workers}", "--save_every=99"]
    out, whole = tmp_path / "run", tmp_path / "whole"
    process = signalled(number, workers, *flags, "--out", out)
    _, said = process.communicate()
    assert process.returncode == code and "Traceback" not in said, said
    assert said.splitlines()[-1] == "train.py: interrupted; the same command continues"
    place = train.load_checkpoint(out / "checkpoint.pt")["progress"]
    assert (place["stage"], place["step"]) == ("vae", 7)
    for folder in (out, whole):
        train.main([*flags, "--out", str(folder)])
    assert_equal(weights_of(out), weights_of(whole))


def test_a_second_ctrl_c_ends_at_once(micro_flags, tmp_path, signalled):
    process = signalled(0, 0, *micro_flags, "--clip_steps=0", "--vae_steps=12", "--out", tmp_path)
    while process.stdout.readline() != "seven\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT


@pytest.fixture
def begun(micro_flags, tmp_path):
    """Flags of a run that has taken four steps of stage understand."""
    train_until(micro_flags, tmp_path / "run", ("understand", 4))
    return [*micro_flags, "--out", str(tmp_path / "run")]


def test_flags_of_a_stage_may_change_until_it_begins(capsys, tmp_path, begun):
    """Others are refused by name. So are another set and a second process."""
    with data.lock(begun[-1]):
        assert f"{begun[-1]} is in use by another process" in refused(capsys, *begun)
    free = ["--tune_steps=2", "--generate_batch=6", "--generate_draws=1", "--save_every=3"]
    other = [*begun, *free, "--generate_steps=3", "--precision=bf16", "--compile=off"]
    assert train.Run(data.parse(train.Config, "", other)).progress["step"] == 4
    fixed = "understand_steps=9 vae_steps=9 decode_batch=9 lr=0.5 seed=9 predicts=v depth=2"
    for flag in fixed.split():
        line = refused(capsys, *begun, f"--{flag}")
        assert f"made with --{flag.split('=')[0]} " in line and "another --out" in line
    world.main(["--out", str(tmp_path / "set"), "--count", "600", "--seed", "1"])
    assert "another set" in refused(capsys, *begun, "--data", tmp_path / "set")


class Trap:
    def __reduce__(self):  # when it is unpickled, it makes a folder
        return os.mkdir, ("trap",)


def test_a_checkpoint_that_cannot_be_read_is_named(monkeypatch, capsys, tmp_path, begun):
    """Cut, empty, of another version, or a foreign pickle, which is not executed."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run/checkpoint.pt"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"", b"x" * 999):
        path.write_bytes(damaged)
        line = refused(capsys, *begun)
        assert f"{path} is no whole checkpoint" in line and "delete it" in line
    torch.save({"version": 3, "model": Trap()}, path)
    assert str(path) in refused(capsys, *begun) and not Path("trap").exists()
    torch.save({"version": 1}, path)
    assert f"{path} has version 1, this code reads 5" in refused(capsys, *begun)


def test_init_keeps_the_weights_of_stages_without_steps(capsys, micro_flags, micro_run, tmp_path):
    """And the words. A part of other sizes starts anew and is named."""
    state = train.load_checkpoint(micro_run / "checkpoint.pt")
    state["words"].reverse()  # those of the set would come in another order
    torch.save(state, tmp_path / "start.pt")
    flags = [*micro_flags, *(f"--{stage}_steps=0" for stage in STAGES), "--tune_steps=2"]
    flags += ["--init", str(tmp_path / "start.pt")]
    for width, said in ((32, ""), (64, "other sizes of head, which start anew")):
        train.main([*flags, f"--head_width={width}", "--out", str(tmp_path / f"{width}")])
        printed = capsys.readouterr().out
        assert said in printed and ("start anew" in printed) == bool(said)
        made, old = train.load_checkpoint(tmp_path / f"{width}/checkpoint.pt"), state["model"]
        assert made["words"] == state["words"] and made["model"].keys() == old.keys()
        changed = {name for name in old if not torch.equal(made["model"][name], old[name])}
        assert changed and all(re.match(HEAD, name) for name in changed)
    missing = tmp_path / "missing.pt"
    assert str(missing) in refused(capsys, *micro_flags, "--init", missing, "--out", tmp_path)


BAD = "--step=3 --dept=3 --clip_steps=1.5 --predicts=noise @/nowhere --data=/none --lr=nan"
BAD += " --device=abacus --width=33 --tokens=60 --vae_width=20 --save_every=0 --accumulate=0"
BAD += " --head_patch=0 --tokens=0 --queries=0 --channels=0 --width=0 --vae_batch=0 --vae_steps=-3"
BAD += " --generate_draws=0 --seed=-1 --plan_share=1.5 --understand_see_share=0.9"


@pytest.mark.parametrize("flag", BAD.split())
def test_a_bad_flag_ends_in_one_line(capsys, micro_flags, tmp_path, flag):
    """Which has its name or its value. No flag is abbreviated."""
    line = refused(capsys, *micro_flags, "--out", tmp_path, flag)
    assert any(part in line for part in flag.lstrip("@").split("="))
    assert not (tmp_path / "checkpoint.pt").exists()


# Of each stage, flags with another value that shows in its first two steps.
ALIVE = {
    "clip": "clip_steps=3 clip_batch=2 tokens=16 channels=6 clip_width=64",
    "vae": "vae_steps=3 vae_batch=2 vae_width=8 seed=1 precision=bf16 save_every=1 accumulate=2"
    " lr=0.01 weight_decay=0.9 ema=0.05",
    "decode": "decode_steps=3 decode_batch=2 predicts=v decoder_width=64 decoder_depth=2",
    "understand": "understand_steps=3 understand_batch=2 queries=8 depth=2 width=64"
    " understand_see_share=0 understand_told_share=0",
    "generate": "generate_steps=3 generate_batch=2 target=vae objective=mse joint"
    " no-self_conditioning generate_shift=1.0 head_patch=4 head_width=64 head_depth=2",
    "tune": "tune_steps=3 generate_draws=1 tune_edit_share=0 plan_share=0",
}
ALIVE = {re.sub("=.*|no-", "", f): (f"--{f}", s) for s, fs in ALIVE.items() for f in fs.split()}
ELSEWHERE = {"data", "out", "init", "device", "compile"}  # shown by the tests above


def observed(prepared, stage, *flags):
    """The losses that are logged, the weights after two steps, and when they were saved."""
    run, seen = prepared(f"--{stage}_steps=2", "--save_every=2", *flags), []
    run.log = lambda bar, *where, **what: seen.append((where, what))
    run.save = lambda stage, step, *_: seen.append(step)
    train.train_stage(run, stage)
    return seen, {name: (x.shape, x.double().sum().item()) for name, x in copied(run).items()}


@pytest.mark.parametrize("name", [f.name for f in fields(train.Config) if f.name not in ELSEWHERE])
def test_every_flag_is_alive(prepared, name):
    """Another value makes another loss, weight, shape or checkpoint; the same value the same."""
    flag, stage = ALIVE[name]
    plain = observed(prepared, stage)
    assert plain == observed(prepared, stage) and plain != observed(prepared, stage, flag)
