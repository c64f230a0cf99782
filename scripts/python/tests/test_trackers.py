"""scripts/trackers.py: what the trackers' own readers find in its folders is what the run measured."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from common import ROOT, RUNS

RUN = RUNS / "demo-nano"


def bridge(*args) -> subprocess.CompletedProcess:
    # An address that answers nobody: nothing may wait for a network.
    env = {**os.environ, "WANDB_BASE_URL": "http://127.0.0.1:9", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    command = [sys.executable, str(ROOT / "scripts/trackers.py"), *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def needs(package: str):
    return unittest.skipUnless(importlib.util.find_spec(package), f"SKIPPED: {package} is not installed")


def lines(kind: str) -> dict[int, dict]:
    entries = map(json.loads, (RUN / "train/metrics.jsonl").read_text().splitlines())
    return {e["step"]: e for e in entries if e["kind"] == kind}


def answered() -> float:
    facts = json.loads((RUN / "eval/results.json").read_text())["facts"]
    [cell] = [c for c in facts["cells"] if (c["policy"], c["method"], c["ratio"]) == ("pair", "mapper", 0.05)]
    return cell["accuracy"]["mean"]


def records(log: bytes):
    """Records of a LevelDB log, the format of offline runs: blocks of 32 KiB whose pieces are (checksum, length, type)."""
    at, whole = 7, b""
    while at + 7 <= len(log):
        left = -at % 32768
        if 0 < left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        # 1 is a whole record, 4 the last piece of one.
        if kind in (1, 4):
            yield whole
            whole = b""


ANSWERED = "answers/facts/pair/mapper/0.05"


class Trackers(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.out = Path(folder.name)

    def check(self, curves: dict[str, dict[int, float]], summary: dict[str, float]):
        """Curves by name and step, and the figures of the evaluation."""
        for kind in ("train", "validation"):
            wanted = {step: entry["loss"] for step, entry in lines(kind).items()}
            self.assertGreater(len(wanted), 1)
            self.assertEqual(curves[f"{kind}/loss"].keys(), wanted.keys())
            for step, loss in wanted.items():
                self.assertAlmostEqual(curves[f"{kind}/loss"][step], loss, delta=1e-6 * abs(loss))
        step, entry = max(lines("validation").items())
        self.assertAlmostEqual(curves["validation/recall/pair/0.05"][step], entry["recall"]["pair"]["0.05"], places=6)
        step, entry = max(lines("train").items())
        self.assertAlmostEqual(curves["train/binary"][step], entry["terms"]["binary"], places=6)
        self.assertAlmostEqual(summary[ANSWERED], answered(), places=6)
        self.assertIn("recall/pair/mapper/0.05", summary)

    @needs("tensorboard")
    def test_tensorboard(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        ran = bridge(RUN, "--to", "tensorboard", "--out", self.out)
        self.assertEqual(ran.returncode, 0, ran.stderr)
        read = EventAccumulator(str(self.out / "demo-nano"), size_guidance={"scalars": 0})
        read.Reload()
        curves = {tag: {e.step: e.value for e in read.Scalars(tag)} for tag in read.Tags()["scalars"]}
        self.check(curves, {tag: list(points.values())[-1] for tag, points in curves.items()})

    @needs("wandb")
    def test_wandb(self):
        from wandb.proto import wandb_internal_pb2 as pb

        ran = bridge(RUN, "--to", "wandb", "--out", self.out)
        self.assertEqual(ran.returncode, 0, ran.stderr)
        [file] = self.out.glob("wandb/offline-run-*/run-*.wandb")
        curves, summary, config = {}, {}, {}
        for data in records(file.read_bytes()):
            record = pb.Record()
            record.ParseFromString(data)
            name = lambda item: item.key or "/".join(item.nested_key)  # noqa: E731
            row = {name(item): json.loads(item.value_json) for item in record.history.item}
            for key, value in row.items():
                curves.setdefault(key, {})[row["_step"]] = value
            summary |= {name(item): json.loads(item.value_json) for item in record.summary.update}
            config |= {name(item): json.loads(item.value_json) for item in record.run.config.update}
        self.check(curves, summary)
        self.assertEqual(config["train.batch"], "8")

    @needs("mlflow")
    def test_mlflow(self):
        from mlflow import MlflowClient

        ran = bridge(RUN, "--to", "mlflow", "--out", self.out)
        self.assertEqual(ran.returncode, 0, ran.stderr)
        client = MlflowClient(tracking_uri=f"sqlite:///{self.out}/mlflow.db")
        [run] = client.search_runs([client.get_experiment_by_name("proxykv").experiment_id])
        history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        self.check({name: {m.step: m.value for m in of} for name, of in history.items()}, run.data.metrics)
        self.assertEqual(run.data.params["train.batch"], "8")

    def test_what_cannot_be_written_is_refused_with_a_hint(self):
        ran = bridge(self.out, "--to", "tensorboard")
        self.assertEqual(ran.returncode, 1)
        self.assertIn("has neither `train/metrics.jsonl` nor `eval/results.json`", ran.stderr)
        (self.out / "demo-nano.written").touch()
        again = bridge(RUN, "--to", "tensorboard", "--out", self.out)
        self.assertEqual(again.returncode, 1)
        self.assertIn("has the run `demo-nano` already", again.stderr)
        self.assertIn("\nhint: ", again.stderr)


if __name__ == "__main__":
    unittest.main()
