//! A mapper that reads the target's own prefill, alone or beside a proxy's features.

use anyhow::Result;
use pkv_core::{Channel, Policy, Source};
use pkv_extract::SourceExtractors;
use pkv_infer::{NoProxy, Parallel, PrefillInput, Regime, Sequential};
use pkv_mapper::Mapper;
use pkv_recipe::{ExtractSection, LabelSection};
use tch::{Kind, Tensor};

use crate::support::*;

fn section(from: &[Source]) -> ExtractSection {
    ExtractSection {
        from: from.to_vec(),
        channels: vec![Channel::MaxWindow, Channel::KeyNorm, Channel::ReconLog],
        // The infer tests read 128 tokens at a time.
        prefill_chunk_tokens: 128,
        ..ExtractSection::default()
    }
}

/// What the cache keeps, by the same mapper over features as the evaluation extracts them.
fn expected(extract: &ExtractSection, mapper: &Mapper, tokens: &[u32], context: &PrefillInput) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let (target, proxy) = (load("target"), load("proxy"));
    let extractors =
        SourceExtractors::new(&target, Some(&proxy), &tokenizer(), extract, &LabelSection::default(), None)
            .unwrap();
    let features = extractors.features(tokens).unwrap();
    let scores =
        mapper.forward_long(&features.heads_pct.unsqueeze(0), &features.globals_ct.unsqueeze(0), 100);
    let full = target.new_cache(1);
    context.keep.mask(&scores.view([6, 2, -1]), &full, context.prefix.len()).unwrap()
}

fn regimes(from: &[Source], extract: &ExtractSection) -> Vec<Box<dyn Regime>> {
    if from == [Source::Target] {
        return vec![Box::new(Sequential::new(NoProxy(device())))];
    }
    vec![
        Box::new(Sequential::new(proxy_side(None, device(), extract, 100))),
        Box::new(Parallel::streams(proxy_side(None, device(), extract, 100)).unwrap()),
        Box::new(Parallel::dual(proxy_side(None, beside(), extract, 100)).unwrap()),
    ]
}

#[test]
fn own_features_keep_what_the_evaluation_keeps() {
    let (target, tokenizer, tokens) = (load("target"), tokenizer(), text(300));
    for from in [&[Source::Target][..], &[Source::Target, Source::Proxy], &[Source::Proxy, Source::Target]] {
        let extract = section(from);
        let mapper = random_mapper(&extract);
        let side = target_side(&mapper, &extract, 100);
        assert_eq!(side.reads_proxy(), from.len() == 2);
        let context = PrefillInput {
            target_side: Some(&side),
            ..context(&target, tokenizer.prefix(), &tokens, keep(0.2, Policy::Pair))
        };
        let kept_lht = expected(&extract, &mapper, &tokens, &context);
        for mut regime in regimes(from, &extract) {
            let prefilled = regime.prefill(&context).unwrap();
            assert!(prefilled.fallback.is_none(), "{from:?}: {:?}", prefilled.fallback);
            let counts: Vec<i64> =
                (0..6).flat_map(|l| prefilled.cache.kept(l).iter().map(|n| *n as i64)).collect();
            let wanted = kept_lht.sum_dim_intlist(-1, false, Kind::Int64).flatten(0, -1);
            assert_eq!(counts, Vec::<i64>::try_from(wanted).unwrap(), "{from:?} {}", regime.name());
        }
    }
}

/// A mapper of other sizes than its features: the answers then come from the whole cache.
#[test]
fn features_that_do_not_fit_cost_the_pruning_alone() -> Result<()> {
    let (target, tokenizer, tokens) = (load("target"), tokenizer(), text(200));
    let extract = section(&[Source::Target]);
    let narrow = ExtractSection { target_channels: vec![Channel::KeyNorm], ..extract.clone() };
    let side = target_side(&random_mapper(&extract), &narrow, 100);
    let context = PrefillInput {
        target_side: Some(&side),
        ..context(&target, tokenizer.prefix(), &tokens, keep(0.2, Policy::Pair))
    };
    let prefilled = Sequential::new(NoProxy(device())).prefill(&context)?;
    let why = format!("{:#}", prefilled.fallback.as_ref().expect("the mapper cannot read these features"));
    assert!(why.contains("expected [batch, 12 proxy heads, 8 channels"), "{why}");
    assert_eq!(prefilled.kept.pairs, prefilled.kept.of_pairs);
    Ok(())
}
