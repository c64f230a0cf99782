//! From a context to a pruned cache: the target alone, KVzip, and ProxyKV in each regime.
//!
//! The target is measured before the proxy is made, so that its memory does not include the proxy. `dual` is
//! measured where there is a second GPU. It is also estimated from the phases of `sequential`, which do not
//! slow each other down; a copy of the scores to the host and back takes the place of the copy between GPUs.

use std::cell::RefCell;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use pkv_core::{ModelShape, Policy, RetentionRatio, Seed, Source, Stop};
use pkv_extract::HiddenProjection;
use pkv_gpu::next_gpu;
use pkv_infer::{
    Budget, Keep, NoProxy, Parallel, Phase, PhaseTotal, PrefillInput, ProxyMapper, ProxyParts, Regime,
    RegimeName, Sequential, TargetSide, Trace,
};
use pkv_lm::{LanguageModel, NoTap, RaggedCache};
use pkv_mapper::{Mapper, MapperDims, Standardization};
use pkv_recipe::plan::{
    MapperCost, Repeat, ScorerWork, features, human_bytes, prefill as prefill_flops, repeat, scoring,
};
use pkv_recipe::{ExtractSection, Recipe};
use pkv_score::Scorer;
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::features::FeatureSet;
use crate::peer::Peer;
use crate::row::{Measured, Row};
use crate::subject::{PREFIX_TOKENS, Subject, TEMPLATE};
use crate::table::{aligned, cell, ratio};
use crate::timer::Timer;
use crate::{Bench, Head, Models, Report, Setting};

/// Retention ratio; the time hardly depends on it.
const RETAIN: f64 = 0.2;
/// Positions that the mapper scores in one forward.
const WINDOW: usize = 16_384;

/// Times to a pruned cache.
#[derive(Debug, Serialize)]
pub struct PrefillReport {
    #[serde(flatten)]
    head: Head,
    target: ModelShape,
    #[serde(skip_serializing_if = "Option::is_none")]
    proxy: Option<ModelShape>,
    retain: f64,
    rows: Vec<PrefillRow>,
    /// Phases of the last run of each row.
    #[serde(skip)]
    pub traces: Vec<Trace>,
}

/// One way to a cache, at one length.
#[derive(Debug, Serialize)]
struct PrefillRow {
    #[serde(flatten)]
    row: Row,
    /// The set of features, for ProxyKV.
    features: Option<&'static str>,
    /// Our KVzip's time over this one.
    kvzip_over_this: Option<f64>,
    /// The peer's KVzip's time over this one.
    peer_over_this: Option<f64>,
    /// The mapper's share of the last run's time.
    mapper_share: Option<f64>,
    /// Peak memory over that of the bare prefill.
    memory_over_prefill: Option<f64>,
    /// Phases of the last run.
    phases: Vec<PhaseTotal>,
}

/// Both models: from a context to a pruned cache, with the target alone, with KVzip, and with ProxyKV reading
/// each of `sets` in every regime.
///
/// # Errors
/// The models or the peer's file are not available, or the work fails for a reason other than memory.
pub fn prefill(setting: Setting, models: Models, sets: &[FeatureSet]) -> Result<PrefillReport> {
    let Setting { recipe, device, .. } = setting;
    let target = Subject::new(&setting, Source::Target, models)?;
    let sets: Vec<_> = sets.iter().map(|set| (set.name(), set.section(recipe))).collect();
    let reads_proxy = sets.iter().any(|(_, section)| section.from.contains(&Source::Proxy));
    let proxy = |device| Subject::new(&Setting { device, ..setting }, Source::Proxy, models);
    let here = reads_proxy.then(|| proxy(device)).transpose()?;
    let beside = next_gpu(device).filter(|_| reads_proxy).map(proxy).transpose()?;
    let bench = Bench::new("prefill", setting, models, &target)?;
    let ways = Ways {
        recipe,
        target: &target,
        proxy: here.as_ref(),
        beside: beside.as_ref(),
        model: &target.needed_model()?,
        timer: &bench.timer,
        device,
    };
    let mut rows = Vec::new();
    for &t in setting.contexts {
        rows.extend(ways.alone(t)?);
    }
    let mut traces = Vec::new();
    for &t in setting.contexts {
        for (set, section) in &sets {
            rows.extend(ways.with_proxy(t, set, section, &mut traces)?);
        }
    }
    // Beside each other by context, as they are compared.
    rows.sort_by_key(|r| r.row.context);
    compare(&mut rows, bench.peer.as_ref());
    Ok(PrefillReport {
        head: bench.head,
        target: target.section.shape,
        proxy: here.as_ref().map(|proxy| proxy.section.shape),
        retain: RETAIN,
        rows,
        traces,
    })
}

/// The ways to a pruned cache, and what they share.
struct Ways<'a> {
    recipe: &'a Recipe,
    target: &'a Subject<'a>,
    /// Absent if no feature set reads it.
    proxy: Option<&'a Subject<'a>>,
    /// The proxy on a GPU of its own.
    beside: Option<&'a Subject<'a>>,
    model: &'a LanguageModel,
    timer: &'a Timer<'a>,
    device: Device,
}

impl Ways<'_> {
    fn keep(&self) -> Result<Keep<'static>> {
        let budget = Budget::Ratio(RetentionRatio::new(RETAIN)?);
        Ok(Keep { budget, policy: Policy::Pair, budgets: None, recent: 0 })
    }

    /// The target without a proxy: `prefill`, and `KVzip` to the same kind of pruned cache.
    fn alone(&self, t: usize) -> Result<Vec<PrefillRow>> {
        let (section, shape) = (&self.recipe.label, &self.target.section.shape);
        let bare_flops = prefill_flops(shape, PREFIX_TOKENS + t);
        let by = Repeat::new(section, TEMPLATE, pkv_score::work(section));
        let flops = bare_flops + scoring(shape, t, &by);
        let (prefix, context) = (self.target.prefix(), self.target.context(t));
        let ids = [prefix.as_slice(), &context].concat();
        let read = || {
            let mut cache = self.model.new_cache(ids.len());
            self.model.prefill_for_tap(&ids, &mut cache, section.prefill_chunk_tokens, &mut NoTap)?;
            Ok(cache)
        };
        let bare = self.timer.time(Row::new("prefill", t, bare_flops), read)?;
        let requests = self.target.requests(section);
        let scorer = Scorer::with_requests(self.model, requests, &prefix, section).maxima_only();
        let keep = self.keep()?;
        let whole = self.timer.time(Row::new("KVzip", t, flops), || {
            let cache = read()?;
            let scores_lht = scorer.score_cached(&context, &cache)?.max_lht;
            let keep_lht = keep.mask(&scores_lht, &cache, prefix.len())?;
            RaggedCache::prune(cache, &keep_lht, 1)
        })?;
        let whole = whole.compared_with(&bare);
        Ok(vec![PrefillRow::new(bare, None), PrefillRow::new(whole, None)])
    }

    /// ProxyKV with one set of features, in every regime.
    fn with_proxy(
        &self,
        t: usize,
        set: &'static str,
        section: &ExtractSection,
        traces: &mut Vec<Trace>,
    ) -> Result<Vec<PrefillRow>> {
        let shapes = (&self.target.section.shape, self.proxy.map(|proxy| &proxy.section.shape));
        let by = Repeat::new(&self.recipe.label, TEMPLATE, ScorerWork::REPEAT);
        let recipe = Recipe { extract: section.clone(), ..self.recipe.clone() };
        let mut flops =
            prefill_flops(shapes.0, PREFIX_TOKENS + t) + MapperCost::new(&recipe).forward_flops(t);
        for &source in &section.from {
            let shape = source.shape(shapes.0, shapes.1).context("the recipe has no proxy")?;
            flops += features(shape, &section.of(source), t, &by);
            flops += if section.repeats(source) { repeat(shape, t, &by) } else { 0.0 };
            flops += if source == Source::Proxy { prefill_flops(shape, PREFIX_TOKENS + t) } else { 0.0 };
        }
        let mut rows = Vec::new();
        let Some(here) = self.proxy.filter(|_| section.from.contains(&Source::Proxy)) else {
            let side = self.target_side(section)?;
            let mut regime = Sequential::new(NoProxy(self.device));
            let row = Row::new("own prefill", t, flops);
            let (row, phases) = self.time(&mut regime, row, set, t, side.as_ref())?;
            traces.push(Trace { name: format!("{set} features, {t} tokens"), phases });
            return Ok(vec![row]);
        };
        let here = [("sequential", here), ("streams", here), ("streams, overlap", here)];
        let there = self.beside.into_iter().flat_map(|p| [("dual", p), ("dual, overlap", p)]);
        for (what, proxy) in here.into_iter().chain(there) {
            // A thread and its plans belong to one regime, so each has a proxy of its own.
            let Some(source) = self.source(proxy, section)? else {
                rows.push(PrefillRow::new(Row::new(what, t, flops).out_of_memory(), Some(set)));
                continue;
            };
            let mut regime: Box<dyn Regime> = match what {
                "sequential" => Box::new(Sequential::new(source)),
                "streams" => Box::new(Parallel::streams(source.sharing_device())?),
                "streams, overlap" => Box::new(Parallel::streams(source.sharing_device().overlapped()?)?),
                "dual" => Box::new(Parallel::dual(source)?),
                _ => Box::new(Parallel::dual(source.overlapped()?)?),
            };
            let side = self.target_side(section)?;
            let row = Row::new(what, t, flops);
            let (row, phases) = self.time(regime.as_mut(), row, set, t, side.as_ref())?;
            traces.push(Trace { name: format!("{what}, {set} features, {t} tokens"), phases });
            // Phases of one GPU add up to two only where the mapper waits for the proxy alone.
            if what == "sequential" && side.is_none() {
                rows.extend(self.dual(&row, t, flops, set)?);
            }
            rows.push(row);
        }
        // Computed last, as it is reported.
        rows.sort_by_key(|r| r.row.what == DUAL);
        Ok(rows)
    }

    fn time(
        &self,
        regime: &mut dyn Regime,
        row: Row,
        set: &'static str,
        t: usize,
        target_side: Option<&TargetSide>,
    ) -> Result<(PrefillRow, Vec<Phase>)> {
        let (prefix, tokens) = (self.target.prefix(), self.target.context(t));
        let last = RefCell::new(None);
        let context = PrefillInput {
            target: self.model,
            prefix: &prefix,
            tokens: &tokens,
            keep: self.keep()?,
            chunk_tokens: self.recipe.label.prefill_chunk_tokens,
            room_tokens: 1,
            target_side,
            stop: Stop::default(),
        };
        let row = self.timer.time(row.apart(format!(", {set} features,")), || {
            let prefilled = regime.prefill(&context)?;
            if let Some(why) = prefilled.fallback {
                bail!("the proxy's side failed: {why:#}");
            }
            last.replace(Some(Arc::clone(&prefilled.timeline)));
            Ok(prefilled.cache)
        })?;
        let mut timed = PrefillRow::new(row, Some(set));
        let mut all = Vec::new();
        if let (Some(timeline), Some(m)) = (last.into_inner(), &mut timed.row.measured) {
            timed.phases = timeline.totals();
            all = timeline.phases();
            let whole_secs = all.iter().map(|p| p.end_secs).fold(0.0, f64::max);
            timed.mapper_share = Some(timeline.busy_secs("mapper", None) / whole_secs);
            if let Device::Cuda(_) = self.device {
                // Phases of `sequential` reset the peak, each for its own; of two GPUs the target's counts.
                let here =
                    timed.phases.iter().filter(|p| regime.name() != RegimeName::Dual || p.lane == "target");
                m.peak_bytes = here.filter_map(|p| p.peak_bytes).max();
            }
        }
        Ok((timed, all))
    }

    /// Estimated time on two GPUs, from the phases on one.
    fn dual(
        &self,
        sequential: &PrefillRow,
        t: usize,
        flops: f64,
        set: &'static str,
    ) -> Result<Option<PrefillRow>> {
        let Some(m) = &sequential.row.measured else { return Ok(None) };
        let secs = |lane: &str, name: Option<&str>| -> f64 {
            let of = |p: &&PhaseTotal| p.lane == lane && name.is_none_or(|n| n == p.name);
            sequential.phases.iter().filter(of).map(|p| p.secs).sum()
        };
        let side = secs("proxy", None) + secs("mapper", None);
        let copy = self.copy_secs(t)?;
        let total = secs("target", Some("prefill")).max(side) + copy + secs("target", Some("prune"));
        let measured = Measured {
            median_s: total,
            min_s: total,
            tokens_per_s: t as f64 / total,
            roofline_share: m.roofline_share * m.median_s / total,
            peak_bytes: None,
            ..m.clone()
        };
        Ok(Some(PrefillRow::new(Row { measured: Some(measured), ..Row::new(DUAL, t, flops) }, Some(set))))
    }

    /// The scores to the host and back: longer than from one GPU to the other.
    fn copy_secs(&self, t: usize) -> Result<f64> {
        let heads = self.target.section.shape.total_kv_heads() as i64;
        let scores = Tensor::zeros([heads, t as i64], (Kind::Float, self.device));
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            pkv_gpu::synchronize(self.device)?;
            let begun = Instant::now();
            let _there_and_back = scores.to_device(Device::Cpu).to_device(self.device);
            pkv_gpu::synchronize(self.device)?;
            best = best.min(begun.elapsed().as_secs_f64());
        }
        Ok(best)
    }

    /// `subject`, the proxy, and a random mapper on its device; `None` if they do not fit.
    fn source(&self, subject: &Subject, section: &ExtractSection) -> Result<Option<ProxyMapper>> {
        let Some(proxy) = subject.model()? else { return Ok(None) };
        let device = proxy.device();
        let own = section.from.contains(&Source::Target);
        let r = self.recipe;
        Ok(Some(ProxyMapper::new(ProxyParts {
            proxy,
            mapper: if own { None } else { Some(self.mapper(section, device)?) },
            prefix: subject.prefix(),
            requests: subject.requests(&r.label),
            extract: section.of(Source::Proxy),
            label: r.label.clone(),
            target: self.target.section.shape,
            window_tokens: WINDOW,
        })))
    }

    /// The mapper on the target's device, where it reads the target's features.
    fn target_side(&self, section: &ExtractSection) -> Result<Option<TargetSide>> {
        if !section.from.contains(&Source::Target) {
            return Ok(None);
        }
        let (label, mapper) = (&self.recipe.label, self.mapper(section, self.device)?);
        let requests = self.target.requests(label);
        let hidden = section
            .is_fitted(Source::Target)
            .then(|| HiddenProjection::random(&self.target.section.shape, self.device));
        Ok(Some(TargetSide::new(mapper, section, label, requests, hidden, WINDOW)))
    }

    /// A random mapper.
    fn mapper(&self, section: &ExtractSection, device: Device) -> Result<Mapper> {
        let r = self.recipe;
        let dims = MapperDims::of(&Recipe { extract: section.clone(), ..r.clone() });
        let stats = Standardization::identity(&dims);
        let mapper = Mapper::new(&r.mapper, dims, stats, Seed(0), device)?;
        // Outputs start at zero; scores that are all alike would prune whole heads.
        let _no_grad = tch::no_grad_guard();
        for (_, parameter) in mapper.parameters() {
            let _ = parameter.shallow_clone().g_add_(&(parameter.randn_like() * 0.05));
        }
        Ok(mapper)
    }
}

const DUAL: &str = "dual, computed";

impl PrefillRow {
    fn new(row: Row, features: Option<&'static str>) -> Self {
        Self {
            row,
            features,
            kvzip_over_this: None,
            peer_over_this: None,
            mapper_share: None,
            memory_over_prefill: None,
            phases: Vec::new(),
        }
    }

    fn cells(&self) -> Vec<String> {
        let m = self.row.measured.as_ref();
        let failed = || self.row.error.unwrap_or("-").to_owned();
        vec![
            self.row.what.to_owned(),
            self.features.unwrap_or("-").to_owned(),
            self.row.context.to_string(),
            m.map_or_else(failed, |m| format!("{:.4} s", m.median_s)),
            ratio(self.row.over_prefill),
            ratio(self.kvzip_over_this),
            ratio(self.peer_over_this),
            cell(self.mapper_share, |x| format!("{:.1}%", 100.0 * x)),
            cell(m.and_then(|m| m.peak_bytes), human_bytes),
            ratio(self.memory_over_prefill),
        ]
    }
}

/// Set every row beside the bare prefill, KVzip and the peer's KVzip at its length.
fn compare(rows: &mut [PrefillRow], peer: Option<&Peer>) {
    let of = |rows: &[PrefillRow], what: &str, t: usize| {
        rows.iter().find(|r| r.row.what == what && r.row.context == t).map(|r| r.row.clone())
    };
    for i in 0..rows.len() {
        let t = rows[i].row.context;
        let (bare, kvzip) = (of(rows, "prefill", t), of(rows, "KVzip", t));
        let row = &mut rows[i];
        let Some(m) = row.row.measured.clone() else { continue };
        if let Some(kvzip) = kvzip.and_then(|k| k.measured) {
            row.kvzip_over_this = Some(kvzip.median_s / m.median_s);
        }
        if let Some(bare) = bare.filter(|_| row.row.what != "prefill") {
            row.row = row.row.clone().compared_with(&bare);
            let peaks = (m.peak_bytes, bare.measured.and_then(|b| b.peak_bytes));
            if let (Some(own), Some(bare)) = peaks {
                row.memory_over_prefill = Some(own as f64 / bare as f64);
            }
        }
        // Prefill with KVzip scoring is what the peer calls `label`.
        let as_label =
            Row { what: if row.row.what == "prefill" { "prefill" } else { "label" }, ..row.row.clone() };
        row.peer_over_this = peer.and_then(|p| p.find(&as_label)).map(|cell| cell.ratio);
    }
}

impl Report for PrefillReport {
    fn text(&self) -> String {
        let head = &self.head;
        let proxy = self.proxy.map_or_else(String::new, |proxy| format!(", proxy {proxy}"));
        let mut out = format!(
            "prefill to a pruned cache, `{}` on {}, {}, {}\ntarget {}{proxy}, {} kept\n",
            head.recipe,
            head.device,
            head.dtype,
            head.weights(),
            self.target,
            self.retain
        );
        if let Some(peer) = &head.peer {
            let _ = writeln!(out, "peer: {peer}, its fastest attention");
        }
        let names = [
            "",
            "features",
            "context",
            "median",
            "x prefill",
            "KVzip/this",
            "peer/this",
            "mapper",
            "peak memory",
            "x memory",
        ];
        let mut lines = vec![names.map(str::to_owned).to_vec()];
        lines.extend(self.rows.iter().map(PrefillRow::cells));
        let table = aligned(&lines);
        let mut lines = table.lines();
        let _ = writeln!(out, "\n{}", lines.next().unwrap_or_default());
        for (row, line) in self.rows.iter().zip(lines) {
            let _ = writeln!(out, "{line}");
            for p in &row.phases {
                let _ = writeln!(out, "      {:<7} {:<12} {:>9.4} s", p.lane, p.name, p.secs);
            }
        }
        out
    }
}
