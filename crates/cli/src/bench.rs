//! `bench`: measures with `pkv_bench` and prints the report.

use std::time::Duration;

use anyhow::Result;
use pkv_bench::{FeatureSet, Models, Report, Setting, decode, extract, label, prefill, train};
use pkv_core::Stop;
use pkv_infer::write_traces;
use pkv_run::session::{choose_devices, load_recipe};
use tch::Device;

use crate::args::{self, BenchCommand, Cli};
use crate::output;

/// Time what is asked for and print it.
///
/// # Errors
/// The recipe or the peer's file is invalid, a model is not available, or the work fails for a reason other
/// than memory.
pub fn run(cli: &Cli, command: &BenchCommand, stop: &Stop) -> Result<()> {
    use BenchCommand::{Decode, Extract, Label, Prefill, Train};
    let (lengths, most) = match command {
        Label(stage) | Extract(stage) => (&stage.lengths, stage.models.max_seconds),
        Prefill { lengths, models, .. } | Decode { lengths, models, .. } => (lengths, models.max_seconds),
        Train { lengths, .. } => (lengths, f64::INFINITY),
    };
    let recipe = load_recipe(&lengths.recipe.recipe, &lengths.recipe.sets)?;
    let is_spread = matches!(command, Label(_));
    if !is_spread {
        cli.single_device("bench")?;
    }
    let devices = choose_devices(&cli.device, cli.threads)?;
    let devices = if is_spread { devices.of_target(&recipe)? } else { devices.list() };
    let device = devices.last().copied().unwrap_or(Device::Cpu);
    let named: Vec<usize> = lengths.context.iter().map(|n| n.get()).collect();
    let setting = Setting {
        recipe: &recipe,
        contexts: if named.is_empty() { &recipe.data.window_tokens } else { &named },
        device,
        target_devices: &devices,
        repeats: lengths.repeats.get(),
        most: Duration::try_from_secs_f64(most).unwrap_or(Duration::MAX),
        stop,
    };
    let with = |models: &args::BenchModels, peer| Models { random_weights: models.random_weights, peer };
    match command {
        Label(stage) => print(cli, &label(setting, with(&stage.models, stage.peer.path()))?)?,
        Extract(stage) => print(cli, &extract(setting, with(&stage.models, stage.peer.path()))?)?,
        Train { peer, .. } => print(cli, &train(setting, peer.as_deref())?)?,
        Prefill { models, peer, features, trace, .. } => {
            let sets: &[FeatureSet] =
                if features.is_empty() { FeatureSet::defaults(&recipe) } else { features };
            let report = prefill(setting, with(models, peer.path()), sets)?;
            if let Some(path) = trace {
                write_traces(path, &report.traces)?;
            }
            print(cli, &report)?;
        }
        Decode { models, batch, .. } => {
            let batches: Vec<usize> = batch.iter().map(|n| n.get()).collect();
            print(cli, &decode(setting, models.random_weights, &batches)?)?;
        }
    }
    if device == Device::Cpu {
        tracing::warn!(
            "figures of a CPU mean little: the work is made for a GPU, and threads share their cores"
        );
    }
    Ok(())
}

fn print(cli: &Cli, report: &impl Report) -> Result<()> {
    output::print_either(cli.json, report, || report.text())
}
