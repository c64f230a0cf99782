//! The replay that is never run: its place against a repeat that is run. Its softmax:
//! `gpu/src/ops/tests/scores.rs`.

use std::ops::Range;

use anyhow::Result;
use pkv_core::Channel;
use pkv_extract::Extractor;
use pkv_gpu::{Products, ScoreRows, replay_scores};
use pkv_lm::{LayerView, RepeatTap, RepeatView, Tap};
use pkv_recipe::{ExtractSection, LabelSection};
use pkv_score::Requests;
use pkv_test_pair::{device, model as nano_model};
use tch::{Kind, Tensor};

/// Queries of the first layer, `[q, s, d]`.
struct First(Option<Tensor>);

impl Tap for First {
    fn layer(&mut self, view: &LayerView) -> Result<()> {
        if view.layer == 0 {
            self.0 = Some(view.q_qsd.copy());
        }
        Ok(())
    }
}

impl RepeatTap for First {
    fn layer(&mut self, view: &RepeatView) -> Result<()> {
        if view.layer == 0 {
            self.0 = Some(view.q_rqd.transpose(0, 1).copy());
        }
        Ok(())
    }
}

/// Before the first layer no token has seen another, so a repeat that is run has the same queries there, but
/// for their positions.
#[test]
fn queries_are_moved_to_where_the_repeat_has_them() {
    let model = nano_model("target", Kind::Float);
    let prefix = [5u32, 6, 7];
    let context: Vec<u32> = (0..100).map(|i| (11 + i * i * 7) % 4000).collect();
    let requests = Requests::from_ids(vec![9, 8], vec![9, 8, 7, 6], vec![3], 40);
    let ids = [&prefix[..], &context].concat();
    let mut cache = model.new_cache(ids.len());
    let mut prefill = First(None);
    model.prefill_for_tap(&ids, &mut cache, ids.len(), &mut prefill).unwrap();
    let q_qsd = prefill.0.unwrap();
    let chunks: Vec<Range<usize>> = requests.chunks(context.len()).collect();
    assert_eq!(chunks.len(), 3);
    for chunk in chunks {
        let mut repeat = First(None);
        model.forward_repeats(&[&requests.ids(&context, &chunk)], &cache, &mut repeat).unwrap();
        let request = requests.request_tokens(&chunk);
        let run_qsd = repeat.0.unwrap().narrow(1, request as i64, chunk.len() as i64);
        let own_qsd = q_qsd.narrow(1, (prefix.len() + chunk.start) as i64, chunk.len() as i64);
        let further = (context.len() - chunk.start + request) as i64;
        let off = |by: i64| (model.movements(by).of(0).of(&own_qsd) - &run_qsd).abs().max().double_value(&[]);
        assert!(off(further) < 1e-3, "{chunk:?}: off by {}", off(further));
        assert!(off(further + 1) > 0.1, "one position matters");
    }
}

/// Of each layer, queries `[q, s, d]` so far and keys `[h, k, d]`.
struct All(Vec<(Tensor, Tensor)>);

impl Tap for All {
    fn layer(&mut self, view: &LayerView) -> Result<()> {
        let new_qsd = view.q_qsd.copy();
        let k_hkd = view.k_hkd.copy();
        match self.0.get_mut(view.layer) {
            Some((q_qsd, k)) => (*q_qsd, *k) = (Tensor::cat(&[&*q_qsd, &new_qsd], 1), k_hkd),
            None => self.0.push((new_qsd, k_hkd)),
        }
        Ok(())
    }
}

/// Prefill chunks that cut scoring chunks, hold several, and end within the prefix; on a GPU the kernels in
/// 16-bit kinds, from the same queries and keys.
#[test]
fn chunks_are_scored_by_their_own_queries_however_the_prefill_is_cut() {
    let prefix = [5u32, 6, 7, 8, 9];
    let context: Vec<u32> = (0..150).map(|i| (11 + i * i * 7) % 4000).collect();
    let ids = [&prefix[..], &context].concat();
    let requests = Requests::from_ids(vec![9, 8], vec![9, 8, 7, 6], vec![3], 40);
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        let model = nano_model("target", kind);
        // The kernels round keys that were moved, once more: on a CPU that made 0.037 in bf16, 0.006 in f16.
        let scale = model.config().architecture.score_scale;
        let tolerance = match kind {
            Kind::BFloat16 if device().is_cuda() => 0.1,
            Kind::Half if device().is_cuda() => 0.02,
            _ => 1e-4,
        };
        for prefill_chunk_tokens in [3, 17, 64, 100, 1000] {
            let mut all = All(Vec::new());
            let mut cache = model.new_cache(ids.len());
            model.prefill_for_tap(&ids, &mut cache, prefill_chunk_tokens, &mut all).unwrap();
            let channels = vec![Channel::ReplayUnrunMean, Channel::ReplayUnrun];
            let section = ExtractSection { channels, prefill_chunk_tokens, ..ExtractSection::default() };
            let label = LabelSection::default();
            let extractor = Extractor::with_requests(&model, &requests, &prefix, &section, &label);
            let found_pct = extractor.features(&context).unwrap().heads_pct;
            let (mut max, mut mean) = (Vec::new(), Vec::new());
            for (q_qsd, k_hkd) in &all.0 {
                let (mut max_ht, mut mean_ht) = (Vec::new(), Vec::new());
                for at in requests.chunks(context.len()) {
                    let own = |x: &Tensor| x.narrow(1, (prefix.len() + at.start) as i64, at.len() as i64);
                    let further = (context.len() - at.start + requests.request_tokens(&at)) as i64;
                    // Here the queries are moved, which is the same.
                    let q_qsd = model.movements(further).of(0).of(&own(q_qsd));
                    let k_htd = own(k_hkd).to_kind(Kind::Float);
                    let of = Products { q_rqd: &q_qsd.transpose(0, 1), k_hkd: &k_htd, scale };
                    let (rows, keys) = (at.len(), at.len());
                    let chunk = ScoreRows { first_row: 0, rows, first_key: 0, keys };
                    replay_scores(of, &[(chunk, model.movements(0).of(0))], &mut |_, scores| {
                        max_ht.push(scores.max_ht.log());
                        mean_ht.push((&scores.mean_ht + 1e-7).log());
                    })
                    .unwrap();
                }
                max.push(Tensor::cat(&max_ht, 1));
                mean.push(Tensor::cat(&mean_ht, 1));
            }
            let expected_pct = Tensor::stack(&[Tensor::cat(&mean, 0), Tensor::cat(&max, 0)], 1);
            let off = (found_pct - expected_pct.clamp(-16.0, 16.0)).abs().max().double_value(&[]);
            assert!(off < tolerance, "{kind:?}, {prefill_chunk_tokens} tokens at a time: off by {off:e}");
        }
    }
}
