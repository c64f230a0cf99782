//! `export`: the frozen mapper with its card and parity vectors.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use pkv_checkpoint::{
    CardTable, Contents, DataSource, EXPORT_VERSION, Export, ExportConfig, Licences, ModelCard,
    ModelIdentity, Parity, StageCost,
};
use pkv_core::{Policy, Split};
use pkv_mapper::MapperDims;
use pkv_results::{RESULTS_FILE, Results};
use pkv_score::ModelFiles;
use pkv_shard::{Example, ExampleRows, Stage, StageReader};
use serde_json::json;
use tch::Tensor;

use super::generated::{self, Loaded};
use super::{Entry, Outcome, hidden, train};
use crate::mapper_source::{Trained, from_checkpoint};
use crate::session::Session;

pub(super) const ENTRY: Entry = Entry {
    held: Some(|s, _| s.run.export()),
    ..Entry::new(
        Stage::Export,
        "Export the mapper: safetensors, config.json, card, parity vectors",
        &[Stage::Prepare, Stage::Label, Stage::Extract, Stage::Train, Stage::Eval],
        |s, _| run(s),
    )
};

/// Positions of the parity vectors: enough for every part of the mapper, small enough to ship.
const PARITY_POSITIONS: i64 = 512;

fn run(s: &Session) -> Result<Outcome> {
    let upstream = train::upstream(s)?;
    let trained = from_checkpoint(s, &upstream)?;
    let folder = s.run.export();
    let results = s.run.eval().join(RESULTS_FILE);
    let results = pkv_core::look_for(&results)
        .and_then(|found| found.map(|_| Results::read(&results)).transpose())
        .inspect_err(|e| tracing::warn!("the export's README.md has no results of `eval`: {e:#}"))
        .unwrap_or_default();
    let config = config(s, &upstream, &trained);
    let card = card(s, results.as_ref())?;
    let contexts = s.recipe.prune.budget_contexts;
    let budgets = pkv_eval::learn_budgets(&s.run.examples(), &s.run.labels(), contexts, s.device)?;
    if let Ok(old) = Export::read(&folder) {
        // One of an older version holds the same mapper: other runs may know it by its weights' hash. It may
        // name a proxy that is not read.
        let (schema_version, unread) = (old.config().schema_version, old.config().proxy.clone());
        let proxy = if config.read_proxy().is_some() { config.proxy.clone() } else { unread };
        let config = ExportConfig { schema_version, proxy, ..config.clone() };
        let card_is_current =
            pkv_core::read_small_text(&folder.join("README.md")).is_ok_and(|t| t == card.render(&config));
        let same = ExportConfig { files: BTreeMap::new(), ..old.config().clone() } == config;
        if same && card_is_current && old.budgets() == Some(&budgets) {
            return Ok(Outcome::Skipped(format!("`{}` holds this mapper and its results", folder.display())));
        }
    }
    let parity = parity(s, &upstream, &trained)?;
    let hidden = hidden::read(s, &upstream.target, &upstream.examples, tch::Device::Cpu)?;
    let extra = hidden.map(|hidden| hidden.tensors()).unwrap_or_default();
    let (config, mapper, budgets) = (&config, &trained.mapper, Some(&budgets));
    let contents = Contents { config, mapper, tensors: &extra, budgets, card: &card, parity: &parity };
    Export::write(&folder, contents)?;
    Ok(Outcome::Done(json!({"folder": folder.display().to_string(), "step": trained.step})))
}

fn config(s: &Session, upstream: &train::Upstream, trained: &Trained) -> ExportConfig {
    let r = &s.recipe;
    ExportConfig {
        schema_version: EXPORT_VERSION,
        written_by: concat!("proxykv-train ", env!("CARGO_PKG_VERSION")).to_owned(),
        name: r.name.clone(),
        target: identity(s, &upstream.target),
        proxy: upstream.proxy.as_ref().map(|proxy| identity(s, proxy)),
        dims: MapperDims::of(r).into(),
        label: r.label.clone(),
        extract: r.extract.content(),
        mapper: r.mapper.clone(),
        loss: r.loss.clone(),
        train: r.train.clone(),
        fingerprint: trained.fingerprint.clone(),
        step: trained.step,
        validation: trained.validation,
        seed: r.seed,
        trained_tokens: r.data.window_tokens.iter().max().copied(),
        files: BTreeMap::new(),
    }
}

fn identity(s: &Session, model: &ModelFiles) -> ModelIdentity {
    ModelIdentity {
        model: model.name.clone(),
        revision: model.revision.clone(),
        dtype: format!("{:?}", s.kind(model.role)),
        shape: model.config.shape,
        vocab_hash: model.tokenizer.vocab_hash(),
        template_hash: model.tokenizer.template_hash(),
    }
}

/// The card: data with licences, what it cost, and the tables of the evaluation if there is one.
fn card(s: &Session, results: Option<&Results>) -> Result<ModelCard> {
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    let mut tokens = 0;
    for example in StageReader::<Example>::open(&s.run.examples())?.iter() {
        let example = example?;
        tokens += example.tokens.len() as u64;
        if example.split == Split::Train {
            *counts.entry(example.source).or_default() += 1;
        }
    }
    let data = s
        .manifest
        .sources
        .iter()
        .map(|source| DataSource {
            name: source.name.clone(),
            examples: counts.get(&source.name).copied().unwrap_or(0),
            licence: source.licence.clone(),
        })
        .collect();
    let tables = results.map_or_else(Vec::new, |r| {
        let answers = Policy::ALL.into_iter().map(|policy| {
            let name = policy.name();
            let caption = format!(
                "Questions answered from the pruned cache, policy `{name}`, percent with 95% intervals"
            );
            (caption, pkv_results::table::answers_table(r, policy))
        });
        let recall = [
            (
                "Recall of KVzip's kept set, policy `pair`, percent".to_owned(),
                pkv_results::table::recall_table(r, Policy::Pair),
            ),
            (
                "What a policy costs: recall of what KVzip keeps under `pair`, percent".to_owned(),
                pkv_results::table::policy_table(r),
            ),
        ];
        answers.chain(recall).filter_map(|(caption, table)| card_table(&caption, &table?)).collect()
    });
    let export = &s.recipe.export;
    let licences = Licences {
        mapper: export.licence.clone(),
        target: export.target_licence.clone(),
        proxy: export.proxy_licence.clone(),
    };
    Ok(ModelCard { data, cost: cost(s, tokens), results: tables, limits: limits(s, results), licences })
}

/// Time of the stages that ran; labels and features each read all `tokens` of the examples.
fn cost(s: &Session, tokens: u64) -> Vec<StageCost> {
    let one = |stage: Stage| {
        let record = s.run.stage(stage.name())?;
        let device = if record.device.is_empty() { "not recorded".to_owned() } else { record.device };
        let reads = matches!(stage, Stage::Label | Stage::Extract);
        Some(StageCost {
            stage: stage.name().to_owned(),
            secs: record.secs,
            device,
            gpus: record.gpus,
            tokens: reads.then_some(tokens),
        })
    };
    [Stage::Label, Stage::Extract, Stage::Train, Stage::Eval].into_iter().filter_map(one).collect()
}

/// Known limits of these weights.
fn limits(s: &Session, results: Option<&Results>) -> Vec<String> {
    let r = &s.recipe;
    let longest = r.data.window_tokens.iter().max().copied().unwrap_or(0);
    let mut limits = vec![
        format!("Trained on contexts of at most {longest} tokens; longer ones are out of its distribution."),
        format!(
            "One training run with seed {}: another seed moves the numbers above by about their intervals.",
            r.seed.0
        ),
    ];
    if let Some(facts) = results.and_then(|r| r.facts.as_ref()) {
        limits.push(format!(
            "The {} questions above are about facts planted in {} contexts of {} tokens: retrieval of short statements, \
             not summaries or reasoning.",
            facts.questions, facts.contexts, r.eval.context_tokens
        ));
        let cells = facts.cells.iter().filter(|c| Some(&c.policy) == r.eval.answer_policies.first());
        limits.extend(pkv_results::table::fewer_contexts(cells.map(|c| (c.method, c.ratio, c.contexts))));
    }
    limits
}

/// A Markdown table as cells.
fn card_table(caption: &str, markdown: &str) -> Option<CardTable> {
    let mut rows = markdown
        .lines()
        .filter(|l| l.starts_with('|'))
        .map(|l| l.trim_matches('|').split('|').map(|c| c.trim().to_owned()).collect::<Vec<_>>());
    let columns = rows.next()?;
    // The line of dashes.
    let _ = rows.next()?;
    Some(CardTable { caption: caption.to_owned(), columns, rows: rows.collect() })
}

/// The beginning of the first test example, through the mapper.
fn parity(s: &Session, upstream: &train::Upstream, trained: &Trained) -> Result<Parity> {
    let features = generated::features(s, upstream, Loaded::default())?;
    let examples = ExampleRows::open(&s.run.examples(), &s.run.labels(), &features)?;
    let first = examples.splits().iter().position(|split| *split == Split::Test).unwrap_or(0);
    let (_, row) = examples.get(first as u64).context("cannot read the features of a test example")?;
    let (heads, channels, positions) =
        (i64::from(row.layers * row.kv_heads), i64::from(row.channels), i64::from(row.positions));
    let keep = positions.min(PARITY_POSITIONS);
    let heads_pct = Tensor::from_slice(&row.heads).view([heads, channels, positions]).narrow(2, 0, keep);
    let globals_ct = Tensor::from_slice(&row.globals).view([-1, positions]).narrow(1, 0, keep);
    let here = |t: Tensor| t.contiguous().to_device(s.device);
    Ok(Parity::of(&trained.mapper, here(heads_pct), here(globals_ct)))
}
