"""Pictures, captions, answers and scores from a trained run.

    python sample.py "a red circle left of a blue square" "three green circles"
    python sample.py --caption picture.png        python sample.py --reconstruct picture.png
    python sample.py --ask "how many circles are there?" --image picture.png
    python sample.py --evaluate                   writes scores.json beside the weights

Without --run the newest finished run below out/ is used, else the weights that come along.
"""

import json
import math
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

import data
import model as M
from data import require
from train import DESCRIBE, check_same, extra_loss, load_model

BATCH = 128  # rows at once: bounds the memory, changes no picture
LIMITS = {"count": (1, 1000), "steps": (1, 1000), "guidance": (0, 100), "seed": (0, 2**32 - 1)}
LIMITS |= {"decoder_steps": (1, 1000), "decoder_guidance": (0, 100), "shift": (0.01, 100)}


def find_run(given: str | None) -> Path:
    """The weights file of a run folder: the given one, else the newest, else the shipped one."""
    if given:
        path = Path(given, "model.safetensors") if Path(given).is_dir() else Path(given)
        require(path.is_file(), f"--run {given}: no model.safetensors there; train with train.py")
        return path
    runs = sorted(Path("out").glob("*/model.safetensors"), key=lambda p: p.stat().st_mtime)
    runs = runs or sorted(Path(__file__).with_name("weights").glob("*.safetensors"))
    require(runs, "no finished run below out/: `make demo` trains one")
    return runs[-1]


def row_noise(seeds: Tensor, shape: tuple[int, int], device) -> Callable[[], Tensor]:
    """A source of noise (B, *shape), each row from its own seed: no picture depends on another."""
    sources = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    return lambda: torch.stack([torch.randn(shape, generator=s) for s in sources]).to(device)


def in_batches(title: str, function, *rows: Tensor) -> list:
    """What function(*rows) gives for BATCH rows at a time, with a progress bar."""
    parts = list(zip(*(whole.split(BATCH) for whole in rows)))
    return [function(*part) for part in tqdm(parts, title, unit="batch", disable=len(parts) < 2)]


class Studio:
    """A loaded run, ready to draw and to read; everything in batches, on CPU or GPU."""

    def __init__(self, path: Path, flow: dict, paint: dict, ode: bool = False):
        """flow, paint: how `sample_flow` runs head and decoder; ode: the head without new noise."""
        self.net, self.tokenizer, self.config, self.facts = load_model(path)
        self.device = torch.device(data.find_device())
        self.net.to(self.device)
        self.cut = None  # a Counter: texts that are too long are cut and counted, not refused
        self.flow, self.paint_options, self.ode = flow, paint, ode

    @cached_property
    def tower(self) -> data.Tower:  # opened where a picture is read: drawing needs none
        name, weights = (self.facts["data"][key] for key in ("tower", "weights"))
        return data.open_tower(name, self.config.tokens, weights)[0].to(self.device)

    def sequences(self, rows: list) -> Tensor:
        """Ids (B, T); ValueError if a text is too long, unless `cut` counts what is dropped."""
        c, texts = self.config, (self.config.text_length, self.cut)
        ids = M.build_sequences(self.tokenizer, rows, c.tokens, c.queries, *texts)[0]
        return ids.to(self.device)

    def imagine(self, prompts: list[str], seeds: list[int]) -> Tensor:
        """Prompts -> what the flow head makes: treated vectors (B, N, C), or latents."""
        rows = self.sequences([[("user", text), ("queries", None)] for text in prompts])

        def flow(ids, seeds):
            noise = row_noise(seeds, self.net.head.shape, self.device)
            return self.net.imagine(ids, noise(), fresh=None if self.ode else noise, **self.flow)

        return torch.cat(in_batches("vectors", flow, rows, torch.tensor(seeds)))

    def paint(self, vectors: Tensor, seeds: list[int]) -> np.ndarray:
        """Vectors (B, N, C) -> pictures (B, S, S, 3) uint8; the noise differs from imagine's."""

        def flow(vectors, seeds):  # 2**31, since torch keeps 32 bits of a seed
            noise = row_noise(seeds + 2**31, self.net.decoder.shape, self.device)
            return self.net.paint(vectors, noise(), **self.paint_options)

        return torch.cat(in_batches("pixels", flow, vectors, torch.tensor(seeds))).cpu().numpy()

    def draw(self, prompts: list[str], seeds: list[int]) -> np.ndarray:
        made = self.imagine(prompts, seeds)
        if self.net.target == "clip":
            return self.paint(made, seeds)
        return torch.cat(in_batches("pixels", self.net.develop, made)).cpu().numpy()

    @torch.no_grad()
    def see(self, images: np.ndarray) -> Tensor:
        """Pictures (B, S, S, 3) uint8 -> treated vectors (B, N, C)."""

        def look(part):
            pixels = M.to_pixels(part.to(self.device))
            if self.net.clip is not None:
                return self.net.treatment(self.net.clip.vectors(pixels))
            resized = v2.functional.resize(pixels, [self.facts["data"]["side"]] * 2, antialias=True)
            return self.net.treatment(self.tower((resized + 1) / 2))

        return torch.cat(in_batches("seeing", look, torch.from_numpy(images)))

    def answer(self, vectors: Tensor, questions: list[str]) -> list[str]:
        """One answer for each image and question; the question "describe" gives the caption."""
        rows = [[("image", None), ("user", text), ("bot", None)] for text in questions]
        parts = in_batches("answers", self.net.backbone.write, self.sequences(rows), vectors)
        return [self.tokenizer.decode(row) for part in parts for row in part]

    def open(self, path: str) -> np.ndarray:
        """A picture file as the model takes it: (1, S, S, 3) uint8."""
        try:
            image = data.decode_image(data.head(open(path, "rb")))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: no readable picture ({error})") from None
        return np.array(data.square(image, self.facts["side"]))[None]


def save_grid(path: Path, images: np.ndarray, labels: list[str], columns: int) -> None:
    """Rows of pictures (B, S, S, 3) with a label under each row; prints the path."""
    scale = max(1, 128 // images.shape[1])
    tile = images.shape[1] * scale + 4  # px; a label's strip adds 18
    sheet = Image.new("RGB", (max(columns * tile, 420) + 4, len(labels) * (tile + 18) + 4), "white")
    for i, image in enumerate(images.repeat(scale, 1).repeat(scale, 2)):
        x, y = i % columns * tile + 4, i // columns * (tile + 18) + 4
        sheet.paste(Image.fromarray(image), (x, y))
    for row, label in enumerate(labels):
        ImageDraw.Draw(sheet).text((4, row * (tile + 18) + tile + 2), label, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    data.write_whole(path, lambda temporary: sheet.save(temporary, "PNG"))
    print(path)


# -------------------------------------------------------------------------------------- scores


def score_prompts(prompts: list, images: np.ndarray) -> dict:
    """ShapesEval of pictures (B, 64, 64, 3), one for each prompt.

    Returns {rule: {category: share}} for "strict", "geneval" and "floor" (judged by another prompt
    of the category), each rule's "mean" over the categories, and the "entropy" of the colours that
    colour-free prompts got, where 1 means all equally often.
    """
    found, kinds = data.find_objects(images), np.array([p.category for p in prompts])
    table, colors = defaultdict(dict), Counter()
    for kind in dict.fromkeys(kinds.tolist()):
        rows = np.flatnonzero(kinds == kind)
        for rule, step in (("strict", 0), ("geneval", 0), ("floor", len(rows) // 2)):
            pairs = [(prompts[i], prompts[j], found[j]) for i, j in zip(rows, np.roll(rows, step))]
            pairs = [(p, items) for p, q, items in pairs if not step or p.text != q.text]
            hits = [data.judge(p, items, strict=rule != "geneval") for p, items in pairs]
            table[rule][kind] = float(np.mean(hits or [False]))
    for shares in table.values():
        shares["mean"] = float(np.mean(list(shares.values())))
    for prompt, items in zip(prompts, found):
        if not any(color for _, color in prompt.objects):
            colors.update(item.color for item in items if item)
    shares = np.array(list(colors.values())) / max(1, colors.total())
    entropy = (shares * -np.log(shares)).sum() / math.log(len(data.COLORS))
    return {**table, "entropy": float(entropy)}


def evaluate_shapes(studio: Studio, seed: int, count: int) -> dict:
    """ShapesEval with `count` pictures a prompt: the first ones drawn, nothing is chosen. The
    ceilings are judged on one real scene for each seen prompt."""
    once = data.eval_prompts()
    asked = {name: [p for p in once[name] for _ in range(count)] for name in once}
    asked["long"] = data.long_prompts()
    tables, rng = {}, np.random.default_rng(seed)
    for name, prompts in asked.items():
        seeds = [seed * 1_000_000 + i for i in range(len(prompts))]
        tables[name] = score_prompts(prompts, studio.draw([p.text for p in prompts], seeds))
    scores = {f"{name}_strict": table["strict"]["mean"] for name, table in tables.items()}
    scores |= {"seen_geneval": tables["seen"]["geneval"]["mean"]}
    scores |= {"floor": tables["seen"]["floor"]["mean"], "color_entropy": tables["seen"]["entropy"]}
    real = data.draw_scenes(once["seen"], rng)[0]
    again = studio.paint(studio.see(real), list(range(len(real))))
    for name, images in (("render", real), ("reconstruction", again)):
        scores[f"ceiling_{name}"] = score_prompts(once["seen"], images)["strict"]["mean"]
    return scores | {"per_category": {name: table["strict"] for name, table in tables.items()}}


@torch.no_grad()
def evaluate_clip(studio: Studio, dataset) -> dict:
    """Is the tiny CLIP still a CLIP? Side by side: the right image among those of 100 captions,
    R^2 of the pixels rebuilt from its vectors, and the share of the extra losses in the whole."""
    ids = {dataset.images[i].tobytes(): i for i in reversed(dataset.val_ids)}.values()
    first = {dataset.texts(i)["caption"]: i for i in ids}  # of a photo's captions one
    captions = sorted(first, key=first.get)[:100]
    images = dataset.images[[first[caption] for caption in captions]]
    clip, pixels = studio.net.clip, M.to_pixels(torch.from_numpy(images).to(studio.device))
    tokens = studio.sequences([[("user", caption), ("bot", None)] for caption in captions])
    vectors, same = clip.vectors(pixels), torch.eye(len(captions), device=studio.device)
    scores = clip.embed_texts(tokens) @ clip.embed_images(vectors).T  # captions x images
    top1 = (scores.argmax(1) == same.argmax(1)).float().mean()
    error = (clip.rebuild(vectors) - pixels).square().mean() / pixels.var()
    losses = clip(pixels, tokens, same)
    extra = extra_loss(studio.config, losses).mean()
    scores = (top1, 1 - error, extra / (extra + losses["contrastive"]))
    names = ("clip_top1_of_100", "clip_pixel_r2", "clip_extra_loss_share")
    return dict(zip(names, map(float, scores)))


def evaluate_understanding(studio: Studio, dataset, limit: int = 500) -> dict:
    """Answers on validation images, against always giving the commonest answer."""
    ids = dataset.val_ids[:limit]
    pairs = [(n, q, a) for n, i in enumerate(ids) for q, a in dataset.texts(i)["qa"][:2]]
    if not pairs:
        return {}
    which, questions, answers = map(list, zip(*pairs))
    given = studio.answer(studio.see(dataset.images[ids])[which], questions)
    majority = Counter(answers).most_common(1)[0][1] / len(answers)
    return {"vqa": float(np.mean(np.equal(given, answers))), "vqa_majority": majority}


def evaluate_photos(studio: Studio, dataset, run: Path, seed: int, limit: int = 500) -> dict:
    """Do vectors made from validation captions (with --target vae: seen in the pictures that were
    drawn) look like their class, and pictures like pictures?

    Of at most `limit` validation rows. The class is a caption's last word, where it is one of the
    100 commonest of the first 5,000 training captions and 20 share it; captions of no class do not
    count. A vector belongs to the class with the nearest mean. The reconstruction's baseline is the
    one of those 5,000 pictures with the nearest vectors.
    """
    features = data.open_array(run.parent / "features.npy")
    val = np.unique(dataset.val_ids[np.linspace(0, len(dataset.val_ids) - 1, limit).astype(int)])
    train = dataset.train_ids[:5000]
    known, truth = (torch.from_numpy(features[ids]).float() for ids in (train, val))
    captions = [dataset.texts(i)["caption"] for i in val]
    words = np.array([dataset.texts(i)["caption"].split()[-1] for i in train])
    classes = [word for word, n in Counter(words.tolist()).most_common(100) if n >= 20]
    images, seeds = dataset.images[val], [seed * 1_000_000 + i for i in range(len(val))]
    scores = {"psnr_reconstruction": psnr(images, studio.paint(truth.to(studio.device), seeds))}
    known, truth = known.flatten(1), truth.flatten(1)
    nearest = dataset.images[train[torch.cdist(truth, known).argmin(1).numpy()]]
    scores |= {"psnr_nearest_neighbour": psnr(images, nearest)}
    rows = [n for n, caption in enumerate(captions) if caption.split()[-1] in classes]
    if not rows:  # captions of free text, or few of them
        return scores
    means = torch.stack([known[torch.from_numpy(words == word)].mean(0) for word in classes])

    def accuracy(vectors: Tensor) -> float:
        nearest = torch.cdist(vectors.cpu().flatten(1), means).argmin(1)
        return float(np.mean([classes[nearest[n]] == captions[n].split()[-1] for n in rows]))

    scores["class_accuracy_real"] = accuracy(truth)
    direct = studio.net.target == "clip"
    made = studio.imagine(captions, seeds) if direct else studio.see(studio.draw(captions, seeds))
    scores["class_accuracy_generated"] = accuracy(made)
    return scores


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over pictures of the peak signal-to-noise ratio of uint8 pictures, in dB."""
    error = np.square(a.astype(np.float32) - b.astype(np.float32)).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-3))))


def matmul_rate(device, side: int = 2048) -> float:
    """TFLOP/s of the best of five matmuls in float32 (a card's TF32): the machine's own rate."""
    matrix, seconds = torch.rand(side, side, device=device), []
    for _ in range(5):
        begun = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - begun)
    return 2 * side**3 / min(seconds) / 1e12


def evaluate_run(studio: Studio, path: Path, seed: int, count: int) -> None:
    """Writes scores.json beside the weights."""
    begun, dataset = time.perf_counter(), data.PreparedSet(studio.config.data)
    check_same(path, studio.facts, {"data": dataset.meta["settings"]})
    studio.cut = Counter()  # the set's own texts may be long, as in training
    scores = evaluate_clip(studio, dataset) if studio.net.clip is not None else {}
    scores |= evaluate_understanding(studio, dataset)
    if dataset.meta["settings"]["kind"] == "shapes":
        scores |= evaluate_shapes(studio, seed, count)
    else:
        scores |= evaluate_photos(studio, dataset, path, seed)
    seconds, target = studio.facts["seconds"], path.with_name("scores.json")
    scores |= {"seconds_total": round(sum(seconds.values()), 1), "seconds_by_stage": seconds}
    scores |= {"seconds_eval": round(time.perf_counter() - begun, 1), "seed": seed}
    threads = f"{torch.get_num_threads()} threads, {matmul_rate(studio.device):.2f} TFLOP/s"
    scores["machine"] = f"{platform.machine()}, {studio.device}, {threads}"
    text = json.dumps(scores, indent=2)
    data.write_whole(target, lambda temporary: temporary.write_text(text))
    print(text, f"\n{target}")


def run_tasks(
    prompts=(),
    run=None,
    out="out/samples.png",
    caption=None,
    ask=None,
    image=None,
    reconstruct=None,
    evaluate=False,
    seed=0,
    count=4,
    steps=25,
    guidance=2.5,
    shift=4.0,
    ode=False,
    decoder_steps=4,
    decoder_guidance=1.5,
) -> None:
    """Does what the command line asks for.

    prompts: texts to draw, one row of pictures each
    run: folder of a run, or a weights file
    out: the picture to write
    caption: picture file to describe
    ask: question about --image
    image: picture file that --ask is about
    reconstruct: picture file to draw again: picture -> vectors -> picture
    evaluate: write scores.json beside the weights
    seed: of the noise
    count: pictures for each prompt
    steps: of the flow head; a regression takes one, without guidance
    guidance: of the flow head; 1 is off
    shift: of the flow head's steps; above 1 more of them near noise
    ode: solve the flow's equation; without, each step of the flow head draws new noise
    decoder_steps: of the decoder
    decoder_guidance: of the decoder; 1 is off
    """
    require(bool(ask) == bool(image), "--ask and --image go together")
    tasks = prompts or caption or ask or reconstruct or evaluate
    require(not (prompts and reconstruct), "prompts, --reconstruct: same picture, ask for one")
    require(tasks, "nothing to do: give a prompt, --caption, --ask, --reconstruct or --evaluate")
    path = find_run(run)
    print(f"weights {path}")
    flow = dict(steps=steps, guidance=guidance, shift=shift)
    studio = Studio(path, flow, dict(steps=decoder_steps, guidance=decoder_guidance), ode)
    if prompts:
        texts = [text for text in prompts for _ in range(count)]
        images = studio.draw(texts, [seed + i for i in range(len(texts))])
        save_grid(Path(out), images, prompts, count)
    for file, question in ((caption, DESCRIBE), (image, ask)):
        if file:
            print(studio.answer(studio.see(studio.open(file)), [question])[0])
    if reconstruct:
        picture, seeds = studio.open(reconstruct), [seed + i for i in range(count)]
        again = studio.paint(studio.see(picture).expand(count, -1, -1), seeds)
        save_grid(Path(out), np.concatenate([picture, again]), ["original, then drawn"], count + 1)
    if evaluate:
        evaluate_run(studio, path, seed, count)


def main(arguments: list[str] | None = None) -> None:
    data.command_line(__doc__, arguments, LIMITS, run_tasks)


if __name__ == "__main__":
    main()
