#!/usr/bin/env bash
# Makes checkpoint-1/ and export-2/ here, as the last program wrote them whose mapper owned the numbers that its loss learns.
#
#   make.sh BINARY      proxykv-train of commit 0679e28, which has these versions
set -euo pipefail
binary=$(realpath "$1")
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../../../.."
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
for stage in prepare label extract train export; do
  "$binary" "$stage" --recipe recipes/demo-nano.toml --runs "$runs" --device cpu --threads 1 --set name=old \
    --set data.train=8 --set data.validation=2 --set data.test=2 --set 'data.window_tokens=[64]' --set data.min_tokens=32 \
    --set 'extract.channels=["max_all","key_norm"]' --set 'extract.globals=["position"]' \
    --set mapper.head_width=4 --set mapper.width=8 --set mapper.feed_forward=1 --set 'mapper.dilations=[1]' \
    --set mapper.attention_heads=2 --set mapper.cross_width=4 --set mapper.cross_heads=2 \
    --set loss.global=0.1 --set 'loss.binary_ratios=[0.2,0.05]' \
    --set train.steps=4 --set train.batch=4 --set train.warmup_steps=1 --set train.validate_every=4 --set train.checkpoint_every=4
done
rm -rf "$here"/{checkpoint-1,export-2}
cp -r "$runs/old/checkpoints/step-000004" "$here/checkpoint-1"
cp -r "$runs/old/export" "$here/export-2"
