//! One result, however the work is arranged.

use pkv_core::{Channel, Policy};
use pkv_infer::{Parallel, Prefilled, Regime, RegimeName, Sequential, check_devices};
use pkv_recipe::ExtractSection;
use tch::{Device, Tensor};

use pkv_test_support::tensors::difference;

use crate::support::*;

/// Question logits after a pruned cache: they show which pairs are in it.
fn fingerprint(target: &pkv_lm::LanguageModel, prefilled: &mut Prefilled) -> Tensor {
    prefilled.cache.rewind();
    let ids = target.ids(&text(9)).unsqueeze(0);
    target.logits(&target.forward_ragged(&ids, &mut prefilled.cache).unwrap())
}

#[test]
fn every_regime_keeps_the_same_pairs() {
    let extract = ExtractSection { prefill_chunk_tokens: 64, ..ExtractSection::default() };
    let mapper = random_mapper(&extract);
    let (target, tokenizer) = (load("target"), tokenizer());
    let tokens = text(300);
    let make_on = |device: Device, overlap: bool| {
        let source = source(copy_to(&mapper, device), &extract, 100);
        if overlap { source.overlapped().unwrap() } else { source }
    };
    let make = |overlap: bool| make_on(device(), overlap);
    for (ratio, policy) in [(0.2, Policy::Pair), (0.1, Policy::PairUniform), (0.3, Policy::Token)] {
        let context = context(&target, tokenizer.prefix(), &tokens, keep(ratio, policy));
        let mut regimes: Vec<Box<dyn Regime>> = vec![
            Box::new(Sequential::new(make(false))),
            Box::new(Sequential::new(make(true))),
            Box::new(Parallel::streams(make(false)).unwrap()),
            Box::new(Parallel::streams(make(true)).unwrap()),
            // Where there is one device, its two threads are two.
            Box::new(Parallel::dual(make_on(beside(), false)).unwrap()),
            Box::new(Parallel::dual(make_on(beside(), true)).unwrap()),
        ];
        let mut first: Option<(Tensor, usize)> = None;
        for (number, regime) in regimes.iter_mut().enumerate() {
            // The second time finds threads and caches as the first has left them.
            for _ in 0..2 {
                let mut prefilled = regime.prefill(&context).unwrap();
                assert!(prefilled.fallback.is_none(), "{:?}", prefilled.fallback);
                let kept = prefilled.kept.clone();
                assert_eq!(kept.of_pairs, 12 * 300);
                let expected = (ratio * 12.0 * 300.0).round() as usize;
                assert_eq!(kept.pairs, expected, "{policy:?}");
                assert_eq!(kept.prefix_pairs, 12 * tokenizer.prefix().len());
                let even = policy != Policy::Pair;
                assert_eq!(kept.fewest_in_head == kept.most_in_head, even, "{policy:?}: {kept:?}");
                let logits = fingerprint(&target, &mut prefilled);
                match &first {
                    None => first = Some((logits, kept.pairs)),
                    Some((reference, pairs)) => {
                        assert_eq!(kept.pairs, *pairs);
                        let off = difference(reference, &logits);
                        assert!(off < 1e-4, "{} {policy:?}: {off:e}", regime.name());
                    }
                }
                let phases = prefilled.timeline.totals();
                for (lane, name) in
                    [("proxy", "features"), ("mapper", "scores"), ("target", "prefill"), ("target", "prune")]
                {
                    let phase = phases.iter().find(|p| p.lane == lane && p.name == name);
                    let phase = phase.unwrap_or_else(|| panic!("{}: no {lane} {name}", regime.name()));
                    assert!(phase.secs > 0.0 && phase.peak_bytes.is_some());
                }
                // Phases of one thread, one after the other, are what the estimate is made of: those of
                // threads that share the cores add up to more than the time that passed.
                let dual = prefilled.timeline.dual_critical_secs();
                assert!(dual > 0.0 && (number > 0 || dual <= prefilled.timeline.secs()));
            }
        }
    }
}

/// With channels that settle on the way, the mapper has scored windows before the proxy has read all;
/// with the default ones it cannot, and says the same in the end.
#[test]
fn the_mapper_begins_while_the_proxy_goes_on() {
    let local = vec![Channel::MaxWindow, Channel::MeanWindow, Channel::KeyNorm, Channel::ValueNorm];
    let (target, tokenizer) = (load("target"), tokenizer());
    let tokens = text(900);
    for (channels, early) in [(local, true), (Channel::PREFILL.to_vec(), false)] {
        let extract = ExtractSection {
            channels,
            window_tokens: 32,
            prefill_chunk_tokens: 100,
            ..ExtractSection::default()
        };
        let mapper = random_mapper(&extract);
        let context = context(&target, tokenizer.prefix(), &tokens, keep(0.15, Policy::Pair));
        let mut plain = Sequential::new(source(copy(&mapper), &extract, 5000));
        let mut expected = plain.prefill(&context).unwrap();
        let expected = fingerprint(&target, &mut expected);
        let overlapped = source(copy(&mapper), &extract, 64).overlapped().unwrap();
        let mut prefilled = Parallel::streams(overlapped).unwrap().prefill(&context).unwrap();
        assert!(prefilled.fallback.is_none(), "{:?}", prefilled.fallback);
        let phases = prefilled.timeline.phases();
        let windows: Vec<_> = phases.iter().filter(|p| p.lane == "mapper").collect();
        // One piece of work per message that completed a window; only one, if all came at the end.
        // On a busy machine the scheduler decides when they ran.
        assert_eq!(windows.len() > 1, early, "{windows:?}");
        let off = difference(&expected, &fingerprint(&target, &mut prefilled));
        assert!(off < 1e-4, "{off:e}");
    }
}

#[test]
fn one_gpu_is_not_two() {
    let gpu = Device::Cuda;
    let error = check_devices(RegimeName::Dual, gpu(0), gpu(0)).unwrap_err();
    assert!(error.to_string().contains("two GPUs"), "{error}");
    assert!(error.downcast_ref::<pkv_core::Hinted>().unwrap().hint().contains("--regime streams"));
    check_devices(RegimeName::Dual, gpu(0), gpu(1)).unwrap();
    check_devices(RegimeName::Dual, Device::Cpu, Device::Cpu).unwrap();
    check_devices(RegimeName::Streams, gpu(1), gpu(1)).unwrap();
    assert!(check_devices(RegimeName::Streams, gpu(0), gpu(1)).is_err());
    assert_eq!(RegimeName::ALL.map(RegimeName::name), ["sequential", "streams", "dual"]);
}
