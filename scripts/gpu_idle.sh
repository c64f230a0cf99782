#!/usr/bin/env bash
# How much of a command's time the GPU did nothing, as nvidia-smi samples it ten times a second.
#
#   scripts/gpu_idle.sh target/release/proxykv-train label --recipe recipes/tiny-llama.toml
#   GPU=1 SKIP=5 SAMPLES=idle.csv scripts/gpu_idle.sh COMMAND...
#
# The driver's figure is the share of the last sampling period (1/6 s to 1 s) in which a kernel ran; a sample
# of 0 is an idle moment, and 100 minus the mean is the idle share. From the first sample above 0 to the last
# one: loading before and writing after are told apart, as `around`. SKIP leaves out the first seconds of that.
# SAMPLES keeps the samples. One line goes to stderr at the end; the exit code is the command's.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,11p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }
command -v nvidia-smi >/dev/null || { echo "gpu_idle: there is no nvidia-smi, and so no GPU to watch" >&2; exit 1; }

samples=${SAMPLES:-$(mktemp)}
# Line by line, so that nothing is in a buffer when it is stopped.
stdbuf -oL nvidia-smi --id="${GPU:-0}" --query-gpu=utilization.gpu --format=csv,noheader,nounits -lms 100 >"$samples" &
watcher=$!
finish() {
  kill "$watcher" 2>/dev/null || true
  [ -n "${SAMPLES:-}" ] || rm -f "$samples"
}
trap finish EXIT

code=0
"$@" || code=$?

kill "$watcher" 2>/dev/null || true
wait "$watcher" 2>/dev/null || true
awk -v skip="${SKIP:-0}" '
  /^ *[0-9]+ *$/ { busy[++n] = $1 + 0; if ($1 + 0 > 0) { if (!first) first = n; last = n } }
  END {
    if (!first) { printf "gpu_idle: the GPU did nothing in %.1f s\n", n / 10; exit }
    from = first + int(skip * 10)
    for (i = from; i <= last; i++) { sum += busy[i]; count++; if (busy[i] == 0) zero++ }
    if (!count) { printf "gpu_idle: the GPU worked for less than %s s\n", skip; exit }
    printf "gpu_idle: %.1f%% idle in %.1f s of work (%.1f%% of %d samples are 0), %.1f s around it\n",
      100 - sum / count, count / 10, 100 * zero / count, count, (n - (last - first + 1)) / 10
  }' "$samples" >&2
exit "$code"
