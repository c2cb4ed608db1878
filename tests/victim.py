"""What test_kills.py kills: prepares two sets and trains on one, slowly, saying where it is."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402  (found through the line above)

import data  # noqa: E402
import train  # noqa: E402


def work(folder, shards, pause):
    """Prepares shapes and photos, trains every stage; FOLDER/where holds the latest place."""
    folder, where = Path(folder), os.open(Path(folder) / "where", os.O_CREAT | os.O_WRONLY)
    os.dup2(os.open(Path(folder) / "said", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)

    def say(place):
        os.pwrite(where, place.ljust(80).encode(), 0)

    def telling(owner, name, place):
        original = getattr(owner, name)

        def told(*arguments, **options):
            say(place(*arguments))
            return original(*arguments, **options)

        setattr(owner, name, told)

    whole = data.write_whole

    def slow(path, write):
        def halves(temporary):
            write(temporary)
            raw = temporary.read_bytes()
            say(f"writing {path.name}")
            with open(temporary, "wb") as file:
                for part in (raw[: len(raw) // 2], raw[len(raw) // 2 :]):
                    file.write(part)
                    file.flush()
                    time.sleep(pause)
            if path.suffix == ".partial":  # the run deletes them in the end, the test compares them
                kept = folder / f"kept-{path.name}"
                whole(kept, lambda file: file.write_bytes(raw))
            say(f"renaming {path.name}")

        whole(path, halves)
        say(f"after {path.name}")

    data.write_whole = train.write_whole = slow
    data.CHUNK = 50
    telling(data, "draw_scenes", lambda *_: "drawing scenes")
    telling(data, "decode_image", lambda *_: "reading photos")
    telling(train.Trainer, "update", lambda t: f"{t.stage} step {t.step + 1}")
    telling(train.Trainer, "restore", lambda t: f"{t.stage} starting")
    telling(train.Run, "__init__", lambda *_: "run starting")
    telling(train.M.VAE, "encode", lambda *_: "encoding with the VAE")
    say("start")
    data.main(["photos", shards, "--out", str(folder / "photos"), "--size", "16"])
    data.main(["shapes", "--count", "200", "--out", str(folder / "shapes")])
    flags = ["--preset", "micro", "--device", "cpu", "--precision", "fp32", "--save_every", "3"]
    train.main([*flags, "--data", str(folder / "shapes"), "--out", str(folder / "run")])
    say("finished")
