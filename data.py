"""The data of nano-blip3o: pictures with captions, the frozen image towers of timm, and the set on
disk that both become. The toy world writes such a set too: notebooks/shapes.py.

    python data.py FOLDER 'shards/*.tar' --out data/photos --size 64 [--tower NAME]
"""

import csv
import glob
import inspect
import json
import math
import os
import re
import tarfile
import unicodedata
import zlib
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import get_args
from unittest.mock import patch
from urllib.request import urlopen

import huggingface_hub.constants as hub
import numpy as np
import timm
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision.transforms.v2.functional import normalize
from tqdm import tqdm

from model import resize_grid, to_pixels

# ------------------------------------------------------------------------------ the command line


def parse(settings, about, arguments=None):
    """The command line -> an instance of a dataclass: its fields are the flags, the comments after
    them the help. A field that is an empty tuple takes the words without a flag. @FILE stands for
    the flags in a file, a line each. What is wrong ends in one line and exit code 2.
    """
    helps = dict(re.findall(r"^    (\w+): .+?  # (.+)", inspect.getsource(settings), re.M))
    how = {"formatter_class": RawDescriptionHelpFormatter, "fromfile_prefix_chars": "@"}
    parser = ArgumentParser(description=about, allow_abbrev=False, **how)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    for f in fields(settings):
        name, how = f"--{f.name}", {"type": type(f.default), "choices": get_args(f.type) or None}
        if f.type is bool:
            how = {"action": BooleanOptionalAction}
        elif f.type is tuple:
            name, how = f.name, {"nargs": "*"}
        text = f"{helps[f.name]} (default {f.default})"
        parser.add_argument(name, default=f.default, help=text, **how)
    return settings(**vars(parser.parse_args(arguments)))


@contextmanager
def plain_errors(program):
    """What a user can get wrong ends in one line and exit code 2. Ctrl-C ends in one and 130,
    or in the code that the KeyboardInterrupt holds."""
    try:
        yield
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        ArgumentParser().exit(2, f"{program}: {said}\n")
    except KeyboardInterrupt as stop:
        said = f"{program}: interrupted; the same command continues\n"
        ArgumentParser().exit(*stop.args or [130], said)


def find_device(name):
    """The torch.device of that name; "auto" is the best here. ValueError if it is not here."""
    here = [kind for kind in ("cuda", "mps", "cpu") if getattr(torch, kind).is_available()]
    if name not in ("auto", *here):
        raise ValueError(f"--device {name} is not available: expected auto or {' or '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)


def write_whole(path, write):
    """`write(temporary path)`, flush, rename: the file at this Path appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:  # torch and safetensors have their own words for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error


def lock(folder):
    """Makes the folder and holds it inside of a `with`; ValueError if another process does."""
    try:
        return FileLock(Path(folder, ".lock")).acquire(blocking=False)
    except Timeout as error:
        raise ValueError(f"{folder} is in use by another process") from error


# ------------------------------------------------------------------------------------- the texts

DESCRIBE = "describe"  # the question whose answer is the caption
LOCATE = "where is everything?"  # the question whose answer is the plan
# A plan names each object and the cell of an 8 x 8 grid that holds its centre, columns from the
# left, rows from the top: "circle green c4; square red f2". These patterns are of a cell and of an
# object. A set may have a stricter one: "line" in its facts.
CELL = "[a-h][1-8]"
LINE = rf"\w+ \w+ {CELL}"


def tidy(text):
    """The one form of captions, prompts and questions: NFC, lower case, single spaces, no stop,
    "left of" for "to the left of"."""
    words = unicodedata.normalize("NFC", text.lower()).split()  # no-break spaces split too
    text = re.sub("to the (left|right) of", r"\1 of", " ".join(words))
    return text.removesuffix(".").strip()


# ------------------------------------------------------------------------------- towers of timm


class Tower(torch.nn.Module):
    """A frozen timm model: uint8 (B, side, side, 3) -> float32 (B, tokens, C).

    A vector is what the model makes of a patch, then the patch itself in 8 x 8 pixels. Without
    them a decoder knows what to draw and not how it looks: 19.7 dB, with them 28.7 (stickers).
    side: px of the input; width: C; tag: the names of the model and of its weights.
    """

    def __init__(self, model, side, tokens, tag):
        super().__init__()
        self.model, self.side, self.tokens, self.tag = model, side, tokens, tag
        self.eval().requires_grad_(False)
        _, grid, self.width = self(torch.zeros(1, side, side, 3)).shape
        if grid != tokens:
            raise ValueError(f"--tokens {tokens}: expected a square number, such as 64")

    @torch.no_grad()
    def forward(self, images):
        facts = self.model.pretrained_cfg
        pixels = normalize(images.movedim(3, 1) / 255, facts["mean"], facts["std"])
        grid = self.model.forward_features(pixels)
        if grid.ndim == 4 and grid.shape[1] == self.model.num_features:
            grid = grid.movedim(1, 3)  # (B, C, H, W) -> (B, H, W, C), as some models give it
        prefix = getattr(self.model, "num_prefix_tokens", 0)
        features = resize_grid(grid.flatten(1, -2)[:, prefix:].float(), self.tokens)
        small = F.adaptive_avg_pool2d(to_pixels(images), 8 * math.isqrt(self.tokens))
        return torch.cat([features, F.pixel_unshuffle(small, 8).flatten(2).mT], dim=-1)


def open_tower(name, tokens=64, weights=""):
    """The Tower of a timm model. weights: "" = timm's hub, "untrained" (tests), or a file.

    ValueError where the name, the file or the network does not give the tower that is asked for.
    """
    load = torch.nn.Module.load_state_dict

    def complete(model, state, strict=True, **how):
        result = load(model, state, strict=False, **how)
        if missing := result.missing_keys:
            raise ValueError(f"{len(missing)} parameters are missing: {', '.join(missing)}")
        return result

    try:
        facts = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
        tag = f"{facts.architecture}.{facts.tag} {weights}".strip()
        # timm builds such weights with plain GELU and only notes it; the features are wrong
        right = re.sub(r"_clip_(\d)", r"_clip_quickgelu_\1", name)
        if "QuickGELU" in f"{facts.notes}" and right != name:
            raise ValueError(f"use {right}, these weights need QuickGELU")
        side = 224 if "patch14" in name else 256  # px; gives a grid of 8 x 8 or of a multiple
        how = {"img_size": side} if facts.fixed_input_size else {}
        if not weights:
            ask_hub()
        elif weights != "untrained":
            how["pretrained_cfg_overlay"] = {"file": weights}
            tag = f"{name} {zlib.crc32(Path(weights).read_bytes()):08x}"
        # timm takes what fits of any file, and leaves the rest random
        with patch.object(torch.nn.Module, "load_state_dict", complete):
            model = timm.create_model(name, weights != "untrained", num_classes=0, **how)
        return Tower(model, side, tokens, tag)
    except Exception as error:  # the hub, safetensors and timm each have their own kinds
        source = weights or "timm's hub (go online, or give a file of its weights by --weights)"
        raise ValueError(f"cannot open tower {name} from {source}: {error!r:.200}") from error


def ask_hub():
    """Without an answer only the hub's cache is used, else it tries again for a minute."""
    try:
        urlopen(hub.ENDPOINT, timeout=5)
    except OSError as error:
        hub.HF_HUB_OFFLINE = not hasattr(error, "code")  # with a code, it is an answer


# ---------------------------------------------------------------------------------- real photos

# EPS would start Ghostscript; AVIF is last because an old Pillow has none
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}


def open_picture(data, sides):
    """Bytes of an image file -> its central square at each side: [(side, side, 3) uint8].

    Upright, and white where it is transparent. ValueError with the reason if it is of no use.
    """
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except Exception as error:
        bomb = isinstance(error, Image.DecompressionBombError)
        raise ValueError("more than 40 megapixels" if bomb else "not an image") from error
    short, long = sorted(image.size)  # known from the header, before decoding
    if short * long > 40_000_000:
        raise ValueError("more than 40 megapixels")
    if short < 8 or long > 3 * short:
        raise ValueError("a side under 8 px, or aspect beyond 3")
    if image.mode[0] in "IF":  # Pillow would clip them to white
        raise ValueError("more than 8 bits a channel")
    try:
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise nearly anything on broken data
        raise ValueError("broken image") from error
    return [np.array(ImageOps.fit(image, (side, side), Image.BICUBIC)) for side in sides]


def find_files(source, dropped):
    """[(name, size, function that reads it)] of each file of a folder or a tar."""
    if source.is_dir():
        paths = sorted(source.rglob("*"))  # which enters no linked folder
        dropped["linked folder"] += sum(path.is_symlink() and path.is_dir() for path in paths)
        paths = [path for path in paths if path.is_file()]
        return [(path.relative_to(source), path.stat().st_size, path.read_bytes) for path in paths]
    files = []
    try:
        shard = tarfile.open(source, ignore_zeros=True)  # archives may follow each other
        for member in (m for m in shard if not m.isdir()):  # also links to its files
            files.append((Path(member.name), member.size, partial(read_member, shard, member)))
        shard.fileobj.seek(shard.offset - 512)  # the block that tarfile took for the end
        dropped["damaged shard"] += any(shard.fileobj.read())  # it should hold zeros alone
    except Exception:  # tarfile raises nearly anything on broken headers
        dropped["damaged shard"] += 1
    return files


def read_member(shard, member):
    """The bytes of a file in a tar; none where the tar is damaged."""
    with suppress(Exception):
        return shard.extractfile(member).read()
    return b""


def read_captions(path):
    """{key: (caption in UTF-8, function that gives it)} of a file for --captions.

    Keys are without the ending of a picture; the last row of a key holds. A caption is also found
    by "**/" and the last part of its key, if no other row has that. ValueError if malformed.
    """
    captions, keys, row = {}, defaultdict(set), None
    tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        # where a row is too long, the rest of it takes the place of the key, and is none
        rows = csv.DictReader(file, restkey="key", strict=True, **tabs)
        lines = map(json.loads, filter(str.strip, file))
        try:
            for row in lines if path.suffix == ".jsonl" else rows:
                key = Path(next(row[n] for n in ("key", "__key__", "file_name") if n in row))
                text = next(row[n] for n in ("text", "caption") if n in row).encode()
                key = key.with_suffix("") if key.suffix.lower() in ENDINGS else key
                last = f"**/{key.name}"
                keys[last].add(key)
                captions[f"{key}"] = text, partial(bytes, text)
                captions[last] = captions[f"{key}"] if len(keys[last]) == 1 else None
        except Exception as error:
            raise ValueError(f"{path}, near {row!r:.50}: want key and text: {error!r}") from error
    return captions


def find_samples(source, dropped, captions=None):
    """[(facts, function that reads the picture, function that reads its caption)] of a source.

    Captions are of the .txt beside, or of `read_captions`: by a picture's whole name, else by the
    last part of it that no other picture has. Without one it is there too, with an empty caption.
    Facts tell what a source holds.
    """
    files, samples = find_files(source, dropped), []
    texts = {f"{n.with_suffix('')}": file for n, *file in files if n.suffix.lower() == ".txt"}
    names = {f"{n.with_suffix('')}" for n, *_ in files if n.suffix.lower() in ENDINGS}
    dropped["a .txt without a picture"] += len(texts.keys() - names)
    texts = texts if captions is None else captions
    times = Counter(name.stem for name, *_ in files if name.suffix.lower() in ENDINGS)
    for name, size, read in files:
        if name.suffix.lower() in ENDINGS:
            last = f"**/{name.stem}" if times[name.stem] == 1 else ""
            length, caption = texts.get(f"{name.with_suffix('')}") or texts.get(last) or (0, bytes)
            samples.append((f"{name} {size} {length}", read, caption))
    return samples


# ------------------------------------------------------------------------------ the prepared set

TEXTS = 4  # version of a set's texts


def prepare(settings, sources, read):
    """Writes what read(source) gives for each {name of a part: source} -> PreparedSet.
    It gives texts, {name: rows} and a Counter of dropped samples. A part that is there is not made
    again, so the same command goes on after a kill, and more sources make a larger set."""
    out = settings["out"]
    settings = settings | {"texts": TEXTS}
    note = Path(out, "settings.json")
    if not sources:
        raise ValueError("nothing to prepare; --help lists the flags")
    with lock(out):
        old = json.loads(note.read_text()) if note.exists() else settings
        # each of these makes it another set
        for name in ("kind", "texts", "side", "count", "seed", "tag", "tokens", "channels"):
            if old.get(name) != settings.get(name):
                raise ValueError(f"{out} has another {name}, {old.get(name)}: delete it first")
        text = json.dumps(settings | {"parts": list(sources)}, indent=1)
        write_whole(note, lambda temporary: temporary.write_text(text))
        for name, source in tqdm(sources.items(), settings["kind"], unit="part"):
            part = note.with_name(name)
            if not part.exists():
                texts, rows, dropped = read(source)
                rows["hashes"] = torch.tensor([zlib.crc32(row.numpy()) for row in rows["images"]])
                facts = {"texts": json.dumps(texts), "dropped": json.dumps(dropped)}
                write_whole(part, partial(save_file, rows, metadata=facts))
    made = PreparedSet(out)
    print(f"{out}: {len(made)} kept, {made.dropped.total()} dropped {dict(made.dropped)}")
    return made


class PreparedSet:
    """A finished folder of `prepare`, its rows opened as memory maps.

    texts: of each row a dict. "caption"; "whole", a caption that names all; "plan", or "";
    "qa", [question, answer] pairs; "prompts", [prompt, plan] pairs: the caption's alone, or its, a
    user's and another; "edits", [instruction, rows from here to its result, plan] triples;
    facts: the settings, the pictures' side, and channels, C of a tower's features or None;
    train_ids, val_ids: the split, of which validation is 2 %, at most 500, equal pictures on one
    side; fingerprint: of the content. ValueError if unfinished or damaged.
    """

    def __init__(self, folder):
        self.parts, self.texts, self.dropped, crc = [], [], Counter(), 0
        path = Path(folder, "settings.json")
        try:
            self.facts = json.loads(path.read_text())
            for name in self.facts.pop("parts"):
                path = path.with_name(name)
                with safe_open(path, "pt") as part:
                    self.parts.append({name: part.get_tensor(name) for name in part.keys()})
                    texts = part.metadata()["texts"]
                    self.texts += json.loads(texts)
                    crc = zlib.crc32(texts.encode(), crc)
                    self.dropped.update(json.loads(part.metadata()["dropped"]))
        except Exception as error:
            wrong = f"{path.name} is missing or damaged: delete the folder and prepare it again"
            raise ValueError(f"{folder} is not a finished set, {wrong}") from error
        if self.facts.get("texts") != TEXTS:
            raise ValueError(f"{folder} has texts of another version: delete and prepare it")
        hashes = [row for part in self.parts for row in part["hashes"].tolist()]
        different = np.unique(hashes)
        if len(different) < 2:
            raise ValueError(f"{folder} has no two different pictures")
        held = np.isin(hashes, different[: min(500, max(1, len(different) // 50))])
        for i, text in enumerate(self.texts):  # no edit leads to the other side of the split
            text["edits"] = [edit for edit in text["edits"] if held[i + edit[1]] == held[i]]
        self.train_ids, self.val_ids = np.flatnonzero(~held), np.flatnonzero(held)
        self.ends = np.cumsum([len(part["hashes"]) for part in self.parts])
        self.fingerprint = f"{zlib.crc32(f'{hashes}'.encode(), crc):08x}"

    def __len__(self):
        return len(self.texts)

    def rows(self, name, ids):
        """Rows of "images" (B, S, S, 3) uint8, or of a tower's "features" (B, N, C) float16."""
        numbers = np.searchsorted(self.ends, ids, "right")
        # i - ends[n] is negative: it counts from the end of part n
        return torch.stack([self.parts[n][name][i - self.ends[n]] for n, i in zip(numbers, ids)])


@dataclass(frozen=True)
class Photos:
    """Photos with captions, a source to a part; with a tower, its features too."""

    sources: tuple = ()  # tar shards, and folders of pictures with .txt beside; patterns too
    captions: str = ""  # in place of .txt: .jsonl, .csv or .tsv (header): key or file_name, text
    out: str = "data/photos"  # folder to write
    size: int = 64  # px, square
    tower: str = ""  # timm model whose features are stored too, e.g. tf_efficientnet_lite0
    tokens: int = 64  # vectors of the tower for an image, a square number
    weights: str = ""  # file of the tower's weights; timm's hub without
    device: str = "auto"  # of the tower

    def prepare(self):
        """Opens the pictures -> PreparedSet."""
        parts, tower = {}, None
        captions = read_captions(Path(self.captions)) if self.captions else None
        for pattern in self.sources:
            # a path that exists is itself, also with brackets in it
            found = [] if os.path.exists(pattern) else sorted(glob.glob(pattern))
            for path in found or [pattern]:
                path = Path(path).resolve(strict=True)
                # a part is known by what it holds: not by where and when that was written
                facts = f"{[facts for facts, *_ in find_samples(path, Counter(), captions)]}"
                parts[f"part-{path.stem}-{zlib.crc32(facts.encode()):08x}.safetensors"] = path
        settings = {"kind": "photos", "side": self.size, "channels": None, **asdict(self)}
        if self.tower:
            tower = open_tower(self.tower, self.tokens, self.weights).to(find_device(self.device))
            settings |= {"tag": tower.tag, "channels": tower.width}
        return prepare(settings, parts, partial(self.read, tower, captions=captions))

    def read(self, tower, source, captions=None):
        """The texts, rows and dropped samples of one source."""
        texts, images, features, dropped = [], [], [], Counter()
        samples = find_samples(source, dropped, captions)
        sides = [self.size, tower.side] if tower else [self.size]
        with ThreadPoolExecutor() as pool:
            for i in tqdm(range(0, len(samples), 32), source.name, leave=False):
                batch = [(picture(), caption()) for _, picture, caption in samples[i : i + 32]]
                views = []
                for sample in [pool.submit(open_sample, sides, *sample) for sample in batch]:
                    try:
                        text, image, *view = sample.result()
                    except ValueError as error:
                        dropped[str(error)] += 1
                    else:
                        texts.append(captioned(text))
                        images.append(image)
                        views += view
                if views:
                    views = torch.from_numpy(np.stack(views)).to(find_device(self.device))
                    features.append(tower(views).half().cpu())
        if not texts:
            endings = dict(Counter(name.suffix for name, *_ in find_files(source, Counter())))
            found = f"no sample in {source}: {endings}, {+dropped}"
            raise ValueError(f"{found}; expected pictures with captions in .txt or --captions")
        rows = {"images": torch.from_numpy(np.stack(images))}
        if tower:
            rows["features"] = torch.cat(features)
            if not rows["features"].isfinite().all():
                raise ValueError(f"{tower.tag}: features are not finite in half precision")
        return texts, rows, +dropped


def captioned(text):
    """The texts of a picture that has a caption alone, see `PreparedSet`."""
    texts = {"caption": text, "whole": text, "plan": "", "prompts": [[text, ""]]}
    return texts | {"qa": [], "edits": []}


def open_sample(sides, picture, caption):
    """Bytes of a picture and of its caption -> (caption, picture at each side), or ValueError."""
    text = tidy(caption.decode("utf-8-sig", "replace"))
    if not text or "\ufffd" in text:
        raise ValueError("no caption in UTF-8, in .txt or --captions")
    return text, *open_picture(picture, sides)


def main(arguments=None):
    with plain_errors("data.py"):
        parse(Photos, __doc__, arguments).prepare()


if __name__ == "__main__":
    main()
