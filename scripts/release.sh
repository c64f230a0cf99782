#!/usr/bin/env bash
# Makes target/release-archive/proxykv-train-VERSION-x86_64-linux.tar.gz: the stripped program, its manual pages and completions,
# recipes, manifests and documents, and a script that puts libtorch beside it. It can be unpacked anywhere.
#
#   scripts/release.sh [--skip-build]    --skip-build: archive the program that the last run of this script built
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  "") build=yes ;;
  --skip-build) build=no ;;
  *) printf 'error: unknown argument `%s`\n\nhint: scripts/release.sh [--skip-build]\n' "$1" >&2; exit 1 ;;
esac
[ -x "$HOME/.cargo/bin/cargo" ] && PATH="$HOME/.cargo/bin:$PATH"

out=target/release-archive
if [ "$build" = yes ]; then
  scripts/setup.sh
  # The loader replaces $ORIGIN by the program's own folder.
  PKV_RPATH='$ORIGIN/libtorch/torch/lib' cargo build --release --package pkv-cli --target-dir "$out/build"
fi
program=$out/build/release/proxykv-train
[ -x "$program" ] || { printf 'error: there is no %s\n\nhint: run scripts/release.sh without --skip-build\n' "$program" >&2; exit 1; }

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
name=proxykv-train-$version-x86_64-linux
folder=$out/$name
rm -rf "$folder"
mkdir -p "$folder/scripts" "$folder/completions"
cp "$program" "$folder/"
strip "$folder/proxykv-train"
# What is in the repository, and nothing else that lies in these folders.
git ls-files -z -- recipes data-manifests docs README.md LICENSE scripts/setup.sh scripts/python | xargs -0 cp --parents -t "$folder"
cat >"$folder/INSTALL" <<'TEXT'
proxykv-train needs libtorch 2.11.0 in the folder `libtorch` beside it: `scripts/setup.sh` downloads it there with pip
(1.4 GB; 3.9 GB with CUDA, which it takes where there is an NVIDIA driver). A `libtorch` of another copy may be linked there.

    scripts/setup.sh --run-only
    ./proxykv-train doctor
    ./proxykv-train run --recipe recipes/demo.toml

Manual pages are in man/, completions in completions/.
TEXT
# The program itself writes these; it needs libtorch for that.
LD_LIBRARY_PATH="$PWD/libtorch/torch/lib" "$folder/proxykv-train" man "$folder/man" >/dev/null
for shell in bash zsh fish; do
  LD_LIBRARY_PATH="$PWD/libtorch/torch/lib" "$folder/proxykv-train" completions "$shell" >"$folder/completions/proxykv-train.$shell"
done
# The same files give the same archive.
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$(git log -1 --format=%ct)" -C "$out" -czf "$out/$name.tar.gz" "$name"
# It installs the archive that is beside it, after a look at the hash.
cp scripts/install.sh "$out/"
(cd "$out" && sha256sum "$name.tar.gz" | tee "$name.tar.gz.sha256")
