"""Any input gives a result, or one line and exit code 2 that names it: hypothesis tries."""

import functools
import gzip
import io
import json
import os
import shutil
import string
import sys
import tarfile
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_photos import SOUND, encoded, photo, write_tar

import data
import model as M
import sample
import train


def cases(share):
    """How many cases a test tries: its share of 500, of 10,000 with --long."""
    count = round(share * (10_000 if "--long" in sys.argv else 500))
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    quiet += [HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=count, deadline=None, suppress_health_check=quiet)


def outcome(capsys, call, arguments, *named):
    """True for a result, False for exit code 2 with a last line that names one of these."""
    capsys.readouterr()
    sys.stderr.reconfigure(errors="backslashreplace")  # as a program's is from the start
    try:
        call(arguments)
        return True
    except SystemExit as stop:
        assert stop.code == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert any(str(name) in told.splitlines()[-1] for name in named), told
    return False


# train.py flushes denormals to zero in the whole process, hence allow_subnormal=False below
CHARACTERS = st.characters(codec=None, categories=None)  # with control bytes and lone surrogates
TEXT = st.one_of(
    st.text(CHARACTERS, max_size=80),
    st.text(string.ascii_lowercase + " ", max_size=300),
    st.integers(0, 100_000).flatmap(lambda n: CHARACTERS.map(lambda c: c * n)),
)
NUMBER = st.one_of(
    st.integers(-3, 12), st.integers(), st.sampled_from([2**31, 2**63 - 1, 2**64, 10**30])
).map(str)
ANY_NUMBER = st.one_of(
    NUMBER, st.floats(allow_subnormal=False).map(str), st.sampled_from(["", "x", "1_0", "0x10"])
)


@pytest.fixture(scope="module")
def studio(micro_run):
    path = sample.find_run(str(micro_run))
    return sample.Studio(path, dict(steps=1, guidance=2.0), dict(steps=1, guidance=1.0))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Thousands of small files: that they reach the disk is not what is tried here."""
    monkeypatch.setattr(data, "flush", lambda path: None)


# ------------------------------------------------------------------------------------------- texts


@cases(0.3)
@given(text=TEXT)
@example(text="")
@example(text="\ud800")
@example(text="\x00\x1b[2J")
@example(text="?" * 100_000)
def test_any_prompt_is_drawn_or_refused(studio, text, tmp_path):
    """A picture with its label, or the prompt's length and the largest one that is possible."""
    length = len(studio.tokenizer.encode(text))
    if length > studio.config.text_length:
        with pytest.raises(
            ValueError, match=f"{length} tokens, at most {studio.config.text_length}"
        ):
            studio.draw([text], [0])
        return
    images = studio.draw([text], [0])
    assert images.shape == (1, 64, 64, 3)
    sample.save_grid(tmp_path / "x.png", images, [text], 1)
    assert Image.open(tmp_path / "x.png").size[1] == 2 * 64 + 26


@cases(0.15)
@given(text=TEXT)
@example(text="")
@example(text="\udfff")
def test_any_question_is_answered_or_refused(studio, text):
    """Some text, or one line with both lengths."""
    vectors = torch.zeros(1, studio.config.tokens, studio.config.channels)
    if len(studio.tokenizer.encode(text)) > studio.config.text_length:
        with pytest.raises(ValueError, match="at most"):
            studio.answer(vectors, [text])
    else:
        assert isinstance(studio.answer(vectors, [text])[0], str)


def test_a_prompt_that_is_too_long_ends_in_one_line(capsys, micro_run, tmp_path):
    """Through the command line too, for prompts and questions; nothing is written."""
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    out = ["--run", str(micro_run), "--out", str(tmp_path / "out.png")]
    for task in (["?" * 300], ["--ask", "?" * 300, "--image", str(tmp_path / "x.png")]):
        named = "a text of 301 tokens, at most 256 are possible"
        assert not outcome(capsys, sample.main, [*task, *out], named)
    assert not (tmp_path / "out.png").exists()


def test_any_answer_is_printed(capsys, monkeypatch, micro_run, tmp_path):
    """A model may write half a character, which a terminal refuses."""
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    monkeypatch.setattr(sample.Studio, "answer", lambda *_: ["a \ud800"])
    sample.main(["--run", str(micro_run), "--caption", str(tmp_path / "x.png")])
    assert capsys.readouterr().out.endswith("a \\ud800\n")
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as in a notebook, without reconfigure
    sample.main(["--run", str(micro_run), "--caption", str(tmp_path / "x.png")])
    assert sys.stdout.getvalue().endswith("a \ud800\n")


@cases(0.2)
@given(texts=st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=3))
def test_any_text_trains(studio, texts):
    """Captions, questions and answers of any kind make a sequence of bounded length."""
    rows, cut, limit = [], M.Counter(), studio.config.text_length
    for caption, question, answer in texts:
        entry = {"caption": caption, "clean": None, "qa": [[question, answer]]}
        rows.append(train.dialogue(entry, np.random.default_rng(0)))
    ids, learn = M.build_sequences(studio.tokenizer, rows, length=limit, cut=cut)
    assert ids.shape == learn.shape and ids.shape[1] <= 64 + 5 * (limit + 3) + 16
    long = sum(len(studio.tokenizer.encode(text or "")) > limit for row in rows for _, text in row)
    assert cut.total() == long and 0 <= ids.min() and ids.max() < len(studio.tokenizer)


def test_texts_that_were_cut_are_reported(capsys, micro_flags, tmp_path):
    """The stage's last line counts them; without any it says nothing of it."""
    short = [
        "--clip_steps",
        "1",
        "--vae_steps",
        "0",
        "--understand_steps",
        "1",
        "--tune_steps",
        "0",
    ]
    short += ["--generate_steps", "1", "--decode_steps", "0"]
    train.main([*micro_flags, *short, "--out", str(tmp_path / "a"), "--text_length", "3"])
    printed = capsys.readouterr().out
    assert "texts cut to 3 tokens: {'user': " in printed and "'bot': " in printed
    train.main([*micro_flags, *short, "--out", str(tmp_path / "b")])
    assert "cut to" not in capsys.readouterr().out


# -------------------------------------------------------------------------------------- images

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F", "LAB", "HSV", "PA")
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "EPS", "ICO", "PDF")


@st.composite
def pictures(draw):
    """Bytes of an image of any kind, mode and size, whole or damaged; or of nothing like it."""
    size = draw(st.tuples(st.integers(1, 60), st.integers(1, 60)))
    image = Image.new(draw(st.sampled_from(MODES)), size, draw(st.sampled_from([0, 1])))
    try:
        raw = encoded(image, draw(st.sampled_from(KINDS)))
    except (OSError, KeyError, ValueError):  # that kind doesn't know that mode
        raw = encoded(image.convert("RGB") if image.mode not in ("PA", "LAB") else photo_image())
    damage = draw(st.sampled_from(["none", "none", "cut", "flip", "noise"]))
    at = draw(st.integers(0, len(raw) - 1))
    if damage == "cut":
        raw = raw[:at]
    elif damage == "flip":
        raw = raw[:at] + bytes([raw[at] ^ draw(st.integers(1, 255))]) + raw[at + 1 :]
    elif damage == "noise":
        raw = draw(st.binary(max_size=200))
    return raw


def photo_image():
    return Image.open(io.BytesIO(photo()))


@cases(0.5)
@given(raw=pictures())
def test_any_image_is_read_or_refused(raw):
    """Upright RGB of at most the cap's pixels, or a ValueError with the reason."""
    try:
        image = data.decode_image(raw)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert image.mode == "RGB" and data.square(image, 16).shape == (16, 16, 3)


def test_no_program_is_started_for_an_image(monkeypatch):
    """Pillow would hand PostScript to Ghostscript, whatever the file's name says."""
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(ValueError, match="not an image"):
        data.decode_image(encoded(Image.new("RGB", (20, 20)), "EPS"))


@cases(0.04)
@given(raw=pictures())
def test_any_picture_file_is_captioned_or_named(capsys, micro_run, tmp_path, raw):
    """--caption and --reconstruct of any file: a result, or one line with its name."""
    path = tmp_path / "picture"
    path.write_bytes(raw)
    common = ["--run", str(micro_run), "--steps", "1", "--count", "1", "--decoder_steps", "1"]
    common += ["--out", str(tmp_path / "x.png")]
    for task in ("--caption", "--reconstruct"):
        outcome(capsys, sample.main, [task, str(path), *common], path)


# ---------------------------------------------------------------------------------------- shards


STRANGE = [getattr(tarfile, kind) for kind in ("SYMTYPE", "DIRTYPE", "XHDTYPE", "XGLTYPE")]
STRANGE += [getattr(tarfile, f"GNUTYPE_{kind}") for kind in ("SPARSE", "LONGNAME", "LONGLINK")]


@st.composite
def shards(draw):
    """A tar of members of every kind, sound and broken, in any order; perhaps damaged itself.

    -> bytes, whether packed with gzip, whether undamaged.
    """
    buffer, sound, keys = (
        io.BytesIO(),
        True,
        st.sampled_from(["a", "b", "../c", "/d", "e/f", "", ".", "g\n"]),
    )
    captions = st.one_of(st.just(b"a cat"), st.binary(max_size=30), TEXT.map(utf8))
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for _ in range(draw(st.integers(0, 8))):
            ending = draw(st.sampled_from(["jpg", "png", "txt", "TXT", "json", "jpg.txt", ""]))
            raw = draw(
                captions if "txt" in ending.lower() else st.one_of(st.just(SOUND), pictures())
            )
            info = tarfile.TarInfo(f"{draw(keys)}.{ending}")
            info.size = len(raw)
            info.type = draw(st.sampled_from([tarfile.REGTYPE] * 12 + STRANGE))
            sound &= info.type == tarfile.REGTYPE
            info.linkname = "/etc/passwd"
            tar.addfile(info, io.BytesIO(raw))
    whole, packed = buffer.getvalue(), draw(st.booleans())
    whole = gzip.compress(whole, 1, mtime=0) if packed else whole
    raw = bytearray(whole)
    for at in draw(st.lists(st.integers(0, len(raw) - 1), max_size=2)):
        raw[at] = draw(st.integers(0, 255))
    raw = raw[: draw(st.sampled_from([len(raw), len(raw), draw(st.integers(0, len(raw)))]))]
    return bytes(raw), packed, sound and raw == whole


def utf8(text):
    return text.encode("utf-8", "surrogatepass")


@cases(0.4)
@given(shard=shards())
def test_any_shard_is_read(tmp_path_factory, shard):
    """Sound samples come out, the rest is counted; what is whole is not called truncated."""
    raw, packed, whole = shard
    path = tmp_path_factory.mktemp("shard") / f"x.tar{'.gz' * packed}"
    path.write_bytes(raw)
    dropped = Counter()
    for _, image, caption in data.read_samples(str(path), dropped):
        assert image.mode == "RGB" and caption and caption == " ".join(caption.split())
    assert all("\n" not in reason for reason in dropped)
    assert not (whole and "truncated shard" in dropped)
    shutil.rmtree(path.parent)


ROWS = st.lists(
    st.one_of(
        st.binary(max_size=60),
        st.tuples(TEXT.map(utf8), st.sampled_from([b"0.jpg", b"", b".", b"x/0.jpg", b"0.jpg\0"])),
        st.tuples(st.binary(max_size=30), st.integers(0, 10**5).map(lambda n: b"n" * n + b".jpg")),
    ).map(lambda row: row if isinstance(row, bytes) else b"\t".join(row)),
    max_size=6,
)


@cases(0.2)
@given(rows=ROWS, end=st.sampled_from([b"\n", b"\r\n", b"\r"]))
@example(rows=[b"a\t" + b"n" * 300 + b".jpg", b"b\t0.jpg"], end=b"\n")
def test_any_table_is_read(tmp_path_factory, rows, end):
    """Rows with a sound picture come out, each other row is one that is counted."""
    folder = tmp_path_factory.getbasetemp() / "table"
    folder.mkdir(exist_ok=True)
    (folder / "0.jpg").write_bytes(SOUND)
    (folder / "x.tsv").write_bytes(end.join(rows))
    dropped = Counter()
    samples = list(data.read_samples(str(folder / "x.tsv"), dropped))
    assert len(samples) + dropped.total() == sum(1 for _ in open(folder / "x.tsv", "rb"))


@cases(0.08)
@given(drawn=st.lists(shards(), min_size=1, max_size=2))
def test_any_shards_are_prepared_or_named(capsys, tmp_path_factory, drawn):
    """A set with what is sound, or one line that says what was dropped."""
    folder = tmp_path_factory.mktemp("shards")
    for i, (raw, *_) in enumerate(drawn):
        (folder / f"{i}.tar").write_bytes(raw)
    arguments = ["photos", f"{folder}/*.tar", "--out", f"{folder}/set", "--size", "16"]
    if outcome(capsys, data.main, arguments, "no usable sample"):
        assert len(data.PreparedSet(folder / "set")) > 0
    shutil.rmtree(folder)


# ----------------------------------------------------------------------------------------- flags


@cases(0.3)
@given(flags=st.dictionaries(st.sampled_from(sorted(sample.LIMITS)), ANY_NUMBER, min_size=1))
@example(flags={"seed": f"{2**64}"})
@example(flags={"guidance": "nan"})
def test_any_flags_of_sample(capsys, flags):
    """Accepted within their limits, else named."""
    words = ["a circle", *(f"--{name}={value}" for name, value in flags.items())]
    stub = functools.wraps(sample.run_tasks)(lambda **_: None)
    with mock.patch.object(sample, "run_tasks", stub):
        outcome(capsys, sample.main, words, *(f"--{name}" for name in flags))


@cases(0.04)
@given(
    flags=st.fixed_dictionaries(
        {"count": st.sampled_from("12"), "steps": st.sampled_from("13")},
        optional={
            "guidance": st.floats(0, 100, allow_subnormal=False).map(str),
            "seed": st.integers(0, 2**32 - 1).map(str),
            "decoder_guidance": st.sampled_from(["0", "1", "100"]),
        },
    )
)
@example(flags={"seed": f"{2**32 - 1}", "guidance": "100", "decoder_guidance": "100"})
def test_accepted_flags_of_sample_draw(capsys, micro_run, tmp_path, flags):
    """What the limits allow gives a picture."""
    words = ["a circle", "--run", str(micro_run), "--out", str(tmp_path / "x.png")]
    words += [f"--{name}={value}" for name, value in flags.items()]
    assert outcome(capsys, sample.main, words)


DATA_FLAGS = {"seed": NUMBER, "count": st.sampled_from(["-1", "0", "1", "2", "9", "x", "1e3"])}


@cases(0.1)
@given(flags=st.fixed_dictionaries({}, optional=DATA_FLAGS | {"size": NUMBER}))
def test_any_flags_of_data(capsys, tmp_path_factory, flags):
    """A small set, or the flag's name."""
    if "count" not in flags and "size" not in flags:
        return
    out = tmp_path_factory.mktemp("set")
    words = ["shapes", *(f"--{name}={value}" for name, value in flags.items()), "--out", str(out)]
    outcome(capsys, data.main, words, *(f"--{name}" for name in flags))
    shutil.rmtree(out)


# as a program gets them: no zero byte, lone surrogates only for bytes that are not UTF-8
PLACE = st.one_of(
    st.sampled_from(["", ".", "x", "0.tar", "0.jpg", "empty", "loop", "x/y", "n" * 300, "0.jpg/y"]),
    st.binary(max_size=12).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"").lstrip(b"/."))),
)
TOWER = [
    "vit_tiny_patch16_224",
    "vit_tiny_patch16_224.x",
    "patch",
    "patch0",
    "resnet18",
    data.EXAMPLE_TOWER,
]
PHOTO_FLAGS = {
    "out": PLACE,
    "tower": st.one_of(PLACE, st.sampled_from(TOWER)),
    "weights": st.one_of(PLACE, st.just("untrained")),
    "device": st.one_of(PLACE, st.sampled_from(["cpu", "cuda", "mps", "cuda:0", "meta", "nn"])),
    "tokens": st.sampled_from(["1", "4", "5", "49", "4096"]),
}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The place where programs work: a shard, a picture, something empty, a link to itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_tar(tmp_path / "0.tar", [("0.jpg", SOUND), ("0.txt", b"x"), ("1.jpg", SOUND)])
    (tmp_path / "0.jpg").write_bytes(SOUND)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return tmp_path


@cases(0.1)
@given(
    sources=st.lists(PLACE, min_size=1, max_size=2),
    flags=st.fixed_dictionaries({}, optional=PHOTO_FLAGS),
)
@example(
    sources=["0.tar"],
    flags={"tower": "vit_tiny_patch16_224", "weights": "untrained", "device": "nn"},
)
@example(sources=["0.tar"], flags={"out": "\udcff"})
def test_any_words_of_data(capsys, folder, sources, flags):
    """Photos from any place into any place, with any tower: a set, or one line."""
    words = ["photos", *(f"--{name}={value}" for name, value in flags.items()), "--", *sources]
    outcome(capsys, data.main, words, "")


@cases(0.1)
@given(
    flags=st.dictionaries(
        st.sampled_from(["run", "out", "caption", "image", "reconstruct"]), PLACE, min_size=1
    )
)
def test_any_words_of_sample(capsys, folder, micro_run, flags):
    """A picture or a run from any place, a picture to any place: done, or one line."""
    flags = {"run": str(micro_run), "steps": 1, "decoder_steps": 1, "count": 1} | flags
    words = ["a circle", "--ask=what?", *(f"--{name}={value}" for name, value in flags.items())]
    outcome(capsys, sample.main, words, "")


@cases(0.1)
@given(flags=st.fixed_dictionaries({"data": PLACE}, optional={"out": PLACE}))
def test_any_words_of_train(capsys, folder, micro_flags, flags):
    """No set in any place: one line."""
    words = [*micro_flags, *(f"--{name}={value}" for name, value in flags.items())]
    assert not outcome(capsys, train.main, words, "")


@pytest.mark.parametrize("size", ["-1", "7", "1025", "1e3", f"{2**40}", ""])
def test_a_size_out_of_bounds_is_named(capsys, tmp_path, size):
    assert not outcome(capsys, data.main, ["photos", str(tmp_path), f"--size={size}"], "--size")


def test_a_device_that_is_missing_is_named(capsys, tmp_path, monkeypatch):
    """As in train.py, before anything is read."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tower = ["--tower", "vit_tiny_patch16_224", "--weights", "untrained", "--device", "cuda"]
    words = ["photos", str(tmp_path), "--out", str(tmp_path / "set"), *tower]
    assert not outcome(capsys, data.main, words, "--device cuda")


TRAIN_NAMES = [field.name for field in train.fields(train.Config)]


@cases(0.6)
@given(
    flags=st.dictionaries(
        st.sampled_from(TRAIN_NAMES),
        st.one_of(ANY_NUMBER, st.text(CHARACTERS, max_size=5)),
        min_size=1,
    )
)
def test_any_flags_of_train(capsys, flags):
    """A config, or one line that names a flag."""
    words = [f"--{name}={value}" for name, value in flags.items()]
    outcome(capsys, train.parse_config, words, "--")


STEPS = [f"{stage}_steps" for stage in train.STAGES if stage != "cache"]
SMALL = {
    **{name: st.integers(0, 1) for name in STEPS},
    **{name: st.sampled_from([32, 64]) for name in ("width", "dit_width", "decoder_width")},
    **{name: st.integers(1, 3) for name in ("clip_batch", "vae_batch", "draws", "vae_depth")},
    **{name: st.floats(0, 1, allow_subnormal=False) for name in train.SHARES},
    **{
        name: st.floats(0, 1e20, allow_subnormal=False)
        for name in ("lr", "shift", "weight_decay", "clip_norm")
    },
    **{
        name: st.floats(0, 1e20, allow_subnormal=False)
        for name in ("clip_noise", "pixel_weight", "edge_weight", "decoder_noise")
    },
    "tokens": st.sampled_from([1, 4, 16, 64, 256]),
    "channels": st.integers(1, 40),
    "text_length": st.integers(1, 300),
    "seed": st.integers(0, 2**63 - 1),
    "head_dim": st.sampled_from([2, 16, 32]),
    "dit_patch": st.integers(1, 3),
    "decoder_patch": st.integers(1, 5),
    "predicts": st.sampled_from("xv"),
    "treatment": st.sampled_from(["standardise", "whiten"]),
    "optimizer": st.sampled_from(["muon", "adamw"]),
}


@cases(0.03)
@given(flags=st.fixed_dictionaries({}, optional=SMALL))
@example(flags={"decoder_patch": 3})
@example(flags={"clip_steps": 1, "treatment": "whiten", "lr": 6635218.0})
def test_accepted_flags_of_train_run(capsys, micro_flags, tmp_path_factory, flags):
    """A whole run of a step a stage, or one line that names what does not fit."""
    out = tmp_path_factory.mktemp("fuzz")
    flags = dict.fromkeys(STEPS, 1) | flags
    words = [
        *micro_flags,
        "--out",
        str(out),
        *(f"--{name}={value}" for name, value in flags.items()),
    ]
    outcome(capsys, train.main, words, "--", "not finite")
    shutil.rmtree(out)


@pytest.mark.parametrize("name", ["width", "clip_width", "dit_width", "decoder_width"])
def test_too_little_memory_is_said(capsys, micro_flags, tmp_path, name):
    """Terabytes of weights end in one line with their number."""
    words = [*micro_flags, "--out", str(tmp_path), f"--{name}={2**20 - 32}"]
    assert not outcome(capsys, train.main, words, "allocate")


# ----------------------------------------------------------------------------- files edited by hand


@st.composite
def edits(draw):
    """A change of a text file: a character, a part that is lost, other JSON."""
    kind = draw(st.sampled_from(["replace", "lose", "json", "binary"]))
    at, until = sorted(
        draw(
            st.tuples(
                st.floats(0, 1, allow_subnormal=False), st.floats(0, 1, allow_subnormal=False)
            )
        )
    )
    character = draw(st.sampled_from('0123456789{}[]",:- ax'))
    value = draw(st.sampled_from(["{}", "[]", "null", "0", '{"crc32": 0}', "[" * 5000, ""]))
    binary = draw(st.binary(max_size=50))

    def edit(raw):
        a, b = int(at * (len(raw) - 1)), int(until * (len(raw) - 1))
        if kind == "replace":
            return raw[:a] + character.encode() + raw[a + 1 :]
        if kind == "lose":
            return raw[:a] + raw[b:]
        return value.encode() if kind == "json" else raw[:a] + binary + raw[b:]

    return edit


def same_json(a, b):
    """True if both are JSON of one meaning, as with other blanks between the values."""
    try:
        return json.loads(a) == json.loads(b)
    except (ValueError, RecursionError):
        return False


@cases(0.4)
@given(edit=edits())
def test_an_edited_set_is_named(tmp_path_factory, edit):
    """meta.json opens as it was written, or is named with what to do."""
    folder = tmp_path_factory.getbasetemp() / "edited"
    if not folder.exists():
        data.prepare_shapes(folder, 4)
        shutil.copy(folder / "meta.json", folder / "whole")
    raw = (folder / "whole").read_bytes()
    (folder / "meta.json").write_bytes(edit(raw))
    if same_json(edit(raw), raw):
        assert len(data.PreparedSet(folder)) == 4
    else:
        with pytest.raises(ValueError, match="meta.json is damaged or was edited: delete"):
            data.PreparedSet(folder)
        with pytest.raises(ValueError, match="meta.json is damaged or was edited: delete"):
            data.prepare_shapes(folder, 4)


@cases(0.2)
@given(edit=edits())
def test_edited_progress_is_named(tmp_path_factory, edit):
    """Unfinished too: a set is never put together from rows that do not belong together."""
    folder = tmp_path_factory.mktemp("progress")
    settings = {
        "kind": "shapes",
        "count": 4,
        "seed": 0,
        "size": 64,
        "format": data.FORMAT["shapes"],
    }
    state = {"settings": settings, "units": 0, "count": 0, "arrays": {}, "dropped": {}}
    data.write_json(folder / "meta.json", state)
    raw = (folder / "meta.json").read_bytes()
    (folder / "meta.json").write_bytes(edit(raw))
    if same_json(edit(raw), raw):
        assert len(data.prepare_shapes(folder, 4)) == 4
    else:
        with pytest.raises(ValueError, match="meta.json is damaged or was edited: delete"):
            data.prepare_shapes(folder, 4)
    shutil.rmtree(folder)


@cases(0.2)
@given(edit=edits(), name=st.sampled_from(["images", "text", "text_index"]))
def test_damaged_arrays_are_named(tmp_path_factory, edit, name):
    """A .npy file with another header, or cut, is named; nothing in it is executed."""
    folder = tmp_path_factory.getbasetemp() / "arrays"
    if not folder.exists():
        data.prepare_shapes(folder, 4)
    path = folder / f"{name}.npy"
    raw = path.read_bytes()
    path.write_bytes(edit(raw[:200]) + raw[200:])
    try:
        data.open_array(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    path.write_bytes(raw)
