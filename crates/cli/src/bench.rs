//! `bench`: a stage's time per context, and the machine's peak rates.
//!
//! Uses models of a recipe's shapes with random weights (time does not depend on their values) and random
//! tokens, so that nothing is downloaded and no run folder is made. The timed functions are those that the
//! stages call; shards are not written. Running out of memory is reported as a row of the table.

mod clock;
mod decode;
mod extract;
mod label;
mod models;
mod peer;
mod prefill;
mod roofline;
mod table;
mod train;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Result, ensure};
use pkv_core::{ModelShape, hinted};
use pkv_recipe::Recipe;
use serde::Serialize;
use tch::{Device, Kind};

use crate::args::{BenchArgs, BenchWhat, Cli};
use crate::output;
use crate::pair::Role;
use crate::session::{choose_device, device_name, load_recipe};

use clock::{Clock, Row};
use models::Subject;
use peer::Peer;
use roofline::Roofline;

/// The measurements, for the table and `--json`.
#[derive(Debug, Serialize)]
pub struct Report {
    pub stage: &'static str,
    pub recipe: String,
    pub device: String,
    pub dtype: &'static str,
    pub random_weights: bool,
    pub shape: ModelShape,
    pub roofline: Roofline,
    pub rows: Vec<Row>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
}

/// The request.
struct Job<'a> {
    json: bool,
    args: &'a BenchArgs,
    recipe: &'a Recipe,
    contexts: &'a [usize],
    device: Device,
    stop: &'a AtomicBool,
}

impl Job<'_> {
    /// Print a report: as JSON if requested, else as `text`.
    fn print<R: Serialize>(&self, report: &R, text: impl FnOnce(&R) -> String) -> Result<()> {
        output::print_either(self.json, report, || text(report))
    }
}

/// Inputs of the rows of a language model.
pub struct Bench<'a> {
    pub recipe: &'a Recipe,
    pub contexts: &'a [usize],
    pub clock: &'a Clock<'a>,
}

/// Time what `args` name and print it.
///
/// # Errors
/// The recipe or the peer's file is invalid, a model is not available, or the work fails for a reason other
/// than memory.
pub fn run(cli: &Cli, args: &BenchArgs, stop: Arc<AtomicBool>) -> Result<()> {
    let recipe = load_recipe(&args.recipe.recipe, &args.recipe.overrides())?;
    ensure!(args.repeats > 0, hinted("`--repeats` is 0", "measure at least once"));
    let contexts = if args.context.is_empty() { &recipe.data.window_tokens } else { &args.context };
    ensure!(!args.batch.contains(&0), hinted("`--batch` is 0", "decode 1 sequence or more"));
    ensure!(!contexts.contains(&0), hinted("`--context` names a context of 0 tokens", "use 1 or more"));
    let device = choose_device(cli.device, cli.threads)?;
    let job = Job { json: cli.json, args, recipe: &recipe, contexts, device, stop: &stop };
    match args.what {
        BenchWhat::Label | BenchWhat::Extract => models(&job)?,
        BenchWhat::Train => train::run(&job)?,
        BenchWhat::Prefill => prefill::run(&job)?,
        BenchWhat::Decode => decode::run(&job)?,
    }
    if device == Device::Cpu {
        tracing::warn!(
            "figures of a CPU mean little: the work is made for a GPU, and threads share their cores"
        );
    }
    Ok(())
}

/// `label` and `extract`: one of the two language models.
fn models(job: &Job) -> Result<()> {
    let Job { args, recipe, contexts, device, stop, .. } = *job;
    let label = args.what == BenchWhat::Label;
    let role = if label || recipe.read_proxy().is_none() { Role::Target } else { Role::Proxy };
    let subject = Subject::new(recipe, role, device, args.random_weights)?;
    let peer =
        args.peer.as_deref().map(|path| Peer::read(path, &subject, &args.recipe.recipe)).transpose()?;

    let roofline = roofline::measure(device, subject.kind)?;
    let clock = Clock::new(device, args, &roofline, stop);
    let bench = Bench { recipe, contexts, clock: &clock };
    let mut rows = if label { label::rows(&bench, &subject)? } else { extract::rows(&bench, &subject)? };
    if let Some(peer) = &peer {
        rows.iter_mut().for_each(|row| row.peer = peer.find(row));
    }
    let report = Report {
        stage: args.what.name(),
        recipe: recipe.name.clone(),
        device: device_name(device),
        dtype: dtype_name(subject.kind),
        random_weights: args.random_weights,
        shape: subject.section.shape,
        roofline,
        rows,
        peer: peer.map(|p| p.title()),
    };
    job.print(&report, table::text)
}

/// As PyTorch and the peer's script spell it.
fn dtype_name(kind: Kind) -> &'static str {
    if kind == Kind::BFloat16 { "bfloat16" } else { "float32" }
}
