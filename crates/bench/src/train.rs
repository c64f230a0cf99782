//! The mapper: training steps on synthetic shards, through the loader and on batches already on the device.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use pkv_core::hinted;
use pkv_gpu::{device_name, unless_exhausted};
use pkv_mapper::MapperDims;
use pkv_recipe::plan::{MapperCost, human_bytes, human_flops};
use pkv_train::{BenchOptions, BenchReport, bench};
use serde::{Deserialize, Serialize};
use tch::Kind;

use crate::roofline::{self, Roofline};
use crate::row::Row;
use crate::table::{aligned, cell, ratio};
use crate::{Report, Setting};

/// Times of training steps.
#[derive(Debug, Serialize)]
pub struct TrainReport {
    stage: &'static str,
    recipe: String,
    device: String,
    roofline: Roofline,
    rows: Vec<TrainRow>,
    /// Whether there are a peer's figures to show.
    #[serde(skip)]
    with_peer: bool,
}

/// Steps on contexts of one length.
#[derive(Debug, Serialize)]
struct TrainRow {
    context: usize,
    /// Operations of one step, forward and backward; counted, not measured.
    flops: f64,
    #[serde(flatten)]
    measured: Option<BenchReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<PeerStep>,
}

/// A line of `scripts/peer/mapper_compile.py`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct PeerStep {
    batch: usize,
    proxy_heads: usize,
    channels: usize,
    target_heads: usize,
    positions: usize,
    dtype: String,
    compiled: bool,
    step_ms: f64,
}

/// Steps through the loader, and on a batch that is on the device already: `repeats` of them, five times.
/// `peer` holds figures of `scripts/peer/mapper_compile.py`.
///
/// # Errors
/// The peer's file is not the script's, or a step fails for another reason than memory.
pub fn train(setting: Setting, peer: Option<&Path>) -> Result<TrainReport> {
    let Setting { recipe, device, .. } = setting;
    let peer = peer.map_or(Ok(Vec::new()), read_peer)?;
    let cost = MapperCost::new(recipe);
    let mut rows = Vec::new();
    for &context in setting.contexts {
        setting.stop.check()?;
        let options = BenchOptions {
            mapper: &recipe.mapper,
            loss: &recipe.loss,
            train: &recipe.train,
            dims: MapperDims::of(recipe),
            positions: context,
            shortest: 1.0,
            steps: setting.repeats,
            scratch: &std::env::temp_dir(),
            seed: recipe.seed,
            device,
        };
        let measured = unless_exhausted(|| bench(&options))?;
        rows.push(TrainRow {
            context,
            flops: 3.0 * recipe.train.batch as f64 * cost.forward_flops(context),
            error: measured.is_none().then_some(Row::OUT_OF_MEMORY),
            peer: measured.as_ref().and_then(|m| fastest(&peer, m)),
            measured,
        });
    }
    let bf16 = rows.iter().filter_map(|r| r.measured.as_ref()).any(|m| m.dtype == "bf16");
    let roofline = roofline::measure(device, if bf16 { Kind::BFloat16 } else { Kind::Float })?;
    let (recipe, device) = (recipe.name.clone(), device_name(device));
    Ok(TrainReport { stage: "train", recipe, device, roofline, rows, with_peer: !peer.is_empty() })
}

/// One JSON object per line.
fn read_peer(path: &Path) -> Result<Vec<PeerStep>> {
    let context = || {
        hinted(
            format!("cannot use the peer's figures `{}`", path.display()),
            "each line is what one run of `python3 scripts/peer/mapper_compile.py` printed",
        )
    };
    let text = fs::read_to_string(path).with_context(context)?;
    let lines = text.lines().filter(|l| !l.trim().is_empty());
    lines.map(|l| serde_json::from_str(l).with_context(context)).collect()
}

/// The peer's fastest step on a batch of the same size.
fn fastest(peer: &[PeerStep], ours: &BenchReport) -> Option<PeerStep> {
    let sizes = (ours.batch, ours.proxy_heads, ours.channels, ours.target_heads, ours.positions);
    let same =
        peer.iter().filter(|p| (p.batch, p.proxy_heads, p.channels, p.target_heads, p.positions) == sizes);
    same.min_by(|a, b| a.step_ms.total_cmp(&b.step_ms)).cloned()
}

impl Report for TrainReport {
    fn text(&self) -> String {
        let mut names = vec![
            "positions",
            "batch",
            "dtype",
            "step",
            "batch there",
            "speed kept",
            "positions/s",
            "work",
            "of ceiling",
            "peak memory",
        ];
        names.extend(if self.with_peer { &["peer", "of", "peer / ours"][..] } else { &[] });
        let mut lines = vec![names.into_iter().map(str::to_owned).collect()];
        lines.extend(self.rows.iter().map(|row| cells(row, &self.roofline, self.with_peer)));
        format!(
            "train of `{}` on {}, made-up shards\n{}\nstep: from shards to weights; batch there: the same step on a \
             batch that is on the device already\n\n{}",
            self.recipe,
            self.device,
            self.roofline.text(),
            aligned(&lines)
        )
    }
}

fn cells(row: &TrainRow, roofline: &Roofline, with_peer: bool) -> Vec<String> {
    let Some(m) = &row.measured else {
        let failed = row.error.unwrap_or("not measured").to_owned();
        return vec![row.context.to_string(), "-".to_owned(), "-".to_owned(), failed];
    };
    let share = row.flops / (m.resident_step_ms / 1e3) / roofline.flops_per_s;
    let mut cells = vec![
        row.context.to_string(),
        m.batch.to_string(),
        m.dtype.clone(),
        format!("{:.2} ms", m.step_ms),
        format!("{:.2} ms", m.resident_step_ms),
        format!("{:.1}%", 100.0 * m.ratio),
        format!("{:.0}", m.tokens_per_s),
        human_flops(row.flops),
        format!("{:.1}%", 100.0 * share),
        cell(m.peak_bytes, |n| human_bytes(n.max(0) as u64)),
    ];
    if with_peer {
        let peer = row.peer.as_ref();
        cells.push(cell(peer, |p| format!("{:.2} ms", p.step_ms)));
        cells.push(cell(peer, |p| format!("{}{}", p.dtype, if p.compiled { ", compiled" } else { "" })));
        // The peer's batch is on the device already, too.
        cells.push(ratio(peer.map(|p| p.step_ms / m.resident_step_ms)));
    }
    cells
}
