//! The proxy, or the target where no feature comes from a proxy: a bare prefill, and what `extract` does per
//! context, by groups of channels.

use anyhow::Result;
use pkv_core::{Channel, GlobalChannel, Source};
use pkv_extract::{Extractor, HiddenProjection};
use pkv_lm::NoTap;
use pkv_recipe::ExtractSection;
use pkv_recipe::plan::{Repeat, features, prefill, repeat};

use super::Bench;
use super::clock::Row;
use super::models::{PREFIX_TOKENS, Subject, TEMPLATE};
use crate::pair::Role;

/// Rows per context: `prefill`, without logits; then, each beside it, features with the windowed
/// channels alone, with all prefill channels, with the channels and globals of the recipe (surprisal
/// needs the LM head at every position), and, of a proxy, with the reconstruction channels, without and with
/// their mean.
/// Globals other than surprisal cost nothing and are in all of them.
///
/// # Errors
/// The model is not available, or fails for a reason other than memory.
pub fn rows(bench: &Bench, subject: &Subject) -> Result<Vec<Row>> {
    let shape = &subject.section.shape;
    let source = if subject.role == Role::Target { Source::Target } else { Source::Proxy };
    let section = &bench.recipe.extract.of(source);
    let by = Repeat::new(&bench.recipe.label, TEMPLATE);
    let variants = variants(section, source);
    let row = |what, t, section: Option<&ExtractSection>| {
        let mut flops = prefill(shape, PREFIX_TOKENS + t);
        if let Some(section) = section {
            let repeats = section.channels.iter().any(|c| c.is_reconstruction());
            flops += features(shape, section, t, &by) + if repeats { repeat(shape, t, &by) } else { 0.0 };
        }
        Row::new(what, t, flops)
    };
    let Some(model) = subject.model()? else {
        let of = |&t: &usize| {
            let all = variants.iter().map(move |(what, section)| (*what, Some(section)));
            [("prefill", None)].into_iter().chain(all).map(move |(what, s)| row(what, t, s).out_of_memory())
        };
        return Ok(bench.contexts.iter().flat_map(of).collect());
    };
    let (prefix, requests) = (subject.prefix()?, subject.requests(&bench.recipe.label)?);
    let hidden = HiddenProjection::random(shape, model.device());
    let mut rows = Vec::new();
    for &t in bench.contexts {
        let context = subject.context(t)?;
        let ids = [prefix.as_slice(), &context].concat();
        let bare = bench.clock.time(row("prefill", t, None), || {
            let mut cache = model.new_cache(ids.len());
            model.prefill(&ids, &mut cache, section.prefill_chunk_tokens, &mut NoTap)
        })?;
        rows.push(bare.clone());
        for (what, section) in &variants {
            let label = &bench.recipe.label;
            let extractor = Extractor::with_requests(&model, &requests, &prefix, section, label)
                .with_hidden(section.channels.iter().any(|c| c.is_fitted()).then_some(&hidden))?;
            let features = bench.clock.time(row(what, t, Some(section)), || extractor.features(&context))?;
            rows.push(features.compared_with(&bare));
        }
    }
    Ok(rows)
}

/// The work timed beside the prefill, by name.
fn variants(section: &ExtractSection, source: Source) -> Vec<(&'static str, ExtractSection)> {
    let free = |g: &&GlobalChannel| **g != GlobalChannel::Surprisal;
    let globals: Vec<GlobalChannel> = section.globals.iter().filter(free).copied().collect();
    let with = |channels: &[Channel]| ExtractSection {
        channels: channels.to_vec(),
        globals: globals.clone(),
        ..section.clone()
    };
    let windowed: Vec<Channel> = Channel::PREFILL.into_iter().filter(|c| !c.is_whole_range()).collect();
    let mut all = vec![
        ("windowed", with(&windowed)),
        ("all prefill", with(&Channel::PREFILL)),
        ("recipe", section.clone()),
    ];
    if source == Source::Proxy {
        // The scores, which is what the peer computes; the mean over rows comes on top and has no fused
        // kernel.
        all.push(("reconstruction", with(&[Channel::ReconLog, Channel::ReconLogOdds])));
        all.push(("recon + mean", with(&Channel::RECONSTRUCTION)));
    }
    all
}
