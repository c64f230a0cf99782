//! Fitting the baselines that learn, on training shards.
//!
//! All of them are fitted to what the mapper is trained on: log-odds of KVzip's scores, span-pooled
//! as the recipe says. The head prior's means are of the raw log-odds, since pooling along
//! positions says nothing of a head.
//!
//! Dimension key: p proxy KV head, o target KV head, c channel, t position, n sampled position.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use pkv_core::{Channel, Fingerprint, Seed, hinted};
use pkv_lm::LanguageModel;
use pkv_mapper::Mapper;
use pkv_prune::{log_odds, pool_targets};
use pkv_recipe::{Method, TargetPool};
use pkv_shard::{Example, FeatureRow, FeatureSet, LabelRow, StageReader};
use tch::{Device, Kind, Tensor};

use super::align::Alignment;
use super::kvzap::{Kvzap, KvzapFit, KvzapStore};
use super::linear::{Linear, LinearFit};
use crate::results::MethodNote;

/// Training contexts that baselines are fitted on; more of them move nothing in the third digit.
const MAX_CONTEXTS: u64 = 512;
/// Positions that heads are aligned on.
const ALIGNED_POSITIONS: i64 = 65_536;

/// Where the training examples are.
pub struct FitData<'a> {
    pub labels: &'a StageReader<LabelRow>,
    pub features: &'a FeatureSet,
    /// Rows of the training split.
    pub train: std::ops::Range<u64>,
    /// Channels of the features, in their order.
    pub channels: &'a [Channel],
    pub pool: TargetPool,
    /// Whose standardization and ridge penalty the linear baselines share.
    pub mapper: &'a Mapper,
    pub device: Device,
    /// For the scorers that learn from the target's hidden states: their contexts, and how to read them.
    pub examples: &'a StageReader<Example>,
    pub target: &'a LanguageModel,
    pub prefix: &'a [u32],
    pub prefill_chunk_tokens: usize,
    pub seed: Seed,
    /// Folder for scorers that take long to fit.
    pub scorers: &'a Path,
}

/// The fitted baselines; those that were not asked for are absent.
#[derive(Default)]
pub struct Baselines {
    mean_o: Option<Tensor>,
    linear: Option<Linear>,
    proxy_linear: Option<Linear>,
    alignment: Option<(usize, Alignment)>,
    kvzap: Option<Kvzap>,
    notes: Vec<MethodNote>,
}

impl Baselines {
    /// Fit what `methods` need.
    ///
    /// # Errors
    /// There is no training example, or its labels and features do not belong together.
    pub fn fit(methods: &[Method], data: &FitData) -> Result<Self> {
        let learns = [Method::Linear, Method::ProxyLinear, Method::Iam, Method::HeadPrior];
        if !methods.iter().any(|m| learns.contains(m) || m.reads_hidden_states()) {
            return Ok(Self::default());
        }
        let n = (data.train.end - data.train.start).min(MAX_CONTEXTS);
        ensure!(
            n > 0,
            hinted(
                "there is no training example to fit baselines on",
                "raise `data.train`, or leave the methods that learn out of `eval.methods`"
            )
        );
        let _no_grad = tch::no_grad_guard();
        let wants = |m: Method| methods.contains(&m);
        let (align_slot, align_channel) = alignment_channel(data.channels)?;
        let proxy_slots = proxy_slots(data.channels)?;
        let mut linear = wants(Method::Linear).then(|| LinearFit::new(data.mapper, None)).transpose()?;
        let mut proxy_linear = wants(Method::ProxyLinear)
            .then(|| LinearFit::new(data.mapper, Some(&proxy_slots)))
            .transpose()?;
        let mut sample = Sample::new(ALIGNED_POSITIONS / n as i64 + 1);
        let (mut sum_o, mut positions) = (None::<Tensor>, 0i64);
        let reads_hidden_states = methods.iter().any(|m| m.reads_hidden_states());
        let store = reads_hidden_states
            .then(|| KvzapStore::open(data.scorers, kvzap_choices(methods, data, n)))
            .transpose()?;
        let stored = store.as_ref().and_then(|store| store.load(data.device));
        let mut kvzap = match stored {
            None => KvzapFit::new(methods, data.target, n, data.seed),
            Some(_) => None,
        };
        for i in 0..n {
            // Evenly spread, so that every source of the mixture is there.
            let row = data.train.start + i * (data.train.end - data.train.start) / n;
            let (label, features) = read_pair(data.labels, data.features, row)?;
            let raw_ot = log_odds(&label_tensor(&label, data.device)).flatten(0, 1);
            let (heads_pct, globals_ct) = feature_tensors(&features, data.device);
            let y_ot = pool_targets(&raw_ot, &data.pool);
            if let Some(kvzap) = &mut kvzap {
                let Example { id, tokens, .. } = data.examples.get(row)?;
                ensure!(
                    id == label.id,
                    hinted(
                        format!("row {row}: the labels are of `{}`, the example is `{id}`", label.id),
                        "labels must come from these examples: `--redo label`"
                    )
                );
                let y_lht = y_ot.view([i64::from(label.layers), i64::from(label.kv_heads), -1]);
                kvzap.add(data.target, data.prefix, &tokens, data.prefill_chunk_tokens, &y_lht)?;
            }
            let sum = raw_ot.sum_dim_intlist(-1, false, Kind::Double);
            positions += raw_ot.size()[1];
            sum_o = Some(match sum_o {
                Some(total) => total + sum,
                None => sum,
            });
            for fit in linear.iter_mut().chain(&mut proxy_linear) {
                fit.add(&heads_pct, &globals_ct, &y_ot)?;
            }
            if wants(Method::Iam) {
                sample.add(&heads_pct.select(1, align_slot as i64), &y_ot);
            }
        }
        let mut notes = Vec::new();
        let mut note = |method, note: String| {
            if wants(method) {
                notes.push(MethodNote { method, note });
            }
        };
        let names: Vec<String> = proxy_slots.iter().map(|&s| name(data.channels[s])).collect();
        note(Method::ProxyLinear, format!("ridge regression from the proxy's {}", names.join(", ")));
        note(Method::Iam, format!("heads matched by the proxy's {}", name(align_channel)));
        let kvzap = match kvzap.zip(store) {
            None => stored,
            Some((fit, store)) => {
                let (kvzap, cost) = fit.solve(data.device)?;
                store.save(&kvzap, cost)?;
                Some((kvzap, cost))
            }
        };
        if let Some((_, [contexts, tokens])) = &kvzap {
            let cost = format!(
                "from the target's hidden states; fitted by prefilling {contexts} training contexts, {tokens} tokens"
            );
            note(Method::KvzapLinear, cost.clone());
            note(Method::KvzapMlp, cost);
        }
        let alignment = if wants(Method::Iam) {
            Some((align_slot, sample.align()?.to_device(data.device)))
        } else {
            None
        };
        Ok(Self {
            mean_o: sum_o.map(|sum| (sum / positions as f64).to_kind(Kind::Float)),
            linear: linear.map(|f| f.solve()).transpose()?,
            proxy_linear: proxy_linear.map(|f| f.solve()).transpose()?,
            alignment,
            kvzap: kvzap.map(|(kvzap, _)| kvzap),
            notes,
        })
    }

    pub fn notes(&self) -> &[MethodNote] {
        &self.notes
    }

    pub(super) fn kvzap(&self) -> Option<&Kvzap> {
        self.kvzap.as_ref()
    }

    pub(super) fn mean_o(&self) -> Result<&Tensor> {
        self.mean_o.as_ref().context(NOT_FITTED)
    }

    pub(super) fn linear(&self) -> Result<&Linear> {
        self.linear.as_ref().context(NOT_FITTED)
    }

    pub(super) fn proxy_linear(&self) -> Result<&Linear> {
        self.proxy_linear.as_ref().context(NOT_FITTED)
    }

    /// Scores by alignment, `[target heads, positions]`.
    pub(super) fn iam(&self, heads_pct: &Tensor) -> Result<Tensor> {
        let (slot, alignment) = self.alignment.as_ref().context(NOT_FITTED)?;
        Ok(alignment.scores(&heads_pct.select(1, *slot as i64)))
    }
}

/// All that KVzap-style scorers depend on.
fn kvzap_choices(methods: &[Method], data: &FitData, contexts: u64) -> Fingerprint {
    let which: Vec<&str> = methods.iter().filter(|m| m.reads_hidden_states()).map(|m| m.name()).collect();
    Fingerprint::new()
        .with("methods", which)
        .with("labels", data.labels.stage().fingerprint())
        .with("contexts", contexts)
        .with("pool", data.pool)
        .with("seed", data.seed)
}

const NOT_FITTED: &str = "the baseline was not fitted";

/// Evenly spaced positions of every context.
struct Sample {
    per_context: i64,
    x: Vec<Tensor>,
    y: Vec<Tensor>,
}

impl Sample {
    fn new(per_context: i64) -> Self {
        Self { per_context, x: Vec::new(), y: Vec::new() }
    }

    fn add(&mut self, x_pt: &Tensor, y_ot: &Tensor) {
        let positions = x_pt.size()[1];
        let step = (positions / self.per_context).max(1);
        let pick = |values: &Tensor| values.slice(1, 0, positions, step).to_device(Device::Cpu);
        self.x.push(pick(x_pt));
        self.y.push(pick(y_ot));
    }

    fn align(&self) -> Result<Alignment> {
        Alignment::fit(&Tensor::cat(&self.x, 1), &Tensor::cat(&self.y, 1))
    }
}

/// Labels and features of one example.
///
/// # Errors
/// A row is absent, or the two are of different examples.
pub fn read_pair(
    labels: &StageReader<LabelRow>,
    features: &FeatureSet,
    row: u64,
) -> Result<(LabelRow, FeatureRow)> {
    let (label, feature) = (labels.get(row)?, features.get(row)?);
    ensure!(
        label.id == feature.id && label.positions == feature.positions,
        hinted(
            format!(
                "row {row}: labels are of `{}` ({} positions), features of `{}` ({} positions)",
                label.id, label.positions, feature.id, feature.positions
            ),
            "labels and features must come from the same examples: `--redo label` and `--redo extract`"
        )
    );
    Ok((label, feature))
}

/// f32 `[layers, KV heads, positions]`.
pub fn label_tensor(row: &LabelRow, device: Device) -> Tensor {
    let size = [row.layers, row.kv_heads, row.positions].map(i64::from);
    Tensor::from_slice(&row.scores).view(size).to_device(device)
}

/// f32 `[proxy heads, channels, positions]` and `[globals, positions]`.
pub fn feature_tensors(row: &FeatureRow, device: Device) -> (Tensor, Tensor) {
    let size = [row.layers * row.kv_heads, row.channels, row.positions].map(i64::from);
    let heads = Tensor::from_slice(&row.heads).view(size).to_device(device);
    let globals = Tensor::from_slice(&row.globals).view([-1, i64::from(row.positions)]).to_device(device);
    (heads, globals)
}

/// The channel that stands for the proxy's own opinion: its reconstruction, else its strongest attention.
fn alignment_channel(channels: &[Channel]) -> Result<(usize, Channel)> {
    let by_preference = [
        Channel::ReconLogOdds,
        Channel::ReconLog,
        Channel::ReconMean,
        Channel::MaxAll,
        Channel::MaxWindow,
        Channel::MeanAll,
        Channel::MeanWindow,
    ];
    let found = by_preference.iter().find_map(|c| Some((channels.iter().position(|x| x == c)?, *c)));
    let first = channels.first().map(|c| (0, *c));
    found.or(first).context("the features have no channel")
}

/// All reconstruction channels, or the one that stands for the proxy's opinion without them.
fn proxy_slots(channels: &[Channel]) -> Result<Vec<usize>> {
    let recon: Vec<usize> =
        channels.iter().enumerate().filter(|(_, c)| c.is_reconstruction()).map(|(i, _)| i).collect();
    if recon.is_empty() { Ok(vec![alignment_channel(channels)?.0]) } else { Ok(recon) }
}

/// A channel's name in recipes, in backticks.
fn name(channel: Channel) -> String {
    let value = serde_json::to_value(channel).ok();
    format!("`{}`", value.as_ref().and_then(|v| v.as_str()).unwrap_or("channel"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proxy_speaks_through_its_reconstruction_or_its_strongest_attention() {
        assert_eq!(alignment_channel(&Channel::PREFILL).unwrap(), (0, Channel::MaxAll));
        let all: Vec<Channel> = Channel::PREFILL.into_iter().chain(Channel::RECONSTRUCTION).collect();
        assert_eq!(alignment_channel(&all).unwrap(), (9, Channel::ReconLogOdds));
        assert_eq!(proxy_slots(&all).unwrap(), [8, 9, 10]);
        assert_eq!(proxy_slots(&[Channel::KeyNorm, Channel::MaxWindow]).unwrap(), [1]);
        assert_eq!(proxy_slots(&[Channel::KeyNorm]).unwrap(), [0]);
        assert!(alignment_channel(&[]).is_err());
        assert_eq!(name(Channel::MaxAll), "`max_all`");
    }
}
