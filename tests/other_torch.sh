#!/usr/bin/env bash
# One wheel, built against the newest torch, must load and pass the op tests under another torch too.
#
#   tests/other_torch.sh [REQUIREMENT]      default: torch==2.13.0
#
# Takes the newest wheel in dist/ (make build), installs it into a throw-away environment and tests what was installed.
set -euo pipefail
cd "$(dirname "$0")/.."

requirement=${1:-torch==2.13.0}
wheel=$(ls -t dist/ceat_fast-*.whl | head -n 1)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet "$requirement" "$wheel" pytest hypothesis numpy
# Test modules share helpers, so all go along; two of them are run.
cp tests/*.py "$work"
cd "$work"
venv/bin/python -c '
import torch, ceat_fast
info = ceat_fast.build_info()
print("torch", torch.__version__, "| wheel built against torch", info["build"]["torch_headers"])
assert info["backends"]["cpu"]["native"] == "available", info
'
venv/bin/python -m pytest -q -p no:cacheprovider test_loss.py test_native.py
