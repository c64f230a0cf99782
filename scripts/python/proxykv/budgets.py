"""How many KV pairs stay, in all and of each head (crates/prune). Needs no torch."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

from .export import export_folder

NO_BUDGETS = (
    "policy `pair-budget` needs head budgets, and the export has none; write it again with `proxykv-train export`, "
    "or use `pair-uniform`"
)


def kept_count(n: int, retention: float) -> int:
    """How many of `n` KV pairs a retention ratio keeps: rounded half up, at least one."""
    if not 0.0 < retention <= 1.0:
        raise ValueError(f"a retention ratio is the kept share of KV pairs, 0 < ratio <= 1, found {retention}")
    exact = n * retention
    count = math.floor(exact)
    return min(n, max(min(n, 1), count + (exact - count >= 0.5)))


class HeadBudgets(NamedTuple):
    """How many positions each KV head keeps under the policy `pair-budget`: an export's `budgets.json`.

    Shares of a head's positions, at retention ratios, both in parts per million; between two ratios interpolated.
    """

    ratios: list[int]
    # By ratio and head, layers x KV heads.
    shares: list[list[int]]

    @classmethod
    def read(cls, source: str | Path, revision: str | None = None) -> HeadBudgets | None:
        """Those of an export (folder or hub name); None where it is older than budgets are."""
        folder = export_folder(source, revision)
        path = folder / "budgets.json"
        if not path.is_file():
            return None
        file = json.loads(path.read_text(encoding="utf-8"))
        if file.get("schema_version") != 1:
            raise ValueError(f"`{path}`: expected version 1, found {file.get('schema_version')}")
        shares = [[share for layer in row for share in layer] for row in file["shares"]]
        sizes = [file["contexts"], file["layers"], file["kv_heads"]]
        lines = [file["model_sha256"], *(" ".join(map(str, row)) for row in [sizes, file["ratios"], *shares])]
        found = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
        if found != file["sha256"]:
            raise ValueError(f"`{path}` is damaged: expected SHA-256 {file['sha256']}, found {found}")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if file["model_sha256"] != config["files"]["model.safetensors"]["sha256"]:
            raise ValueError(f"`{path}` belongs to the weights of another export")
        return cls(file["ratios"], shares)

    def counts(self, kept: int, positions: int) -> list[int]:
        """Positions that each head keeps of `positions`, `kept` pairs in all; it depends on nothing else."""
        heads = len(self.shares[0])
        at = kept / float(heads * positions) * 1e6 if positions else 0.0
        high = next((i for i, ratio in enumerate(self.ratios) if ratio >= at), len(self.ratios) - 1)
        start, low = (self.ratios[high - 1], self.shares[high - 1]) if high else (0, [0] * heads)
        way = (at - start) / (float(self.ratios[high]) - start)
        return _apportion([a + (float(b) - a) * way for a, b in zip(map(float, low), self.shares[high])], kept, positions)


def _apportion(weights: list[float], total: int, cap: int) -> list[int]:
    """`total` in proportion to `weights`, at most `cap` to each; rounded by largest remainder, then the lower index.

    The same operations in the same order as in Rust: all readers count alike.
    """
    quota, full, left = [0.0] * len(weights), [False] * len(weights), total
    while True:
        still = [o for o in range(len(weights)) if not full[o]]
        weight = 0.0
        for o in still:  # `sum` compensates for rounding
            weight += weights[o]
        for o in still:
            quota[o] = left * weights[o] / weight if weight > 0.0 else left / len(still)
        beyond = [o for o in still if quota[o] > cap]
        if not beyond:
            break
        for o in beyond:
            full[o], quota[o] = True, float(cap)
            left = max(0, left - cap)
    counts = [math.floor(q) for q in quota]
    order = sorted(range(len(weights)), key=lambda o: math.floor(quota[o]) - quota[o])
    rest = max(0, total - sum(counts))
    while rest > 0 and min(counts) < cap:
        for o in order:
            if rest > 0 and counts[o] < cap:
                counts[o], rest = counts[o] + 1, rest - 1
    return counts
