#!/usr/bin/env bash
# The tiny pair's recipe and every ablation of it, and the table that compares them.
#
#   scripts/ablations.sh [--jobs N] [--runs FOLDER] [--only NAME,...] [options of `proxykv-train run`]
#   scripts/ablations.sh --jobs 3 --device cuda --set train.steps=500 --set eval.contexts=200 --set 'eval.methods=["mapper","kvzip"]'
#
# What an ablation does not change it shares with the recipe that it is based on: examples, labels and features are links where the
# sections that they depend on are the same. A run that is complete is not run again, so that a stopped sweep goes on where it was. Jobs
# share one GPU in turns: each gets its part of the CPU's threads, and more than three gain nothing. FOLDER/comparison.html is the
# page; logs are in FOLDER/logs. PROXYKV names another binary than target/release/proxykv-train.
set -euo pipefail
cd "$(dirname "$0")/.."
usage() { sed -n '2,11p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }

jobs=1 runs=runs/ablations only='' options=()
while [ $# -gt 0 ]; do
  case "$1" in
    --jobs) jobs=${2:?} && shift 2 ;;
    --runs) runs=${2:?} && shift 2 ;;
    --only) only=,${2:?}, && shift 2 ;;
    -h|--help) usage ;;
    *) options+=("$1") && shift ;;
  esac
done
binary=${PROXYKV:-target/release/proxykv-train}
[ -x "$binary" ] || { printf 'error: `%s` is no program\n\nhint: cargo build --release --package pkv-cli\n' "$binary" >&2; exit 1; }
base_recipe=recipes/tiny-llama.toml base=tiny-llama
mkdir -p "$runs/logs"
runs=$(cd "$runs" && pwd)

# Overrides alone: what `plan` understands of the options.
overrides=()
for ((i = 0; i < ${#options[@]}; i++)); do
  [ "${options[i]}" = --set ] && overrides+=(--set "${options[i + 1]}")
done

# A recipe with all its defaults and overrides.
resolved() { "$binary" plan --recipe "$1" "${overrides[@]}" --resolved 2>/dev/null; }

# Of a resolved recipe, the seed and the sections whose names are given.
sections() {
  awk -v names="$2" '!name && /^seed/ { print } /^\[/ { name = $0; gsub(/[][]/, "", name); sub(/\..*/, "", name); on = index(" " names " ", " " name " ") } on { print }' <<<"$1"
}

# A folder of the recipe's that it is based on, if it would be filled with the same.
share() {
  local name=$1 its=$2 of=$3 theirs=$4 folder=$5 names=$6
  [ "$(sections "$its" "$names")" = "$(sections "$theirs" "$names")" ] || return 0
  [ -e "$runs/$name/$folder" ] || ln -s "../$of/$folder" "$runs/$name/$folder"
}

# The recipe that a recipe names as its base, and a recipe's name.
base_of() { echo "$(dirname "$1")/$(sed -n 's/^base = "\(.*\)"/\1/p' "$1")"; }
name_of() { sed -n 's/^name = "\(.*\)"/\1/p' "$1"; }

threads=$(($(nproc) / jobs)) && [ "$threads" -gt 0 ] || threads=1
run() {
  local recipe=$1 name=$2 begun=$SECONDS code=0
  "$binary" run --recipe "$recipe" --runs "$runs" --threads "$threads" "${options[@]}" >"$runs/logs/$name.txt" 2>&1 || code=$?
  printf '%-36s %s after %d s\n' "$name" "$([ $code = 0 ] && echo done || echo "FAILED ($code), see $runs/logs/$name.txt")" $((SECONDS - begun)) >&2
  return $code
}

run "$base_recipe" "$base" || { tail -n 20 "$runs/logs/$base.txt" >&2; exit 1; }
names=() failed=0
wait_for() { while [ "$(jobs -rp | wc -l)" -gt "$1" ]; do wait -n || failed=1; done; }
# Those based on the tiny pair's recipe first; then those based on one of these, which they share with.
for turn in first second; do
  for recipe in recipes/ablations/*.toml; do
    short=$(basename "$recipe" .toml) of=$(base_of "$recipe")
    [ -z "$only" ] || [[ $only = *,$short,* ]] || continue
    if [ "$(realpath "$of")" = "$(realpath "$base_recipe")" ]; then mine=first; else mine=second; fi
    [ $turn = $mine ] || continue
    name=$(name_of "$recipe") its=$(resolved "$recipe") theirs=$(resolved "$of") of=$(name_of "$of")
    mkdir -p "$runs/$name"
    if [ -d "$runs/$of" ]; then
      share "$name" "$its" "$of" "$theirs" examples "data target"
      share "$name" "$its" "$of" "$theirs" labels "data target label"
      # The proxy's own KVzip scores ask as the labels do.
      share "$name" "$its" "$of" "$theirs" features "data target label proxy extract"
    fi
    wait_for $((jobs - 1))
    run "$recipe" "$name" &
    names+=("$name")
  done
  wait_for 0
done

[ ${#names[@]} -gt 0 ] || { printf 'error: no recipe of recipes/ablations is named in `--only %s`\n\nhint: name them as their files, without `.toml`\n' "${only:1:-1}" >&2; exit 1; }
complete=()
mapfile -t names < <(printf "%s\n" "${names[@]}" | sort)
for name in "${names[@]}"; do
  if [ -e "$runs/$name/eval/results.json" ]; then complete+=("$name"); else failed=1; fi
done
[ ${#complete[@]} -gt 0 ] || exit 1
"$binary" compare --runs "$runs" "$base" "${complete[@]}" --out "$runs/comparison.html"
exit $failed
