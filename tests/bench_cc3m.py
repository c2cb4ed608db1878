"""What notebooks/cc3m.flags needs: peak memory and images/s of each stage, on noise of its shapes.

    python tests/bench_cc3m.py --device cuda

The steps are those of train.py's loop; the speed is the median step's.
"""

import gc
import resource
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from bench_peers import NO_STEPS, D, step_times, train

SIDE, TOKENS, CHANNELS = 128, 64, 768  # px of the pictures; shape of a picture's vectors


@dataclass(frozen=True)
class Settings:
    """The fields are the flags, the comments their help."""

    device: str = "auto"  # where to run
    flags: str = str(Path(__file__).parents[1] / "notebooks/cc3m.flags")  # file of train.py's flags
    steps: int = 12  # of each stage; the first is not counted
    count: int = 256  # pictures of the set


def noise_set(folder, count):
    """A prepared set of noise, as a tower leaves it, with captions of twelve words."""
    words = np.random.default_rng(0).integers(600, size=(count, 12))
    captions = [" ".join(f"word{i}" for i in row) for row in words]
    texts = [{"caption": text, "clean": None, "qa": []} for text in captions]
    rows = {"images": torch.randint(0, 256, (count, SIDE, SIDE, 3), dtype=torch.uint8)}
    rows["features"] = torch.randn(count, TOKENS, CHANNELS).half()
    settings = {"kind": "photos", "side": SIDE, "channels": CHANNELS, "out": folder}
    D.prepare(settings, {"part-noise.safetensors": (texts, rows, {})}, lambda made: made)


def measure(stage, config):
    """A row of the table. On a CPU memory is what the process has held so far, libraries too."""
    cuda = D.find_device(config.device).type == "cuda"
    gc.collect()  # what the stage before held
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = step_times(config)[1:, 0]
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if cuda else held
    rate = getattr(config, f"{stage}_batch") / np.median(times)
    return f"| {stage} | {peak / 2**30:.2f} GiB | {rate:.1f} |"


def main(arguments=None):
    s = D.parse(Settings, __doc__, arguments)
    config = D.parse(train.Config, "", [f"@{s.flags}", "--device", s.device])
    with tempfile.TemporaryDirectory() as folder:
        noise_set(f"{folder}/set", s.count)
        config = replace(config, data=f"{folder}/set", out=f"{folder}/run", **NO_STEPS)
        stages = ("vae", "decode", "understand", "generate")
        rows = [measure(name, replace(config, **{f"{name}_steps": s.steps})) for name in stages]
        print("| stage | peak memory | images/s |\n|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
