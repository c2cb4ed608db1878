"""Trains every stage of BLIP3-o on a prepared set: one config, one loop, one loss per stage.

    python train.py                                        shapes, the demo preset
    python train.py --data data/photos --out out/photos --preset photos

Runs what is missing of clip -> vae -> cache -> understand -> generate -> tune -> decode; the same
command again continues. See data.py for the set, sample.py for pictures and scores.
"""

import argparse
import csv
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import model as M
from data import PreparedSet

STAGES = ("clip", "vae", "cache", "understand", "generate", "tune", "decode")
VERSION = 1


def flag(default, text: str, choices: tuple = ()):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every setting, once: the fields are the flags, their texts the help."""

    data: str = flag("data/shapes", "folder of the prepared set (data.py)")
    out: str = flag("out/demo", "folder of the run")
    seed: int = flag(0, "of weights, batches and noise")
    device: str = flag("auto", "where to run", ("auto", "cpu", "cuda", "mps"))
    precision: str = flag("auto", "of the matmuls", ("auto", "fp32", "bf16", "fp16"))
    compile: str = flag("auto", "torch.compile", ("auto", "on", "off"))
    optimizer: str = flag("adamw", "muon has adamw for all but matrices", ("adamw", "muon"))
    joint: bool = flag(False, "train the backbone during generation too")
    tokens: int = flag(64, "vectors of an image, and learned queries")
    channels: int = flag(16, "width of the treated vectors")
    treatment: str = flag("standardise", "of the vectors", ("standardise", "whiten"))
    head_dim: int = flag(64, "width of an attention head")
    clip_width: int = flag(128, "width of the tiny CLIP's towers")
    clip_depth: int = flag(4, "blocks of the tiny CLIP's image tower")
    clip_noise: float = flag(0.2, "noise on the vectors that the tiny CLIP's losses read")
    pixel_weight: float = flag(5.0, "weight of the pixel loss beside the contrastive one")
    vae_width: int = flag(48, "channels of the VAE")
    vae_depth: int = flag(2, "residual blocks of its encoder and of its decoder")
    width: int = flag(192, "width of the backbone")
    depth: int = flag(4, "blocks of the backbone")
    dit_width: int = flag(192, "width of the flow head")
    dit_depth: int = flag(5, "blocks of the flow head")
    dit_patch: int = flag(2, "neighbouring vectors per token of the flow head, a side")
    predicts: str = flag("x", "of the flow head: data or velocity", ("x", "v"))
    decoder_width: int = flag(192, "width of the decoder")
    decoder_depth: int = flag(3, "blocks of the decoder")
    decoder_patch: int = flag(2, "neighbouring latents per token of the decoder, a side")
    decoder_noise: float = flag(0.3, "largest noise on the vectors that the decoder learns from")
    clip_steps: int = flag(250, "steps of stage clip")
    vae_steps: int = flag(300, "steps of stage vae")
    understand_steps: int = flag(200, "steps of stage understand")
    generate_steps: int = flag(800, "steps of stage generate")
    tune_steps: int = flag(400, "steps of stage tune")
    decode_steps: int = flag(300, "steps of stage decode")
    clip_batch: int = flag(96, "images a step of stage clip")
    vae_batch: int = flag(32, "images a step of stage vae")
    understand_batch: int = flag(32, "sequences a step of stage understand")
    generate_batch: int = flag(32, "prompts a step of stages generate and tune")
    decode_batch: int = flag(64, "images a step of stage decode")
    draws: int = flag(8, "noise draws for each prompt, sharing one pass of the backbone")
    text_tokens: int = flag(96, "longest prompt in tokens")
    drop: float = flag(0.1, "share of conditions replaced by zeros, for guidance")
    shift: float = flag(1.0, "schedule shift of generation; above 1 more time near noise")
    broad_share: float = flag(0.25, "share of pretraining captions while tuning")
    lr: float = flag(2e-3, "peak learning rate")
    tune_lr: float = flag(1e-3, "peak learning rate of stage tune")
    warmup: int = flag(30, "steps of linear warm-up")
    cooldown: float = flag(0.3, "share of steps of linear cool-down at the end")
    weight_decay: float = flag(0.01, "decoupled, on matrices")
    clip_norm: float = flag(1.0, "largest gradient norm")
    ema: float = flag(0.99, "decay of the averaged weights, which are what is kept")
    save_every: int = flag(200, "steps between checkpoints")
    strip_every: int = flag(200, "steps between strips of sample pictures")

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"--{f.name} {value}: expected one of {', '.join(choices)}")
            if type(value) in (int, float) and (value < 0 or not math.isfinite(value)):
                raise ValueError(f"--{f.name} {value}: expected a number of at least 0")
        if math.isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(f"--tokens {self.tokens}: expected a square number, such as 64")
        for name in ("clip_width", "width", "dit_width", "decoder_width"):
            if getattr(self, name) % self.head_dim:
                raise ValueError(f"--{name}: expected a multiple of --head_dim {self.head_dim}")


PRESETS = {
    "demo": {},
    "photos": {"draws": 4},
    "micro": dict(
        clip_width=32, clip_depth=1, vae_width=16, vae_depth=1, width=32, depth=1, dit_width=32,
        dit_depth=1, decoder_width=32, decoder_depth=1, head_dim=32, clip_steps=6, vae_steps=6,
        understand_steps=6, generate_steps=6, tune_steps=4, decode_steps=6, clip_batch=8,
        vae_batch=4, understand_batch=4, generate_batch=4, decode_batch=4, draws=2, warmup=2,
        save_every=4, strip_every=4,
    ),
}  # fmt: skip


def parse_config(arguments: list[str]) -> Config:
    """Flags -> Config; an unknown flag or impossible value ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="demo", choices=PRESETS, help="defaults of the rest")
    for f in fields(Config):
        text = f"{f.metadata['help']} (default {f.default})"
        if f.type is bool:
            parser.add_argument(f"--{f.name}", action="store_true", default=None, help=text)
        else:
            choices = f.metadata["choices"] or None
            parser.add_argument(f"--{f.name}", type=f.type, choices=choices, help=text)
    given = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    try:
        return Config(**{**PRESETS[given.pop("preset")], **given})
    except ValueError as error:
        parser.error(str(error))


# ------------------------------------------------------------------------ machine and files of a run


def resolve_machine(c: Config) -> tuple[torch.device, torch.dtype | None, bool]:
    """Where and how to compute: device, autocast dtype (None is fp32), compile; printed."""
    device = c.device
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    # a card below 8.0 says yes to bf16 and emulates it; a CPU pays for it without AMX
    native = device == "cuda" and torch.cuda.get_device_capability()[0] >= 8
    native |= device == "cpu" and torch.cpu._is_amx_tile_supported()
    precision = c.precision
    if precision == "auto":
        precision = "bf16" if native else "fp16" if device == "cuda" else "fp32"
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    compiler = any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)
    compile = c.compile == "on" or (c.compile == "auto" and device != "mps" and compiler)
    print(
        f"device {device}, precision {precision}, compile {'on' if compile else 'off'}"
        f"{'' if compiler else ' (no C++ compiler)'}, {torch.get_num_threads()} threads"
    )
    torch.set_float32_matmul_precision("high")
    torch.set_flush_denormal(True)  # early steps are several times slower without it on a CPU
    return torch.device(device), dtype, compile


def write_whole(path: Path, write) -> None:
    """`write(temporary path)`, flush, rename: the file appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    metadata = {name: json.dumps(value) for name, value in metadata.items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of a checkpoint; ValueError if it is of another version."""
    with safe_open(path, "pt") as file:
        metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if metadata.get("version") != VERSION:
        found = metadata.get("version", "none")
        raise ValueError(f"{path} has version {found}, this code reads {VERSION}: train it again")
    return tensors, metadata


def load_model(path: Path) -> tuple[M.BLIP3o, M.Tokenizer, Config, dict]:
    """The model of a finished run (or of shipped weights), in float32 and frozen."""
    tensors, metadata = load_weights(path)
    config, tokenizer = Config(**metadata["config"]), M.Tokenizer(metadata["words"])
    net = M.BLIP3o(config, len(tokenizer), metadata["side"], metadata["raw_channels"])
    net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return net.eval().requires_grad_(False), tokenizer, config, metadata


# ------------------------------------------------------------------------------------------- stages


class Run:
    """A run: its settings, set, model and caches, and the loss of every stage."""

    def __init__(self, config: Config):
        self.config, self.out = config, Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.device, self.dtype, compile = resolve_machine(config)
        self.data = PreparedSet(config.data)
        texts = (self.data.texts(i) for i in self.data.train_ids[:5000])
        tokenizer = M.Tokenizer.fit(text for entry in texts for text in flat_texts(entry))
        self.tokenizer, self.side = tokenizer, self.data.images.shape[1]
        raw = None if self.data.features is None else self.data.features.shape[-1]
        torch.manual_seed(config.seed)
        self.model = m = M.BLIP3o(config, len(tokenizer), self.side, raw).to(self.device)
        if compile:
            for part in (m.backbone.trunk, m.head, m.decoder):
                part.compile(dynamic=False)
        self.metadata = dict(
            version=VERSION, config=asdict(config), words=tokenizer.words, side=self.side,
            raw_channels=raw, data=self.data.meta,
        )
        self.features = self.latents = None

    # each stage: what it trains, and a loss of (step's generator, sample ids) -> loss, parts

    def trained(self, stage: str) -> dict[str, nn.Module | nn.Parameter]:
        m = self.model
        flow = {"head": m.head, "backbone.queries": m.backbone.queries}
        if self.config.joint:
            flow = {"head": m.head, "backbone": m.backbone}
        return {
            "clip": {"clip": m.clip}, "vae": {"vae": m.vae}, "understand": {"backbone": m.backbone},
            "generate": flow, "tune": flow, "decode": {"decoder": m.decoder},
        }[stage]  # fmt: skip

    def clip_loss(self, rng, ids):
        captions = [self.data.texts(i)["caption"] for i in ids]
        rows = [[("user", text), ("bot", None)] for text in captions]
        tokens = self.build(rows)[0]
        _, number = np.unique(captions, return_inverse=True)
        same = torch.from_numpy(number[:, None] == number).to(self.device)
        parts = self.model.clip(M.to_pixels(self.images(ids)), tokens, same.float())
        return parts["contrastive"] + self.config.pixel_weight * parts["pixels"], parts

    def vae_loss(self, rng, ids):
        parts = self.model.vae(M.to_pixels(self.images(ids)))
        return parts["l1"] + parts["l2"] + 1e-3 * parts["kl"], parts

    def understand_loss(self, rng, ids):
        rows = [understanding_row(self.data.texts(i), rng) for i in ids]
        tokens, learn = self.build(rows)
        loss = self.model.backbone(tokens, learn, self.vectors(ids))
        return loss, {}

    def generate_loss(self, rng, ids, clean: bool = False):
        c, texts = self.config, [self.data.texts(i) for i in ids]
        use = rng.random(len(ids)) >= (c.broad_share if clean else 1)
        prompts = [t["clean"] if u and t["clean"] else t["caption"] for t, u in zip(texts, use)]
        tokens = self.build([[("user", text), ("queries", None)] for text in prompts])[0]
        if c.joint:
            states = self.model.backbone.states(tokens)[:, -c.tokens :]
        else:
            states = self.model.backbone.query_states(tokens)
        keep = torch.from_numpy(rng.random(len(ids)) >= c.drop).to(self.device)
        states = states * keep[:, None, None]
        losses, t = M.flow_loss(self.model.head, self.vectors(ids), states, c.draws, c.shift)
        return losses.mean(), noise_levels(losses, t)

    def tune_loss(self, rng, ids):
        return self.generate_loss(rng, ids, clean=True)

    def decode_loss(self, rng, ids):
        c, vectors = self.config, self.vectors(ids)
        strength = torch.rand(len(ids), 1, 1, device=self.device) * c.decoder_noise
        keep = torch.from_numpy(rng.random(len(ids)) >= c.drop).to(self.device)
        vectors = (vectors + strength * torch.randn_like(vectors)) * keep[:, None, None]
        latents = torch.from_numpy(self.latents[ids]).to(self.device).float()
        losses, t = M.flow_loss(self.model.decoder, latents, vectors)
        return losses.mean(), noise_levels(losses, t)

    # batches

    def images(self, ids) -> Tensor:
        return torch.from_numpy(self.data.images[ids]).to(self.device)

    def vectors(self, ids) -> Tensor:
        return torch.from_numpy(self.features[ids]).to(self.device).float()

    def build(self, rows) -> tuple[Tensor, Tensor]:
        ids, learn = M.build_sequences(self.tokenizer, rows, self.config.tokens)
        return ids.to(self.device), learn.to(self.device)


def flat_texts(entry: dict) -> list[str]:
    return [entry["caption"], entry["clean"] or "", *(t for pair in entry["qa"] for t in pair)]


def understanding_row(entry: dict, rng) -> list[tuple[str, str | None]]:
    """A training dialogue: an image, its caption and questions in random order.

    A third of the rows has no image but the caption in its place: the questions then teach to read.
    """
    turns = [[("user", q), ("bot", a)] for q, a in entry["qa"]]
    describe = [("user", "describe"), ("bot", entry["caption"])]
    order = rng.permutation(len(turns))
    turns = [turns[i] for i in order[:4]]
    if rng.random() < 1 / 3:
        return [("user", entry["caption"]), *(part for turn in turns for part in turn)]
    # the caption comes last: questions after it could be answered without looking
    return [("image", None), *(part for turn in [*turns, describe] for part in turn)]


def noise_levels(losses: Tensor, t: Tensor, bins: int = 5) -> dict[str, Tensor]:
    """Mean loss in equal bins of t, the curve that falls where the total looks flat."""
    which = (t * bins).long().clamp(max=bins - 1)
    sums = torch.zeros(bins, device=t.device).index_add(0, which, losses.detach())
    counts = torch.bincount(which, minlength=bins).clamp_min(1)
    return {f"t{i / bins:.1f}": value for i, value in enumerate(sums / counts)}


# --------------------------------------------------------------------------------------- the loop


def learning_rate(step: int, steps: int, peak: float, warmup: int, cooldown: float) -> float:
    """Linear warm-up, constant, linear cool-down to zero; never zero at a step that is taken."""
    left = (steps - step) / max(1, round(steps * cooldown))
    return peak * min(1, (step + 1) / max(1, warmup), left)


def make_optimizers(config: Config, parameters: dict[str, nn.Parameter]) -> list:
    blocks = {n for n, p in parameters.items() if p.ndim == 2 and "blocks." in n}
    muon = blocks if config.optimizer == "muon" else set()
    decay = [p for n, p in parameters.items() if p.ndim >= 2 and n not in muon]
    plain = [p for n, p in parameters.items() if p.ndim < 2]
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)]
    if muon:
        matrices = [parameters[n] for n in sorted(muon)]
        optimizers.append(torch.optim.Muon(
            matrices, lr=config.lr, weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ))  # fmt: skip
    return optimizers


def train_stage(run: Run, stage: str) -> None:
    """The one loop of all stages; leaves STAGE.safetensors, the averaged weights, when done."""
    c, out = run.config, run.out
    steps, batch = (getattr(c, f"{'generate' if k == 'batch' and stage == 'tune' else stage}_{k}")
                    for k in ("steps", "batch"))  # fmt: skip
    parts = run.trained(stage)
    run.model.requires_grad_(False)
    for part in parts.values():
        part.requires_grad_(True)
    trained = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
    size = sum(p.numel() for p in trained.values()) / 1e6
    frozen = sum(p.numel() for p in run.model.parameters() if not p.requires_grad) / 1e6
    print(f"stage {stage}: trains {', '.join(parts)} ({size:.2f} M); frozen {frozen:.2f} M")
    optimizers = make_optimizers(c, trained)
    averages = {n: p.detach().clone() for n, p in trained.items()}
    scaler = torch.amp.GradScaler(enabled=run.dtype is torch.float16)
    partial, start, rows, seconds = out / f"{stage}.partial", 0, [], 0.0
    if partial.exists():
        state = torch.load(partial, map_location=run.device, weights_only=True)
        start, rows, seconds = state["step"], state["rows"], state["seconds"]
        run.model.load_state_dict(state["model"], strict=False)
        averages = state["averages"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        scaler.load_state_dict(state["scaler"])
        print(f"continues at step {start} of {steps}")
    loss_of = getattr(run, f"{stage}_loss")
    peak = c.tune_lr if stage == "tune" else c.lr
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=stage, unit="step")
    begun = time.perf_counter()
    for step in bar:
        rate = learning_rate(step, steps, peak, c.warmup, c.cooldown)
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = rate
        loss, logged = step_loss(run, loss_of, stage, step, run.data.train_ids, batch)
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trained.values(), c.clip_norm)
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        decay = min(c.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(averages.values()), list(trained.values()), 1 - decay)
        if step % 10 == 0 or step == steps - 1:
            values = {"loss": loss, "norm": norm, **logged}
            row = {"step": step, "rate": rate, **{k: float(v.detach()) for k, v in values.items()}}
            rows.append(row)
            pace = (step + 1 - start) * batch / (time.perf_counter() - begun)
            bar.set_postfix_str(f"loss {row['loss']:.4f} rate {rate:.1e} norm {row['norm']:.2f}"
                                f" {pace:.0f} images/s")  # fmt: skip
        if (step + 1) % c.save_every == 0 and step + 1 < steps:
            state = dict(
                step=step + 1, rows=rows, seconds=seconds + time.perf_counter() - begun,
                model={n: p.detach() for n, p in trained.items()}, averages=averages,
                optimizers=[o.state_dict() for o in optimizers], scaler=scaler.state_dict(),
            )  # fmt: skip
            write_whole(partial, lambda temporary: torch.save(state, temporary))
            write_log(out / f"{stage}.csv", rows)
        if (step + 1) % c.strip_every == 0:
            with averaged(trained, averages):
                save_strip(run, stage, step + 1)
    run.model.load_state_dict(averages, strict=False)
    write_log(out / f"{stage}.csv", rows)
    with torch.no_grad():
        held = [
            float(step_loss(run, loss_of, stage, -1 - i, run.data.val_ids, batch)[0])
            for i in range(4)
        ]
    seconds += time.perf_counter() - begun
    print(f"stage {stage}: validation loss {np.mean(held):.4f}, {seconds:.0f} s")
    finish(run, stage, averages, seconds)
    partial.unlink(missing_ok=True)


def step_loss(run: Run, loss_of, stage: str, step: int, pool, batch: int):
    """The loss of a step; its samples and noise depend on (seed, stage, step) alone."""
    rng = np.random.default_rng([run.config.seed, STAGES.index(stage), step + 100])
    torch.manual_seed(int(rng.integers(2**62)))
    ids = np.sort(rng.choice(pool, batch, replace=len(pool) < batch))
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
        return loss_of(rng, ids)


class averaged:
    """Within it the parameters hold their averages."""

    def __init__(self, trained: dict[str, nn.Parameter], averages: dict[str, Tensor]):
        self.pairs = [(p, averages[n]) for n, p in trained.items()]

    def swap(self, *_):
        for p, average in self.pairs:
            kept = p.detach().clone()
            p.data.copy_(average)
            average.copy_(kept)

    __enter__ = __exit__ = swap


def write_log(path: Path, rows: list[dict]) -> None:
    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path, write)


def finish(run: Run, stage: str, tensors: dict[str, Tensor], seconds: float) -> None:
    save_weights(run.out / f"{stage}.safetensors", tensors, {**run.metadata, "seconds": seconds})


@torch.no_grad()
def fill_cache(run: Run) -> None:
    """Stage cache: features and latents of the whole set, once; the statistics that treat them."""
    begun, m, n, batch = time.perf_counter(), run.model.eval(), len(run.data), 256
    sample = run.data.train_ids[:: max(1, len(run.data.train_ids) // 2000)]
    raw = run.data.features
    encode = lambda ids: m.clip.vectors(M.to_pixels(run.images(ids)))  # noqa: E731
    if raw is not None:
        encode = lambda ids: torch.from_numpy(raw[ids]).to(run.device).float()  # noqa: E731
    latent = lambda ids: m.vae.encode(M.to_pixels(run.images(ids)))  # noqa: E731
    chunks = np.array_split(sample, math.ceil(len(sample) / batch))
    m.treatment.fit(torch.cat([encode(ids).cpu() for ids in chunks]), run.config.treatment)
    m.latent_treatment.fit(torch.cat([latent(ids).cpu() for ids in chunks]))
    shapes = {"features": m.head.shape, "latents": m.decoder.shape}
    arrays = {
        name: np.lib.format.open_memmap(run.out / f"{name}.npy", "w+", np.float16, (n, *shape))
        for name, shape in shapes.items()
    }
    for start in tqdm(range(0, n, batch), desc="cache", unit="batch"):
        ids = np.arange(start, min(start + batch, n))
        arrays["features"][ids] = m.treatment(encode(ids)).half().cpu().numpy()
        arrays["latents"][ids] = m.latent_treatment(latent(ids)).half().cpu().numpy()
    for array in arrays.values():
        array.flush()
    tensors = {k: v for k, v in m.state_dict().items() if "treatment." in k}
    finish(run, "cache", tensors, time.perf_counter() - begun)


@torch.no_grad()
def save_strip(run: Run, stage: str, step: int) -> None:
    """A fixed-seed strip of pictures: what the stage makes of eight validation samples."""
    m, ids = run.model, run.data.val_ids[:8]
    generator = torch.Generator().manual_seed(0)
    if stage == "vae":
        pixels = M.to_pixels(run.images(ids))
        shown = M.to_images(m.vae.decode(m.vae.encode(pixels)))
    elif stage == "decode":
        noise = torch.randn(len(ids), *m.decoder.shape, generator=generator).to(run.device)
        shown = m.paint(run.vectors(ids), noise, steps=5)
    elif stage in ("generate", "tune") and m.clip is not None:
        key = "clean" if stage == "tune" else "caption"
        prompts = [run.data.texts(i)[key] or run.data.texts(i)["caption"] for i in ids]
        tokens = run.build([[("user", text), ("queries", None)] for text in prompts])[0]
        noise = torch.randn(len(ids), *m.head.shape, generator=generator).to(run.device)
        # the decoder comes later: the tiny CLIP's own pixel head gives a preview
        shown = m.clip.rebuild(m.treatment.inverse(m.imagine(tokens, noise, guidance=2.0)))
        shown = M.to_images(shown)
    else:
        return
    shown = torch.cat([run.images(ids), shown]).permute(0, 3, 1, 2) / 255
    save_image(make_grid(shown, nrow=len(ids)), run.out / f"{stage}-{step:06d}.png")


def main() -> None:
    config = parse_config(sys.argv[1:])
    try:
        run = Run(config)
    except (ValueError, FileNotFoundError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    seconds = {}
    for stage in STAGES:
        path = run.out / f"{stage}.safetensors"
        if stage == "clip" and run.model.clip is None:
            continue
        if not path.exists():
            fill_cache(run) if stage == "cache" else train_stage(run, stage)
        tensors, metadata = load_weights(path)
        run.model.load_state_dict(tensors, strict=False)
        seconds[stage] = round(metadata["seconds"], 1)
        if stage == "cache":
            run.features, run.latents = (
                np.load(run.out / f"{name}.npy", mmap_mode="r") for name in ("features", "latents")
            )
    metadata = {**run.metadata, "seconds": seconds, "machine": platform.processor()}
    save_weights(run.out / "model.safetensors", run.model.state_dict(), metadata)
    total = sum(seconds.values())
    print(f"done in {total:.0f} s: {run.out / 'model.safetensors'}")


if __name__ == "__main__":
    main()
