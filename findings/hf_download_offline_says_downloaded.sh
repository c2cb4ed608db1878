#!/usr/bin/env bash
# huggingface_hub 2.4.0: where the hub cannot be reached, `hf download --include ... --local-dir FOLDER`
# writes a warning, then "Downloaded", and exits with 0, if anything at all is in FOLDER: here a note,
# and none of the files asked for. A guess would be that it fails, as it does for an empty FOLDER, so
# that `hf download ... && python ...` is safe. The hub's address is one where nothing listens. Fails
# if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q huggingface_hub==2.4.0
cd "$folder"
mkdir empty other
echo "to do" > other/note.txt
export HF_HOME=$folder/home HF_ENDPOINT=http://127.0.0.1:9
venv/bin/python -c "import huggingface_hub; print('huggingface_hub', huggingface_hub.__version__)"
for into in empty other; do
    code=0
    venv/bin/hf download some/dataset --repo-type dataset --include "train-*.tar" \
        --local-dir $into > said.$into 2>&1 || code=$?
    echo "into the folder $into: exit code $code, $(grep -oE 'Error: [A-Za-z ]+|Downloaded' said.$into)"
    echo $code > code.$into
done
test "$(cat code.empty)" -ne 0 || { echo "an empty folder passes too"; exit 1; }
test "$(cat code.other)" -eq 0 && grep -q Downloaded said.other && ! ls other/*.tar 2> said.ls \
    || { echo "it no longer says so"; exit 1; }
