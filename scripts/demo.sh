#!/usr/bin/env bash
# From a fresh clone to a trained mapper, its table and its report, on the small pair that lives in
# this repository. Further arguments go to `proxykv-train run` (try `--set train.steps=100`).
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
[ -x "$HOME/.cargo/bin/cargo" ] && PATH="$HOME/.cargo/bin:$PATH"

cargo build --release --package pkv-cli
exec target/release/proxykv-train run --recipe recipes/demo.toml "$@"
