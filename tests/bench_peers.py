"""What our parts take, and what diffusers' and transformers' parts of equal shape take.

    python -m pip install -r requirements.txt -r tests/requirements-bench.txt
    python tests/bench_peers.py                                     all rows, on the CPU
    python tests/bench_peers.py --rows a c --sizes demo --rounds 5
    python tests/bench_peers.py --device cuda --precision bf16      more on memory and matmuls

Both sides run in this process, in turns and in changing order after a warm-up, with the same
device, precision, threads and allocator, eager, on random weights. A cell holds the median of the
rounds; the ratio is peer / ours, above 1 where ours is faster, with the quartiles of the rounds'
own ratios. M stands for million parameters, ours / peer.

a  one training step of a DiT: forward, backward, fused AdamW; width, depth, heads, tokens, samples
   and loss are equal. Lumina-Next has our head's sublayers, with the same SwiGLU. SiT's block is
   DiT's, so that diffusers' DiT stands for both; it has no cross-attention, so that it meets our
   decoder's kind of block, and once our head's, which has a sublayer more.
b  the causal transformer: one training step on text, and greedy generation with a cache. Qwen2 has
   equal width, depth, heads, SwiGLU and vocabulary; its q, k, v have biases where ours are normed.
c  prompt to picture: `Pipeline` says what is equal there and what is not.
d  one step of stage generate with cached features, and one that first encodes its pictures, each
   once, with a timm tower of 86 M at 256 px. The original's tower is larger and reads 448 px.
e  one step of stage tune as `train.py` takes it, and bare forward, backward and optimisers on the
   same batch; "data" is drawing, reading and tokenising the batch, "else" what is left.
"""

import argparse
import itertools
import math
import sys
import tempfile
import time
from contextlib import redirect_stdout
from importlib.metadata import distributions
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from einops import rearrange
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))

import data  # noqa: E402  (found through the line above)
import model as M  # noqa: E402
import train  # noqa: E402

SIZES = {  # flags of train.Config
    "micro": train.PRESETS["micro"],
    "demo": {},
    "cc3m": {**train.PRESETS["cc3m"], "accumulate": 1},
    "middle": {
        **{f"{part}width": 512 for part in ("", "dit_", "decoder_")},
        **{f"{part}depth": 8 for part in ("", "dit_", "decoder_")},
        **{"dit_patch": 1, "generate_batch": 16, "draws": 1, "vae_width": 144, "head_dim": 64},
    },
}
PICTURES = {"micro": (2,), "demo": (1, 16), "middle": (4,), "cc3m": (4,)}  # at once, in row c
VOCABULARY, SIDE = 1031, 64  # of the demo: bytes, specials and 768 words; px
NEW_TOKENS = 64
HEAD, DECODER = dict(steps=30, guidance=2.0), dict(steps=4, guidance=1.5)  # of row c

REASONS = {  # for the ratios, from profiles on a CPU, where matmuls take half to two thirds
    "Lumina-Next": "matmuls nearly equal; a prompt's keys and values are made once for its draws,"
    " there for each; our cross-attention's own output and modulation make more weights",
    "DiT/SiT": "matmuls equal; ours norms q and k, its blocks embed the time each for itself",
    "DiT/SiT, ours with cross-attention": "ours has a sublayer more",
    "b step": "matmuls equal; ours norms q and k and masks padding, Qwen2 takes a causal kernel",
    "b generation": "fewer calls a token: k and v at once, gate and up at once, lists as cache",
    "c": "a VAE at a quarter of the resolution, a decoder without cross-attention, fewer calls",
    "d": "the tower's pass over the pictures is saved",
}


class Bench:
    """Where and how everything is measured."""

    def __init__(self, device="cpu", precision="fp32", rounds=10, tower=None):
        self.device, self.precision, self.rounds = device, precision, rounds
        self.tower = tower or "vit_base_patch16_clip_224"

    def config(self, size: str, **changes) -> train.Config:
        machine = {"device": self.device, "precision": self.precision, "compile": "off"}
        return train.Config(**{**SIZES[size], **machine, **changes})

    def autocast(self):
        half = self.precision == "bf16"
        return torch.autocast(self.device, torch.bfloat16, enabled=half)

    def seconds(self, function) -> float:
        self.wait()
        begun = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - begun

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def race(self, *sides) -> np.ndarray:
        """Seconds (rounds, sides), taking turns, every other round in reverse."""
        for side in sides:
            side()
        times = np.empty((self.rounds, len(sides)))
        for i in range(self.rounds):
            for k in list(range(len(sides)))[:: 1 - 2 * (i % 2)]:
                times[i, k] = self.seconds(sides[k])
        return times

    def step(self, net: nn.Module, loss):
        """A training step of all of a network's parameters."""
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

        def run():
            with self.autocast():
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run


def table_row(name: str, times: np.ndarray, remark: str) -> str:
    """A line of the table from the seconds (rounds, 2) of ours and the peer."""
    ours, peer = np.median(times, axis=0)
    low, high = np.quantile(times[:, 1] / times[:, 0], (0.25, 0.75))
    numbers = f"{1000 * ours:.1f} | {1000 * peer:.1f} | {peer / ours:.2f} ({low:.2f}-{high:.2f})"
    return f"| {name} | {numbers} | {remark} |"


def millions(*nets: nn.Module) -> str:
    sizes = (sum(p.numel() for p in net.parameters()) / 1e6 for net in nets)
    return " / ".join(f"{size:.2f}" for size in sizes) + " M"


# ------------------------------------------------------------------------------ the peers' parts


class Lumina(nn.Module):
    """diffusers' Lumina-Next DiT behind the signature of our DiT; it predicts the velocity."""

    predicts, recalls = "v", False

    def __init__(self, shape, cond_width, width, depth, heads, patch):
        from diffusers import LuminaNextDiT2DModel
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

        super().__init__()
        side = self.side = math.isqrt(shape[0])
        # multiple_of: of the SwiGLU's width, as ours
        size = dict(hidden_size=width, num_layers=depth, multiple_of=32)
        size |= dict(num_attention_heads=heads, num_kv_heads=heads)
        grid = dict(sample_size=side, patch_size=patch, in_channels=shape[1], learn_sigma=False)
        self.net = LuminaNextDiT2DModel(**size, **grid, cross_attention_dim=cond_width)
        nn.init.zeros_(self.net.pad_token)  # unused, and left as it was found in memory
        places = get_2d_rotary_pos_embed_lumina(width // heads, side // patch, side // patch)
        self.register_buffer("places", places, persistent=False)

    def forward(self, x, t, cond, guess=None):
        """x (B, N, C), times (B,), condition (P, M, L) with B = P K -> (B, N, C)."""
        cond = cond.repeat_interleave(len(x) // len(cond), 0)  # it knows of no draws
        mask = torch.ones(cond.shape[:2], device=x.device)
        x = rearrange(x, "b (r c) ch -> b ch r c", r=self.side)
        out = self.net(x, t, cond, mask, self.places, {}, return_dict=False)[0]
        return rearrange(out, "b ch r c -> b (r c) ch")


class LabelDiT(nn.Module):
    """diffusers' DiT behind the signature of our DiT; its condition is a label, always 0."""

    predicts, recalls = "v", False

    def __init__(self, shape, width, depth, heads, patch):
        from diffusers import DiTTransformer2DModel

        super().__init__()
        self.side = math.isqrt(shape[0])
        size = dict(num_attention_heads=heads, attention_head_dim=width // heads, num_layers=depth)
        grid = dict(in_channels=shape[1], sample_size=self.side, patch_size=patch)
        # each of its blocks has a table of labels of its own: one label keeps that small
        self.net = DiTTransformer2DModel(**size, **grid, num_embeds_ada_norm=1)

    def forward(self, x, t, cond, guess=None):
        label = torch.zeros(len(x), dtype=torch.long, device=x.device)
        x = rearrange(x, "b (r c) ch -> b ch r c", r=self.side)
        out = self.net(x, t * 1000, label, return_dict=False)[0]
        return rearrange(out, "b ch r c -> b (r c) ch")


def qwen2(c: train.Config) -> nn.Module:
    """transformers' Qwen2 in the shape of our backbone."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    heads, hidden = c.width // c.head_dim, M.SwiGLU(c.width).down.in_features
    shape = dict(vocab_size=VOCABULARY, hidden_size=c.width, num_hidden_layers=c.depth)
    shape |= dict(num_attention_heads=heads, num_key_value_heads=heads, intermediate_size=hidden)
    ends = dict(bos_token_id=None, eos_token_id=None, pad_token_id=M.PAD)
    return Qwen2ForCausalLM(Qwen2Config(**shape, **ends, tie_word_embeddings=False))


class Pipeline(nn.Module):
    """Prompt to picture as one would build it from transformers and diffusers.

    Equal to ours: sequences and tokenizer, queries, widths, depths, heads, tokens, steps, guidance
    (both conditions in one batch), schedule shift, pictures at once, fp32 or autocast. Qwen2 reads
    prompt and queries; Lumina-Next makes the vectors from the queries' states, and a second one
    the latents, with FlowMatchEulerDiscreteScheduler.
    Not equal: our decoder's blocks have no cross-attention. Lumina's must have one: it gets the
    mean vector, the least there is, while the grid of vectors comes as further input channels, as
    in inpainting. AutoencoderKL's decoder (f = 4, no attention) works up to full resolution; its
    widths are chosen for our number of parameters. The prompts' sequences are built outside.
    """

    def __init__(self, c: train.Config):
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

        super().__init__()
        self.lm = qwen2(c).model
        self.queries = nn.Parameter(torch.randn(c.queries, c.width) * 0.02)
        size = c.dit_width, c.dit_depth, c.dit_width // c.head_dim, c.dit_patch
        self.head = Lumina((c.tokens, c.channels), c.width, *size)
        size = c.decoder_width, c.decoder_depth, c.decoder_width // c.head_dim, c.decoder_patch
        latents = (SIDE // M.VAE.factor) ** 2
        self.decoder = Lumina((latents, 4 + c.channels), c.channels, *size)
        unit = c.vae_width // 8
        levels = dict(block_out_channels=(2 * unit, 3 * unit, 5 * unit), norm_num_groups=unit)
        kinds = dict(up_block_types=["UpDecoderBlock2D"] * 3, mid_block_add_attention=False)
        kinds |= dict(down_block_types=["DownEncoderBlock2D"] * 3)
        self.vae = AutoencoderKL(**levels, **kinds, layers_per_block=1, latent_channels=4)
        self.vae.encoder = self.vae.quant_conv = None  # only pictures are made here
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=c.shift)

    def flow(self, dit, x, cond, steps, guidance, grid=None):
        """Noise (B, N, C), condition (B, M, L), grid (B, N, G) for more channels -> (B, N, C)."""
        self.scheduler.set_timesteps(steps, device=x.device)
        cond = torch.cat([cond, 0 * cond])
        grid = None if grid is None else torch.cat([grid, 0 * grid])
        for t in self.scheduler.timesteps:
            both = torch.cat([x, x])
            both = both if grid is None else torch.cat([both, grid], dim=-1)
            time = 1 - t.expand(len(both)) / self.scheduler.config.num_train_timesteps
            c, u = dit(both, time, cond)[..., : x.shape[-1]].chunk(2)  # two of (B, N, C)
            x = self.scheduler.step(-(u + guidance * (c - u)), t, x, return_dict=False)[0]
        return x

    @torch.no_grad()
    def draw(self, ids, noise, latent_noise):
        """Prompts that end in the queries (B, T) and both noises -> pictures (B, S, S, 3)."""
        count = len(self.queries)
        prompt = self.lm.embed_tokens(ids[:, :-count])
        x = torch.cat([prompt, self.queries.expand(len(ids), -1, -1)], dim=1)
        mask = ids != M.PAD
        states = self.lm(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
        vectors = self.flow(self.head, noise, states[:, -count:], **HEAD)
        grid = M.resize_grid(vectors, latent_noise.shape[1])
        pooled = vectors.mean(1, keepdim=True)
        latents = self.flow(self.decoder, latent_noise, pooled, grid=grid, **DECODER)
        side = math.isqrt(latents.shape[1])
        latents = rearrange(latents, "b (r c) ch -> b ch r c", r=side)
        return M.to_images(self.vae.decode(latents, return_dict=False)[0])


# --------------------------------------------------------------------------------------- the rows


def row_a(bench: Bench, size: str):
    c, on = bench.config(size), bench.device
    shape, heads = (c.tokens, c.channels), c.dit_width // c.head_dim
    dit = c.dit_width, c.dit_depth, heads, c.dit_patch
    x = torch.randn(c.generate_batch * c.draws, *shape, device=on)
    states = torch.randn(c.generate_batch, c.queries, c.width, device=on)
    vectors = torch.randn(c.generate_batch, *shape, device=on)
    noise, t = torch.randn_like(x), torch.rand(len(x), device=on)
    ours = M.DiT(shape, c.width, *dit).to(on)
    plain = M.DiT(shape, c.channels, *dit, cross=False).to(on)
    lumina, label = Lumina(shape, c.width, *dit).to(on), LabelDiT(shape, *dit).to(on)
    rows = (
        ("Lumina-Next", ours, states, lumina),
        ("DiT/SiT", plain, vectors, label),
        ("DiT/SiT, ours with cross-attention", ours, states, label),
    )
    for name, net, cond, peer in rows:
        sides = [
            bench.step(one, lambda one=one, cond=cond: M.flow_loss(one, x, noise, t, cond).mean())
            for one in (net, peer)
        ]
        batch = f"{c.generate_batch} x {c.draws} samples"
        remark = f"{REASONS[name]}; {millions(net, peer)}, {batch}"
        yield f"a {name}, {size}", bench.race(*sides), remark


def row_b(bench: Bench, size: str):
    c, on = bench.config(size), bench.device
    shape = (c.tokens, c.channels), c.queries, c.width, c.depth, c.width // c.head_dim
    ours, peer = M.Unified(VOCABULARY, *shape).to(on), qwen2(c).to(on)
    ids = torch.randint(0, 256, (c.understand_batch, 160), device=on)
    learn = torch.ones_like(ids, dtype=torch.bool)
    sides = [
        bench.step(ours, lambda: ours(ids, learn).mean()),
        bench.step(peer, lambda: peer(input_ids=ids, labels=ids, use_cache=False).loss),
    ]
    batch = f"{len(ids)} rows of {ids.shape[1]} tokens"
    remark = f"{REASONS['b step']}; {millions(ours, peer)}, {batch}"
    yield f"b Qwen2, step, {size}", bench.race(*sides), remark
    nn.init.zeros_(ours.head.weight)  # never writes <eos>: both write all tokens
    prompt = ids[:, :32]
    mask, limits = torch.ones_like(prompt), dict(max_new_tokens=NEW_TOKENS, do_sample=False)

    def write():
        with bench.autocast():
            assert len(ours.write(prompt, limit=NEW_TOKENS)[0]) == NEW_TOKENS

    def generate():
        with bench.autocast():
            peer.generate(prompt, attention_mask=mask, **limits)

    batch = f"{len(prompt)} prompts of {prompt.shape[1]} tokens, {NEW_TOKENS} new ones"
    remark = f"{REASONS['b generation']}; {batch}"
    yield f"b Qwen2, cached generation, {size}", bench.race(write, generate), remark


def row_c(bench: Bench, size: str):
    c = bench.config(size)
    ours = M.BLIP3o(c, VOCABULARY, SIDE).to(bench.device).eval().requires_grad_(False)
    peer = Pipeline(c).to(bench.device).eval().requires_grad_(False)
    pairs = [(ours.backbone.trunk, peer.lm.layers), (ours.head, peer.head)]
    pairs += [(ours.decoder, peer.decoder), (ours.vae.decoder, peer.vae)]
    text = "a red circle left of a blue square"
    words = M.Tokenizer.fit([text] * 2)
    for count in PICTURES[size]:
        rows = [[("user", text), ("queries", None)]] * count
        ids = M.build_sequences(words, rows, c.tokens, c.queries)[0].to(bench.device)
        noises = [
            torch.randn(count, *net.shape, device=bench.device) for net in (ours.head, ours.decoder)
        ]

        def draw(ids=ids, noises=noises):
            with bench.autocast():
                vectors = ours.imagine(ids, noises[0], shift=c.shift, **HEAD)
                return ours.paint(vectors, noises[1], shift=c.shift, **DECODER)

        def peers(ids=ids, noises=noises):
            with bench.autocast():
                return peer.draw(ids, *noises)

        assert draw().shape == peers().shape
        times = bench.race(draw, peers)
        seconds = " / ".join(f"{value:.3f}" for value in np.median(times, axis=0) / count)
        sizes = ", ".join(millions(*pair) for pair in pairs)
        remark = f"{REASONS['c']}; {seconds} s a picture; trunk, head, decoder, VAE {sizes}"
        yield f"c {count} pictures, {size}", times, remark


def open_run(bench: Bench, size: str, folder: str, scenes: int = 1000, **changes) -> train.Run:
    """A run of shapes with random weights and random features in its cache."""
    places = {"data": f"{folder}/data", "out": f"{folder}/run"}
    data.prepare_shapes(places["data"], count=scenes)
    run = train.Run(bench.config(size, **places, **changes))
    shape, rng = run.model.head.shape, np.random.default_rng(0)
    run.out.mkdir(exist_ok=True)
    rows = [rng.standard_normal((scenes, *shape), np.float32).astype(np.float16)]
    data.write_array(run.out / "features.npy", rows)
    return run


def row_d(bench: Bench, size: str):
    tower, facts = data.open_tower(bench.tower, 64, "untrained")
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(bench, size, folder)
        trainer, cached = train.Trainer(run, "generate"), run.cached
        width = tower.model.num_features
        treatment = M.Treatment(width, run.config.channels).to(run.device)
        tower.to(run.device)

        @torch.no_grad()
        def encode(name, ids):
            """The features of pictures as the original makes them in each step, each once."""
            ids, where = np.unique(ids, return_inverse=True)
            pixels = v2.functional.resize(run.pixels(ids), [facts["side"]] * 2, antialias=True)
            return treatment(tower((pixels + 1) / 2))[where].float()

        def alone():
            """A step that reads its own batch: one read ahead would be of the other side."""
            trainer.ahead.clear()
            trainer.steps = trainer.step + 1
            trainer.update()

        def online():
            with patch.object(run, "cached", encode):
                alone()

        assert cached("features", [0]).shape == encode("features", [0]).shape
        times = bench.race(alone, online)
    tower = f"{bench.tower} ({millions(tower)}, {facts['side']} px)"
    remark = f"{REASONS['d']}; {trainer.batch} pictures a step through {tower}"
    yield f"d cached or encoded online, {size}", times, remark


def row_e(bench: Bench, size: str):
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(bench, size, folder)
        update, bare, waits = loop_times(bench, train.Trainer(run, "tune")).T
    waiting = np.median(waits / bare)
    rest = np.median((update - waits - bare) / bare)
    remark = f"of bare: data {waiting:.1%}, everything else {rest:.1%}"
    yield f"e loop or bare step, {size}", np.stack([update, bare], axis=1), remark


def loop_times(bench: Bench, trainer: train.Trainer) -> np.ndarray:
    """Seconds (rounds, 3) of a step, of its bare computation, and of getting its batch."""
    net, read, batch, waits = trainer.run.model, trainer.next_batches, {}, []

    def watched():
        begun = time.perf_counter()
        made = read()
        waits.append(time.perf_counter() - begun)
        batch.update({k: v.to(bench.device, non_blocking=True) for k, v in made[0].items()})
        return [dict(batch)]

    def bare():
        given = dict(batch)
        tokens, kept = given.pop("tokens"), given.pop("kept")
        with bench.autocast():
            cond = net.backbone.query_states(tokens) * kept
            losses = M.flow_loss(net.head, cond=cond, **given)
        losses.mean().backward()
        for optimizer in trainer.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    trainer.next_batches = watched
    trainer.update()
    times = np.empty((bench.rounds + 2, 3))
    for i in range(len(times)):
        for k, side in [(0, trainer.update), (1, bare)][:: 1 - 2 * (i % 2)]:
            times[i, k] = bench.seconds(side)
        times[i, 2] = waits[-1]
    return times[2:]


def utilisation(bench: Bench, size: str, side: int = 4096, batches=(32, 128, 512, 2048)):
    """Lines on stage generate, with more prompts a step while memory lasts.

    The last column is the rate of the forward and backward pass's multiplications and additions,
    in whole steps of `Trainer.update`, as a share of a square bf16 matmul's.
    """
    a, b = torch.randn(2, side, side, device=bench.device, dtype=torch.bfloat16)
    best = 10 * 2 * side**3 / np.median(bench.race(lambda: [a @ b for _ in range(10)]))
    for prompts in batches:
        with tempfile.TemporaryDirectory() as folder:
            # the counter of FLOPs cannot follow a net through a call without gradient: no recall
            changes = dict(generate_batch=prompts, recalls=False, compile="auto")
            run = open_run(bench, size, folder, scenes=2 * max(batches), **changes)
            trainer = train.Trainer(run, "generate")
            try:
                torch.cuda.reset_peak_memory_stats() if bench.device == "cuda" else None
                seconds = np.median(bench.race(trainer.update))
            except torch.OutOfMemoryError:
                return
            peak = torch.cuda.max_memory_allocated() if bench.device == "cuda" else math.nan
            with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as count:
                trainer.loss(*trainer.batches(trainer.step))[0].backward()
        rate, images = count.get_total_flops() / seconds, prompts * run.config.draws
        numbers = (
            f"{images / seconds:.0f} | {peak / 1e9:.2f} | {rate / 1e12:.1f} | {rate / best:.1%}"
        )
        yield f"| {size}, {prompts} x {run.config.draws} | {numbers} |"


ROWS = {"a": row_a, "b": row_b, "c": row_c, "d": row_d, "e": row_e}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--sizes", nargs="+", default=["demo", "middle"], choices=SIZES)
    parser.add_argument("--tower", default="vit_base_patch16_clip_224", help="timm name, row d")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    bench = Bench(given.device, given.precision, given.rounds, given.tower)
    train.resolve_machine(bench.config("demo"))
    packages = {package.name: package.version for package in distributions()}
    names = ("torch", "timm", "diffusers", "transformers")
    print(", ".join(f"{name} {packages.get(name, 'missing')}" for name in names), end="\n\n")
    print("| row, size | ours, ms | peer, ms | peer / ours | remark |\n|---|---|---|---|---|")
    table = sys.stdout
    with redirect_stdout(sys.stderr):  # what a run says
        for row, size in itertools.product(given.rows, given.sizes):
            torch.manual_seed(0)
            for line in ROWS[row](bench, size):
                print(table_row(*line), file=table, flush=True)
        if given.device == "cuda":
            print(
                "\n| stage generate | images/s | peak, GB | TFLOP/s | of a matmul's |", file=table
            )
            print("|---|---|---|---|---|", file=table)
            for line in itertools.chain(*(utilisation(bench, size) for size in given.sizes)):
                print(line, file=table, flush=True)


if __name__ == "__main__":
    main()
