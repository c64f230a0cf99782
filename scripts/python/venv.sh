#!/usr/bin/env bash
# Makes the virtual environment that the tests of scripts/python run in, and prints its folder.
#
#   scripts/python/venv.sh [FOLDER]     default: target/python/venv
#
# torch is not downloaded a second time: libtorch/ holds the whole wheel, made for CPython 3.11. Its
# CPU set lacks ten CUDA libraries that Python's torch links against, though nothing calls them on a
# CPU. Empty libraries of the same names stand in for them, loaded before torch with lazy binding:
# 0 bytes instead of 2 GB. With another Python, pip installs torch with all that it names.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${1:-${CARGO_TARGET_DIR:-target}/python/venv}
requirements=scripts/python/requirements.txt
TORCH=$(sed -n 's/^readonly TORCH=//p' scripts/setup.sh)
readonly TORCH

python=""
for p in python3.11 python3 python3.13 python3.12 python3.10; do
  if command -v "$p" >/dev/null && "$p" -c 'import venv, ensurepip' 2>/dev/null; then python=$p; break; fi
done
[ -n "$python" ] || { printf 'error: there is no Python 3 with venv\n\nhint: apt-get install python3-venv\n' >&2; exit 1; }

libtorch=""
if "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' && ls libtorch/torch/_C.cpython-311-*.so >/dev/null 2>&1; then
  libtorch=$(realpath libtorch)
fi
stamp="$(sha256sum "$requirements" scripts/python/venv.sh | sha256sum) $("$python" --version) $libtorch $(cat libtorch/.complete 2>/dev/null || true)"
if [ "$(cat "$venv/.complete" 2>/dev/null || true)" = "$stamp" ]; then echo "$venv"; exit 0; fi

printf 'python: making a virtual environment in %s\n' "$venv" >&2
rm -rf "$venv"
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@" >&2; }
if [ -n "$libtorch" ]; then
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  stubs=$(realpath "$venv")/stubs
  mkdir "$stubs"
  for name in $(ldd "$libtorch"/torch/lib/libtorch_{cuda,python,global_deps}.so | awk '/not found/ {print $1}' | sort -u); do
    c++ -shared -x c++ /dev/null -o "$stubs/$name" -Wl,-soname,"$name"
  done
  cat >"$site/libtorch_on_cpu.py" <<PYTHON
"""Lets \`import torch\` work from a folder without the CUDA libraries; see scripts/python/venv.sh."""
import ctypes
import os
import sys

# A symbol that is never called need not be there.
sys.setdlopenflags(os.RTLD_LAZY)
for name in sorted(os.listdir("$stubs")):
    ctypes.CDLL(os.path.join("$stubs", name))
PYTHON
  printf '%s\nimport libtorch_on_cpu\n' "$libtorch" >"$site/libtorch.pth"
else
  pip install "torch==$TORCH"
fi
pip install --no-deps -r "$requirements"
"$venv/bin/python" -c "import torch, transformers; assert torch.__version__.split('+')[0] == '$TORCH', torch.__version__"
printf '%s' "$stamp" >"$venv/.complete"
echo "$venv"
