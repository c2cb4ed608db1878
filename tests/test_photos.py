"""Real photos: every broken input, prepared sets that resume, and the image towers."""

import gzip
import io
import json
import os
import re
import struct
import tarfile
import tracemalloc
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import data
import sample
import train


def encoded(image, kind="PNG", **options):
    """A PIL image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(seed=0, size=(40, 32), kind="JPEG"):
    """A sound picture file of noise."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    return encoded(Image.fromarray(pixels), kind)


SOUND = photo()


def write_tar(path, files):
    """Writes (name, bytes) pairs as a tar shard."""
    with tarfile.open(path, "w") as shard:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def read(source):
    """-> [(key, image, caption)], {reason: count}."""
    dropped = Counter()
    return list(data.read_samples(source, dropped)), dict(dropped)


def read_one(tmp_path, image, caption=b"a cat", ending="jpg"):
    return read(write_tar(tmp_path / "x.tar", [(f"1.{ending}", image), ("1.txt", caption)]))


def claims(width, height):
    """A PNG whose header claims a size that its data do not have."""
    chunk = b"IHDR" + struct.pack(">II", width, height)
    whole = photo(size=(16, 16), kind="PNG")
    body = chunk + whole[24:29]
    return whole[:12] + body + struct.pack(">I", zlib.crc32(body)) + whole[33:]


# ------------------------------------------------------------------------------- broken inputs

BROKEN = {
    "truncated JPEG": (photo(size=(128, 128))[:8000], "broken image"),
    "HTML saved as .jpg": (b"<html><body>404 not found</body></html>", "not an image"),
    "an empty file": (b"", "not an image"),
    "a PNG cut in its header": (photo(kind="PNG")[:20], "not an image"),
    "too many pixels": (claims(8000, 8000), "more than 40 megapixels"),
    "a decompression bomb": (claims(30000, 30000), "more than 40 megapixels"),
    "tiny": (photo(size=(7, 9)), "a side under 8 px or aspect beyond 3"),
    "one pixel": (photo(size=(1, 1)), "a side under 8 px or aspect beyond 3"),
    "long": (photo(size=(100, 33)), "a side under 8 px or aspect beyond 3"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_dropped_and_counted(tmp_path, name):
    """What is wrong drops that sample alone, under its reason; its neighbours are kept."""
    bad, reason = BROKEN[name]
    files = [("1.jpg", photo()), ("1.txt", b"one"), ("2.jpg", bad), ("2.txt", b"two")]
    samples, dropped = read(
        write_tar(tmp_path / "x.tar", files + [("3.png", photo()), ("3.txt", b"3")])
    )
    assert [key for key, *_ in samples] == ["1", "3"] and dropped == {reason: 1}


def test_the_pixel_cap_is_read_from_the_header(monkeypatch):
    """No pixel is decoded before the size is known to be fine."""
    bomb = claims(8000, 8000)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="more than 40 megapixels"):
        data.decode_image(bomb)
    assert data.MAX_PIXELS == 40_000_000


CAPTIONS = {
    b"caf\xe9": "caption is not UTF-8",  # Latin-1
    b"": "empty caption",
    b" \n\t ": "empty caption",
}


@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_broken_caption_is_dropped(tmp_path, caption):
    """Latin-1 bytes and emptiness drop the sample; white space is tidied, UTF-8 is kept."""
    assert read_one(tmp_path, photo(), caption) == ([], {CAPTIONS[caption]: 1})
    samples, dropped = read_one(tmp_path, photo(), "\ufeff a  café\n\u732b ".encode())
    assert samples[0][2] == "a café \u732b" and not dropped


def test_missing_parts_and_duplicates_are_counted(tmp_path):
    """No caption, no image, a second file of one kind, a key that comes again: each its reason."""
    files = [("1.jpg", photo(1)), ("2.txt", b"two"), ("3.jpg", photo(3)), ("3.txt", b"three")]
    files += [("3.txt", b"other"), ("4.JPG", photo(4)), ("4.Txt", b"four"), ("4.json", b"{}")]
    files += [("3.jpg", photo(5)), ("3.txt", b"again"), ("README", b"no sample"), (".hidden", b"")]
    samples, dropped = read(write_tar(tmp_path / "x.tar", files))
    assert [(key, caption) for key, _, caption in samples] == [("3", "three"), ("4", "four")]
    assert dropped == {"missing caption": 1, "missing image": 1, "duplicate key": 2}


def test_keys_end_at_the_first_dot(tmp_path):
    """As in webdataset: a.b.jpg is of kind b.jpg and no image; folders are part of the key."""
    files = [("a.b.jpg", photo()), ("x/1.jpg", photo()), ("x/1.txt", b"x"), ("y/1.jpg", photo())]
    samples, dropped = read(write_tar(tmp_path / "x.tar", files + [("y/1.txt", b"y")]))
    assert [key for key, *_ in samples] == ["x/1", "y/1"] and not dropped


def test_transparency_is_shown_on_white(tmp_path):
    """RGBA and palette with tRNS bytes: hidden colors stay hidden, the background is white."""
    rgba = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    rgba.paste((0, 0, 255, 255), (0, 0, 8, 16))
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.paste(0, (0, 0, 8, 16))
    for content in (
        encoded(rgba),
        encoded(palette, transparency=b"\xff\x00"),
        encoded(rgba, "WEBP", lossless=True),
    ):
        image = data.decode_image(content)
        assert image.mode == "RGB"
        assert image.getpixel((2, 8)) == (0, 0, 255) and image.getpixel((12, 8)) == (255, 255, 255)


def test_cmyk_gray_and_bilevel_become_rgb():
    """Every 8-bit mode is converted and keeps its color."""
    cmyk = data.decode_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert cmyk.mode == "RGB" and np.allclose(cmyk.getpixel((8, 8)), (255, 0, 0), atol=4)
    for mode, value in (("L", 100), ("LA", (100, 255)), ("1", 1)):
        gray = data.decode_image(encoded(Image.new(mode, (16, 16), value)))
        assert gray.getpixel((8, 8)) == ((100,) * 3 if mode != "1" else (255,) * 3)


def test_sixteen_bits_are_scaled():
    """A 16-bit PNG of 30000 is 30000 / 257 = 117 gray, not white."""
    deep = Image.fromarray(np.full((16, 16), 30000, np.uint16))
    assert data.decode_image(encoded(deep)).getpixel((8, 8)) == pytest.approx((117,) * 3, abs=1)


def test_exif_orientation_is_applied():
    """Orientation 6 turns the picture by 90 degrees clockwise: left becomes top."""
    image = Image.new("RGB", (24, 12), "blue")
    image.paste("red", (0, 0, 12, 12))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = data.decode_image(encoded(image, exif=exif))
    assert upright.size == (12, 24)
    assert upright.getpixel((6, 4)) == (255, 0, 0) and upright.getpixel((6, 20)) == (0, 0, 255)


@pytest.mark.parametrize("where", ["data", "header", "padding"])
def test_a_truncated_tar_keeps_what_is_whole(tmp_path, where):
    """The samples before the cut are kept, the cut is counted, the next shard is read."""
    files = [
        (f"{i}.{kind}", content)
        for i in range(3)
        for kind, content in (("txt", b"x"), ("jpg", photo(i)))
    ]
    path = write_tar(tmp_path / "0.tar", files)
    with tarfile.open(path) as shard:
        last = shard.getmember("2.jpg")
    cut = {"data": last.offset_data + 50, "header": last.offset + 100, "padding": last.offset}[
        where
    ]
    path.write_bytes(path.read_bytes()[:cut])
    write_tar(tmp_path / "1.tar", [("9.jpg", photo()), ("9.txt", b"x")])
    samples, dropped = read(str(tmp_path / "*.tar"))
    assert [key for key, *_ in samples] == ["0", "1", "9"]
    assert dropped == {"truncated shard": 1, "missing image": 1}


def test_a_truncated_tar_gz_is_counted(tmp_path):
    """Wherever it is cut: within the packed bytes, or packed from a tar that was cut before."""
    files = [(f"{i}.{kind}", photo(i)) for i in range(2) for kind in ("jpg", "txt")]
    raw = write_tar(tmp_path / "x.tar", files).read_bytes()
    packed, path = gzip.compress(raw), tmp_path / "x.tar.gz"
    ends = [gzip.compress(raw[:end]) for end in range(0, len(raw.rstrip(bytes(1))), 512)]
    for cut in [packed[:end] for end in range(0, len(packed) - 50, 97)] + ends:
        path.write_bytes(cut)
        assert read(path)[1]["truncated shard"] == 1
    path.write_bytes(packed)
    assert "truncated shard" not in read(path)[1]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_flipped_header_loses_nothing_in_silence(tmp_path, ending):
    """tarfile takes a header whose checksum is wrong for the end: the rest is counted as lost."""
    files = [(f"{i}.{kind}", x) for i in range(3) for kind, x in (("txt", b"x"), ("jpg", SOUND))]
    path = write_tar(tmp_path / "x.tar", files)
    with tarfile.open(path) as shard:
        at = shard.getmember("1.txt").offset + 5
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path = tmp_path / f"y.tar{ending}"
    path.write_bytes(gzip.compress(raw) if ending else raw)
    samples, dropped = read(path)
    assert [key for key, *_ in samples] == ["0"] and dropped == {"truncated shard": 1}


def test_what_is_no_tar_is_counted(tmp_path):
    """Random bytes and an empty file called .tar are lost shards, not crashes."""
    (tmp_path / "0.tar").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "1.tar").write_bytes(b"")
    assert read(str(tmp_path / "*.tar")) == ([], {"truncated shard": 2})


def test_a_table_keeps_rows_that_begin_with_a_quote(tmp_path):
    """caption<TAB>path is read line by line: a quote opens nothing, a missing file is counted."""
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(photo(i))
    rows = [
        '"quoted\t0.jpg',
        'a "b" c\t1.jpg',
        "gone\tno.jpg",
        "no path",
        f"whole\t{tmp_path}/2.jpg",
    ]
    (tmp_path / "x.tsv").write_text("\n".join(rows))
    samples, dropped = read(tmp_path / "x.tsv")
    assert [caption for *_, caption in samples] == ['"quoted', 'a "b" c', "whole"]
    assert dropped == {"missing image": 2}


def test_a_row_that_is_too_long_is_one_that_is_dropped(tmp_path):
    """Its rest is no row of its own, whatever it looks like; the rows around it are read."""
    (tmp_path / "0.jpg").write_bytes(SOUND)
    for lost in (b"x" * data.MAX_ROW + b"\t0.jpg", b"y\t" + b"./" * data.MAX_ROW + b"0.jpg"):
        (tmp_path / "x.tsv").write_bytes(b"a\t0.jpg\n" + lost + b"\nb\t0.jpg")
        samples, dropped = read(tmp_path / "x.tsv")
        assert [caption for *_, caption in samples] == ["a", "b"]
        assert dropped == {"missing image": 1}


def test_a_folder_is_a_source(tmp_path):
    """Images with .txt beside them, in subfolders too, in the order of their names."""
    for i, name in enumerate(("b", "a/x", "a/y")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.webp").write_bytes(photo(i, kind="WEBP"))
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "a/y.txt").unlink()
    samples, dropped = read(tmp_path)
    assert [caption for *_, caption in samples] == ["a/x", "b"] and dropped == {
        "missing caption": 1
    }


def test_a_folder_keys_its_files_by_all_but_the_ending(tmp_path):
    """Further dots belong to the name, files that begin with one are not looked at, and a link to
    nothing loses its own sample alone."""
    names = ("photo 1.2", "photo 1.3", "photo", "._photo", "photo.k")
    for i, name in enumerate(names):
        (tmp_path / f"{name}.jpg").write_bytes(photo(i))
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "gone.txt").write_text("x")
    samples, dropped = read(tmp_path)
    assert {text for *_, text in samples} == set(names) - {"._photo"} and len(samples) == 4
    assert all(Path(key).name == text for key, _, text in samples)
    assert dropped == {"missing image": 1}
    assert len(data.prepare_photos(tmp_path, tmp_path / "set")) == 4


@pytest.mark.parametrize("kind", ["folder", "table"])
@pytest.mark.parametrize("moment", ["open", "read"])
def test_an_unreadable_file_loses_its_sample_alone(tmp_path, monkeypatch, kind, moment):
    """Rights or a bad block: the sample is dropped and counted once, the rest is kept."""
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(photo(i))
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "all.tsv").write_text("".join(f"text {i}\t{i}.jpg\n" for i in range(3)))

    class BadDisk(io.BytesIO):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    def failing_open(path, *mode):
        if str(path).endswith("1.jpg"):
            if moment == "open":
                raise PermissionError(13, "Permission denied")
            return BadDisk()
        return open(path, *mode)

    monkeypatch.setattr(data, "open", failing_open, raising=False)
    samples, dropped = read(tmp_path if kind == "folder" else tmp_path / "all.tsv")
    assert [text for *_, text in samples] == ["text 0", "text 2"]
    assert dropped == {"unreadable file": 1}


def test_a_source_that_is_none_is_named(tmp_path):
    """A pattern without files or a file of another kind is refused by its name."""
    (tmp_path / "x.zip").write_bytes(b"")
    for source in (tmp_path / "x.zip", tmp_path / "*.tar", tmp_path / "none"):
        with pytest.raises(ValueError) as error:
            read(source)
        assert str(source) in str(error.value)


def test_a_folder_of_shards_is_sent_to_its_shards(tmp_path, monkeypatch):
    """What img2dataset leaves, tars with tables and statistics beside them, is no folder of
    photos: no shard is read for nothing, and the message has what to give instead. A tar beside
    photos is none of them."""
    folder = tmp_path / "in"
    folder.mkdir()
    shard(folder / "00000.tar", 0, 4)
    (folder / "00000.parquet").write_bytes(b"PAR1")
    (folder / "00000_stats.json").write_text("{}")
    opened, read_file = [], data.read_file
    monkeypatch.setattr(data, "read_file", lambda path: opened.append(path) or read_file(path))
    with pytest.raises(ValueError, match=r"no pictures; .*'FOLDER/\*.tar'"):
        data.prepare_photos(folder, tmp_path / "set")
    assert not opened and len(read(folder / "*.tar")[0]) == 4
    (folder / "a.jpg").write_bytes(photo(0))
    (folder / "a.txt").write_text("a photo")
    assert len(read(folder)[0]) == 1 and len(opened) == 2


def test_nothing_is_unpacked(tmp_path, monkeypatch):
    """Member names are data: reading and preparing writes the set and nothing else."""
    for name in ("extract", "extractall"):
        monkeypatch.setattr(tarfile.TarFile, name, lambda *_, **__: pytest.fail("unpacked"))
    evil = [("../../evil.jpg", photo()), ("../../evil.txt", b"x"), ("/abs.jpg", photo())]
    write_tar(
        tmp_path / "x.tar", evil + [("/abs.txt", b"y"), ("ok.jpg", photo()), ("ok.txt", b"z")]
    )
    prepared = data.prepare_photos(tmp_path / "x.tar", tmp_path / "set")
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    names = ("images.npy", "pictures.npy", "text.npy", "text_index.npy", "meta.json", ".lock")
    assert files == {"x.tar", *(f"set/{name}" for name in names)} and len(prepared) == 3


# ------------------------------------------------------------------------------- prepared sets


def shard(path, first, good, bad=0):
    """A shard of `good` sound samples and `bad` broken ones."""
    files = []
    for i in range(first, first + good + bad):
        content = photo(i, (24, 20)) if i < first + good else b"<html>"
        files += [(f"{i:05d}.jpg", content), (f"{i:05d}.txt", f"photo number {i}".encode())]
    return write_tar(path, files)


def test_losing_more_than_half_is_said_loudly(tmp_path, capsys):
    """The losses are counted by reason in the report and the folder; above half in capitals."""
    shard(tmp_path / "good.tar", 0, 6, 5)
    shard(tmp_path / "bad.tar", 0, 5, 6)
    data.prepare_photos(tmp_path / "good.tar", tmp_path / "a")
    assert "WARNING" not in (quiet := capsys.readouterr().out) and "6 samples kept" in quiet
    prepared = data.prepare_photos(tmp_path / "bad.tar", tmp_path / "b")
    loud = capsys.readouterr().out
    assert "MORE THAN HALF" in loud and "5 samples kept, 6 dropped {'not an image': 6}" in loud
    assert prepared.meta["dropped"] == {"not an image": 6}
    shard(tmp_path / "none.tar", 0, 0, 3)
    with pytest.raises(ValueError, match="no usable sample.*'not an image': 3"):
        data.prepare_photos(tmp_path / "none.tar", tmp_path / "c")


def test_a_prepared_photo_is_the_central_square(tmp_path):
    """Pictures are cropped, not squeezed, and lie beside their captions."""
    image = Image.new("RGB", (96, 64), "blue")
    image.paste("red", (16, 0, 80, 64))
    write_tar(
        tmp_path / "x.tar",
        [
            ("1.png", encoded(image)),
            ("1.txt", b"one"),
            ("2.png", encoded(image)),
            ("2.txt", b"two"),
        ],
    )
    prepared = data.prepare_photos(tmp_path / "x.tar", tmp_path / "set", size=32)
    assert prepared.images.shape == (2, 32, 32, 3)
    assert (prepared.images[0] == (255, 0, 0)).all()
    assert prepared.texts(1) == {"caption": "two", "clean": None, "qa": []}


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("kind", ["shapes", "photos"])
@pytest.mark.parametrize("kill", [0, 1, 2, 3])
def test_preparing_resumes_bytewise_the_same(tmp_path, monkeypatch, kind, kill):
    """Killed between a write and its commit, the same command again gives the same bytes."""
    for i in range(3):
        shard(tmp_path / f"{i}.tar", 100 * i, 5 + i, i)
    monkeypatch.setattr(data, "CHUNK", 20)
    prepare = partial(data.prepare_photos, str(tmp_path / "*.tar"))
    prepare = partial(data.prepare_shapes, count=50, seed=3) if kind == "shapes" else prepare
    prepare(out=tmp_path / "whole")
    commit, commits = data.write_json, []

    def die(path, value):
        if len(commits) == kill:
            raise KeyboardInterrupt
        commits.append(commit(path, value))

    monkeypatch.setattr(data, "write_json", die)
    with pytest.raises(KeyboardInterrupt):
        prepare(out=tmp_path / "killed")
    with pytest.raises(ValueError, match="is not a finished set"):
        data.PreparedSet(tmp_path / "killed")
    if kill < 3:  # the last commit follows no rows
        with open(tmp_path / "killed/images.npy", "ab") as torn:
            torn.write(b"half a row")
    monkeypatch.setattr(data, "write_json", commit)
    prepare(out=tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_finished_set_is_not_made_again(tmp_path, monkeypatch):
    """The same command opens what is there."""
    data.prepare_shapes(tmp_path, 20)
    monkeypatch.setattr(data, "draw_scenes", lambda *_: pytest.fail("drawn again"))
    assert len(data.prepare_shapes(tmp_path, 20)) == 20


def test_rows_lie_on_the_disk_once(tmp_path, monkeypatch):
    """An unfinished set takes no more room than a finished one, and its files are sound arrays."""
    monkeypatch.setattr(data, "CHUNK", 10)
    commit, sizes = data.write_json, []

    def measured(path, value):
        sizes.append(sum(file.stat().st_size for file in tmp_path.glob("*")))
        assert len(np.load(tmp_path / "images.npy")) == value["count"]
        commit(path, value)

    monkeypatch.setattr(data, "write_json", measured)
    data.prepare_shapes(tmp_path, 40)
    assert len(sizes) == 5 and sizes == sorted(sizes) and sizes[4] - sizes[3] < 500


def test_other_settings_are_refused(tmp_path, monkeypatch):
    """A folder of another count, seed, size, source or kind is named, with what it holds."""
    data.prepare_shapes(tmp_path / "s", 20, seed=1)
    path = shard(tmp_path / "0.tar", 0, 4)
    data.prepare_photos(path, tmp_path / "p", size=16)
    before = contents(tmp_path / "s") | contents(tmp_path / "p")
    shapes, photos = data.prepare_shapes, data.prepare_photos
    tower = ("vit_tiny_patch16_224", 64, "untrained")
    tries = {  # only what differs is named, as it is in the set
        "'seed': 1}": partial(shapes, tmp_path / "s", 20, 2),
        "'count': 20}": partial(shapes, tmp_path / "s", 21, 1),
        "'size': 16}": partial(photos, path, tmp_path / "p", 32),
        "'tower': None, ": partial(photos, path, tmp_path / "p", 16, *tower),
        "'kind': 'shapes', ": partial(photos, path, tmp_path / "s"),
    }
    for held, attempt in tries.items():
        with pytest.raises(ValueError, match=f"was prepared with other settings, {{{held}.*delete"):
            attempt()
    shard(path, 0, 40)  # the same name, other contents
    with pytest.raises(ValueError, match="0.tar"):
        data.prepare_photos(path, tmp_path / "p", size=16)
    assert contents(tmp_path / "s") | contents(tmp_path / "p") == before


def test_a_folder_that_changed_is_another_source(tmp_path):
    """A set is not taken for prepared where its folder of images holds other files now."""
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / f"in/{i}.jpg").write_bytes(photo(i))
        (tmp_path / f"in/{i}.txt").write_text("a photo")
    data.prepare_photos(tmp_path / "in", tmp_path / "set")
    (tmp_path / "in/0.jpg").write_bytes(photo(9, (50, 50)))
    with pytest.raises(ValueError, match="was prepared with other settings"):
        data.prepare_photos(tmp_path / "in", tmp_path / "set")


def test_an_unfinished_set_of_other_settings_is_refused(tmp_path, monkeypatch):
    """Rows of two seeds can't mix in one folder, not even after a kill."""
    monkeypatch.setattr(data, "CHUNK", 10)
    commits = iter([data.write_json] * 2)  # and then a kill
    monkeypatch.setattr(data, "write_json", lambda *value: next(commits)(*value))
    with pytest.raises(StopIteration):
        data.prepare_shapes(tmp_path, 20, seed=1)
    with pytest.raises(ValueError, match="'seed': 1"):
        data.prepare_shapes(tmp_path, 20, seed=2)


@pytest.mark.parametrize("count, held", [(10, 5), (600, 300), (2000, 500), (30000, 600)])
def test_the_split_is_two_percent_or_five_hundred(tmp_path, monkeypatch, count, held):
    """Training and validation rows are disjoint, complete and the same at every opening."""
    data.prepare_shapes(tmp_path, 10)
    monkeypatch.setattr(data.PreparedSet, "__len__", lambda _: count)
    prepared = data.PreparedSet(tmp_path)
    assert len(prepared.val_ids) == held
    assert np.array_equal(np.sort(np.r_[prepared.train_ids, prepared.val_ids]), np.arange(count))
    assert prepared.train_ids.max() < prepared.val_ids.min()  # shapes: the last rows


def test_all_captions_of_a_picture_lie_on_one_side_of_the_split(tmp_path):
    """12 pictures with 5 captions each, as in COCO: no picture is trained on and validated with."""
    files = [
        (f"{picture}-{text}.{kind}", photo(picture) if kind == "jpg" else b"text %d" % text)
        for text in range(5)
        for picture in range(12)
        for kind in ("jpg", "txt")
    ]
    write_tar(tmp_path / "x.tar", files)
    prepared = data.prepare_photos(tmp_path / "x.tar", tmp_path / "set", size=16)
    sides = [
        {prepared.images[i].tobytes() for i in ids}
        for ids in (prepared.train_ids, prepared.val_ids)
    ]
    assert len(sides[0]) == len(sides[1]) == 6 and not sides[0] & sides[1]
    assert np.array_equal(np.sort(np.r_[prepared.train_ids, prepared.val_ids]), np.arange(60))
    assert data.PreparedSet(tmp_path / "set").val_ids.tolist() == prepared.val_ids.tolist()
    write_tar(tmp_path / "y.tar", [file for file in files if file[0].startswith("3-")])
    data.prepare_photos(tmp_path / "y.tar", tmp_path / "one")
    with pytest.raises(ValueError, match=f"--data {tmp_path}/one: one picture, expected two"):
        train.Run(train.parse_config(["--data", f"{tmp_path}/one"]))


@pytest.mark.parametrize("captions", [(1, 3), (6, 1, 1), (5, 5, 5), (1, 1, 1, 9), (2, 1)])
def test_two_photos_are_enough_to_train_and_validate(tmp_path, captions):
    """However unevenly captions are spread, each side has a photo, and none is on both."""
    files = [
        (f"{i}-{text}.{kind}", photo(i) if kind == "jpg" else b"text")
        for i, count in enumerate(captions)
        for text in range(count)
        for kind in ("jpg", "txt")
    ]
    write_tar(tmp_path / "x.tar", files)
    prepared = data.prepare_photos(tmp_path / "x.tar", tmp_path / "set", size=16)
    train_side, val_side = (
        {prepared.images[i].tobytes() for i in ids}
        for ids in (prepared.train_ids, prepared.val_ids)
    )
    assert train_side and val_side and not train_side & val_side


def test_a_prepared_set_is_what_was_drawn(tmp_path):
    """Each row has its picture and its texts; the maps are not loaded into memory."""
    prepared = data.prepare_shapes(tmp_path, 1200, seed=4)
    rng = np.random.default_rng([4, 1000])
    prompts = data.category_prompts(rng, 200)
    images, scenes = data.draw_scenes(prompts, rng)
    assert np.array_equal(prepared.images[1000:], images)
    assert isinstance(prepared.images, np.memmap)
    for i in (0, 7, 199):
        assert prepared.texts(1000 + i) == data.scene_texts(prompts[i], scenes[i], 4, 1000 + i)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ("photos none/*.tar --out OUT", "none/*.tar"),
        ("shapes --count 1 --out OUT", "count"),
        ("shapes --count many", "many"),
        ("photos . --size 2 --out OUT", "size"),
        ("photos . --tower nonsense --out OUT", "nonsense"),
        ("photos . --weights x.safetensors --out OUT", "--tower"),
        ("photos . --int8 --out OUT", "--tower"),
        ("photos . --tower vit_tiny_patch16_224 --device cpux --out OUT", "cpux"),
        ("squares", "squares"),
    ],
)
def test_what_a_user_gets_wrong_ends_in_one_line(tmp_path, capsys, arguments, named):
    """Exit code 2 and a last line that names the value; no traceback, nothing written."""
    with pytest.raises(SystemExit) as stop:
        data.main(arguments.replace("OUT", str(tmp_path / "out")).split())
    assert stop.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_command_line_prepares(tmp_path, capsys):
    """python data.py shapes --count 20 writes a set and says where."""
    data.main(["shapes", "--count", "20", "--out", str(tmp_path)])
    assert f"{tmp_path}: 20 images of 64 px" in capsys.readouterr().out
    assert json.loads((tmp_path / "meta.json").read_text())["count"] == 20


@pytest.mark.parametrize("command", ["shapes", "photos"])
def test_help_lists_every_flag(capsys, command):
    """Each parameter with what the docstring says of it, as it stands there."""
    with pytest.raises(SystemExit) as stop:
        data.main([command, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for line in re.findall(r"^    (\w+: .+)", getattr(data, f"prepare_{command}").__doc__, re.M):
        assert all(part in told for part in line.split(": ")), line


# ----------------------------------------------------------------------------------- towers


def test_tokens_that_are_no_square_are_refused():
    """A number of tokens that is no square is named, before a tower is made."""
    with pytest.raises(ValueError, match="--tokens 63"):
        data.open_tower(data.EXAMPLE_TOWER, 63, "untrained")


@pytest.fixture
def small(monkeypatch):
    """timm's towers, but of width 32 and with one block; downloads fail."""
    create, made = timm.create_model, []

    def create_small(name, **options):
        made.append(create(name, **{**options, "embed_dim": 32, "depth": 1, "num_heads": 2}))
        return made[-1]

    monkeypatch.setattr(timm, "create_model", create_small)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return made


TOWERS = {  # name: prefix tokens, input side, mean
    "vit_base_patch16_clip_224.laion2b": (1, 256, 0.48145466),
    "vit_base_patch16_siglip_gap_224.v2_webli": (0, 256, 0.5),
    "vit_base_patch32_siglip_gap_256.v2_webli": (0, 256, 0.5),
    "vit_large_patch14_clip_224.laion2b": (1, 224, 0.5),
    "vit_small_patch14_reg4_dinov2.lvd142m": (5, 224, 0.485),
    data.EXAMPLE_TOWER: (1, 256, 0.48145466),
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_gives_its_patch_tokens(small, name):
    """With 0, 1 or 5 prefix tokens: only patches, normalised with the tower's own mean and std."""
    prefix, side, mean = TOWERS[name]
    torch.manual_seed(0)
    tower, facts = data.open_tower(name, 64, "untrained")
    (model,) = small
    assert model.num_prefix_tokens == prefix
    assert facts["side"] == side and facts["mean"][0] == pytest.approx(mean)
    image = torch.rand(2, 3, side, side)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    patches = model.forward_intermediates(
        (image - mean) / std, indices=1, norm=True, output_fmt="NLC", intermediates_only=True
    )[-1]
    grid = side // model.patch_embed.patch_size[0]
    assert patches.shape == (2, grid * grid, 32) and grid % 8 == 0
    cells = patches.view(2, 8, grid // 8, 8, grid // 8, 32).mean((2, 4)).flatten(1, 2)
    assert torch.allclose(tower(image), cells, atol=1e-5)


def test_a_tower_stays_frozen_under_its_parent(small):
    """parent.train() wakes neither dropout nor gradients, and the optimiser finds nothing."""
    tower, facts = data.open_tower("vit_tiny_patch16_224", 16, "untrained")
    parent = torch.nn.Sequential(tower, torch.nn.Dropout()).train()
    assert parent[1].training and not any(module.training for module in tower.modules())
    assert not any(p.requires_grad for p in parent.parameters())
    image = torch.rand(1, 3, facts["side"], facts["side"])
    assert not parent[0](image).requires_grad and torch.equal(tower(image), tower(image))


def test_quickgelu_weights_are_refused_under_the_plain_name(small):
    """timm loads them with plain GELU and only notes it: each is refused, with its right name."""
    noted = 0
    for name in timm.list_pretrained("vit_*_clip_*"):
        if "QuickGELU" in str(timm.models.get_pretrained_cfg(name).notes) and "quick" not in name:
            right = re.sub(r"_clip_(\d)", r"_clip_quickgelu_\1", name)
            with pytest.raises(ValueError, match=f"use {re.escape(right)}"):
                data.open_tower(name)
            noted += 1
    assert noted > 10 and not small
    data.open_tower("vit_base_patch16_clip_quickgelu_224.openai", 64, "untrained")
    activation, x = small[0].blocks[0].mlp.act, torch.linspace(-3, 3, 7)
    assert torch.allclose(activation(x), x * torch.sigmoid(1.702 * x))


UNKNOWN = ["nonsense", "resnet50", "vit_tiny_patch16", "patch16", "", "vit_tiny_patch16_224.x"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_tower_is_named(name):
    """The name that is wrong and one that is right are in the message."""
    with pytest.raises(ValueError, match=f"tower {name!r} is unknown.*tinyclip"):
        data.open_tower(name, 64, "untrained")


def released(name, file):
    """Weights as they are released, with a head and at the tower's own 224 px, in a file; the same
    tower at our side, with positions that timm resized."""
    torch.manual_seed(1)
    model = timm.create_model(name)
    save_file(model.state_dict(), file)
    model.set_input_size(256)
    return model


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224.laion2b", "vit_tiny_patch16_224"])
def test_tower_weights_come_from_a_file(small, tmp_path, name):
    """Offline a .safetensors file is read by timm's overlay, its head dropped and its positions
    resized to our side; a missing or wrong one is named."""
    wanted = released(name, tmp_path / "x.safetensors")
    tower, facts = data.open_tower(name, 256, tmp_path / "x.safetensors")
    image = torch.rand(1, 3, facts["side"], facts["side"])
    expected = wanted.forward_features(data.v2.functional.normalize(image, **tower.normal))[:, 1:]
    assert torch.allclose(tower(image), expected, atol=1e-4)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for file in (tmp_path / "bad.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(ValueError, match=f"cannot open tower {name} from {file}"):
            data.open_tower(name, 64, file)


FOREIGN = {  # keys of a file's weights
    "others": ["foo.weight"],
    "transformers": ["vision_model.encoder.layers.0.self_attn.k_proj.weight"],
    "a part": ["patch_embed.proj.weight"],
}


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_gap_224.v2_webli"]
)
@pytest.mark.parametrize("kind", FOREIGN)
def test_weights_of_another_model_are_refused(small, tmp_path, name, kind):
    """timm would take what fits and leave the rest of the tower random."""
    model = released(name, tmp_path / "x.safetensors")
    held = {key: model.state_dict().get(key, torch.ones(3)) for key in FOREIGN[kind]}
    save_file(held, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="no weights there for .*blocks.0.attn.qkv.weight"):
        data.open_tower(name, 64, tmp_path / "foreign.safetensors")


def test_a_tower_without_a_grid_of_tokens_is_refused():
    """It has patches in its name, and no sequence of them."""
    with pytest.raises(ValueError, match="cannot open tower swin_tiny_patch4_window7_224"):
        data.open_tower("swin_tiny_patch4_window7_224", 64, "untrained")


OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5,) * 3, (0.5,) * 3)
GOLDEN = {  # name: (mean, std), side, prefix tokens, width, licence
    data.EXAMPLE_TOWER: (OPENAI, 256, 1, 256, "mit"),
    "vit_base_patch16_clip_quickgelu_224.openai": (OPENAI, 256, 1, 768, "apache-2.0"),
    "vit_base_patch32_clip_224.laion2b": (OPENAI, 256, 1, 768, "apache-2.0"),
    "vit_large_patch14_clip_224.laion2b": (HALF, 224, 1, 1024, "apache-2.0"),
    "vit_base_patch16_siglip_224.webli": (HALF, 256, 0, 768, "apache-2.0"),
    "vit_base_patch16_siglip_gap_224.v2_webli": (HALF, 256, 0, 768, "apache-2.0"),
    "eva02_base_patch16_clip_224.merged2b": (OPENAI, 256, 1, 768, "mit"),
    "vit_large_patch14_clip_quickgelu_224.dfn2b": (OPENAI, 224, 1, 1024, "apple-ascl"),
    "eva02_large_patch14_clip_224.merged2b": (OPENAI, 224, 1, 1024, "mit"),
    "vit_so400m_patch14_siglip_gap_224.v2_webli": (HALF, 224, 0, 1152, "apache-2.0"),
}


@pytest.fixture
def shallow(monkeypatch):
    """timm's towers with one block only; their tokens are the normalised pixels that they get."""
    create, got = timm.create_model, []

    def create_shallow(name, **options):
        model = create(name, **{**options, "depth": 1})
        forward = model.forward_features
        model.forward_features = lambda x: got.append(x) or forward(x)
        return model

    monkeypatch.setattr(timm, "create_model", create_shallow)
    return got


@pytest.mark.parametrize("name", GOLDEN)
def test_a_tower_is_prepared_as_on_record(shallow, name):
    """What each family is fed: mean, std, side; and what it gives: the grid's tokens, its width.

    The pixels are those of timm's own transform, which resizes by the same filter, if that is
    told our side: by itself it would not know it.
    """
    (mean, std), side, prefix, width, licence = GOLDEN[name]
    tower, facts = data.open_tower(name, 64, "untrained")
    assert facts == {"mean": list(mean), "std": list(std), "side": side}
    assert (tower.model.num_prefix_tokens, tower.model.num_features) == (prefix, width)
    config = timm.data.resolve_model_data_config(tower.model)
    assert tower.model.pretrained_cfg["license"] == licence
    assert config["input_size"][1] == 224  # so it can't be asked for the side
    config |= {"input_size": (3, side, side), "crop_pct": 1.0}
    picture = Image.open(io.BytesIO(photo(0, (300, 300)))).convert("RGB")
    theirs = timm.data.create_transform(**config)(picture)
    pixels = torch.from_numpy(data.square(picture, side).copy()).permute(2, 0, 1)[None] / 255
    assert tower(pixels).shape == (1, 64, width)
    assert torch.allclose(shallow[0][0], theirs, atol=1e-5)


HUB = """We couldn't connect to the hub to load the files.
Check your internet connection or see how to run in offline mode.

    Very long advice. """


@pytest.mark.parametrize("reason", [None, HUB + "x" * 500])
def test_a_hub_out_of_reach_ends_in_one_line(monkeypatch, capsys, tmp_path, reason):
    """It says what to do: to go online, or to give a file; whatever the hub's library says."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def fails(*_, **__):
        raise OSError(reason)

    if reason:
        monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(SystemExit) as stop:
        tower = ["--tower", data.EXAMPLE_TOWER, "--out", str(tmp_path / "set")]
        data.main(["photos", str(tmp_path), *tower])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.count("\n") == 1 and len(told) < 400
    assert f"{data.EXAMPLE_TOWER} from timm's hub (go online, or give a file" in told
    assert "--weights" in told and ("OSError: We couldn't connect" in told or not reason)


@pytest.mark.parametrize("width, share", [(32, 1), (768, 1), (40, 1), (768, 30)])
def test_int8_keeps_the_vectors(width, share):
    """Within 1 % of the vectors, but for the 31 channels beside one that is 30 times the others:
    they lose 5 to 7 %."""
    features = torch.randn(4, 16, width, generator=torch.Generator().manual_seed(0)) * 0.3
    features[..., 5] *= share
    features[0, 0] = 0
    packed = data.pack(features, True)
    assert packed["features"].dtype == np.int8 and packed["scales"].dtype == np.float16
    restored = packed["features"] * packed["scales"].astype(np.float32)
    error = features - torch.from_numpy(restored).flatten(2)
    other = torch.arange(width) // 32 != 5 // 32  # the blocks without the loud channel
    if share > 1:
        assert error.norm() < 0.02 * features.norm()
        quiet = ~other & (torch.arange(width) != 5)  # they share the loud one's scale
        beside = error[..., quiet].norm() / features[..., quiet].norm()
        assert beside == pytest.approx(0.06, abs=0.015)
        error, features = error[..., other], features[..., other]
    assert error.norm() < 0.01 * features.norm() and not restored[0, 0].any()


def test_both_forms_of_features_are_read_alike(small, tmp_path):
    """`vectors` gives float32 rows of either; int8 is about half as large on the disk."""
    path = shard(tmp_path / "0.tar", 0, 40)
    sets, sizes = [], []
    for int8 in (False, True):
        torch.manual_seed(0)
        tower = ("vit_tiny_patch16_224", 16, "untrained")
        sets.append(data.prepare_photos(path, tmp_path / f"{int8}", 16, *tower, int8=int8))
        files = (tmp_path / f"{int8}").glob("[fs][ec]a*.npy")
        sizes.append(sum(path.stat().st_size - 128 for path in files))
    ids = np.array([3, 0, 17])
    exact, rough = (made.vectors(ids) for made in sets)
    assert exact.dtype == rough.dtype == np.float32 and exact.shape == rough.shape == (3, 16, 32)
    assert 0 < np.linalg.norm(exact - rough) < 0.01 * np.linalg.norm(exact)
    assert sizes == [40 * 16 * 32 * 2, 40 * 16 * (32 + 2)]
    assert sets[0].channels == sets[1].channels == 32


def test_what_a_set_takes_is_said(tmp_path, capsys):
    """One line with the samples, the bytes of one and of all, and the images a second."""
    shard(tmp_path / "0.tar", 0, 6)
    data.prepare_photos(tmp_path / "0.tar", tmp_path / "set", 16)
    size = sum(path.stat().st_size - 128 for path in (tmp_path / "set").glob("*.npy"))
    expected = rf"6 samples kept, 0 dropped; {size / 6:,.0f} bytes each, 0.0 MB, [\d,.]+ images/s"
    assert re.search(expected, capsys.readouterr().out)


def test_features_lie_beside_the_pictures(small, tmp_path):
    """Features are the tower's of the source image at its own size, under a name that says so."""
    name = "vit_tiny_patch16_224"
    shard(tmp_path / "0.tar", 0, 4)
    prepared = data.prepare_photos(tmp_path / "0.tar", tmp_path / "set", 16, name, 16, "untrained")
    vectors = prepared.vectors(np.arange(4))
    assert vectors.shape == (4, 16, 32) and vectors.dtype == np.float32 and prepared.channels == 32
    assert prepared.meta["settings"]["side"] == 256
    source = Image.open(io.BytesIO(photo(2, (24, 20)))).convert("RGB").crop((2, 0, 22, 20))
    view = np.asarray(source.resize((256, 256), Image.Resampling.BICUBIC))
    expected = data.Tower(small[0], 16)(torch.from_numpy(view.copy()).permute(2, 0, 1)[None] / 255)[
        0
    ]
    assert np.allclose(vectors[2], expected.numpy(), atol=0.01)


def test_other_weights_in_the_same_file_are_noticed(small, tmp_path):
    """Features of weights that were replaced are never reused."""
    name, weights = "vit_tiny_patch16_224", tmp_path / "x.safetensors"
    tower, _ = data.open_tower(name, 16, "untrained")
    shard(tmp_path / "0.tar", 0, 4)
    arguments = (tmp_path / "0.tar", tmp_path / "set", 16, name, 16, weights)
    save_file({k: v - 1 for k, v in tower.model.state_dict().items()}, weights)
    data.prepare_photos(*arguments)
    save_file({k: v + 1 for k, v in tower.model.state_dict().items()}, weights)
    with pytest.raises(ValueError, match="prepared with other settings"):
        data.prepare_photos(*arguments)


def test_reading_is_bounded_in_memory(tmp_path):
    """A file beyond the cap is cut while it is read, and its sample dropped by reason."""
    with open(tmp_path / "1.jpg", "wb") as file:
        os.truncate(file.fileno(), data.MAX_BYTES + 2**20)
    (tmp_path / "1.txt").write_text("large")
    samples, dropped = read(tmp_path)
    assert not samples and dropped == {"file over 64 MB": 1}


def peak(path):
    """The most bytes that Python held while all samples were read; and what was dropped."""
    tracemalloc.start()
    samples, dropped = read(path)
    assert not samples
    highest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return highest, dropped


def test_a_table_without_line_ends_is_bounded_in_memory(tmp_path):
    """256 MB without a line's end are one row that is dropped."""
    with open(tmp_path / "x.tsv", "wb") as file:
        os.truncate(file.fileno(), 2**28)
    highest, dropped = peak(tmp_path / "x.tsv")
    assert dropped == {"missing image": 1} and highest < 4e6


def test_many_files_of_one_name_are_bounded_in_memory(tmp_path):
    """A hundred of 1 MB: the first is held, the others are counted."""
    write_tar(tmp_path / "x.tar", [("1.jpg", bytes(2**20))] * 100)
    highest, dropped = peak(tmp_path / "x.tar")
    assert dropped == {"duplicate key": 99, "missing caption": 1}
    assert highest < data.MAX_BYTES + 20e6


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_long_name_is_bounded_in_memory(tmp_path, kind):
    """A header that says 100 MB of name follow ends the shard; tarfile would read them."""
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz", compresslevel=1) as shard:
        info = tarfile.TarInfo("name")
        info.size, info.type = 10**8, kind
        shard.addfile(info, io.BytesIO(bytes(10**8)))
    highest, dropped = peak(tmp_path / "x.tar.gz")
    assert dropped == {"truncated shard": 1} and highest < 20e6


def test_a_run_on_the_features_of_a_tower(small, tmp_path):
    """Without a CLIP of its own a run learns from a tower's features, draws, sees and is scored;
    numbers of channels or vectors that the set does not have are named."""
    shard(tmp_path / "0.tar", 0, 40)
    tower = ("vit_tiny_patch16_224", 16, "untrained")
    data.prepare_photos(tmp_path / "0.tar", tmp_path / "set", 16, *tower)
    flags = ["--preset", "micro", "--data", f"{tmp_path}/set", "--out", f"{tmp_path}/run"]
    flags += ["--device", "cpu", "--compile", "off"]
    refused = [(16, 64, 1, "--channels 64: .* the tower's 32")]
    refused += [(16, 16, 1, "--channels 16: .* the tower's 32")]
    refused += [(4, 32, 1, "--tokens 4: the set has 16"), (64, 32, 1, "--tokens 64, pictures of")]
    refused += [(16, 32, 2, r"--decoder_patch 2: expected one of \[1\] for 16 vectors")]
    for tokens, channels, patch, message in refused:
        sizes = [f"--tokens={tokens}", f"--channels={channels}", f"--decoder_patch={patch}"]
        with pytest.raises(ValueError, match=message):
            train.Run(train.parse_config([*flags, *sizes]))
    flags += ["--tokens=16", "--decoder_patch=1"]
    train.main([*flags, "--channels=16", "--treatment=whiten"])
    assert not (tmp_path / "run/clip.safetensors").exists()
    sample.main(["--run", f"{tmp_path}/run", "--evaluate"])
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert scores["psnr_reconstruction"] > 0 and "clip_top1_of_100" not in scores
    small.clear()
    studio = sample.Studio(tmp_path / "run/model.safetensors", {}, {})
    studio.draw(["a photo"], [0])
    assert not small  # a picture that is drawn needs no tower, one that is read does
    studio.see(np.zeros((1, 16, 16, 3), np.uint8))
    assert small
