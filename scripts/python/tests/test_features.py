"""Features and keep masks against those of the Rust side."""

import unittest

import pyarrow.parquet as pq
import torch
from common import PROXY, RUNS, contexts, kept, opened, proxykv
from transformers import AutoConfig, AutoModelForCausalLM


class Features(unittest.TestCase):
    def test_the_frame_is_the_rust_one(self):
        px = opened("demo-nano")
        self.assertEqual(len(proxykv.Frame.of(px.tokenizer).prefix), kept("demo-nano")["prefix"].item())

    def test_channels_equal_the_rust_ones_in_f32(self):
        # The second run has all eleven channels, KVzip+ scores, and chunks in prefill and repeat.
        for run in ("demo-nano", "other"):
            px, rust = opened(run), kept(run)
            prefix = proxykv.Frame.of(px.tokenizer).prefix
            worst = 0.0
            for i in contexts(run):
                heads, globals_ = px.features(prefix + rust[f"{i}.tokens"].tolist(), len(prefix))
                torch.testing.assert_close(heads, rust[f"{i}.heads_pct"], atol=1e-3, rtol=0)
                torch.testing.assert_close(globals_, rust[f"{i}.globals_ct"], atol=1e-3, rtol=0)
                worst = max(worst, (heads - rust[f"{i}.heads_pct"]).abs().max().item())
            print(f"\n  {run}: largest difference {worst:.1e}", end="")

    def test_features_equal_those_of_the_shard(self):
        px = opened("demo-nano")
        prefix = proxykv.Frame.of(px.tokenizer).prefix
        examples, features = (
            pq.read_table(RUNS / f"demo-nano/{stage}/{stage}-00000.parquet").slice(0, 3) for stage in ("examples", "features")
        )
        self.assertEqual(examples["id"], features["id"])
        for i in range(examples.num_rows):
            heads, globals_ = px.features(prefix + examples["tokens"][i].as_py(), len(prefix))
            stored = torch.tensor(features["heads"][i].as_py()).flatten(0, 1)
            # Shards hold f16: 11 bits.
            torch.testing.assert_close(heads, stored, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(globals_, torch.tensor(features["globals"][i].as_py()), atol=1e-3, rtol=1e-3)

    def test_rotary_frequencies_stay_those_of_the_scaling(self):
        base = {"rope_theta": 5e5}
        llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
        llama3["original_max_position_embeddings"] = 512
        for scaling in ({"rope_type": "default"}, llama3, yarn):
            config = AutoConfig.from_pretrained(PROXY)
            config.rope_parameters = {**base, **scaling}
            model = AutoModelForCausalLM.from_config(config)
            theirs = model.model.rotary_emb.inv_freq.clone()
            proxykv._exact_frequencies(model)
            ours = model.model.rotary_emb.inv_freq
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
            self.assertFalse(torch.equal(ours, theirs), f"{scaling} was not recognized")


class Masks(unittest.TestCase):
    def test_masks_of_the_rust_scores_are_equal(self):
        for run in ("demo-nano", "other"):
            rust = kept(run)
            for i in contexts(run):
                for policy in proxykv.POLICIES:
                    for n, ratio in enumerate(rust["ratios"].tolist()):
                        mask = proxykv.keep_mask(rust[f"{i}.scores_lht"], policy, ratio)
                        self.assertTrue(torch.equal(mask, rust[f"{i}.{policy}"][n]), (run, i, policy, ratio))

    def test_ties_go_to_the_lower_index_and_counts_are_exact(self):
        scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [2.0, float("nan"), 2.0, 1.0, 0.0]])
        self.assertEqual(proxykv.keep_mask(scores, "pair", 0.4).tolist(), [[False, True, True, True, False], [True] + [False] * 4])
        self.assertEqual(
            proxykv.keep_mask(scores, "pair-uniform", 0.4).tolist(),
            [[False, True, True, False, False], [True, False, True, False, False]],
        )
        self.assertEqual([proxykv.kept_count(n, 0.1) for n in (0, 1, 14, 15, 25)], [0, 1, 1, 2, 3])
        with self.assertRaises(ValueError):
            proxykv.kept_count(10, 15)


if __name__ == "__main__":
    unittest.main()
