#!/usr/bin/env bash
# Puts libtorch 2.11.0 into `libtorch/` and checks the tools that a build needs.
#
#   scripts/setup.sh          CPU set (1.4 GB on disk), or the CUDA set when an NVIDIA driver is present
#   scripts/setup.sh --cuda   CUDA set (3.9 GB), driver or not
#   scripts/setup.sh --cpu    CPU set, driver or not
#   scripts/setup.sh --run-only   for a program that is built already: asks for no compiler
#
# Does nothing when what is asked for is there. An interrupted run leaves nothing half-installed;
# run it again, and pip's cache spares what was already downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly TORCH=2.11.0
# The libraries that libtorch_cpu.so itself needs, and NVRTC, by which the tests compile our kernels without a GPU.
readonly CPU_SET=(torch==$TORCH nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85 nvidia-cuda-nvrtc==13.0.88)
# What libtorch_cuda.so and cuDNN need besides, as torch's metadata and cuda-toolkit 13.0.2 pin them.
readonly CUDA_SET=("${CPU_SET[@]}" nvidia-cublas==13.1.0.3 nvidia-cufft==12.0.0.61
  nvidia-cufile==1.15.1.6 nvidia-curand==10.4.0.35 nvidia-cusolver==12.0.4.66 nvidia-cusparse==12.6.3.3
  nvidia-nvjitlink==13.0.88 nvidia-nvtx==13.0.85 nvidia-cudnn-cu13==9.19.0.56 nvidia-cusparselt-cu13==0.8.0
  nvidia-nccl-cu13==2.28.9 nvidia-nvshmem-cu13==3.4.5)

fail() { printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2; exit 1; }

set_name=cpu
if ldconfig -p 2>/dev/null | grep -q 'libcuda\.so\.1' || command -v nvidia-smi >/dev/null 2>&1; then set_name=cuda; fi
builds=yes
for arg in "$@"; do
  case "$arg" in
    --run-only) builds=no ;;
    --cuda) set_name=cuda ;;
    --cpu) set_name=cpu ;;
    *) fail "unknown argument \`$arg\`" "scripts/setup.sh [--cuda | --cpu] [--run-only]" ;;
  esac
done

[ "$(uname -sm)" = "Linux x86_64" ] || fail "this is $(uname -sm); libtorch $TORCH is installed for Linux x86_64 only" \
  "use an x86-64 Linux machine"
# All that is missing is named at once: on a bare machine it is everything.
missing=() repairs=() debs=()
if [ "$builds" = yes ]; then
  command -v cargo >/dev/null || [ -x "$HOME/.cargo/bin/cargo" ] || { missing+=("cargo"); repairs+=("install Rust 1.90 or later: https://rustup.rs"); }
  command -v c++ >/dev/null || { missing+=("a C++ compiler (c++)"); debs+=(g++); }
fi
python=""
for p in python3 python3.13 python3.12 python3.11 python3.10; do
  if command -v "$p" >/dev/null && "$p" -m pip --version >/dev/null 2>&1; then python=$p; break; fi
done
[ -n "$python" ] || { missing+=("Python 3 with pip"); debs+=(python3-pip); }
[ ${#debs[@]} = 0 ] || repairs+=("apt-get install ${debs[*]} (Debian, Ubuntu; as root)")
if [ ${#missing[@]} -gt 0 ]; then
  what=$(printf ', %s' "${missing[@]}") how=$(printf '; %s' "${repairs[@]}")
  fail "what this needs is not installed: ${what#, }" "${how#; }"
fi

marker="libtorch/.complete"
have=$(cat "$marker" 2>/dev/null || true)
# The CUDA set holds the CPU set.
if [ "$have" = "$TORCH cuda+nvrtc" ] || [ "$have" = "$TORCH $set_name+nvrtc" ]; then exit 0; fi

if [ "$set_name" = cuda ]; then packages=("${CUDA_SET[@]}"); size="2.4 GB, 3.9 GB on disk"; else packages=("${CPU_SET[@]}"); size="0.6 GB, 1.4 GB on disk"; fi
printf 'setup: downloading libtorch %s (%s set: %s)\n' "$TORCH" "$set_name" "$size" >&2
rm -rf libtorch.partial
# libtorch's C++ libraries do not depend on the Python that installs them; the wheel is chosen for
# CPython 3.11, whatever runs here. pip matches platform tags exactly, so all that NVIDIA uses are listed.
platforms=()
for glibc in 2_{17..31}; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
"$python" -m pip install --quiet --disable-pip-version-check --no-warn-script-location --root-user-action ignore \
  --no-deps --only-binary=:all: "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
  --python-version 3.11 --implementation cp --target libtorch.partial "${packages[@]}" ||
  fail "pip could not install libtorch $TORCH" "check the network and the disk ($(df -h . | awk 'NR==2 {print $4}') free), then run this again"

found=$(sed -n "s/^__version__ = '\(.*\)'/\1/p" libtorch.partial/torch/version.py)
case "$found" in
  "$TORCH"*) ;;
  *) fail "pip installed torch $found, expected $TORCH" "remove \`libtorch.partial\` and run this again" ;;
esac
[ -f libtorch.partial/torch/lib/libtorch_cpu.so ] || fail "the torch wheel has no lib/libtorch_cpu.so" "run this again"
printf '%s %s+nvrtc' "$TORCH" "$set_name" >libtorch.partial/.complete
rm -rf libtorch
mv libtorch.partial libtorch
printf 'setup: libtorch %s is in libtorch/\n' "$found" >&2
