#!/usr/bin/env python3
"""What a run folder measured, as an experiment tracker keeps it: no network, no account.

    scripts/trackers.py RUN --to tensorboard|wandb|mlflow [--out FOLDER] [--project NAME]

Reads `run.json`, `train/metrics.jsonl` and `eval/results.json` (each may be absent) and writes, below `RUN/trackers/` or
FOLDER, what the tracker's own tool shows or sends: event files, an offline run (`wandb sync`), a database (`mlflow ui`).
Needs the tracker's package: `pip install tensorboard`, `wandb` or `mlflow`.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import defaultdict
from pathlib import Path


class Refused(Exception):
    """What was wrong, and what repairs it."""


def numbers(value, name: str) -> dict[str, float]:
    """The finite numbers in nested objects, named by their path; a truth value is none."""
    if isinstance(value, dict):
        found = {}
        for key, inner in value.items():
            found |= numbers(inner, f"{name}/{key}" if name else key)
        return found
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return {name: float(value)} if is_number else {}


def curves(path: Path) -> list[tuple[int, dict[str, float]]]:
    """Scalars by step, in order. The last line of a step counts; a line that a killed run left unfinished is skipped."""
    steps = defaultdict(dict)
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        kind, step = entry.pop("kind", None), entry.pop("step", None)
        if kind and isinstance(step, int):
            # Terms of the loss stand beside it, as in the run's own event files.
            entry |= entry.pop("terms", {})
            steps[step] |= numbers(entry, kind)
    return sorted(steps.items())


def measured(results: dict) -> dict[str, float]:
    """The means of an evaluation: QUANTITY/POLICY/METHOD/RATIO."""
    out = {}

    def add(group: str, cells: list, key: str) -> None:
        for cell in cells:
            out[f"{group}/{cell['policy']}/{cell['method']}/{cell['ratio']:g}"] = cell[key]["mean"]

    facts = [("answers/facts", results["facts"], "accuracy")] if results.get("facts") else []
    tasks = [(f"answers/{b['suite']}/{b['task']}", b, "score") for b in results.get("benchmarks", [])]
    for group, task, key in facts + tasks:
        out[f"{group}/full cache"] = task["full"]["mean"]
        add(group, task["cells"], key)
    add("recall", results["labels"]["cells"], "recall")
    if results.get("perplexity"):
        add("continuation nats", results["perplexity"]["cells"], "excess")
    return {name: value for name, value in out.items() if value is not None and math.isfinite(value)}


def choices(recipe: dict, name: str = "") -> dict[str, str]:
    """The recipe's keys and values, without sections."""
    out = {}
    for key, value in recipe.items():
        path = f"{name}.{key}" if name else key
        if isinstance(value, dict):
            out |= choices(value, path)
        elif value is not None:
            out[path] = value if isinstance(value, str) else json.dumps(value)
    return out


class Run:
    def __init__(self, folder: Path):
        def read(path: str) -> dict:
            return json.loads((folder / path).read_text(encoding="utf-8")) if (folder / path).is_file() else {}

        metrics, results = folder / "train/metrics.jsonl", read("eval/results.json")
        if not metrics.is_file() and not results:
            raise Refused(
                f"`{folder}` has neither `train/metrics.jsonl` nor `eval/results.json`",
                "name the folder of a run that was trained or evaluated, such as runs/demo",
            )
        record = read("run.json")
        self.name = record.get("name") or folder.resolve().name
        self.choices = choices(record.get("recipe") or {})
        self.curves = curves(metrics) if metrics.is_file() else []
        self.measured = measured(results) if results else {}
        self.last = self.curves[-1][0] if self.curves else 0


def tensorboard(run: Run, out: Path, _project: str) -> str:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(out / run.name))
    for step, scalars in [*run.curves, (run.last, run.measured)]:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
    writer.close()
    return f"tensorboard --logdir {out}"


def wandb(run: Run, out: Path, project: str) -> str:
    # Nothing is sent, whatever the environment says, and nothing is asked on the terminal.
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    import wandb

    out.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(x_disable_stats=True, x_disable_meta=True, disable_git=True, save_code=False)
    with wandb.init(project=project, name=run.name, dir=str(out), config=run.choices, settings=settings) as tracked:
        for step, scalars in run.curves:
            tracked.log(scalars, step=step)
        tracked.summary.update(run.measured)
    return f"wandb sync {out}/wandb/offline-run-*"


def mlflow(run: Run, out: Path, project: str) -> str:
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING"}
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    out.mkdir(parents=True, exist_ok=True)
    database = f"sqlite:///{out.resolve()}/mlflow.db"
    client = MlflowClient(tracking_uri=database)
    known = client.get_experiment_by_name(project)
    artifacts = (out.resolve() / "artifacts").as_uri()
    experiment = known.experiment_id if known else client.create_experiment(project, artifact_location=artifacts)
    tracked = client.create_run(experiment, run_name=run.name).info.run_id
    now = int(time.time() * 1000)
    every = [(step, item) for step, scalars in run.curves for item in scalars.items()]
    every += [(run.last, item) for item in run.measured.items()]
    metrics = [Metric(name, value, now, step) for step, (name, value) in every]
    # A batch holds at most 1000 metrics and 100 parameters.
    for at in range(0, len(metrics), 1000):
        client.log_batch(tracked, metrics=metrics[at : at + 1000])
    params = [Param(key, value) for key, value in run.choices.items()]
    for at in range(0, len(params), 100):
        client.log_batch(tracked, params=params[at : at + 100])
    client.set_terminated(tracked)
    return f"mlflow ui --backend-store-uri {database}"


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder, such as runs/demo")
    parser.add_argument("--to", required=True, choices=TRACKERS, help="the tracker")
    parser.add_argument("--out", type=Path, help="folder to write into, of several runs if you like (default: RUN/trackers/TRACKER)")
    parser.add_argument("--project", default="proxykv", help="project (wandb) or experiment (mlflow)")
    args = parser.parse_args()
    run = Run(args.run)
    out = args.out or args.run / "trackers" / args.to
    marker = out / f"{run.name}.written"
    if marker.exists():
        raise Refused(f"`{out}` has the run `{run.name}` already", "remove that folder, or name another with --out")
    try:
        then = TRACKERS[args.to](run, out, args.project)
    except ImportError as missing:
        raise Refused(f"the package of {args.to} cannot be loaded: {missing}", f"pip install {args.to}") from missing
    marker.touch()
    print(f"{len(run.curves)} steps and {len(run.measured)} results of `{run.name}` are in {out}\n  {then}")


if __name__ == "__main__":
    try:
        main()
    except Refused as why:
        sys.exit("error: {}\n\nhint: {}".format(*why.args))
