"""Every network of nano-blip3o, the sequence format, the flow-matching loss and its sampler.

Read from top to bottom: text -> Attention -> Trunk (causal transformer) -> DiT -> flow matching
-> VAE -> TinyCLIP -> Unified (the backbone with its queries). Nothing here trains or reads files.

Dimension key, one letter per axis, used in every shape comment:
    B batch rows            T positions of a sequence      D width of a network
    N tokens of a grid      M conditioning tokens          C channels of a grid's vectors
    P prompts (B = P K)     K noise draws per prompt       H heads, E width of one head
    S side of a picture     V vocabulary                   L width of the conditioning tokens
Time runs as in the paper: t = 0 is noise, t = 1 is data.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------ text

SPECIALS = ("<pad>", "<bos>", "<user>", "<bot>", "<eos>", "<image>", "<query>")
PAD, BOS, USER, BOT, EOS, IMAGE, QUERY = range(256, 256 + len(SPECIALS))


class Tokenizer:
    """UTF-8 bytes (ids 0-255), special tokens, then whole words; lossless on any string.

    A word carries the space before it, and every text is read as if a space stood before it, so
    that "circle" has one id wherever it stands. A last "s" stands alone: what is learned of circle
    holds for circles. What is not in `words` falls back to its bytes.
    """

    def __init__(self, words: Sequence[str] = ()):
        self.words = list(words)
        self.word_ids = {word: 256 + len(SPECIALS) + i for i, word in enumerate(self.words)}
        self.pieces = {i: word.encode() for word, i in self.word_ids.items()}
        self.pieces.update((i, bytes([i])) for i in range(256))

    def __len__(self) -> int:
        return 256 + len(SPECIALS) + len(self.words)

    @classmethod
    def fit(cls, texts: Iterable[str], size: int = 768) -> "Tokenizer":
        """Keeps the `size` most frequent words that occur at least twice."""
        counts = Counter(piece for text in texts for piece in cls.split(text))
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        words = [word for word, count in ranked if count > 1 and len(word) > 1][:size]
        return cls([word for word in words if word.isprintable()])

    @staticmethod
    def split(text: str) -> list[str]:
        return re.findall(r" ?\w+?(?=s?\b)|\W", " " + text)

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in self.split(text):
            word = self.word_ids.get(piece)
            ids.extend(piece.encode("utf-8", "surrogatepass") if word is None else [word])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Inverse of `encode`; special tokens are skipped, broken UTF-8 is shown as U+FFFD."""
        raw = b"".join(self.pieces.get(int(i), b"") for i in ids)
        try:
            text = raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            text = raw.decode("utf-8", "replace")
        return text.removeprefix(" ")


def build_sequences(tokenizer, rows, tokens=64, queries=64, length=None, cut=None):
    """The one function that lays out a sequence, for every task, in training and in inference.

    A row is a list of (role, text):
        ("image", None)    `tokens` positions that image vectors will fill
        ("user", text)     <user> text
        ("bot", text)      <bot> text <eos>, the part that carries loss; text None leaves it open
        ("queries", None)  `queries` positions that the learned queries will fill
    Returns ids (B, T) and learn (B, T), true where the token is to be predicted. Rows are padded
    on the left, so that the last position is the last of each row; T is the longest row rounded
    up to 16.

    Raises ValueError if a text has more than `length` tokens, unless there is a Counter `cut`: then
    its end is dropped, never within a character, and counted by role.
    """
    begins = {"user": [USER], "bot": [BOT], "image": [IMAGE] * tokens, "queries": [QUERY] * queries}
    built = []
    for row in rows:
        ids, learn = [BOS], [False]
        for role, text in row:
            body = tokenizer.encode(text) if text is not None else []
            if length is not None and len(body) > length:
                if cut is None:
                    raise ValueError(f"a text of {len(body)} tokens, at most {length} are possible")
                cut[role] += 1
                end = length
                while body[end] >> 6 == 2:  # a byte within a character
                    end -= 1
                body = body[:end]
            body = begins[role] + body + [EOS] * (role == "bot" and text is not None)
            ids += body
            learn += [role == "bot" and i > 0 for i in range(len(body))]  # <bot> itself is given
        built.append((ids, learn))
    # whole multiples of 16: a compiled network meets few different lengths
    longest = math.ceil(max(len(ids) for ids, _ in built) / 16) * 16
    ids = torch.tensor([[PAD] * (longest - len(ids)) + ids for ids, _ in built])  # (B, T)
    learn = torch.tensor([[False] * (longest - len(row)) + row for _, row in built])  # (B, T)
    return ids, learn


# ------------------------------------------------------------------------------- building blocks


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(E)) v: (B, H, T, E), (B, H, M, E), (B, H, M, E) -> (B, H, T, E).

    mask (B, 1, T, M) is true where a query may look. Compiled for a CPU, it is the plain formula:
    in bf16 a step takes twice as long with the fused kernel.
    """
    if q.device.type != "cpu" or not torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, T, M)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -math.inf)  # in place: nothing else needs them
    return scores.softmax(-1) @ v


def rotary(positions: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions: (T,) -> two of (T, E / 2), in float32."""
    rates = 10_000.0 ** (-torch.arange(head_width // 2, device=positions.device) * 2 / head_width)
    angles = positions.float()[:, None] * rates
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (x_i, x_{i + E/2}) by their position's angle: (B, H, T, E) -> same."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)  # two of (B, H, T, E / 2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)


class Attention(nn.Module):
    """Multi-head attention with QK-norm: self-attention, or cross-attention to `context`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)

    def forward(self, x, context=None, mask=None, rope=None, cache=None) -> Tensor:
        """(B, T, D), context of `read` (two of (B, H, M, E)), None = x itself -> (B, T, D).

        cache is a list, empty or [keys, values] of earlier positions; it is brought up to date.
        """
        q = self.q_norm(rearrange(self.q(x), "b t (h e) -> b h t e", h=self.heads))
        k, v = self.read(x) if context is None else context
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        if cache is not None:
            cache[:] = [k, v]
        return self.out(rearrange(attention(q, k, v, mask), "b h t e -> b t (h e)"))

    def read(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what is looked at: (B, M, D) -> two of (B, H, M, E)."""
        k, v = rearrange(self.kv(context), "b m (s h e) -> s b h m e", s=2, h=self.heads)
        return self.k_norm(k), v


class SwiGLU(nn.Module):
    """down(silu(gate) * up): (B, T, D) -> (B, T, D), hidden width 8/3 D rounded up to 32."""

    def __init__(self, width: int):
        super().__init__()
        hidden = math.ceil(width * 8 / 3 / 32) * 32
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # two of (B, T, 8/3 D)
        return self.down(F.silu(gate) * up)


class Stack(nn.Module):
    """Blocks one after another. With `checkpoint` their activations are not kept but computed
    again in the backward pass: a third more time, a fraction of the memory."""

    checkpoint = False

    def through(self, block: nn.Module, *inputs) -> Tensor:
        if not (self.checkpoint and torch.is_grad_enabled()):
            return block(*inputs)

        def again(*inputs):  # on copies of lists: a cache must not grow twice
            return block(*(list(x) if isinstance(x, list) else x for x in inputs))

        return checkpoint(again, *inputs, use_reentrant=False)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


class TrunkBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); both outputs start at zero."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width)
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(self.mlp.down.weight)

    def forward(self, x, mask=None, rope=None, cache=None) -> Tensor:
        """(B, T, D) -> (B, T, D); mask, rope and cache as in `Attention`."""
        x = x + self.attention(self.attention_norm(x), mask=mask, rope=rope, cache=cache)
        return x + self.mlp(self.mlp_norm(x))


class Trunk(Stack):
    """Causal transformer over embeddings; the backbone, and the text tower of the tiny CLIP."""

    def __init__(self, width: int, depth: int, heads: int):
        super().__init__()
        self.head_width = width // heads
        self.blocks = nn.ModuleList(TrunkBlock(width, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, x: Tensor, valid: Tensor, caches: list | None = None) -> Tensor:
        """Embeddings (B, T, D), valid (B, past + T) false at padding -> states (B, T, D).

        caches is None, or one list for each block (see `Attention`), made by `new_caches`.
        """
        total, new = valid.shape[1], x.shape[1]
        keys = torch.arange(total, device=x.device)
        queries = keys[total - new :]  # positions of x among all of them
        causal = keys[None, :] <= queries[:, None]  # (T, past + T)
        # a padded position sees itself: a softmax over nothing would be NaN
        own = keys[None, :] == queries[:, None]
        mask = (causal & valid[:, None, None, :]) | own  # (B, 1, T, past + T)
        rope = rotary(queries, self.head_width)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            x = self.through(block, x, mask, rope, cache)
        return self.norm(x)

    def new_caches(self) -> list[list]:
        return [[] for _ in self.blocks]


# ------------------------------------------------------------------------------------------- DiT


def sincos_2d(side: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions of a square grid: (side * side, width), float32."""
    cos, sin = rotary(torch.arange(side), width // 2)
    axis = torch.cat([sin, cos], dim=1)  # (side, width / 2)
    rows, columns = axis.repeat_interleave(side, 0), axis.repeat(side, 1)  # two of (N, width / 2)
    return torch.cat([rows, columns], dim=1)


class DiTBlock(nn.Module):
    """adaLN-Zero block (DiT, section 3.2): self-attention, cross-attention if asked for, MLP."""

    def __init__(self, width: int, heads: int, cross: bool):
        super().__init__()
        self.attention = Attention(width, heads)
        self.cross = Attention(width, heads) if cross else None
        self.mlp = SwiGLU(width)
        self.modulation = nn.Linear(width, (9 if cross else 6) * width)

    def forward(self, x: Tensor, time: Tensor, cond: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, N, D), (B, D), two of (P, H, M, E) -> (B, N, D); the K draws of a prompt together."""
        mods = list(self.modulation(time)[:, None].chunk(9 if self.cross else 6, dim=-1))
        x = x + mods[0] * self.attention(modulate(x, *mods[1:3]))
        if self.cross is not None:
            # all draws of a prompt look at its M tokens at once: keys and values are made once
            h = rearrange(modulate(x, *mods[7:9]), "(p k) n d -> p (k n) d", p=len(cond[0]))
            h = rearrange(self.cross(h, cond), "p (k n) d -> (p k) n d", n=x.shape[1])
            x = x + mods[6] * h
        return x + mods[3] * self.mlp(modulate(x, *mods[4:6]))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class DiT(Stack):
    """Diffusion transformer over a square grid of vectors; one class for every flow head.

    shape     (N, C) of the grid; context is L, the width of the conditioning tokens
    patch     groups patch x patch neighbours of the grid into one token
    cross     true: the condition is read by cross-attention, in any order (the queries' states);
              false: it lies on a square grid of its own, is resized to the token grid and added,
              for a decoder whose condition lies where the pixels lie
    predicts  "x" (data) or "v" (velocity); see `velocity`
    recalls   reads an earlier guess of the data beside x_t (self-conditioning, arXiv 2208.04202)
    """

    def __init__(
        self, shape, context, width, depth, heads, patch=1, cross=True, predicts="x", recalls=False
    ):
        super().__init__()
        tokens, channels = self.shape = shape
        side = math.isqrt(tokens) // patch  # of the token grid
        self.patches = dict(r=side, c=side, p=patch, q=patch)
        self.cross, self.predicts, self.recalls = cross, predicts, recalls
        self.embed = nn.Linear((1 + recalls) * channels * patch**2, width)
        self.time = mlp(256, width, width)
        self.cond_embed = nn.Sequential(nn.Linear(context, width), nn.RMSNorm(width))
        self.pooled = nn.Linear(width, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, cross) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, channels * patch**2)
        self.register_buffer("positions", sincos_2d(side, width), persistent=False)
        # adaLN-Zero: every block is the identity and the prediction 0, whatever the defaults did
        for layer in [self.modulation, self.out, *(block.modulation for block in self.blocks)]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def read(self, cond: Tensor) -> tuple[Tensor, list, Tensor]:
        """What all steps of a sampler need of a condition (P, M, L), made once: (P, D) that joins
        the time, each block's keys and values, and (P, N, D) that joins the tokens; None = none."""
        cond = self.cond_embed(cond)
        contexts = [block.cross.read(cond) if block.cross else None for block in self.blocks]
        grid = None if self.cross else resize_grid(cond, len(self.positions))
        return self.pooled(cond.mean(1)), contexts, grid

    def forward(self, x: Tensor, t: Tensor, cond, guess: Tensor | None = None) -> Tensor:
        """x (B, N, C) at times t (B,), condition (P, M, L) with B = P K -> (B, N, C).

        cond may also be what `read` made of it; guess (B, N, C) is what an earlier call made of
        the data, None is a guess of zeros.
        """
        pooled, contexts, grid = self.read(cond) if isinstance(cond, Tensor) else cond
        if self.recalls:
            x = torch.cat([x, torch.zeros_like(x) if guess is None else guess], dim=-1)
        draws = len(x) // len(pooled)
        h = rearrange(x, "b (r p c q) ch -> b (r c) (p q ch)", **self.patches)
        time = F.silu(self.time(timestep_features(t)) + pooled.repeat_interleave(draws, 0))
        h = self.embed(h) + self.positions
        if grid is not None:
            h = h + grid.repeat_interleave(draws, 0)
        for block, context in zip(self.blocks, contexts):
            h = self.through(block, h, time, context)
        h = self.out(modulate(h, *self.modulation(time)[:, None].chunk(2, dim=-1)))
        return rearrange(h, "b (r c) (p q ch) -> b (r p c q) ch", **self.patches)


def timestep_features(t: Tensor) -> Tensor:
    """Sine-cosine features of times in [0, 1]: (B,) -> (B, 256), in float32."""
    return torch.cat(rotary(t * 1000, 256), dim=-1)


def resize_grid(grid: Tensor, tokens: int) -> Tensor:
    """A square grid at another resolution, nearest or averaged: (B, M, D) -> (B, tokens, D)."""
    resize = F.interpolate if tokens > grid.shape[1] else F.adaptive_avg_pool2d
    square = grid.mT.unflatten(2, [math.isqrt(grid.shape[1])] * 2)  # (B, D, rows, columns)
    return resize(square, math.isqrt(tokens)).flatten(2).mT


# --------------------------------------------------------------------------------- flow matching


def velocity(dit: nn.Module, x_t: Tensor, t: Tensor, cond, guess=None) -> Tensor:
    """The velocity that `dit` stands for: (B, N, C), (B,), cond and guess as in `DiT` -> (B, N, C).

    If it predicts the data x, the velocity is (x - x_t) / (1 - t); the floor of 0.05 keeps the
    loss finite at t = 1, and loss and sampler share it, so that it costs no bias.
    """
    out = dit(x_t, t, cond, guess)
    if dit.predicts == "v":
        return out
    return (out - x_t) / (1 - t).clamp_min(0.05)[:, None, None]


def flow_loss(dit: nn.Module, x: Tensor, noise: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """Flow matching (paper, section 3.2): the mean of |velocity(x_t) - (x - noise)|^2.

    x_t = (1 - t) noise + t x: data and noise (B, N, C), t (B,), cond (P, M, L) -> losses (B,).
    A net that recalls gets, for every second prompt, the guess of a first call without one. For
    one that does not, t = 0 and no noise make it a regression: the squared error of what the net
    makes of cond.
    """
    at = t[:, None, None]
    x_t, guess = torch.lerp(noise, x, at), None
    if dit.recalls:
        first = torch.arange(len(x), device=x.device).view(len(cond), -1)[::2].flatten()
        with torch.no_grad():
            made = x_t[first] + (1 - at[first]) * velocity(dit, x_t[first], t[first], cond[::2])
            guess = torch.zeros_like(x).index_copy(0, first, made)
    return (velocity(dit, x_t, t, cond, guess) - (x - noise)).float().square().mean((1, 2))


def spread_times(rows: Tensor, count: int, draws: int, offset: float) -> Tensor:
    """Logit-normal times of some rows (b,) of a batch of `count`, `draws` for each -> (b K,).

    They are evenly spread over the batch and over the draws of each row, with one random offset in
    0..1 for all: each time has the right distribution, and the loss less variance.
    """
    ranks = rows[:, None] + count * torch.arange(draws)  # (b, K)
    share = (ranks.flatten() / (count * draws) + offset) % 1
    return torch.special.ndtri(share.clamp(1e-4, 1 - 1e-4)).sigmoid()


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Moves times towards the noise (shift > 1), which large grids need (SD3, RAE): [0,1]->[0,1].

    With s = 1 - t the share of noise: s' = shift s / (1 + (shift - 1) s).
    """
    s = 1 - t
    return 1 - shift * s / (1 + (shift - 1) * s)


@torch.no_grad()
def sample_flow(dit, noise, cond, steps=10, guidance=1.0, shift=1.0, heun=False, fresh=None):
    """Integrates dx/dt = velocity from t = 0 to t = 1: noise (B, N, C), cond (B, M, L) -> data.

    Guidance is u + s (c - u) with u under the condition zero; s = 1 is off and costs nothing. Heun
    takes two evaluations a step, and one at the last. With `fresh`, a source of noise (B, N, C),
    each step goes on from the data it predicts under new noise, as consistency models do: early
    mistakes are forgotten, at the price of a distribution somewhat too narrow.
    """

    def field(x: Tensor, t: Tensor, guess: Tensor) -> Tensor:
        t = t.expand(len(x))
        if guidance == 1:
            return velocity(dit, x, t, cond, guess)
        x, t, guess = (torch.cat([each, each]) for each in (x, t, guess))
        c, u = velocity(dit, x, t, cond, guess).chunk(2)  # two of (B, N, C)
        return u + guidance * (c - u)

    cond = dit.read(cond if guidance == 1 else torch.cat([cond, 0 * cond]))
    times = shift_time(torch.linspace(0, 1, steps + 1, device=noise.device), shift)
    x, data = noise, torch.zeros_like(noise)
    for i, (t, after) in enumerate(zip(times[:-1], times[1:])):
        v = field(x, t, data)
        if heun and i < steps - 1:
            v = (v + field(x + (after - t) * v, after, data)) / 2
        data = x + (1 - t) * v
        noise = x - t * v if fresh is None else fresh()
        x = torch.lerp(noise, data, after)
    return x


# ------------------------------------------------------------------------- pictures and features


def to_pixels(images: Tensor) -> Tensor:
    """uint8 pictures (B, S, S, 3) -> floats in [-1, 1] (B, 3, S, S)."""
    return rearrange(images, "b h w c -> b c h w").float() / 127.5 - 1


def to_images(pixels: Tensor) -> Tensor:
    """Inverse of `to_pixels`, rounded and clamped: (B, 3, S, S) -> uint8 (B, S, S, 3)."""
    images = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(images, "b c h w -> b h w c")


class Treatment(nn.Module):
    """Fixed affine map of vectors to zero mean and unit variance, and back.

    "standardise" scales each channel; "whiten" turns to the principal axes first, and may keep only
    the `channels` strongest. Flow matching needs data on the scale of its noise.
    """

    def __init__(self, raw_channels: int, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(raw_channels))
        self.register_buffer("forth", torch.eye(raw_channels, channels))
        self.register_buffer("back", torch.eye(channels, raw_channels))

    def fit(self, raw: Tensor, mode: str = "standardise") -> None:
        """Statistics of vectors (..., raw_channels), in float64 on the CPU."""
        flat = raw.reshape(-1, raw.shape[-1]).cpu().double()  # (samples, raw_channels)
        mean, channels = flat.mean(0), self.forth.shape[1]
        axes, scale = torch.eye(flat.shape[1], dtype=torch.double), flat.std(0)
        if mode == "whiten":
            values, axes = torch.linalg.eigh(torch.cov(flat.T))
            axes, scale = axes.flip(1), values.flip(0).clamp_min(0).sqrt()
        axes, scale = axes[:, :channels], scale[:channels].clamp_min(1e-6)
        self.mean.copy_(mean)
        self.forth.copy_(axes / scale)
        self.back.copy_((axes * scale).T)

    def forward(self, raw: Tensor) -> Tensor:
        return (raw - self.mean) @ self.forth

    def inverse(self, treated: Tensor) -> Tensor:
        return treated @ self.back + self.mean


class ResidualConv(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(self.norm(x)))))


class VAE(nn.Module):
    """Compact convolutional VAE, f = 4: pixels (B, 3, S, S) <-> latents (B, (S/4)^2, 4).

    All convolutions run at a quarter of the resolution; folding 4 x 4 pixels into channels does
    the rest, which is what makes it cheap.
    """

    factor = 4

    def __init__(self, width: int, depth: int, channels: int = 4):
        super().__init__()
        folded = 3 * self.factor**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(self.factor),
            nn.Conv2d(folded, width, 3, padding=1),
            *(ResidualConv(width) for _ in range(depth)),
            nn.Conv2d(width, 2 * channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            *(ResidualConv(width) for _ in range(depth)),
            nn.Conv2d(width, folded, 3, padding=1),
            nn.PixelShuffle(self.factor),
        )

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(pixels).chunk(2, dim=1)  # two of (B, C, S/4, S/4)
        return mean, log_variance.clamp(-20, 10)

    def encode(self, pixels: Tensor) -> Tensor:
        """The mean of the posterior: (B, 3, S, S) -> (B, N, C)."""
        return rearrange(self.moments(pixels)[0], "b c h w -> b (h w) c")

    def decode(self, latents: Tensor) -> Tensor:
        """(B, N, C) -> (B, 3, S, S)."""
        side = math.isqrt(latents.shape[1])
        return self.decoder(rearrange(latents, "b (h w) c -> b c h w", h=side))

    def forward(self, pixels: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Losses (B,), noise (B, 4, S/4, S/4): pixel error, KL divergence to a unit Gaussian."""
        mean, log_variance = self.moments(pixels)
        latents = mean + noise * (log_variance / 2).exp()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return {"error": pixel_error(self.decoder(latents), pixels), "kl": kl.mean((1, 2, 3))}


def pixel_error(made: Tensor, pixels: Tensor) -> Tensor:
    """Absolute error, for sharp edges, plus squared error, for colours: (B, 3, S, S) -> (B,)."""
    error = made - pixels
    return (error.abs() + 4 * error.square()).mean((1, 2, 3))


EDGE_BINS = 8


def edge_histograms(pixels: Tensor, patch: int) -> Tensor:
    """How edges are oriented in the 3 x 3 patches around each patch, HOG as the target of MaskFeat
    (arXiv 2112.09133): (B, 3, S, S) -> (B, N, EDGE_BINS). Bin i counts gradients at i / EDGE_BINS
    of half a turn; a row's length nears 1 where edges are many and strong, 0 where all is flat."""
    padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    channel = (dx.square() + dy.square()).argmax(1, keepdim=True)  # the one with the clearest edge
    dx, dy = dx.gather(1, channel), dy.gather(1, channel)  # (B, 1, S, S)
    turn = torch.atan2(dy, dx) / math.pi * EDGE_BINS  # half a turn is the same edge
    away = turn - torch.arange(EDGE_BINS, device=pixels.device)[:, None, None]  # (B, bins, S, S)
    away = (away + EDGE_BINS / 2) % EDGE_BINS - EDGE_BINS / 2
    votes = torch.hypot(dx, dy) * (1 - away.abs()).clamp_min(0)  # for the two nearest bins
    means = F.avg_pool2d(votes, 3 * patch, patch, padding=patch).flatten(2).mT  # (B, N, bins)
    return means / (means.norm(dim=-1, keepdim=True) + 0.01)


class TinyCLIP(nn.Module):
    """Stand-in where pretrained weights can't be had: a timm ViT, contrastive against captions.

    Its vectors are a narrow learned bottleneck of the tower's tokens. A contrastive loss alone
    forgets what captions leave out, and a mean over local evidence suffices for it. So each vector
    must also rebuild its patch's pixels, and tell the edges around it: only then can the shape of
    an object be read from the vector in its middle. A departure from CLIP, which has scale instead.
    """

    def __init__(self, side, shape, width, depth, heads, vocabulary: int, noise: float):
        """shape (N, C) of the vectors; noise is added to them before the losses read them."""
        super().__init__()
        tokens, channels = shape
        patch = side // math.isqrt(tokens)
        size = dict(img_size=side, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads)
        # the tokens are used, and so the norm belongs on them
        ending = dict(num_classes=0, class_token=False, global_pool="avg", fc_norm=False)
        self.tower = timm.create_model("vit_tiny_patch16_224", **size, **ending)
        self.noise, self.patch = noise, patch
        self.bottleneck = nn.Linear(width, channels)
        self.image_head = mlp(channels, width, width)
        self.pixel_head = mlp(channels, 4 * width, 3 * patch**2)
        self.edge_head = mlp(channels, width, EDGE_BINS)
        self.words = nn.Embedding(vocabulary, width)
        self.text = Trunk(width, 2, heads)
        self.text_head = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        nn.init.normal_(self.words.weight, std=0.5)

    def vectors(self, pixels: Tensor) -> Tensor:
        """The image's vectors, each of unit variance: (B, 3, S, S) -> (B, N, C)."""
        tokens = self.bottleneck(self.tower.forward_features(pixels))
        return F.layer_norm(tokens, tokens.shape[-1:])

    def embed_images(self, vectors: Tensor) -> Tensor:
        return F.normalize(self.image_head(vectors).mean(1), dim=-1)  # (B, D)

    def embed_texts(self, ids: Tensor) -> Tensor:
        states = self.text(self.words(ids), ids != PAD)
        return F.normalize(self.text_head(states[:, -1]), dim=-1)  # (B, D)

    def forward(self, pixels, ids, same, noise: Tensor | float = 0.0) -> dict[str, Tensor]:
        """Losses of pictures (B, 3, S, S) and captions (B, T); same (B, B) marks equal captions.

        noise (B, N, C) is scaled by `self.noise`. One contrastive loss, the others for each row.
        """
        vectors = self.vectors(pixels) + self.noise * noise
        scale = self.log_scale.exp().clamp(max=100)
        logits = scale * self.embed_images(vectors) @ self.embed_texts(ids).T  # (B, B)
        target = same / same.sum(1, keepdim=True)  # symmetric, so it serves both directions
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        missed = self.edge_head(vectors) - edge_histograms(pixels, self.patch)  # (B, N, bins)
        edges = missed.square().sum(-1).mean(1)
        error = pixel_error(self.rebuild(vectors), pixels)
        return {"contrastive": contrastive, "pixels": error, "edges": edges}

    def rebuild(self, vectors: Tensor) -> Tensor:
        """The pixel head's picture, a blurred preview: (B, N, C) -> (B, 3, S, S)."""
        h, side = self.pixel_head(vectors), math.isqrt(vectors.shape[1])
        return rearrange(h, "b (r k) (c p q) -> b c (r p) (k q)", r=side, c=3, p=self.patch)


# -------------------------------------------------------------------------------- the backbone


class Unified(nn.Module):
    """The backbone: reads text and image vectors, writes text, and turns a prompt into queries.

    One causal transformer (paper, section 2): understanding puts an image's vectors before the
    text; generation puts the learned queries after the prompt, whose last-layer states condition
    the flow head.
    """

    def __init__(self, vocabulary: int, shape, queries: int, width: int, depth: int, heads: int):
        super().__init__()
        tokens, channels = shape  # (N, C) of an image's vectors
        self.words = nn.Embedding(vocabulary, width)
        self.projector = mlp(channels, width, width)
        self.places = nn.Parameter(torch.randn(tokens, width) * 0.5)
        # small beside what they read: else their states differ by query and hardly by prompt
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.trunk = Trunk(width, depth, heads)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.words.weight, std=0.5)
        nn.init.zeros_(self.head.weight)

    def embed(self, ids: Tensor, vectors: Tensor | None = None) -> Tensor:
        """ids (B, T) and the vectors of a row's images (B, N, C) in order -> (B, T, D)."""
        x = fill(self.words(ids), ids == QUERY, self.queries.expand(len(ids), -1, -1))
        if vectors is None:
            return x
        return fill(x, ids == IMAGE, self.projector(vectors) + self.places)

    def states(self, ids: Tensor, vectors: Tensor | None = None) -> Tensor:
        return self.trunk(self.embed(ids, vectors), ids != PAD)  # (B, T, D)

    def forward(self, ids: Tensor, learn: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Cross-entropy of the tokens marked in learn (B, T), each from those before it -> (B,).

        It is the mean over a row's tokens: rows count alike, however a batch is divided.
        """
        logits = self.head(self.states(ids, vectors)[:, :-1])  # (B, T - 1, V)
        learn, truth = learn[:, 1:], ids[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), truth.flatten(), reduction="none")
        return (losses.view_as(learn) * learn).sum(1) / learn.sum(1).clamp_min(1)

    def repeat(self, ids: Tensor, words: int = 3) -> Tensor:
        """How badly the queries, which end every row, repeat its prompt: (B, T) -> losses (B,).

        The state at the last query is to name the prompt's last words, the one before it those
        before, and so on. The head that all words share makes it a code in which "red" is the same
        beside any noun: a flow head that reads it can draw pairs that it has never seen.
        """
        count, losses, kept = len(self.queries), 0, 0
        logits = self.head(self.states(ids)[:, -count:]).mT.float()  # (B, V, Q)
        ids = F.pad(ids, (count + words, 0), value=PAD)
        for back in range(words):
            said = ids[:, -2 * count - back : -count - back]  # (B, Q)
            losses = losses + F.cross_entropy(logits, said, reduction="none", ignore_index=PAD)
            kept = kept + (said != PAD)
        return losses.sum(1) / kept.sum(1).clamp_min(1)

    def query_states(self, ids: Tensor) -> Tensor:
        """States at the queries, which end every row: (P, T) -> (P, M, D).

        The frozen prefix needs no gradient: it is read once into the caches, and the queries,
        which are learned, follow. With a trainable backbone use `states`.
        """
        count = len(self.queries)
        caches, valid = self.trunk.new_caches(), ids != PAD
        with torch.no_grad():
            self.trunk(self.embed(ids[:, :-count]), valid[:, :-count], caches)
        return self.trunk(self.queries.expand(len(ids), -1, -1), valid, caches)

    @torch.no_grad()
    def write(self, ids: Tensor, vectors: Tensor | None = None, limit: int = 64) -> list[list[int]]:
        """Continues rows (B, T) that end in an open <bot> until <eos> or `limit` tokens."""
        caches, valid = self.trunk.new_caches(), ids != PAD
        x, written, done = self.embed(ids, vectors), [], torch.zeros(len(ids), dtype=torch.bool)
        for _ in range(limit):
            logits = self.head(self.trunk(x, valid, caches)[:, -1]).float().cpu()  # (B, V)
            token = logits.argmax(-1).masked_fill(done, PAD)
            done |= token == EOS
            written.append(token.masked_fill(done, PAD))
            if done.all():
                break
            token = token.to(ids.device)
            x = self.words(token)[:, None]
            valid = torch.cat([valid, (token != PAD)[:, None]], dim=1)
        rows = torch.stack(written, dim=1).tolist()
        return [[token for token in row if token != PAD] for row in rows]


def fill(x: Tensor, slots: Tensor, values: Tensor) -> Tensor:
    """Puts values (B, n, D), in order and again from the start, where slots (B, T) is true."""
    order = (slots.cumsum(1) - 1).clamp_min(0) % values.shape[1]  # (B, T)
    chosen = values.gather(1, order[..., None].expand(-1, -1, values.shape[-1]))
    return torch.where(slots[..., None], chosen, x)


# ------------------------------------------------------------------------------ the whole system


class BLIP3o(nn.Module):
    """All parts under one roof: CLIP tower, VAE, backbone, flow head, decoder, and statistics.

    `config` has the fields of train.Config that are named below. With a named timm tower `clip`
    is None: its features come with the prepared set, `raw_channels` wide.
    """

    def __init__(self, config, vocabulary: int, side: int, raw_channels: int | None = None):
        super().__init__()
        c, vectors, latents = config, (config.tokens, config.channels), (side // VAE.factor) ** 2

        def size(width, depth):
            return width, depth, width // c.head_dim

        towers = (side, vectors, *size(c.clip_width, c.clip_depth), vocabulary, c.clip_noise)
        self.clip = TinyCLIP(*towers) if raw_channels is None else None
        self.treatment = Treatment(raw_channels or c.channels, c.channels)
        self.vae = VAE(c.vae_width, c.vae_depth)
        self.latent_treatment = Treatment(4, 4)
        self.target, self.objective = c.target, c.objective
        self.backbone = Unified(vocabulary, vectors, c.queries, *size(c.width, c.depth))
        grid, recalls = vectors if c.target == "clip" else (latents, 4), c.objective == "flow"
        flow = {"patch": c.dit_patch, "predicts": c.predicts, "recalls": c.recalls and recalls}
        self.head = DiT(grid, c.width, *size(c.dit_width, c.dit_depth), **flow)
        decoder, patch = size(c.decoder_width, c.decoder_depth), c.decoder_patch
        self.decoder = DiT((latents, 4), c.channels, *decoder, patch=patch, cross=False)

    def imagine(self, ids: Tensor, noise: Tensor, **flow) -> Tensor:
        """Prompts that end in the queries (B, T), noise (B, N, C) -> what the head makes (B, N, C):
        vectors, or latents if those are its target. A regression is one step from no noise and has
        no guidance, since what is wanted is what the head has learned."""
        if self.objective == "mse":
            noise, flow = 0 * noise, flow | {"steps": 1, "guidance": 1.0}
        return sample_flow(self.head, noise, self.backbone.query_states(ids), **flow)

    def paint(self, vectors: Tensor, noise: Tensor, **flow) -> Tensor:
        """Vectors (B, N, C), noise (B, n, 4) -> pictures (B, S, S, 3) uint8."""
        return self.develop(sample_flow(self.decoder, noise, vectors, **flow))

    def develop(self, latents: Tensor) -> Tensor:
        """Treated latents (B, n, 4) -> pictures (B, S, S, 3) uint8."""
        return to_images(self.vae.decode(self.latent_treatment.inverse(latents)))
