"""An export's files: where they are, and whether they are whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


EXPORT_VERSIONS = (2, 3)


def export_folder(source: str | Path, revision: str | None = None) -> Path:
    """The local folder of an export, downloaded first if `source` is a hub name."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(source).startswith(".") or str(source).count("/") != 1:
        raise FileNotFoundError(f"there is no export at `{source}`: expected a folder or a hub name `owner/name`")
    from huggingface_hub import snapshot_download

    files = ["config.json", "model.safetensors", "parity.safetensors", "budgets.json"]
    return Path(snapshot_download(str(source), revision=revision, allow_patterns=files))


def read_config(folder: Path, verify: bool = True) -> dict:
    """`config.json` of an export; with `verify`, every file is compared with the hash it names."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    version = config.get("schema_version")
    if version not in EXPORT_VERSIONS:
        expected = " or ".join(map(str, EXPORT_VERSIONS))
        raise ValueError(f"`{path}`: expected export version {expected}, found {version}")
    if verify:
        for name, expected in config["files"].items():
            if not (folder / name).is_file():
                raise FileNotFoundError(f"`{folder / name}` is missing from the export")
            with open(folder / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected["sha256"]:
                raise ValueError(f"`{folder / name}` is damaged: expected SHA-256 {expected['sha256']}, found {found}")
    return config
