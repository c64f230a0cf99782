"""Features and keep masks against those of the Rust side."""

import copy
import hashlib
import json
import math
import shutil
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import tokenizers
import torch
from common import PROXY, RUNS, contexts, export, frame, kept, opened, pipe, proxykv, target
from proxykv.attention import _Layer, _UnrunReplay, _chunk_scores
from proxykv.reading import MODEL_TYPES, _exact_frequencies, _tap
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast


class Features(unittest.TestCase):
    def test_the_frame_is_the_rust_one(self):
        px = opened("demo-nano")
        got = proxykv.Frame.of(px.tokenizer)
        self.assertEqual(len(got.prefix), kept("demo-nano")["prefix"].item())
        text = "\u0001".join(px.tokenizer.decode(ids) for ids in got)
        self.assertEqual(hashlib.sha256(text.encode()).hexdigest(), px.config["proxy"]["template_hash"])

    def test_the_frame_is_what_kvpress_puts_around_a_text(self):
        given, tokenizer = pipe().tokenizer, copy.deepcopy(pipe().tokenizer)
        template = given.chat_template
        self.addCleanup(setattr, pipe(), "tokenizer", given)
        pipe().tokenizer = tokenizer
        named = {"default": template, "tool_use": "{{ messages[0].content }}!"}
        for tokenizer.chat_template in (template, named, "<{{ messages[0].content }}>", None):
            got, text = proxykv.Frame.of(tokenizer), "A text."
            made = pipe().preprocess(text, [""], "", 10**9)
            # As texts: a line break at the prefix' end may be one token with what follows.
            self.assertEqual(tokenizer.decode(got.prefix) + text, tokenizer.decode(made["context_ids"][0]))
            self.assertEqual(got.switch, made["questions_ids"][0][0].tolist())
        self.assertEqual(got.prefix, [tokenizer.bos_token_id])
        tokenizer.bos_token = None
        self.assertEqual(proxykv.Frame.of(tokenizer).prefix, [])
        for tokenizer.chat_template in ("no text", "{{ messages[0].content }} {{ messages[0].content }}"):
            with self.assertRaisesRegex(ValueError, "once"):
                proxykv.Frame.of(tokenizer)

    def test_a_tokenizer_that_puts_a_blank_before_texts_reads_parts_as_the_whole(self):
        scores = [(token, -1.0) for token in ("<s>", "<0x01>", "<unk>", "\u2581", "a", "b", "\n", ".", "|", "1", "[", "\u00e9", "\u4eac")]
        for scheme in ("always", "first", "never"):
            core = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unk_id=2))
            core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")
            got = proxykv.Frame.of(tokenizer)
            self.assertEqual((got.prefix, got.switch), ([0], [6]), scheme)
            encode = proxykv.text_encoder(tokenizer)
            whole = tokenizer.encode("a\n\nb b", add_special_tokens=False)
            self.assertEqual(tokenizer.encode("a", add_special_tokens=False) + encode("\n\nb") + encode(" b"), whole)

    def test_channels_equal_the_rust_ones_in_f32(self):
        # `other` has all channels of a proxy, KVzip+ scores, and chunks in prefill and repeat.
        for run in ("demo-nano", "other", "own", "both", "own-all", "both-all"):
            px, rust, prefix = opened(run), kept(run), frame().prefix
            worst = 0.0
            for i in contexts(run):
                heads, globals_ = px.features(prefix + rust[f"{i}.tokens"].tolist(), len(prefix), target(run))
                torch.testing.assert_close(heads, rust[f"{i}.heads_pct"], atol=1e-3, rtol=0)
                torch.testing.assert_close(globals_, rust[f"{i}.globals_ct"], atol=1e-3, rtol=0)
                worst = max(worst, (heads - rust[f"{i}.heads_pct"]).abs().max().item())
            print(f"\n  {run}: largest difference {worst:.1e}", end="")

    def test_every_channel_is_asked_of_every_model_that_gives_it(self):
        for run, source, known in (
            ("other", "proxy", (*proxykv.CHANNELS, *proxykv.REPEAT_CHANNELS)),
            ("own-all", "target", (*proxykv.CHANNELS, "hidden_linear")),
        ):
            self.assertEqual(set(opened(run).sources[source]["channels"]), set(known))
            self.assertEqual(set(opened("both-all").sources[source]["channels"]), set(known))

    def test_kept_sets_with_all_channels_are_those_of_eval(self):
        for run in ("other", "own-all", "both-all"):
            px, rust, prefix = opened(run), kept(run), frame().prefix
            policies = [policy for policy in proxykv.POLICIES if f"0.{policy}" in rust]
            self.assertIn("pair", policies)
            for i in contexts(run):
                scores = px.scores(prefix + rust[f"{i}.tokens"].tolist(), len(prefix), target(run))
                for policy in policies:
                    for n, ratio in enumerate(rust["ratios"].tolist()):
                        keep = proxykv.keep_mask(scores, policy, ratio, px.budgets, rust[f"{i}.key_diff_lht"])
                        different = (keep != rust[f"{i}.{policy}"][n]).sum().item()
                        self.assertEqual(different, 0, f"{run}, context {i}, {policy} at {ratio}: {different} KV pairs differ")

    def test_an_unrun_replay_needs_to_know_where_the_repeat_would_be(self):
        model, px, prefix = pipe().model, opened("own-all"), frame().prefix
        ids = prefix + kept("own-all")["0.tokens"].tolist()
        read = lambda cache, *ends: model.model(input_ids=torch.tensor([ids[slice(*ends)]]), past_key_values=cache)  # noqa: E731
        cache = DynamicCache()
        with px.tap(model, len(prefix)):
            read(cache, 0, 300)
            with self.assertRaisesRegex(ValueError, "context=..."):
                read(cache, 300, 400)
        cache = DynamicCache()
        with px.tap(model, len(prefix), len(ids)) as reading:
            read(cache, 0, 400)
        with self.assertRaisesRegex(ValueError, f"of a context of {len(ids)}"):
            reading.features()
        with px.tap(model, len(prefix), 200), self.assertRaisesRegex(ValueError, "context=..."):
            read(DynamicCache(), 0, 400)

    def test_an_unrun_score_is_the_weight_of_a_query_moved_to_its_repeat(self):
        # One head of two dimensions, in which a position is an angle: every logit is known.
        requests = proxykv.Requests([1, 2, 3], [4], [5, 6], 3)
        self.assertEqual(requests.chunks(5), [(0, 3), (3, 5)])
        self.assertEqual([requests.before(0), requests.before(3)], [5, 6])
        self.assertEqual(requests.ids([10, 11, 12, 13, 14], 3, 5), [4, 10, 11, 12, 5, 6, 13, 14])
        angle = 0.3
        at = lambda n: torch.tensor([math.cos(n * angle), math.sin(n * angle)])  # noqa: E731
        prefix, context = 2, 5
        keys = torch.stack([at(n) * (n + 1) for n in range(prefix + context)])
        queries = torch.stack([at(n) * 2 for n in range(prefix + context)])
        replay = _UnrunReplay(requests, torch.tensor([angle]), prefix, context)
        scores = {}
        for start, end in ((0, 1), (1, 4), (4, 7)):
            module = SimpleNamespace(scaling=0.7)
            layer = _Layer(0, queries[None, start:end], keys[None, :end], keys[None, :end], start, None, module)
            scores.update({(a, b): (x[0], y[0]) for a, b, x, y in replay.add(layer)})
        self.assertEqual(list(scores), [(0, 3), (3, 5)])
        for (start, end), (highest, mean) in scores.items():
            further = context - start + requests.before(start)
            rows = []
            for s in range(start, end):
                query = at(prefix + s + further) * 2
                logits = torch.stack([query @ keys[prefix + t] * 0.7 for t in range(start, end)])
                rows.append(logits.softmax(0))
            torch.testing.assert_close(highest, torch.stack(rows).amax(0))
            torch.testing.assert_close(mean, torch.stack(rows).mean(0))

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

    def test_a_tapped_prefill_gives_the_features_of_a_forward_of_its_own(self):
        model, prefix = pipe().model, frame().prefix
        ids = prefix + kept("own")["0.tokens"].tolist()
        for run in ("own", "both", "own-all", "both-all"):
            px = opened(run)
            whole = px.features(ids, len(prefix), model)
            # Some pieces are shorter than the prefix, than the 64 last queries, or one token.
            for ends in ([len(ids)], [5, 300, len(ids)], [len(prefix), 301, len(ids) - 30, len(ids) - 1, len(ids)]):
                cache, start = DynamicCache(), 0
                with px.tap(model, len(prefix), len(ids) - len(prefix)) as reading:
                    for end in ends:
                        model.model(input_ids=torch.tensor([ids[start:end]]), past_key_values=cache)
                        start = end
                for ours, theirs in zip(px.features(ids, len(prefix), reading), whole):
                    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
                # Reading them changes nothing.
                keep = px.keep(ids, len(prefix), 0.1, target=reading)
                self.assertTrue(torch.equal(keep, px.keep(ids, len(prefix), 0.1, target=reading)))
                with self.assertRaisesRegex(ValueError, "other tokens"):
                    px.keep(ids[:-1], len(prefix), 0.1, target=reading)
            self.assertFalse(any(layer.self_attn._forward_hooks for layer in model.model.layers))

    def test_a_target_that_is_a_source_is_asked_for(self):
        ids, model = torch.arange(20), pipe().model
        with self.assertRaisesRegex(ValueError, "`target=`"):
            opened("own").keep(ids, 3, 0.5)
        with self.assertRaisesRegex(ValueError, "mapper was trained for"):
            opened("own").keep(ids, 3, 0.5, target=opened("both").proxy)
        with self.assertRaisesRegex(ValueError, "reads the proxy alone"), opened("demo-nano").tap(model, 3):
            pass
        cache = DynamicCache()
        model.model(input_ids=ids[None], past_key_values=cache)
        with self.assertRaisesRegex(ValueError, "empty cache"), opened("own").tap(model, 3):
            model.model(input_ids=ids[None], past_key_values=cache)
        with self.assertRaisesRegex(ValueError, "one sequence"), opened("own").tap(model, 3):
            model.model(input_ids=ids.view(2, 10), past_key_values=DynamicCache())
        with opened("own").tap(model, 3) as reading:
            model.model(input_ids=ids[None, :3], past_key_values=DynamicCache())
        with self.assertRaisesRegex(ValueError, "no context"):
            opened("own").keep(ids[:3], 3, 0.5, target=reading)

    def test_a_proxy_that_is_no_source_is_not_looked_for(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(shutil.copytree(export("own"), Path(folder) / "export")) / "config.json"
            config = json.loads(path.read_text())
            self.assertNotIn("proxy", config)
            # Exports of earlier versions name one all the same.
            config["proxy"] = {"model": "absent/proxy"}
            path.write_text(json.dumps(config))
            px = proxykv.ProxyKV.from_pretrained(path.parent)
            self.assertIsNone(px.proxy)
            self.assertEqual(px.keep(torch.arange(30), 5, 0.2, target=pipe().model).sum(), 12 * 5 + 60)
            with self.assertRaisesRegex(ValueError, "target alone"):
                proxykv.ProxyKV.from_pretrained(path.parent, proxy=PROXY)
            config["extract"]["target_channels"][0] = "of_tomorrow"
            path.write_text(json.dumps(config))
            with self.assertRaisesRegex(ValueError, "of_tomorrow"):
                proxykv.ProxyKV.from_pretrained(path.parent)

    def test_a_proxy_that_is_a_source_must_be_named(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(shutil.copytree(export("both"), Path(folder) / "export")) / "config.json"
            config = json.loads(path.read_text())
            del config["proxy"]
            path.write_text(json.dumps(config))
            with self.assertRaisesRegex(ValueError, "names none"):
                proxykv.ProxyKV.from_pretrained(path.parent)

    def test_sources_are_joined_as_the_layout_of_the_rust_side_says(self):
        sections = [{"channels": channels, "globals": ["position", "surprisal"]} for channels in (["a", "b"], ["c", "b"])]
        parts = [(torch.arange(x, x + p * 6.0).view(p, 2, 3), torch.arange(x, x + 6.0).view(2, 3)) for x, p in ((100, 2), (500, 1))]
        heads, globals_ = proxykv.join_features(parts, sections)
        self.assertEqual(heads[0].tolist(), [[100, 101, 102], [103, 104, 105], [0, 0, 0]])
        self.assertEqual(heads[2].tolist(), [[0, 0, 0], [503, 504, 505], [500, 501, 502]])
        self.assertEqual(globals_.tolist(), [[100, 101, 102], [103, 104, 105], [503, 504, 505]])

    def test_every_architecture_is_scored_and_surprised_as_in_transformers(self):
        folders = sorted(path.parent for path in (Path(__file__).parents[3] / "crates/lm/tests/goldens").glob("arch-*/config.json"))
        self.assertEqual({AutoConfig.from_pretrained(folder).model_type for folder in folders}, set(MODEL_TYPES))
        for folder in folders:
            with self.subTest(folder.name):
                self.check_architecture(folder)

    def check_architecture(self, folder):
        golden = load_file(folder.with_suffix(".safetensors"))
        frame = json.loads(folder.with_suffix(".json").read_text())
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        prefix, chunk, ids, cache = frame["prefix_tokens"], frame["chunk"], golden["input_ids"], DynamicCache()
        extract = {"channels": ["max_all"], "globals": ["surprisal"], "prefill_chunk_tokens": 100, "min_distance": 0}
        extract |= {"window_tokens": 8, "last_queries": 8, "block_tokens": 64, "whole_range_stride": 1}
        reading = proxykv.Reading(model, extract, prefix)
        reading.prefill(ids)
        got_pct, got_ct = reading.features()
        with torch.no_grad():
            eager = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            whole = eager(ids[None], output_attentions=True)
            nats = torch.nn.functional.cross_entropy(whole.logits[0, :-1], ids[1:], reduction="none")
        torch.testing.assert_close(got_ct[0], nats[prefix - 1 :], atol=1e-4, rtol=0)
        for layer, weights in enumerate(whole.attentions):
            most = weights[0, :, prefix:, prefix:].amax(1).unflatten(0, (2, -1)).amax(1).log().clamp(-16, 16)
            torch.testing.assert_close(got_pct[2 * layer : 2 * layer + 2, 0], most, atol=1e-3, rtol=0)
        for part in range(3):
            start = prefix + part * chunk
            end, repeat, cache = min(start + chunk, ids.numel()), golden[f"original_repeat_ids_{part}"], DynamicCache()
            with torch.no_grad():
                model.model(input_ids=ids[None], past_key_values=cache)
                scores = []
                with _tap(model, lambda x: scores.append(_chunk_scores(x, prefix, start, end, False)[0])):
                    model.model(input_ids=repeat[None], past_key_values=cache)
            expected = golden["original_scores"][:, :, start:end]
            torch.testing.assert_close(torch.stack(scores), expected, atol=1e-4, rtol=0)

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
            _exact_frequencies(model)
            ours = model.model.rotary_emb.inv_freq
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
            self.assertFalse(torch.equal(ours, theirs), f"{scaling} was not recognized")


class Masks(unittest.TestCase):
    def test_masks_of_the_rust_scores_are_equal(self):
        for run in ("demo-nano", "other", "own", "both"):
            rust = kept(run)
            for i in contexts(run):
                for policy in proxykv.POLICIES:
                    for n, ratio in enumerate(rust["ratios"].tolist()):
                        beside = opened(run).budgets, rust[f"{i}.key_diff_lht"]
                        mask = proxykv.keep_mask(rust[f"{i}.scores_lht"], policy, ratio, *beside)
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
