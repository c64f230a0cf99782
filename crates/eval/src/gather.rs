//! From the store to `results.json` and its tables: all outcomes measured with the settings of one
//! evaluation.
//!
//! Tasks that this evaluation asks for come with its own settings; other tasks of the same mapper come with
//! the settings that they were last measured with. Results that were made with other choices are set aside,
//! never mixed in and never removed.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use pkv_core::{ModelShape, look_for, sha256_hex};
use pkv_files::{WriteBudget, write_file};
use pkv_results::answered::{Answerers, AnswersOutcome};
use pkv_results::answers::AnswerTable;
use pkv_results::bootstrap::Draws;
use pkv_results::cell::Cell;
use pkv_results::store::{About, ContextStore, Identity, Outcome, Outcomes, TaskStore};
use pkv_results::{AGREEMENT_FILE, ANSWERS_FILE, CONTEXTS_FOLDER, RESULTS_FILE, answered, timings};
use pkv_results::{Made, MethodNote, ModelName, RESULTS_VERSION, Results, Timing};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::asked::AskedTask;
use crate::evaluate::EvalInputs;
use crate::labels::LabelOutcome;
use crate::perplexity::PerplexityOutcome;
use crate::worked::ExampleOutcome;
use crate::{agreement, labels, perplexity, worked};

/// Outcome of starting and fitting the methods.
#[derive(Debug, Serialize, Deserialize)]
pub struct MethodsOutcome {
    pub notes: Vec<MethodNote>,
    pub timings: Vec<Timing>,
}

impl Outcome for MethodsOutcome {
    fn add(&mut self, new: Self) {
        for note in new.notes {
            if self.notes.iter().all(|n| n.method != note.method) {
                self.notes.push(note);
            }
        }
        timings::add_all(&mut self.timings, &new.timings);
    }
}

/// Sum up the store, set aside what was made with other choices, and write results and tables; one process at
/// a time.
///
/// # Errors
/// The folder cannot be written to.
pub fn publish(inputs: &EvalInputs, asked: &[AskedTask], store: &ContextStore) -> Result<Results> {
    let _claim = store.publishing()?;
    let path = |file: &str| inputs.out.join(file);
    let before = look_for(&path(RESULTS_FILE))?.map(|_| Results::read(&path(RESULTS_FILE)));
    let known = before.as_ref().and_then(|b| b.as_ref().ok());
    let mut gathered = Gathered::new(inputs);
    for identity in chosen(inputs, asked, store, known)? {
        gathered.add(identity, store)?;
    }
    let warning = before.map(|before| set_aside(inputs.out, &before, &gathered.results)).transpose()?;
    if let Some(warning) = warning.flatten() {
        (inputs.warn)(&warning);
    }
    if gathered.answers.is_empty() {
        remove_if_there(&path(ANSWERS_FILE))?;
    } else {
        gathered.answers.write(&path(ANSWERS_FILE))?;
    }
    agreement::write(&path(AGREEMENT_FILE), &gathered.labels)?;
    gathered.results.write(&path(RESULTS_FILE))?;
    Ok(gathered.results)
}

/// The tasks that belong into the results, in their order.
///
/// # Errors
/// The store cannot be read.
fn chosen(
    inputs: &EvalInputs,
    asked: &[AskedTask],
    store: &ContextStore,
    before: Option<&Results>,
) -> Result<Vec<Identity>> {
    let base = inputs.base.hash();
    let mut all: Vec<Identity> = asked.iter().map(|a| a.identity.clone()).collect();
    let named = |all: &[Identity], name: &str| all.iter().any(|i| i.about.name() == name);
    let others: Vec<Identity> =
        store.tasks()?.into_iter().filter(|i| i.base == base && !named(&all, &i.about.name())).collect();
    let was_there = |i: &Identity| {
        before.is_some_and(|b| b.made().iter().any(|(_, made)| made.fingerprint == i.fingerprint))
    };
    for identity in &others {
        if named(&all, &identity.about.name()) {
            continue;
        }
        // Of several settings those of the results that are there, or else the last that were measured.
        let rivals = others.iter().filter(|i| i.about.name() == identity.about.name());
        let mut rated = Vec::new();
        for rival in rivals {
            let last = store.task(rival.clone())?.outcomes::<serde::de::IgnoredAny>()?.measured;
            rated.push(((was_there(rival), last), rival));
        }
        all.extend(rated.into_iter().max_by(|(a, _), (b, _)| a.cmp(b)).map(|(_, rival)| rival.clone()));
    }
    let suites = pkv_tasks::REGISTRY;
    let place = |about: &About| match about {
        About::Methods => 0,
        About::Labels => 1,
        About::Facts { .. } => 2,
        About::Perplexity { .. } => 3,
        About::Benchmark { suite, .. } => {
            4 + suites.iter().position(|s| s.name() == suite).unwrap_or(suites.len())
        }
        // The one with facts is preferred.
        About::Example { of_facts: true } => 5 + suites.len(),
        About::Example { of_facts: false } => 6 + suites.len(),
    };
    all.sort_by_key(|i| place(&i.about));
    Ok(all)
}

/// Results in the making.
struct Gathered {
    results: Results,
    answers: AnswerTable,
    labels: Vec<(usize, LabelOutcome)>,
    shape: ModelShape,
    draws: Draws,
}

impl Gathered {
    fn new(i: &EvalInputs) -> Self {
        let name = |shape: ModelShape, name: &str| ModelName {
            name: name.to_owned(),
            layers: shape.layers,
            kv_heads: shape.kv_heads,
        };
        let results = Results {
            schema_version: RESULTS_VERSION,
            fingerprint: i.fingerprint.hash(),
            seed: i.seed.0,
            bootstrap: Some(i.section.bootstrap),
            mapper: i.mapper_source.clone(),
            target: name(i.target.shape(), &i.target_name),
            proxy: i.proxy.zip(i.proxy_name.as_ref()).map(|(model, of)| name(model.shape(), of)),
            notes: Vec::new(),
            labels: Default::default(),
            facts: None,
            perplexity: None,
            benchmarks: Vec::new(),
            worked_example: None,
            timings: Vec::new(),
        };
        Self {
            results,
            answers: AnswerTable::new(pkv_data::fact_kind),
            labels: Vec::new(),
            shape: i.target.shape(),
            draws: Draws::new(i.section.bootstrap, i.seed),
        }
    }

    /// Sum up one task.
    fn add(&mut self, identity: Identity, store: &ContextStore) -> Result<()> {
        let task = store.task(identity.clone())?;
        let name = identity.about.name();
        let outcomes = task.count()?;
        let made = |measured: String| Made { fingerprint: identity.fingerprint.clone(), measured, outcomes };
        fn read<T: DeserializeOwned>(task: &TaskStore) -> Result<(Vec<(usize, T)>, String)> {
            let Outcomes { all, measured } = task.outcomes()?;
            Ok((all, measured))
        }
        match &identity.about {
            About::Methods => {
                for (_, o) in read::<MethodsOutcome>(&task)?.0 {
                    self.results.notes.extend(o.notes);
                    timings::add_all(&mut self.results.timings, &o.timings);
                }
            }
            About::Labels => {
                let (all, measured) = read::<LabelOutcome>(&task)?;
                self.time(all.iter().map(|(_, o)| &o.timings));
                let (layers, kv_heads) = (self.shape.layers, self.shape.kv_heads);
                self.results.labels = labels::summarize(made(measured), &all, layers, kv_heads, &self.draws);
                self.labels = all;
            }
            About::Facts { .. } | About::Benchmark { .. } => {
                let (mut all, measured) = read::<AnswersOutcome>(&task)?;
                let of = match &identity.about {
                    About::Benchmark { suite, name } => Answerers { suite, task: name, answer_match: None },
                    about => {
                        all = all.into_iter().map(|(index, o)| (index, o.with_squads())).collect();
                        Answerers { suite: "", task: "", answer_match: about.answer_match() }
                    }
                };
                self.time(all.iter().map(|(_, o)| &o.timings));
                let cells = Cell::union(all.iter().flat_map(|(_, o)| o.cells.cells()));
                all.iter().for_each(|(index, o)| self.answers.push_all(&name, *index, o, &cells));
                let summed = answered::summarize(&made(measured), &of, &all, &self.draws);
                match of.answer_match {
                    Some(_) => self.results.facts = summed.into_iter().next(),
                    None => self.results.benchmarks.extend(summed),
                }
            }
            About::Perplexity { continuation_tokens } => {
                let (all, measured) = read::<Option<PerplexityOutcome>>(&task)?;
                let all: Vec<PerplexityOutcome> = all.into_iter().filter_map(|(_, o)| o).collect();
                self.time(all.iter().map(|o| &o.timings));
                let summed = perplexity::summarize(made(measured), *continuation_tokens, &all, &self.draws);
                self.results.perplexity = Some(summed);
            }
            About::Example { .. } => {
                if self.results.worked_example.is_none() {
                    let first = read::<ExampleOutcome>(&task)?.0.into_iter().next();
                    self.results.worked_example = first.and_then(|(_, o)| worked::summarize(o));
                }
            }
        }
        Ok(())
    }

    fn time<'t>(&mut self, of: impl Iterator<Item = &'t Vec<Timing>>) {
        of.for_each(|timings| timings::add_all(&mut self.results.timings, timings));
    }
}

/// Keep the results `before` under other names if a part of them is not in `now`; says which part.
fn set_aside(out: &Path, before: &Result<Results>, now: &Results) -> Result<Option<String>> {
    let now = now.made();
    let is_in =
        |name: &str, made: &Made| now.iter().any(|(n, m)| n == name && m.fingerprint == made.fingerprint);
    let (hash, why) = match before {
        Ok(before) => {
            let made = before.made();
            let gone = made.iter().filter(|(name, made)| !is_in(name, made));
            let gone: Vec<String> = gone.map(|(name, _)| format!("`{name}`")).collect();
            if gone.is_empty() {
                return Ok(None);
            }
            let why = match made.iter().all(|(_, made)| made.fingerprint.is_empty()) {
                true => format!("{} of an earlier version", gone.join(", ")),
                false => format!("{} measured with other choices", gone.join(", ")),
            };
            (before.fingerprint.clone(), why)
        }
        Err(_) => (
            sha256_hex(&pkv_core::read_small(&out.join(RESULTS_FILE)).unwrap_or_default()),
            "unreadable".to_owned(),
        ),
    };
    let hash = hash.get(..8).unwrap_or(&hash);
    let mut kept = Vec::new();
    for file in [RESULTS_FILE, ANSWERS_FILE, AGREEMENT_FILE] {
        let path = out.join(file);
        // What is no file holds nothing to keep.
        if pkv_core::check_regular(&path).is_err() {
            continue;
        }
        let bytes = pkv_core::read_at_most(&path, 4 << 30)
            .with_context(|| format!("cannot read `{}`", path.display()))?;
        let (stem, extension) = file.split_once('.').unwrap_or((file, ""));
        let name = format!("{stem}-{hash}.{extension}");
        write_file(&out.join(&name), &bytes, &WriteBudget::from_env())?;
        kept.push(format!("`{name}`"));
    }
    Ok(Some(format!(
        "`{}` held results that are not added up with the new ones: {why}. They are kept in {}; what lies in `{}` comes \
         back with the same choices",
        out.join(RESULTS_FILE).display(),
        kept.join(", "),
        CONTEXTS_FOLDER,
    )))
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove `{}`", path.display()))
        }
        _ => Ok(()),
    }
}
