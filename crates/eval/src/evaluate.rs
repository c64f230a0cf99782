//! The evaluation from end to end: from shards, models and mapper to the outcomes that the store lacks.
//!
//! `asked` decides which contexts and cells those are; `gather` summarizes them together with earlier ones.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use pkv_core::{FeatureLayout, Fingerprint, Policy, Progress, Seed, Split, Stop, hinted};
use pkv_data::{FactContext, FactQuestion};
use pkv_extract::{HiddenProjection, SourceExtractors};
use pkv_lm::LanguageModel;
use pkv_mapper::Mapper;
use pkv_prune::HeadBudgets;
use pkv_recipe::{EvalSection, ExtractSection, LabelSection, TargetPool};
use pkv_results::cell::Cell;
use pkv_results::columns::context_id;
use pkv_results::share::{Sharing, share};
use pkv_results::store::{About, ContextStore, Identity, TaskStore};
use pkv_results::{CONTEXTS_FOLDER, FactSpan, LABEL_METRICS, Results};
use pkv_score::Scorer;
use pkv_shard::{
    ExampleRows, FeatureFolders, Missing, Pieces, PiecesPlan, PlantedFact, Sizes, Tally, Worker,
};
use pkv_tasks::Benchmark;
use pkv_text::TextTokenizer;

use crate::asked::{Asked, AskedTask, Work};
use crate::asking::Asking;
use crate::budgets::Budgets;
use crate::context::Reader;
use crate::gather::{MethodsOutcome, publish};
use crate::labels::{LabelOutcome, LabelPlan};
use crate::methods::{self, Draw, Methods, Setup, Target, TrainingSet, feature_tensors, label_tensor};
use crate::stopwatch::Stopwatch;
use crate::task::{Task, TaskOutcome, Texts};
use crate::worked::{ExampleOutcome, work_example};

/// Inputs of an evaluation.
pub struct EvalInputs<'a> {
    pub target: &'a LanguageModel,
    /// Absent if no feature comes from it.
    pub proxy: Option<&'a LanguageModel>,
    /// Map of the target's hidden states, if a channel reads them.
    pub hidden: Option<&'a HiddenProjection>,
    /// Shared by both models.
    pub tokenizer: &'a TextTokenizer,
    pub mapper: &'a Mapper,
    /// Origin of the mapper, in words.
    pub mapper_source: String,
    /// Names of target and proxy, as the recipe has them.
    pub target_name: String,
    pub proxy_name: Option<String>,
    /// Folders of the stages.
    pub examples: &'a Path,
    pub labels: &'a Path,
    /// Of all sources.
    pub features: FeatureFolders,
    /// Contexts of the `facts` task; none are needed without it.
    pub fact_contexts: &'a [FactContext],
    /// Tasks of standard benchmarks.
    pub benchmarks: &'a [Benchmark<'a>],
    pub section: &'a EvalSection,
    pub label: &'a LabelSection,
    pub extract: &'a ExtractSection,
    /// Span pooling that the mapper was trained with.
    pub pool: TargetPool,
    /// Of the policy `pair-budget`.
    pub budgets: Budgets<'a>,
    pub seed: Seed,
    /// Every choice of this evaluation, to be recognised by.
    pub fingerprint: Fingerprint,
    /// What the numbers of every task depend on: the mapper and the stages read, but nothing of `section`, so
    /// that other tasks, methods, policies, ratios and limits add to what is there.
    pub base: Fingerprint,
    /// Folder of the results; made if absent.
    pub out: &'a Path,
    /// One of several tasks that share the contexts, with the device's name; failures in a row that end it.
    pub worker: Option<Worker>,
    pub max_failures: usize,
    /// Checked after every context; the next evaluation continues a stopped one.
    pub stop: Stop,
    /// Gets a sentence about results of other choices that were there.
    pub warn: &'a dyn Fn(&str),
}

impl<'a> EvalInputs<'a> {
    /// The target, which reads contexts after the chat template's prefix.
    pub(crate) fn target_reader(&self) -> Target<'a> {
        Target {
            model: self.target,
            prefix: self.tokenizer.prefix(),
            prefill_chunk_tokens: self.label.prefill_chunk_tokens,
        }
    }

    /// Extractors of the recipe's sources.
    ///
    /// # Errors
    /// A source or the projection of hidden states is absent.
    pub fn extractors(&self) -> Result<SourceExtractors<'a>> {
        SourceExtractors::new(self.target, self.proxy, self.tokenizer, self.extract, self.label, self.hidden)
    }
}

/// Outcome of [`evaluate_part`].
pub enum Evaluated {
    /// Everything that was ever measured with these choices.
    Results(Box<Results>),
    /// This task's contexts are measured; what other tasks lack.
    Part(Missing),
}

/// Measure what is not there yet, write `results.json` and its tables, and return the results: everything
/// that was ever measured with these choices.
///
/// An interrupted evaluation continues after its last whole context and ends with the same numbers;
/// only times differ. Several processes may evaluate into one folder: they share the contexts, and the last
/// one's results are those of all.
///
/// # Errors
/// Shards are absent, damaged or of other models; a model fails; the folder cannot be written to.
pub fn evaluate(inputs: &EvalInputs, progress: &dyn Progress) -> Result<Results> {
    match evaluate_part(inputs, progress)? {
        Evaluated::Results(results) => Ok(*results),
        Evaluated::Part(Missing { what, command }) => Err(hinted(what, command).into()),
    }
}

/// As [`evaluate`], for one of several tasks: there are results once no context of any task is missing.
///
/// # Errors
/// As of [`evaluate`].
pub fn evaluate_part(inputs: &EvalInputs, progress: &dyn Progress) -> Result<Evaluated> {
    Evaluation::open(inputs)?.run(progress)
}

struct Evaluation<'a> {
    inputs: &'a EvalInputs<'a>,
    /// Of the features in `examples`.
    layout: FeatureLayout,
    examples: ExampleRows,
    train: std::ops::Range<u64>,
    test: std::ops::Range<u64>,
    asked: Vec<AskedTask<'a>>,
    store: ContextStore,
    /// Folder for what takes long to fit.
    scorers: PathBuf,
}

impl<'a> Evaluation<'a> {
    fn open(inputs: &'a EvalInputs<'a>) -> Result<Self> {
        methods::check(&inputs.section.methods)?;
        let examples = ExampleRows::open(inputs.examples, inputs.labels, &inputs.features)?;
        let most = LabelSection::most_score(examples.label_fingerprint());
        let examples = examples.with_most_score(most);
        let splits = examples.splits();
        if let Some(sizes) = examples.sizes() {
            check_shapes(inputs, &sizes)?;
        }
        let range = |split| rows_of(&splits, split);
        let (train, test) = (range(Split::Train)?, range(Split::Test)?);
        let asked = Asked {
            section: inputs.section,
            base: &inputs.base,
            test_examples: (test.end - test.start) as usize,
            fact_contexts: inputs.fact_contexts,
            benchmarks: inputs.benchmarks,
        }
        .tasks()?;
        let store = ContextStore::open(inputs.out.join(CONTEXTS_FOLDER))?;
        let scorers = inputs.out.join("scorers");
        let layout = inputs.extract.layout();
        Ok(Self { inputs, layout, examples, train, test, asked, store, scorers })
    }

    fn run(self, progress: &dyn Progress) -> Result<Evaluated> {
        let _no_grad = tch::no_grad_guard();
        let i = self.inputs;
        let target = i.target_reader();
        let reader = Reader {
            target,
            scorer: Scorer::new(i.target, i.tokenizer, i.label)?.maxima_only(),
            extractor: i.extractors()?,
            methods: self.methods(target)?,
            budgets: self.budgets()?,
            keep_recent: i.section.keep_recent,
            seed: i.seed,
        };
        let pieces = i.worker.clone().map(|worker| self.pieces(worker)).transpose()?.flatten();
        let mut sharing = Sharing { progress, stop: &i.stop, pieces: pieces.as_ref(), before: 0 };
        let mut tally = Tally::new(i.max_failures);
        for asked in &self.asked {
            let task = self.store.task(asked.identity.clone())?;
            let ours = |index: &u64| i.worker.as_ref().is_none_or(|w| w.task.has(sharing.before + index));
            progress.start(&asked.what(), (0..asked.contexts as u64).filter(ours).count() as u64, 0);
            self.measure(asked, &task, &reader, &sharing, &mut tally)?;
            progress.finish();
            if tally.is_over() {
                break;
            }
            sharing.before += asked.contexts as u64;
        }
        drop(reader);
        let sum = tally.finish("eval")?;
        if i.worker.is_some() || tally.skipped > 0 {
            tracing::info!("eval: {sum}");
        }
        if let Some(pieces) = &pieces
            && let Some(missing) = self.missing(pieces)?
        {
            return Ok(Evaluated::Part(missing));
        }
        let results = publish(i, &self.asked, &self.store)?;
        self.store.close();
        Pieces::discard(i.out);
        Ok(Evaluated::Results(Box::new(results)))
    }

    /// The contexts of all tasks as pieces, one each.
    fn pieces(&self, worker: Worker) -> Result<Option<Pieces>> {
        let asked: Vec<_> = self.asked.iter().map(|a| (&a.identity, a.contexts, &a.cells)).collect();
        let fingerprint = Fingerprint::new().with("asked", asked);
        let contexts = self.asked.iter().map(|a| a.contexts as u64).sum();
        let plan = PiecesPlan::new("eval", &fingerprint, contexts, 1)?;
        Pieces::open_to_mark(self.inputs.out, plan, worker)
    }

    /// What the store lacks, whatever the markers say.
    fn missing(&self, pieces: &Pieces) -> Result<Option<Missing>> {
        let (mut first, mut missing) = (0, Vec::new());
        for asked in &self.asked {
            let task = self.store.task(asked.identity.clone())?;
            for index in 0..asked.contexts {
                if !task.missing(index, &asked.cells)?.is_empty() {
                    missing.push(first + index as u64);
                }
            }
            first += asked.contexts as u64;
        }
        Ok((!missing.is_empty()).then(|| pieces.missing(&missing)))
    }

    /// What `of` says of the cells that some context lacks.
    fn lacking<T>(&self, of: impl Fn(&Cell) -> T) -> Result<Vec<T>> {
        let mut lacking = Vec::new();
        for asked in &self.asked {
            let task = self.store.task(asked.identity.clone())?;
            for index in 0..asked.contexts {
                lacking.extend(task.missing(index, &asked.cells)?.iter().map(&of));
            }
        }
        Ok(lacking)
    }

    /// Head budgets, if some context lacks a cell that needs them.
    fn budgets(&self) -> Result<Option<Arc<HeadBudgets>>> {
        let needed = self.lacking(|cell| cell.policy)?.contains(&Policy::PairBudget);
        needed.then(|| self.inputs.head_budgets().map(Arc::new)).transpose()
    }

    /// The methods that some context lacks, ready to score.
    fn methods(&'a self, target: Target<'a>) -> Result<Methods<'a>> {
        let i = self.inputs;
        let lacking = self.lacking(|cell| cell.method)?;
        let mut names = i.section.methods.clone();
        names.retain(|name| lacking.contains(name));
        let setup = Setup {
            target,
            mapper: i.mapper,
            channels: self.layout.channels(),
            pool: i.pool,
            training: TrainingSet { examples: &self.examples, rows: self.train.clone() },
            seed: i.seed,
            scorers: &self.scorers,
        };
        let mut clock = Stopwatch::new(i.target.device());
        let methods = clock
            .time("baselines: fit", || Methods::prepare(methods::REGISTRY, &names, &setup))
            .context("fitting baselines on the training examples")?;
        if !names.is_empty() {
            let task = self.store.task(Identity::new(&i.base, About::Methods, ()))?;
            let _claim = task.wait_for(0)?;
            task.add(0, MethodsOutcome { notes: methods.notes().to_vec(), timings: clock.into_timings() })?;
        }
        Ok(methods)
    }

    /// Have everything that is asked of one task.
    fn measure(
        &self,
        asked: &AskedTask,
        task: &TaskStore,
        reader: &Reader,
        sharing: &Sharing,
        tally: &mut Tally,
    ) -> Result<()> {
        let i = self.inputs;
        let (n, cells) = (asked.contexts, &asked.cells);
        match &asked.work {
            Work::Labels => {
                let plan = LabelPlan::new(i.section)?;
                share(task, n, cells, sharing, tally, |index, cells| self.label(&plan, reader, index, cells))
            }
            Work::Ask(work) => {
                let name = asked.identity.about.name();
                share(task, n, cells, sharing, tally, |index, cells| {
                    self.ask(work.as_ref(), &name, reader, index, cells)
                        .with_context(|| format!("asking context {index} of `{name}`"))
                })
            }
            Work::Example { of_facts } => share(task, n, cells, sharing, tally, |_, cells| {
                self.worked_example(*of_facts, reader, cells)
            }),
        }
    }

    /// The questions of one context of a task; `None` if there are none.
    fn ask(
        &self,
        task: &dyn Task,
        name: &str,
        reader: &Reader,
        index: usize,
        cells: &[Cell],
    ) -> Result<Option<TaskOutcome>> {
        let i = self.inputs;
        let test_example = |index: usize| {
            let row = self.test.start + index as u64;
            Ok((row, self.examples.example(row)?))
        };
        let texts = Texts { tokenizer: i.tokenizer, test_example: &test_example };
        let Some(context) = task.context(index, &texts)? else { return Ok(None) };
        let mut clock = Stopwatch::new(i.target.device());
        let draw = Draw { task: name, index: context.draw };
        let pruned = reader.read(&context.tokens, draw, &mut clock)?;
        let asking = Asking { target: i.target, tokenizer: i.tokenizer };
        let mut outcome =
            clock.time(&task.info().timed, || TaskOutcome::of(&context, &asking, cells, &pruned))?;
        *outcome.timings() = clock.into_timings();
        Ok(Some(outcome))
    }

    /// Predictions against the labels of one test example.
    fn label(&self, plan: &LabelPlan, reader: &Reader, index: usize, cells: &[Cell]) -> Result<LabelOutcome> {
        let device = self.inputs.target.device();
        let row = self.test.start + index as u64;
        let (label, features) = self.examples.get(row)?;
        let label_lht = label_tensor(&label, device);
        let features = feature_tensors(&features, device);
        let draw = Draw { task: "labels", index: row };
        let tokens = self.examples.example(row)?.tokens;
        let scored = reader.score_stored(&tokens, &label_lht, &features, draw)?;
        let mut clock = Stopwatch::new(device);
        let mut outcome = clock.time(LABEL_METRICS, || {
            plan.compare(context_id(&tokens), cells, &scored, &label_lht, reader.budgets.as_deref())
        })?;
        outcome.timings = clock.into_timings();
        Ok(outcome)
    }

    /// The first context of the `facts` task, or the first test example.
    fn worked_example(&self, of_facts: bool, reader: &Reader, cells: &[Cell]) -> Result<ExampleOutcome> {
        let i = self.inputs;
        let (id, tokens, facts) = if of_facts {
            let context = &i.fact_contexts[0];
            ("facts-0".to_owned(), context.tokens.clone(), facts_of(context))
        } else {
            let example = self.examples.example(self.test.start)?;
            (example.id.clone(), example.tokens, example.facts.iter().map(span).collect())
        };
        let draw = Draw { task: "facts", index: 0 };
        let pruned = reader.read(&tokens, draw, &mut Stopwatch::new(i.target.device()))?;
        work_example(id, &tokens, facts, cells, &pruned, i.tokenizer)
    }
}

fn facts_of(context: &FactContext) -> Vec<FactSpan> {
    let span = |q: &FactQuestion| FactSpan {
        start: q.fact.0 as usize,
        len: q.fact.1 as usize,
        question: q.question_text.clone(),
        answer: q.answer_text.clone(),
    };
    context.questions.iter().map(span).collect()
}

fn span(fact: &PlantedFact) -> FactSpan {
    FactSpan {
        start: fact.start as usize,
        len: fact.len as usize,
        question: fact.question.clone(),
        answer: fact.answer.clone(),
    }
}

/// Labels must be the target's, features those of the recipe's sources in the channels that the mapper reads.
fn check_shapes(inputs: &EvalInputs, sizes: &Sizes) -> Result<()> {
    let (target, dims) = (inputs.target.shape(), inputs.mapper.dims());
    let found = (sizes.layers, sizes.kv_heads);
    ensure!(
        found == (target.layers, target.kv_heads),
        hinted(
            format!(
                "labels are {} layers x {} KV heads, the target is {} x {}",
                found.0, found.1, target.layers, target.kv_heads
            ),
            "the labels are of another model; run `label` with this recipe"
        )
    );
    let layout = inputs.extract.layout();
    let heads = layout.heads(&target, inputs.proxy.map(LanguageModel::shape).as_ref());
    let found = (sizes.heads, sizes.channels);
    ensure!(
        found == (heads, layout.channels().len()),
        hinted(
            format!(
                "features are of {} KV heads x {} channels, the recipe's sources have {heads} x {}",
                found.0,
                found.1,
                layout.channels().len()
            ),
            "the features are of another model or other channels; run `extract` with this recipe"
        )
    );
    let reads = (dims.proxy_heads, dims.channels, dims.globals, dims.outputs);
    let has = (found.0, found.1, sizes.globals, target.total_kv_heads());
    ensure!(
        reads == has,
        hinted(
            format!(
                "the mapper reads {} heads x {} channels and {} globals for {} target heads; the shards have {} x {} \
                 and {} for {}",
                reads.0, reads.1, reads.2, reads.3, has.0, has.1, has.2, has.3
            ),
            "use the recipe that the mapper was trained with"
        )
    );
    Ok(())
}

/// The rows of a split, which lie together.
pub fn rows_of(splits: &[Split], split: Split) -> Result<std::ops::Range<u64>> {
    let Some(first) = splits.iter().position(|s| *s == split) else { return Ok(0..0) };
    let n = splits[first..].iter().take_while(|s| **s == split).count();
    ensure!(
        splits.iter().filter(|s| **s == split).count() == n,
        "the examples of the {} split do not lie together",
        split.name()
    );
    Ok(first as u64..(first + n) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_are_ranges_of_rows() {
        use Split::{Test, Train, Validation};
        let splits = [Train, Train, Validation, Test];
        assert_eq!(rows_of(&splits, Train).unwrap(), 0..2);
        assert_eq!(rows_of(&splits, Test).unwrap(), 3..4);
        assert_eq!(rows_of(&splits[..3], Test).unwrap(), 0..0);
        assert!(rows_of(&[Train, Test, Train], Train).is_err());
    }
}
