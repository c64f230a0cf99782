//! `label` and `extract`: one model's bare prefill, and what the stage does per context.

use anyhow::Result;
use pkv_core::{Channel, GlobalChannel, ModelShape, Source};
use pkv_extract::{Extractor, HiddenProjection};
use pkv_lm::{LanguageModel, NoTap};
use pkv_recipe::ExtractSection;
use pkv_recipe::plan::{Repeat, ScorerWork, features, human_bytes, human_flops, prefill, repeat, scoring};
use pkv_score::Scorer;
use serde::Serialize;

use crate::subject::{PREFIX_TOKENS, Subject, TEMPLATE};
use crate::{Bench, Head, Measured, Models, Report, Row, Setting, table};

/// Times of a stage.
#[derive(Debug, Serialize)]
pub struct StageReport {
    #[serde(flatten)]
    head: Head,
    shape: ModelShape,
    rows: Vec<Row>,
}

/// The target: per context `prefill`, without logits, and `label`, which is prefill and scoring.
///
/// # Errors
/// The model or the peer's file is not available, or the work fails for a reason other than memory.
pub fn label(setting: Setting, models: Models) -> Result<StageReport> {
    let target = Subject::new(&setting, Source::Target, models)?;
    let bench = Bench::new("label", setting, models, &target)?;
    let section = &setting.recipe.label;
    let by = Repeat::new(section, TEMPLATE, pkv_score::work(section));
    let work = |t| scoring(&target.section.shape, t, &by);
    let (prefix, requests) = (target.prefix(), target.requests(section));
    bench.rows(&target, section.prefill_chunk_tokens, &[("label", &work)], |model, _, context, row| {
        let scorer = Scorer::with_requests(model, requests.clone(), &prefix, section).maxima_only();
        bench.timer.time(row, || scorer.score(context))
    })
}

/// The proxy, or the target where no feature comes from a proxy. Per context `prefill`, without logits; then
/// features by groups of channels: the windowed ones alone, all of the prefill, those of the recipe with its
/// globals (surprisal needs the LM head at every position; the others cost nothing and are in all of them),
/// and, of a proxy, the reconstruction channels, without and with their mean.
///
/// # Errors
/// As of [`label`].
pub fn extract(setting: Setting, models: Models) -> Result<StageReport> {
    let recipe = setting.recipe;
    let source = if recipe.read_proxy().is_some() { Source::Proxy } else { Source::Target };
    let subject = Subject::new(&setting, source, models)?;
    let bench = Bench::new("extract", setting, models, &subject)?;
    let (shape, section) = (&subject.section.shape, recipe.extract.of(source));
    let by = Repeat::new(&recipe.label, TEMPLATE, ScorerWork::REPEAT);
    let variants = variants(&section, source);
    let work = |section: &ExtractSection, t| {
        let repeats = section.channels.iter().any(|c| c.is_reconstruction());
        features(shape, section, t, &by) + if repeats { repeat(shape, t, &by) } else { 0.0 }
    };
    let works: Vec<_> = variants.iter().map(|(what, section)| (*what, move |t| work(section, t))).collect();
    let works: Vec<Work> = works.iter().map(|(what, work)| (*what, work as &dyn Fn(usize) -> f64)).collect();
    let (prefix, requests) = (subject.prefix(), subject.requests(&recipe.label));
    let hidden = HiddenProjection::random(shape, setting.device);
    bench.rows(&subject, section.prefill_chunk_tokens, &works, |model, i, context, row| {
        let section = &variants[i].1;
        let fitted = section.channels.iter().any(|c| c.is_fitted());
        let extractor = Extractor::with_requests(model, &requests, &prefix, section, &recipe.label)
            .with_hidden(fitted.then_some(&hidden))?;
        bench.timer.time(row, || extractor.features(context))
    })
}

/// The name of what is timed beside the prefill, and its operations by the context's length.
type Work<'a> = (&'static str, &'a dyn Fn(usize) -> f64);

impl Bench<'_> {
    /// Per context the row of the bare prefill, then one of each of `works`, which `time` measures.
    fn rows(
        &self,
        subject: &Subject,
        chunk_tokens: usize,
        works: &[Work],
        time: impl Fn(&LanguageModel, usize, &[u32], Row) -> Result<Row>,
    ) -> Result<StageReport> {
        let (model, prefix) = (subject.model()?, subject.prefix());
        let mut rows = Vec::new();
        for &t in self.setting.contexts {
            let flops = prefill(&subject.section.shape, PREFIX_TOKENS + t);
            let (bare, context) = (Row::new("prefill", t, flops), subject.context(t));
            let beside = works.iter().map(|(what, work)| Row::new(what, t, flops + work(t)));
            let Some(model) = &model else {
                rows.extend([bare].into_iter().chain(beside).map(Row::out_of_memory));
                continue;
            };
            let ids = [prefix.as_slice(), &context].concat();
            let bare = self.timer.time(bare, || {
                let mut cache = model.new_cache(ids.len());
                model.prefill(&ids, &mut cache, chunk_tokens, &mut NoTap)
            })?;
            rows.push(bare.clone());
            for (i, row) in beside.enumerate() {
                rows.push(time(model, i, &context, row)?.compared_with(&bare));
            }
        }
        if let Some(peer) = &self.peer {
            rows.iter_mut().for_each(|row| row.peer = peer.find(row));
        }
        Ok(StageReport { head: self.head.clone(), shape: subject.section.shape, rows })
    }
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

impl Report for StageReport {
    fn text(&self) -> String {
        let head = &self.head;
        let mut out = format!(
            "{} of `{}` on {}, {}, {}: {}\n{}\n",
            head.stage,
            head.recipe,
            head.device,
            head.dtype,
            head.weights(),
            self.shape,
            head.roofline.text()
        );
        if let Some(peer) = &head.peer {
            out += &format!("peer: {peer}, its fastest attention\n");
        }
        let with_peer = head.peer.is_some();
        let mut names = vec![
            "",
            "context",
            "median",
            "least",
            "tokens/s",
            "work",
            "of ceiling",
            "x prefill",
            "peak memory",
        ];
        names.extend(if with_peer { &["peer", "attention", "peer / ours"][..] } else { &[] });
        let mut lines = vec![names.into_iter().map(str::to_owned).collect()];
        lines.extend(self.rows.iter().map(|row| cells(row, with_peer)));
        out + "\n" + &table::aligned(&lines)
    }
}

fn cells(row: &Row, with_peer: bool) -> Vec<String> {
    let m = row.measured.as_ref();
    let failed = || row.error.unwrap_or("not measured").to_owned();
    let mut cells = vec![
        row.what.to_owned(),
        row.context.to_string(),
        m.map_or_else(failed, |m| secs(m.median_s)),
        table::cell(m, |m| secs(m.min_s)),
        table::cell(m, |m| format!("{:.0}", m.tokens_per_s)),
        human_flops(row.flops),
        table::cell(m, |m| format!("{:.1}%", 100.0 * m.roofline_share)),
        table::ratio(row.over_prefill),
        table::cell(m, peaks),
    ];
    if with_peer {
        let peer = row.peer.as_ref();
        cells.push(table::cell(peer, |p| secs(p.median_s)));
        cells.push(table::cell(peer, |p| p.attention.clone()));
        cells.push(table::ratio(peer.map(|p| p.ratio)));
    }
    cells
}

/// Of the GPU, or of each.
fn peaks(m: &Measured) -> String {
    match &*m.device_peak_bytes {
        [] => table::cell(m.peak_bytes, human_bytes),
        each => each.iter().map(|&bytes| human_bytes(bytes)).collect::<Vec<_>>().join(" + "),
    }
}

/// Four significant digits, but no more than six after the point: `0.0123 s` is `0.01230 s`.
fn secs(x: f64) -> String {
    let magnitude = if x > 0.0 { x.log10().floor() as i32 } else { 0 };
    format!("{x:.*} s", (3 - magnitude).clamp(0, 6) as usize)
}
