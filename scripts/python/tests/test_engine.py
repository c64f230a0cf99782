"""The contract for engines: selections against the masks of `proxykv`, refusals, and the frames of docs/serving.md."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from common import ROOT, TARGET, contexts, export, frame, kept, opened, pipe, proxykv, target
from proxykv import engine
from proxykv.budgets import _apportion


def contract(run: str = "demo-nano") -> engine.Contract:
    return engine.Contract.read(export(run))


def served(run: str = "demo-nano", **changes) -> engine.Served:
    named = opened(run).config["target"]
    config = json.loads((ROOT / TARGET / "config.json").read_text())
    return engine.Served.of(named["model"], named["revision"], torch.float32, config, pipe().tokenizer)._replace(**changes)


def mask(positions, tokens: int) -> torch.Tensor:
    """Selected positions, any number of each head, as a keep mask."""
    out = torch.zeros(len(positions), len(positions[0]), tokens, dtype=torch.bool)
    for layer, heads in enumerate(positions):
        for head, at in enumerate(heads):
            assert list(at) == sorted(set(at)), "positions ascend and are different"
            out[layer, head, torch.as_tensor(np.asarray(at))] = True
    return out


class Selection(unittest.TestCase):
    def test_selections_are_the_masks_of_the_policies(self):
        whole = torch.randn(6, 2, 211, generator=torch.Generator().manual_seed(1))
        for name, scores in {"distinct": whole, "tied": (whole * 2).round(), "equal": torch.zeros_like(whole)}.items():
            prompt = contract().scores(scores.numpy(), prefix=5, tokens=216)
            for ratio in (1e-6, 0.1, 0.33, 1.0):
                for policy, chosen in (("pair-uniform", prompt.uniform(ratio)), ("pair-budget", prompt.budgeted(ratio))):
                    expected = proxykv.keep_mask(scores, policy, ratio, proxykv.HeadBudgets.read(export("demo-nano")))
                    found = mask(chosen, 216)
                    self.assertTrue(found[..., :5].all())
                    self.assertTrue(torch.equal(found[..., 5:], expected), f"{name}, {policy} at {ratio}")
                counts = contract().counts(5, 216, ratio)
                self.assertEqual(counts.tolist(), [[len(at) for at in heads] for heads in prompt.budgeted(ratio)])

    def test_selections_from_an_export_are_those_of_eval(self):
        for run in ("demo-nano", "own"):
            px, rust, prefix, i = opened(run), kept(run), frame().prefix, contexts(run)[0]
            ids = prefix + rust[f"{i}.tokens"].tolist()
            log_odds = px.mapper.to_log_odds(px.scores(ids, len(prefix), target(run))).numpy()
            prompt = contract(run).scores(log_odds, len(prefix), len(ids))
            for n, ratio in enumerate(rust["ratios"].tolist()):
                for policy, chosen in (("pair-uniform", prompt.uniform(ratio)), ("pair-budget", prompt.budgeted(ratio))):
                    found = mask(chosen, len(ids))[..., len(prefix) :]
                    self.assertTrue(torch.equal(found, rust[f"{i}.{policy}"][n]), f"{run}, {policy} at {ratio}")

    def test_chunks_are_the_scores_with_the_prefix_above_all(self):
        scores = np.random.default_rng(1).normal(size=(6, 2, 40)).astype(np.float64)
        prompt = contract().scores(scores, prefix=3, tokens=43)
        parts = [prompt.chunk(4, start, min(start + 16, 43)) for start in range(0, 43, 16)]
        whole = np.concatenate(parts, 1)
        self.assertEqual((whole.dtype, whole.shape), (np.float32, (2, 43)))
        np.testing.assert_array_equal(whole[:, 3:], scores[4].astype(np.float32))
        self.assertGreater(whole[:, :3].min(), scores.max())

    def test_it_needs_no_torch(self):
        code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import proxykv.engine as e; print(e.Contract.read(sys.argv[1]).layers)"
        command = [sys.executable, "-c", code, str(export("demo-nano"))]
        run = subprocess.run(command, cwd=ROOT / "scripts/python", capture_output=True, text=True)
        self.assertEqual((run.stdout, run.returncode), ("6\n", 0), run.stderr)


class Refusals(unittest.TestCase):
    def test_the_target_itself_is_served(self):
        for run in ("demo-nano", "own"):
            contract(run).check(served(run))

    def test_any_other_target_is_refused_by_all_that_differs(self):
        shape = {**served().shape, "kv_heads": 4}
        for changes in (
            {"model": "another/model"},
            {"revision": "0" * 40},
            {"dtype": "bfloat16"},
            {"vocab_hash": "0" * 64},
            {"template_hash": "0" * 64},
        ):
            (name, value), *_ = changes.items()
            with self.assertRaisesRegex(engine.Mismatch, f"{name}: expected .*, found {value}"):
                contract().check(served(**changes))
        for name in engine.SHAPE:
            with self.assertRaisesRegex(engine.Mismatch, f"{name}: expected .*, found 3"):
                contract().check(served(shape={**served().shape, name: 3}))
        with self.assertRaisesRegex(engine.Mismatch, "dtype: .*; kv_heads: expected 2, found 4"):
            contract().check(served(dtype="float8", shape=shape))

    def test_scores_that_do_not_fit_are_refused(self):
        good = np.zeros((6, 2, 10), np.float32)
        contract().scores(good, 3, 13)
        for scores, prefix, tokens, message in (
            (good, 4, 13, "expected floats of shape"),
            (good[:5], 3, 13, "expected floats of shape"),
            (good.astype(np.int32), 3, 13, "int32"),
            (np.where(np.arange(10) == 3, np.nan, good), 3, 13, "NaN"),
            (good - np.inf, 3, 13, "infinite"),
            (good, 13, 13, "no context"),
            (good, -1, 9, "no context"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                contract().scores(scores, prefix, tokens)
        prompt = contract().scores(good, 3, 13)
        for ratio in (0.0, 1.5, float("nan")):
            with self.assertRaisesRegex(ValueError, "kept share"):
                prompt.uniform(ratio)
        with self.assertRaisesRegex(ValueError, "not of a prompt of 13"):
            prompt.chunk(0, 5, 14)
        bare = engine.Contract(contract().target, None)
        for call in (lambda: bare.counts(3, 13, 0.5), lambda: bare.scores(good, 3, 13).budgeted(0.5)):
            with self.assertRaisesRegex(ValueError, "needs head budgets"):
                call()

    def test_files_that_are_no_export_are_refused(self):
        with tempfile.TemporaryDirectory() as folder:
            for text in ("{}", '{"target": {"model": "m"}}', '{"target": null}'):
                (Path(folder) / "config.json").write_text(text)
                with self.assertRaisesRegex(ValueError, "no export that this file knows"):
                    engine.Contract.read(folder)
        budgets = proxykv.HeadBudgets([1_000_000], [[1_000_000] * 5])
        with self.assertRaisesRegex(ValueError, "budgets are for 5 KV heads"):
            engine.Contract(contract().target, budgets)


class Budgets(unittest.TestCase):
    def test_budgets_are_exact_and_refused_where_damaged_or_absent(self):
        budgets = opened("demo-nano").budgets
        shape = opened("demo-nano").config["target"]["shape"]
        heads = shape["layers"] * shape["kv_heads"]
        for positions in (1, 7, 300, 32768):
            for pairs in {0, 1, heads * positions // 50, heads * positions // 3, heads * positions}:
                counts = budgets.counts(pairs, positions)
                self.assertEqual((len(counts), sum(counts)), (heads, pairs))
                self.assertLessEqual(max(counts), positions)
        self.assertEqual(_apportion([8.0, 1.0, 1.0], 10, 5), [5, 3, 2])
        scores = kept("demo-nano")["0.scores_lht"]
        with self.assertRaisesRegex(ValueError, "proxykv-train export"):
            proxykv.keep_mask(scores, "pair-budget", 0.1)
        with self.assertRaisesRegex(ValueError, f"for {heads} KV heads, the scores have 1"):
            proxykv.keep_mask(scores[:1, :1], "pair-budget", 0.1, budgets)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "export"
            shutil.copytree(export("demo-nano"), copy)
            path = copy / "budgets.json"
            text = path.read_text()
            share = max(map(max, json.loads(text)["shares"][0]))
            path.write_text(text.replace(str(share), str(share - 1), 1))
            with self.assertRaisesRegex(ValueError, "is damaged"):
                proxykv.HeadBudgets.read(copy)
            path.unlink()
            self.assertIsNone(proxykv.HeadBudgets.read(copy))


class Frames(unittest.TestCase):
    """What docs/serving.md shows, driven as the engines would."""

    @classmethod
    def setUpClass(cls):
        text = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
        snippets = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        cls.names = {}
        for snippet in snippets:
            assert len(snippet.splitlines()) < 50
            exec(snippet.replace("runs/demo-nano/export", str(export("demo-nano"))), cls.names)
        cls.tokens = frame().prefix + kept("demo-nano")["0.tokens"].tolist()
        cls.prefix = len(frame().prefix)
        cls.scores = cls.names["score"](cls.tokens, cls.prefix)

    def test_a_manager_compacts_equally_many_in_every_head_after_the_last_chunk(self):
        pages = np.random.default_rng(2).normal(size=(6, 2, len(self.tokens), 4))
        evicted = []

        def compact(request, keep):
            request.pages = np.take_along_axis(request.pages, keep[..., None], 2)
            evicted.append(len(request.tokens) - keep.shape[-1])

        manager = self.names["ProxyKVManager"](contract(), served(), self.names["score"], compact, 0.1)
        request = SimpleNamespace(tokens=self.tokens, prefix=self.prefix, pages=pages)
        manager.on_context_step_end([request])
        kept_tokens = self.prefix + proxykv.kept_count(len(self.tokens) - self.prefix, 0.1)
        self.assertEqual(evicted, [len(self.tokens) - kept_tokens])
        expected = proxykv.keep_mask(torch.tensor(self.scores), "pair-uniform", 0.1)
        for layer in range(6):
            for head in range(2):
                rows = torch.cat([torch.ones(self.prefix, dtype=torch.bool), expected[layer, head]]).numpy()
                np.testing.assert_array_equal(request.pages[layer, head], pages[layer, head][rows])
        with self.assertRaises(engine.Mismatch):
            self.names["ProxyKVManager"](contract(), served(dtype="float16"), self.names["score"], compact, 0.1)

    def test_a_scorer_hands_out_each_layer_and_chunk_of_its_rank(self):
        taken = {}
        receive = lambda name, layer, scores: taken.setdefault((name, layer), []).append(scores)  # noqa: E731
        scorer = self.names["ProxyKVScorer"](contract(), served(), self.names["score"], receive, heads=slice(1, 2))
        scorer.begin_request("a", self.tokens, self.prefix)
        for start in range(0, len(self.tokens), 200):
            scorer.forward_chunk("a", start, min(start + 200, len(self.tokens)))
        scorer.end_request("a")
        self.assertEqual(scorer.requests, {})
        for layer in range(6):
            whole = np.concatenate(taken["a", layer], 1)
            np.testing.assert_array_equal(whole[:, self.prefix :], self.scores[layer, 1:2])


if __name__ == "__main__":
    unittest.main()
