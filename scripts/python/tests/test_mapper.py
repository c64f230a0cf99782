"""The mapper against the parity vectors of every variant, and exports that must be refused."""

import json
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import torch
from common import ROOT, export, proxykv


class Parity(unittest.TestCase):
    def test_every_variant_equals_the_rust_mapper(self):
        for run in ("demo-nano", "other", "own", "both", "own-all", "both-all", "mlp", "linear"):
            with self.subTest(run):
                difference = proxykv.check_parity(export(run))
                print(f"\n  {run}: largest difference {difference:.1e}", end="")
                self.assertLessEqual(difference, 1e-5)

    def test_an_older_version_is_read(self):
        old = ROOT / "crates/checkpoint/tests/old/export-2"
        self.assertEqual(proxykv.read_config(old)["schema_version"], 2)
        self.assertEqual(proxykv.read_config(export("demo-nano"))["schema_version"], 3)
        self.assertLessEqual(proxykv.check_parity(old), 1e-5)

    def test_windows_of_a_long_context_equal_one_forward(self):
        for run in ("demo-nano", "other"):
            mapper = proxykv.HybridAxialMapper.from_export(export(run))
            parity = proxykv.read_tensors(export(run) / "parity.safetensors")
            features = parity["heads_pct"], parity["globals_ct"]
            for window in (100, 511):
                torch.testing.assert_close(mapper.scores(*features, window=window), mapper.scores(*features), atol=2e-5, rtol=0)

    def test_wrong_shapes_are_refused(self):
        mapper = proxykv.HybridAxialMapper.from_export(export("demo-nano"))
        with self.assertRaisesRegex(ValueError, "head features have shape"):
            mapper(torch.zeros(1, 3, 7, 10), torch.zeros(1, 4, 10))
        with self.assertRaisesRegex(ValueError, "global features have shape"):
            mapper(torch.zeros(1, 3, 8, 10), torch.zeros(1, 4, 11))

    def test_the_command_checks_an_export(self):
        command = [sys.executable, "-m", "proxykv", str(export("linear"))]
        run = subprocess.run(command, cwd=ROOT / "scripts/python", capture_output=True, text=True)
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertIn("largest difference", run.stdout)
        run = subprocess.run(command[:-1], cwd=ROOT / "scripts/python", capture_output=True, text=True)
        self.assertIn("usage: python -m proxykv EXPORT", run.stderr)


class Files(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.TemporaryDirectory()
        self.addCleanup(self.dir.cleanup)
        self.copy = Path(self.dir.name) / "export"
        shutil.copytree(export("linear"), self.copy)

    def test_damage_is_found(self):
        path = self.copy / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with self.assertRaisesRegex(ValueError, "damaged"):
            proxykv.HybridAxialMapper.from_export(self.copy)

    def test_another_version_is_refused(self):
        path = self.copy / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
        with self.assertRaisesRegex(ValueError, "expected export version 2 or 3, found 99"):
            proxykv.HybridAxialMapper.from_export(self.copy)

    def test_an_absent_folder_is_not_asked_of_the_hub(self):
        with self.assertRaisesRegex(FileNotFoundError, "there is no export"):
            proxykv.HybridAxialMapper.from_export(self.copy / "absent")


if __name__ == "__main__":
    unittest.main()
