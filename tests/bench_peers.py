"""What our parts take, and what diffusers' and transformers' parts of equal shape take.

    python -m pip install -r requirements.txt -r tests/requirements-bench.txt
    python tests/bench_peers.py --rows ab --sizes demo,middle --device cuda

Both sides run in this process, in turns and in changing order after a warm-up, eager, on random
weights, in fp32, on a card in bf16. A cell is the median of the rounds. The ratio is peer / ours,
above 1 where ours is faster, with the quartiles of the rounds' ratios. M: millions, ours / peer.

a  A training step of a DiT. Lumina-Next has our flow head's sublayers; it makes keys for each draw,
   we for each prompt. diffusers' DiT, which stands for SiT too, has our decoder's.
b  A training step of the causal transformer, and greedy writing with a cache. Qwen2's q, k, v have
   biases where ours are normed; ours masks padding.
c  Prompt to vectors: Qwen2, Lumina-Next and FlowMatchEulerDiscreteScheduler are the peer. It guides
   in one batch, we in two passes.
e  Ours is bare forward, backward and optimisers of stage tune; the peer is the loop of train.py on
   the same batch, with a line of its log for each. So the ratio is what the loop costs.
"""

import itertools
import math
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
from einops import rearrange
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import data as D  # noqa: E402  (found through the line above)
import model as M  # noqa: E402
import train  # noqa: E402
from notebooks import shapes as world  # noqa: E402

WIDTHS = ("clip_width", "width", "head_width", "decoder_width")
DEPTHS = ("depth", "head_depth", "decoder_depth")
MICRO = dict.fromkeys(WIDTHS, 32) | dict.fromkeys(DEPTHS, 1) | {"vae_width": 16}
MICRO |= {"vae_batch": 2, "understand_batch": 4, "generate_batch": 4, "generate_draws": 2}
MIDDLE = dict.fromkeys(WIDTHS, 512) | dict.fromkeys(DEPTHS, 8)
MIDDLE |= {"head_patch": 1, "generate_batch": 16, "generate_draws": 1}
SIZES = {"micro": MICRO, "demo": {}, "middle": MIDDLE}  # settings of train.Config
NO_STEPS = {f"{stage}_steps": 0 for stage in train.ORDER if stage not in ("cache", "done")}
VOCABULARY = 1031  # of the demo: bytes, special tokens and 768 words
SAMPLING = {"steps": 25, "guidance": 2.5, "shift": 4.0}  # of the flow head in sample.py


@dataclass(frozen=True)
class Bench:
    """Where and how everything is measured: the fields are the flags, the comments their help."""

    device: Literal["cpu", "cuda"] = "cpu"  # where to run
    rounds: int = 10  # of each measurement
    rows: str = "abce"  # which rows
    sizes: str = "demo,middle"  # which sizes, also micro

    def config(self, size, **changes):
        machine = {"device": self.device, "compile": "off"}
        machine["precision"] = "bf16" if self.device == "cuda" else "fp32"
        return train.Config(**SIZES[size] | machine | changes)

    def autocast(self):
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

    def race(self, *sides):
        """Seconds (rounds, 2) of ours and the peer, in turns, every other round in reverse."""
        times = np.empty((self.rounds + 1, 2))  # the first warms up
        for i in range(len(times)):
            for k in (0, 1)[:: 1 - 2 * (i % 2)]:
                times[i, k] = seconds(sides[k])
        return times[1:]

    def step(self, loss, *optimizers):
        with self.autocast():
            value = loss().mean()
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def race_steps(self, ours, peer, our_loss, peer_loss):
        """Seconds of training steps that minimise our_loss(ours) and peer_loss(peer)."""
        steps = []
        for net, loss in ((ours, our_loss), (peer, peer_loss)):
            adamw = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
            steps.append(partial(self.step, partial(loss, net), adamw))
        return self.race(*steps)


def seconds(function=lambda: None):
    """What the call takes; a card first ends what it was told to do."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    begun = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - begun


def table_row(name, times, remark):
    """A line of the table from the seconds (rounds, 2) of ours and the peer."""
    ours, peer = np.median(times, axis=0)
    low, high = np.quantile(times[:, 1] / times[:, 0], (0.25, 0.75))
    numbers = f"{1000 * ours:.1f} | {1000 * peer:.1f} | {peer / ours:.2f} ({low:.2f}-{high:.2f})"
    return f"| {name} | {numbers} | {remark} |"


def millions(*nets):
    sizes = (sum(p.numel() for p in net.parameters()) / 1e6 for net in nets)
    return " / ".join(f"{size:.2f}" for size in sizes) + " M"


class PeerDiT(nn.Module):
    """A DiT of diffusers behind the signature of ours."""

    predicts, self_conditioning = "v", False

    def __init__(self, net, call):
        super().__init__()
        self.net, self.call = net, call

    def forward(self, x, t, cond, guess=None):
        """x (B, N, C), times (B,), condition (P, M, L), B = P K -> (B, N, C)."""
        x = rearrange(x, "b (r c) ch -> b ch r c", r=math.isqrt(x.shape[1]))
        return rearrange(self.call(x, t, cond).sample, "b ch r c -> b (r c) ch")


def lumina(c, device):
    """Lumina-Next in the shape of our flow head."""
    from diffusers import LuminaNextDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    heads, side = c.head_width // M.HEAD_DIM, math.isqrt(c.tokens)
    size = {"hidden_size": c.head_width, "num_layers": c.head_depth, "cross_attention_dim": c.width}
    size |= {"num_attention_heads": heads, "num_kv_heads": heads, "learn_sigma": False}
    grid = {"sample_size": side, "patch_size": c.head_patch, "in_channels": c.channels}
    net = LuminaNextDiT2DModel(**size, **grid, multiple_of=32)  # of the SwiGLU's width, as ours
    rotary = get_2d_rotary_pos_embed_lumina(M.HEAD_DIM, *[side // c.head_patch] * 2).to(device)

    def call(x, t, cond):
        cond = cond.repeat_interleave(len(x) // len(cond), 0)  # it knows of no draws
        return net(x, t, cond, cond.new_ones(cond.shape[:2]), rotary, {})

    return PeerDiT(net, call).to(device)


def label_dit(c, device):
    """DiT in the shape of our flow head; its condition is a label, always 0."""
    from diffusers import DiTTransformer2DModel

    heads, side = c.head_width // M.HEAD_DIM, math.isqrt(c.tokens)
    size = {"num_layers": c.head_depth, "sample_size": side, "patch_size": c.head_patch}
    # each of its blocks has a table of labels of its own: one label keeps that small
    size |= {"in_channels": c.channels, "num_embeds_ada_norm": 1}
    net = DiTTransformer2DModel(heads, M.HEAD_DIM, **size)
    label = torch.zeros(1, dtype=torch.long, device=device)
    return PeerDiT(net, lambda x, t, cond: net(x, t * 1000, label.expand(len(x)))).to(device)


def qwen2(c):
    """transformers' Qwen2 in the shape of our backbone."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    heads, hidden = c.width // M.HEAD_DIM, M.SwiGLU(c.width).down.in_features
    shape = {"vocab_size": VOCABULARY, "hidden_size": c.width, "num_hidden_layers": c.depth}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    shape |= {"intermediate_size": hidden, "tie_word_embeddings": False}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": M.PAD}
    return Qwen2ForCausalLM(Qwen2Config(**shape, **ends))


def row_a(bench, size):
    c, on = bench.config(size), bench.device
    shape = (c.tokens, c.channels)
    how = {"width": c.head_width, "depth": c.head_depth, "patch": c.head_patch}
    how |= {"shape": shape, "predicts": "v", "self_conditioning": False}
    head = M.DiT(**how, context=c.width, cross=True).to(on)
    decoder = M.DiT(**how, context=c.channels, cross=False).to(on)
    x = torch.randn(c.generate_batch * c.generate_draws, *shape, device=on)
    states = torch.randn(c.generate_batch, c.queries, c.width, device=on)
    label = label_dit(c, on)
    pairs = {"Lumina-Next": (states, head, lumina(c, on)), "DiT/SiT": (x.clone(), decoder, label)}
    pairs["DiT/SiT, ours with cross-attention"] = (states, head, label)
    for name, (cond, *nets) in pairs.items():
        loss = partial(M.flow_loss, x=x, cond=cond, generator=torch.Generator(on))
        remark = f"{millions(*nets)}, {c.generate_batch} x {c.generate_draws} samples"
        yield f"a {name}", bench.race_steps(*nets, loss, loss), remark


def row_b(bench, size, length=160, start=32, new=64):
    c = bench.config(size)
    ours = M.Backbone(c, VOCABULARY, c.channels).to(bench.device)
    peer = qwen2(c).to(bench.device)
    ids = torch.randint(0, 256, (c.understand_batch, length), device=bench.device)
    our_loss = partial(M.Backbone.forward, ids=ids, learn=torch.ones_like(ids, dtype=torch.bool))
    remark = f"{millions(ours, peer)}, {len(ids)} rows of {length} tokens"
    peer_loss = partial(lambda net, **how: net(**how).loss, input_ids=ids, labels=ids)
    times = bench.race_steps(ours, peer, our_loss, partial(peer_loss, use_cache=False))
    yield "b Qwen2, step", times, remark
    M.zero(ours.head)  # never writes <eos>: both write all tokens
    prompt = ids[:, :start]
    how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": new, "do_sample": False}
    our_text = bench.autocast()(lambda: ours.write(prompt, limit=new))
    peer_text = bench.autocast()(lambda: peer.generate(prompt, **how))
    assert len(our_text()[0]) == len(peer_text()[0]) - start == new
    remark = f"{len(prompt)} prompts of {start} tokens, {new} new ones"
    yield "b Qwen2, cached writing", bench.race(our_text, peer_text), remark


def row_c(bench, size):
    from diffusers import FlowMatchEulerDiscreteScheduler

    c = bench.config(size, self_conditioning=False)
    ours = M.BLIP3o(c, VOCABULARY, world.SIDE).to(bench.device).requires_grad_(False)
    lm, queries = qwen2(c).model.to(bench.device), ours.backbone.queries
    head = lumina(c, bench.device)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SAMPLING["shift"])

    def peer(ids, x):
        prompt = lm.embed_tokens(ids[:, : -len(queries)])
        read = torch.cat([prompt, queries.expand(len(ids), -1, -1)], dim=1)
        states = lm(inputs_embeds=read, attention_mask=ids != M.PAD, use_cache=False)[0]
        cond = torch.cat([states, 0 * states])[:, -len(queries) :]
        scheduler.set_timesteps(SAMPLING["steps"], device=x.device)
        for t in scheduler.timesteps:
            now = 1 - t.expand(len(cond)) / scheduler.config.num_train_timesteps
            c, u = head(torch.cat([x, x]), now, cond).chunk(2)  # two of (B, N, C)
            x = scheduler.step(-(u + SAMPLING["guidance"] * (c - u)), t, x)[0]
        return x

    row = [("user", "a red circle left of a blue square"), ("queries", None)]
    words = M.Tokenizer.fit([row[0][1]] * 2)
    for count in (1, 16):
        ids = M.build_sequences(words, [row] * count, c.tokens, c.queries)[0].to(bench.device)
        noise = torch.randn(count, *ours.head.shape, device=bench.device)
        with torch.no_grad(), bench.autocast():
            times = bench.race(
                partial(ours.generate, ids, noise, **SAMPLING), partial(peer, ids, noise)
            )
        sizes = f"{millions(ours.backbone.trunk, lm.layers)}, {millions(ours.head, head)}"
        yield f"c {count} prompts", times, f"trunk, head {sizes}"


def row_e(bench, size):
    times, begun, optimizers, write_log = [], [0], [], train.Run.log

    def bare(run):
        """Seconds of the step that the loop has just taken, without the loop."""
        if not optimizers:
            learned = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
            optimizers.extend(train.make_optimizers(run.config, learned, run.dtype))
        batch = run.ready(train.Batches(run, "tune", run.data.train_ids)[len(times)])
        loss = partial(run.model, train.STAGES["tune"].loss, *batch)
        return seconds(partial(bench.step, loss, *optimizers))

    def log(run, *where, **what):  # comes last in a step
        write_log(run, *where, **what)
        seconds()  # a card ends the step
        loop = time.perf_counter() - begun[0]
        times.append((bare(run), loop))
        begun[0] = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        world.Shapes(out=f"{folder}/set", count=1000).prepare()
        steps = NO_STEPS | {"tune_steps": bench.rounds + 2, "save_every": 1}
        with patch.object(train.Run, "save"), patch.object(train.Run, "log", log):
            train.train(bench.config(size, data=f"{folder}/set", out=folder, **steps))
    yield "e loop over bare step", np.array(times[2:]), "bare, loop"


ROWS = {"a": row_a, "b": row_b, "c": row_c, "e": row_e}


def main(arguments=None):
    bench = D.parse(Bench, __doc__, arguments)
    print("| row, size | ours, ms | peer, ms | peer / ours | remark |\n|---|---|---|---|---|")
    for row, size in itertools.product(bench.rows, bench.sizes.split(",")):
        torch.manual_seed(0)
        for name, times, remark in ROWS[row](bench, size):
            print(table_row(f"{name}, {size}", times, remark), flush=True)


if __name__ == "__main__":
    main()
