"""A pruned cache in transformers' own `generate`: answers and bytes are those of `infer`."""

import json
import unittest

import torch
from common import RUNS, TARGET, frame, opened, pipe, proxykv, target
from proxykv.cache import _hide
from transformers import AutoModelForCausalLM, DynamicCache


def prefill(model, ids: list[int]) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        model.model(input_ids=torch.tensor([ids]), past_key_values=cache)
    return cache


def ask(model, cache, ids: list[int], question: list[int], **options) -> torch.Tensor:
    """The answer's tokens, which the cache then forgets."""
    whole = torch.tensor([ids + question])
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **options}
    answer = model.generate(whole, attention_mask=torch.ones_like(whole), past_key_values=cache, **options)
    cache.crop(len(ids))
    return answer[0, whole.shape[1] :]


class Generate(unittest.TestCase):
    def setUp(self):
        self.model, self.tokenizer = pipe().model, pipe().tokenizer
        self.encode = lambda text: self.tokenizer.encode(text, add_special_tokens=False)
        self.prefix = len(frame().prefix)
        self.ids = frame().prefix + self.encode((RUNS / "context.txt").read_text())
        self.question = self.encode("\n\nWhat is the access code for the silver lantern?") + frame().switch

    def random_mask(self, seed: int) -> torch.Tensor:
        """Heads of every length, one that keeps all, one that keeps nothing, neighbours that keep equally many."""
        random = torch.Generator().manual_seed(seed)
        keep = torch.rand(6, 2, len(self.ids), generator=random) < torch.rand(6, 2, 1, generator=random)
        keep[0, 0], keep[0, 1] = True, False
        keep[1, 1] = keep[1, 0].roll(1)
        return keep

    def test_answers_and_bytes_are_those_of_infer(self):
        asked = 0
        for run in ("demo-nano", "own", "both-all"):
            for policy in proxykv.POLICIES:
                events = [json.loads(line) for line in (RUNS / run / f"infer-{policy}.jsonl").read_text().splitlines()]
                pruned = next(e for e in events if e.get("event") == "pruned")
                cache = prefill(self.model, self.ids)
                keep = opened(run).keep(self.ids, self.prefix, 0.1, policy, target(run), cache)
                self.assertEqual(keep.sum().item(), pruned["kept"]["pairs"] + pruned["kept"]["prefix_pairs"])
                held = proxykv.evict(self.model, cache, keep)
                self.assertEqual(held, (pruned["kept"]["full_cache_bytes"], pruned["kept"]["kept_bytes"]))
                for e in (e for e in events if e.get("event") == "answer"):
                    question = self.encode("\n\n" + e["question_text"]) + frame().switch
                    answer = ask(self.model, cache, self.ids, question)
                    self.assertEqual(self.tokenizer.decode(answer, skip_special_tokens=True), e["text"], f"{run}, {policy}")
                    asked += 1
                self.assertEqual(proxykv.cache_bytes(cache), held.after)
        self.assertEqual(asked, 9 * len(proxykv.POLICIES))

    def test_logits_are_those_of_a_full_cache_in_which_evicted_pairs_are_masked(self):
        question, end = torch.tensor([self.question]), len(self.ids)
        for implementation in ("sdpa", "eager"):
            model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32, attn_implementation=implementation)
            for seed in (1, 2):
                keep, masked, cache = self.random_mask(seed), prefill(model, self.ids), prefill(model, self.ids)
                proxykv.evict(model, cache, keep)
                # In two pieces and then as one, so that new tokens see the ones before them.
                with torch.no_grad():
                    parts = [model(part, past_key_values=cache).logits for part in question.split(5, 1)]
                    cache.crop(end)
                    whole = model(question, past_key_values=cache).logits
                    expected = self.masked(model, masked, keep, question)
                torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-3, rtol=0)
                torch.testing.assert_close(whole, expected, atol=1e-3, rtol=0)

    def masked(self, model, cache, keep, question):
        """Logits with a mask of its own for each layer and head, by an attention written out."""
        s, end = question.shape[1], len(self.ids)
        hidden = []

        def attend(module, args, kwargs, output):
            x = kwargs["hidden_states"]
            q, k, v = (p(x).view(1, s, -1, 32).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
            cos, sin = (y.unsqueeze(1) for y in kwargs["position_embeddings"])
            turned = lambda y: y * cos + torch.cat((-y[..., 16:], y[..., :16]), -1) * sin  # noqa: E731
            held = full[module.layer_idx]
            k, v = torch.cat([held[0], turned(k)], 2), torch.cat([held[1], v], 2)
            seen = torch.cat([keep[module.layer_idx][:, None].expand(-1, s, -1), torch.ones(2, s, s, dtype=torch.bool).tril()], 2)
            k, v, seen = (y.repeat_interleave(2, -3) for y in (k, v, seen[None]))
            weights = (turned(q) @ k.transpose(2, 3) / 32**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
            hidden.append(module.layer_idx)
            return module.o_proj((weights @ v).transpose(1, 2).reshape(1, s, -1)), None

        full = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        hooks = [layer.self_attn.register_forward_hook(attend, with_kwargs=True) for layer in model.model.layers]
        try:
            logits = model(question, past_key_values=cache).logits
        finally:
            for hook in hooks:
                hook.remove()
        self.assertEqual(hidden, list(range(6)))
        self.assertEqual(cache.get_seq_length(), end + s)
        return logits

    def test_pairs_that_kvpress_hides_in_a_quantized_cache_count_as_evicted(self):
        # Hiding acts on the keys that attention gets, whatever the cache holds them as.
        keep, question = self.random_mask(4), torch.tensor([self.question])
        _hide(self.model, keep)
        self.addCleanup(lambda: [setattr(layer.self_attn, "masked_key_indices", None) for layer in self.model.model.layers])
        cache = DynamicCache()
        full = prefill(AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32), self.ids)
        for layer, held in enumerate(full.layers):
            cache.update(held.keys, held.values, layer)
        with torch.no_grad():
            logits = self.model(question, past_key_values=cache).logits
            expected = self.masked(AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32), full, keep, question)
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)
        eager = AutoModelForCausalLM.from_pretrained(TARGET, attn_implementation="eager")
        with self.assertRaisesRegex(ValueError, "`eager`"):
            _hide(eager, keep)

    def test_a_cache_that_keeps_everything_answers_as_an_ordinary_one(self):
        cache, full = prefill(self.model, self.ids), prefill(self.model, self.ids)
        proxykv.evict(self.model, cache, torch.ones(6, 2, len(self.ids), dtype=torch.bool))
        # Both are read in turn: an ordinary cache is read as before.
        for _ in range(2):
            answers = [ask(self.model, c, self.ids, self.question).tolist() for c in (cache, full)]
            self.assertEqual(*answers)
        self.assertIn("48213", self.tokenizer.decode(answers[0]))

    def test_what_a_pruned_cache_cannot_do_is_refused(self):
        cache = prefill(self.model, self.ids)
        keep = self.random_mask(3)
        with self.assertRaisesRegex(ValueError, "needs a whole cache"):
            proxykv.evict(self.model, cache, keep[:, :, 1:])
        with self.assertRaisesRegex(ValueError, "needs a whole cache"):
            proxykv.evict(self.model, cache, keep[:5])
        proxykv.evict(self.model, cache, keep)
        with self.assertRaisesRegex(ValueError, "needs a whole cache"):
            proxykv.evict(self.model, cache, keep)
        with self.assertRaisesRegex(ValueError, "less than its context"):
            cache.crop(len(self.ids) - 1)
        with self.assertRaisesRegex(ValueError, "first positions"):
            cache.layers[0].keys[:, :1]
        with self.assertRaisesRegex(ValueError, "one sequence, 2 came"):
            ask(self.model, cache, self.ids, self.question, num_beams=2)
        # None of it touched what the cache holds.
        self.assertEqual(proxykv.cache_bytes(cache), keep.sum().item() * 2 * 32 * 4)
        with self.assertRaisesRegex(ValueError, "was pruned"), opened("own").tap(self.model, self.prefix):
            self.model.model(input_ids=torch.tensor([self.question]), past_key_values=cache)


if __name__ == "__main__":
    unittest.main()
