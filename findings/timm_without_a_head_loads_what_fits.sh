#!/usr/bin/env bash
# timm 1.0.31: create_model(pretrained=True, num_classes=0) takes a weights file in which a parameter
# is missing. Asked for no classifier, timm loads with strict=False, so the missing parameter keeps
# its initial value without an error or a warning. With the classifier (num_classes left alone) the
# same file ends in an error. A guess would be that both raise, or that both warn. Fails if that
# changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cd "$folder"
venv/bin/python - <<'PYTHON'
import warnings

import timm
import torch
from safetensors.torch import save_file

warnings.simplefilter("error", UserWarning)
torch.manual_seed(0)
state = timm.create_model("vit_tiny_patch16_224").state_dict()
state["blocks.0.norm1.weight"] = state["blocks.0.norm1.weight"] + 1  # as if it were trained
full = {name: tensor.clone() for name, tensor in state.items()}
save_file(full, "full.safetensors")
del full["blocks.0.norm1.weight"]
save_file(full, "partly.safetensors")


def features(file, **how):
    overlay = {"file": file}
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **how
    )
    return model.eval().forward_features(torch.ones(1, 3, 224, 224))


print("timm", timm.__version__)
with torch.no_grad():
    right = features("full.safetensors", num_classes=0)
    taken = features("partly.safetensors", num_classes=0)
    error = (taken - right).norm() / right.norm()
    print(f"without a head: taken, features {error:.0%} off")
    assert error > 0.01, "the missing parameter has no influence any more"
    try:
        features("partly.safetensors")
    except RuntimeError as problem:
        print("with a head: refused:", str(problem).splitlines()[1].strip())
    else:
        raise AssertionError("with a head the file is taken too")
PYTHON
