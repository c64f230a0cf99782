//! The mapper: training steps on synthetic shards, through the loader and on batches already on the device.

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use pkv_core::hinted;
use pkv_gpu::unless_exhausted;
use pkv_recipe::Recipe;
use pkv_recipe::plan::{MapperCost, human_bytes, human_flops};
use pkv_train::{BenchOptions, BenchReport, bench};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use super::Job;
use super::clock::Row;
use super::roofline::{self, Roofline};
use super::table::{aligned, ceilings};
use crate::session::device_name;
use pkv_core::Interrupted;

/// The measurements, for the table and `--json`.
#[derive(Debug, Serialize)]
struct Report {
    stage: &'static str,
    recipe: String,
    device: String,
    roofline: Roofline,
    rows: Vec<TrainRow>,
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

/// # Errors
/// The peer's file is not the script's, or a step fails for another reason than memory.
pub(super) fn run(job: &Job) -> Result<()> {
    let Job { args, recipe, contexts, device, stop, .. } = *job;
    let peer = args.peer.as_deref().map_or(Ok(Vec::new()), read_peer)?;
    let cost = MapperCost::new(recipe);
    let mut rows = Vec::new();
    for &context in contexts {
        if stop.load(Ordering::Relaxed) {
            bail!(Interrupted);
        }
        let measured = unless_exhausted(|| measure(recipe, context, args.repeats, device))?;
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
    let report =
        Report { stage: "train", recipe: recipe.name.clone(), device: device_name(device), roofline, rows };
    job.print(&report, |report| text(report, !peer.is_empty()))
}

fn measure(recipe: &Recipe, positions: usize, steps: usize, device: Device) -> Result<BenchReport> {
    bench(&BenchOptions {
        mapper: &recipe.mapper,
        loss: &recipe.loss,
        train: &recipe.train,
        dims: crate::mapper_source::dims(recipe).into(),
        positions,
        shortest: 1.0,
        steps,
        scratch: &std::env::temp_dir(),
        seed: recipe.seed,
        device,
    })
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

fn text(report: &Report, with_peer: bool) -> String {
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
    if with_peer {
        names.extend(["peer", "of", "peer / ours"]);
    }
    let mut lines = vec![names.into_iter().map(str::to_owned).collect()];
    lines.extend(report.rows.iter().map(|row| cells(row, &report.roofline, with_peer)));
    format!(
        "train of `{}` on {}, made-up shards\n{}\nstep: from shards to weights; batch there: the same step on a \
         batch that is on the device already\n\n{}",
        report.recipe,
        report.device,
        ceilings(&report.roofline),
        aligned(&lines)
    )
}

fn cells(row: &TrainRow, roofline: &Roofline, with_peer: bool) -> Vec<String> {
    let dash = || "-".to_owned();
    let Some(m) = &row.measured else {
        return vec![row.context.to_string(), dash(), dash(), row.error.unwrap_or("not measured").to_owned()];
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
        m.peak_bytes.map_or_else(dash, |n| human_bytes(n.max(0) as u64)),
    ];
    if with_peer {
        cells.extend(match &row.peer {
            Some(p) => [
                format!("{:.2} ms", p.step_ms),
                format!("{}{}", p.dtype, if p.compiled { ", compiled" } else { "" }),
                // The peer's batch is on the device already, too.
                format!("{:.2}", p.step_ms / m.resident_step_ms),
            ],
            None => [dash(), dash(), dash()],
        });
    }
    cells
}
