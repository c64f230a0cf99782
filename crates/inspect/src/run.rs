//! A run folder as a whole, and the results of its evaluation.

use std::path::Path;

use anyhow::{Context, Result};
use pkv_checkpoint::CheckpointStore;
use pkv_core::{Source, hinted};
use pkv_recipe::MethodName;
use pkv_recipe::plan::{human_bytes, human_secs};
use pkv_results::{RESULTS_FILE, Results};
use pkv_shard::{RunJson, RunLayout, Stage, StageDir};

use super::shards::rows;
use super::{Lines, short};

pub fn run(dir: &Path) -> Result<String> {
    let layout = RunLayout::new(dir);
    let run = RunJson::read(&layout)?.with_context(|| {
        hinted(format!("there is no `{}`", layout.run_json().display()), "name a run folder")
    })?;
    let name = run.name.as_deref().unwrap_or("?");
    let mut out = Lines::new(format!("run `{name}` in `{}`", dir.display()));
    for (name, value) in [
        ("recipe", run.recipe_path),
        ("target", run.target.map(|found| found.model)),
        ("proxy", run.proxy.map(|found| found.model)),
        ("device", run.device),
        ("version", run.tool.map(|tool| tool.version)),
    ] {
        if let Some(value) = value {
            out.add(name, value);
        }
    }
    out.add("seed", run.seed.map_or_else(|| "null".to_owned(), |seed| seed.to_string()));
    out.block("stages");
    let reads = |source: Source| match run.recipe["extract"]["from"].as_array() {
        Some(from) => from.iter().any(|name| name == source.name()),
        None => source == Source::Proxy,
    };
    let unread: Vec<_> = Source::ALL.into_iter().filter(|s| !reads(*s)).map(|s| layout.features(s)).collect();
    for path in layout.shard_folders().into_iter().filter(|path| path.is_dir() || !unread.contains(path)) {
        let folder = path.file_name().unwrap_or_default().to_string_lossy();
        let summary = match StageDir::read(&path) {
            Ok(stage) => format!("{}, {}", rows(&stage), human_bytes(stage.index().bytes())),
            Err(_) => "not there yet".to_owned(),
        };
        out.add(&folder, summary);
    }
    out.add("checkpoints", best_checkpoint(&layout.checkpoints()));
    let results = Results::read(&layout.eval().join(RESULTS_FILE)).ok();
    out.add("eval", results.as_ref().map_or_else(|| "not there yet".to_owned(), headline));
    for (name, file) in [("export", layout.export().join("config.json")), ("report", layout.report())] {
        let there = file.exists().then(|| file.display().to_string());
        out.add(name, there.unwrap_or_else(|| "not there yet".to_owned()));
    }
    if !run.stages.is_empty() {
        out.block("times");
        for stage in Stage::ALL {
            if let Some(record) = run.stages.get(stage.name()) {
                out.add(stage.name(), human_secs(record.secs));
            }
        }
    }
    Ok(out.text)
}

fn best_checkpoint(dir: &Path) -> String {
    let look = || -> Result<Option<String>> {
        let store = CheckpointStore::read_only(dir)?;
        let steps: Vec<String> = store.list()?.iter().map(|c| c.step.to_string()).collect();
        let best = store.best_validation()?;
        let best = best.map_or_else(String::new, |(step, v)| format!(", best {step} with {v:.4}"));
        Ok((!steps.is_empty()).then(|| format!("steps {}{best}", steps.join(", "))))
    };
    look().ok().flatten().unwrap_or_else(|| "not there yet".to_owned())
}

/// A folder of run folders: what each holds, in a line. `None` if there is none in it.
pub fn runs(dir: &Path) -> Result<Option<String>> {
    let mut out = Lines::new(format!("runs in `{}`", dir.display()));
    let entries = dir.read_dir().with_context(|| format!("cannot read folder `{}`", dir.display()))?;
    let mut folders: Vec<_> = entries.collect::<Result<_, _>>()?;
    folders.sort_by_key(|entry| entry.file_name());
    let mut any = false;
    // A sweep's lock lies beside its runs.
    for folder in folders.iter().filter(|entry| entry.path().is_dir()) {
        let layout = RunLayout::new(folder.path());
        let Some(run) = RunJson::read(&layout)? else { continue };
        any = true;
        // In the order in which they run.
        let stages: Vec<&str> =
            Stage::ALL.iter().map(|s| s.name()).filter(|name| run.stages.contains_key(*name)).collect();
        let state = match Results::read(&layout.eval().join(RESULTS_FILE)) {
            Ok(results) => headline(&results),
            Err(_) if stages.is_empty() => "no stage has run".to_owned(),
            Err(_) => format!("stages {}", stages.join(", ")),
        };
        out.add(&folder.file_name().to_string_lossy(), state);
    }
    Ok(any.then_some(out.text))
}

/// The mapper's answers at every ratio that was measured, under the policy that was measured first.
fn headline(r: &Results) -> String {
    let cells = || r.facts.iter().flat_map(|f| &f.cells).filter(|c| c.method == MethodName::MAPPER);
    let Some(policy) = cells().next().map(|c| c.policy) else {
        return format!("labels of {} contexts", r.labels.contexts);
    };
    let parts = cells().filter(|c| c.policy == policy);
    let parts = parts.map(|c| format!("{:.1}% at {}%", 100.0 * c.score.mean, (c.ratio * 1e6).round() / 1e4));
    format!("mapper answers {} ({})", parts.collect::<Vec<_>>().join(", "), policy.name())
}

pub fn results(path: &Path) -> Result<String> {
    let r = Results::read(path)?;
    let mut out = Lines::new(format!("results `{}`", path.display()));
    out.add("schema", r.schema_version).add("mapper", &r.mapper).add("target", &r.target.name);
    if let Some(proxy) = &r.proxy {
        out.add("proxy", &proxy.name);
    }
    out.add("fingerprint", &r.fingerprint)
        .add("labels", format!("{} contexts, {} positions", r.labels.contexts, r.labels.positions));
    if let Some(f) = &r.facts {
        out.add(
            "facts",
            format!(
                "{} questions about {} contexts, full cache {:.1}%",
                f.questions,
                f.contexts,
                100.0 * f.full.mean
            ),
        );
    }
    if let Some(p) = &r.perplexity {
        out.add(
            "perplexity",
            format!("{} contexts, full cache {:.3} nats per token", p.contexts, p.full.mean),
        );
    }
    for b in &r.benchmarks {
        out.add(
            &b.suite,
            format!(
                "{}: {} questions about {} contexts, full cache {:.1}%",
                b.task,
                b.questions,
                b.contexts,
                100.0 * b.full.mean
            ),
        );
    }
    for (task, made) in r.made().iter().filter(|(_, made)| !made.fingerprint.is_empty()) {
        out.add("measured", format!("{task} on {}, choices {}", made.measured, short(&made.fingerprint)));
    }
    out.text.push('\n');
    out.text.push_str(&pkv_results::table::all_tables(&r));
    Ok(out.text)
}
