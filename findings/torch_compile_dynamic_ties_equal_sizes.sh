#!/usr/bin/env bash
# torch 2.14.1: torch.compile(dynamic=True) gives sizes that happen to be equal at the first call one
# symbol. A key-value cache of shape (batch, heads, length, 32) that first comes with a batch of 32
# ties the batch to the width of a head, and where new keys are joined to it the batch becomes the
# constant 32. So another batch compiles anew: two compilations for batches of 32, 24 and 8, one for
# 28, 24 and 8. In our training that was half of the 17 s that a stage took to compile. A guess was
# that dynamic=True compiles once for all sizes, or treats only 0 and 1 apart.
# The script fails if a first batch of 32 needs no second compilation any more, or if 28 needs one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch._dynamo.testing import CompileCounterWithBackend


def step(x, cache, weight):
    keys = (x @ weight).unflatten(2, (4, 32)).transpose(1, 2)
    return torch.cat([cache, keys], dim=2)


def compilations(*batches):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, dynamic=True)
    weight = torch.randn(128, 128)
    for batch in batches:
        with torch.no_grad():
            made = compiled(torch.randn(batch, 2, 128), torch.randn(batch, 4, 48, 32), weight)
        assert made.shape == (batch, 4, 50, 32)
    return counter.frame_count


for batches in ((28, 24, 8), (32, 24, 8)):
    print("torch", torch.__version__, "batches", batches, "compilations", compilations(*batches))
assert compilations(28, 24, 8) == 1
assert compilations(32, 24, 8) == 2, "equal sizes are no longer tied"
PYTHON
