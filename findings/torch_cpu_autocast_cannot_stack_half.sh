#!/usr/bin/env bash
# torch 2.14.1: under torch.autocast("cpu", torch.bfloat16), torch.stack and torch.cat of float16
# tensors raise "Unexpected floating ScalarType in at::autocast::prioritize", while a matmul of the
# same tensors works and gives bfloat16. Data that is stored in half precision, such as the features
# of an image tower, is therefore to be collated outside of the autocast region, which a loop that
# draws its batch inside of it does not do. A guess was that all of these work, or that none does.
# The script fails if stack and cat work, or if the matmul no longer does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

half = torch.ones(2, 2, dtype=torch.float16)
with torch.autocast("cpu", torch.bfloat16):
    assert (half @ half).dtype is torch.bfloat16
    for function in (torch.stack, torch.cat):
        try:
            function([half, half])
        except RuntimeError as error:
            print("torch", torch.__version__, function.__name__, "of float16:", error)
        else:
            raise SystemExit(f"{function.__name__} of float16 works under CPU autocast now")
assert torch.stack([half, half]).dtype is torch.float16
PYTHON
