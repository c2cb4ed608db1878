"""Every network of nano-blip3o, the sequence format, the flow-matching loss and its sampler.

Read BLIP3o at the end first, then from the top. Nothing here trains or reads files.

One letter per axis, in every shape comment:
    B batch rows            T positions of a sequence      D width of a network
    N tokens of a grid      M conditioning tokens          C channels of a grid's vectors
    P prompts (B = P K)     K noise draws per prompt       H heads, E width of one head
    S side of a picture     V vocabulary                   L width of the conditioning tokens
    Q learned queries
Time runs as in the paper: t = 0 is noise, t = 1 is data.
"""

import math
import re
from collections import Counter

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import build_sincos2d_pos_embed
from torch import nn

# ------------------------------------------------------------------------------------------ text

PAD, BOS, USER, BOT, EOS, IMAGE, QUERY = range(256, 263)
FIRST_WORD = 263


class Tokenizer:
    """UTF-8 bytes (ids 0-255), special tokens, then whole words; lossless on any text.
    A word carries the space before it. A last "s" stands alone: what is learned of circle holds
    for circles. A word that is not in `words` becomes its bytes."""

    def __init__(self, words=()):
        self.words = list(words)
        self.ids = {word: FIRST_WORD + i for i, word in enumerate(self.words)}
        self.pieces = {i: bytes([i]) for i in range(256)}
        self.pieces |= {i: word.encode() for word, i in self.ids.items()}

    def __len__(self):
        return FIRST_WORD + len(self.words)

    @classmethod
    def fit(cls, texts, size=768):
        """The tokenizer of the `size` most frequent words that occur at least twice."""
        counts = Counter(piece for text in texts for piece in cls.split(text))
        frequent = [word for word in counts if counts[word] > 1 and len(word) > 1]
        frequent.sort(key=lambda word: (-counts[word], word))
        return cls(frequent[:size])

    @staticmethod
    def split(text):
        return re.findall(r" ?\w+?(?=s?\b)|\W", " " + text)

    def encode(self, text):
        ids = []
        for piece in self.split(text):
            if piece in self.ids:
                ids.append(self.ids[piece])
            else:
                ids.extend(piece.encode())
        return ids

    def decode(self, ids):
        """Inverse of `encode`. Special tokens are skipped."""
        text = b"".join(self.pieces.get(i, b"") for i in ids)
        return text.decode("utf-8", "replace").removeprefix(" ")


def build_sequences(tokenizer, rows, tokens, queries, longest=256):
    """The one function that lays out a sequence, for every task, in training and in inference.

    A row is a list of (role, text):
        ("image", None)    `tokens` positions that image vectors will fill
        ("user", text)     <user> text
        ("bot", text)      <bot> text <eos>, which carries loss; text None leaves it open
        ("given", text)    the same without loss
        ("queries", None)  `queries` positions that the learned queries will fill
    Returns ids (B, T), and learn (B, T), true where the token is to be predicted. A text is cut
    after `longest` tokens. Rows are padded on the left to a multiple of 16: each row's last
    position is the last one, and a compiled network meets few different lengths.
    """
    slots = {"image": [IMAGE] * tokens, "queries": [QUERY] * queries}
    slots |= {"user": [USER], "bot": [BOT], "given": [BOT]}
    built = []
    for row in rows:
        ids, learn = [BOS], [False]
        for role, text in row:
            said = [] if text is None else tokenizer.encode(text)[:longest]
            if slots[role] == [BOT] and text is not None:
                said.append(EOS)
            ids += slots[role] + said
            learn += [False] * len(slots[role]) + [role == "bot"] * len(said)
        built.append((ids, learn))
    length = math.ceil(max(len(ids) for ids, _ in built) / 16) * 16
    ids = [[PAD] * (length - len(ids)) + ids for ids, _ in built]
    learn = [[False] * (length - len(learn)) + learn for _, learn in built]
    return torch.tensor(ids), torch.tensor(learn)


# ------------------------------------------------------------------------------- building blocks

HEAD_DIM = 32  # width of an attention head, everywhere


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(E)) v: (B, H, T, E), two of (B, H, M, E) -> (B, H, T, E).
    mask (B, 1, T, M) is true where a query may look."""
    # on a CPU the fused kernel's gradients take longer than the formula's, in bf16 by far
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, T, M)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


def rotary(positions, width):
    """Cosines and sines of rotary positions: (T,) -> two of (T, width / 2), in float32."""
    exponents = torch.arange(width // 2, device=positions.device) * 2 / width
    angles = positions.float()[:, None] * 10_000.0**-exponents
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """Turns the pairs (x_i, x_{i + E/2}) by their position's angle: (B, H, T, E) -> same."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)  # two of (B, H, T, E / 2)
    turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return turned.type_as(x)


class Attention(nn.Module):
    """Multi-head attention with QK-norm: self-attention, or cross-attention to a context."""

    def __init__(self, width):
        super().__init__()
        if width % HEAD_DIM:
            raise ValueError(f"width {width}: expected a multiple of {HEAD_DIM}")
        self.heads = width // HEAD_DIM
        self.q = linear(width, width)
        self.kv = linear(width, 2 * width)
        self.out = linear(width, width)
        self.q_norm = norm(HEAD_DIM)
        self.k_norm = norm(HEAD_DIM)

    def forward(self, x, context=None, mask=None, rope=None, cache=None):
        """(B, T, D), context (B, M, D), None = x itself -> (B, T, D).
        cache is a list, empty or [keys, values] of earlier positions. It is brought up to date."""
        context = x if context is None else context
        q = rearrange(self.q(x), "b t (h e) -> b h t e", h=self.heads)
        k, v = rearrange(self.kv(context), "b m (s h e) -> s b h m e", s=2, h=self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        if cache is not None:
            cache[:] = [k, v]
        seen = attention(q, k, v, mask)
        return self.out(rearrange(seen, "b h t e -> b t (h e)"))


class SwiGLU(nn.Module):
    """down(silu(gate) * up): (B, T, D) -> (B, T, D), hidden width 8/3 D rounded up to 32."""

    def __init__(self, width):
        super().__init__()
        hidden = math.ceil(width * 8 / 3 / 32) * 32
        self.gate_up = linear(width, 2 * hidden)
        self.down = linear(hidden, width)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # two of (B, T, 8/3 D)
        return self.down(F.silu(gate) * up)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def norm(width):
    return nn.RMSNorm(width, eps=1e-6)


def mlp(inputs, hidden, outputs):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


def zero(*layers):
    """Zeroes the weights and biases of layers, so that what they add begins at nothing."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


class TrunkBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Both outputs start at zero."""

    def __init__(self, width):
        super().__init__()
        self.attention_norm = norm(width)
        self.attention = Attention(width)
        self.mlp_norm = norm(width)
        self.mlp = SwiGLU(width)
        zero(self.attention.out, self.mlp.down)

    def forward(self, x, mask, rope, cache=None):
        x = x + self.attention(self.attention_norm(x), mask=mask, rope=rope, cache=cache)
        return x + self.mlp(self.mlp_norm(x))


class Trunk(nn.Module):
    """Causal transformer over embeddings: in the backbone, and the text tower of the tiny CLIP."""

    def __init__(self, width, depth):
        super().__init__()
        self.blocks = nn.ModuleList(TrunkBlock(width) for _ in range(depth))
        self.norm = norm(width)

    def forward(self, x, valid, caches=None):
        """Embeddings (B, T, D), valid (B, past + T) false at padding -> states (B, T, D).
        valid is of cached and new positions. caches is None, or one list for each block (see
        `Attention`), empty at first."""
        keys = torch.arange(valid.shape[1], device=x.device)  # cached and new positions
        new = keys[-x.shape[1] :]  # the last T are x's
        causal = keys[None, :] <= new[:, None]  # (T, past + T)
        # a padded position sees itself: a softmax over nothing would be NaN
        own = keys[None, :] == new[:, None]
        mask = (causal & valid[:, None, None, :]) | own  # (B, 1, T, past + T)
        rope = rotary(new, HEAD_DIM)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            x = block(x, mask, rope, cache)
        return self.norm(x)


# ------------------------------------------------------------------------------------------- DiT


class AdaLN(nn.Module):
    """adaLN-Zero (DiT, section 3.2): the time and the pooled condition shift and scale what a
    sublayer reads and gate what it adds. All start at zero: each block starts as the identity."""

    def __init__(self, width):
        super().__init__()
        self.parts = nn.Linear(width, 3 * width)
        zero(self.parts)

    def forward(self, x, time):
        """(B, N, D), (B, D) -> modulated (B, N, D), gate (B, 1, D)."""
        shift, scale, gate = self.parts(time)[:, None].chunk(3, dim=-1)
        return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift, gate


class DiTBlock(nn.Module):
    """Self-attention, cross-attention if asked for, MLP, each in its AdaLN."""

    def __init__(self, width, cross):
        super().__init__()
        self.attention_norm = AdaLN(width)
        self.attention = Attention(width)
        self.cross_norm = AdaLN(width) if cross else None
        self.cross = Attention(width) if cross else None
        self.mlp_norm = AdaLN(width)
        self.mlp = SwiGLU(width)

    def forward(self, x, time, context):
        """(B, N, D), (B, D), context (P, M, D), B = P K -> (B, N, D)."""
        h, gate = self.attention_norm(x, time)
        x = x + gate * self.attention(h)
        if self.cross is not None:
            h, gate = self.cross_norm(x, time)
            # Cross-attention does not mix queries. So the K draws of a prompt stand in one row, and
            # keys and values are made once: P = 2, K = 4, N = 16: (8, 16, D) -> (2, 64, D).
            h = rearrange(h, "(p k) n d -> p (k n) d", p=len(context))
            h = self.cross(h, context)
            x = x + gate * rearrange(h, "p (k n) d -> (p k) n d", n=x.shape[1])
        h, gate = self.mlp_norm(x, time)
        return x + gate * self.mlp(h)


class DiT(nn.Module):
    """Diffusion transformer over a square grid of vectors; one class for both flow networks.

    shape     (N, C) of the grid
    context   L, the width of the condition's tokens. Their mean also joins the time, in each block
    patch     groups patch x patch neighbours of the grid into one token
    cross     true: cross-attention reads the condition (the queries' states);
              false: the condition lies on a grid of its own, is resized and added, for a decoder
              whose condition lies where the pixels lie
    predicts  "x" (data) or "v" (velocity); see `velocity`
    self_conditioning   reads an earlier guess of the data beside x_t (arXiv 2208.04202)
    """

    def __init__(self, shape, context, *, width, depth, patch, cross, predicts, self_conditioning):
        super().__init__()
        tokens, channels = shape
        side = math.isqrt(tokens) // patch  # of the token grid
        if (side * patch) ** 2 != tokens:
            raise ValueError(f"a grid of {tokens} vectors: expected a square of {patch} x {patch}")
        folded = channels * patch**2
        self.shape = shape
        self.patches = {"r": side, "c": side, "p": patch, "q": patch}
        self.cross = cross
        self.predicts = predicts
        self.self_conditioning = self_conditioning
        self.embed = nn.Linear(2 * folded if self_conditioning else folded, width)
        self.time = mlp(256, width, width)
        self.cond_embed = nn.Sequential(nn.Linear(context, width), nn.RMSNorm(width))
        self.pooled = nn.Linear(width, width)
        self.blocks = nn.ModuleList(DiTBlock(width, cross) for _ in range(depth))
        self.out_norm = AdaLN(width)
        self.out = nn.Linear(width, folded)
        zero(self.out)
        self.register_buffer("positions", build_sincos2d_pos_embed([side, side], width))  # (N, D)

    def forward(self, x, t, cond, guess=None):
        """x (B, N, C) at times t (B,), condition (P, M, L), B = P K -> (B, N, C).
        guess (B, N, C) is an earlier guess of the data, None = zeros. Without cross, K = 1."""
        if self.self_conditioning:
            guess = torch.zeros_like(x) if guess is None else guess
            x = torch.cat([x, guess], dim=-1)
        h = rearrange(x, "b (r p c q) ch -> b (r c) (p q ch)", **self.patches)
        h = self.embed(h) + self.positions
        cond = self.cond_embed(cond)  # (P, M, D)
        if not self.cross:
            h = h + resize_grid(cond, h.shape[1])
        features = torch.cat(rotary(t * 1000, 256), dim=-1)  # (B, 256)
        pooled = self.pooled(cond.mean(1)).repeat_interleave(len(x) // len(cond), 0)
        time = F.silu(self.time(features) + pooled)
        for block in self.blocks:
            h = block(h, time, cond)
        h, _ = self.out_norm(h, time)  # nothing follows that the gate could gate
        return rearrange(self.out(h), "b (r c) (p q ch) -> b (r p c q) ch", **self.patches)


def resize_grid(grid, tokens):
    """A square grid at another resolution, nearest or averaged: (B, M, D) -> (B, tokens, D)."""
    side = math.isqrt(grid.shape[1])
    resize = F.interpolate if tokens > grid.shape[1] else F.adaptive_avg_pool2d
    square = grid.mT.unflatten(2, (side, side))  # (B, D, side, side)
    return resize(square, math.isqrt(tokens)).flatten(2).mT


# --------------------------------------------------------------------------------- flow matching


def draw_noise(like, generator):
    return torch.randn(like.shape, generator=generator, device=like.device)


def interpolate(noise, x, t):
    """x_t = (1 - t) noise + t x."""
    return torch.lerp(noise, x, t)


def shift_time(t, shift):
    """Moves times towards the noise (shift > 1), which large grids need (SD3, RAE): [0,1]->[0,1].
    The share of noise s = 1 - t becomes shift s / (1 + (shift - 1) s): with shift 2, 1/2 -> 2/3."""
    s = 1 - t
    return 1 - shift * s / (1 + (shift - 1) * s)


def velocity(dit, x_t, t, cond, guess=None):
    """The velocity that `dit` stands for, estimating x - noise; arguments and shapes as in `DiT`.
    If `dit` predicts the data x, it is (x - x_t) / (1 - t), and an error of x weighs 1 / (1 - t)^2.
    Above t = 0.95 the divisor stays 0.05, and the best output lies a little beyond x."""
    out = dit(x_t, t, cond, guess)
    if dit.predicts == "v":
        return out
    return (out - x_t) / (1 - t).clamp_min(0.05)[:, None, None]


def drop_condition(cond, generator, share=0.1):
    """Replaces a share of the conditions (P, M, L) by the null condition, zeros, for guidance."""
    kept = torch.rand(len(cond), 1, 1, generator=generator, device=cond.device) >= share
    return cond * kept


def flow_loss(dit, x, cond, generator, shift=1.0, source=None):
    """Flow matching (paper, section 3.2): |velocity(x_t) - (x - noise)|^2, a mean for each row.
    Data x (B, N, C), cond (P, M, L) -> losses (B,). Noise is Gaussian, times are logit-normal.
    source (b, N, C): what the last b rows are changes of. It takes the place of their guess."""
    noise = draw_noise(x, generator)
    t = shift_time(draw_noise(x[:, 0, 0], generator).sigmoid(), shift)  # (B,)
    x_t = interpolate(noise, x, t[:, None, None])
    guess = first_guess(dit, x_t, t, cond, source) if dit.self_conditioning else None
    error = velocity(dit, x_t, t, cond, guess) - (x - noise)
    return error.float().square().mean((1, 2))


@torch.no_grad()
def first_guess(dit, x_t, t, cond, source=None):
    """A first call's guess of the data for the first half of the prompts. The others get zeros: the
    net also learns to start without a guess. The last rows have their source if they have one."""
    guess = torch.zeros_like(x_t)
    half, _ = cond.tensor_split(2)
    rows = len(half) * (len(x_t) // len(cond))
    v = velocity(dit, x_t[:rows], t[:rows], half)
    guess[:rows] = x_t[:rows] + (1 - t[:rows, None, None]) * v
    if source is not None:
        guess[len(x_t) - len(source) :] = source
    return guess


def regression_loss(dit, x, cond):
    """The squared error of what the net makes of cond alone, from no noise: as in `flow_loss`."""
    start = torch.zeros_like(x)
    error = velocity(dit, start, start[:, 0, 0], cond) - x
    return error.float().square().mean((1, 2))


def guided_velocity(dit, x_t, t, cond, guess, guidance):
    """The velocity u + s (c - u) of guidance s, with c under the condition, u under the null."""
    if guidance == 1:
        return velocity(dit, x_t, t, cond, guess)
    cond = torch.cat([cond, torch.zeros_like(cond)])  # one batch is faster than two calls
    c, u = velocity(dit, x_t.repeat(2, 1, 1), t.repeat(2), cond, guess.repeat(2, 1, 1)).chunk(2)
    return u + guidance * (c - u)


@torch.no_grad()
def sample_flow(dit, noise, cond, steps=10, guidance=1.0, shift=1.0, fresh_noise=None, source=None):
    """Integrates dx/dt = velocity from t = 0 to t = 1: noise (B, N, C), cond (B, M, L) -> data.

    With `fresh_noise`, a source of noise (B, N, C), each step goes on from the data it predicts
    under new noise, as consistency models do. Early mistakes are forgotten, and the distribution
    gets somewhat too narrow. source (B, N, C) is what the data is a change of; see `flow_loss`.
    """
    times = shift_time(torch.linspace(0, 1, steps + 1, device=noise.device), shift)
    x, data = noise, torch.zeros_like(noise)
    for t, after in zip(times[:-1], times[1:]):
        guess = data if source is None else source
        v = guided_velocity(dit, x, t.expand(len(x)), cond, guess, guidance)
        data = x + (1 - t) * v
        if fresh_noise is None:  # Euler: x moves on by (after - t) v
            noise = x - t * v
        else:  # restart
            noise = fresh_noise()
        x = interpolate(noise, data, after)
    return x


# ---------------------------------------------------------------------------- pictures and vectors

PATCH_PIXELS = 8 * 8 * 3  # numbers of a patch of 8 x 8 pixels, in the vectors of a tower


def to_pixels(images):
    """uint8 pictures (B, S, S, 3) -> floats in [-1, 1] (B, 3, S, S)."""
    return rearrange(images, "b h w c -> b c h w").float() / 127.5 - 1


def to_images(pixels):
    """Inverse of `to_pixels`, rounded and clamped: (B, 3, S, S) -> uint8 (B, S, S, 3)."""
    images = ((pixels.float() + 1) * 127.5).round().clamp(0, 255)
    return rearrange(images.to(torch.uint8), "b c h w -> b h w c")


class Normalise(nn.Module):
    """Fixed map of vectors (..., inputs) to C channels of zero mean and unit variance.

    Flow matching needs data on the scale of its noise. Vectors that are wider than C, a tower's,
    are projected on their C principal axes.
    """

    def __init__(self, inputs, channels):
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        self.register_buffer("axes", torch.eye(inputs, channels) if inputs > channels else None)

    def fit(self, raw):
        flat = raw.flatten(0, -2).cpu().double()  # (samples, inputs); MPS has no double
        mean, std = flat.mean(0), flat.std(0).clamp_min(1e-6)
        if self.axes is not None:
            inputs, channels = self.axes.shape
            # the pixels, which a tower's vectors end in, weigh as much as all its features
            std[-PATCH_PIXELS:] *= math.sqrt(PATCH_PIXELS / (inputs - PATCH_PIXELS))
            x = (flat - mean) / std
            variances, axes = torch.linalg.eigh(x.T @ x / len(x))  # in ascending order
            self.axes.copy_((axes / variances.clamp_min(1e-6).sqrt())[:, -channels:])
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, raw):
        x = (raw - self.mean) / self.std
        return x if self.axes is None else x @ self.axes

    def inverse(self, x):
        return x * self.std + self.mean


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class ResidualConv(nn.Sequential):
    """x + conv(silu(conv(silu(norm(x))))): (B, D, S, S) -> same; the identity at first."""

    def __init__(self, width):
        first, second = conv(width, width), conv(width, width)
        super().__init__(nn.GroupNorm(8, width), nn.SiLU(), first, nn.SiLU(), second)
        zero(second)

    def forward(self, x):
        return x + super().forward(x)


def convs(inputs, width, outputs):
    return [conv(inputs, width), ResidualConv(width), ResidualConv(width), conv(width, outputs)]


class VAE(nn.Module):
    """Compact convolutional VAE, f = 4: pixels (B, 3, S, S) <-> latents (B, (S/4)^2, 4).
    Folding 4 x 4 pixels into channels lets all convolutions run at a quarter of the resolution."""

    factor = 4
    channels = 4

    def __init__(self, width):
        super().__init__()
        folded = 3 * self.factor**2
        unfold, fold = nn.PixelUnshuffle(self.factor), nn.PixelShuffle(self.factor)
        self.encoder = nn.Sequential(unfold, *convs(folded, width, 2 * self.channels))
        self.decoder = nn.Sequential(*convs(self.channels, width, folded), fold)

    def encode(self, pixels):
        """The mean of the posterior: (B, 3, S, S) -> (B, N, 4)."""
        mean, _ = self.encoder(pixels).chunk(2, dim=1)
        return rearrange(mean, "b c h w -> b (h w) c")

    def decode(self, latents):
        """(B, N, 4) -> (B, 3, S, S)."""
        side = math.isqrt(latents.shape[1])
        return self.decoder(rearrange(latents, "b (h w) c -> b c h w", h=side))

    def forward(self, pixels, generator):
        """Pixel error and a little KL divergence to a unit Gaussian: (B, 3, S, S) -> (B,)."""
        mean, log_variance = self.encoder(pixels).chunk(2, dim=1)  # two of (B, 4, S/4, S/4)
        log_variance = log_variance.clamp(-20, 10)
        latents = mean + draw_noise(mean, generator) * (log_variance / 2).exp()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return pixel_error(self.decoder(latents), pixels) + 1e-5 * kl.mean((1, 2, 3))


def pixel_error(made, pixels):
    """Absolute error, for sharp edges, plus squared error, for colours: (B, 3, S, S) -> (B,)."""
    error = made - pixels
    return (error.abs() + 4 * error.square()).mean((1, 2, 3))


def edge_histograms(pixels, patch, bins=8):
    """How edges are oriented around each patch, as in HOG and MaskFeat (arXiv 2112.09133).
    (B, 3, S, S) -> (B, N, bins). Bin i counts gradients at i / bins of half a turn in the 3 x 3
    patches around each patch. A row's length nears 1 where edges are many, 0 where all is flat."""
    grey = F.pad(pixels.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    dx = grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2]
    dy = grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]
    angles = torch.arange(bins, device=pixels.device)[:, None, None] * math.pi / bins
    likeness = (torch.atan2(dy, dx) - angles).cos().square()  # half a turn is the same edge
    votes = torch.hypot(dx, dy) * likeness.square().square()  # (B, bins, S, S)
    means = F.avg_pool2d(votes, 3 * patch, patch, padding=patch).flatten(2).mT  # (B, N, bins)
    return means / (means.norm(dim=-1, keepdim=True) + 0.01)


class TinyCLIP(nn.Module):
    """Stand-in where pretrained weights are not at hand: a timm ViT, contrastive against captions.

    Its vectors are a narrow learned bottleneck of the tower's tokens. A contrastive loss alone
    forgets what captions leave out. So each vector must also rebuild its patch's pixels and tell
    the edges around it. This is a departure from CLIP, which has scale instead.
    """

    def __init__(self, config, side, vocabulary):
        super().__init__()
        width, channels = config.clip_width, config.channels
        self.patch = side // math.isqrt(config.tokens)
        size = {"img_size": side, "patch_size": self.patch, "embed_dim": width, "depth": 3}
        size["num_heads"] = width // HEAD_DIM
        # the tokens are what is used, so the last norm belongs on them
        ending = {"num_classes": 0, "class_token": False, "global_pool": "avg", "fc_norm": False}
        self.tower = timm.create_model("vit_tiny_patch16_224", **size, **ending)
        self.bottleneck = nn.Linear(width, channels)
        self.image_head = mlp(channels, width, width)
        self.pixel_head = mlp(channels, 4 * width, 3 * self.patch**2)
        self.edge_head = mlp(channels, width, 8)
        self.words = nn.Embedding(vocabulary, width)
        self.text = Trunk(width, 2)
        self.text_head = linear(width, width)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        nn.init.normal_(self.words.weight, std=0.5)

    def vectors(self, pixels):
        """The image's vectors, each of unit variance: (B, 3, S, S) -> (B, N, C)."""
        tokens = self.bottleneck(self.tower.forward_features(pixels))
        return F.layer_norm(tokens, tokens.shape[-1:])

    def logits(self, vectors, ids):
        """How well pictures' vectors (B, N, C) fit captions (B, T): scaled cosines (B, B)."""
        images = F.normalize(self.image_head(vectors).mean(1), dim=-1)  # (B, D)
        states = self.text(self.words(ids), ids != PAD)
        texts = F.normalize(self.text_head(states[:, -1]), dim=-1)  # (B, D)
        return self.log_scale.exp().clamp(max=100) * images @ texts.T

    def rebuild(self, vectors):
        """The pixel head's blurred picture: (B, N, C) -> (B, 3, S, S)."""
        patches = self.pixel_head(vectors).mT  # (B, 3 patch^2, N)
        grid = patches.unflatten(2, (math.isqrt(patches.shape[2]), -1))
        return F.pixel_shuffle(grid, self.patch)

    def forward(self, pixels, ids, same, generator):
        """Pictures (B, 3, S, S), captions (B, T), same (B, B) marks equal ones -> losses (B,)."""
        vectors = self.vectors(pixels)
        # under a little noise, nothing can hide in the last digits of a vector
        vectors = vectors + 0.05 * draw_noise(vectors, generator)
        logits = self.logits(vectors, ids)
        target = same / same.sum(1, keepdim=True)  # symmetric, so it serves both directions
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        error = self.edge_head(vectors) - edge_histograms(pixels, self.patch)  # (B, N, bins)
        edges = error.square().sum(-1).mean(1)
        return contrastive + 20 * pixel_error(self.rebuild(vectors), pixels) + 50 * edges


# ---------------------------------------------------------------------------------- the backbone


class Backbone(nn.Module):
    """One causal transformer that reads text and images and writes text (paper, section 2).
    Understanding puts an image's vectors before the text. Generation puts the learned queries
    after the prompt, and their last states condition the flow head."""

    def __init__(self, config, vocabulary, channels):
        super().__init__()
        width = config.width
        self.words = nn.Embedding(vocabulary, width)
        self.projector = mlp(channels, width, width)
        self.position_embedding = nn.Parameter(torch.randn(config.tokens, width) * 0.5)
        # small beside what they read: else their states differ by query and hardly by prompt
        self.queries = nn.Parameter(torch.randn(config.queries, width) * 0.02)
        self.trunk = Trunk(width, config.depth)
        self.head = linear(width, vocabulary)
        nn.init.normal_(self.words.weight, std=0.5)
        zero(self.head)

    def embed(self, ids, vectors=None):
        """ids (B, T), the vectors of their images in order (images, N, C) -> (B, T, D)."""
        x = self.words(ids)
        queries = self.queries.expand(len(ids), -1, -1)  # fill the slots of each row in order
        x = x.masked_scatter((ids == QUERY)[..., None], queries)
        if vectors is None:
            return x
        seen = self.projector(vectors) + self.position_embedding
        return x.masked_scatter((ids == IMAGE)[..., None], seen.type_as(x))

    def states(self, ids, vectors=None):
        return self.trunk(self.embed(ids, vectors), ids != PAD)  # (B, T, D)

    def forward(self, ids, learn, vectors=None):
        """Cross-entropy of the tokens marked in learn (B, T), each from those before it -> (B,).
        Rows that end in the queries also learn to repeat; see `repeat_loss`."""
        log_p = self.head(self.states(ids, vectors)).float().log_softmax(-1)  # (B, T, V)
        learn = learn[:, 1:]
        said = log_p[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
        written = -(said * learn).sum(1) / learn.sum(1).clamp_min(1)
        return written + (ids[:, -1] == QUERY) * self.repeat_loss(ids, log_p)

    def repeat_loss(self, ids, log_p, words=3):
        """How badly the queries, which end a row, repeat what stands before them -> losses (B,).

        One distribution at each query is to hold three tokens, in no order: the last three at the
        last query, one token earlier at each query before. For "a b c d" and two queries:
        {a, b, c}, then {b, c, d}. The best loss is log 3. So "red" becomes the same code beside
        any noun, and a flow head that reads it can draw pairs that it has never seen.
        """
        count = len(self.queries)
        prompt = F.pad(ids[:, :-count], (count + words, 0), value=PAD)
        targets = prompt.unfold(1, words, 1)[:, -count:]  # (B, Q, words)
        named = targets != PAD
        said = log_p[:, -count:].gather(2, targets)
        return -(said * named).sum((1, 2)) / named.sum((1, 2)).clamp_min(1)

    def query_states(self, ids, vectors=None):
        """States at the queries, which end every row: (P, T) -> (P, Q, D).
        Of a frozen trunk the prompt passes without gradient, into caches; then the queries."""
        count = len(self.queries)
        if self.trunk.norm.weight.requires_grad:
            return self.states(ids, vectors)[:, -count:]
        valid = ids != PAD
        caches = [[] for _ in self.trunk.blocks]
        with torch.no_grad():
            self.trunk(self.embed(ids[:, :-count], vectors), valid[:, :-count], caches)
        return self.trunk(self.queries.repeat(len(ids), 1, 1), valid, caches)

    @torch.no_grad()
    def write(self, ids, vectors=None, limit=64, noise=None, least=0.5):
        """Continues rows (B, T) that end in an open <bot>, until <eos> or `limit`.
        Greedily, or with a source of noise (B, 1) by chance, among the tokens that are at least
        `least` times as likely as the likeliest: others are mistakes (min-p, arXiv 2407.01082)."""
        caches = [[] for _ in self.trunk.blocks]
        valid = ids != PAD
        x = self.embed(ids, vectors)
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        written = []
        while len(written) < limit and not done.all():
            states = self.trunk(x, valid, caches)
            logits = self.head(states[:, -1]).float()  # (B, V)
            token = logits.argmax(-1)  # (B,)
            if noise is not None:
                p = logits.softmax(-1)
                p = p * (p >= least * p.amax(-1, keepdim=True))
                # the integral of the normal distribution makes the noise uniform
                uniform = torch.special.ndtr(noise()) * p.sum(-1, keepdim=True)
                token = (p.cumsum(-1) < uniform).sum(-1)
                token = token.clamp_max(logits.shape[1] - 1)  # the sum may end below 1
            done = done | (token == EOS)
            written.append(token.masked_fill(done, PAD))
            x = self.words(token)[:, None]
            valid = F.pad(valid, (0, 1), value=True)
        rows = torch.stack(written, dim=1).tolist()
        return [[i for i in row if i != PAD] for row in rows]


# ------------------------------------------------------------------------------ the whole system


class BLIP3o(nn.Module):
    """All parts under one roof, and the way from a prompt to pixels.

    config is a train.Config, side that of pictures in px. With a timm tower the prepared set holds
    its vectors, `tower_width` wide, and `clip` is None. ValueError where sizes do not fit.
    """

    def __init__(self, config, vocabulary, side, tower_width=None):
        super().__init__()
        c = config
        self.config = c
        if side % 8 or (not tower_width and side % math.isqrt(c.tokens)):
            raise ValueError(f"{side} px, {c.tokens} vectors: no multiple of 8, or of their grid")
        self.clip = None if tower_width else TinyCLIP(c, side, vocabulary)
        self.vae = VAE(c.vae_width)
        inputs = tower_width or c.channels
        channels = min(inputs, c.channels)
        vectors = (c.tokens, channels)
        latents = ((side // VAE.factor) ** 2, VAE.channels)
        self.shapes = {"clip": vectors, "vae": latents}  # (N, C) of what a picture becomes
        normalise = {"clip": Normalise(inputs, channels)}
        normalise["vae"] = Normalise(VAE.channels, VAE.channels)
        self.normalise = nn.ModuleDict(normalise)
        self.backbone = Backbone(c, vocabulary, channels)
        size = {"width": c.head_width, "depth": c.head_depth, "patch": c.head_patch}
        how = {"cross": True, "self_conditioning": c.self_conditioning and c.objective == "flow"}
        self.head = DiT(self.shapes[c.target], c.width, **size, **how, predicts=c.predicts)
        size = {"width": c.decoder_width, "depth": c.decoder_depth, "patch": 2}
        how = {"cross": False, "self_conditioning": False}
        self.decoder = DiT(latents, channels, **size, **how, predicts=c.predicts)

    def forward(self, loss, generator, batch):
        """The mean of loss(model, generator, **batch), a function of train.STAGES. It is a forward
        so that DistributedDataParallel sees it."""
        return loss(self, generator, **batch).mean()

    def generate(self, ids, noise, vectors=None, **flow):
        """Prompts that end in the queries (B, T), noise (B, N, C) -> what the head makes (B, N, C):
        vectors, or latents if those are its target. A regression is one step from no noise.
        vectors are of the images in the prompts."""
        states = self.backbone.query_states(ids, vectors)
        if self.config.objective == "mse":
            return sample_flow(self.head, torch.zeros_like(noise), states, steps=1)
        return sample_flow(self.head, noise, states, **flow)

    def decode(self, vectors, noise, **flow):
        """Vectors (B, N, C), noise (B, n, 4) -> pictures (B, S, S, 3) uint8."""
        return self.decode_latents(sample_flow(self.decoder, noise, vectors, **flow))

    def decode_latents(self, latents):
        """Normalised latents (B, n, 4) -> pictures (B, S, S, 3) uint8."""
        return to_images(self.vae.decode(self.normalise["vae"].inverse(latents)))
