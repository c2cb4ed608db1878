"""Laws of the networks, of the sequence format, of flow matching and of its sampler."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import model as M
import train

TOKENS, QUERIES, CHANNELS, WIDTH = 4, 3, 6, 32


def lively(net: nn.Module) -> nn.Module:
    """The network with noise on every weight: zero-initialised parts would hide a broken law."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return net.requires_grad_(False)


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{"rtol": 1e-4, "atol": 1e-5, **tolerance})


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def trunk():
    return lively(M.Trunk(WIDTH, depth=2, heads=4))


@pytest.fixture
def unified():
    return lively(M.Unified(300, (TOKENS, CHANNELS), QUERIES, WIDTH, depth=2, heads=2))


@pytest.fixture
def dit():
    return lively(M.DiT((16, CHANNELS), 5, WIDTH, depth=2, heads=2, patch=2))


@pytest.fixture
def prompts():
    """Ids of three prompts of different lengths, each followed by the queries."""
    texts = ("a circle", "two red squares and a triangle", "")
    rows = [[("user", text), ("queries", None)] for text in texts]
    return M.build_sequences(M.Tokenizer(), rows, TOKENS, QUERIES)[0]


def alone(row):
    """A row of `prompts` without its padding, as a batch of one."""
    return row[row != M.PAD][None]


# ------------------------------------------------------------------------------------------ text

ANY_TEXT = st.lists(st.integers(0, 0x10FFFF).map(chr)).map("".join)  # with lone surrogates
WORDY = st.lists(st.sampled_from([" ", "  ", "\n", "red", "circle", "é", ",", "_1"])).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.text() | ANY_TEXT | WORDY)
def test_tokenizer_is_lossless(text):
    """decode(encode(text)) = text for any string, and every id is in the vocabulary."""
    tokenizer = M.Tokenizer([" red", " circle", "circle", " é"])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < len(tokenizer) for i in ids)


def test_tokenizer_keeps_frequent_words():
    """The most frequent words get ids, first the most frequent; what occurs once does not."""
    texts = ["red circle", "red square", "a red circle", "a unique red circle"]
    tokenizer = M.Tokenizer.fit(texts, size=3)
    assert tokenizer.words == [" red", " circle", " a"]
    assert tokenizer.encode("circle")[0] == tokenizer.encode("red circle")[1]
    assert len(tokenizer.encode("red")) == 1 < len(tokenizer.encode("unique"))


def test_plurals_share_their_nouns_code():
    """A last "s" is a piece of its own, and only there."""
    assert M.Tokenizer.split("two circles, is") == [" two", " circle", "s", ",", " i", "s"]
    tokenizer = M.Tokenizer([" circle"])
    assert tokenizer.encode("circles") == [*tokenizer.encode("circle"), ord("s")]


RED, CIRCLE = 263, 264  # the first ids behind the bytes and the special tokens
SEE, ASK = [M.BOS, M.IMAGE, M.IMAGE], [M.USER, RED]
LAYOUTS = {
    "understanding": (["image", "user", "bot"], [*SEE, *ASK, M.BOT, CIRCLE, M.EOS], [-2, -1]),
    "answer": (["image", "user", "open"], [*SEE, *ASK, M.BOT], []),
    "generation": (["user", "queries"], [M.BOS, *ASK, M.QUERY, M.QUERY], []),
    "editing": (["image", "user", "queries"], [*SEE, *ASK, M.QUERY, M.QUERY], []),
}
PARTS = {
    "image": ("image", None),
    "user": ("user", "red"),
    "bot": ("bot", "circle"),
    "open": ("bot", None),
    "queries": ("queries", None),
}


@pytest.mark.parametrize("task", LAYOUTS)
def test_golden_layouts(task):
    """Every task's row, written out by hand: ids, padding on the left, positions with loss."""
    names, golden, learned = LAYOUTS[task]
    row, tokenizer = [PARTS[name] for name in names], M.Tokenizer([" red", " circle"])
    ids, learn = M.build_sequences(tokenizer, [row, [PARTS["user"]]], 2, 2)
    assert ids.tolist()[0] == [M.PAD] * (16 - len(golden)) + golden
    assert ids.tolist()[1] == [M.PAD] * 13 + [M.BOS, *ASK]
    assert learn[0].nonzero()[:, 0].tolist() == [16 + i for i in learned]
    assert not learn[1].any()


def test_too_long_texts():
    """A text beyond `length` is refused with both numbers, or cut at its end and counted."""
    rows, tokenizer = [[("user", "red circle"), ("queries", None)]], M.Tokenizer([" red"])
    ids, _ = M.build_sequences(tokenizer, rows, queries=2, length=8)
    with pytest.raises(ValueError, match="8 tokens, at most 7"):
        M.build_sequences(tokenizer, rows, queries=2, length=7)
    cut = M.Counter()
    short, learn = M.build_sequences(tokenizer, rows, queries=2, length=7, cut=cut)
    assert cut == {"user": 1}
    body = ids[0, ids[0] != M.PAD].tolist()
    assert short[0, short[0] != M.PAD].tolist() == [*body[:-3], M.QUERY, M.QUERY]


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40), length=st.integers(1, 30))
def test_texts_are_cut_between_characters(text, length):
    """What is left of any text is its beginning, in whole characters, as long as they fit."""
    tokenizer, cut = M.Tokenizer([" a"]), M.Counter()
    ids, learn = M.build_sequences(tokenizer, [[("bot", text)]], length=length, cut=cut)
    kept = tokenizer.decode(ids[0])
    assert text.startswith(kept) and learn.sum() <= length + 1
    assert cut.total() == (len(tokenizer.encode(text)) > length)
    more = tokenizer.encode(text[: len(kept) + 1])
    # "a" is a word by itself and two bytes where "a0" is cut: only bytes can be counted so
    if cut and max(more) < 256:
        assert len(more) > length


# ------------------------------------------------------------------------------- building blocks


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("compiling", [False, True])
def test_attention_is_the_formula(masked, compiling, monkeypatch):
    """What runs, the fused kernel or what a CPU compiles, is softmax(q k^T / sqrt(E)) v."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    mask = None
    if masked:
        mask = torch.rand(2, 1, 5, 7) < 0.5
        mask[..., 0] = True  # nobody looks at nothing
    weights = torch.einsum("bhte,bhme->bhtm", q, k).div(math.sqrt(8)).exp()
    weights = weights * mask if masked else weights
    wanted = torch.einsum("bhtm,bhme->bhte", weights / weights.sum(-1, keepdim=True), v)
    close(M.attention(q, k, v, mask), wanted)


def test_rotary_is_relative():
    """Scores of rotated queries and keys depend on the distance alone, and do depend on it."""
    q, k = torch.randn(2, 1, 1, 6, 8)

    def scores(shift, stretch=1):
        rope = M.rotary(stretch * torch.arange(6) + shift, 8)
        return M.rotate(q, rope) @ M.rotate(k, rope).transpose(-2, -1)

    close(scores(0), scores(100), atol=1e-4)
    assert not torch.allclose(scores(0), scores(0, stretch=2), atol=1e-2)


def test_trunk_is_causal(trunk):
    """Changing a later embedding changes no earlier state, and every later one."""
    x, valid = torch.randn(2, 9, WIDTH), torch.ones(2, 9, dtype=torch.bool)
    changed = x.clone()
    changed[:, 5] += 1
    before, after = trunk(x, valid), trunk(changed, valid)
    assert torch.equal(before[:, :5], after[:, :5])
    assert ((before - after)[:, 5:].abs().amax(-1) > 1e-4).all()


def test_trunk_in_pieces(trunk):
    """With caches, a padded sequence read in pieces of 3, 1 and 5 has the states of one pass."""
    x, valid = torch.randn(2, 9, WIDTH), torch.ones(2, 9, dtype=torch.bool)
    valid[1, :2] = False
    caches, states, begin = trunk.new_caches(), [], 0
    for end in (3, 4, 9):
        states.append(trunk(x[:, begin:end], valid[:, :end], caches))
        begin = end
    close(torch.cat(states, dim=1)[valid], trunk(x, valid)[valid])


# ------------------------------------------------------------------------------------ the backbone


def test_padding_changes_nothing(unified, prompts):
    """A row of a padded batch has the states that it has alone."""
    states = unified.states(prompts)
    for row, state in zip(prompts, states):
        close(state[row != M.PAD], unified.states(alone(row))[0])


def test_query_states_are_the_last_states(unified, prompts):
    """Prefix from the caches, then the queries: the same as the whole sequence at once."""
    close(unified.query_states(prompts), unified.states(prompts)[:, -QUERIES:])


def test_text_loss_by_hand(unified):
    """A row's loss is the mean of -log p(token | what stands before it) over what it learns."""
    rows = [[("image", None), ("user", "?"), ("bot", text)] for text in ("red", "no circle")]
    ids, learn = M.build_sequences(M.Tokenizer(), rows, TOKENS, QUERIES)
    vectors = torch.randn(2, TOKENS, CHANNELS)
    chances = unified.head(unified.states(ids, vectors)).log_softmax(-1)
    losses = unified(ids, learn, vectors)
    for b, text in enumerate((" red", " no circle")):
        terms = [-chances[b, t - 1, ids[b, t]] for t in learn[b].nonzero()[:, 0].tolist()]
        assert len(terms) == len(text) + 1  # and an <eos>
        close(losses[b], torch.stack(terms).mean())


def test_repeating_by_hand(unified, prompts):
    """The i-th query from the end names the i-th token of the prompt from its end and those before
    it; beyond the beginning, which <user> and <bos> are, there is nothing to name."""
    chances = unified.head(unified.states(prompts)).log_softmax(-1)
    for words in (1, 3):
        losses = unified.repeat(prompts, words)
        for row, chance, loss in zip(prompts, chances, losses):
            said = row[row != M.PAD][:-QUERIES].tolist()[::-1]  # from the end
            terms = []
            for i in range(1, QUERIES + 1):
                terms += [-chance[-i, token] for token in said[i - 1 : i - 1 + words]]
            close(loss, torch.stack(terms).mean())


def test_greedy_writing_is_the_uncached_loop(unified):
    """Text written in a batch with caches is that of an argmax over whole sequences, row by row."""
    rows = [[("image", None), ("user", text), ("bot", None)] for text in ("what?", "", "how many")]
    ids = M.build_sequences(M.Tokenizer(), rows, TOKENS, QUERIES)[0]
    vectors, golden = torch.randn(3, TOKENS, CHANNELS), []
    # random weights never stop: make <eos> as likely as the rest together
    unified.head.weight[M.EOS] *= 2.5
    for row, seen in zip(ids, vectors):
        text, row = [], alone(row)
        while len(text) < 24:
            token = unified.head(unified.states(row, seen[None])[:, -1]).argmax(-1)
            if token == M.EOS:
                break
            text.append(token.item())
            row = torch.cat([row, token[None]], dim=1)
        golden.append(text)
    assert len({len(text) for text in golden}) > 1  # rows end at different times
    assert unified.write(ids, vectors, limit=24) == golden


def test_fill_keeps_order():
    """Slots take the values in order, again from the start when they run out; the rest stays."""
    x, values = torch.zeros(2, 5, 1), torch.tensor([[1.0, 2], [3, 4]])[..., None]
    slots = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 1]]).bool()
    assert M.fill(x, slots, values)[..., 0].tolist() == [[0, 1, 0, 2, 1], [3, 0, 0, 0, 4]]


# ------------------------------------------------------------------------------------------- DiT


@pytest.mark.parametrize("cross", [False, True])
def test_new_blocks_are_the_identity(cross):
    """adaLN-Zero: in a new DiT every block is the identity and the prediction is 0."""
    dit = M.DiT((16, CHANNELS), 5, WIDTH, 2, 2, cross=cross)
    x, time, cond = torch.randn(4, 16, WIDTH), torch.randn(4, WIDTH), torch.randn(2, 4, WIDTH)
    for block in dit.blocks:
        assert torch.equal(block(x, time, block.cross.read(cond) if cross else None), x)
    assert not dit(torch.randn(4, 16, CHANNELS), torch.rand(4), torch.randn(2, 4, 5)).any()


ZEROS = {  # part of the whole model -> how many of its tensors start at zero in the micro preset
    r"(backbone\.trunk\.blocks|clip\.text\.blocks)\.\d+"
    r"\.(attention\.out|mlp\.down)\.weight": 6,
    r"vae\..*\.second\.weight": 2,
    r"backbone\.head\.weight": 1,
    r"(head|decoder)\.(modulation|out|blocks\.\d+\.modulation)\.(weight|bias)": 12,
}


def test_zeros_survive_the_whole_initialisation():
    """After building the whole model, what must start at zero is zero and no other matrix is."""
    config = train.Config(**train.PRESETS["micro"])
    tensors = dict(M.BLIP3o(config, 300, side=64).named_parameters())
    zero = [n for pattern in ZEROS for n in tensors if re.fullmatch(pattern, n)]
    assert len(zero) == sum(ZEROS.values())
    assert {n for n in tensors if tensors[n].ndim > 1 and not tensors[n].any()} <= set(zero)
    assert not any(tensors[n].any() for n in zero)


def test_draws_use_their_prompts_condition():
    """K draws of P prompts = a batch of P K with every condition repeated K times."""
    for cross in (True, False):
        dit = lively(M.DiT((16, CHANNELS), 5, WIDTH, 2, 2, patch=2, cross=cross))
        x, t, cond = torch.randn(6, 16, CHANNELS), torch.rand(6), torch.randn(2, 4, 5)
        close(dit(x, t, cond), dit(x, t, cond.repeat_interleave(3, 0)))
        assert not torch.allclose(dit(x, t, cond), dit(x, t, cond.flip(0)), atol=1e-2)


@pytest.mark.parametrize("cross", [True, False])
def test_a_condition_is_read_once(cross):
    """All steps of a sampler share one reading of the condition, and end where steps by hand do."""
    dit = lively(M.DiT((16, CHANNELS), 5, WIDTH, 2, 2, cross=cross))
    x, cond, readings = torch.randn(2, 16, CHANNELS), torch.randn(2, 4, 5), []
    by_hand = x
    for t in (0.0, 0.5):
        by_hand = by_hand + 0.5 * M.velocity(dit, by_hand, torch.full((2,), t), cond)
    dit.cond_embed.register_forward_hook(lambda *_: readings.append(1))
    close(M.sample_flow(dit, x, cond, steps=2), by_hand)
    assert len(readings) == 1


def test_dit_rows_are_independent(dit):
    """Prediction and sampled vectors of a batch row are those of that row alone."""
    x, t, cond = torch.randn(3, 16, CHANNELS), torch.rand(3), torch.randn(3, 4, 5)
    flow = dict(steps=3, guidance=2.0, shift=2.0, heun=True)
    whole, drawn = dit(x, t, cond), M.sample_flow(dit, x, cond, **flow)
    for i in range(3):
        row = slice(i, i + 1)
        close(whole[row], dit(x[row], t[row], cond[row]))
        close(drawn[row], M.sample_flow(dit, x[row], cond[row], **flow), rtol=1e-3, atol=1e-3)


def test_patches_are_neighbours():
    """Without blocks, an output depends on the inputs of its own 2 x 2 patch and on no other."""
    dit = lively(M.DiT((16, 1), 5, WIDTH, depth=0, heads=1, patch=2))
    cond, t = torch.randn(1, 4, 5), torch.rand(1)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: dit(x[None, :, None], t, cond).flatten(), torch.randn(16)
    )
    patch = torch.arange(16).view(4, 4)
    patch = (patch // 4 // 2 * 2 + patch % 4 // 2).flatten()  # of each place on the 4 x 4 grid
    assert torch.equal(jacobian != 0, patch[:, None] == patch)


def test_patches_there_and_back():
    """Layers that do nothing leave every vector at its place: grid -> patches -> grid."""
    dit = M.DiT((16, 3), 5, width=12, depth=0, heads=1, patch=2).requires_grad_(False)
    for layer in (dit.embed, dit.out):
        layer.weight.copy_(torch.eye(12))
        layer.bias.zero_()
    dit.positions.zero_()
    x = torch.randn(1, 4, 4, 3)
    for r, c in ((0, 0), (0, 2), (2, 0), (2, 2)):  # the last norm leaves normal patches alone
        patch = x[0, r : r + 2, c : c + 2]
        patch.copy_((patch - patch.mean()) / patch.std(correction=0))
    close(dit(x.view(1, 16, 3), torch.rand(1), torch.randn(1, 4, 5)), x.view(1, 16, 3), rtol=1e-3)


def test_grids_are_repeated():
    """Twice the side repeats every vector in a 2 x 2 square; the same side changes nothing."""
    grid = torch.arange(4.0).view(1, 4, 1)
    expected = torch.kron(grid.view(2, 2), torch.ones(2, 2))
    assert torch.equal(M.resize_grid(grid, 16).view(4, 4), expected)
    assert torch.equal(M.resize_grid(grid, 4), grid)


def test_what_is_no_square_grid_is_refused():
    """A grid that is no square is named; 12 = 3 x 4 must not pass for one of 3 x 3."""
    with pytest.raises(RuntimeError, match="12"):
        M.resize_grid(torch.zeros(1, 12, 4), 4)


@settings(max_examples=60, deadline=None)
@given(side=st.integers(1, 40), target=st.integers(1, 10), channels=st.integers(1, 3))
def test_any_grid_is_averaged(side, target, channels):
    """k * k vectors out of any larger grid: each the mean of its cells, so a constant stays one."""
    target = min(target, side)
    grid = torch.arange(side * side * channels).float().view(1, side * side, channels)
    pooled = M.resize_grid(grid, target * target)
    assert pooled.shape == (1, target * target, channels)
    cells = grid.view(side, side, channels)
    for i, j in ((0, 0), (target - 1, 0), (target // 2, target - 1)):
        rows, columns = (slice(k * side // target, -(-(k + 1) * side // target)) for k in (i, j))
        expected = cells[rows, columns].mean((0, 1))
        assert torch.allclose(pooled[0, i * target + j], expected, rtol=1e-4)


# --------------------------------------------------------------------------------- flow matching


class Field(nn.Module):
    """A closed form in the DiT's place: field(x, t, condition); it counts rows of its calls."""

    def __init__(self, formula, predicts="v"):
        super().__init__()
        self.formula, self.predicts, self.calls, self.recalls = formula, predicts, [], False

    def read(self, cond):
        return cond

    def forward(self, x, t, cond, guess=None):
        self.calls.append(len(x))
        return self.formula(x, t[:, None, None], cond)


@pytest.mark.parametrize(
    "predicts, t, expected",
    [
        # x_t = -0.25, the net says -0.125, the target is 2 - (-1) = 3
        ("v", 0.25, (-0.125 - 3) ** 2),
        ("x", 0.25, ((-0.125 + 0.25) / 0.75 - 3) ** 2),
        # x_t = 2, the net says 1, and 1 - t is taken as 0.05
        ("x", 1.0, ((1 - 2) / 0.05 - 3) ** 2),
    ],
)
def test_flow_loss_by_hand(predicts, t, expected):
    """Data 2, noise -1 and a net that halves its input: the loss worked out on paper."""
    net = Field(lambda x, t, cond: x / 2, predicts)
    x, noise = torch.full((1, 4, 3), 2.0), torch.full((1, 4, 3), -1.0)
    loss = M.flow_loss(net, x, noise, torch.tensor([t]), torch.zeros(1, 1, 1))
    close(loss, torch.tensor([expected]))


def test_perfect_nets_have_no_loss():
    """A net that knows data or velocity has loss 0 at every drawn time and noise."""
    data, noise = torch.randn(2, 4, 3), torch.randn(6, 4, 3)
    repeated = data.repeat_interleave(3, 0)
    for predicts, truth in (("x", repeated), ("v", repeated - noise)):
        net = Field(lambda x, t, cond, truth=truth: truth, predicts)
        t = torch.rand(6) * 0.9  # below the floor of 1 - t
        close(M.flow_loss(net, repeated, noise, t, data), torch.zeros(6))


def test_every_second_prompt_recalls():
    """A net that recalls reads its own first guess of the data for prompts 0 and 2 of 3, zeros for
    the other; worked out with a net whose prediction is its guess plus half its input."""
    x, noise = torch.randn(6, 4, 3), torch.randn(6, 4, 3)
    t, cond = torch.rand(6) * 0.9, torch.zeros(3, 1, 1)
    for predicts in ("x", "v"):
        seen = []
        net = Field(lambda x, t, cond: x / 2, predicts)
        net.recalls = True
        plain = net.forward

        def forward(x, t, cond, guess=None, plain=plain, seen=seen):
            seen.append(guess)
            return plain(x, t, cond) + (0 if guess is None else guess)

        net.forward = forward
        losses = M.flow_loss(net, x, noise, t, cond)
        at = t[:, None, None]
        x_t = (1 - at) * noise + at * x
        guess = x_t / 2 if predicts == "x" else x_t + (1 - at) * x_t / 2
        guess[2:4] = 0
        assert seen[0] is None and net.calls == [4, 6]
        close(seen[1], guess)
        v = x_t / 2 + guess if predicts == "v" else (x_t / 2 + guess - x_t) / (1 - at)
        close(losses, (v - (x - noise)).square().mean((1, 2)))


def test_the_sampler_recalls():
    """Each call reads the data that the call before predicted, after guidance; the first, zeros."""
    seen, net, noise = [], Field(lambda x, t, cond: cond), torch.randn(2, 4, 3)
    plain = net.forward
    net.forward = lambda x, t, cond, guess: seen.append(guess) or plain(x, t, cond)
    M.sample_flow(net, noise, torch.ones(2, 1, 1), steps=2, guidance=3.0)
    close(seen[0], torch.zeros(4, 4, 3))
    close(seen[1], (noise + 3).repeat(2, 1, 1))  # x + (1 - 0) u + s (c - u)


def test_a_dit_reads_its_guess():
    """No guess is a guess of zeros, another one changes the prediction; without `recalls` there is
    nothing to read it."""
    net = lively(M.DiT((16, CHANNELS), CHANNELS, WIDTH, 1, 1, recalls=True))
    x, t, cond = torch.randn(2, 16, CHANNELS), torch.rand(2), torch.randn(2, 4, CHANNELS)
    close(net(x, t, cond), net(x, t, cond, torch.zeros_like(x)))
    assert (net(x, t, cond) - net(x, t, cond, x)).abs().max() > 1e-3
    plain = M.DiT((16, CHANNELS), CHANNELS, WIDTH, 1, 1)
    assert plain.embed.in_features * 2 == net.embed.in_features


@pytest.mark.parametrize("cached", [False, True])
def test_checkpointing_changes_nothing(trunk, cached):
    """Activations computed twice give the same states and the same gradients, caches or not."""
    x, valid, results = torch.randn(2, 6, WIDTH), torch.ones(2, 6, dtype=torch.bool), []
    for block in trunk.blocks:
        block.requires_grad_(True)
    for trunk.checkpoint in (False, True):
        caches = trunk.new_caches() if cached else None
        if cached:
            with torch.no_grad():
                trunk(x[:, :4], valid[:, :4], caches)
        states = trunk(x[:, 4:] if cached else x, valid, caches)
        gradients = torch.autograd.grad(states.square().sum(), list(trunk.blocks.parameters()))
        results.append([states, *gradients])
    for one, other in zip(*results):
        close(one, other)


def test_drawn_times():
    """Times are logit-normal, a row's K draws lie one in each K-th of them, and a part of the rows
    gets what it gets in the whole batch."""
    for offset in (0.0, 0.3, 0.999):
        times = M.spread_times(torch.arange(50), 50, 40, offset)
        normal = times.double().logit()
        close(
            torch.stack([normal.mean(), normal.std()]), torch.tensor([0.0, 1]).double(), atol=0.01
        )
        share = torch.special.ndtr(normal).view(50, 40).sort(1)[0]
        close(share.diff(), torch.full((50, 39), 1 / 40).double(), atol=1e-3)
        part = M.spread_times(torch.arange(20, 30), 50, 40, offset)
        close(part, times.view(50, 40)[20:30].flatten(), atol=1e-6)


@pytest.mark.parametrize("heun, order", [(False, 1), (True, 2)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("rate", [lambda t: -torch.ones_like(t), lambda t: -2 * t], ids=["1", "2t"])
def test_order_of_the_sampler(heun, order, shift, rate):
    """On dx/dt = -x and -2 t x, which end at x / e, errors fall with the order of the method."""
    start = torch.tensor([[[1.0, -2.0]]]).double()
    errors = []
    for steps in (64, 128):
        end = M.sample_flow(
            Field(lambda x, t, cond: rate(t) * x), start, start, steps=steps, shift=shift, heun=heun
        )
        errors.append((end - start / math.e).abs().max().item())
    assert errors[1] < 0.02
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.15


def test_guidance():
    """On constant fields the end is noise + u + s (c - u), u under zeros."""
    net, noise, ones = Field(lambda x, t, cond: cond + 2), torch.randn(2, 4, 3), torch.ones(2, 4, 3)
    for s in (0.0, 2.0, 5.0):
        close(M.sample_flow(net, noise, 3 * ones, guidance=s), noise + 2 + s * (5 - 2))


@pytest.mark.parametrize("heun, calls", [(False, 5), (True, 9)])
def test_guidance_one_is_none(heun, calls):
    """Guidance 1 never looks at the condition zero: one row each, one call for a stage."""
    net, noise = Field(lambda x, t, cond: cond), torch.zeros(2, 4, 3)
    close(M.sample_flow(net, noise, noise + 3, steps=5, heun=heun), noise + 3)
    assert net.calls == [2] * calls
    net.calls.clear()
    M.sample_flow(net, noise, noise, steps=5, guidance=2.0, heun=heun)
    assert net.calls == [4] * calls


def test_new_noise_at_each_step():
    """On Gaussian data the variance follows the recursion of x = (1 - t) fresh + t E[data | x]."""
    spread, steps, variance = 0.6, 7, 1.0

    def gain(t):  # E[data | x_t] = gain x_t for data of variance spread^2
        return t * spread**2 / (t**2 * spread**2 + (1 - t) ** 2)

    net = Field(lambda x, t, cond: (gain(t) - 1) / (1 - t) * x)
    generator = torch.Generator().manual_seed(0)

    def fresh():
        return torch.randn(200_000, 1, 1, generator=generator)

    start = fresh()
    end = M.sample_flow(net, start, start, steps=steps, fresh=fresh)
    for i in range(steps):
        t, after = i / steps, (i + 1) / steps
        variance = (after * gain(t)) ** 2 * variance + (1 - after) ** 2
    assert abs(end.var().item() / variance - 1) < 0.02
    assert variance < 0.9 * spread**2  # narrower than the data, as the docstring says
    exact = M.sample_flow(net, start, start, steps=200)
    assert abs(exact.std().item() / spread - 1) < 0.02


def test_shift_time():
    """Ends stay, order stays, shift 1 is nothing, 1 / shift undoes it, above 1 goes to noise."""
    t = torch.linspace(0, 1, 101).double()
    for shift in (0.3, 1.0, 3.0):
        moved = M.shift_time(t, shift)
        close(moved[[0, -1]], t[[0, -1]])
        assert (moved.diff() > 0).all()
        close(M.shift_time(moved, 1 / shift), t)
    close(M.shift_time(t, 1.0), t)
    # s = 1/2 -> 3 / 2 / (1 + 2 / 2) = 3/4
    assert M.shift_time(torch.tensor(0.5), 3.0).item() == 0.25


# ------------------------------------------------------------------------- pictures and features


def test_pixels_round_trip():
    """All 256 values survive uint8 -> [-1, 1] -> uint8, and what lies beyond is clamped."""
    images = torch.arange(256).to(torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    images[..., 1] = images[..., 1].flip(1)
    pixels = M.to_pixels(images)
    assert pixels.shape == (1, 3, 16, 16) and (pixels.min(), pixels.max()) == (-1, 1)
    assert torch.equal(M.to_images(pixels), images)
    assert M.to_images(torch.tensor([-7.0, 7, 0]).view(1, 3, 1, 1)).tolist() == [[[[0, 255, 128]]]]


@pytest.mark.parametrize("mode", ["standardise", "whiten"])
def test_treatment(mode):
    """Treated vectors have mean 0 and variance 1, whitened also no correlation; inverse undoes."""
    raw = torch.randn(40, 16, 5) @ torch.randn(5, 5) * 3 + torch.arange(5)
    treatment = M.Treatment(5, 5)
    treatment.fit(raw, mode)
    treated = treatment(raw)
    covariance = torch.cov(treated.flatten(0, 1).T)
    close(treated.mean((0, 1)), torch.zeros(5), atol=1e-4)
    close(covariance.diagonal(), torch.ones(5), rtol=1e-3)
    correlation = (covariance - torch.diag(covariance.diagonal())).abs().max()
    assert correlation < 1e-3 if mode == "whiten" else correlation > 0.1
    close(treatment.inverse(treated), raw, atol=1e-3)


def test_narrow_whitening_keeps_the_principal_axes():
    """Whitening to k channels loses exactly the variance of the smallest axes (Eckart-Young)."""
    raw = torch.randn(4000, 5) @ torch.randn(5, 5)
    treatment = M.Treatment(5, 2)
    treatment.fit(raw, "whiten")
    lost = (treatment.inverse(treatment(raw)) - raw).square().sum() / (len(raw) - 1)
    close(lost, torch.linalg.eigvalsh(torch.cov(raw.T))[:3].sum(), rtol=1e-3)


@pytest.mark.parametrize("side", [32, 64])
def test_vae(side):
    """Latents are a grid of a quarter of the side; KL is torch's; an image's size comes back."""
    vae = lively(M.VAE(16, 1))
    pixels = torch.rand(2, 3, side, side) * 2 - 1
    mean, log_variance = vae.moments(pixels)
    assert mean.shape == log_variance.shape == (2, 4, side // 4, side // 4)
    assert torch.equal(vae.encode(pixels), mean.flatten(2).transpose(1, 2))
    assert torch.equal(vae.decode(vae.encode(pixels)), vae.decoder(mean))
    assert vae.decoder(mean).shape == pixels.shape
    normal = torch.distributions.Normal
    posterior = normal(mean, (log_variance / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, normal(0.0, 1.0)).mean()
    close(vae(pixels, torch.zeros_like(mean))["kl"].mean(), kl)


@pytest.fixture
def clip():
    return lively(M.TinyCLIP(32, (16, CHANNELS), WIDTH, 1, 1, vocabulary=300, noise=0.0))


def test_tiny_clip_vectors(clip):
    """N vectors of mean 0 and variance 1 for each picture, and a picture back from them."""
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    vectors = clip.vectors(pixels)
    assert vectors.shape == (2, 16, CHANNELS)
    close(vectors.mean(-1), torch.zeros(2, 16))
    close(vectors.var(-1, correction=0), torch.ones(2, 16), rtol=1e-3)
    assert clip.rebuild(vectors).shape == pixels.shape


def test_edge_histograms_tell_orientations():
    """An edge counts for its orientation, not for its sign nor, where it is strong, its contrast; a
    quarter of a turn of the picture moves the bins by half of them."""
    grid = torch.arange(32.0)
    for angle, bins in ((0, [0]), (45, [2]), (90, [4]), (11.25, [0, 1])):
        radians = math.radians(angle)
        ramp = math.cos(radians) * grid + math.sin(radians) * grid[:, None]  # its gradient's angle
        wanted = torch.zeros(8).index_fill(0, torch.tensor(bins), 1.0)
        for slope in (2.0, -5.0):
            pixels = torch.zeros(1, 3, 32, 32)
            pixels[0, 1] = slope * ramp
            inner = M.edge_histograms(pixels, 4).view(8, 8, 8)[2:6, 2:6]
            close(inner, (wanted / wanted.norm()).expand(4, 4, 8), atol=5e-3, rtol=0)
    pixels = torch.rand(1, 3, 32, 32)
    turned = M.edge_histograms(pixels.rot90(dims=(2, 3)), 4).view(8, 8, 8).rot90(-1, dims=(0, 1))
    close(turned.roll(4, -1).flatten(0, 1)[None], M.edge_histograms(pixels, 4))
    assert M.edge_histograms(torch.rand(2, 3, 8, 8), 1).shape == (2, 64, 8)


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_edge_histograms_see_three_by_three_patches(channel):
    """One dot of each colour in a flat picture, by hand: four gradients of its height, two in bin
    0 and two in bin 4, seen from its own patch and the eight around, in the mean of 144 pixels."""
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[0, channel, 13, 14] = 0.9
    pixels[0, (channel + 1) % 3, 13, 14] = 0.3  # the clearest colour decides
    seen = M.edge_histograms(pixels, 4)[0].view(8, 8, 8)
    mean = 2 * 0.9 / 144  # in each of the two bins
    wanted = torch.zeros(8, 8, 8)
    wanted[2:5, 2:5, [0, 4]] = mean / (math.sqrt(2) * mean + 0.01)
    close(seen, wanted)


def test_what_a_vector_must_tell(clip):
    """Each picture's own pixels and edges, by hand, from its vectors under the given noise."""
    clip.noise = 0.5
    pixels, ids = torch.rand(3, 3, 32, 32), torch.randint(0, 256, (3, 6))
    noise = torch.randn(3, 16, CHANNELS)
    losses = clip(pixels, ids, torch.eye(3), noise)
    vectors = clip.vectors(pixels) + 0.5 * noise
    error = clip.rebuild(vectors) - pixels
    close(losses["pixels"], (error.abs() + 4 * error**2).mean((1, 2, 3)))
    for row in range(3):
        told, true = clip.edge_head(vectors[row]), M.edge_histograms(pixels[row : row + 1], 8)[0]
        close(losses["edges"][row], (told - true).pow(2).sum() / 16)


def test_equal_captions_are_positives(clip):
    """The contrastive loss by hand; a batch that is there twice costs log 2 more and no more."""
    pixels, ids = torch.rand(3, 3, 32, 32), torch.randint(0, 256, (3, 6))
    same = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    logits = clip.embed_images(clip.vectors(pixels)) @ clip.embed_texts(ids).T
    logits = logits * clip.log_scale.exp()
    terms = [  # for each picture, and for each caption, the mean over its positives
        -sum(chances[j] for j in range(3) if same[i, j]) / same[i].sum()
        for direction in (logits, logits.T)
        for i, chances in enumerate(direction.log_softmax(1))
    ]
    loss = clip(pixels, ids, same)["contrastive"]
    close(loss, sum(terms) / 6)
    twice = clip(pixels.repeat(2, 1, 1, 1), ids.repeat(2, 1), same.repeat(2, 2))["contrastive"]
    close(twice, loss + math.log(2))


def test_caption_padding_changes_nothing(clip, prompts):
    """A caption's embedding does not depend on the longer captions beside it."""
    for row, embedded in zip(prompts, clip.embed_texts(prompts)):
        close(embedded, clip.embed_texts(alone(row))[0])
