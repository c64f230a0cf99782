#!/usr/bin/env bash
# Screenshots and an accessibility check of report pages: scripts/browser/check.sh OUT PAGE...
# Needs node, npm and a Chromium ($CHROMIUM, or one that is in PATH); without them nothing is checked, aloud.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 OUT PAGE..." >&2; exit 2; }
here="$(cd "$(dirname "$0")" && pwd)"
browser="${CHROMIUM:-}"
for name in chromium chromium-browser google-chrome; do
    [ -n "$browser" ] || browser="$(command -v "$name" || true)"
done
for need in node npm; do
    command -v "$need" >/dev/null || { echo "SKIPPED: $need is not installed, no page was checked" >&2; exit 0; }
done
[ -n "$browser" ] || { echo "SKIPPED: no Chromium was found, no page was checked (apt-get install chromium)" >&2; exit 0; }
# Packages go where builds go; node looks for them beside the script.
work="$here/../../target/browser"
mkdir -p "$work"
cp "$here/package.json" "$here/check.mjs" "$work"
npm install --prefix "$work" --no-audit --no-fund --no-package-lock --loglevel=error
exec node "$work/check.mjs" "$browser" "$@"
