#!/usr/bin/env bash
# Pillow 13.0.0: ImageOps.fit is not "crop, then resize". It calls resize(box=...), and the filter
# reads pixels outside of the box, up to its support. A guess would be that what is cropped away
# has no influence. Here a flat grey square lies in a black picture: cropped first, all pixels are
# 200; by fit, the border is 185 and the pixel beside it 203. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pillow==13.0.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import PIL
from PIL import Image, ImageOps

wide = np.zeros((64, 192), np.uint8)
wide[:, 64:128] = 200  # the central square, which fit keeps
image = Image.fromarray(wide)
fitted = np.asarray(ImageOps.fit(image, (16, 16), Image.BICUBIC))
cropped = np.asarray(image.crop((64, 0, 128, 64)).resize((16, 16), Image.BICUBIC))
print("Pillow", PIL.__version__)
print("cropped first:", cropped[8].tolist())
print("ImageOps.fit: ", fitted[8].tolist())
assert (cropped == 200).all(), "crop, then resize, is no longer flat"
assert fitted[8, 0] < 200 and fitted[8, 15] < 200, "fit no longer reads beyond the crop"
PYTHON
