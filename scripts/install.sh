#!/usr/bin/env bash
# Installs an archive of scripts/release.sh: compares its hash, unpacks it, links the program into ~/.local/bin, and says what it still
# needs. Nothing is downloaded.
#
#   scripts/install.sh ARCHIVE.tar.gz [FOLDER]    FOLDER: where to unpack it [default: ~/.local/share/proxykv-train]
#
# ARCHIVE.tar.gz.sha256 must be beside it. An earlier version in FOLDER stays where it is; the link leads to the new one.
set -euo pipefail
fail() { printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2; exit 1; }

archive=${1:-}
[ $# -ge 1 ] && [ $# -le 2 ] || fail "an archive is wanted" "scripts/install.sh ARCHIVE.tar.gz [FOLDER]"
folder=${2:-$HOME/.local/share/proxykv-train}
[ -f "$archive" ] || fail "there is no file $archive" "scripts/release.sh makes it, in target/release-archive"
[ -f "$archive.sha256" ] || fail "there is no $archive.sha256 to compare the archive with" "put it beside the archive"
expected=$(cut -d ' ' -f 1 "$archive.sha256")
found=$(sha256sum "$archive" | cut -d ' ' -f 1)
[ "$found" = "$expected" ] || fail "$archive has the SHA-256 $found, and should have $expected" "copy the archive again"

name=$(basename "$archive" .tar.gz)
# Unpacked beside its place, so that an interrupted run leaves nothing half-installed.
mkdir -p "$folder" "$HOME/.local/bin"
folder=$(cd "$folder" && pwd)
unpacked=$(mktemp -d "$folder/.unpack.XXXXXX")
trap 'rm -rf "$unpacked"' EXIT
tar -xzf "$archive" -C "$unpacked"
[ -x "$unpacked/$name/proxykv-train" ] || fail "$archive holds no $name/proxykv-train" "take an archive of scripts/release.sh"
# The same version again: its libtorch stays.
if [ -e "$folder/$name/libtorch" ]; then mv "$folder/$name/libtorch" "$unpacked/$name/"; fi
rm -rf "${folder:?}/$name"
mv "$unpacked/$name" "$folder/$name"
ln -sfn "$folder/$name/proxykv-train" "$HOME/.local/bin/proxykv-train"

printf 'installed %s\nlinked    %s\n' "$folder/$name" "$HOME/.local/bin/proxykv-train"
if [ -e "$folder/$name/libtorch" ]; then
  printf 'libtorch  %s\n' "$folder/$name/libtorch"
else
  printf 'libtorch  is wanted in %s:\n' "$folder/$name/libtorch"
  printf '          %s --run-only    # 1.4 GB; 3.9 GB with CUDA\n' "$folder/$name/scripts/setup.sh"
fi
case ":$PATH:" in
  *":$HOME/.local/bin:"*) ;;
  *) printf 'PATH      lacks %s\n' "$HOME/.local/bin" ;;
esac
