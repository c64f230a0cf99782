#!/usr/bin/env bash
# A target's layers over two GPUs: memory of each as `plan` says and as `bench label` finds it, and the time,
# with random weights of the recipe's shape. Ends with 1 where a GPU's memory is off by more than 10%.
#
# Usage: scripts/scale/two_gpus.sh [CONTEXT_TOKENS] [RECIPE] [DEVICES]
# Environment: PROXYKV_TRAIN (the program), MOST_SECS (900), ONE=1 (also on the first GPU alone, for the speed-up)
#
# 131,072 tokens of a 32B take about five minutes on two H200s. No file is downloaded or written beside a folder
# of /tmp.
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly context=${1:-131072}
readonly recipe=${2:-recipes/qwen3-32b--qwen3-0.6b.toml}
readonly devices=${3:-cuda:0+cuda:1}
readonly most=${MOST_SECS:-900}
program=${PROXYKV_TRAIN:-}
for place in target/release/proxykv-train target/debug/proxykv-train; do
    if [ -z "$program" ] && [ -x "$place" ]; then program=$place; fi
done
if [ -z "$program" ]; then
    echo "error: there is no program; build it, or name it in PROXYKV_TRAIN" >&2
    exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$program" plan --recipe "$recipe" --device "$devices" --set "data.window_tokens=[$context]" --json > "$work/plan.json"
bench() {
    timeout "$most" "$program" bench label --recipe "$recipe" --device "$1" --context "$context" --random-weights \
        --repeats 1 --max-seconds 1 --json
}
bench "$devices" > "$work/split.json"
if [ "${ONE:-0}" = 1 ]; then bench "${devices%%+*}" > "$work/one.json"; fi

python3 - "$work" "$devices" <<'PYTHON'
import json, pathlib, sys

work, devices = pathlib.Path(sys.argv[1]), sys.argv[2].split("+")
read = lambda name: json.loads((work / name).read_text())
plan, rows = read("plan.json"), {row["what"]: row for row in read("split.json")["rows"]}
label = rows["label"]
if "median_s" not in label:
    sys.exit(f"error: {label.get('error', 'not measured')} at {label['context']} tokens")
gb = lambda n: f"{n / 1e9:.1f} GB"
found = label.get("device_peak_bytes", [])
bad = False
for at, (device, planned) in enumerate(zip(devices, plan["split"]["devices"])):
    line = (
        f"{device}: layers {planned['first_layer']} to {planned['end_layer'] - 1}: planned {gb(planned['peak_bytes'])} "
        f"({gb(planned['weight_bytes'])} of weights, {gb(planned['cache_bytes'])} of cache, "
        f"{gb(planned['working_bytes'])} at work)"
    )
    if at < len(found):
        off = found[at] / planned["peak_bytes"] - 1
        bad |= abs(off) > 0.1
        line += f", found {gb(found[at])}, {100 * off:+.1f}%"
    print(line)
if not found:
    print("memory was not measured: these are no GPUs")
examples = next(stage for stage in plan["stages"] if stage["stage"] == "label")
each = examples["secs"] / max(examples["examples"], 1)
print(f"a context of {label['context']} tokens: planned {each:.1f} s, found {label['median_s']:.1f} s "
      f"(prefill {rows['prefill']['median_s']:.1f} s); planned busy {100 * plan['split']['busy']:.0f}%")
if (work / "one.json").exists():
    one = {row["what"]: row for row in read("one.json")["rows"]}
    for what in ("prefill", "label"):
        alone = one[what].get("median_s")
        text = f"{alone / rows[what]['median_s']:.2f} times as fast as on one" if alone else "one has no room for it"
        print(f"{what}: {text}")
sys.exit(1 if bad else 0)
PYTHON
