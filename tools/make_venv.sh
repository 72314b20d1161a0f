#!/usr/bin/env bash
# Makes a virtual environment with this project: make_venv.sh DIR EXTRAS (for example: make_venv.sh .venv test,demo).
# torch comes first, so that nothing else chooses its build: a CPU build where there is no NVIDIA GPU.
set -euo pipefail
venv=$1 extras=$2
torch=${TORCH:-torch==2.13.0}
cd "$(dirname "$0")/.."

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    # What pip would install: with CUDA libraries or without?
    if ! nvidia-smi >/dev/null 2>&1 && pip install -q --dry-run --report - "$torch" 2>/dev/null | grep -qE '"name": *"(nvidia|cuda)-'; then
        echo "no NVIDIA GPU: installing the CPU build of $torch"
        pip install -q uv
        "$venv/bin/uv" pip install -q --python "$venv/bin/python" --torch-backend cpu "$torch"
    else
        pip install -q "$torch"
    fi
fi
isolation=()
if [[ ",$extras," == *,gpu,* ]]; then # Transformer Engine's half for PyTorch is compiled against the torch that is here, not against another one
    pip install -q "setuptools>=77" wheel packaging pybind11 ninja
    isolation=(--no-build-isolation)
fi
pip install -q "${isolation[@]}" -e ".[$extras]"
echo "ready: $venv/bin/megatron-opd"
