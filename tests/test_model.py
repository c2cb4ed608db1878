"""Laws of the networks, of the sequence format, of flow matching and of its sampler."""

import math
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

import model as M

CONFIG = dict(target="clip", objective="flow", predicts="x", self_conditioning=True)
CONFIG |= dict(tokens=4, queries=3, channels=6, depth=2, vae_width=16)
CONFIG |= dict.fromkeys(["width", "clip_width", "head_width", "decoder_width"], 32)
CONFIG |= dict.fromkeys(["head_depth", "head_patch", "decoder_depth"], 1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def generator():
    return torch.Generator().manual_seed(1)


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{"rtol": 1e-4, "atol": 1e-4, **tolerance})


def lively(net):
    """The net with noise on every weight: parts that start at zero would hide a broken law."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return net.requires_grad_(False)


def build(part, *arguments, **changes):
    return lively(part(SimpleNamespace(**{**CONFIG, **changes}), *arguments))


def make_dit(**changes):
    settings = dict(shape=(16, 6), context=5, width=32, depth=2, patch=2, cross=True)
    settings |= dict(predicts="x", self_conditioning=False)
    return M.DiT(**{**settings, **changes}).requires_grad_(False)


def make_ids(*parts, queries=3):
    texts = ("a circle", "two red squares and a triangle", "")
    rows = [[(role, text if role == "user" else None) for role in parts] for text in texts]
    return M.build_sequences(M.Tokenizer(), rows, tokens=4, queries=queries)[0]


def alone(row):
    return row[row != M.PAD][None]  # a row of ids without its padding, as a batch of one


# ------------------------------------------------------------------------------------------ text


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text("red é,\n1_s") | st.from_regex("( red| circles?)+"))
def test_tokenizer_is_lossless(text):
    tokenizer = M.Tokenizer([" red", " circle", "circle", " é"])
    ids = tokenizer.encode(text)
    assert tokenizer.decode([M.BOS, *ids, M.EOS]) == text
    assert all(0 <= i < len(tokenizer) for i in ids)


def test_frequent_words_are_one_token_and_all_else_bytes():
    """A plural s stands alone. What occurs once, or is one letter long, is no word."""
    assert M.Tokenizer.split("two circles, is") == [" two", " circle", "s", ",", " i", "s"]
    texts = ["red circle", "red squares", "a red circle", "an odd red circle", "a square", "b,c,"]
    assert M.Tokenizer.fit(texts).words == [" red", " circle", " a", " square"]
    tokenizer = M.Tokenizer.fit(texts, size=2)
    assert tokenizer.words == [" red", " circle"] and len(tokenizer) == 265
    assert tokenizer.encode("red é circles") == [263, *" é".encode(), 264, ord("s")]


SEE, ASK, TELL = [257, 261, 261], [258, 263], [259, 264, 260]  # red is 263, circle 264
GOLDEN = {  # task -> its row, the ids, and where of the 16 positions something is learned
    "understand": ("image user bot", [*SEE, *ASK, *TELL], [14, 15]),
    "answer": ("image user open", [*SEE, *ASK, 259], []),
    "generate": ("user queries", [257, *ASK, 262, 262], []),
    "edit": ("image user queries", [*SEE, *ASK, 262, 262], []),
    "chat": ("user bot user bot", [257, *ASK, *TELL, *ASK, *TELL], [9, 10, 14, 15]),
    "told": ("user given user bot", [257, *ASK, *TELL, *ASK, *TELL], [14, 15]),
}


@pytest.mark.parametrize("task", GOLDEN)
def test_golden_sequences(task):
    names, golden, learned = GOLDEN[task]
    texts = {"user": "red", "bot": "circle", "given": "circle"}
    row = [(n.replace("open", "bot"), texts.get(n)) for n in names.split()]
    tokenizer = M.Tokenizer([" red", " circle"])
    ids, learn = M.build_sequences(tokenizer, [row, [("user", "red")]], tokens=2, queries=2)
    assert ids.tolist() == [[256] * (16 - len(golden)) + golden, [256] * 13 + [257, *ASK]]
    assert learn.tolist() == [[i in learned for i in range(16)], [False] * 16]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(1, 30))
def test_long_texts_are_cut_and_rows_padded_to_a_multiple_of_16(lengths, longest):
    rows = [[("bot", "x" * length)] for length in lengths]
    ids, learn = M.build_sequences(M.Tokenizer(), rows, 2, 2, longest)
    said = [list(b" " + b"x" * length)[:longest] for length in lengths]
    assert [alone(row)[0].tolist() for row in ids] == [[257, 259, *text, 260] for text in said]
    assert ids.shape == learn.shape == (len(rows), 16 * -(-(max(map(len, said)) + 3) // 16))
    assert learn.sum(1).tolist() == [len(text) + 1 for text in said]


# -------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("masked, training", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_attention_is_the_formula(masked, training):
    """With gradients as written, without them by torch's fused kernel."""
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    mask = torch.rand(2, 1, 5, 7) < (0.5 if masked else 2)
    mask[..., 0] = True  # nobody looks at nothing
    weights = torch.einsum("bhte,bhme->bhtm", q, k).div(math.sqrt(8)).exp() * mask
    wanted = torch.einsum("bhtm,bhme->bhte", weights / weights.sum(-1, keepdim=True), v)
    with torch.set_grad_enabled(bool(training)):
        close(M.attention(q, k, v, mask if masked else None), wanted)


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 6, 8)
    turns = torch.arange(6)[:, None] * torch.tensor([1, 0.1, 0.01, 0.001])  # 10 000^(-2 i / 8)
    wanted = torch.complex(q[..., :4], q[..., 4:]) * torch.exp(1j * turns)
    here, there = M.rotary(torch.arange(6), 8), M.rotary(torch.arange(6) + 100, 8)
    close(M.rotate(q, here), torch.cat([wanted.real, wanted.imag], -1))
    close(M.rotate(q, here) @ M.rotate(k, here).mT, M.rotate(q, there) @ M.rotate(k, there).mT)


def test_swiglu_by_hand():
    layer, x = lively(M.SwiGLU(32)), torch.randn(2, 3, 32)
    gate, up = x @ layer.gate_up.weight[:96].T, x @ layer.gate_up.weight[96:].T  # 8/3 is 85.3
    close(layer(x), (gate / (1 + (-gate).exp()) * up) @ layer.down.weight.T)


def test_a_later_token_changes_no_earlier_state():
    trunk, x, valid = lively(M.Trunk(32, 1)), torch.randn(2, 9, 32), torch.ones(2, 9).bool()
    before = trunk(x, valid)
    swapped = trunk(x[:, [1, 0, *range(2, 9)]], valid)  # a block sees order too
    x[:, 5] += 1
    change = (before - trunk(x, valid)).abs().amax(-1)
    assert not change[:, :5].any() and (change[:, 5:] > 1e-4).all()
    assert ((before - swapped).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("training", [False, True])
def test_padding_and_caches_change_no_state(training, monkeypatch):
    """Nor does what stands in the padding; a first piece may be nothing but padding."""
    monkeypatch.setattr(torch, "is_grad_enabled", lambda: training)  # the two ways of `attention`
    trunk, x, valid = lively(M.Trunk(32, 2)), torch.randn(3, 9, 32), torch.ones(3, 9).bool()
    valid[1, :4] = valid[2, :8] = False
    x[2, :8] = 100.0
    states, caches, begin = trunk(x, valid), [[], []], 0
    assert states.isfinite().all()
    close(states[1, 4:], trunk(x[1:2, 4:], valid[1:2, 4:])[0])
    close(states[2, 8:], trunk(x[2:, 8:], valid[2:, 8:])[0])
    for end in (3, 4, 9):
        close(trunk(x[:, begin:end], valid[:, :end], caches), states[:, begin:end])
        begin = end


def test_what_is_new_adds_nothing():
    h, time, states = torch.randn(4, 4, 32), torch.randn(4, 32), torch.randn(4, 4, 32)
    for dit in (make_dit(cross=False), make_dit(cross=True)):
        assert all(torch.equal(block(h, time, states), h) for block in dit.blocks)
        assert not dit(torch.randn(4, 16, 6), torch.rand(4), torch.randn(4, 4, 5)).any()
    assert torch.equal(M.TrunkBlock(32)(h, None, None), h)
    assert torch.equal(M.ResidualConv(32)(h.view(1, 32, 4, 4)), h.view(1, 32, 4, 4))


@pytest.mark.parametrize("cross, draws", [(True, 3), (True, 1), (False, 1)])
def test_each_draw_of_a_batch_is_that_draw_alone(cross, draws):
    dit = lively(make_dit(cross=cross, self_conditioning=True))
    x, t, cond = torch.randn(6, 16, 6), torch.rand(6), torch.randn(6 // draws, 4, 5)
    made, shuffled = dit(x, t, cond), dit(x, t, cond[:, [2, 0, 3, 1]])
    rows = [dit(x[i, None], t[i, None], cond[i // draws, None]) for i in range(6)]
    close(made, torch.cat(rows))
    close(made, dit(x, t, cond, torch.zeros_like(x)))  # no guess is a guess of zeros
    for other in (dit(x, t, cond.flip(0)), dit(x, 1 - t, cond), dit(x, t, cond, x)):
        assert ((made - other).abs().amax((1, 2)) > 1e-3).all()
    # cross-attention reads a set, the sum a grid
    assert torch.allclose(made, shuffled, atol=1e-4) == cross


def test_patches_and_their_positions_by_hand():
    """2 x 2 neighbours to a token, plus sines of its row and column, and back to their places."""
    dit, eye = make_dit(shape=(16, 3), width=12, depth=0), torch.eye(12)
    for layer in (dit.embed, dit.out):
        layer.load_state_dict({"weight": eye, "bias": eye[0] * 0})
    x, wanted = torch.randn(4, 4, 3), torch.zeros(4, 4, 3)
    for row, column in np.ndindex(2, 2):
        place = slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2)
        angles = torch.outer(torch.tensor([row, column]), 10_000 ** (-torch.arange(3) / 3))
        token = x[place].flatten() + torch.cat([angles.sin(), angles.cos()]).flatten()
        wanted[place] = ((token - token.mean()) / token.std(correction=0)).view(2, 2, 3)
    made = dit(x.view(1, 16, 3), torch.rand(1), torch.randn(1, 4, 5))
    close(made.view(4, 4, 3), wanted)


def test_a_grid_grows_by_repeating_and_shrinks_by_averaging():
    square = torch.randn(2, 3, 4, 4)
    grid = square.flatten(2).mT
    for side in (4, 5, 8):
        wanted = F.interpolate(square, size=(side, side), mode="nearest")
        close(M.resize_grid(grid, side**2), wanted.flatten(2).mT)
    close(M.resize_grid(grid, 4), square.view(2, 3, 2, 2, 2, 2).mean((3, 5)).flatten(2).mT)
    close(M.resize_grid(grid, 9)[:, 4], square[:, :, 1:3, 1:3].mean((2, 3)))  # cells overlap


# --------------------------------------------------------------------------------- flow matching


def toy(formula, predicts="v", self_conditioning=False):
    """A closed form in the DiT's place, formula(x, t, cond, guess), which keeps its calls."""
    net = Mock(predicts=predicts, self_conditioning=self_conditioning)
    net.side_effect = lambda x, t, *rest: formula(x, t[:, None, None], *rest)
    return net


def test_a_shift_multiplies_the_odds_of_noise():
    noise, x, t = torch.randn(4, 3), torch.randn(4, 3), torch.linspace(0, 1, 101)
    close(M.interpolate(noise, x, t[25]), 0.75 * noise + 0.25 * x)
    assert M.interpolate(noise, x, t[0]).equal(noise) and M.interpolate(noise, x, t[-1]).equal(x)
    for shift in (0.3, 1.0, 3.0):
        close(M.shift_time(t, shift), torch.sigmoid(torch.logit(t) - math.log(shift)))


def test_velocity_by_hand():
    """x_t = 2 and a net that halves it; near t = 1, 1 - t is taken as 0.05."""
    x_t, t = torch.full((4, 1, 1), 2.0), torch.tensor([0, 0.5, 0.96, 1])
    for predicts, wanted in (("v", [1.0, 1, 1, 1]), ("x", [-1.0, -2, -20, -20])):
        v = M.velocity(toy(lambda x, *_: x / 2, predicts), x_t, t, x_t)
        close(v[:, 0, 0], torch.tensor(wanted))


@pytest.mark.parametrize("predicts, recalls", [("x", False), ("x", True), ("v", True)])
def test_flow_loss_by_hand(predicts, recalls):
    """Two draws of three prompts: with a first guess for two of these, and zeros for the third."""

    def formula(x, t, cond, guess):
        return x / 2 + t * cond.repeat_interleave(2, 0) + (0 if guess is None else guess)

    source, data, cond = generator(), torch.randn(6, 4, 3), torch.randn(3, 1, 3)
    noise, normal = (torch.randn(size, generator=source) for size in ((6, 4, 3), 6))
    t = torch.sigmoid(normal - math.log(2))[:, None, None]
    x_t = (1 - t) * noise + t * data
    out = formula(x_t, t, cond, None)
    if recalls:
        guess = out if predicts == "x" else x_t + (1 - t) * out
        out = out + guess * torch.tensor([1, 1, 1, 1, 0, 0])[:, None, None]
    v = out if predicts == "v" else (out - x_t) / (1 - t)
    net = toy(formula, predicts, recalls)
    losses = M.flow_loss(net, data, cond, generator(), shift=2.0)
    close(losses, (v - (data - noise)).square().mean((1, 2)), rtol=1e-3)
    assert [len(call.args[2]) for call in net.call_args_list] == ([2, 3] if recalls else [3])


def test_a_tenth_of_the_conditions_become_zeros():
    cond = torch.randn(40_000, 2, 3)
    dropped = M.drop_condition(cond, generator())
    null = (dropped == 0).all((1, 2))
    assert abs(null.float().mean() - 0.1) < 0.01
    assert torch.equal(dropped[~null], cond[~null])


def test_regression_loss_by_hand():
    """What the net says of the condition alone, at x_t = 0 and t = 0, less the data."""
    net = toy(lambda x, t, cond, guess: cond.mean(1, keepdim=True) + x + t, "x")
    data, cond = torch.randn(3, 4, 5), torch.randn(3, 2, 5)
    wanted = [(cond[i].mean(0) - data[i]).square().mean() for i in range(3)]
    close(M.regression_loss(net, data, cond), torch.stack(wanted))


@pytest.mark.parametrize("guidance, restart", [(1, False), (3, False), (0, False), (3, True)])
def test_two_steps_of_the_sampler_by_hand(guidance, restart):
    """Shift 2 puts the middle at 1/3. Guidance 1 never asks under the null, which is zeros."""
    noise, cond, new = torch.randn(2, 4, 3), torch.randn(2, 1, 3), torch.randn(2, 4, 3)
    net = toy(lambda x, t, cond, guess: (1 + t) * x + cond)
    data = noise + noise + guidance * cond
    x = (2 * (new if restart else noise) + data) / 3
    end = x + 2 / 3 * (4 / 3 * x + guidance * cond)
    fresh = (lambda: new) if restart else None
    close(M.sample_flow(net, noise, cond, 2, guidance, 2.0, fresh), end)
    halves = 1 if guidance == 1 else 2
    for call, guess in zip(net.call_args_list, (0 * data, data), strict=True):
        assert torch.equal(call.args[2], torch.cat([cond, 0 * cond][:halves]))
        close(call.args[3], torch.cat([guess] * halves))


@pytest.mark.parametrize("predicts, shift, steps", [("x", 1, 20), ("v", 1, 400), ("v", 2, 400)])
def test_the_exact_field_of_gaussian_data_makes_that_data(predicts, shift, steps):
    """Of N(2, 0.6^2): noise n goes to 2 + 0.6 n; under fresh noise the mean is still right."""

    def formula(x, t, *_):
        data = 2 + t * 0.36 / ((1 - t) ** 2 + t**2 * 0.36) * (x - t * 2)
        return data if predicts == "x" else (data - x) / (1 - t)

    net, noise = toy(formula, predicts), torch.linspace(-2, 2, 9).view(9, 1, 1)
    made = M.sample_flow(net, noise, noise, steps, shift=shift)
    close(made, 2 + 0.6 * noise, atol=3 / steps, rtol=0)
    made = M.sample_flow(net, noise, noise, steps, 1.0, shift, lambda: noise.flip(0))
    close(made.mean(), torch.tensor(2.0))


# -------------------------------------------------------------------------- pictures and vectors


def test_all_256_values_survive_as_pixels():
    images = torch.arange(256).to(torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    images[..., 1] = images[..., 1].flip(1)
    pixels = M.to_pixels(images)
    close(pixels[0, 1, 2, 3], images[0, 2, 3, 1] / 255 * 2 - 1)
    assert torch.equal(M.to_images(pixels), images)
    assert M.to_images(torch.tensor([-7.0, 7, 0]).view(1, 3, 1, 1)).tolist() == [[[[0, 255, 128]]]]


def test_normalised_channels_have_mean_0_and_variance_1():
    raw = torch.randn(40, 16, 5) * torch.tensor([0.1, 1, 3, 10, 0]) + torch.arange(5)
    normalise = M.Normalise(5, 5)
    normalise.fit(raw)
    seen = normalise(raw).double().numpy().reshape(-1, 5)
    moments = [seen.mean(0), seen.std(0, ddof=1)]
    np.testing.assert_allclose(moments, [[0] * 5, [1, 1, 1, 1, 0]], atol=1e-4)
    close(normalise.inverse(normalise(raw)), raw)


def test_a_towers_vectors_are_projected_on_their_principal_axes():
    """By numpy's singular values: features and pixels weigh alike, and channels are whitened."""
    raw = torch.randn(40, 16, 50 + 192) @ torch.randn(242, 242)
    normalise = M.Normalise(242, 7)
    normalise.fit(raw)
    flat = raw.double().numpy().reshape(640, 242)
    flat = (flat - flat.mean(0)) / flat.std(0)
    flat[:, :50] /= np.sqrt(50)
    flat[:, 50:] /= np.sqrt(192)
    left, values, _ = np.linalg.svd(flat, full_matrices=False)
    seen = normalise(raw).double().numpy().reshape(640, 7)
    np.testing.assert_allclose(np.cov(seen.T), np.eye(7), atol=0.01)
    shares = np.abs(left[:, 6::-1].T @ seen) / np.sqrt(640)  # ascending, of either sign
    np.testing.assert_allclose(shares, np.eye(7), atol=0.01)


def test_vae_by_hand():
    vae, pixels = lively(M.VAE(16)).double(), torch.rand(2, 3, 32, 32).double()
    vae.encoder[-1].bias[[6, 7]] = torch.tensor([60.0, -60.0]).double()
    mean, log_variance = vae.encoder(pixels).chunk(2, dim=1)  # one for each 4 x 4 pixels
    assert torch.equal(vae.encode(pixels).view(2, 8, 8, 4), mean.permute(0, 2, 3, 1))
    close(vae.decode(vae.encode(pixels)), vae.decoder(mean))
    spread = torch.exp(log_variance.clip(-20, 10) / 2)
    kl = kl_divergence(Normal(mean, spread), Normal(0.0, 1.0)).mean((1, 2, 3))
    latents = mean + spread * torch.randn(mean.shape, generator=generator())
    error = vae.decoder(latents) - pixels
    wanted = (error.abs() + 4 * error**2).mean((1, 2, 3)) + kl / 100_000
    close(vae(pixels, generator()), wanted, rtol=1e-12)
    assert log_variance.min() < -20 and log_variance.max() > 10


@pytest.mark.parametrize("angle", [0, 22.5, 45, 90, 100, 135])
def test_edges_vote_for_their_orientation(angle):
    """By cos^8 of the distance to a bin, for any contrast; half a turn is the same edge."""
    grid, radians = torch.arange(32.0), math.radians(angle)
    ramp = math.cos(radians) * grid + math.sin(radians) * grid[:, None]  # its gradient's angle
    votes = torch.cos(radians - torch.arange(8) * math.pi / 8) ** 8
    for slope in (2.0, -5.0):
        seen = M.edge_histograms((slope * ramp).expand(1, 3, 32, 32), 4).view(8, 8, 8)
        close(seen[2:6, 2:6], (votes / votes.norm()).expand(4, 4, 8), atol=5e-3, rtol=0)


def test_edges_are_seen_from_three_by_three_patches():
    """A dot has four gradients of its height, two across and two down; all else is flat, zero."""
    pixels, wanted = torch.zeros(1, 3, 32, 32), torch.zeros(8, 8, 8)
    pixels[0, :, 13, 14] = torch.tensor([0.9, 0.3, 0.0])  # a grey of 0.4
    angles = torch.arange(8) * math.pi / 8
    votes = 2 * 0.4 / 144 * (angles.cos() ** 8 + angles.sin() ** 8)
    wanted[2:5, 2:5] = votes / (votes.norm() + 0.01)
    close(M.edge_histograms(pixels + 0.7, 4)[0].view(8, 8, 8), wanted)


def test_vectors_have_unit_variance_and_rebuild_their_patches():
    clip = build(M.TinyCLIP, 16, 300)
    vectors = clip.vectors(torch.rand(2, 3, 16, 16))
    close(vectors.var(-1, correction=0), torch.ones(2, 4), rtol=1e-3)
    patches = clip.pixel_head(vectors)
    wanted = rearrange(patches, "b (r k) (c p q) -> b c (r p) (k q)", r=2, p=8, q=8)
    assert torch.equal(clip.rebuild(vectors), wanted)


def test_pictures_fit_captions_by_a_scaled_cosine():
    clip, vectors, ids = build(M.TinyCLIP, 16, 300), torch.randn(3, 4, 6), make_ids("user")
    texts = [clip.text(clip.words(alone(row)), alone(row) >= 0)[0, -1] for row in ids]
    pairs = clip.image_head(vectors).mean(1)[:, None], clip.text_head(torch.stack(texts))[None]
    for log_scale, scale in ((1.5, math.exp(1.5)), (9.0, 100.0)):
        clip.log_scale.fill_(log_scale)
        close(clip.logits(vectors, ids), scale * F.cosine_similarity(*pairs, dim=-1), atol=1e-3)


def test_clip_loss_by_hand():
    """Equal captions are no negatives; vectors under a little noise also tell pixels and edges."""
    clip, pixels = build(M.TinyCLIP, 16, 300), torch.rand(3, 3, 16, 16)
    ids, same = torch.randint(0, 256, (3, 6)), torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    vectors = clip.vectors(pixels)
    vectors = vectors + 0.05 * torch.randn(vectors.shape, generator=generator())
    logits, terms = clip.logits(vectors, ids), []
    for chances in (*logits.log_softmax(1), *logits.T.log_softmax(1)):  # 0, 1, 2 and 0, 1, 2
        positives = [[0, 2], [1], [0, 2]][len(terms) % 3]
        terms.append(-chances[positives].mean())
    error = clip.rebuild(vectors) - pixels
    edges = clip.edge_head(vectors) - M.edge_histograms(pixels, 8)
    own = 20 * (error.abs() + 4 * error**2).mean((1, 2, 3)) + 50 * edges.square().sum((1, 2)) / 4
    close(clip(pixels, ids, same, generator()), torch.stack(terms).mean() + own)


# ---------------------------------------------------------------------------- backbone and whole


def test_slots_are_filled_in_order():
    backbone, vectors = build(M.Backbone, 300, 6), torch.randn(3, 4, 6)
    ids = make_ids("image", "user", "queries")
    for row, x, bare, seen in zip(ids, backbone.embed(ids, vectors), backbone.embed(ids), vectors):
        fill = [backbone.projector(seen) + backbone.position_embedding, backbone.queries]
        fill = {slot: iter(values) for slot, values in zip((M.IMAGE, M.QUERY), fill)}
        wanted = [next(fill[i]) if i in fill else backbone.words.weight[i] for i in row.tolist()]
        close(x, torch.stack(wanted))
        assert torch.equal(bare[row != M.IMAGE], x[row != M.IMAGE])


def test_text_loss_by_hand():
    """A row's loss is the mean of -log p(token | what stands before it) over what it learns."""
    backbone, texts, images = build(M.Backbone, 300, 6), ("red", "a circle"), torch.randn(3, 4, 6)
    rows = [[("image", None), ("user", "?"), ("bot", text)] for text in (*texts, None)]
    ids, learn = M.build_sequences(M.Tokenizer(), rows, 4, 3)
    losses, chances = backbone(ids, learn, images), backbone.head(backbone.states(ids, images))
    for loss, chance, row, text in zip(losses, chances.log_softmax(-1), ids, texts):
        learned = range(1, len(text) + 3)  # a space, letters, <eos>, counted from the end
        close(loss, -sum(chance[-i - 1, row[-i]] for i in learned) / len(learned))
    assert losses[2] == 0  # nothing to learn


@pytest.mark.parametrize("words", [1, 3])
def test_repeat_loss_by_hand(words):
    """The i-th query from the end names the i-th token from the prompt's end and those before."""
    backbone, ids = build(M.Backbone, 300, 6, queries=8), make_ids("user", "queries", queries=8)
    chances = backbone.head(backbone.states(ids)).log_softmax(-1)
    losses = backbone.repeat_loss(ids, chances, words)
    for row, chance, loss in zip(ids, chances, losses):
        said, terms = alone(row)[0, :-8].tolist()[::-1], []  # from the end
        for i in range(1, 9):
            terms += [-chance[-i, token] for token in said[i - 1 : i - 1 + words]]
        close(loss, torch.stack(terms).mean())


def test_query_states_are_the_last_states():
    """And so are gradients, by row. A query sees the queries before it, and none behind."""
    backbone = build(M.Backbone, 300, 6, queries=12)
    backbone.queries.requires_grad_(True)
    ids, weight = make_ids("user", "queries", queries=12), torch.randn(3, 12, 32)
    once = backbone.query_states(ids)
    whole = torch.cat([backbone.states(alone(row))[:, -12:] for row in ids])
    close(once, whole)
    close(*(torch.autograd.grad((s * weight).sum(), backbone.queries) for s in (once, whole)))
    backbone.requires_grad_(False).queries[7] += 1
    change = (backbone.query_states(ids) - once).abs().amax(-1)
    assert not change[:, :7].any() and (change[:, 7:] > 1e-3).all()


def test_writing_is_the_loop_over_whole_sequences():
    backbone, vectors, golden = build(M.Backbone, 300, 6), torch.randn(3, 4, 6), []
    backbone.head.weight[M.EOS] *= 2.5  # random weights would never stop
    ids = make_ids("image", "user", "bot")
    for row, seen in zip(ids, vectors):
        row, start = alone(row), len(alone(row)[0])
        while row[0, -1] != M.EOS and row.shape[1] < start + 24:
            token = backbone.head(backbone.states(row, seen[None])[:, -1]).argmax(-1)
            row = torch.cat([row, token[None]], dim=1)
        golden.append([i for i in row[0, start:].tolist() if i != M.EOS])
    assert len({len(text) for text in golden}) > 1  # rows end at different times
    assert backbone.write(ids, vectors, limit=24) == golden
    assert backbone.write(ids, vectors, limit=2) == [text[:2] for text in golden]


@pytest.mark.parametrize("least", [0.0, 0.5, 1.0])
def test_sampled_writing_follows_the_distribution(least):
    """Each token has the share that the softmax gives it among those that are likely enough; with
    1 that is the likeliest alone."""
    backbone = build(M.Backbone, 300, 6)
    ids = make_ids("user", "bot")[:1].expand(4000, -1)
    noise = partial(torch.randn, 4000, 1)
    with torch.no_grad():
        backbone.head.weight.mul_(3)
        chances = backbone.head(backbone.states(ids[:1])[:, -1]).softmax(-1)[0]
    chances[chances < least * chances.max()] = 0
    written = backbone.write(ids, limit=1, noise=noise, least=least)
    first = torch.tensor([row[0] if row else M.EOS for row in written])
    shares = torch.bincount(first, minlength=300) / 4000
    assert (shares[chances == 0] == 0).all()
    assert (shares - chances / chances.sum()).abs().max() < 5 * 0.5 / 4000**0.5
    if least == 1:
        greedy = backbone.write(ids[:9], limit=5)
        assert backbone.write(ids[:9], limit=5, noise=partial(torch.randn, 9, 1), least=1) == greedy


def test_a_source_takes_the_place_of_the_guess():
    """In the loss for the last rows; in each step."""
    net = lively(make_dit(self_conditioning=True))
    x, t = torch.randn(16, 16, 6), torch.rand(16)
    cond, source = torch.randn(8, 3, 5), torch.ones(4, 16, 6)
    guess = M.first_guess(net, x, t, cond, source)
    assert torch.equal(guess[12:], source) and not guess[8:12].any() and guess[:8].all()
    assert torch.equal(guess[:8], M.first_guess(net, x, t, cond)[:8])
    heard = []
    net.register_forward_hook(lambda _, inputs, __: heard.append(inputs[3]))
    M.sample_flow(net, x[:4], cond[:4], 3, 2.0, source=source)
    assert len(heard) == 3 and all(given.equal(source.repeat(2, 1, 1)) for given in heard)


def test_parts_and_shapes_follow_the_config():
    own, tower, narrow = (build(M.BLIP3o, 300, 16, width) for width in (None, 200, 5))
    for side, tokens in ((20, 4), (16, 9)):  # the decoder's latents, the tiny CLIP's patches
        with pytest.raises(ValueError, match=f"{side} px, {tokens} vectors"):
            build(M.BLIP3o, 300, side, tokens=tokens)
    assert own.clip is not None and tower.clip is None
    assert own.head.shape == tower.head.shape == (4, 6) and narrow.head.shape == (4, 5)
    assert own.normalise["clip"].axes is None and tower.normalise["clip"].axes.shape == (200, 6)
    assert own.head.cross and own.head.self_conditioning and own.head.predicts == "x"
    assert not own.decoder.cross and not own.decoder.self_conditioning
    assert own.decoder.shape == build(M.BLIP3o, 300, 16, target="vae").head.shape == (16, 4)
    regression = build(M.BLIP3o, 300, 16, objective="mse", predicts="v")
    assert regression.decoder.predicts == "v" and not regression.head.self_conditioning
    loss = Mock(return_value=torch.tensor([1.0, 2.0, 6.0]))
    assert own(loss, "generator", {"ids": 1, "x": 2}) == 3  # a forward is a loss, in the mean
    loss.assert_called_once_with(own, "generator", ids=1, x=2)


@pytest.mark.parametrize("objective, predicts", [("flow", "x"), ("mse", "x"), ("mse", "v")])
def test_the_head_generates_from_the_states_of_the_queries(objective, predicts):
    net = build(M.BLIP3o, 300, 16, objective=objective, predicts=predicts)
    ids, noise = make_ids("user", "queries"), torch.randn(3, 4, 6)
    states, flow = net.backbone.states(ids)[:, -3:], dict(steps=2, guidance=2.0, shift=3.0)
    wanted = M.sample_flow(net.head, noise, states, **flow)
    if objective == "mse":
        wanted = net.head(torch.zeros(3, 4, 6), torch.zeros(3), states)
    close(net.generate(ids, noise, **flow), wanted, atol=1e-3)


def test_pictures_are_decoded_by_the_decoder_and_the_vae():
    net, flow = build(M.BLIP3o, 300, 16), dict(steps=3, guidance=2.0)
    vectors, noise, scale = torch.randn(2, 4, 6), torch.randn(2, 16, 4), net.normalise["vae"]
    scale.fit(0.1 * torch.randn(9, 4) + 0.2)
    latents = M.sample_flow(net.decoder, noise, vectors, **flow)
    pictures = net.vae.decode(latents * scale.std + scale.mean)
    assert torch.equal(net.decode(vectors, noise, **flow), M.to_images(pictures))
    assert M.to_images(pictures).unique().numel() > 50
