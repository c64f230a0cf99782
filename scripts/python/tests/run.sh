#!/usr/bin/env bash
# The tests of scripts/python: small runs of the binary, and what Python makes of their exports.
#
# PROXYKV_TRAIN names a binary to use in place of a build of the dev profile.
set -euo pipefail
cd "$(dirname "$0")/../../.."
target=${CARGO_TARGET_DIR:-target}
venv=$(scripts/python/venv.sh)
[ -x "$HOME/.cargo/bin/cargo" ] && PATH="$HOME/.cargo/bin:$PATH"
[ -n "${PROXYKV_TRAIN:-}" ] || cargo build --quiet --package pkv-cli
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
# Another build may replace the binary while this runs.
cp "${PROXYKV_TRAIN:-$target/debug/proxykv-train}" "$runs/proxykv-train"

# One thread on both sides: the order of a sum's terms depends on their number.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1
train() { # COMMAND, then what differs from the demo
  "$runs/proxykv-train" "$1" --recipe recipes/demo-nano.toml --runs "$runs" --device cpu --threads 1 \
    --set data.train=40 --set data.validation=4 --set data.test=4 --set train.batch=8 --set train.validate_every=10 \
    --set 'eval.methods=["mapper"]' --set 'eval.tasks=["facts"]' "${@:2}" >"$runs/log" 2>&1 || { cat "$runs/log" >&2; exit 1; }
}
all() { for stage in prepare label extract train export; do train "$stage" "$@"; done; }

# Every channel but those whose names begin with one of the words, from the last to the first.
channels() {
  "$runs/proxykv-train" schema | "$venv/bin/python" -c 'import json, sys
names = [channel["const"] for channel in json.load(sys.stdin)["$defs"]["Channel"]["oneOf"]]
print(json.dumps([name for name in reversed(names) if not name.startswith(tuple(sys.argv[1:]))]))' "$@"
}
proxy_channels=$(channels hidden_) target_channels=$(channels recon_)

policies='eval.answer_policies=["pair","pair-floor","pair-keydiff","pair-uniform","pair-budget","token"]'
# The demo, shorter; all policies are asked for answers.
demo=(--set train.steps=30 --set eval.contexts=4 --set "$policies")
all "${demo[@]}"
train eval "${demo[@]}" --kept 4
# All channels, short chunks of every kind, KVzip+ labels; the `conv` variant with attention over time.
other=(--set name=other --set train.steps=2 --set eval.contexts=2 --set mapper.variant=conv --set 'mapper.attention_blocks=[1]'
  --set mapper.attention_window=64 --set label.preset=plus --set label.chunk_tokens=150 --set extract.prefill_chunk_tokens=200
  --set "extract.channels=$proxy_channels")
all "${other[@]}"
train eval "${other[@]}" --kept 2
# Features of the target alone, with the channel that is fitted to its hidden states.
own=(--set name=own --set train.steps=30 --set eval.contexts=2 --set 'extract.from=["target"]'
  --set 'extract.target_channels=["max_all","mean_all","max_window","mean_window","max_last","mean_last","key_norm","value_norm","hidden_linear"]'
  --set "$policies")
all "${own[@]}"
train eval "${own[@]}" --kept 2
# Of both models, in another order than their channels have, which overlap.
both=(--set name=both --set train.steps=30 --set eval.contexts=2 --set 'extract.from=["target","proxy"]' --set extract.prefill_chunk_tokens=200
  --set 'extract.target_channels=["key_norm","hidden_linear","mean_last","max_window"]' --set 'extract.globals=["position","surprisal"]'
  --set 'extract.channels=["recon_log","max_window","max_all","key_norm"]' --set "$policies")
all "${both[@]}"
train eval "${both[@]}" --kept 2
# All channels of the target, scoring chunks that prefill chunks cut; then all of both models, in one scoring chunk.
own_all=(--set name=own-all --set train.steps=10 --set eval.contexts=2 --set 'extract.from=["target"]' --set "extract.target_channels=$target_channels"
  --set label.chunk_tokens=150 --set extract.prefill_chunk_tokens=200 --set "$policies")
all "${own_all[@]}"
train eval "${own_all[@]}" --kept 2
both_all=(--set name=both-all --set train.steps=10 --set eval.contexts=2 --set 'extract.from=["proxy","target"]' --set "extract.target_channels=$target_channels"
  --set label.preset=original --set "$policies"
  --set "extract.channels=$proxy_channels")
all "${both_all[@]}"
train eval "${both_all[@]}" --kept 2
# The other variants need no stage before training of their own.
for variant in mlp linear; do
  mkdir "$runs/$variant"
  cp -r "$runs/demo-nano/"{examples,labels,features,run.json} "$runs/$variant/"
  for stage in train export; do train "$stage" --set name=$variant --set train.steps=2 --set mapper.variant=$variant; done
done

# Answers of `infer` from a text, one policy at a time.
printf '%s The access code for the silver lantern is 48213.%s' "$(head -c 700 docs/guide.md)" "$(head -c 1400 docs/guide.md | tail -c 700)" >"$runs/context.txt"
printf '"What is the access code for the silver lantern?"\n"What does the run write?"\n"What is the access code for the silver lantern?"\n' >"$runs/questions.jsonl"
for run in demo-nano own both-all; do
  for policy in pair pair-floor pair-keydiff pair-uniform pair-budget token; do
    "$runs/proxykv-train" infer --mapper "$runs/$run" --context "$runs/context.txt" --questions "$runs/questions.jsonl" --retain 0.1 \
      --policy $policy --max-new-tokens 24 --device cpu --threads 1 --json >"$runs/$run/infer-$policy.jsonl" 2>"$runs/log" || { cat "$runs/log" >&2; exit 1; }
  done
done

PKV_RUNS="$runs" "$venv/bin/python" -W ignore -m unittest discover --start-directory scripts/python/tests --verbose
