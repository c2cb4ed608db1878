"""Trains with batches that mix both tasks: prompts to draw, and beside them sequences to read.

    python train.py --generate_steps 0 --tune_steps 0 --compile on --out out/base
    python tests/joint.py --mix 3 --init out/base/checkpoint.pt --clip_steps 0 --vae_steps 0 \
        --decode_steps 0 --understand_steps 0 --out out/mix3

--mix N puts N sequences of stage understand beside each prompt of the stages generate and tune.
0 is `train.py --joint`. The backbone learns in these stages too. All other flags are train.py's.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402  (found through the line above)
import train  # noqa: E402

READ = "read_"  # before the names of what is read, in a mixed batch


def mixed_batch(batch, mix):
    """A stage's batch function -> one that adds `mix` sequences to read for each of its prompts.

    Pictures to read are chosen anew. A generator of their own leaves prompts, targets and noise
    as they are without them, so runs that differ in `mix` alone draw the same.
    """

    def both(run, ids, rng):
        own = rng.spawn(1)[0]
        held = np.isin(ids, run.data.val_ids).all()
        pool = run.data.val_ids if held else run.data.train_ids
        read = train.understand_batch(run, own.choice(pool, mix * len(ids)), own)
        return batch(run, ids, rng) | {READ + name: x for name, x in read.items()}

    return both


def mixed_loss(model, generator, **batch):
    """-> (rows to draw + rows to read,). Its mean is the mean of the first plus that of the second.

    Unweighted, the rows would decide how much a task counts: 4 draws a prompt, N sequences.
    """
    read = {name.removeprefix(READ): x for name, x in batch.items() if name.startswith(READ)}
    draw = {name: x for name, x in batch.items() if not name.startswith(READ)}
    drawn = train.generate_loss(model, generator, **draw)
    losses = drawn, train.understand_loss(model, generator, **read)
    rows = sum(map(len, losses))
    return torch.cat([loss * (rows / len(loss)) for loss in losses])


def mixed_stages(mix):
    """train.STAGES, in which generate and tune read too."""
    if mix < 0:
        raise ValueError(f"--mix {mix}: expected 0 or more")
    stages = dict(train.STAGES)
    for name in ("generate", "tune") if mix else ():
        batch = mixed_batch(stages[name].batch, mix)
        stages[name] = stages[name]._replace(batch=batch, loss=mixed_loss)
    return stages


def main(arguments=None):
    how = {"formatter_class": RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = ArgumentParser(description=__doc__, **how)
    parser.add_argument("--mix", type=int, required=True, help="sequences for each prompt")
    own, others = parser.parse_known_args(arguments)
    with data.plain_errors("joint.py"):
        train.STAGES = mixed_stages(own.mix)
        train.main([*others, "--joint"])


if __name__ == "__main__":
    main()
