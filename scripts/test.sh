#!/usr/bin/env bash
# Everything that must be green: formatting, lints, documentation and all tests, after the set-up they need.
#
#   scripts/test.sh            the Rust side
#   scripts/test.sh --python   scripts/python, in a virtual environment of its own
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
case "${1:-}" in
  "") ;;
  --python) exec scripts/python/tests/run.sh ;;
  *) printf 'error: unknown argument `%s`\n\nhint: scripts/test.sh [--python]\n' "$1" >&2; exit 1 ;;
esac
[ -x "$HOME/.cargo/bin/cargo" ] && PATH="$HOME/.cargo/bin:$PATH"

cargo fmt --all --check
cargo clippy --quiet --workspace --all-targets -- -D warnings
cargo clippy --quiet --workspace --test end_to_end --test fuzz -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --no-deps
# Licences, origins and known faults of dependencies: deny.toml.
if cargo deny --version >/dev/null 2>&1; then
  cargo deny --log-level error check licenses sources bans
  # The list of known faults comes from the network.
  if cargo deny --log-level error fetch db >/dev/null 2>&1; then
    cargo deny --log-level error check advisories
  else
    echo 'SKIPPED: the list of advisories cannot be fetched' >&2
  fi
else
  echo 'SKIPPED: cargo-deny is not installed (cargo install cargo-deny --locked); licences and origins are not checked' >&2
fi
cargo test --workspace
# Some wait for clusters and servers: one more at a time than there are cores.
RUST_TEST_THREADS=$(($(nproc) + 1)) cargo test --workspace --test end_to_end --test fuzz
# libtorch and its oneDNN compute by what the CPU can do. Users' CPUs are not this one, so what compares numbers must hold on
# older ones, too.
older=("default SSE41")
grep -qw avx2 /proc/cpuinfo && older+=("avx2 AVX2")
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
runs=()
for cpu in "${older[@]}"; do
  read -r aten onednn <<<"$cpu"
  # Beside each other, a thread each. Kernels compile alike on every CPU.
  ATEN_CPU_CAPABILITY=$aten ONEDNN_MAX_CPU_ISA=$onednn OMP_NUM_THREADS=1 \
    cargo test --workspace --lib --test main --test lm --test score --test extract -- --skip kernels::source >"$logs/$aten" 2>&1 &
  runs+=("$aten $!")
done
failed=0
for run in "${runs[@]}"; do
  read -r aten process <<<"$run"
  wait "$process" || failed=1
  printf 'once more with ATEN_CPU_CAPABILITY=%s: the tests that compare numbers\n' "$aten"
  cat "$logs/$aten"
done
[ "$failed" = 0 ]
# Models ran on the CPU so far; where there is a GPU they must work on it, too, and one test at a time has its memory.
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
  PKV_TEST_DEVICE=cuda RUST_TEST_THREADS=1 cargo test --package pkv-gpu --package pkv-lm --package pkv-mapper --package pkv-score \
    --package pkv-extract --package pkv-train --package pkv-infer
fi
