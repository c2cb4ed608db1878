"""Trains every stage of BLIP3-o on a prepared set: one config, one loop, one loss per stage.

    python train.py                                        shapes, the demo preset
    python train.py --data data/photos --out out/photos    photos, the preset of that name
    torchrun --nproc-per-node 2 train.py ...               as many processes as cards

Runs what is missing of clip -> vae -> cache -> understand -> generate -> tune -> decode; the same
command again continues. See data.py for the set, sample.py for pictures and scores.
"""

import argparse
import ctypes
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import time
import zlib
from collections import Counter, defaultdict, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torchvision.utils import save_image
from tqdm import tqdm

import data as D
import model as M

STAGES = ("clip", "vae", "cache", "understand", "generate", "tune", "decode")
SHARES = ("drop", "broad_share", "repeat_share", "thin", "cooldown", "ema")  # settings in 0..1
VERSION = 2  # of the checkpoints
# the stages whose weights a stage learns with: trained anew, they need it trained anew too
BUILT_ON = {"cache": ("clip", "vae"), "understand": ("clip",), "decode": ("clip", "vae")}
BUILT_ON |= {"generate": ("clip", "understand"), "tune": ("clip", "understand", "generate")}
# the optimiser's matrices: adaLN's are wide, so that orthogonalising them costs more than it gains
MUON = r"blocks\.(?!.*modulation)"
HARMLESS = {"data", "out", "device", "precision", "compile", "save_every", "strip_every"}
HARMLESS |= {"accumulate", "checkpoint", "init"}  # what init holds counts, not its name
# this process among those of torchrun
RANK, WORLD = (int(os.environ.get(name, one)) for name, one in (("RANK", 0), ("WORLD_SIZE", 1)))
PROGRESS = ("step", "rows", "seconds", "skipped", "in_row", "averages")  # of a stage
DESCRIBE = "describe"  # the question whose answer is the caption


def flag(default, text: str, choices: tuple = ()):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every setting, once: the fields are the flags, their texts the help."""

    data: str = flag("data/shapes", "folder of the prepared set (data.py)")
    out: str = flag("out/demo", "folder of the run")
    init: str = flag("", "weights file to start from; a stage of 0 steps keeps what lies there")
    seed: int = flag(0, "of weights, batches and noise")
    device: str = flag("auto", "where to run", ("auto", "cpu", "cuda", "mps"))
    precision: str = flag("auto", "of the matmuls", ("auto", "fp32", "bf16", "fp16"))
    compile: str = flag("auto", "torch.compile", ("auto", "on", "off"))
    optimizer: str = flag("muon", "muon has adamw for all but matrices", ("adamw", "muon"))
    target: str = flag("clip", "what the flow head makes: vectors or latents", ("clip", "vae"))
    objective: str = flag("flow", "flow matching, or regression (MSE)", ("flow", "mse"))
    joint: bool = flag(False, "train the backbone during generation too")
    tokens: int = flag(64, "vectors of an image")
    queries: int = flag(16, "learned queries behind a prompt; the paper has as many as vectors")
    channels: int = flag(12, "width of the treated vectors")
    treatment: str = flag("standardise", "of the vectors", ("standardise", "whiten"))
    text_length: int = flag(256, "tokens of a text, of which training drops what comes after")
    head_dim: int = flag(32, "width of an attention head")
    clip_width: int = flag(128, "width of the tiny CLIP's towers")
    clip_depth: int = flag(3, "blocks of the tiny CLIP's image tower")
    clip_noise: float = flag(0.05, "noise on the vectors that the tiny CLIP's losses read")
    pixel_weight: float = flag(20.0, "weight of the pixel loss beside the contrastive one")
    edge_weight: float = flag(50.0, "weight of the loss on orientations of edges (HOG), likewise")
    vae_width: int = flag(48, "channels of the VAE")
    vae_depth: int = flag(2, "residual blocks of its encoder and of its decoder")
    width: int = flag(128, "width of the backbone")
    depth: int = flag(4, "blocks of the backbone")
    dit_width: int = flag(128, "width of the flow head")
    dit_depth: int = flag(5, "blocks of the flow head")
    dit_patch: int = flag(2, "neighbours on the grid per token of the flow head, a side")
    predicts: str = flag("x", "of the flow head: data or velocity", ("x", "v"))
    recalls: bool = flag(True, "the flow reads its own last guess (self-conditioning)")
    decoder_width: int = flag(128, "width of the decoder")
    decoder_depth: int = flag(4, "blocks of the decoder")
    decoder_patch: int = flag(2, "neighbouring latents per token of the decoder, a side")
    decoder_noise: float = flag(0.5, "largest noise on the vectors that the decoder learns from")
    clip_steps: int = flag(600, "steps of stage clip")
    vae_steps: int = flag(1400, "steps of stage vae")
    understand_steps: int = flag(800, "steps of stage understand")
    generate_steps: int = flag(800, "steps of stage generate")
    tune_steps: int = flag(1450, "steps of stage tune")
    decode_steps: int = flag(1100, "steps of stage decode")
    clip_batch: int = flag(24, "images a step of stage clip")
    vae_batch: int = flag(16, "images a step of stage vae")
    understand_batch: int = flag(16, "sequences a step of stage understand")
    generate_batch: int = flag(32, "prompts a step of stages generate and tune")
    decode_batch: int = flag(32, "images a step of stage decode")
    draws: int = flag(4, "noise draws for each prompt, sharing one pass of the backbone")
    accumulate: int = flag(1, "parts of a batch, one after another; all but clip's")
    checkpoint: bool = flag(False, "compute activations twice rather than keep them")
    drop: float = flag(0.1, "share of conditions replaced by zeros, for guidance")
    shift: float = flag(2.0, "schedule shift of generation's training; above 1 more near noise")
    broad_share: float = flag(0.1, "share of pretraining captions while tuning")
    thin: float = flag(0.3, "share of prompts of which about a third of the words is left out")
    repeat_share: float = flag(0.25, "share of understanding's steps whose queries repeat a prompt")
    lr: float = flag(3e-3, "peak learning rate")
    tune_lr: float = flag(3e-3, "peak learning rate of stage tune")
    warmup: int = flag(30, "steps of linear warm-up")
    cooldown: float = flag(0.3, "share of steps of linear cool-down at the end")
    weight_decay: float = flag(0.3, "decoupled, on matrices")
    clip_norm: float = flag(1.0, "largest gradient norm")
    ema: float = flag(0.99, "decay of the averaged weights, which are what is kept")
    save_every: int = flag(200, "steps between checkpoints")
    strip_every: int = flag(200, "steps between strips of sample pictures")

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            known = not choices or value in choices
            D.require(known, f"--{f.name} {value}: expected one of {', '.join(choices)}")
            size = f.type is int and not re.fullmatch("seed|warmup|.*_steps", f.name)
            most = 1000 if "depth" in f.name else 2**20 if size else 2**63 - 1
            least, most = int(size), 1 if f.name in SHARES else most
            fits = type(value) not in (int, float) or least <= value <= most
            D.require(fits, f"--{f.name} {value}: expected {least} to {most}")
        side = math.isqrt(self.tokens)
        square = side**2 == self.tokens and side % self.dit_patch == 0
        message = "expected a square whose side --dit_patch divides, such as 64"
        D.require(square, f"--tokens {self.tokens}, --dit_patch {self.dit_patch}: {message}")
        units = {"vae_width": 8, "head_dim": 4}
        units |= {f"{part}width": self.head_dim for part in ("clip_", "", "dit_", "decoder_")}
        parts = self.accumulate * WORLD  # of a batch; every second row of one recalls
        units |= {f"{stage}_batch": parts for stage in ("vae", "understand", "generate", "decode")}
        units["generate_batch"] *= 1 + (parts > 1 and self.recalls and self.objective == "flow")
        for name, unit in units.items():
            value = getattr(self, name)
            D.require(value % unit == 0, f"--{name} {value}: expected a multiple of {unit}")


PRESETS = {
    "demo": {},
    "photos": {  # no questions and no clean prompts: less to understand, nothing to tune
        **dict(clip_steps=400, vae_steps=500, understand_steps=250, tune_steps=0, decode_steps=500),
        **dict(generate_steps=900, generate_batch=8, draws=8, queries=64, channels=32),
        **dict(clip_noise=0.1, weight_decay=0.1),
    },
    "cc3m": {  # features of a timm tower, 768 wide, and pictures of 128 px, on a card of 8 GB
        **dict(channels=768, queries=64, width=512, depth=8, head_dim=64, draws=1, shift=3.5),
        **dict(dit_width=768, dit_depth=8, dit_patch=1, predicts="v", accumulate=4),
        **dict(decoder_width=384, decoder_depth=8, vae_width=128, vae_depth=3, vae_batch=32),
        **dict(understand_batch=64, generate_batch=64, decode_batch=32, vae_steps=5000),
        **dict(understand_steps=10_000, generate_steps=50_000, tune_steps=0, decode_steps=30_000),
        **dict(lr=1e-3, warmup=500, ema=0.999, weight_decay=0.1, save_every=1000, strip_every=1000),
    },
    "micro": {  # seconds, for tests
        **{f"{part}_width": 32 for part in ("clip", "dit", "decoder")},
        **{f"{part}_depth": 1 for part in ("clip", "dit", "decoder", "vae")},
        **{f"{stage}_steps": 6 for stage in STAGES if stage != "cache"},
        **{f"{stage}_batch": 4 for stage in ("clip", "vae", "understand", "generate", "decode")},
        **dict(width=32, depth=1, vae_width=16, draws=2, warmup=2, save_every=4, strip_every=4),
    },
}


def parse_config(arguments: list[str]) -> Config:
    """Flags -> Config; an unknown flag or impossible value ends with one line and exit code 2."""
    look = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(**look, allow_abbrev=False)
    text = "defaults of the rest (default photos for a set of photos, else demo)"
    parser.add_argument("--preset", choices=PRESETS, help=text)
    for f in fields(Config):
        text = f"{f.metadata['help']} (default {f.default})"
        kind = {"type": f.type, "choices": f.metadata["choices"] or None}
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else kind
        parser.add_argument(f"--{f.name}", help=text, **kind)
    # argparse makes [] of --data=--
    given = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v not in (None, [])}
    meta = Path(given.get("data", Config.data)) / "meta.json"
    try:
        photos = meta.is_file() and D.read_json(meta)["settings"]["kind"] == "photos"
        return Config(**PRESETS[given.pop("preset", "photos" if photos else "demo")] | given)
    except (ValueError, OSError) as error:
        parser.error(str(error))


# ----------------------------------------------------------------------- machine and files of a run


def resolve_machine(c: Config) -> tuple[torch.device, torch.dtype | None, bool]:
    """Where and how to compute: device, autocast dtype (None is fp32), compile; printed."""
    device = D.find_device(c.device)
    where, card = torch.device(device), (0, 0)
    if device == "cuda":  # with its number: threads begin at card 0
        where = torch.device(device, int(os.environ["LOCAL_RANK"]) if WORLD > 1 else 0)
        torch.cuda.set_device(where)
        card = torch.cuda.get_device_capability()
    compiler = any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)
    compiler &= Path(sysconfig.get_path("include"), "Python.h").is_file()
    # a CPU compiles for up to half a minute a stage: only a long run gets that back
    pays = card >= (7, 0) or (device == "cpu" and c.generate_steps + c.tune_steps >= 500)
    compile = compiler and (c.compile == "on" or (c.compile == "auto" and pays))
    # others emulate bf16, and a card below 8.0 claims it; eager on a CPU, copies eat up the gain
    native = card >= (8, 0) or device == "cpu" and compile and torch.cpu._is_avx512_bf16_supported()
    precision = c.precision
    if precision == "auto":
        precision = "bf16" if native else "fp16" if device == "cuda" else "fp32"
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    print(
        f"device {device}, precision {precision}, compile {'on' if compile else 'off'}"
        f"{'' if compiler else ' (no C++ compiler or Python.h)'}, {torch.get_num_threads()} threads"
        f"{f', {WORLD} processes' if WORLD > 1 else ''}"
    )
    torch.set_flush_denormal(True)  # early steps are several times slower without it on a CPU
    if device == "cpu" and sys.platform == "linux":
        # keep freed memory: glibc hands large blocks back, and each step pays page faults for them
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            ctypes.CDLL(None).mallopt(option, value)
    if WORLD > 1:  # the others wait while the first fills the cache
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=1))
    return where, dtype, compile


def add_over_processes(tensors: list[Tensor]) -> None:
    """Replaces each tensor by its sum over the processes: one message for all of them."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view_as(tensor))


def checksum(tensors: dict[str, Tensor], metadata: dict) -> str:
    """Changes with every bit that a checkpoint holds."""
    return hashlib.sha256(save(tensors) + json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    metadata = {name: json.dumps(value) for name, value in metadata.items()}
    raw = save(tensors, {**metadata, "sha256": checksum(tensors, metadata)})
    D.write_whole(path, lambda temporary: temporary.write_bytes(raw))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of a checkpoint; ValueError if damaged or of another version."""
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        seal = found.pop("sha256", None)
        metadata = {name: json.loads(value) for name, value in found.items()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: damaged weights ({error}), delete the file") from error
    version = metadata.get("version", "none")
    message = f"{path} has version {version}, this code reads {VERSION}: train it again"
    D.require(version == VERSION, message)
    whole = seal == checksum(tensors, found)
    D.require(whole, f"{path}: damaged weights (checksum), delete the file")
    return tensors, metadata


def load_model(path: Path) -> tuple[M.BLIP3o, M.Tokenizer, Config, dict]:
    """A finished run's model, in float32 and frozen; settings newer than it have their defaults."""
    tensors, metadata = load_weights(path)
    unknown = metadata["config"].keys() - {f.name for f in fields(Config)}
    D.require(not unknown, f"{path} has settings {sorted(unknown)}, unknown here: train it again")
    config = Config(**metadata["config"] | {"accumulate": 1})  # which could be refused here
    tokenizer = M.Tokenizer(metadata["words"])
    net = M.BLIP3o(config, len(tokenizer), metadata["side"], metadata["raw_channels"])
    net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return net.eval().requires_grad_(False), tokenizer, config, metadata


# ------------------------------------------------------------------------------------------- stages


# What one process takes of a step's batch in one go: each row's place in the batch, id in the set
# and generator of its choices; rows of the whole batch; an offset in 0..1 of its times, which also
# chooses what a step of understand learns; and the seed of its noise.
Rows = namedtuple("Rows", "places ids rngs count offset seed")


class Run:
    """A run: its settings, set, model and caches, and the batches and the loss of every stage.

    Each stage has a method STAGE_batch(rows) -> {name: tensor}, all that a step reads and draws,
    and STAGE_loss(**batch) -> losses (B,), parts to log, which computes and nothing else. But for
    the contrastive loss, a loss is a mean over rows, so that a batch can be divided. Batches are
    made in threads, where torch must not start its own: a CPU's step would take half as long again.
    """

    def __init__(self, config: Config):
        self.config, self.out, self.data = config, Path(config.out), D.PreparedSet(config.data)
        self.caches, self.cut = {}, Counter()
        D.require(len(self.data.train_ids), f"--data {config.data}: one picture, expected two")
        self.device, self.dtype, compile = resolve_machine(config)
        start, facts = load_weights(Path(config.init)) if config.init else ({}, {})
        entries = map(self.data.texts, self.data.train_ids[:5000])
        texts = (x for e in entries for x in (e["caption"], e["clean"] or "", *chain(*e["qa"])))
        self.tokenizer = M.Tokenizer(facts["words"]) if start else M.Tokenizer.fit(texts)
        words, side = self.tokenizer.words, self.data.images.shape[1]
        grid, latents, patch = math.isqrt(config.tokens), side // M.VAE.factor, config.decoder_patch
        unit = math.lcm(grid, M.VAE.factor * config.dit_patch)
        message = f"pictures of {side} px: expected whole {unit}s on a side"
        D.require(side % unit == 0 and grid <= latents, f"--tokens {config.tokens}, {message}")
        # no coarser than the grid of vectors, of which the decoder would read some only
        patches = [n for n in range(1, latents // grid + 1) if latents % n == 0]
        message = f"--decoder_patch {patch}: expected one of {patches} for {config.tokens} vectors"
        D.require(patch in patches, message)
        if raw := self.data.channels:
            stored, fewer = self.data.maps["features"].shape[1], config.treatment == "whiten"
            D.require(stored == config.tokens, f"--tokens {config.tokens}: the set has {stored}")
            fits = config.channels == raw or (fewer and config.channels < raw)
            message = f"expected the tower's {raw}, or fewer with --treatment whiten"
            D.require(fits, f"--channels {config.channels}: {message}")
        torch.manual_seed(config.seed)
        self.model = m = M.BLIP3o(config, len(self.tokenizer), side, raw).to(self.device)
        if start:
            own = {name: tensor.shape for name, tensor in m.state_dict().items()}
            differs = sorted(own.items() ^ {name: x.shape for name, x in start.items()}.items())
            D.require(not differs, f"--init {config.init}: other sizes, {differs[:2]}")
            m.load_state_dict(start)
        # a card waits for nothing while a few steps are read ahead; elsewhere cores are the step's
        self.ahead = min(4, os.cpu_count() or 1) if self.device.type == "cuda" else 0
        self.compile, self.reader = compile, ThreadPoolExecutor(max(1, self.ahead))
        for part in (m.backbone.trunk, m.head, m.decoder):
            part.checkpoint = config.checkpoint
        self.metadata = {"version": VERSION, "config": asdict(config), "words": words}
        self.metadata |= {"side": side, "raw_channels": raw, "data": self.data.meta["settings"]}
        self.sums = {"start": checksum(start, facts["words"])} if start else {}

    def trained(self, stage: str) -> list[nn.Module | nn.Parameter]:
        m = self.model
        flow = [m.head, m.backbone if self.config.joint else m.backbone.queries]
        parts = {"clip": [m.clip], "vae": [m.vae], "understand": [m.backbone]}
        parts |= {"generate": flow, "tune": flow, "decode": [m.decoder]}
        return parts[stage]

    def clip_batch(self, rows):
        captions = [self.data.texts(i)["caption"] for i in rows.ids]
        tokens = self.build([[("user", text), ("bot", None)] for text in captions])[0]
        _, number = np.unique(captions, return_inverse=True)
        same = torch.from_numpy(number[:, None] == number).float()
        batch = {"images": self.images(rows.ids), "tokens": tokens, "same": same}
        return batch | {"noise": self.noise(rows, (self.config.tokens, self.config.channels))}

    def clip_loss(self, images, **batch):
        parts = self.model.clip(M.to_pixels(images), batch["tokens"], batch["same"], batch["noise"])
        return parts["contrastive"] + extra_loss(self.config, parts), parts

    def vae_batch(self, rows):
        side = self.data.images.shape[1] // M.VAE.factor
        return {"images": self.images(rows.ids), "noise": self.noise(rows, (4, side, side))}

    def vae_loss(self, images, noise):
        parts = self.model.vae(M.to_pixels(images), noise)
        return parts["error"] + 1e-5 * parts["kl"], parts

    def understand_batch(self, rows):
        if rows.offset < self.config.repeat_share:
            return {"ids": self.prompts(rows, 0.5)[0]}
        texts = (self.data.texts(i) for i in rows.ids)
        tokens, learn = self.build([dialogue(text, rng) for text, rng in zip(texts, rows.rngs)])
        return {"ids": tokens, "learn": learn, "vectors": self.cached("features", rows.ids)}

    def understand_loss(self, **batch):
        backbone, looks = self.model.backbone, "learn" in batch
        losses = (backbone if looks else backbone.repeat)(**batch)
        return losses, {"repeats": torch.full_like(losses, not looks)}

    def prompts(self, rows, broad_share: float) -> tuple[Tensor, list[str | None]]:
        """Ids (b, T) of prompts with the queries behind; the clean prompts, None for captions."""
        texts = [self.data.texts(i) for i in rows.ids]
        broad = [rng.random() < broad_share for rng in rows.rngs]
        clean = [None if b else t["clean"] for t, b in zip(texts, broad)]
        chosen = [exact or t["caption"] for t, exact in zip(texts, clean)]
        chosen = [thinned(text, rng, self.config.thin) for text, rng in zip(chosen, rows.rngs)]
        return self.build([[("user", text), ("queries", None)] for text in chosen])[0], clean

    def generate_batch(self, rows, broad_share: float = 1.0):
        tokens, clean = self.prompts(rows, broad_share)
        # the draws of a clean prompt come from different pictures of it: they share one pass
        twins = [self.twins.get(exact, ()) if exact else () for exact in clean]
        pools = [pool if i in pool else [i] for i, pool in zip(rows.ids, twins)]
        draws = self.config.draws
        ids = np.concatenate([rng.choice(pool, draws) for rng, pool in zip(rows.rngs, pools)])
        x = self.cached("features" if self.config.target == "clip" else "latents", ids)
        flow = self.flow_batch(rows, x, draws, self.config.shift)
        if self.config.objective == "mse":
            flow |= {k: flow[k].new_zeros(()).expand_as(flow[k]) for k in ("noise", "t")}
        return {"tokens": tokens, **flow}

    def generate_loss(self, tokens, kept, **flow):
        if self.config.joint:
            states = self.model.backbone.states(tokens)[:, -self.config.queries :]
        else:
            states = self.model.backbone.query_states(tokens)
        losses = M.flow_loss(self.model.head, cond=states * kept, **flow)
        return losses, noise_levels(losses, flow["t"])

    def tune_batch(self, rows):
        return self.generate_batch(rows, self.config.broad_share)

    tune_loss = generate_loss

    def decode_batch(self, rows):
        batch = self.flow_batch(rows, self.cached("latents", rows.ids))
        strength = torch.tensor([rng.random() * self.config.decoder_noise for rng in rows.rngs])
        batch |= {"vectors": self.cached("features", rows.ids), "strength": strength.view(-1, 1, 1)}
        return batch | {"blur": self.noise(rows, batch["vectors"].shape[1:], stream=1)}

    def decode_loss(self, vectors, strength, blur, kept, **flow):
        cond = (vectors + strength * blur) * kept
        losses = M.flow_loss(self.model.decoder, cond=cond, **flow)
        return losses, noise_levels(losses, flow["t"])

    def flow_batch(self, rows, x: Tensor, draws: int = 1, shift: float = 1.0) -> dict[str, Tensor]:
        """What flow matching draws for data x (b K, N, C); kept is 0 where a condition is dropped,
        else 1: (b, 1, 1)."""
        kept = torch.tensor([rng.random() >= self.config.drop for rng in rows.rngs])
        noise = self.noise(rows, x.shape[1:], draws)
        t = M.spread_times(torch.from_numpy(rows.places), rows.count, draws, rows.offset)
        return {"x": x, "noise": noise, "t": M.shift_time(t, shift), "kept": kept.view(-1, 1, 1)}

    def noise(self, rows, shape: tuple, draws: int = 1, stream: int = 0) -> Tensor:
        """Of the whole batch's noise, drawn by the device, what is these rows': (b K, *shape)."""
        generator = torch.Generator(self.device).manual_seed(rows.seed + stream)
        size, first = (draws * rows.count, *shape), draws * rows.places[0]
        noise = torch.randn(size, generator=generator, device=self.device)
        part = noise[first : first + draws * len(rows.places)]
        return part if len(part) == len(noise) else part.clone()  # a view would keep it all

    @cached_property
    def twins(self) -> dict[str, np.ndarray]:
        """Training pictures by their clean prompt."""
        rows = defaultdict(list)
        for i in self.data.train_ids:
            if prompt := self.data.texts(i)["clean"]:
                rows[prompt].append(i)
        return {prompt: np.array(ids) for prompt, ids in rows.items()}

    def images(self, ids) -> Tensor:
        return torch.from_numpy(self.data.images[ids])  # (B, S, S, 3) uint8

    def pixels(self, ids) -> Tensor:
        return M.to_pixels(self.images(ids).to(self.device))

    def cached(self, name: str, ids) -> Tensor:
        """Rows of the cache "features" or "latents": (B, N, C)."""
        if name not in self.caches:  # opened once: a map of each step would grow the process
            self.caches[name] = D.open_array(self.out / f"{name}.npy")
        return torch.from_numpy(self.caches[name][ids].astype(np.float32))

    def build(self, rows) -> tuple[Tensor, Tensor]:
        c = self.config
        return M.build_sequences(self.tokenizer, rows, c.tokens, c.queries, c.text_length, self.cut)


def extra_loss(c: Config, parts: dict[str, Tensor]) -> Tensor:
    """What the tiny CLIP's loss has beside the contrastive one: (B,)."""
    return c.pixel_weight * parts["pixels"] + c.edge_weight * parts["edges"]


def dialogue(entry: dict, rng) -> list[tuple[str, str | None]]:
    """A dialogue about an image: up to four questions in random order, then the caption, behind
    which the questions could be answered without looking."""
    pairs = [entry["qa"][i] for i in rng.permutation(len(entry["qa"]))[:4]]
    turns = [part for q, a in pairs for part in (("user", q), ("bot", a))]
    return [("image", None), *turns, ("user", DESCRIBE), ("bot", entry["caption"])]


def thinned(text: str, rng, share: float) -> str:
    """The text, or in `share` of the cases about 7 of 10 of its words: a word that must count
    without those beside it counts beside new ones too. Where that names a pair of the world's
    held-out ones ("a red circle over a triangle", less two words), the text stays whole."""
    if rng.random() >= share:
        return text
    thin = " ".join(word for word in text.split() if rng.random() < 0.7)
    return text if D.HELD_OUT_NAMES.search(thin) else thin


def noise_levels(losses: Tensor, t: Tensor, bins: int = 5) -> dict[str, Tensor]:
    """Shares of equal bins of t in the mean loss and, "rows_", the rows; those of parts add up."""
    which = (t * bins).long().clamp(max=bins - 1)
    both = torch.stack([losses.detach(), torch.ones_like(losses)])  # bincount would make cards wait
    sums = torch.zeros(2, bins, device=t.device).index_add(1, which, both) / len(losses)
    names = [f"{kind}loss_t{i / bins:.1f}" for kind in ("", "rows_") for i in range(bins)]
    return dict(zip(names, sums.flatten()))


# --------------------------------------------------------------------------------------- the loop


def learning_rate(step: int, steps: int, peak: float, warmup: int, cooldown: float) -> float:
    """Linear warm-up, constant, linear cool-down to zero; never zero at a step that is taken."""
    left = (steps - step) / max(1, round(steps * cooldown))
    return peak * min(1, (step + 1) / max(1, warmup), left)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (K. Jordan, 2024), for matrices; step size as in torch.optim.Muon.

    torch's own always rounds to bf16, which many CPUs emulate at a hundredth of the speed, and
    takes one matrix after another; this one computes in `dtype`. A test holds the two together. As
    in torch's fused optimisers, nothing changes where found_inf is 1.
    """

    found_inf = torch.zeros(())

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            rate, shapes = group["lr"] * (1 - self.found_inf), defaultdict(list)
            for p in group["params"]:
                shapes[p.shape].append(p)
            for shape, matrices in shapes.items():  # those of one shape together: few kernels
                grad, state = torch.stack([p.grad for p in matrices]), self.state[matrices[0]]
                if not state or state["momentum"].shape != grad.shape:  # new, or of old
                    state["momentum"] = torch.zeros_like(grad)
                grad = torch.where(self.found_inf == 0, grad, state["momentum"])
                momentum = state["momentum"].lerp_(grad, 1 - group["momentum"])
                nesterov = grad.lerp_(momentum, group["momentum"])
                update = orthogonalise(nesterov, self.dtype) * (rate * 0.2 * math.sqrt(max(shape)))
                torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
                torch._foreach_sub_(matrices, update.unbind())


def orthogonalise(matrices: Tensor, dtype=torch.float32, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration that moves all singular values near 1: (k, m, n) -> (k, m, n)."""
    x = (matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)).to(dtype)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(steps):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).type_as(matrices)


def make_optimizers(c: Config, parameters: dict[str, nn.Parameter], dtype=torch.float32) -> list:
    muon = c.optimizer == "muon"
    matrix = {n for n, p in parameters.items() if muon and p.ndim == 2 and re.search(MUON, n)}
    decayed = [p for n, p in parameters.items() if n not in matrix and p.ndim >= 2]
    groups = [{"params": decayed, "weight_decay": c.weight_decay}]
    groups += [{"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=c.lr, betas=(0.9, 0.98), fused=True)]
    if matrix:
        matrices = [parameters[n] for n in sorted(matrix)]
        optimizers.append(Muon(matrices, c.lr, weight_decay=c.weight_decay, dtype=dtype))
    return optimizers


class Trainer:
    """Optimisers, averages and progress of one stage; what a checkpoint holds."""

    def __init__(self, run: Run, stage: str):
        self.run, self.config, self.stage = run, run.config, stage
        self.batch_of, self.loss_of = (getattr(run, f"{stage}_{end}") for end in ("batch", "loss"))
        if run.compile:
            self.compile()
        self.steps = getattr(run.config, f"{stage}_steps")
        self.batch = getattr(run.config, f"{'generate' if stage == 'tune' else stage}_batch")
        # the contrastive loss compares a whole batch: it is not divided, every process takes all
        self.parts = 1 if stage == "clip" else run.config.accumulate
        self.world, self.rank = (1, 0) if stage == "clip" else (WORLD, RANK)
        self.ahead = deque()  # batches in the making
        run.model.requires_grad_(False)
        for part in run.trained(stage):
            part.requires_grad_(True)
        self.trained = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
        self.averages = {n: p.detach().clone() for n, p in self.trained.items()}
        dtype = torch.bfloat16 if run.dtype is torch.bfloat16 else torch.float32
        self.optimizers = make_optimizers(run.config, self.trained, dtype)
        self.scaler = torch.amp.GradScaler(run.device, enabled=run.dtype is torch.float16)
        self.partial, self.older = (run.out / f"{stage}.partial{end}" for end in ("", ".old"))
        self.step, self.rows, self.seconds = 0, [], 0.0
        # steps that changed nothing because their gradients were not finite: all, the last ones
        self.skipped = self.in_row = torch.zeros((), device=run.device)
        self.patience = 5 + 16 * self.scaler.is_enabled()  # fp16 halves too large a scale first

    def compile(self) -> None:
        """One graph of the whole loss; on a CPU, where that takes minutes, one of each kind of
        block, of any length where lengths vary; the tiny CLIP and the VAE gain too little there."""
        torch.compiler.reset()
        if self.run.device.type != "cpu":
            self.loss_of = torch.compile(self.loss_of, fullgraph=True)
            return
        m = self.run.model
        for block in chain(m.backbone.modules(), m.head.modules(), m.decoder.modules()):
            if isinstance(block, (M.DiTBlock, M.TrunkBlock)):
                block.compile(fullgraph=True, dynamic=isinstance(block, M.TrunkBlock))

    def describe(self) -> str:
        names = sorted({".".join(n.split(".")[: 1 + n.startswith("back")]) for n in self.trained})
        groups = self.trained.values(), self.run.model.parameters()
        size, whole = (sum(p.numel() for p in group) / 1e6 for group in groups)
        return f"trains {', '.join(names)} ({size:.2f} M), {whole - size:.2f} M are frozen"

    def check(self) -> None:
        """ValueError, before a good checkpoint is overwritten, if numbers have gone bad."""
        count, norm = int(self.in_row), nn.utils.get_total_norm(self.trained.values())
        if count >= self.patience or not norm.isfinite():
            first, rate = self.step - max(count, 1), self.optimizers[0].param_groups[0]["lr"]
            what = f"stage {self.stage}: loss, gradient or weights not finite since step"
            rows = self.draw(first)[1].tolist()
            raise ValueError(f"{what} {first + 1} (rate {rate:.1e}: try less; rows {rows})")

    def save(self) -> None:
        """The newest checkpoint, whole or not at all; the one before is kept."""
        self.check()
        state = {name: getattr(self, name) for name in PROGRESS}
        state |= {"metadata": self.run.metadata, "scaler": self.scaler.state_dict()}
        state["trained"] = {n: p.detach() for n, p in self.trained.items()}
        state["optimizers"] = [o.state_dict() for o in self.optimizers]
        buffer = io.BytesIO()
        torch.save(state, buffer)
        raw = buffer.getvalue()
        if self.partial.exists():
            os.replace(self.partial, self.older)
        sealed = hashlib.sha256(raw).digest() + raw
        D.write_whole(self.partial, lambda file: file.write_bytes(sealed))

    def restore(self) -> None:
        """Continues from the newest checkpoint that is whole; a damaged one is named."""
        for path in filter(Path.exists, (self.partial, self.older)):
            raw = path.read_bytes()
            if hashlib.sha256(raw[32:]).digest() != raw[:32]:
                print(f"{path} is damaged and deleted: going back to the one before")
                path.unlink(missing_ok=True)  # another process may be faster
                continue
            state = torch.load(io.BytesIO(raw[32:]), self.run.device, weights_only=True)
            check_same(path, state["metadata"], self.run.metadata)
            for name in PROGRESS:
                setattr(self, name, state[name])
            self.run.model.load_state_dict(state["trained"], strict=False)
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            # without a state where the stage began in another precision
            return self.scaler.load_state_dict(state["scaler"] or self.scaler.state_dict())

    def draw(self, step: int, pool=None) -> tuple[np.random.Generator, np.ndarray]:
        """Samples of a step, and the state of its choices: of (seed, stage, step) alone."""
        rng = np.random.default_rng([self.config.seed, STAGES.index(self.stage), step])
        pool = self.run.data.train_ids if pool is None else pool
        return rng, np.sort(rng.choice(pool, self.batch, replace=len(pool) < self.batch))

    def batches(self, step: int, pool=None, whole=False, offset=None) -> list[dict[str, Tensor]]:
        """This process's parts of a step, or the `whole` in one; each row is a function of (seed,
        stage, step, its place): on one kind of device all divisions are the same to rounding."""
        rng, ids = self.draw(step, pool)
        rngs, seed, made = rng.spawn(self.batch), int(rng.integers(2**62)), []
        offset = rng.random() if offset is None else offset
        parts = np.split(np.arange(self.batch), 1 if whole else self.parts * self.world)
        for places in parts if whole else parts[self.rank :: self.world]:
            chosen = [rngs[i] for i in places]
            batch = self.batch_of(Rows(places, ids[places], chosen, self.batch, offset, seed))
            pin = self.run.device.type == "cuda"  # all but the noise, which is there
            made.append({k: v.pin_memory() if pin > v.is_cuda else v for k, v in batch.items()})
        return made

    def next_batches(self) -> list[dict[str, Tensor]]:
        """The batches of this step; those of the next ones are read and pinned meanwhile."""
        end = min(self.step + 1 + self.run.ahead, self.steps)
        for step in range(self.step + len(self.ahead), end):
            self.ahead.append(self.run.reader.submit(self.batches, step))
        return self.ahead.popleft().result()

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss and means of its parts, in the precision of the run."""
        device, dtype = self.run.device, self.run.dtype
        # not elsewhere: from memory that is not pinned MPS may copy what is no longer there
        batch = {k: v.to(device, non_blocking=device.type == "cuda") for k, v in batch.items()}
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            losses, parts = self.loss_of(**batch)
        return losses.mean(), {name: value.detach().mean() for name, value in parts.items()}

    def backward(self) -> dict[str, Tensor]:
        """Gradients and values of a step, over its parts and over the processes."""
        share, total = 1 / (self.parts * self.world), Counter()
        for batch in self.next_batches():
            loss, parts = self.loss(batch)
            self.scaler.scale(loss * share).backward()
            total.update({k: v * share for k, v in {"loss": loss.detach(), **parts}.items()})
        grads = [p.grad for p in self.trained.values() if p.grad is not None]
        if self.world > 1:
            add_over_processes([*grads, *total.values()])
        return dict(total)

    def update(self) -> dict[str, float]:
        """One step: forward, backward, clip, optimiser, average; none where numbers go bad."""
        c = self.config
        peak = c.tune_lr if self.stage == "tune" else c.lr
        rate = learning_rate(self.step, self.steps, peak, c.warmup, c.cooldown)
        values = self.backward()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), c.clip_norm)
        # the flag stays on the device, since reading it would wait; too many in a row skip the rest
        bad = (~(norm + values["loss"]).isfinite() | (self.in_row >= self.patience)).float()
        self.skipped, self.in_row = self.skipped + bad, (self.in_row + 1) * bad
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            # not scaler.step, which would judge each optimiser by its own gradients
            optimizer.found_inf = bad
            if self.run.device.type != "mps" or not bad:  # where AdamW does not heed it
                optimizer.step()
            optimizer.zero_grad()
        self.scaler.update()
        decay = min(c.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_([*self.averages.values()], [*self.trained.values()], 1 - decay)
        self.step += 1
        facts = {"rate": torch.tensor(rate), "norm": norm.detach(), "skipped": self.skipped}
        return {"loss": values["loss"], **facts, **values}

    def use_averages(self) -> dict[str, Tensor]:
        """Puts the averages into the model and returns what was there."""
        live = {n: p.detach().clone() for n, p in self.trained.items()}
        self.run.model.load_state_dict(self.averages, strict=False)
        return live


@contextmanager
def deferred_interrupt():
    """Yields a list that Ctrl-C fills, instead of breaking off in the middle of a step."""
    asked = []
    before = signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    try:
        yield asked
    except Exception as error:
        if asked:  # a compiler of the step was hit too
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def train_stage(run: Run, stage: str) -> None:
    """The one loop of all stages; leaves STAGE.safetensors, the averaged weights, when done."""
    c, trainer = run.config, Trainer(run, stage)
    trainer.restore()
    print(f"stage {stage}: {trainer.describe()}; step {trainer.step} of {trainer.steps}")
    begun, first = time.perf_counter() - trainer.seconds, trainer.step
    bar = tqdm(total=trainer.steps, initial=first, desc=stage, unit="step", disable=RANK > 0)
    with bar, deferred_interrupt() as asked:
        while trainer.step < trainer.steps:
            values = trainer.update()
            last = trainer.step == trainer.steps
            if trainer.step % 10 == 1 or last:  # reading values waits for the device
                trainer.check()
                row = {"step": trainer.step, **{k: float(v) for k, v in values.items()}}
                for name in [name for name in row if name.startswith("rows_")]:
                    row[name.removeprefix("rows_")] /= row.pop(name) or 1
                trainer.rows.append(row)
                told = f"loss {row['loss']:.3f} rate {row['rate']:.1e} norm {row['norm']:.2f}"
                told += f" {bar.format_dict['rate'] or 0:.2f} x {trainer.batch} images/s"
                bar.set_postfix_str(told + f" SKIPPED {row['skipped']:.0f}" * bool(row["skipped"]))
            bar.update()
            trainer.seconds = time.perf_counter() - begun
            if RANK == 0 and (trainer.step % c.strip_every == 0 or last):
                live = trainer.use_averages()
                save_strip(run, stage, trainer.step)
                run.model.load_state_dict(live, strict=False)
            if RANK == 0 and (trainer.step % c.save_every == 0 or asked):
                trainer.save()
                write_log(run.out / f"{stage}.csv", trainer.rows)
            if asked:
                raise KeyboardInterrupt
    trainer.use_averages()
    if RANK > 0:
        return
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        held = [(2**31 + i, run.data.val_ids, True, (i + 0.5) / 4) for i in range(4)]
        held = [float(trainer.loss(*trainer.batches(*which))[0]) for which in held]
    write_log(run.out / f"{stage}.csv", trainer.rows)
    cut = f", texts cut to {c.text_length} tokens: {dict(run.cut)}" if run.cut else ""
    print(f"stage {stage}: validation loss {np.mean(held):.4f}, {trainer.seconds:.0f} s{cut}")
    run.cut.clear()
    facts = {**run.metadata, "seconds": trainer.seconds, "validation_loss": float(np.mean(held))}
    save_weights(run.out / f"{stage}.safetensors", trainer.averages, facts)


def write_log(path: Path, rows: list[dict]) -> None:
    lines = [",".join(rows[0]), *(",".join(map(repr, row.values())) for row in rows)]
    D.write_whole(path, lambda temporary: temporary.write_text("\n".join(lines) + "\n"))


def check_same(path: Path, found: dict, wanted: dict) -> None:
    """ValueError if a checkpoint was made with other settings, weights or another set."""
    fix = dict(config="other --out?", data="other set?", built_on="delete it and the later stages")
    for part in filter(wanted.get, fix):
        for key, new in wanted[part].items():
            old = found.get(part, wanted[part]).get(key, getattr(Config, key, None))  # if older
            message = f"{path} was made with {key} {old!s:.80}, not {new!s:.80}: {fix[part]}"
            D.require(old == new or key in HARMLESS, message)
    D.require(found["version"] == VERSION, f"{path} has version {found['version']}, not {VERSION}")


@torch.no_grad()
def fill_cache(run: Run) -> None:
    """Stage cache: features and latents of the whole set, once; the statistics that treat them."""
    begun, m, count = time.perf_counter(), run.model, len(run.data)

    def look(ids):
        if m.clip is None:
            return torch.from_numpy(run.data.vectors(ids)).to(run.device)
        return m.clip.vectors(run.pixels(ids))

    sample = run.data.train_ids[:: max(1, len(run.data.train_ids) // 2000)]
    parts = np.array_split(sample, math.ceil(len(sample) / 128))
    batches = np.split(np.arange(count), range(128, count, 128))
    kinds = {
        "features": (look, m.treatment, run.config.treatment),
        "latents": (lambda ids: m.vae.encode(run.pixels(ids)), m.latent_treatment, "standardise"),
    }
    for name, (encode, treatment, mode) in kinds.items():
        raw = torch.cat([encode(ids).cpu() for ids in parts])
        message = f"stage cache: {name} are not finite; a lower --lr may help"
        D.require(raw.isfinite().all(), message)
        treatment.fit(raw, mode)
        shown = tqdm(batches, name, unit="batch")
        treated = (treatment(encode(ids)).half().cpu().numpy() for ids in shown)
        D.write_array(run.out / f"{name}.npy", treated)
    statistics = {k: v for k, v in m.state_dict().items() if "treatment." in k}
    facts = {**run.metadata, "seconds": time.perf_counter() - begun}
    save_weights(run.out / "cache.safetensors", statistics, facts)


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def save_strip(run: Run, stage: str, step: int) -> None:
    """A fixed-seed strip: eight validation pictures, and below what the stage makes of them."""
    m, ids = run.model, run.data.val_ids[:: max(1, len(run.data.val_ids) // 8)][:8]
    pixels, generator = run.pixels(ids), torch.Generator().manual_seed(0)
    if stage == "vae":
        shown = M.to_images(m.vae.decode(m.vae.encode(pixels)))
    elif stage == "decode":
        noise = torch.randn(len(ids), *m.decoder.shape, generator=generator).to(run.device)
        shown = m.paint(run.cached("features", ids).to(run.device), noise, steps=4)
    elif stage in ("generate", "tune") and (m.clip is not None or m.target == "vae"):
        kind = "clean" if stage == "tune" else "caption"
        texts = [run.data.texts(i)[kind] or run.data.texts(i)["caption"] for i in ids]
        tokens = run.build([[("user", text), ("queries", None)] for text in texts])
        noise = torch.randn(len(ids), *m.head.shape, generator=generator).to(run.device)
        made = m.imagine(tokens[0].to(run.device), noise, guidance=2.0, shift=run.config.shift)
        if m.target == "vae":
            shown = m.develop(made)
        else:  # the decoder comes last: the tiny CLIP's own pixel head gives a preview
            shown = M.to_images(m.clip.rebuild(m.treatment.inverse(made)))
    else:
        return
    both = torch.cat([M.to_images(pixels), shown]).permute(0, 3, 1, 2) / 255
    strip = run.out / f"{stage}-{step:06d}.png"
    D.write_whole(strip, lambda file: save_image(both, file, "PNG", nrow=len(ids)))


def train_run(config: Config) -> None:
    run = Run(config)
    path, seconds, sums = run.out / "model.safetensors", {}, run.sums
    for stage in STAGES if run.model.clip is not None else STAGES[1:]:
        part = run.out / f"{stage}.safetensors"
        if getattr(config, f"{stage}_steps", 1) == 0:
            continue
        before = ["start", *BUILT_ON.get(stage, ())]
        before += ["vae"] * (config.target == "vae" and stage in ("generate", "tune"))
        run.metadata["built_on"] = {name: sums.get(name) for name in before}
        missing = not part.exists()
        if WORLD > 1:
            dist.barrier()  # each has looked before one writes
        if missing and RANK == 0:
            path.unlink(missing_ok=True)
        if missing and stage != "cache":
            train_stage(run, stage)
        elif missing and RANK == 0:
            fill_cache(run)
        if WORLD > 1:
            dist.barrier()
        tensors, metadata = load_weights(part)
        check_same(part, metadata, run.metadata)
        run.model.load_state_dict(tensors, strict=False)
        seconds[stage], sums[stage] = round(metadata["seconds"], 1), zlib.crc32(save(tensors))
        for file in run.out.glob(f"{stage}.partial*") if RANK == 0 else ():
            file.unlink()  # here, for a kill before it
    if RANK == 0:
        run.metadata["built_on"] = sums
        if not path.exists():
            save_weights(path, run.model.state_dict(), {**run.metadata, "seconds": seconds})
        check_same(path, load_weights(path)[1], run.metadata)
    if WORLD > 1:
        dist.destroy_process_group()
    print(f"trained in {sum(seconds.values()):.0f} s: {path}")


def main(arguments: list[str] | None = None) -> None:
    """The command line; what a user can get wrong ends in one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config = parse_config(arguments)
    with D.plain_errors("train.py", f"; to continue: python train.py {shlex.join(arguments)}"):
        if RANK:  # one process speaks, writes and holds the folder for all of them
            with redirect_stdout(io.StringIO()):
                return train_run(config)
        with D.lock(config.out):
            train_run(config)


if __name__ == "__main__":
    main()
