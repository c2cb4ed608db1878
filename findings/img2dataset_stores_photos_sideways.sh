#!/usr/bin/env bash
# img2dataset 1.47.0 (Python 3.10 to 3.12; it imports imghdr, which 3.13 has no more): with its default,
# re-encoding, a photo whose EXIF says "rotate" (orientation 6, as phones store portraits) comes out
# sideways for good: pixels as they were stored, and the orientation left out of the new file. A guess
# would be that it is turned upright, or that the tag stays. The .json beside still says "Rotated 90
# CW". --disable_all_reencoding True keeps the file, and with it the tag. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
server=
trap 'kill $server; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q img2dataset==1.47.0 albumentations==1.4.24 pillow==13.0.0
cd "$folder"
mkdir www
venv/bin/python - <<'PYTHON'
from PIL import Image

stored = Image.new("RGB", (320, 240), "blue")  # left half red, so upright the top is red
stored.paste("red", (0, 0, 160, 240))
exif = Image.Exif()
exif[0x0112] = 6
stored.save("www/photo.jpg", exif=exif)
PYTHON
venv/bin/python -u -m http.server 0 --bind 127.0.0.1 --directory www > address 2> /dev/null &
server=$!
until port=$(grep -o 'port [0-9]*' address); do sleep 0.1; done
echo "{\"url\": \"http://127.0.0.1:${port#port }/photo.jpg\"}" > urls.jsonl
export NO_ALBUMENTATIONS_UPDATE=1
for keep in False True; do
    venv/bin/img2dataset --url_list urls.jsonl --input_format jsonl --output_folder "out$keep" \
        --resize_mode keep_ratio --image_size 240 --disable_all_reencoding $keep \
        --processes_count 1 --thread_count 1 > log 2>&1 || { cat log; exit 1; }
done
venv/bin/python - <<'PYTHON'
import importlib.metadata
import json
from pathlib import Path

from PIL import Image, ImageOps

print("img2dataset", importlib.metadata.version("img2dataset"))


def seen(folder):
    """(size as a viewer shows it, EXIF orientation or None) of the one photo."""
    (path,) = Path(folder).rglob("*.jpg")
    image = Image.open(path)
    return ImageOps.exif_transpose(image).size, image.getexif().get(0x0112)


(note,) = Path("outFalse").rglob("0*0.json")
said = json.loads(note.read_text())["exif"]
print("the photo is shown as 240 x 320; orientation 6")
print("re-encoded:", *seen("outFalse"), "but the .json says", said)
print("as it was: ", *seen("outTrue"))
assert seen("outFalse") == ((320, 240), None), "it is no longer stored sideways"
assert "Rotated 90 CW" in said and seen("outTrue") == ((240, 320), 6), "something else has changed"
PYTHON
