//! Scoring through a model at odd sizes: against loops over recorded queries and keys, and against
//! itself with other chunk sizes.

use pkv_core::Hinted;
use pkv_lm::{KvCache, LayerView, NoTap, Tap};
use pkv_recipe::{LabelPreset, LabelSection, Sink};
use pkv_score::{ContextScores, Scorer, WINDOW, window_scores};
use pkv_test_pair::{Reader, Recorder};
use pkv_test_support::loops::{attention_weights, difference};
use pkv_test_support::tensors::flat;
use tch::Tensor;

fn scorer<'a>(nano: &'a Reader, label: &LabelSection) -> Scorer<'a> {
    Scorer::new(&nano.model, &nano.tokenizer, label).unwrap()
}

fn label(preset: LabelPreset, chunk_tokens: usize) -> LabelSection {
    LabelSection { preset, chunk_tokens: Some(chunk_tokens), ..LabelSection::default() }
}

/// KVzip by its definition: [layer, KV head, position], maximum and mean.
fn naive(nano: &Reader, context: &[u32], chunk: usize, sink: usize) -> (Vec<f64>, Vec<f64>) {
    let shape = nano.model.shape();
    let prefix = nano.tokenizer.prefix();
    let mut max = vec![0.0; shape.layers * shape.kv_heads * context.len()];
    let mut mean = max.clone();
    let request = |start: usize| -> Vec<u32> {
        let text = if start == 0 {
            "\n\nRepeat the previous context exactly."
        } else {
            "\n\nRepeat the part of the previous context exactly, starting with "
        };
        let mut ids = nano.tokenizer.encode(text).unwrap();
        let before: Vec<u32> = context[..start].iter().rev().take(chunk.min(8)).rev().copied().collect();
        ids.extend(before);
        ids.extend(nano.tokenizer.switch());
        ids
    };
    for start in (0..context.len()).step_by(chunk) {
        let end = context.len().min(start + chunk);
        let held = [prefix, context].concat();
        let new = [&request(start), &context[start..end]].concat();
        let mut cache = nano.model.new_cache(held.len() + new.len());
        let _ = nano.model.prefill(&held, &mut cache, 1000, &mut NoTap).unwrap();
        let mut recorder = Recorder::default();
        let _ = nano.model.forward(&nano.model.ids(&new), &mut cache, &mut recorder).unwrap();
        let d = shape.head_dim;
        let rows = new.len();
        for (l, [queries, keys, _]) in recorder.layers.iter().enumerate() {
            for q in 0..shape.query_heads {
                let h = q / shape.group();
                let key = |k: usize| &keys[(h * (held.len() + rows) + k) * d..][..d];
                for r in 0..rows {
                    let query = &queries[(q * rows + r) * d..][..d];
                    let chunk_keys = prefix.len() + start..prefix.len() + end;
                    let seen = (0..sink).chain(chunk_keys).chain(held.len()..held.len() + r + 1);
                    let weights = attention_weights(query, seen.map(key), 1.0 / (d as f64).sqrt());
                    for t in start..end {
                        let at = (l * shape.kv_heads + h) * context.len() + t;
                        let weight = weights[sink + t - start];
                        max[at] = f64::max(max[at], weight);
                        mean[at] += weight / (rows * shape.group()) as f64;
                    }
                }
            }
        }
    }
    (max, mean)
}

fn off(scores: &ContextScores, expected: &(Vec<f64>, Vec<f64>)) -> f64 {
    difference(&flat(&scores.max_lht), &expected.0)
        .max(difference(&flat(scores.mean_lht.as_ref().unwrap()), &expected.1))
}

#[test]
fn odd_sizes_match_loops_over_recorded_queries() {
    let nano = Reader::proxy();
    let prefix = nano.tokenizer.prefix().len();
    assert!(prefix > 5, "the prefix is the sink that contexts of 1 and 5 are shorter than");
    // One-token context, shorter than the sink, one-token last chunk, one-token chunks.
    for (tokens, chunk) in [(1, 2000), (5, 2000), (15, 7), (4, 1), (31, 13)] {
        let context = nano.context(tokens);
        let scores = scorer(&nano, &label(LabelPreset::Original, chunk)).score(&context).unwrap();
        let off = off(&scores, &naive(&nano, &context, chunk, prefix));
        assert!(off < 1e-5, "{tokens} tokens in chunks of {chunk}: off by {off:e}");
    }
}

#[test]
fn the_sink_can_be_chosen() {
    let nano = Reader::proxy();
    let context = nano.context(15);
    for sink in [0, 3, 1000] {
        let label = LabelSection { sink: Some(Sink::Tokens(sink)), ..label(LabelPreset::Original, 7) };
        let scores = scorer(&nano, &label).score(&context).unwrap();
        let expected = naive(&nano, &context, 7, sink.min(nano.tokenizer.prefix().len()));
        let off = off(&scores, &expected);
        assert!(off < 1e-5, "a sink of {sink}: off by {off:e}");
    }
}

#[test]
fn prefill_chunks_change_nothing_and_the_cache_stays() {
    let nano = Reader::proxy();
    let context = nano.context(31);
    for preset in LabelPreset::ALL {
        let label = label(preset, 13);
        let whole = scorer(&nano, &label).score(&context).unwrap();
        let expected = (flat(&whole.max_lht), flat(whole.mean_lht.as_ref().unwrap()));
        let scale = expected.0.iter().copied().fold(1.0, f64::max);
        for prefill_chunk_tokens in [1, 10] {
            let label = LabelSection { prefill_chunk_tokens, ..label.clone() };
            let off = off(&scorer(&nano, &label).score(&context).unwrap(), &expected);
            assert!(off < 1e-5 * scale, "{preset:?}, prefill in chunks of {prefill_chunk_tokens}: {off:e}");
        }
        let scorer = scorer(&nano, &label);
        let ids = [nano.tokenizer.prefix(), &context].concat();
        let mut cache = nano.model.new_cache(scorer.cache_capacity(context.len()));
        let _ = nano.model.prefill(&ids, &mut cache, 1000, &mut NoTap).unwrap();
        for _ in 0..2 {
            let again = scorer.score_cached(&context, &cache).unwrap();
            assert_eq!(off(&again, &expected), 0.0, "{preset:?}: a second scoring differs");
            assert_eq!(cache.len(), ids.len());
        }
    }
}

#[test]
fn packs_change_nothing() {
    let nano = Reader::proxy();
    let context = nano.context(31);
    for preset in LabelPreset::ALL {
        // Chunks of 7, 7, 7, 7 and 3 tokens.
        let packed = |pack_tokens| {
            let label = LabelSection { pack_tokens, ..label(preset, 7) };
            scorer(&nano, &label).score(&context).unwrap()
        };
        let one = packed(Some(1));
        let expected = (flat(&one.max_lht), flat(one.mean_lht.as_ref().unwrap()));
        let scale = expected.0.iter().copied().fold(1.0, f64::max);
        let repeat = scorer(&nano, &label(preset, 7)).requests().ids(&context, &(7..14)).len();
        for pack_tokens in [None, Some(2 * repeat), Some(3 * repeat), Some(1 << 20)] {
            let off = off(&packed(pack_tokens), &expected);
            assert!(off < 1e-5 * scale, "{preset:?}, packs of {pack_tokens:?} tokens: off by {off:e}");
        }
    }
}

/// SnapKV's scores from the queries of the prefill itself.
struct Tail<'a>(&'a KvCache, usize, Vec<Tensor>);

impl Tap for Tail<'_> {
    fn layer(&mut self, view: &LayerView) -> anyhow::Result<()> {
        let rows = view.q_qsd.size()[1];
        let q_qwd = view.q_qsd.narrow(1, rows - rows.min(WINDOW), rows.min(WINDOW));
        self.2.push(window_scores(&q_qwd, &self.0.keys(view.layer), view.scale, self.1)?);
        Ok(())
    }
}

#[test]
fn a_scorer_without_a_repeat_gives_what_the_prefill_shows() {
    let nano = Reader::proxy();
    let label = LabelSection { scorer: Some("snapkv".to_owned()), ..LabelSection::default() };
    for tokens in [1, 31, 90] {
        let (context, scorer) = (nano.context(tokens), scorer(&nano, &label));
        let cache = scorer.prefill(&context).unwrap();
        let scores = scorer.score_cached(&context, &cache).unwrap();
        assert!(scores.mean_lht.is_none());
        let ids = [nano.tokenizer.prefix(), &context].concat();
        let mut tail = Tail(&cache, nano.tokenizer.prefix().len(), Vec::new());
        let mut again = nano.model.new_cache(ids.len());
        let _ = nano.model.forward(&nano.model.ids(&ids), &mut again, &mut tail).unwrap();
        let off = difference(&flat(&scores.max_lht), &flat(&Tensor::stack(&tail.2, 0)));
        assert!(off < 1e-5, "{tokens} tokens: off by {off:e}");
    }
}

#[test]
fn what_cannot_be_scored_is_an_error() {
    let nano = Reader::proxy();
    let scorer = scorer(&nano, &label(LabelPreset::Original, 7));
    let error = scorer.score(&[]).err().unwrap();
    assert!(error.to_string().contains("empty context"), "{error}");
    assert!(error.downcast_ref::<Hinted>().is_some());
    let error = scorer.score(&[u32::MAX]).err().unwrap();
    assert!(format!("{error:#}").contains("vocabulary"), "{error:#}");

    let context = nano.context(9);
    let ids = [nano.tokenizer.prefix(), &context].concat();
    let filled = |capacity: usize| -> KvCache {
        let mut cache = nano.model.new_cache(capacity);
        let _ = nano.model.prefill(&ids, &mut cache, 1000, &mut NoTap).unwrap();
        cache
    };
    let say = |context: &[u32], capacity: usize| {
        scorer.score_cached(context, &filled(capacity)).err().unwrap().to_string()
    };
    assert!(say(&context[..5], 200).contains("expected 22"));
    assert!(
        scorer.score_cached(&context, &filled(ids.len())).is_ok(),
        "no room beyond the context is needed"
    );
}
