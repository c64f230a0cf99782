"""What Kubernetes says of a Job, for each of three minor versions, as the tests read it.

    pip install kubernetes-validate==1.37.0 && python make.py

The package ships the OpenAPI documents of every minor version as JSON schemas (strict: no unknown keys). Kept are the definitions that a
Job reaches, without descriptions, extensions and the status, which a client does not write.
"""

import importlib.metadata
import importlib.resources
import json
import pathlib

VERSIONS = ["1.29", "1.33", "1.37"]
PACKAGE = "1.37.0"


def short(name):
    return name.rsplit(".", 1)[-1]


def pruned(value, reached):
    if isinstance(value, list):
        return [pruned(v, reached) for v in value]
    if not isinstance(value, dict):
        return value
    out = {}
    for key, inner in value.items():
        if key == "$ref":
            name = inner.rsplit("/", 1)[-1]
            reached.append(name)
            out[key] = f"#/$defs/{short(name)}"
        elif key == "properties":
            # Names of keys, not of the schema's language.
            out[key] = {name: pruned(v, reached) for name, v in inner.items()}
        elif key not in ("description", "$schema") and not key.startswith("x-"):
            out[key] = pruned(inner, reached)
    return out


def main():
    found = importlib.metadata.version("kubernetes-validate")
    assert found == PACKAGE, f"kubernetes-validate is {found}, expected {PACKAGE}"
    root = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
    for version in VERSIONS:
        folder = root / f"v{version}.0-local-strict"
        job = json.loads((folder / "job-batch-v1.json").read_text())
        definitions = json.loads((folder / "_definitions.json").read_text())["$defs"]
        del job["properties"]["status"]
        reached, kept = [], {}
        schema = pruned(job, reached)
        while reached:
            name = reached.pop()
            if short(name) not in kept:
                kept[short(name)] = None
                kept[short(name)] = pruned(definitions[name], reached)
        schema["$defs"] = dict(sorted(kept.items()))
        path = pathlib.Path(__file__).with_name(f"job-{version}.json")
        path.write_text(json.dumps(schema, separators=(",", ":"), sort_keys=True) + "\n")
        print(f"{path.name}: {len(kept)} definitions, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
