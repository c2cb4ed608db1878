"""Makes the weights that come along of a finished run: half precision, one safetensors file.

python notebooks/shapes.py --out data/shapes60 --count 60000
python train.py @notebooks/shipped.flags
python tests/ship.py out/shipped weights/shapes.safetensors
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402  (found through the line above)
import train  # noqa: E402


def ship(run, target):
    """Writes a run's weights in half precision, and what sample.py needs beside them."""
    state = train.load_checkpoint(Path(run, "checkpoint.pt"))
    if state["progress"]["stage"] != "done":
        raise ValueError(f"{run} is not finished")
    weights = {name: x.half().contiguous() for name, x in state.pop("model").items()}
    state["progress"] |= {"averages": {}, "states": []}
    note = {"state": json.dumps(state)}
    data.write_whole(Path(target), lambda temporary: save_file(weights, temporary, note))
    return Path(target).stat().st_size


if __name__ == "__main__":
    with data.plain_errors("ship.py"):
        print(f"{sys.argv[2]}: {ship(*sys.argv[1:3]) / 1e6:.2f} MB")
