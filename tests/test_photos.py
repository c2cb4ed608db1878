"""Real pictures: shards and folders as people have them, odd files, towers, sets that grow."""

import csv
import gzip
import io
import json
import re
import shutil
import tarfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import SIZES
from PIL import Image
from safetensors.torch import save_file

import data
import sample
import train

CONVNET, VIT = "tf_efficientnet_lite0", "vit_tiny_patch16_224"


def picture(seed=0, size=(40, 40)):
    """A random smooth picture."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.BICUBIC)


def raw(image, kind="PNG", **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def pairs(*keys):
    """The files of samples: a picture of its own and a caption for each key."""
    made = {}
    for key in keys:
        made[f"{key}.jpg"] = raw(picture(sum(key.encode())), "JPEG")
        made[f"{key}.txt"] = f"A photo of {key}.".encode()
    return made


def folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def tar(path, files):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as shard:
        for name, content in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def read(source):
    """{key: caption} and the dropped reasons of a source; the captions name the keys."""
    texts, rows, dropped = data.Photos(size=8).read(None, source)
    found = {text["caption"].removeprefix("a photo of "): text["caption"] for text in texts}
    assert len(found) == len(texts) == len(rows["images"])
    return found, dict(dropped)


def prepare(out, *sources, **how):
    return data.Photos(sources=tuple(map(str, sources)), out=str(out), **how).prepare()


# --------------------------------------------------------------------------- shards and folders

NO_TEXT = "no caption in UTF-8, in .txt or --captions"
NAMES = ("0001", "Mr. Smith", "Mr. Jones", "v1.5 cat", "deep/er/0002")


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz"])
def test_names_may_have_dots_and_what_is_not_used_is_counted(tmp_path, kind):
    files = pairs(*NAMES) | {"alone.png": raw(picture()), "0001.seg.png": raw(picture())}
    files |= {"0001.json": b"{}", "._a.jpg": b"mac", "._a.txt": b"mac", ".DS_Store": b"mac"}
    source = folder(tmp_path, files) if kind == "folder" else tar(tmp_path / f"s.{kind}", files)
    captions = {key.lower(): f"a photo of {key.lower()}" for key in NAMES}
    assert read(source) == (captions, {NO_TEXT: 2, "not an image": 1})


def test_what_is_lost_beside_the_pictures_is_counted(tmp_path):
    """Captions of formats that are not read, and folders that are linked."""
    made = folder(tmp_path / "f", pairs("a", "b") | {"c.heic": b"x", "c.txt": b"x", "d.txt": b"x"})
    (made / "more").symlink_to(folder(tmp_path / "elsewhere", pairs("e")))
    (made / "f.jpg").symlink_to(tmp_path / "elsewhere" / "e.jpg")
    (made / "f.txt").write_bytes(b"a photo of f")
    found, dropped = read(made)
    assert set(found) == set("abf")
    assert dropped == {"a .txt without a picture": 2, "linked folder": 1}


def test_links_in_a_shard_are_the_files_they_mean(tmp_path):
    """Those that lead out of it are counted."""
    path = tar(
        tmp_path / "s.tar", pairs("a") | {"b.txt": b"hard", "c.txt": b"soft", "d.txt": b"out"}
    )
    with tarfile.open(path, "a") as shard:
        for name, kind, target in (
            ("b.jpg", "1", "a.jpg"),
            ("c.jpg", "2", "a.jpg"),
            ("d.jpg", "2", "/x"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind.encode(), target
            shard.addfile(member)
    found, dropped = read(path)
    assert set(found) == {"a", "hard", "soft"} and dropped == {"not an image": 1}


def test_order_and_repetition_in_a_shard(tmp_path):
    files = pairs("a", "b", "c")
    apart = sorted(files.items(), key=lambda file: file[0].endswith("txt"))
    assert read(tar(tmp_path / "1.tar", apart)) == read(tar(tmp_path / "2.tar", files))
    assert len(read(tar(tmp_path / "3.tar.gz", apart[::-1]))[0]) == 3
    twice = tar(tmp_path / "4.tar", [*files.items(), ("a.txt", b"a photo of z")])
    assert read(twice)[0].keys() == set("zbc")  # the later one holds


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_archives_after_each_other_are_read_on(tmp_path, kind):
    parts = [tar(tmp_path / f"{keys}.{kind}", pairs(*keys)).read_bytes() for keys in ("ab", "c")]
    (tmp_path / f"all.{kind}").write_bytes(b"".join(parts))
    found, dropped = read(tmp_path / f"all.{kind}")
    assert set(found) == {"a", "b", "c"} and not dropped


def test_a_shard_that_is_cut_is_counted_wherever_the_cut_is(tmp_path):
    content = tar(tmp_path / "s.tar", pairs(*"abcdef")).read_bytes()
    end = len(content.rstrip(b"\0"))
    path, zipped = tmp_path / "cut.tar", gzip.compress(content)
    for cut in (700, end // 2, end // 2 // 512 * 512, end - 2000, (end - 1) // 512 * 512 + 512):
        path.write_bytes(content[:cut])
        dropped = Counter()
        samples = data.find_samples(path, dropped)
        assert dropped["damaged shard"] == 1 and len(samples) <= 6
        for _, *readers in samples:
            assert all(reader() is not None for reader in readers)
    path.write_bytes(zipped[: len(zipped) // 2])
    assert read(path)[1]["damaged shard"] == 1


def test_each_path_is_itself_and_each_source_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tar(tmp_path / "x1.tar", pairs("a", "b"))
    assert len(prepare("o1", "x1.tar", tmp_path / "x1.tar", "*.tar", "./x1.tar")) == 2
    tar(tmp_path / "x[1].tar", pairs("c", "d", "e"))
    assert len(prepare("o2", "x[1].tar")) == 3 and len(prepare("o3", "*.tar")) == 5
    with pytest.raises(OSError, match="x2.tar"):
        prepare("o4", "x1.tar", "x2.tar")


@pytest.mark.parametrize("files", [{"a.heic": b"x", "b.json": b"{}"}, {"1.tar": b"", "2.tar": b""}])
def test_an_empty_result_says_what_was_found(tmp_path, files):
    with pytest.raises(ValueError) as error:
        prepare(tmp_path / "o", folder(tmp_path / "f", files))
    for ending in {Path(name).suffix for name in files}:
        assert f"'{ending}': " in str(error.value)
    assert "expected pictures with captions in .txt" in str(error.value)


# ---------------------------------------------------------------------------- captions of their own


def rows(path, made, names=("key", "text"), bom=""):
    """A file for --captions with a row for each of {key: caption}."""
    made = [dict(zip(names, row)) for row in made.items()]
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(bom)
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n\n" for row in made)
        elif path.suffix == ".tsv":
            file.writelines("\t".join(row) + "\r\n" for row in (names, *(r.values() for r in made)))
        else:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(made)
    return path


SAID = ('"a', "two, three", 'a "b" c\'', 'ends"', "größe\u2028x")


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "csv"])
@pytest.mark.parametrize("source", ["folder", "tar"])
def test_captions_of_a_file_take_the_place_of_txt(tmp_path, kind, source):
    """What has no row of its own is dropped. Quotes, commas and a BOM are kept out of trouble."""
    files = pairs(*NAMES)
    made = folder(tmp_path / "f", files) if source == "folder" else tar(tmp_path / "s.tar", files)
    wanted = dict(zip(NAMES, SAID))
    for names in (("key", "text"), ("__key__", "caption"), ("file_name", "text")):
        path = rows(tmp_path / f"c.{kind}", wanted | {"other": "x"}, names, "\ufeff")
        out = prepare(tmp_path / names[0], made, size=8, captions=str(path))
        texts = {text["caption"] for text in out.texts}
        assert texts == {data.tidy(text) for text in SAID} and not out.dropped
    few = rows(tmp_path / f"few.{kind}", {NAMES[0]: "this", NAMES[1]: "that", NAMES[2]: ""})
    out = prepare(tmp_path / "few", made, size=8, captions=str(few))
    assert {text["caption"] for text in out.texts} == {"this", "that"}
    assert out.dropped == {NO_TEXT: 3}


def captions_of(tmp_path, names, keys):
    """{name: caption} of pictures without .txt, by rows with these keys and themselves as text."""
    made = folder(tmp_path, {name: b"" for name in names})
    path = rows(made / "c.jsonl", {key: key for key in keys}, ("file_name", "text"))
    found = data.find_samples(made, Counter(), data.read_captions(path))
    texts = [caption().decode() for _, _, caption in found]
    return dict(zip(sorted(names), texts, strict=True))


KEYS = ("a/1", "a/1.jpg", "1", "1.JPG", "./a/1.jpg", "b/a/1.png", "elsewhere/1.jpg")


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_with_or_without_ending_and_folder(tmp_path, key):
    assert captions_of(tmp_path, ["a/1.JPG"], [key]) == {"a/1.JPG": key}
    assert captions_of(tmp_path / "2", ["1.jpg"], [key]) == {"1.jpg": key}


def test_a_key_that_could_mean_two_pictures_means_none(tmp_path):
    """And the other way round. A whole path is always its own."""
    assert captions_of(tmp_path, ["a/1.jpg", "b/1.jpg"], ["1"]) == {"a/1.jpg": "", "b/1.jpg": ""}
    for keys in (["a/1", "b/1"], ["a/1", "b/1", "a/1.jpg"]):
        assert captions_of(tmp_path / "2", ["1.jpg"], keys) == {"1.jpg": ""}
    assert captions_of(tmp_path / "4", ["a/1.jpg"], ["1", "1.jpg"]) == {"a/1.jpg": "1.jpg"}
    names, keys = ["1.jpg", "a/1.jpg", "v1.5 cat.gif"], ["1.jpg", "a/1.jpg", "v1.5 cat"]
    assert captions_of(tmp_path / "3", names, keys) == dict(zip(names, keys))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_an_imagefolder_has_its_captions_beside(tmp_path, kind):
    made = folder(tmp_path / "f", {k: v for k, v in pairs("a", "b/c").items() if "jpg" in k})
    path = made / f"metadata.{kind}"
    rows(path, {"a.jpg": "the a", "b/c.jpg": "the\nc"}, ("file_name", "text"))
    out = prepare(tmp_path / "o", made, size=8, captions=str(path))
    assert [text["caption"] for text in out.texts] == ["the a", "the c"]


def test_a_part_is_known_by_its_captions_too(tmp_path):
    """Of its own pictures, wherever the file lies; others make another part."""
    shard, out, said = tar(tmp_path / "1.tar", pairs("a", "b")), tmp_path / "o", []
    for name, text in (("", ""), ("c.csv", "y"), ("d.csv", "y"), ("c.csv", "z"), ("", "")):
        path = str(rows(tmp_path / name, {"a": "x", "b": text, name: text})) if name else ""
        made = prepare(out, shard, size=8, captions=path)
        said.append([text["caption"] for text in made.texts] + [len(list(out.glob("part*")))])
    plain = ["a photo of a", "a photo of b"]
    assert said == [[*plain, 1], ["x", "y", 2], ["x", "y", 2], ["x", "z", 3], [*plain, 3]]


WRONG = {"a.csv": "key,text\na,one, two\n", "b.csv": "name,text\na,b\n", "c.csv": "key,text\na\n"}
WRONG |= {
    "d.csv": 'key,text\na,"open\nb,c\n',
    "e.tsv": "a\tb\nc\td\n",
    "f.tsv": "key\ttext\na\tb\tc\n",
}
WRONG |= {"g.jsonl": '{"key": "a", "text": "b"}\n{"key"', "h.jsonl": '{"key": "a", "text": null}'}
WRONG |= {"i.jsonl": '["a"]', "j.jsonl": '{"key": 1, "text": "b"}', "k.json": '[\n{"key": "a"}]'}
WRONG |= {"l.csv": "key,text\na,\xff\n"}


@pytest.mark.parametrize("name", [*WRONG, "nowhere.csv"])
def test_captions_that_are_malformed_end_in_one_line(tmp_path, capsys, name):
    shard = tar(tmp_path / "1.tar", pairs("a", "b"))
    if name in WRONG:
        (tmp_path / name).write_text(WRONG[name], "latin-1")
    flags = ["--captions", str(tmp_path / name), "--out", str(tmp_path / "o")]
    with pytest.raises(SystemExit) as stop:
        data.main([str(shard), *flags])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and name in said
    assert name == "nowhere.csv" or "want key and text" in said


# ------------------------------------------------------------------------------------- pictures


FORMATS = {"jpg JPG jpeg jfif": "JPEG", "png PNG": "PNG", "webp": "WEBP", "gif": "GIF"}
FORMATS |= {"bmp": "BMP", "tif tiff": "TIFF", "ppm": "PPM", "avif": "AVIF"}


@pytest.mark.parametrize("endings", FORMATS)
def test_every_format_is_read_under_its_own_name(tmp_path, endings):
    files = {}
    for name in endings.split():
        files |= {f"{name}.{name}": raw(picture(), FORMATS[endings]), f"{name}.txt": b"x"}
    found = data.find_samples(folder(tmp_path, files), Counter())
    assert len(found) == len(endings.split())
    for _, read_picture, _ in found:
        [opened] = data.open_picture(read_picture(), [40])
        assert abs(opened.astype(int) - np.asarray(picture())).mean() < 12  # GIF has 256 colors


def near(content, wanted, most=2):
    [opened] = data.open_picture(content, [wanted.shape[0]])
    assert opened.shape == wanted.shape and opened.dtype == np.uint8
    return abs(opened.astype(int) - wanted).max() <= most


def test_the_central_square(tmp_path):
    stripes = np.zeros((20, 50, 3), np.uint8)
    stripes[:, 15:35] = (10, 200, 30)
    one, two = data.open_picture(raw(Image.fromarray(stripes)), [20, 10])
    assert (one == (10, 200, 30)).all() and two.shape == (10, 10, 3)
    assert (two[:, 2:-2] == (10, 200, 30)).all()  # Pillow's filter looks beyond the crop


def test_a_picture_is_upright_and_in_rgb():
    image, exif = picture(), Image.Exif()
    exif[0x0112] = 6  # stored sideways, to be turned by 90 degrees to the right
    assert near(raw(image, exif=exif), np.rot90(np.asarray(image), -1))
    image = Image.new("CMYK", (40, 40), (0, 255, 255, 0))
    assert near(raw(image, "TIFF"), np.full((40, 40, 3), (255, 0, 0)))


def test_what_is_transparent_is_white():
    rgb = np.asarray(picture())
    alpha = np.zeros((40, 40), np.uint8)
    alpha[:, 20:] = 255
    white = np.where(alpha[..., None] == 0, 255, rgb)
    image = Image.fromarray(np.dstack([rgb, alpha]))
    assert near(raw(image), white) and near(raw(image, "WEBP", lossless=True), white)
    half = np.dstack([np.zeros((9, 9, 3), np.uint8), np.full((9, 9), 51, np.uint8)])
    assert near(raw(Image.fromarray(half)), np.full((9, 9, 3), 204))  # 0.8 of white
    palette = Image.fromarray((alpha // 255 + 1).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 9, 9, 9, 200, 30, 60])
    wanted = np.where(alpha[..., None] == 0, 255, (200, 30, 60))
    for kind in ("PNG", "GIF"):
        assert near(raw(palette, kind, transparency=1), wanted)
    grey = Image.fromarray(np.where(alpha == 0, 7, 90).astype(np.uint8))
    assert near(raw(grey, transparency=7), np.where(alpha == 0, 255, 90)[..., None].repeat(3, 2))


DEEP = [Image.fromarray(np.full((40, 40), 200, k)) for k in (np.uint16, np.int32, np.float32)]
NO_USE = {
    "not an image": [b"<html>", b"", raw(picture(), "EPS"), raw(picture(), "PDF")],
    "broken image": [raw(picture())[:-60]],
    "a side under 8 px": [raw(picture(size=(7, 9)))],
    "aspect beyond 3": [raw(picture(size=(31, 10)))],
    "more than 40 megapixels": [raw(Image.new("1", (8000, s))) for s in (5001, 25000)],
    "more than 8 bits a channel": [raw(DEEP[0]), *(raw(image, "TIFF") for image in DEEP)],
}


@pytest.mark.parametrize("reason", NO_USE)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_of_no_use_has_a_reason(reason):
    for content in NO_USE[reason]:
        with pytest.raises(ValueError, match=reason):
            data.open_picture(content, [16])
    assert data.open_picture(raw(picture(size=(8, 24))), [16])[0].shape == (16, 16, 3)


def test_dropped_samples_are_counted_by_reason(tmp_path, capsys):
    files = pairs("a", "b") | {"c.jpg": b"<html>", "c.txt": b"x", "d.jpg": b"x"}
    files |= {"e.jpg": files["a.jpg"], "e.txt": b" \n", "f.jpg": files["a.jpg"], "f.txt": b"\xff"}
    made = prepare(tmp_path / "o", folder(tmp_path / "f", files), size=16)
    reasons = {"not an image": 1, NO_TEXT: 3}
    assert made.dropped == reasons and len(made) == 2
    said = capsys.readouterr().out
    assert "2 kept, 4 dropped" in said and "not an image" in said
    assert [text["caption"] for text in made.texts] == ["a photo of a", "a photo of b"]  # tidied
    assert made.texts[0]["plan"] == "" and made.texts[0]["qa"] == []


# --------------------------------------------------------------------- a set that grows and moves


def test_a_set_goes_on_grows_and_moves(tmp_path, monkeypatch):
    first = tar(tmp_path / "1.tar", pairs("a", "b"))
    second = tar(tmp_path / "2.tar", pairs("c", "d", "e"))
    out = tmp_path / "out"
    one = prepare(out, first, size=16)
    [part] = out.glob("part-1-*.safetensors")
    written = part.stat().st_mtime_ns
    both = prepare(out, first, second, size=16)
    assert len(one) == 2 and len(both) == 5 and part.stat().st_mtime_ns == written
    assert both.fingerprint != one.fingerprint
    fresh = prepare(tmp_path / "fresh", first, second, size=16)
    assert fresh.fingerprint == both.fingerprint
    shutil.move(out, tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(first, tmp_path / "elsewhere" / "1.tar")  # with a new place and time
    (tmp_path / "elsewhere" / "1.tar").touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = prepare("../moved", "1.tar", second, size=16)
    assert again.fingerprint == both.fingerprint
    assert (tmp_path / "moved" / part.name).stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="another side, 16"):
        prepare("../moved", "1.tar", second, size=32)
    next((tmp_path / "moved").glob("part-2-*")).unlink()  # killed before it was written
    with pytest.raises(ValueError, match="part-2-.* is missing or damaged"):
        data.PreparedSet("../moved")
    assert prepare("../moved", "1.tar", second, size=16).fingerprint == both.fingerprint


def test_a_set_inside_of_its_own_source(tmp_path):
    source = folder(tmp_path / "data", {f"pets/{n}": c for n, c in pairs("a", "b").items()})
    one = prepare(source / "photos", source, size=16)
    (source / ".DS_Store").write_bytes(b"x")
    again = prepare(source / "photos", source, size=16)
    assert one.fingerprint == again.fingerprint and len(again) == 2
    assert len(list((source / "photos").glob("*.safetensors"))) == 1


def test_equal_pictures_fall_on_one_side(tmp_path):
    files = {}
    for i in range(240):
        files |= {f"{i:03d}.png": raw(picture(i % 120, (9, 9))), f"{i:03d}.txt": b"%d" % i}
    made = prepare(tmp_path / "o", tar(tmp_path / "s.tar", files), size=9)
    images = made.rows("images", range(240)).flatten(1).numpy()
    sides = [{images[i].tobytes() for i in ids} for ids in (made.train_ids, made.val_ids)]
    assert not sides[0] & sides[1] and len(sides[1]) == 2 and len(made.val_ids) == 4
    assert sorted([*made.train_ids, *made.val_ids]) == list(range(240))
    for i in (0, 130, 239):  # rows and texts belong together
        assert (images[i].reshape(9, 9, 3) == np.asarray(picture(i % 120, (9, 9)))).all()
        assert made.texts[i]["caption"] == str(i)


def test_rows_are_read_lazily(tmp_path):
    big = {"images": torch.zeros(2000, 128, 128, 3, dtype=torch.uint8)}  # 98 MB
    big["hashes"] = torch.arange(2000)
    facts = {"texts": json.dumps([data.captioned("a dog")] * 2000), "dropped": "{}"}
    save_file(big, tmp_path / "p.safetensors", facts)
    settings = {"parts": ["p.safetensors"], "texts": data.TEXTS}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    del big

    def resident():  # MB of this process
        (line,) = re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
        return int(line) / 1e3

    before = resident()
    made = data.PreparedSet(tmp_path)
    assert made.rows("images", [0, 1999]).shape == (2, 128, 128, 3)
    assert resident() - before < 30


# ---------------------------------------------------------------------------------------- towers


@pytest.fixture(scope="module")
def towers():
    return {name: data.open_tower(name, weights="untrained") for name in (CONVNET, VIT)}


@pytest.mark.parametrize("name, width", [(CONVNET, 1280), (VIT, 192)])
def test_a_tower_by_timm_itself(towers, name, width):
    tower = towers[name]
    assert tower.side == 256 and tower.width == width + 192 and "untrained" in tower.tag
    images = torch.from_numpy(np.stack([picture(i, (256, 256)) for i in range(2)]))
    facts = tower.model.pretrained_cfg
    mean, std = (torch.tensor(facts[name])[:, None, None] for name in ("mean", "std"))
    pixels = (images.permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        grid = tower.model.forward_features(pixels)
    if name == CONVNET:
        wanted = grid.permute(0, 2, 3, 1).reshape(2, 64, width)
    else:  # one class token, then 16 x 16; each vector is the mean of four
        wanted = grid[:, 1:].reshape(2, 8, 2, 8, 2, width).mean((2, 4)).reshape(2, 64, width)
    seen = tower(images)
    assert torch.allclose(seen[..., :width], wanted, atol=1e-5)
    small = images.view(2, 64, 4, 64, 4, 3).float().mean((2, 4)) / 127.5 - 1  # (2, 64, 64, 3)
    patch = small[1, 8:16, 56:64].permute(2, 0, 1).flatten()  # of row 1, column 7
    assert torch.allclose(seen[1, 15, width:], patch, atol=1e-5)
    assert not any(module.training for module in tower.modules())
    assert not any(p.requires_grad for p in tower.parameters())


def test_channels_may_come_last():
    tower = data.open_tower("swinv2_cr_tiny_ns_224", 16, "untrained")
    assert tower(torch.zeros(1, tower.side, tower.side, 3)).shape == (1, 16, tower.width)
    assert tower.width == tower.model.num_features + 192


def test_towers_that_are_refused_by_name():
    refused = {
        "no_such_model": "no_such_model",
        "vit_base_patch16_clip_224.nonsense": "nonsense",
        "vit_base_patch16_clip_224.openai": "vit_base_patch16_clip_quickgelu_224.openai",
        "efficientformer_l1": "efficientformer_l1",  # gives neither tokens nor a square map
    }
    for name, wrong in refused.items():
        with pytest.raises(ValueError, match=wrong) as error:
            data.open_tower(name, weights="untrained")
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    with pytest.raises(ValueError, match="--tokens 63: expected a square"):
        data.open_tower(VIT, 63, "untrained")


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(1)
    return timm.create_model(VIT).state_dict()


@pytest.mark.parametrize("form", ["safetensors", "pt", "state_dict", "half", "open_clip"])
def test_weights_as_people_have_them(tmp_path, state, form):
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    contents = {"pt": state, "state_dict": {"state_dict": state}}
    contents["half"] = {k: v.half() for k, v in state.items()}
    contents["open_clip"] = {f"visual.trunk.{k}": v for k, v in state.items()}
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(contents[form], path)
    tower = data.open_tower(VIT, weights=str(path))
    loaded = tower.model.state_dict()
    assert "pos_embed" in loaded and "norm.bias" in loaded
    most = 1e-3 if form == "half" else 0
    for name in loaded.keys() - {"pos_embed"}:  # that one is stretched to the larger grid
        assert (loaded[name] - state[name]).abs().max() <= most
    assert VIT in tower.tag and tower.tag != data.open_tower(VIT, weights="untrained").tag


@pytest.mark.parametrize("missing", ["norm.weight", "blocks.3.attn.qkv.bias", "cls_token"])
def test_a_tower_never_stays_partly_random(tmp_path, state, missing):
    renamed = {f"{k}_x" if k == missing else k: v for k, v in state.items()}
    save_file(renamed, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=f"1 parameters are missing: {missing}"):
        data.open_tower(VIT, weights=str(tmp_path / "w.safetensors"))


def test_files_that_hold_no_weights_of_the_tower(tmp_path, state):
    torch.save({"vision_model.x": torch.zeros(3)}, tmp_path / "foreign.pt")
    torch.save({"norm.weight": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    save_file(state, tmp_path / "named.bin")
    for name in ("foreign.pt", "other.pt", "text.pt", "named.bin", "nowhere.pt"):
        with pytest.raises(ValueError, match=f"cannot open tower {VIT} from .*{name}") as error:
            data.open_tower(VIT, weights=str(tmp_path / name))
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_without_the_hub_the_message_comes_soon(monkeypatch, tmp_path):
    monkeypatch.setattr(data.hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(data.hub, "HF_HUB_OFFLINE", False)
    begun = time.monotonic()
    with pytest.raises(ValueError, match="timm's hub .go online"):
        data.open_tower("vit_tiny_patch16_224.augreg_in21k")
    assert time.monotonic() - begun < 10


def test_photos_with_a_tower(tmp_path, towers, state, capsys):
    shard = tar(tmp_path / "s.tar", pairs(*(f"{i:02d}" for i in range(35))))
    save_file(state, tmp_path / "w.safetensors")
    how = {"tower": VIT, "tokens": 16, "weights": str(tmp_path / "w.safetensors"), "device": "cpu"}
    made = prepare(tmp_path / "o", shard, size=24, **how)
    assert made.facts["channels"] == 384 and made.facts["tower"] == VIT and made.facts["side"] == 24
    features = made.rows("features", [34, 0])
    assert features.shape == (2, 16, 384) and features.dtype == torch.float16
    tower = data.open_tower(VIT, 16, str(tmp_path / "w.safetensors"))
    assert made.facts["tag"] == tower.tag
    view = data.open_picture(pairs("34")["34.jpg"], [256])[0]
    wanted = tower(torch.from_numpy(view)[None])[0]
    assert torch.allclose(features[0].float(), wanted, atol=0.02)
    flags = {**SIZES, "data": tmp_path / "o", "out": tmp_path / "r", "tokens": 16, "clip_steps": 0}
    flags |= {"channels": 5, "precision": "bf16", "understand_batch": 8}  # 16-bit on both sides
    train.main([f"--{name}={value}" for name, value in flags.items()])
    other = {"tokens": 64, "out": tmp_path / "q"}
    with pytest.raises(SystemExit):
        train.main([f"--{name}={value}" for name, value in (flags | other).items()])
    assert "--tokens 64: the set has 16" in capsys.readouterr().err
    studio = sample.Studio(tmp_path / "r" / "checkpoint.pt")
    assert studio.net.head.shape == (16, 5)
    (tmp_path / "34.jpg").write_bytes(pairs("34")["34.jpg"])
    _, vectors = studio.open(tmp_path / "34.jpg")
    cached = np.load(tmp_path / "r" / "cache_clip.npy")
    close = partial(torch.testing.assert_close, atol=0.05, rtol=0.05)
    close(vectors[0], torch.from_numpy(cached[34]).float())  # sampling sees what training saw
    assert studio.draw(["a cat"], [0]).shape == (1, 24, 24, 3)
    state = state | {"norm.bias": state["norm.bias"] + 70_000}
    save_file(state, tmp_path / "w.safetensors")  # other weights under the same name
    with pytest.raises(ValueError, match="another tag"):
        prepare(tmp_path / "o", shard, size=24, **how)
    with pytest.raises(ValueError, match=f"{VIT}.*: features are not finite in half"):
        prepare(tmp_path / "p", shard, size=24, **how)
