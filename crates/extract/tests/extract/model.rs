//! Features of the nano proxy: against loops over its recorded queries, keys and values, and
//! against themselves with other block, chunk and context sizes.

use std::fs;
use std::ops::Range;

use pkv_core::{Channel, GlobalChannel, Hinted, Pass};
use pkv_extract::{ContextFeatures, Extractor};
use pkv_lm::NoTap;
use pkv_recipe::{ExtractSection, LabelSection};
use pkv_score::{Requests, Scorer};
use pkv_test_pair::{Reader, Recorder, device};
use pkv_test_support::files::nano;
use pkv_test_support::loops::{attention_weights, difference, dot};
use pkv_test_support::tensors::flat;
use tch::{Kind, Tensor};

use crate::reference::Reference;

fn features(nano: &Reader, extract: &ExtractSection, context: &[u32]) -> ContextFeatures {
    Extractor::new(&nano.model, &nano.tokenizer, extract, &label()).unwrap().features(context).unwrap()
}

/// Every channel but the fitted one, which `hidden` holds; sizes small enough for short texts to have all
/// kinds of positions.
fn extract() -> ExtractSection {
    ExtractSection {
        channels: Channel::ALL.iter().rev().filter(|c| !c.is_fitted()).copied().collect(),
        window_tokens: 16,
        last_queries: 9,
        ..ExtractSection::default()
    }
}

/// Scoring chunks that do not divide the contexts.
fn label() -> LabelSection {
    LabelSection { chunk_tokens: Some(40), ..LabelSection::default() }
}

/// A rotated vector, `by` positions further on: the pair (i, i + half) turned by `by` times its frequency.
fn turned(x: &[f64], frequencies: &[f64], by: f64) -> Vec<f64> {
    let half = x.len() / 2;
    let turn = |d: usize| {
        let (i, (sin, cos)) = (d % half, (by * frequencies[d % half]).sin_cos());
        if d < half { x[i] * cos - x[i + half] * sin } else { x[i + half] * cos + x[i] * sin }
    };
    (0..x.len()).map(turn).collect()
}

/// All features by their definitions: `[proxy head, channel, position]` and `[global, position]`.
fn naive(nano: &Reader, context: &[u32], extract: &ExtractSection) -> (Vec<f64>, Vec<f64>) {
    let shape = nano.model.shape();
    let (prefix, total) = (nano.tokenizer.prefix().len(), context.len());
    let sizes = Reference {
        heads: shape.kv_heads,
        group: shape.group(),
        head_dim: shape.head_dim,
        scale: nano.model.config().architecture.score_scale,
        prefix,
        context: total,
        min_distance: extract.min_distance,
        window: extract.window_tokens,
        last: extract.last_queries,
        stride: extract.whole_range_stride,
    };
    let ids = [nano.tokenizer.prefix(), context].concat();
    let mut recorder = Recorder::default();
    let mut cache = nano.model.new_cache(ids.len());
    let hidden = nano.model.forward(&nano.model.ids(&ids), &mut cache, &mut recorder).unwrap();

    let repeated = Scorer::new(&nano.model, &nano.tokenizer, &label()).unwrap().score(context).unwrap();
    let further: Vec<(Range<usize>, f64)> = {
        let requests = Requests::new(&nano.tokenizer, &label()).unwrap();
        let further = |c: Range<usize>| {
            let at = requests.ids(context, &c).len() - c.len();
            let further = (total + at - c.start) as f64;
            (c, further)
        };
        requests.chunks(total).map(further).collect()
    };
    let frequencies = nano.model.config().rope.frequencies(shape.head_dim);
    let (max, mean) = (flat(&repeated.max_lht), flat(repeated.mean_lht.as_ref().unwrap()));
    let mut heads = Vec::new();
    for (l, [q, k, v]) in recorder.layers.iter().enumerate() {
        let mut layer = sizes.channels(&extract.channels, q, k);
        let norm = |vectors: &[f64], h: usize, t: usize| -> f64 {
            let at = (h * ids.len() + prefix + t) * shape.head_dim;
            vectors[at..][..shape.head_dim].iter().map(|x| x * x).sum::<f64>().sqrt()
        };
        for (i, slot) in layer.iter_mut().enumerate() {
            let (t, c, h) =
                (i % total, i / total % extract.channels.len(), i / total / extract.channels.len());
            let key = |t: usize| &k[(h * ids.len() + prefix + t) * shape.head_dim..][..shape.head_dim];
            let unrun = || {
                let (chunk, further) = further.iter().find(|(c, _)| c.contains(&t)).unwrap();
                let mut weights = Vec::new();
                for q_head in h * shape.group()..(h + 1) * shape.group() {
                    for i in chunk.clone() {
                        let at = (q_head * ids.len() + prefix + i) * shape.head_dim;
                        let query = turned(&q[at..][..shape.head_dim], &frequencies, *further);
                        weights.push(
                            attention_weights(&query, chunk.clone().map(key), sizes.scale)[t - chunk.start],
                        );
                    }
                }
                weights
            };
            let p = max[(l * shape.kv_heads + h) * total + t];
            *slot = match extract.channels[c] {
                Channel::KeyNorm => norm(k, h, t).ln(),
                Channel::ValueNorm => norm(v, h, t).max(1e-4).ln(),
                Channel::ReconLog => p.ln().clamp(-16.0, 0.0),
                Channel::ReconLogOdds => (p.ln() - (-p.min(1.0 - 1e-6)).ln_1p()).clamp(-14.0, 14.0),
                Channel::ReplayUnrun => unrun().into_iter().map(f64::ln).fold(-16.0, f64::max),
                Channel::ReplayUnrunMean => {
                    let weights = unrun();
                    (weights.iter().sum::<f64>() / weights.len() as f64 + 1e-7).ln().max(-16.0)
                }
                Channel::KeyDiff => {
                    // All cached positions, prefix included.
                    let unit = |i: usize| -> Vec<f64> {
                        let key = &k[(h * ids.len() + i) * shape.head_dim..][..shape.head_dim];
                        key.iter().map(|x| x / dot(key, key).sqrt()).collect()
                    };
                    let keys: Vec<Vec<f64>> = (0..ids.len()).map(unit).collect();
                    let mean: Vec<f64> =
                        (0..shape.head_dim).map(|d| keys.iter().map(|key| key[d]).sum()).collect();
                    -dot(&keys[prefix + t], &mean) / dot(&mean, &mean).sqrt()
                }
                Channel::ReconMean => (mean[(l * shape.kv_heads + h) * total + t] + 1e-7).ln(),
                other if matches!(other.pass(), Pass::WholeRange | Pass::Window | Pass::Last) => *slot,
                _ => f64::NAN,
            };
        }
        heads.extend(layer);
    }

    let mut globals = Vec::new();
    for channel in &extract.globals {
        for t in 0..total {
            globals.push(match channel {
                GlobalChannel::Surprisal if prefix + t == 0 => 0.0,
                GlobalChannel::Surprisal => {
                    let logits = flat(&nano.model.logits(&hidden.get((prefix + t) as i64 - 1)));
                    let top = logits.iter().copied().fold(f64::MIN, f64::max);
                    let total = logits.iter().map(|x| (x - top).exp()).sum::<f64>().ln() + top;
                    total - logits[context[t] as usize]
                }
                GlobalChannel::Position => t as f64 / total as f64,
                GlobalChannel::LogPosition => (t as f64 + 1.0).ln(),
                GlobalChannel::LogRemaining => ((total - t) as f64).ln(),
            });
        }
    }
    (heads, globals)
}

fn compare(what: &str, found: &ContextFeatures, expected: &(Vec<f64>, Vec<f64>), tolerance: f64) {
    let (heads, globals) = (flat(&found.heads_pct), flat(&found.globals_ct));
    // Channels without a definition here have one beside their code.
    let defined = |from: &[f64]| -> Vec<f64> {
        from.iter().zip(&expected.0).filter(|(_, e)| !e.is_nan()).map(|(x, _)| *x).collect()
    };
    let off = (difference(&defined(&heads), &defined(&expected.0)), difference(&globals, &expected.1));
    assert!(off.0 < tolerance && off.1 < tolerance, "{what}: off by {off:?}, tolerance {tolerance}");
}

#[test]
fn every_channel_matches_its_definition() {
    let nano = Reader::proxy();
    for tokens in [1, 2, 4, 6, 17, 90] {
        let context = nano.context(tokens);
        let found = features(&nano, &extract(), &context);
        let shape = nano.model.shape();
        assert_eq!(
            found.heads_pct.size(),
            [shape.total_kv_heads() as i64, extract().channels.len() as i64, tokens as i64]
        );
        assert_eq!(found.globals_ct.size(), [4, tokens as i64]);
        assert_eq!((found.heads_pct.kind(), found.globals_ct.kind()), (Kind::Float, Kind::Float));
        compare(&format!("{tokens} tokens"), &found, &naive(&nano, &context, &extract()), 1e-5);
    }
}

#[test]
fn without_a_chat_template_there_is_no_prefix() {
    let bare = tempfile::tempdir().unwrap();
    fs::copy(nano("proxy").join("tokenizer.json"), bare.path().join("tokenizer.json")).unwrap();
    let nano = Reader::with(bare.path(), Kind::Float);
    assert!(nano.tokenizer.prefix().is_empty());
    for tokens in [1, 50] {
        let context = nano.context(tokens);
        let found = features(&nano, &extract(), &context);
        compare(&format!("{tokens} tokens"), &found, &naive(&nano, &context, &extract()), 1e-5);
        assert_eq!(found.globals_ct.double_value(&[0, 0]), 0.0, "nothing predicts the first token");
    }
}

#[test]
fn blocks_and_prefill_chunks_change_nothing() {
    // In f64 where models have it, so that what the model itself rounds differently (1e-4 in f32)
    // does not hide a mistake.
    let on_cpu = device() == tch::Device::Cpu;
    let nano = Reader::with(&nano("proxy"), if on_cpu { Kind::Double } else { Kind::Float });
    let model_tolerance = if on_cpu { 1e-5 } else { 3e-4 };
    let context = nano.context(90);
    let whole = features(&nano, &extract(), &context);
    let expected = (flat(&whole.heads_pct), flat(&whole.globals_ct));
    for block_tokens in [1, 7, 50, 90] {
        let extract = ExtractSection { block_tokens, ..extract() };
        compare(&format!("blocks of {block_tokens}"), &features(&nano, &extract, &context), &expected, 1e-5);
    }
    // Prefix and context have 107 tokens; 17 is where the one ends and the other begins.
    for prefill_chunk_tokens in [1, 16, 17, 18, 40, 106] {
        let extract = ExtractSection { prefill_chunk_tokens, block_tokens: 11, ..extract() };
        compare(
            &format!("prefill in chunks of {prefill_chunk_tokens}"),
            &features(&nano, &extract, &context),
            &expected,
            model_tolerance,
        );
    }
}

#[test]
fn windowed_channels_do_not_see_what_comes_later() {
    let nano = Reader::proxy();
    let extract = extract();
    let (short, long) = (nano.context(60), nano.context(90));
    let (a, b) = (features(&nano, &extract, &short), features(&nano, &extract, &long));
    let channel = |features: &ContextFeatures, channel: Channel, positions: usize| {
        let at = extract.channels.iter().position(|c| *c == channel).unwrap();
        flat(&features.heads_pct.select(1, at as i64).narrow(1, 0, positions as i64))
    };
    // The last position whose window of 16 queries lies inside the shorter context.
    let inside = short.len() - extract.window_tokens;
    let local = [Channel::MaxWindow, Channel::MeanWindow, Channel::KeyNorm, Channel::ValueNorm];
    for c in local {
        let off = difference(&channel(&a, c, inside), &channel(&b, c, inside));
        assert!(off < 1e-5, "{c:?}: off by {off}");
    }
    // One position further the window is cut, and the channels that read everything differ anyway.
    assert!(
        difference(
            &channel(&a, Channel::MeanWindow, inside + 4),
            &channel(&b, Channel::MeanWindow, inside + 4)
        ) > 1e-3
    );
    for c in [Channel::MaxAll, Channel::MeanAll, Channel::MaxLast, Channel::MeanLast] {
        assert!(difference(&channel(&a, c, inside), &channel(&b, c, inside)) > 1e-3, "{c:?}");
    }
    let surprisal = |features: &ContextFeatures| flat(&features.globals_ct.get(0).narrow(0, 0, 60));
    assert!(difference(&surprisal(&a), &surprisal(&b)) < 1e-4);
}

#[test]
fn only_what_is_chosen_comes_out() {
    let nano = Reader::proxy();
    let context = nano.context(50);
    let all = features(&nano, &extract(), &context);
    let some = ExtractSection {
        channels: vec![Channel::ValueNorm, Channel::MaxWindow, Channel::ReconLogOdds],
        globals: vec![GlobalChannel::LogRemaining],
        ..extract()
    };
    let found = features(&nano, &some, &context);
    for (at, channel) in some.channels.iter().enumerate() {
        let expected = extract().channels.iter().position(|c| c == channel).unwrap();
        let (a, b) = (found.heads_pct.select(1, at as i64), all.heads_pct.select(1, expected as i64));
        assert!(difference(&flat(&a), &flat(&b)) < 1e-6, "{channel:?}");
    }
    assert_eq!(flat(&found.globals_ct), flat(&all.globals_ct.get(3)));
    let none = ExtractSection { globals: vec![], channels: vec![Channel::KeyNorm], ..extract() };
    assert_eq!(features(&nano, &none, &context).globals_ct.size(), [0, 50]);
}

#[test]
fn what_has_no_features_is_an_error() {
    let nano = Reader::proxy();
    let extractor = Extractor::new(&nano.model, &nano.tokenizer, &extract(), &label()).unwrap();
    let error = extractor.features(&[]).err().unwrap();
    assert!(error.to_string().contains("empty context"), "{error}");
    assert!(error.downcast_ref::<Hinted>().is_some());
    let error = extractor.features(&[1, u32::MAX]).err().unwrap();
    assert!(format!("{error:#}").contains("vocabulary"), "{error:#}");
}

/// The extractor reads what `prefill` would: a cache filled by it holds the same keys.
#[test]
fn features_are_those_of_a_plain_prefill() {
    let nano = Reader::proxy();
    let context = nano.context(40);
    let ids = [nano.tokenizer.prefix(), &context].concat();
    let mut cache = nano.model.new_cache(ids.len());
    let _ = nano.model.prefill(&ids, &mut cache, 1000, &mut NoTap).unwrap();
    let extract = ExtractSection { channels: vec![Channel::KeyNorm], globals: vec![], ..extract() };
    let found = flat(&features(&nano, &extract, &context).heads_pct);
    let last = nano.model.shape().layers - 1;
    let keys_hkd = cache.keys(last).narrow(1, nano.tokenizer.prefix().len() as i64, 40);
    let norms = flat(&keys_hkd.square().sum_dim_intlist([2i64].as_slice(), false, Kind::Float).sqrt().log());
    assert!(difference(&found[found.len() - norms.len()..], &norms) < 1e-5);
}

/// Read chunk by chunk, features are final as far as the stream says, and in the end they are those of
/// a whole reading.
#[test]
fn a_stream_settles_what_no_later_token_changes() {
    let nano = Reader::proxy();
    let context = nano.context(90);
    let local = [Channel::MaxWindow, Channel::MeanWindow, Channel::KeyNorm, Channel::ValueNorm];
    let norms = [Channel::ValueNorm];
    let with_last = [Channel::MaxWindow, Channel::MeanLast];
    let all = extract().channels;
    // Positions settled at each point of reading; the whole context where it must be read to its end.
    for (channels, behind) in [(&local[..], 16), (&norms, 0), (&with_last, 90), (&all, 90)] {
        let extract = ExtractSection { channels: channels.to_vec(), prefill_chunk_tokens: 23, ..extract() };
        let expected = features(&nano, &extract, &context);
        let extractor = Extractor::new(&nano.model, &nano.tokenizer, &extract, &label()).unwrap();
        let mut stream = extractor.stream(&context).unwrap();
        let mut early: Vec<(usize, Tensor, Tensor)> = Vec::new();
        let mut read = 0usize;
        loop {
            let more = stream.step().unwrap();
            let prefix = nano.tokenizer.prefix().len();
            read = pkv_lm::prefill_chunk(read, prefix + 90, 23).end;
            let context_read = read.saturating_sub(prefix);
            let settled = if context_read == 90 { 90 } else { context_read.saturating_sub(behind) };
            assert_eq!(stream.settled(), settled, "{channels:?} after {read}");
            let n = settled as i64;
            let part = |x: Tensor| x.narrow(-1, 0, n).copy();
            early.push((settled, part(stream.heads_pct()), part(stream.globals_ct())));
            if !more {
                break;
            }
        }
        assert!(!stream.step().unwrap(), "there is nothing more to read");
        for (n, heads, globals) in &early {
            let part = |x: &Tensor| x.narrow(-1, 0, *n as i64);
            for (what, got, expected) in
                [("heads", heads, &expected.heads_pct), ("globals", globals, &expected.globals_ct)]
            {
                let off = (got - part(expected)).abs().sum(Kind::Double).double_value(&[]);
                assert!(off == 0.0, "{channels:?}: {what} of the first {n} positions changed by {off:e}");
            }
        }
        assert!(early.iter().any(|(n, ..)| *n > 0 && *n < 90) == (behind < 90), "{channels:?}");
    }
}
