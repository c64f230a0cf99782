#!/usr/bin/env bash
# Every fault on a small run: killed processes, failing storage, two processes at once, damaged files. A line at the end of each.
#
#   scripts/faults/run.sh [BINARY] [COUNT]
#
# COUNT is how often each case is tried, 4 if absent: about an hour on two CPU cores. docs/robustness.md has what it gave.
set -uo pipefail
here=$(dirname "$0") failed=0
for script in kill storage two flips memory; do
  python3 "$here/$script.py" "${1:-$here/../../target/release/proxykv-train}" "${2:-4}" || failed=1
done
exit $failed
