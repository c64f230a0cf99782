//! Several continuations of one cache in one forward, and the log-sum-exps that taps may ask for:
//! against one continuation at a time, and against their definition in f64.

use std::ops::Range;

use anyhow::{Result, bail};
use pkv_lm::{KvCache, LanguageModel, LayerView, NoTap, RepeatTap, RepeatView, Tap};
use pkv_test_support::attention::{softmax, up_to};
use tch::{Device, Kind, Tensor};

use crate::support::{architectures, assert_close, checkpoint, difference, golden_ids, load};

/// What a layer shows, heads first: queries, own keys, own values, log-sum-exps if asked for.
struct Seen {
    q_qsd: Tensor,
    k_hsd: Tensor,
    v_hsd: Tensor,
    lse_qs: Option<Tensor>,
}

/// Records single forwards and packed ones alike.
#[derive(Default)]
struct Record {
    wants_lse: bool,
    layers: Vec<Seen>,
    /// Keys that the layer's attention sees, `[kv_heads, len, head_dim]`.
    keys: Vec<Tensor>,
    normed: Vec<Tensor>,
}

impl Tap for Record {
    fn wants_lse(&self) -> bool {
        self.wants_lse
    }

    fn layer(&mut self, view: &LayerView) -> Result<()> {
        assert_eq!(view.layer, self.layers.len());
        let s = view.q_qsd.size()[1];
        let own = |x: &Tensor| x.narrow(1, view.start as i64, s).copy();
        self.layers.push(Seen {
            q_qsd: view.q_qsd.copy(),
            k_hsd: own(view.k_hkd),
            v_hsd: own(view.v_hkd),
            lse_qs: view.lse_qs.map(Tensor::copy),
        });
        self.keys.push(view.k_hkd.copy());
        self.normed.push(view.normed_sm.copy());
        Ok(())
    }
}

impl RepeatTap for Record {
    fn wants_lse(&self) -> bool {
        self.wants_lse
    }

    fn layer(&mut self, view: &RepeatView) -> Result<()> {
        assert_eq!(view.layer, self.layers.len());
        assert_eq!(view.segments.last().unwrap().end as i64, view.q_rqd.size()[0]);
        let heads_first = |x: &Tensor| x.transpose(0, 1).copy();
        self.layers.push(Seen {
            q_qsd: heads_first(view.q_rqd),
            k_hsd: heads_first(view.k_rhd),
            v_hsd: heads_first(view.v_rhd),
            lse_qs: view.own_lse_qr.map(|lse| {
                assert!(lse.is_contiguous() && lse.kind() == Kind::Float);
                lse.copy()
            }),
        });
        self.keys.push(view.k_cache_hkd.copy());
        self.normed.push(view.normed_rm.copy());
        Ok(())
    }
}

/// Log-sum-exp in f64 of queries `[q, s, d]` over keys `[h, k, d]`, the last key seen by the last row.
fn naive_lse(q_qsd: &Tensor, k_hkd: &Tensor, scale: f64) -> Tensor {
    let [q_qsd, k_hkd] = [q_qsd, k_hkd].map(|x| x.to_device(Device::Cpu));
    let (s, keys) = (q_qsd.size()[1], k_hkd.size()[1]);
    softmax(&q_qsd, &k_hkd, scale, &up_to(keys - s, s, keys, Device::Cpu)).1
}

fn prefilled(model: &LanguageModel, ids: &[u32], room: usize) -> KvCache {
    let mut cache = model.new_cache(ids.len() + room);
    let _ = model.prefill(ids, &mut cache, 64, &mut NoTap).unwrap();
    cache
}

#[test]
fn packed_repeats_equal_one_at_a_time() {
    for name in architectures().chain(["nano-llama-target"]) {
        let model = load(&checkpoint(name).unwrap());
        let scale = model.config().architecture.score_scale;
        let ids = golden_ids(name);
        let mut cache = prefilled(&model, &ids[..90], 64);
        let before = cache.keys(0).copy();
        let ranges: [Range<usize>; 4] = [100..117, 20..21, 30..94, 130..160];
        let segments: Vec<&[u32]> = ranges.iter().map(|r| &ids[r.clone()]).collect();
        let mut packed = Record { wants_lse: true, ..Record::default() };
        model.forward_repeats(&segments, &cache, &mut packed).unwrap();
        assert_eq!(packed.layers.len(), model.shape().layers);
        assert_eq!((cache.len(), difference(&cache.keys(0), &before)), (90, 0.0), "{name}: the cache stays");

        let mut first = 0;
        for (range, ids) in ranges.iter().zip(&segments) {
            let n = ids.len() as i64;
            let mut single = Record::default();
            model.forward_for_tap(&model.ids(ids), &mut cache, &mut single).unwrap();
            cache.truncate(90);
            for (layer, (all, one)) in packed.layers.iter().zip(&single.layers).enumerate() {
                let rows = |x: &Tensor| x.narrow(1, first, n);
                let what = format!("{name}, tokens {range:?}, layer {layer}");
                assert_close(&format!("{what}: queries"), &rows(&all.q_qsd), &one.q_qsd, 1e-4);
                assert_close(&format!("{what}: keys"), &rows(&all.k_hsd), &one.k_hsd, 1e-4);
                assert_close(&format!("{what}: values"), &rows(&all.v_hsd), &one.v_hsd, 1e-4);
                let normed = packed.normed[layer].narrow(0, first, n);
                assert_close(&format!("{what}: input"), &normed, &single.normed[layer], 1e-3);
                let expected = naive_lse(&rows(&all.q_qsd), &rows(&all.k_hsd), scale);
                let lse = rows(all.lse_qs.as_ref().unwrap());
                assert_close(&format!("{what}: log-sum-exp"), &lse, &expected, 1e-4);
                assert_eq!(packed.keys[layer].size()[1], 90);
            }
            first += n;
        }
        // The same without log-sum-exps, where the last layer has no attention at all.
        let mut plain = Record::default();
        model.forward_repeats(&segments, &cache, &mut plain).unwrap();
        let last = model.shape().layers - 1;
        assert!(plain.layers[last].lse_qs.is_none());
        assert_eq!(difference(&plain.layers[last].q_qsd, &packed.layers[last].q_qsd), 0.0);
    }
}

#[test]
fn taps_get_the_log_sum_exp_over_all_keys() {
    for name in ["arch-qwen3-qknorm", "nano-llama-target"] {
        let model = load(&checkpoint(name).unwrap());
        let ids = golden_ids(name);
        for (held, new) in [(0, 70), (50, 1), (50, 40)] {
            let mut cache = match held {
                0 => model.new_cache(70),
                n => prefilled(&model, &ids[..n], new),
            };
            let new = model.ids(&ids[held..held + new]);
            let mut tap = Record { wants_lse: true, ..Record::default() };
            model.forward_for_tap(&new, &mut cache, &mut tap).unwrap();
            assert_eq!(tap.layers.len(), model.shape().layers, "the last layer too");
            for (layer, (seen, keys)) in tap.layers.iter().zip(&tap.keys).enumerate() {
                let lse = seen.lse_qs.as_ref().unwrap();
                assert_eq!(lse.kind(), Kind::Float);
                let what = format!("{name}, {held} held, layer {layer}");
                assert_close(
                    &what,
                    lse,
                    &naive_lse(&seen.q_qsd, keys, model.config().architecture.score_scale),
                    1e-4,
                );
            }
        }
    }
}

#[test]
fn repeats_that_cannot_be_read_are_refused() {
    let model = load(&checkpoint("nano-llama-proxy").unwrap());
    let cache = prefilled(&model, &[5; 8], 0);
    let read = |segments: &[&[u32]]| model.forward_repeats(segments, &cache, &mut Record::default());
    assert!(read(&[]).is_err());
    assert!(read(&[&[5, 6], &[]]).is_err());
    let error = read(&[&[5], &[4096]]).unwrap_err().to_string();
    assert!(error.contains("token id 4096 is outside"), "{error}");
    struct Stop;
    impl RepeatTap for Stop {
        fn layer(&mut self, view: &RepeatView) -> Result<()> {
            if view.layer == 1 { bail!("seen enough") } else { Ok(()) }
        }
    }
    let error = model.forward_repeats(&[&[5]], &cache, &mut Stop).unwrap_err();
    assert_eq!(error.to_string(), "seen enough");
    // After an empty cache each segment is a sequence of its own.
    let mut empty = Record { wants_lse: true, ..Record::default() };
    model.forward_repeats(&[&[5, 6], &[7]], &model.new_cache(4), &mut empty).unwrap();
    assert_eq!(empty.layers[0].lse_qs.as_ref().unwrap().size()[1], 3);
}
