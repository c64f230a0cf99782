"""Every Python snippet of the readmes runs as it stands, on a small run in place of the demo's."""

import os
import re
import subprocess
import sys
import unittest

from common import ROOT, RUNS


class Snippets(unittest.TestCase):
    def test_snippets_run(self):
        for readme, least in (("README.md", 1), ("scripts/python/README.md", 4)):
            text = (ROOT / readme).read_text(encoding="utf-8")
            snippets = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
            self.assertGreaterEqual(len(snippets), least)
            for i, snippet in enumerate(snippets):
                with self.subTest(f"{readme}, snippet {i}"):
                    self.assertLess(len(snippet.splitlines()), 15)
                    # The run `own` has the demo's features.
                    code = re.sub(r"runs/demo(?=/)", f"{RUNS}/own", snippet)
                    code = re.sub(r"runs/(?=demo-nano)", f"{RUNS}/", code)
                    env = {**os.environ, "PYTHONPATH": "scripts/python"}
                    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
                    self.assertEqual(run.returncode, 0, run.stderr[-2000:])
                    if "pipeline(" in snippet:
                        self.assertIn("48213", run.stdout)


if __name__ == "__main__":
    unittest.main()
