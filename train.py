"""Trains every stage of BLIP3-o on a prepared set: one table of stages, one loop.

    python train.py                                          shapes, the demo
    python train.py @notebooks/photos.flags                  flags from a file
    torchrun --nproc-per-node 2 train.py ...                 as many processes as cards

Read STAGES and train_stage first. The same command continues a run, and sample.py draws from it.
"""

import ctypes
import json
import math
import os
import signal
import sys
import time
from collections import defaultdict, namedtuple
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from timm.layers import set_fused_attn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data as D
import model as M

# this process among those of torchrun
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
VERSION = 5  # of checkpoints


@dataclass(frozen=True)
class Config:
    """Every setting, once: the fields are the flags, the comments their help."""

    data: str = "data/shapes"  # folder of the prepared set
    out: str = "out/demo"  # folder of the run
    init: str = ""  # checkpoint to start from; a stage of 0 steps keeps what is there
    seed: int = 0  # of weights, batches and noise
    device: str = "auto"  # where to run: auto, cpu, cuda or mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the matmuls
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile
    save_every: int = 200  # steps between checkpoints
    target: Literal["clip", "vae"] = "clip"  # what the flow head makes: vectors or latents
    objective: Literal["flow", "mse"] = "flow"  # flow matching, or regression (MSE)
    joint: bool = False  # train the backbone during generation too
    predicts: Literal["x", "v"] = "x"  # what head and decoder predict: data or velocity
    self_conditioning: bool = True  # the flow head reads its own last guess
    tokens: int = 64  # vectors of an image
    queries: int = 16  # learned queries after a prompt; the paper has as many as vectors
    channels: int = 12  # width of an image's vectors; a tower's are projected on it
    clip_width: int = 128  # width of the tiny CLIP's two towers
    vae_width: int = 48  # channels of the VAE
    width: int = 128  # width of the backbone
    depth: int = 4  # blocks of the backbone
    head_width: int = 128  # width of the flow head
    head_depth: int = 5  # blocks of the flow head
    head_patch: int = 2  # neighbours on the grid per token of the flow head, a side
    decoder_width: int = 128  # width of the decoder
    decoder_depth: int = 4  # blocks of the decoder
    clip_steps: int = 600  # steps of stage clip
    vae_steps: int = 900  # steps of stage vae
    decode_steps: int = 900  # steps of stage decode
    understand_steps: int = 2400  # steps of stage understand
    generate_steps: int = 150  # steps of stage generate
    tune_steps: int = 1300  # steps of stage tune
    clip_batch: int = 24  # images a step of stage clip
    vae_batch: int = 16  # images a step of stage vae
    decode_batch: int = 32  # images a step of stage decode
    understand_batch: int = 21  # sequences a step of stage understand; from 22 it compiles twice
    generate_batch: int = 28  # prompts a step of stages generate and tune; 32 would compile longer
    generate_draws: int = 4  # noise draws for each prompt, which share a pass of the backbone
    accumulate: int = 1  # parts of a batch, one after another
    understand_see_share: float = 0.45  # share of steps of stage understand that read pictures
    understand_told_share: float = 0.25  # share that read plans in their place; the rest, prompts
    tune_edit_share: float = 0.25  # share of rows of stage tune that are edits; the rest, prompts
    plan_share: float = 0.9  # share of prompts and edits whose row holds the plan
    generate_shift: float = 2.0  # schedule shift in training; above 1 more times near noise
    lr: float = 3e-3  # peak learning rate
    weight_decay: float = 0.3  # decoupled, on matrices
    ema: float = 0.99  # decay of the averaged weights, which are what is kept

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            least = 0 if f.name == "seed" or f.name.endswith("_steps") else 1
            if f.type is int and value < least:
                raise ValueError(f"--{f.name} {value}: expected {least} or more")
            if f.name.endswith("_share") and not 0 <= value <= 1:
                raise ValueError(f"--{f.name} {value}: expected 0 to 1")
        if self.understand_see_share + self.understand_told_share > 1:
            raise ValueError("--understand_see_share and _told_share: expected at most 1 together")


HARMLESS = ("data", "out", "init", "device", "precision", "compile", "save_every")  # may change


# ------------------------------------------------------- stages: what a step reads and minimises


def clip_batch(run, ids, rng):
    captions = np.array([run.data.texts[i]["caption"] for i in ids])
    sequences, _ = run.sequences([[("user", text), ("bot", None)] for text in captions])
    same = torch.from_numpy(captions[:, None] == captions).float()  # equal ones are no negatives
    return {"images": run.data.rows("images", ids), "ids": sequences, "same": same}


def clip_loss(model, generator, images, ids, same):
    return model.clip(M.to_pixels(images), ids, same, generator)


def vae_batch(run, ids, rng):
    return {"images": run.data.rows("images", ids)}


def vae_loss(model, generator, images):
    return model.vae(M.to_pixels(images), generator)


def decode_batch(run, ids, rng):
    return {"latents": run.cached("vae", ids), "vectors": run.cached("clip", ids)}


def decode_loss(model, generator, latents, vectors):
    """The decoder makes latents of noised vectors, since those of the flow head are not perfect."""
    strength = torch.rand(len(vectors), 1, 1, generator=generator, device=vectors.device) / 2
    noised = vectors + strength * M.draw_noise(vectors, generator)
    cond = M.drop_condition(noised, generator)
    return M.flow_loss(model.decoder, latents, cond, generator)


def understand_batch(run, ids, rng):
    """Rows of one task, since those have about one length. Photos have no plans to tell."""
    c = run.config
    see = c.understand_see_share
    told = c.understand_told_share if run.data.texts[0]["plan"] else 0
    task = rng.choice(["see", "prompt", "told"], p=[see, 1 - (see + told), told])
    rows = [understand_row(run, i, rng, task) for i in ids]
    sequences, learn = run.sequences(rows)
    batch = {"ids": sequences, "learn": learn}
    return batch | {"vectors": run.cached("clip", ids)} if task == "see" else batch


def understand_row(run, i, rng, task):
    """A row about picture i. Where it is no prompt, 40 % of the pictures with edits are edited."""
    text = run.data.texts[i]
    if task == "prompt":
        return prompt(run, i, rng, (0.4, 0.4, 0.2))
    if text["edits"] and rng.random() < 0.4:
        row, _ = edit(run, i, rng)
    else:
        row = dialogue(text, rng, brief=task == "see")
    return without_image(row) if task == "told" else row


def without_image(row):
    """The row without its picture. Its plan is given as text, and no longer carries loss."""
    _, question, (_, plan), *rest = row
    return [question, ("given", plan), *rest]


def look(text):
    """A picture, then its plan if it has one. What follows need only read the plan."""
    return [("image", None)] + turns(located(text))


def located(text):
    return [[D.LOCATE, text["plan"]]] if text["plan"] else []  # photos have none


def turns(pairs):
    return [part for pair in pairs for part in zip(("user", "bot"), pair)]


def dialogue(text, rng, brief):
    """Up to four questions about a picture, then its caption; or one of these, if brief."""
    pairs = text["qa"] + located(text)
    pairs = [pairs[i] for i in rng.permutation(len(pairs))[:4]]
    pairs.append([D.DESCRIBE, text["whole"]])
    if brief:
        pairs = [pairs[rng.integers(len(pairs))]]
    return look(text) + turns(pairs)


def prompt(run, i, rng, shares):
    """A prompt about picture i. The shares are of its caption, of a user's words, and of texts for
    equal objects, which pictures seldom show. Photos have their caption alone."""
    prompts = run.data.texts[i]["prompts"]
    said, plan = prompts[rng.choice(3, p=shares) if len(prompts) == 3 else 0]
    return planned(run, [("user", said)], plan, rng)


def edit(run, i, rng):
    """Picture i, up to two questions, an instruction; and the id of the picture that it makes."""
    text = run.data.texts[i]
    row = look(text) + turns(text["qa"][: rng.integers(3)])
    instruction, offset, plan = text["edits"][rng.integers(len(text["edits"]))]
    row.append(("user", instruction))
    return planned(run, row, plan, rng), i + offset


def planned(run, row, plan, rng):
    """The row, then its plan in `plan_share` of the cases, then the queries."""
    if plan and rng.random() < run.config.plan_share:
        row.append(("bot", plan))
    return [*row, ("queries", None)]


def understand_loss(model, generator, ids, learn, vectors=None):
    return model.backbone(ids, learn, vectors)


def generate_batch(run, ids, rng, shares=(1, 0, 0)):
    """Prompts, and the targets of their K draws, which share one pass of the backbone."""
    sequences, _ = run.sequences([prompt(run, i, rng, shares) for i in ids])
    x = run.cached(run.config.target, np.repeat(ids, run.config.generate_draws))
    return {"ids": sequences, "x": x}


def tune_batch(run, ids, rng):
    """Instructions: prompts in a user's words, and edits for a share of the rows."""
    c = run.config
    able = np.array([c.target == "clip" and bool(run.data.texts[i]["edits"]) for i in ids])
    most = min(round(c.tune_edit_share * len(ids)), len(ids) - 1)  # one row stays a prompt
    chosen = able & (able.cumsum() <= most)
    batch = generate_batch(run, ids[~chosen], rng, (0.1, 0.9, 0))
    if chosen.any():
        rows, made = zip(*(edit(run, i, rng) for i in ids[chosen]))
        batch["edit_ids"], _ = run.sequences(rows)
        batch["vectors"] = run.cached("clip", ids[chosen])
        x = run.cached("clip", np.repeat(made, c.generate_draws))
        batch["x"] = torch.cat([batch["x"], x])
    return batch


def generate_loss(model, generator, ids, x, edit_ids=None, vectors=None):
    """The flow head makes the vectors or latents x (B, N, C) of prompts (P, T), B = P K. The rows
    of edits come last, and `vectors` (edits, N, C) are what they change."""
    c, source = model.config, None
    states = model.backbone.query_states(ids)
    if edit_ids is not None:
        source = vectors.repeat_interleave(c.generate_draws, 0)
        states = torch.cat([states, model.backbone.query_states(edit_ids, vectors)])
    if c.objective == "mse":
        return M.regression_loss(model.head, x, states)
    cond = M.drop_condition(states, generator)
    return M.flow_loss(model.head, x, cond, generator, c.generate_shift, source)


# What learns, by the beginning of its name; all else is frozen. The batch is a function of (run,
# ids of pictures, rng), the loss of (model, generator, **batch) and gives a loss for each row.
Stage = namedtuple("Stage", "learns batch loss")
STAGES = {
    "clip": Stage(("clip.",), clip_batch, clip_loss),
    "vae": Stage(("vae.",), vae_batch, vae_loss),
    "cache": None,  # nothing learns: see fill_cache
    "decode": Stage(("decoder.",), decode_batch, decode_loss),
    "understand": Stage(("backbone.",), understand_batch, understand_loss),
    "generate": Stage(("head.", "backbone.queries"), generate_batch, generate_loss),
    "tune": Stage(("head.", "backbone.queries"), tune_batch, generate_loss),
    "done": None,
}
ORDER = list(STAGES)


# --------------------------------------------------------------------------------------- the loop


def train_stage(run, name):
    """The one loop of all stages, from the beginning or from where the checkpoint left it."""
    c, model, stage = run.config, run.model, STAGES[name]
    steps = getattr(c, f"{name}_steps")
    learns = ("head.", "backbone.") if c.joint and "head." in stage.learns else stage.learns
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.startswith(learns))
    learned = {key: p for key, p in model.named_parameters() if p.requires_grad}
    averages = {key: p.detach().clone() for key, p in learned.items()}
    optimizers = make_optimizers(c, learned, run.dtype)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype is torch.float16)
    keepers = [*optimizers, scaler]
    first = run.progress["step"]
    averages |= run.progress["averages"]
    for keeper, state in zip(keepers, run.progress["states"]):
        keeper.load_state_dict(state)
    net = DistributedDataParallel(model, find_unused_parameters=True) if WORLD > 1 else model
    batches = Batches(run, name, run.data.train_ids).read(first, steps)
    title = f"{name} ({sum(p.numel() for p in learned.values()) / 1e6:.2f} M learn)"
    bar = tqdm(range(first, steps), title, steps, initial=first, unit="step", disable=RANK > 0)
    for step in bar:
        rate = learning_rate(c, step, steps)
        for _ in range(c.accumulate):
            with run.autocast:
                loss = net(stage.loss, *run.ready(next(batches)))
            scaler.scale(loss / c.accumulate).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(learned.values(), 1.0)
        for optimizer in optimizers:
            # where fp16 overflows, the scaler would hold back one optimiser and not the other
            if run.dtype is not torch.float16 or norm.isfinite():
                scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        decay = min(c.ema, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(list(averages.values()), list(learned.values()), step)
        save = (step + 1) % c.save_every == 0 or run.stopped
        if save or step % 10 == 0 or step + 1 == steps:  # seldom: the device has to wait
            run.log(bar, name, step, loss.item(), norm.item(), rate)
        if save:
            run.save(name, step + 1, averages, keepers)
    model.load_state_dict(averages, strict=False)
    held = Batches(run, name, run.data.val_ids)
    with torch.no_grad(), run.autocast, torch.compiler.set_stance("force_eager"):
        losses = [model(stage.loss, *run.ready(held[i])).item() for i in range(12)]
    print(f"stage {name}: validation loss {np.mean(losses):.4f}")


def learning_rate(c, step, steps):
    """Linear warm-up, constant, linear cool-down over the last 30 %. The last step is not zero."""
    up = (step + 1) / max(30, steps // 100)
    down = (steps - step) / (0.3 * steps)
    return c.lr * min(1, up, down)


class Batches(Dataset):
    """Item i is batch i of a stage, and a seed for its noise.
    Under one command both are functions of (seed, stage, i, process). So a DataLoader may read
    ahead, and a run that continues meets the batches it would have met."""

    def __init__(self, run, stage, pool):
        self.run = run
        self.stage = stage
        self.pool = pool  # ids of pictures
        size = "generate_batch" if stage == "tune" else f"{stage}_batch"
        self.rows = max(1, getattr(run.config, size) // (run.config.accumulate * WORLD))

    def __getitem__(self, i):
        rng = np.random.default_rng([self.run.config.seed, ORDER.index(self.stage), i, RANK])
        ids = rng.choice(self.pool, self.rows)
        return STAGES[self.stage].batch(self.run, ids, rng), int(rng.integers(2**62))

    def read(self, first, steps):
        """An iterator over the batches of steps from `first` on. Beside a card, processes read."""
        parts = self.run.config.accumulate
        cuda = self.run.device.type == "cuda"
        how = {"num_workers": 4 * (cuda and sys.platform == "linux"), "pin_memory": cuda}
        order = range(first * parts, steps * parts)
        return iter(DataLoader(self, batch_size=None, sampler=order, worker_init_fn=deaf, **how))


def deaf(worker):
    """A process that reads goes on where all get SIGTERM: the first one still needs it to save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@torch.no_grad()
def fill_cache(run):
    """Stage cache: normalised vectors and latents of the whole set. No later stage runs an encoder.
    ValueError if they do not fit into half precision."""
    model, count = run.model, len(run.data)
    sample = run.data.train_ids[:: max(1, count // 500)]
    for name, normalise in model.normalise.items():
        normalise.fit(torch.cat(list(encoded(run, name, sample))))
        if RANK > 0:
            continue
        how = {"dtype": np.float16, "shape": (count, *model.shapes[name])}
        array, start = np.lib.format.open_memmap(run.out / f"cache_{name}.npy", "w+", **how), 0
        for raw in tqdm(encoded(run, name, np.arange(count)), f"cache {name}", unit="batch"):
            made = normalise(raw).half().cpu()
            if not made.isfinite().all():
                raise ValueError(f"stage cache: {name} is not finite in half precision")
            array[start : start + len(made)] = made.numpy()
            start += len(made)
    if WORLD > 1:
        dist.barrier()


def encoded(run, name, ids):
    """Yields raw vectors ("clip") or latents ("vae") of pictures, some at a time: (B, N, C)."""
    model = run.model
    for some in np.array_split(ids, math.ceil(len(ids) / 128)):
        if name == "clip" and model.clip is None:  # a tower's are in the set
            yield run.data.rows("features", some).to(run.device).float()
        else:
            pixels = M.to_pixels(run.data.rows("images", some).to(run.device))
            with run.autocast:  # half the time; the rounding is far below the decoder's noise
                made = model.clip.vectors(pixels) if name == "clip" else model.vae.encode(pixels)
            yield made.float()


# ---------------------------------------------------------------------------------- the optimisers


def make_optimizers(c, learned, dtype):
    """Muon for the matrices of blocks (not adaLN's, which are wide), AdamW for all else."""
    muon = {k: p for k, p in learned.items() if "blocks." in k and "parts" not in k and p.ndim == 2}
    others = [p for k, p in learned.items() if k not in muon]
    decayed = {"params": [p for p in others if p.ndim > 1], "weight_decay": c.weight_decay}
    plain = {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0}
    optimizers = [torch.optim.AdamW([decayed, plain], betas=(0.9, 0.98), fused=True)]
    if muon:
        optimizers.append(Muon(muon.values(), c.weight_decay, dtype))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (K. Jordan, 2024), for matrices; step size as in torch.optim.Muon.
    torch's own always rounds to bf16. A CPU without bf16 takes 15 times as long for that as for
    float32, which this one uses there. A test holds the two together."""

    def __init__(self, matrices, weight_decay, dtype):
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay})
        self.dtype = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                shapes[p.shape].append(p)
            for shape, matrices in shapes.items():  # those of one shape at once: few kernels
                grad = torch.stack([p.grad for p in matrices])
                momentum = self.state[matrices[0]].setdefault("momentum", torch.zeros_like(grad))
                momentum.lerp_(grad, 0.05)
                update = orthogonalise(grad.lerp(momentum, 0.95), self.dtype)
                update = update * (group["lr"] * 0.2 * math.sqrt(max(shape)))
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(matrices, update.float().unbind())


def orthogonalise(matrices, dtype, steps=5):
    """Newton-Schulz iteration, which moves all singular values near 1: (k, m, n) -> (k, m, n)."""
    x = (matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)).to(dtype)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.mT if tall else x


# ---------------------------------------------------------------------------------------- the run


def choose_machine(c):
    """Where and how to compute: device, autocast dtype (None is fp32), whether to compile."""
    device = D.find_device(c.device)
    set_fused_attn(device.type != "cpu")  # slow in training there, see model.attention
    card = (0, 0)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        card = torch.cuda.get_device_capability()
    # a CPU compiles for up to half a minute a stage: only a long run gets that back
    long = device.type == "cpu" and c.generate_steps + c.tune_steps >= 500
    wanted = c.compile == "on" or (c.compile == "auto" and (long or card >= (7, 0)))
    compiled = wanted and can_compile(device)
    # other CPUs emulate bf16; on one that does not compile, copies eat up its gain
    cpu_bf16 = device.type == "cpu" and compiled and torch.cpu._is_avx512_bf16_supported()
    best = "fp16" if device.type == "cuda" else "fp32"
    if cpu_bf16 or card >= (8, 0):
        best = "bf16"
    precision = best if c.precision == "auto" else c.precision
    print(f"{device}, {precision}, compiled: {compiled}, {torch.get_num_threads()} threads")
    dtypes = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    return device, dtypes[precision], compiled


def can_compile(device):
    """Whether torch.compile works on this machine, tried on one operation."""
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
        return True
    except Exception as error:  # each missing tool has an error of its own
        print(f"torch.compile does not work here ({type(error).__name__}): all runs without it")
        return False


def load_checkpoint(path, device="cpu"):
    """What `Run.save` wrote, or weights that were shipped, as a dict. ValueError if damaged."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                state = json.loads(file.metadata()["state"])
            state["model"] = load_file(path)
        else:
            state = torch.load(path, device, weights_only=True)
        version = state["version"]
    except OSError:  # it is missing, a folder, or not readable, and says so
        raise
    except Exception as error:  # each format has errors of its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is no whole checkpoint ({reason:.100}): delete it") from error
    if version != VERSION:
        raise ValueError(f"{path} has version {version}, this code reads {VERSION}: train it again")
    return state


def every_text(text):
    edits = [instruction for instruction, *_ in text["edits"]]
    return [text["caption"], text["plan"], *chain(*text["qa"]), *edits]


class Run:
    """What all stages share: settings, prepared set, tokenizer, model, and the one checkpoint."""

    stopped = 0  # exit code of a run that a signal ends at its next checkpoint

    def __init__(self, c):
        self.config = c
        self.out = Path(c.out)
        self.path = self.out / "checkpoint.pt"
        self.data = D.PreparedSet(c.data)
        self.device, self.dtype, self.compiled = choose_machine(c)
        self.autocast = torch.autocast(self.device.type, self.dtype, enabled=bool(self.dtype))
        self.progress = {"stage": "clip", "step": 0, "averages": {}, "states": [], "seconds": {}}
        state = {}
        if self.path.exists():
            state = load_checkpoint(self.path, self.device)
            self.progress = state["progress"]
            self.check_same(state)
        elif c.init:
            state = load_checkpoint(Path(c.init))
        texts = chain(*map(every_text, self.data.texts[:5000]))
        self.tokenizer = M.Tokenizer(state["words"]) if state else M.Tokenizer.fit(texts)
        torch.manual_seed(c.seed)
        side, channels = self.data.facts["side"], self.data.facts["channels"]
        if channels and self.data.facts["tokens"] != c.tokens:
            raise ValueError(f"--tokens {c.tokens}: the set has {self.data.facts['tokens']}")
        self.model = M.BLIP3o(c, len(self.tokenizer), side, channels)
        own = self.model.state_dict()
        weights = state.get("model", own)
        fits = {k: x for k, x in weights.items() if k in own and x.shape == own[k].shape}
        anew = {name.split(".")[0] for name in own.keys() - fits.keys()}
        if anew:
            print(f"the checkpoint has other sizes of {', '.join(sorted(anew))}, which start anew")
        self.model.load_state_dict(fits, strict=False)
        self.model.to(self.device)
        self.seconds = self.progress["seconds"]
        self.began = time.perf_counter()

    def check_same(self, state):
        """ValueError where the run began with another set or other settings.
        Those whose name begins with a stage's, such as --tune_steps, may change until it begins."""
        used = ORDER.index(self.progress["stage"]) + (self.progress["step"] > 0)
        for name, value in asdict(self.config).items():
            old = state["config"].get(name, value)  # an older commit may lack a setting
            free = name in HARMLESS or name.startswith(tuple(ORDER[used:]))
            if old != value and not free:
                raise ValueError(f"{self.path} was made with --{name} {old}: take another --out")
        if state["set"]["fingerprint"] != self.data.fingerprint:
            raise ValueError(f"{self.path} was made with another set than {self.config.data}")

    def save(self, stage, step=0, averages=None, keepers=()):
        """The one checkpoint of a run, whole or not at all: a kill leaves the one before.
        KeyboardInterrupt(exit code) after it if a signal has come, see `stop`."""
        self.progress = {"stage": stage, "step": step, "averages": averages or {}}
        self.progress["states"] = [keeper.state_dict() for keeper in keepers]
        self.progress["seconds"] = self.seconds
        state = {"version": VERSION, "config": asdict(self.config), "words": self.tokenizer.words}
        state["set"] = {**self.data.facts, "fingerprint": self.data.fingerprint}
        state |= {"model": self.model.state_dict(), "progress": self.progress}
        if RANK == 0:
            D.write_whole(self.path, lambda temporary: torch.save(state, temporary))
        if self.stopped and stage != "done":
            raise KeyboardInterrupt(self.stopped)

    def log(self, bar, stage, step, loss, norm, rate):
        """Into the bar and STAGE.csv. Bad numbers end the run before they reach a checkpoint."""
        # with fp16 the scaler skips steps whose gradients overflow
        if not (math.isfinite(loss) and (math.isfinite(norm) or self.dtype is torch.float16)):
            raise ValueError(f"stage {stage}, step {step}: loss {loss}, norm {norm}: try less --lr")
        self.clock(stage)
        bar.set_postfix_str(f"loss {loss:.3f}, norm {norm:.2f}, rate {rate:.1e}")
        if RANK == 0:
            with open(self.out / f"{stage}.csv", "a") as file:
                print(step, loss, norm, rate, f"{self.seconds[stage]:.1f}", sep=",", file=file)

    def clock(self, stage):
        """Books the time since the last call to a stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0) + now - self.began
        self.began = now

    def ready(self, item):
        """A batch and its seed -> the noise's generator, the batch on the device."""
        batch, seed = item
        source = torch.Generator(self.device).manual_seed(seed)
        return source, {k: x.to(self.device, non_blocking=x.is_pinned()) for k, x in batch.items()}

    def sequences(self, rows):
        return M.build_sequences(self.tokenizer, rows, self.config.tokens, self.config.queries)

    def cached(self, name, ids):
        """Normalised vectors ("clip") or latents ("vae") of pictures: (B, N, C)."""
        array = np.load(self.out / f"cache_{name}.npy", mmap_mode="r")
        return torch.from_numpy(array[ids]).float()


def train(c):
    """Runs the stages that are missing. Only the first process writes."""
    torch.set_flush_denormal(True)  # early steps are several times slower without it on a CPU
    torch.set_float32_matmul_precision("high")  # TF32 on cards
    if sys.platform == "linux":
        # keep freed memory: glibc hands large blocks back, and each step pays page faults for them
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            ctypes.CDLL(None).mallopt(option, value)
    if WORLD > 1:  # the others wait while the first fills the cache
        dist.init_process_group(timeout=timedelta(days=1))
    run = Run(c)
    m = run.model
    blocks = (*m.backbone.trunk.blocks, *m.head.blocks, *m.decoder.blocks)
    for block in blocks if run.compiled else ():
        block.compile(fullgraph=True, dynamic=isinstance(block, M.TrunkBlock))
    for name in ORDER[ORDER.index(run.progress["stage"]) : -1]:
        if name != "tune":  # which runs what was compiled for generate
            torch.compiler.reset()
        if name == "cache":
            fill_cache(run)
        elif getattr(c, f"{name}_steps") and (name != "clip" or m.clip is not None):
            train_stage(run, name)
        run.clock(name)
        run.save(ORDER[ORDER.index(name) + 1])
    print(f"trained in {sum(run.seconds.values()):.0f} s: {run.path}")


def stop(number, frame):
    """Ctrl-C or SIGTERM: the run saves after the step and ends. The second one ends it at once."""
    signal.signal(number, signal.SIG_DFL)
    Run.stopped = 128 + number
    print("The run saves after this step. A second signal ends it at once.")


def main(arguments=None):
    if RANK > 0:  # one process speaks for all
        sys.stdout = open(os.devnull, "w")
    with D.plain_errors("train.py"):
        c = D.parse(Config, __doc__, arguments)
        with D.lock(c.out) if RANK == 0 else nullcontext():
            train(c)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # the other processes end with the first
        signal.signal(number, stop if RANK == 0 else signal.SIG_IGN)
    main()
