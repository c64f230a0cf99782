//! `eval`: agreement with labels, and answers from pruned caches, of the mapper and the baselines.

use std::path::PathBuf;

use anyhow::{Context, Result};
use pkv_checkpoint::write_tensors;
use pkv_core::{Fingerprint, Split, sha256_hex};
use pkv_data::{FactContext, fact_contexts};
use pkv_eval::{Asked, Budgets, EvalInputs, Evaluated};
use pkv_files::WriteBudget;
use pkv_recipe::{PruneSection, Recipe, TaskName};
use pkv_shard::{Example, Pieces, Stage, StageReader};
use pkv_tasks::{Benchmark, Files, Opening, suite};
use pkv_text::TextTokenizer;
use serde_json::json;
use tch::{Device, Kind};

use super::generated::{self, Loaded};
use super::pieces::worker;
use super::{Entry, Outcome, prepare, train};
use crate::mapper_source::{Trained, from_checkpoint, from_export};
use crate::pair;
use crate::session::{Session, benchmark_manifest_path};

/// Share of right answers from the full cache below which a task measures nothing.
const TOO_FEW: f64 = 0.05;

/// File of the kept sets, in the results' folder.
const KEPT_FILE: &str = "kept.safetensors";

pub(super) const ENTRY: Entry = Entry {
    held: Some(folder),
    adds_up: true,
    in_pieces: true,
    ..Entry::new(
        Stage::Eval,
        "Evaluate the mapper and the baselines, on labels and questions\n\n\
         Agreement with the labels, and answers to questions from pruned caches. \
         Results of other tasks, methods, policies, ratios and limits are added to those already measured with the \
         same mapper; `--redo eval` discards them.",
        &[Stage::Prepare, Stage::Label, Stage::Extract, Stage::Train],
        run,
    )
};

/// Options of `eval` in addition to the recipe.
#[derive(Clone, Debug, Default)]
pub struct EvalOptions {
    /// An export in place of the run's best checkpoint.
    pub mapper: Option<PathBuf>,
    /// Write the mapper's kept pairs of this many contexts.
    pub kept: Option<usize>,
}

/// Folder of the results; an export has its own beside that of the checkpoint.
pub fn folder(s: &Session, options: &EvalOptions) -> PathBuf {
    if options.mapper.is_some() { s.run.eval_of_export() } else { s.run.eval() }
}

fn run(s: &Session, options: &EvalOptions) -> Result<Outcome> {
    let upstream = train::upstream(s)?;
    let trained = match &options.mapper {
        Some(folder) => from_export(s, &upstream, folder)?,
        None => from_checkpoint(s, &upstream)?,
    };
    let out = folder(s, options);
    let files = benchmark_files(s)?;
    let tokenizer = &upstream.target.tokenizer;
    let count = |text: &str| Ok(tokenizer.encode(text)?.len());
    let benchmarks = benchmarks(s, &files, tokenizer, &count)?;
    let identities: Vec<&str> = benchmarks.iter().map(|b| b.identity.as_str()).collect();
    let fingerprint = fingerprint(s, &trained).with("benchmarks", identities);
    let base = base(s, &upstream, &trained)?;
    let test = test_examples(s)?;
    let contexts = contexts(s, tokenizer, &test)?;
    let asked = Asked {
        section: &s.recipe.eval,
        base: &base,
        test_examples: test.len(),
        fact_contexts: &contexts,
        benchmarks: &benchmarks,
    };
    let complete = asked.is_complete(&out, &fingerprint)?;
    let skipped = format!("everything asked for was measured with the {}", trained.source);
    if complete {
        // Of a process that ended just after it wrote the results.
        Pieces::discard(&out);
    }
    if complete && options.kept.is_none() {
        return Ok(Outcome::Skipped(skipped));
    }
    let target = pair::load(s, &upstream.target)?;
    let proxy = upstream.proxy.as_ref().map(|proxy| pair::load(s, proxy)).transpose()?;
    s.stop.check()?;
    let loaded = Loaded { target: Some(&target), proxy: proxy.as_ref() };
    let inputs = EvalInputs {
        target: &target,
        proxy: proxy.as_ref(),
        hidden: trained.hidden.as_ref(),
        tokenizer: &upstream.target.tokenizer,
        mapper: &trained.mapper,
        mapper_source: trained.source.clone(),
        target_name: s.recipe.target.model.clone(),
        proxy_name: s.recipe.read_proxy().map(|proxy| proxy.model.clone()),
        examples: &s.run.examples(),
        labels: &s.run.labels(),
        features: generated::features(s, &upstream, loaded)?,
        fact_contexts: &contexts,
        benchmarks: &benchmarks,
        section: &s.recipe.eval,
        label: &s.recipe.label,
        extract: &s.recipe.extract,
        pool: trained.pool,
        budgets: match &trained.budgets {
            Some(budgets) => Budgets::Given(budgets),
            None => Budgets::Learned(s.recipe.prune.budget_contexts),
        },
        seed: s.recipe.seed,
        fingerprint,
        base: base.clone(),
        out: &out,
        worker: s.part.task.map(|task| worker(s, task)),
        max_failures: s.part.max_failures,
        stop: s.stop.clone(),
        warn: &|text| tracing::warn!("{text}"),
    };
    let results = match complete {
        true => None,
        false => match pkv_eval::evaluate_part(&inputs, &*s.bar)? {
            Evaluated::Results(results) => Some(results),
            Evaluated::Part(missing) => return Ok(Outcome::Piece(Some(missing))),
        },
    };
    if let Some(n) = options.kept {
        write_tensors(&out.join(KEPT_FILE), &pkv_eval::kept_sets(&inputs, n)?, &WriteBudget::from_env())?;
    }
    let Some(results) = results else {
        return Ok(Outcome::Skipped(skipped));
    };
    for task in results.facts.iter().chain(&results.benchmarks).filter(|task| task.full.mean < TOO_FEW) {
        tracing::warn!(
            "the full cache answers {:.1}% of `{}`: the target cannot do this task, so its answers tell nothing about what \
             was kept",
            100.0 * task.full.mean,
            if task.task.is_empty() { "facts" } else { &task.task }
        );
    }
    Ok(Outcome::Done(json!({
        "mapper": trained.source,
        "test_contexts": results.labels.contexts,
        "questions": results.facts.as_ref().map_or(0, |f| f.questions)
            + results.benchmarks.iter().map(|b| b.questions).sum::<usize>(),
    })))
}

/// All choices of this call: the mapper, the recipe's `eval`, the step it was taken at.
fn fingerprint(s: &Session, trained: &Trained) -> Fingerprint {
    let fingerprint = Fingerprint::new()
        .with("mapper", &trained.fingerprint)
        .with("step", trained.step)
        .with("eval", &s.recipe.eval)
        .with("seed", s.recipe.seed)
        .with("source", &trained.source);
    with_budgets(prepare::with_places(fingerprint, &s.recipe), &s.recipe, trained)
}

/// `fingerprint` with the choice of head budgets; the usual one is what fingerprints without it mean.
fn with_budgets(fingerprint: Fingerprint, recipe: &Recipe, trained: &Trained) -> Fingerprint {
    match &trained.budgets {
        Some(of_export) => {
            fingerprint.with("budgets", sha256_hex(format!("{:?}", of_export.shares()).as_bytes()))
        }
        None if recipe.prune == PruneSection::default() => fingerprint,
        None => fingerprint.with("prune", &recipe.prune),
    }
}

/// Settings on which the numbers of every task depend: the mapper's weights, the stages read, the seed.
fn base(s: &Session, upstream: &train::Upstream, trained: &Trained) -> Result<Fingerprint> {
    let mut weights = Vec::new();
    for (name, tensor) in
        trained.mapper.parameters().iter().chain(&trained.loss).chain(&trained.mapper.buffers())
    {
        let flat = tensor.to_kind(Kind::Double).to_device(Device::Cpu).contiguous().view(-1);
        let numbers = Vec::<f64>::try_from(flat).with_context(|| format!("cannot read `{name}`"))?;
        weights.extend(name.bytes());
        weights.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
    }
    let fingerprint = Fingerprint::new()
        .with("mapper", &trained.fingerprint)
        .with("step", trained.step)
        .with("weights", sha256_hex(&weights))
        .with("stages", &upstream.fingerprint)
        .with("seed", s.recipe.seed);
    Ok(with_budgets(prepare::with_places(fingerprint, &s.recipe), &s.recipe, trained))
}

pub fn test_examples(s: &Session) -> Result<Vec<Example>> {
    let reader = StageReader::<Example>::open(&s.run.examples())?;
    reader.iter().filter(|e| e.as_ref().map_or(true, |e| e.split == Split::Test)).collect()
}

/// The tasks of the recipe's suites; `count` counts a text's tokens.
pub fn benchmarks<'a>(
    s: &'a Session,
    files: &'a Files,
    tokenizer: &TextTokenizer,
    count: &'a dyn Fn(&str) -> Result<usize>,
) -> Result<Vec<Benchmark<'a>>> {
    suite::open(&Opening {
        section: &s.recipe.eval,
        files,
        count,
        frame_tokens: tokenizer.prefix().len() + tokenizer.switch().len(),
        seed: s.recipe.seed,
        warn: &|text| tracing::warn!("{text}"),
    })
}

/// The files that the recipe's suites read, found on this machine.
pub fn benchmark_files(s: &Session) -> Result<Files> {
    let needed = suite::sources(&s.recipe.eval);
    let mut files = Files::default();
    let Some(path) = benchmark_manifest_path(&s.recipe).filter(|_| !needed.is_empty()) else {
        return Ok(files);
    };
    let mut manifest = pkv_recipe::load_manifest(&path)?;
    manifest.sources.retain(|source| needed.contains(&source.name.as_str()));
    for source in &manifest.sources {
        files.found.push((source.name.clone(), pkv_data::files(&manifest, source, &s.hub)?));
    }
    files.identity = pkv_data::inputs(&manifest, &s.hub)?;
    Ok(files)
}

/// Contexts with planted facts, from the documents of the test split.
pub fn contexts(s: &Session, tokenizer: &TextTokenizer, test: &[Example]) -> Result<Vec<FactContext>> {
    if !s.recipe.eval.tasks.contains(&TaskName::FACTS) {
        return Ok(Vec::new());
    }
    fact_contexts(
        test,
        &pkv_data::word_lists(&s.manifest)?,
        &s.recipe.eval,
        s.recipe.facts.place,
        tokenizer,
        s.recipe.seed,
    )
    .context("cannot plant facts in the test documents")
}
