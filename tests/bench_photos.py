"""How fast `data.py photos` is beside a bare image tower, what its sets weigh, and which towers.

    python tests/bench_photos.py 'shards/*.tar' --tower NAME --device cuda
    python tests/bench_photos.py 'shards/*.tar' --count 160 --side 512    of 160, made 512 px large
    python tests/bench_photos.py --towers --device cuda     a Markdown table of towers

The towers are untrained: neither speed nor bytes depend on the weights (int8's error does).
"""

import argparse
import io
import itertools
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import data  # noqa: E402  (found through the line above)

TOWERS = [
    data.EXAMPLE_TOWER,
    "vit_medium_patch32_clip_224.tinyclip_laion400m",
    "vit_base_patch16_clip_quickgelu_224.openai",
    "vit_base_patch16_siglip_gap_224.v2_webli",
    "eva02_large_patch14_clip_224.merged2b",
    "vit_so400m_patch14_siglip_gap_224.v2_webli",
]


def open_tower(name, device):
    """The tower with the same random weights each time, and its side."""
    torch.manual_seed(0)
    tower, facts = data.open_tower(name, 64, "untrained")
    return tower.to(device), facts["side"]


def bare_rate(tower, side, device, batch, seconds):
    """Images a second of the forward pass alone, on pixels that lie on the device."""
    pixels, done, begun = torch.rand(batch, 3, side, side, device=device), 0, None
    while not begun or time.perf_counter() - begun < seconds:
        tower(pixels).flatten()[0].item()  # which waits for the device
        if begun:
            done += batch
        begun = begun or time.perf_counter()
    return done / (time.perf_counter() - begun)


def prepared_rate(options, out, int8):
    """(the set, images a second behind the first batch, those of the whole command)."""
    ends, pack = [], data.pack

    def watched(features, int8):
        packed = pack(features, int8)
        ends.append((time.perf_counter(), len(features)))
        return packed

    torch.manual_seed(0)
    data.pack = watched
    begun = time.perf_counter()
    made = data.prepare_photos(out=out, int8=int8, weights="untrained", **options)
    data.pack = pack
    steady = sum(n for _, n in ends[1:]) / (ends[-1][0] - ends[0][0])
    return made, steady, len(made) / (time.perf_counter() - begun)


def copied(sources, count, side, folder):
    """A shard of the first `count` photos, as JPEGs of `side` px with grain where that is given:
    they cost as much to open as real photos of that size."""
    rng, path = np.random.default_rng(0), Path(folder) / "photos.tar"
    with tarfile.open(path, "w") as shard:
        for key, image, text in itertools.islice(data.read_samples(sources, Counter()), count):
            image = image.resize((side, side)) if side else image
            grain = rng.normal(0, 8 if side else 0, (*image.size[::-1], 3))
            pixels, file = np.clip(image + grain, 0, 255).astype(np.uint8), io.BytesIO()
            data.Image.fromarray(pixels).save(file, "JPEG", quality=90)
            for name, raw in ((f"{key}.jpg", file.getvalue()), (f"{key}.txt", text.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(raw)
                shard.addfile(member, io.BytesIO(raw))
    print(f"{count} photos, {path.stat().st_size / count / 1000:.1f} kB each")
    return str(path)


def spread(vectors):
    """Vectors (N, tokens, C) with each channel standardised, as train.py does it."""
    flat = vectors.reshape(-1, vectors.shape[-1])
    return (flat - flat.mean(0)) / flat.std(0)


def compare(options, seconds):
    """Bare, float16, bare, int8, bare: each form beside the mean of the two around it."""
    device = options["device"]
    tower, side = open_tower(options["tower"], device)

    def measure():
        return bare_rate(tower, side, device, 32, seconds)

    sets, bare = [], [measure()]
    print(f"{options['tower']}, {side} px, {device}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        for name, int8 in (("float16", False), ("int8", True)):
            made, steady, whole = prepared_rate(options, f"{folder}/{name}", int8)
            bare.append(measure())
            size = sum(path.stat().st_size for path in Path(made.folder).glob("*.npy")) / len(made)
            beside = steady / np.mean(bare[-2:])
            print(
                f"{name}: {steady:.1f} images/s, {beside:.2f} of the bare tower's"
                f" {bare[-2]:.1f} and {bare[-1]:.1f} around it; {whole:.1f} with the start;"
                f" {size:,.0f} bytes an image, {size / 100:,.0f} MB for 10,000"
            )
            sets.append(made)
        exact, rough = (made.vectors(np.arange(min(len(made), 500))) for made in sets)
        error = np.linalg.norm(exact - rough) / np.linalg.norm(exact)
        channels = np.sqrt(np.mean((spread(exact) - spread(rough)) ** 2))
        print(f"int8: relative error {error:.4f}, {channels:.4f} of a channel's deviation")


def print_towers(names, device, seconds):
    """A row for each tower; the licence is timm's word for it."""
    print("| tower | licence | parameters | width | patch | side | images/s |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        tower, side = open_tower(name, device)
        model, licence = tower.model, timm.models.get_pretrained_cfg(name).license
        rate = bare_rate(tower, side, device, 4 if device == "cpu" else 32, seconds)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        patch = model.patch_embed.patch_size[0]
        row = (f"`{name}`", licence, f"{size:.0f} M", model.num_features, patch, side)
        print("|", " | ".join(map(str, row)), f"| {rate:.1f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*", help="shards, as data.py photos takes them")
    parser.add_argument("--tower", default=data.EXAMPLE_TOWER)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--count", type=int, help="of photos, the first ones (default all)")
    parser.add_argument("--side", type=int, help="px that the photos are enlarged to, with --count")
    parser.add_argument("--seconds", type=float, default=10, help="of each bare measurement")
    parser.add_argument("--towers", nargs="*", help="the table instead, of these or the usual ones")
    options = parser.parse_args()
    if options.count and options.count < 3 * data.BATCH or options.side and not options.count:
        parser.error(f"--count at least {3 * data.BATCH}, and --side with it")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.towers is not None:
        print_towers(options.towers or TOWERS, options.device, options.seconds)
    elif options.sources:
        names = ("sources", "tower", "device", "workers")
        given = {name: getattr(options, name) for name in names}
        with tempfile.TemporaryDirectory() as folder:
            if options.count:
                given["sources"] = copied(options.sources, options.count, options.side, folder)
            compare(given, options.seconds)
    else:
        parser.error("give shards, or --towers")


if __name__ == "__main__":
    main()
