"""The press in kvpress's pipeline: kept sets and answers equal those of `eval`."""

import copy
import json
import re
import unittest

import pyarrow.parquet as pq
import torch
from common import PROXY, RUNS, TARGET, contexts, export, frame, kept, opened, pipe, proxykv, results
from transformers import DynamicCache

RUN = "demo-nano"
SOURCES = {RUN: ["proxy"], "own": ["target"], "both": ["target", "proxy"]}


def press(run: str = RUN, **options):
    made = proxykv.ProxyKVPress(str(export(run)), **options)
    # One proxy for all tests: loading it is most of a press's time here.
    made._proxykv = opened(run)
    return made


class Press(unittest.TestCase):
    def ids(self, context: int, run: str = RUN) -> list[int]:
        return frame().prefix + kept(run)[f"{context}.tokens"].tolist()

    def prefill(self, ids: list[int], **options):
        made, cache = press(**options), DynamicCache()
        with torch.inference_mode(), made(pipe().model):
            pipe().model.model(input_ids=torch.tensor([ids]), past_key_values=cache)
        return made, cache

    def test_kept_sets_and_answers_are_those_of_eval(self):
        for run, sources in SOURCES.items():
            with self.subTest(run):
                self.assertEqual(list(opened(run).sources), sources)
                self.compare(run)

    def compare(self, run: str):
        rust, prefix = kept(run), len(frame().prefix)
        table = pq.read_table(RUNS / run / "eval/answers.parquet").to_pylist()
        asked = answered = silent = 0
        for i in contexts(run):
            rows = [r for r in table if r["context"] == i and r["method"] == "mapper"]
            for policy in proxykv.POLICIES:
                for n, ratio in enumerate(rust["ratios"].tolist()):
                    made = press(run, retention=ratio, policy=policy)
                    cell = [r for r in rows if r["policy"] == policy and r["ratio"] == ratio]
                    encode = pipe().tokenizer.encode
                    questions = [
                        torch.tensor([encode("\n\n" + r["question_text"], add_special_tokens=False) + frame().switch])
                        for r in cell
                    ]
                    self.assertEqual(len(questions), 4)
                    with torch.inference_mode():
                        answers = pipe()._forward(
                            {"context_ids": torch.tensor([self.ids(i, run)]), "questions_ids": questions},
                            press=made,
                            max_new_tokens=24,
                        )
                    expected = rust[f"{i}.{policy}"][n]
                    self.assertTrue(made.kept[..., :prefix].all())
                    different = (made.kept[..., prefix:] != expected).sum().item()
                    self.assertEqual(different, 0, f"context {i}, {policy} at {ratio}: {different} KV pairs differ")
                    asked += len(cell)
                    answered += sum(r["correct"] for r in cell)
                    for r, answer in zip(cell, answers):
                        # The pipeline leaves special tokens out, `eval` spells them.
                        expected = re.sub(r"<\|[^|]*\|>", "", r["answer"])
                        # Nor does it look for a stop token in an answer's first place.
                        if not expected:
                            silent += 1
                            continue
                        self.assertEqual(answer, expected, f"context {i}, {policy} at {ratio}: {r['question_text']}")
        print(f"\n  {run}: {asked - silent} answers agree, {answered} of them right; {silent} are empty", end="")
        self.assertGreater(answered, 0)
        self.assertLess(silent, asked / 4)

    def test_the_dump_is_of_the_sets_that_eval_measured(self):
        example, rust = results(RUN)["worked_example"], kept(RUN)
        self.assertEqual(example["policy"], "pair")
        for counted in example["kept"]:
            n = rust["ratios"].tolist().index(counted["ratio"])
            self.assertEqual(rust["0.pair"][n].sum((0, 1)).tolist(), counted["counts"])

    def test_the_cache_holds_what_is_kept_and_nothing_else_under_every_policy(self):
        ids, prefix = self.ids(0), len(frame().prefix)
        pair_bytes, positions = 2 * 32 * 4, len(ids) - prefix
        every_head = prefix + proxykv.kept_count(positions, 0.1)
        for policy in proxykv.POLICIES:
            made, cache = self.prefill(ids, retention=0.1, policy=policy)
            pairs = made.kept.sum().item()
            if policy in ("pair-uniform", "token"):
                self.assertEqual(pairs, 12 * every_head)
            else:
                self.assertEqual(pairs, 12 * prefix + proxykv.kept_count(12 * positions, 0.1))
            self.assertEqual(made.bytes, (12 * len(ids) * pair_bytes, pairs * pair_bytes))
            # Of memory, not of views.
            parts = [part for layer in cache.layers for x in (layer.keys, layer.values) for part in x.parts]
            storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
            self.assertEqual(sum(storages.values()), pairs * pair_bytes)
            # It goes on where the context ended.
            self.assertEqual(cache.get_seq_length(), len(ids))

    def test_a_context_in_pieces_is_one_context(self):
        ids = self.ids(1)
        for run in SOURCES:
            whole, _ = self.prefill(ids, run=run, retention=0.1)
            made, cache = press(run, compression_ratio=0.9), DynamicCache()
            with torch.inference_mode(), made(pipe().model):
                # The first piece ends within the chat template.
                for part in (ids[:5], ids[5:300], ids[300:]):
                    pipe().model.model(input_ids=torch.tensor([part]), past_key_values=cache)
            self.assertTrue(torch.equal(made.kept, whole.kept), run)

    def test_channels_of_an_unrun_replay_are_read_in_one_prefill(self):
        made, cache = self.prefill(self.ids(0), run="own-all", retention=0.1)
        n = kept("own-all")["ratios"].tolist().index(0.1)
        self.assertTrue(torch.equal(made.kept[..., len(frame().prefix) :], kept("own-all")[f"0.{made.policy}"][n]))
        cache = DynamicCache()
        with torch.inference_mode(), self.assertRaisesRegex(ValueError, "in one forward"), press("own-all", retention=0.1)(pipe().model):
            for part in (self.ids(0)[:300], self.ids(0)[300:]):
                pipe().model.model(input_ids=torch.tensor([part]), past_key_values=cache)

    def test_the_target_is_run_once_whatever_it_is_read_for(self):
        model, calls = pipe().model, []
        hook = model.model.register_forward_hook(lambda *_: calls.append(1))
        self.addCleanup(hook.remove)
        for run in SOURCES:
            self.prefill(self.ids(0), run=run, retention=0.1)
            self.assertEqual(len(calls), 1, run)
            calls.clear()

    def test_text_goes_through_the_pipeline(self):
        fact = " The access code for the silver lantern is 48213."
        # Of the kind that the pair was trained on.
        with open("data-manifests/demo/sqlite-docs.jsonl", encoding="utf-8") as documents:
            text = json.loads(documents.readline())["text"]
        context = text[:700] + fact + text[700:1400]
        question = "\n\nWhat is the access code for the silver lantern?"
        answers = [
            pipe()(context, question=question, press=made)["answer"] for made in (None, press(retention=0.5), press())
        ]
        self.assertEqual(answers, ["48213"] * 3)

    def test_no_compression_leaves_the_cache_alone(self):
        made, cache = self.prefill(self.ids(0))
        self.assertIsNone(made.kept)
        self.assertEqual(cache.get_seq_length(), len(self.ids(0)))

    def test_the_evaluation_cli_can_set_the_ratio(self):
        made = press()
        self.assertTrue(hasattr(made, "compression_ratio"))
        made.compression_ratio = 0.95
        self.assertIn("compression_ratio=0.95", str(made))

    def test_what_cannot_work_is_refused(self):
        model = pipe().model
        with self.assertRaisesRegex(ValueError, "policy `head` is not known"):
            press(policy="head")
        made = press(retention=0.1, policy="pair-budget")
        made._proxykv = copy.copy(made._proxykv)
        made._proxykv.budgets = None
        with self.assertRaisesRegex(ValueError, "needs head budgets"), made(model):
            pass
        with self.assertRaisesRegex(ValueError, "kept share"):
            press(retention=5)
        with self.assertRaisesRegex(ValueError, "not both"):
            press(retention=0.5, compression_ratio=0.5)
        with self.assertRaisesRegex(ValueError, "one sequence"), press(retention=0.1)(model):
            model.model(input_ids=torch.zeros(2, 8, dtype=torch.long), past_key_values=DynamicCache())
        with self.assertRaisesRegex(ValueError, "mapper was trained for"), press(retention=0.1)(opened(RUN).proxy):
            pass
        with self.assertRaisesRegex(ValueError, "the proxy has layers"):
            proxykv.ProxyKV.from_pretrained(export(RUN), proxy=TARGET)

    def test_the_proxy_may_lie_elsewhere(self):
        made = proxykv.ProxyKVPress(str(export(RUN)), retention=0.1, proxy=PROXY)
        with torch.inference_mode(), made(pipe().model):
            pipe().model.model(input_ids=torch.tensor([self.ids(0)]), past_key_values=DynamicCache())
        self.assertTrue(torch.equal(made.kept, self.prefill(self.ids(0), retention=0.1)[0].kept))


if __name__ == "__main__":
    unittest.main()
