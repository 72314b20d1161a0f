#!/usr/bin/env bash
# Make a virtual environment in which the real SGLang server runs on a CPU (for the tests with marker `sglang`).
#   usage: tests/sglang_cpu/install.sh VENV_DIR        e.g. .venv-sglang, where the tests look for it
# Takes about two minutes and 3 GB. An environment that this version of the script completed is left as it is.
# PYTHON names the interpreter to build it with (default python3.11).
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 VENV_DIR" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$1
stamp=$venv/.sglang-cpu-complete
recipe=$(cat "$here/install.sh" "$here/requirements.txt" "$here/sglang_cpu_shim.py" | sha256sum | cut -d' ' -f1)

if [ "$(cat "$stamp" 2>/dev/null)" = "$recipe" ]; then
    echo "$venv: complete"
    exit 0
fi
rm -f "$stamp"

[ -x "$venv/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$venv"
python=$venv/bin/python
pip=("$python" -m pip --disable-pip-version-check install --quiet)

# torch first and by itself: whatever comes later must not choose another one.
"${pip[@]}" torch==2.13.0 setuptools
"${pip[@]}" -r "$here/requirements.txt"
# Without dependencies: most of theirs are CUDA libraries that a CPU never loads. Last, or pip complains of what they lack.
"${pip[@]}" --no-deps sglang==0.5.23 torchvision==0.28.0 xgrammar==0.2.7 compressed-tensors==0.18.0

site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp "$here/sglang_cpu_shim.py" "$site/"
echo "import sglang_cpu_shim" >"$site/sglang_cpu_shim.pth"

echo "checking that the server can be imported"
SGLANG_USE_CPU_ENGINE=1 HF_HUB_OFFLINE=1 "$python" -W ignore -c 'import sglang.srt.entrypoints.http_server'
echo "$recipe" >"$stamp"
echo "$venv: complete; tests find it as .venv-sglang in the repository or by OPD_SGLANG_PYTHON=$(cd "$venv" && pwd)/bin/python"
