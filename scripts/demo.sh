#!/usr/bin/env bash
# From a fresh clone to a trained mapper, its table and its report, on the small pair that lives in
# this repository. Further arguments go to `proxykv-train run` (try `--set train.steps=100`).
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
[ -x "$HOME/.cargo/bin/cargo" ] && PATH="$HOME/.cargo/bin:$PATH"

cargo build --release --package pkv-cli
target/release/proxykv-train run --recipe recipes/demo.toml "$@"
cat >&2 <<'TEXT'

A text for it comes with the demo's pair, whose models know six kinds of facts (recipes/nano-llama/README.md):

  target/release/proxykv-train infer --mapper runs/demo --context recipes/nano-llama/sample.txt \
      --question "What is the access code for the silver lantern?"
TEXT
