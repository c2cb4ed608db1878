#!/usr/bin/env bash
# torch 2.14.1: torch.optim.Muon orthogonalises in bf16, whatever the parameters are. On a CPU without
# bf16 instructions its step takes many times as long as the same iteration in float32: seen 15 times
# on an AMD EPYC held to AVX2 (1.1 s against 0.07 s for 50 matrices of a small transformer, one
# thread). A guess would be twice. On a CPU with AVX512-BF16 it is faster than float32. The script
# holds oneDNN and ATen to AVX2, and fails if Muon is less than 4 times as slow.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 "$folder/venv/bin/python" - <<'PYTHON'
import time

import torch

torch.set_num_threads(1)
shapes = [(128, 128), (128, 128), (256, 128), (704, 128), (128, 352)]
parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
for parameter in parameters:
    parameter.grad = torch.randn_like(parameter)
muon = torch.optim.Muon(parameters, lr=1e-3)


def in_float32():
    for parameter in parameters:
        x = parameter.grad / parameter.grad.norm()
        x = x.T if len(x) > len(x.T) else x
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x


def seconds(function):
    function()
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return min(times)


ratio = seconds(muon.step) / seconds(in_float32)
print("torch", torch.__version__, f"Muon's step takes {ratio:.1f} times as long as in float32")
assert ratio > 4, "Muon is no longer slow on a CPU without bf16"
PYTHON
