"""Pictures, captions, answers and scores from a trained run.

    python sample.py "a red circle left of a blue square" "three green circles"
    python sample.py --caption picture.png        python sample.py --reconstruct picture.png
    python sample.py --ask "how many circles are there?" --image picture.png
    python sample.py --evaluate                   writes scores.json beside the weights

Without --run the newest finished run below out/ is used, else the weights that come along.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

import data
import model as M
from data import write_whole
from train import DESCRIBE, load_model

HERE = Path(__file__).parent
BATCH = 128  # rows at once: bounds the memory, changes no picture
LIMITS = {"count": (1, 1000), "steps": (1, 1000), "guidance": (0, 100), "seed": (0, 2**32)}
LIMITS |= {"decoder_steps": (1, 1000), "decoder_guidance": (0, 100)}


def find_run(given: str | None) -> Path:
    """The weights file of a run folder: the given one, else the newest, else the shipped one."""
    if given:
        path = Path(given)
        path = path / "model.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"--run {given}: no model.safetensors there; train it with train.py")
        return path
    runs = sorted(Path("out").glob("*/model.safetensors"), key=lambda p: p.stat().st_mtime)
    shipped = sorted((HERE / "weights").glob("*.safetensors"))
    if not runs and not shipped:
        raise ValueError("no finished run below out/: `make demo` trains one")
    return (runs or shipped)[-1]


def row_noise(seeds: list[int], shape: tuple[int, int]) -> Tensor:
    """Noise (B, *shape), each row from its own seed: a picture depends on no neighbour."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


class Studio:
    """A loaded run, ready to draw and to read; everything in batches, on CPU or GPU."""

    def __init__(self, path: Path, flow: dict, paint: dict):
        """flow and paint: steps and guidance of the flow head and of the decoder."""
        self.net, self.tokenizer, self.config, self.facts = load_model(path)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.net.to(self.device)
        self.cut = None  # a Counter: texts that are too long are cut and counted, not refused
        self.side, self.flow, self.paint_options = self.facts["side"], flow, paint
        if self.net.clip is None:
            settings = self.facts["data"]
            tower, facts = data.open_tower(
                settings["tower"], self.config.tokens, settings["weights"]
            )
            self.tower, self.tower_side = tower.to(self.device), facts["side"]

    def batches(self, count: int, title: str):
        return tqdm(
            [slice(i, i + BATCH) for i in range(0, count, BATCH)],
            desc=title,
            unit="batch",
            disable=count <= BATCH,
        )

    def build(self, rows) -> Tensor:
        """Ids (B, T); ValueError if a text is too long, unless `cut` counts what is dropped."""
        c = self.config
        ids = M.build_sequences(self.tokenizer, rows, c.tokens, c.text_length, self.cut)[0]
        return ids.to(self.device)

    def imagine(self, prompts: list[str], seeds: list[int]) -> Tensor:
        """Prompts -> treated vectors (B, N, C)."""
        net, made = self.net, []
        rows = [[("user", text), ("queries", None)] for text in prompts]
        for part in self.batches(len(rows), "vectors"):
            ids = self.build(rows[part])
            noise = row_noise(seeds[part], net.head.shape).to(self.device)
            made.append(net.imagine(ids, noise, shift=self.config.shift, **self.flow))
        return torch.cat(made)

    def paint(self, vectors: Tensor, seeds: list[int]) -> np.ndarray:
        """Vectors (B, N, C) -> pictures (B, S, S, 3) uint8; the noise differs from imagine's."""
        net, made = self.net, []
        for part in self.batches(len(vectors), "pixels"):
            noise = row_noise([seed + 2**32 for seed in seeds[part]], net.decoder.shape)
            made.append(net.paint(vectors[part], noise.to(self.device), **self.paint_options))
        return torch.cat(made).cpu().numpy()

    def draw(self, prompts: list[str], seeds: list[int]) -> np.ndarray:
        return self.paint(self.imagine(prompts, seeds), seeds)

    @torch.no_grad()
    def see(self, images: np.ndarray) -> Tensor:
        """Pictures (B, S, S, 3) uint8 -> treated vectors (B, N, C)."""
        net, made = self.net, []
        for part in self.batches(len(images), "seeing"):
            pixels = M.to_pixels(torch.from_numpy(images[part]).to(self.device))
            if net.clip is None:
                resized = v2.functional.resize(pixels, [self.tower_side] * 2, antialias=True)
                made.append(net.treatment(self.tower((resized + 1) / 2)))
            else:
                made.append(net.treatment(net.clip.vectors(pixels)))
        return torch.cat(made)

    def answer(self, vectors: Tensor, questions: list[str]) -> list[str]:
        """One answer for each image and question; the question "describe" gives the caption."""
        answers = []
        for part in self.batches(len(questions), "answers"):
            rows = [[("image", None), ("user", q), ("bot", None)] for q in questions[part]]
            written = self.net.backbone.write(self.build(rows), vectors[part])
            answers += [self.tokenizer.decode(row) for row in written]
        return answers

    def open(self, path: str) -> np.ndarray:
        """A picture file as the model takes it: (1, S, S, 3) uint8."""
        try:
            image = data.decode_image(data.head(path))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: no readable picture ({error})") from None
        return np.array(data.square(image, self.side))[None]


def save_grid(path: Path, images: np.ndarray, labels: list[str], columns: int) -> None:
    """Rows of pictures (B, S, S, 3) with a label under each row."""
    side, scale = images.shape[1], max(1, 128 // images.shape[1])
    tile, strip = side * scale + 4, 18
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (max(columns * tile, 420) + 4, rows * (tile + strip) + 4), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = i % columns * tile + 4, i // columns * (tile + strip) + 4
        sheet.paste(
            Image.fromarray(image).resize((side * scale,) * 2, Image.Resampling.NEAREST), (x, y)
        )
        if i % columns == 0:
            pen.text((x, y + tile - 2), labels[i // columns], fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: sheet.save(temporary, "PNG"))


# -------------------------------------------------------------------------------------- scores


def score_prompts(prompts: list, images: np.ndarray) -> dict:
    """ShapesEval of pictures (B, 64, 64, 3), one for each prompt.

    Returns {rule: {category: share}} for "strict", "geneval" and "floor" (judged by another prompt
    of the category), each rule's "mean" over the categories, and the "entropy" of the colours that
    colour-free prompts got, where 1 means all equally often.
    """
    found, colors = data.find_objects(images), Counter()
    members, table = defaultdict(list), defaultdict(dict)
    for i, prompt in enumerate(prompts):
        members[prompt.category].append(i)
        if not any(color for _, color in prompt.objects):
            colors.update(item.color for item in found[i] if item is not None)
    for category, rows in members.items():
        others = np.roll(rows, len(rows) // 2)
        judged = {
            "strict": [data.judge(prompts[i], found[i]) for i in rows],
            "geneval": [data.judge(prompts[i], found[i], strict=False) for i in rows],
            "floor": [
                data.judge(prompts[i], found[j])
                for i, j in zip(rows, others)
                if prompts[i].text != prompts[j].text
            ],
        }
        for rule, hits in judged.items():
            table[rule][category] = float(np.mean(hits or [False]))
    for shares in table.values():
        shares["mean"] = float(np.mean(list(shares.values())))
    shares = np.array(list(colors.values()), float) / max(1, sum(colors.values()))
    return {
        **table,
        "entropy": float((shares * -np.log(shares)).sum() / math.log(len(data.COLORS))),
    }


def evaluate_shapes(studio: Studio, seed: int, count: int) -> dict:
    """ShapesEval with `count` pictures a prompt: the first ones drawn, nothing is chosen."""
    results, prompts = {}, {}
    for name, unique in data.eval_prompts().items():
        prompts[name] = [p for p in unique for _ in range(count)]
        seeds = [seed * 1_000_000 + i for i in range(len(prompts[name]))]
        images = studio.draw([p.text for p in prompts[name]], seeds)
        results[name] = score_prompts(prompts[name], images)
    seen, wanted = results["seen"], prompts["seen"]
    real = data.draw_scenes(wanted, np.random.default_rng(seed))[0]
    again = studio.paint(studio.see(real), list(range(len(real))))
    return {
        **{f"{name}_strict": result["strict"]["mean"] for name, result in results.items()},
        "seen_geneval": seen["geneval"]["mean"],
        "floor": seen["floor"]["mean"],
        "color_entropy": seen["entropy"],
        "ceiling_render": score_prompts(wanted, real)["strict"]["mean"],
        "ceiling_reconstruction": score_prompts(wanted, again)["strict"]["mean"],
        "per_category": {name: result["strict"] for name, result in results.items()},
    }


@torch.no_grad()
def evaluate_clip(studio: Studio, dataset) -> dict:
    """Is the tiny CLIP still a CLIP? Side by side: the right image among those of 100 captions,
    R^2 of the pixels rebuilt from its vectors, and the share of that extra loss in the whole."""
    clip, ids, seen = studio.net.clip, [], set()
    for i in dataset.val_ids:
        caption = dataset.texts(i)["caption"]
        if caption not in seen and len(ids) < 100:
            seen.add(caption)
            ids.append(i)
    pixels = M.to_pixels(torch.from_numpy(dataset.images[ids]).to(studio.device))
    vectors = clip.vectors(pixels)
    rows = [[("user", dataset.texts(i)["caption"]), ("bot", None)] for i in ids]
    tokens = studio.build(rows)
    scores = clip.embed_texts(tokens) @ clip.embed_images(vectors).T  # captions x images
    top1 = scores.argmax(1).cpu() == torch.arange(len(ids))
    error = (clip.rebuild(vectors) - pixels).square().mean() / pixels.var()
    losses = clip(pixels, tokens, torch.eye(len(ids), device=studio.device))
    extra = studio.config.pixel_weight * float(losses["pixels"])
    return {
        "clip_top1_of_100": float(top1.float().mean()),
        "clip_pixel_r2": float(1 - error),
        "clip_pixel_loss_share": extra / (extra + float(losses["contrastive"])),
    }


def evaluate_understanding(studio: Studio, dataset, limit: int = 500) -> dict:
    """Answers on validation images, against always giving the commonest answer; exact captions."""
    ids = dataset.val_ids[:limit]
    vectors = studio.see(dataset.images[ids])
    pairs = [(n, q, a) for n, i in enumerate(ids) for q, a in dataset.texts(i)["qa"][:2]]
    if not pairs:
        return {}
    which, questions, answers = zip(*pairs)
    given = studio.answer(vectors[list(which)], list(questions))
    majority = Counter(answers).most_common(1)[0][1] / len(answers)
    right = float(np.mean([a == b for a, b in zip(given, answers)]))
    return {"vqa": right, "vqa_majority": majority}


def evaluate_photos(studio: Studio, dataset, run: Path, seed: int) -> dict:
    """Do vectors made from validation captions look like their class, and pictures like pictures?

    The class is a caption's last word; a vector belongs to the class with the nearest mean. The
    reconstruction's baseline is the training picture with the nearest vectors.
    """
    features = np.load(run.parent / "features.npy", mmap_mode="r")
    train, val = dataset.train_ids[:5000], dataset.val_ids
    known, truth = (torch.from_numpy(features[ids]).float().flatten(1) for ids in (train, val))
    captions = [dataset.texts(i)["caption"] for i in val]
    words = np.array([dataset.texts(i)["caption"].split()[-1] for i in train])
    classes = [word for word, n in Counter(words.tolist()).most_common(100) if n >= 20]
    means = torch.stack([known[torch.from_numpy(words == word)].mean(0) for word in classes])
    seeds = [seed * 1_000_000 + i for i in range(len(val))]

    def accuracy(vectors: Tensor) -> float:
        nearest = torch.cdist(vectors.cpu().flatten(1), means).argmin(1).tolist()
        return float(np.mean([classes[n] == c.split()[-1] for n, c in zip(nearest, captions)]))

    images = dataset.images[val]
    nearest = dataset.images[train[torch.cdist(truth, known).argmin(1).numpy()]]
    return {
        "class_accuracy_real": accuracy(truth),
        "class_accuracy_generated": accuracy(studio.imagine(captions, seeds)),
        "psnr_reconstruction": psnr(images, studio.paint(studio.see(images), seeds)),
        "psnr_nearest_neighbour": psnr(images, nearest),
    }


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over pictures of the peak signal-to-noise ratio of uint8 pictures, in dB."""
    error = np.square(a.astype(np.float32) - b.astype(np.float32)).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-3))))


def evaluate(studio: Studio, path: Path, options) -> dict:
    begun, dataset = time.perf_counter(), data.PreparedSet(studio.config.data)
    torch.manual_seed(options.seed)
    studio.cut = Counter()  # the set's own texts may be long, as in training
    scores = evaluate_clip(studio, dataset) if studio.net.clip is not None else {}
    scores |= evaluate_understanding(studio, dataset)
    if dataset.meta["settings"]["kind"] == "shapes":
        scores |= evaluate_shapes(studio, options.seed, options.count)
    else:
        scores |= evaluate_photos(studio, dataset, path, options.seed)
    seconds = studio.facts["seconds"]
    scores |= {
        "seconds_total": round(sum(seconds.values()), 1),
        "seconds_by_stage": seconds,
        "seconds_eval": round(time.perf_counter() - begun, 1),
        "seed": options.seed,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {studio.device}",
    }
    text = json.dumps(scores, indent=2)
    target = path.parent / "scores.json"
    write_whole(target, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(text, f"\n{target}")
    return scores


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("prompts", nargs="*", help="texts to draw, one row of pictures each")
    add("--run", help="folder of a run, or a weights file")
    add("--out", default="out/samples.png", help="the picture to write (default %(default)s)")
    add("--caption", metavar="IMAGE", help="describe a picture")
    add("--ask", metavar="QUESTION", help="ask about --image")
    add("--image", help="the picture that --ask is about")
    add("--reconstruct", metavar="IMAGE", help="picture -> vectors -> picture")
    add("--evaluate", action="store_true", help="write scores.json beside the weights")
    add("--seed", type=int, default=0, help="of the noise (default %(default)s)")
    add("--count", type=int, default=4, help="pictures for each prompt (default %(default)s)")
    add("--steps", type=int, default=10, help="of the flow head (default %(default)s)")
    add("--guidance", type=float, default=4.0, help="of the flow head; 1 is off (%(default)s)")
    add("--decoder_steps", type=int, default=4, help="of the decoder (default %(default)s)")
    add("--decoder_guidance", type=float, default=1.0, help="of the decoder (%(default)s)")
    options = parser.parse_args(arguments)
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(options, name) <= high:  # nan is outside too
            parser.error(f"--{name} {getattr(options, name)}: expected {low} to {high}")
    if bool(options.ask) != bool(options.image):
        parser.error("--ask and --image go together")
    tasks = (options.prompts, options.caption, options.ask, options.reconstruct, options.evaluate)
    if not any(tasks):
        parser.error("nothing to do: give a prompt, --caption, --ask, --reconstruct or --evaluate")
    return options


def run_tasks(o: argparse.Namespace) -> None:
    path = find_run(o.run)
    print(f"weights {path}")
    studio = Studio(
        path,
        dict(steps=o.steps, guidance=o.guidance),
        dict(steps=o.decoder_steps, guidance=o.decoder_guidance),
    )
    if o.prompts:
        prompts = [text for text in o.prompts for _ in range(o.count)]
        images = studio.draw(prompts, [o.seed + i for i in range(len(prompts))])
        save_grid(Path(o.out), images, o.prompts, o.count)
        print(o.out)
    if o.caption:
        print(studio.answer(studio.see(studio.open(o.caption)), [DESCRIBE])[0])
    if o.ask:
        print(studio.answer(studio.see(studio.open(o.image)), [o.ask])[0])
    if o.reconstruct:
        image = studio.open(o.reconstruct)
        seeds = [o.seed + i for i in range(o.count)]
        again = studio.paint(studio.see(image).expand(o.count, -1, -1), seeds)
        save_grid(
            Path(o.out), np.concatenate([image, again]), ["original, then drawn"], o.count + 1
        )
        print(o.out)
    if o.evaluate:
        evaluate(studio, path, o)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(sys.argv[1:] if arguments is None else arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # answers may hold any character
    try:
        run_tasks(options)
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
