"""What the preset cc3m needs: peak memory, images/s, and seconds a picture, on noise of its shapes.

    python tests/bench_cc3m.py [--device cuda] [--steps 5] [flags of train.py]

Each stage runs in a process of its own. On a card the peak is what torch allocates; on a CPU it is
the resident memory of the process, libraries included.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import data  # noqa: E402  (found through the line above)
import train  # noqa: E402

STAGES = ("vae", "understand", "generate", "decode", "sample")
SIDE, TOKENS, CHANNELS = 128, 64, 768
PICTURES = 16  # drawn at once: four prompts, four pictures each


def prepare(folder: Path, count: int = 256) -> None:
    """A prepared set of noise, as a tower 768 wide leaves it, with captions of twelve words."""
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(600)]

    def read(_, dropped):
        texts = [" ".join(rng.choice(words, 12)) for _ in range(count)]
        rows = {"images": rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)}
        rows["features"] = rng.standard_normal((count, TOKENS, CHANNELS)).astype(np.float16)
        yield [{"caption": text, "clean": None, "qa": []} for text in texts], rows

    settings = {"kind": "photos", "size": SIDE, "tower": "noise", "weights": None, "side": 256}
    with data.lock(folder):
        data.write_set(folder, settings, ["noise"], read)


def seconds_of(work, times: int, device: str) -> float:
    """Median of what `work()` takes after one call to warm up."""
    taken = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return float(np.median(taken[1:]))


def measure(stage: str, folder: Path, device: str, steps: int, more: list[str]) -> str:
    """A row of the table; `more` are flags of train.py."""
    flags = ["--preset", "cc3m", "--data", str(folder / "set"), "--out", str(folder / "run")]
    run = train.Run(train.parse_config([*flags, "--device", device, *more]))
    train.fill_cache(run)
    if stage == "sample":
        net = run.model.eval().requires_grad_(False)
        rows = [[("user", "a dog on a red sofa"), ("queries", None)]] * PICTURES
        ids = run.build(rows)[0].to(run.device)
        vectors, latents = (
            torch.randn(PICTURES, *shape, device=run.device)
            for shape in (net.head.shape, net.decoder.shape)
        )

        def work():
            made = net.imagine(ids, vectors, steps=30, guidance=2.0)
            net.paint(made, latents, steps=4, guidance=1.5)

        seconds = seconds_of(work, steps, device)
        rate = f"{seconds / PICTURES:.2f} s a picture"
    else:
        trainer = train.Trainer(run, stage)
        seconds = seconds_of(trainer.update, steps, device)
        rate = f"{trainer.batch / seconds:.1f} images/s"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    return f"| {stage} | {peak:.2f} GiB | {rate} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default=data.find_device(), help="cpu, cuda or mps")
    parser.add_argument("--steps", type=int, default=5, help="steps timed, after one")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--folder", type=Path, help="of a set made before: one stage, here")
    given, flags = parser.parse_known_args()
    if given.folder:
        print(measure(given.stages[0], given.folder, given.device, given.steps, flags))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder) / "set")
        (Path(folder) / "run").mkdir()
        print("| stage | peak memory | speed |\n|---|---|---|", flush=True)
        for stage in given.stages:
            more = ["--device", given.device, "--steps", str(given.steps), *flags]
            command = [sys.executable, __file__, "--folder", folder, "--stages", stage, *more]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(printed.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
