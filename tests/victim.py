"""What test_kills.py kills: prepares two sets and trains on one, slowly, saying where it is."""

import builtins
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402  (found through the line above)

import data  # noqa: E402
import train  # noqa: E402


def work(folder, shards, pause):
    """Prepares shapes and photos, trains every stage; FOLDER/where holds the latest place.

    A place is "stage: what", and is told before it begins. Each write is told when it begins and
    again when it is over, is made in two halves, and waits for `pause` seconds after each.
    """
    folder, where = Path(folder), os.open(Path(folder) / "where", os.O_CREAT | os.O_WRONLY)
    os.dup2(os.open(Path(folder) / "said", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    stage = "photos"

    def say(place):
        os.pwrite(where, f"{stage}: {place}".ljust(80).encode(), 0)

    def telling(owner, name, place, begins=lambda *_: stage):
        original = getattr(owner, name)

        def told(*arguments, **options):
            nonlocal stage
            stage = begins(*arguments)
            say(place(*arguments))
            return original(*arguments, **options)

        setattr(owner, name, told)

    def halves(file, raw):
        for part in (raw[: len(raw) // 2], raw[len(raw) // 2 :]):
            file.write(part)
            file.flush()
            time.sleep(pause)

    whole = data.write_whole

    def slow(path, write):
        def slowly(temporary):
            say(f"making {path.name}")
            write(temporary)
            raw = temporary.read_bytes()
            if path.suffix == ".partial":  # the run deletes them in the end, the test compares them
                whole(folder / f"kept-{path.name}", lambda file: file.write_bytes(raw))
            with open(temporary, "wb") as file:
                say(f"writing {path.name}")
                halves(file, raw)
            say(f"flushing and renaming {path.name}")

        whole(path, slowly)
        say(f"after {path.name}")

    class Appending:
        """A file that grows slowly, for the rows of a set."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()
            say(f"after {Path(self.file.name).name}")

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, raw):
            say(f"writing {Path(self.file.name).name}")
            halves(self.file, raw)

    def opened(path, mode="r", **options):
        file = builtins.open(path, mode, **options)
        return Appending(file) if Path(path).suffix == ".npy" else file

    data.write_whole = slow
    data.open = opened
    data.CHUNK = 50
    telling(data, "draw_scenes", lambda *_: "drawing scenes")
    telling(data, "decode_image", lambda *_: "reading photos")
    telling(train.Run, "__init__", lambda *_: "set, words and model", lambda *_: "run")
    telling(train, "fill_cache", lambda *_: "encoding", lambda *_: "cache")
    telling(train, "train_stage", lambda *_: "restoring", lambda run, name: name)
    telling(train.Trainer, "update", lambda trainer: f"step {trainer.step + 1}")
    telling(train.Trainer, "use_averages", lambda trainer: f"behind step {trainer.step}")
    telling(train, "load_weights", lambda path: f"loading {path.name}")
    say("start")
    data.main(["photos", shards, "--out", str(folder / "photos"), "--size", "16"])
    stage = "shapes"
    say("start")
    data.main(["shapes", "--count", "200", "--out", str(folder / "shapes")])
    flags = ["--preset", "micro", "--device", "cpu", "--precision", "fp32", "--save_every", "3"]
    train.main([*flags, "--data", str(folder / "shapes"), "--out", str(folder / "run")])
