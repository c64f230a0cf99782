//! The evaluation from end to end: shards, models and mapper in, results and answers out.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use pkv_core::{Fingerprint, ModelShape, Progress, Seed, Split, hinted};
use pkv_data::{FactContext, FactQuestion};
use pkv_extract::{HiddenProjection, SourceExtractors};
use pkv_lm::{LanguageModel, TextTokenizer};
use pkv_mapper::Mapper;
use pkv_recipe::{EvalSection, ExtractSection, LabelSection, TargetPool, Task};
use pkv_score::Scorer;
use pkv_shard::{Example, FeatureFolders, FeatureRow, FeatureSet, LabelRow, PlantedFact, StageReader};

use crate::agreement::{self, AGREEMENT_FILE};
use crate::answers::AnswerTable;
use crate::asking::Asking;
use crate::bench::{self, BenchOutcome, Benchmark};
use crate::bootstrap::Bootstrap;
use crate::clock::Clock;
use crate::columns::context_id;
use crate::context::Reader;
use crate::facts::FactsOutcome;
use crate::labels::{LabelOutcome, Plan};
use crate::methods::{
    self, Draw, Methods, Setup, Target, TrainingSet, feature_tensors, label_tensor, read_pair,
};
use crate::perplexity::PerplexityOutcome;
use crate::results::{
    BenchmarkResults, FactSpan, FactsResults, LabelResults, ModelName, PerplexityResults, RESULTS_VERSION,
    Results, WorkedExample,
};
use crate::share::share;
use crate::store::{Claim, ContextStore};
use crate::worked::work_example;
use crate::{facts, perplexity};

/// File of the results in the evaluation's folder.
pub const RESULTS_FILE: &str = "results.json";
/// File of every answer in the evaluation's folder.
pub const ANSWERS_FILE: &str = "answers.parquet";

/// What an evaluation looks at.
pub struct EvalInputs<'a> {
    pub target: &'a LanguageModel,
    /// Absent if no feature comes from it.
    pub proxy: Option<&'a LanguageModel>,
    pub proxy_shape: ModelShape,
    /// Map of the target's hidden states, if a channel reads them.
    pub hidden: Option<&'a HiddenProjection>,
    /// Shared by both models.
    pub tokenizer: &'a TextTokenizer,
    pub mapper: &'a Mapper,
    /// Where the mapper came from, in words.
    pub mapper_source: String,
    /// Names of target and proxy, as the recipe has them.
    pub target_name: String,
    pub proxy_name: String,
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
    pub seed: Seed,
    /// Every choice that the results depend on, the stages read included.
    pub fingerprint: Fingerprint,
    /// The choices that a single context's outcome depends on: neither which tasks there are nor how many contexts, so
    /// that more of either continue what is there.
    pub context_fingerprint: Fingerprint,
    /// Folder of the results; made if absent.
    pub out: &'a Path,
    /// Asked after every context; its error ends the evaluation, which the next one continues.
    pub check_stop: &'a dyn Fn() -> Result<()>,
}

impl<'a> EvalInputs<'a> {
    /// Extractors of the recipe's sources.
    ///
    /// # Errors
    /// A source or the projection of hidden states is absent.
    pub fn extractors(&self) -> Result<SourceExtractors<'a>> {
        SourceExtractors::new(self.target, self.proxy, self.tokenizer, self.extract, self.label, self.hidden)
    }
}

/// Whether `out` holds the results of exactly this evaluation.
pub fn is_complete(out: &Path, fingerprint: &Fingerprint) -> bool {
    Results::read(&out.join(RESULTS_FILE)).is_ok_and(|r| r.fingerprint == fingerprint.hash())
}

/// Measure, write `results.json` and `answers.parquet`, and return the results.
///
/// An interrupted evaluation continues after its last whole context and ends with the same numbers;
/// only times differ. Several processes may evaluate into one folder: they share the contexts, and each returns all
/// results.
///
/// # Errors
/// Shards are absent, damaged or of other models; a model fails; the folder cannot be written to.
pub fn evaluate(inputs: &EvalInputs, progress: &dyn Progress) -> Result<Results> {
    Evaluation::open(inputs)?.run(progress)
}

struct Evaluation<'a> {
    inputs: &'a EvalInputs<'a>,
    examples: StageReader<Example>,
    labels: StageReader<LabelRow>,
    features: FeatureSet,
    train: std::ops::Range<u64>,
    test: std::ops::Range<u64>,
    store: ContextStore,
}

impl<'a> Evaluation<'a> {
    fn open(inputs: &'a EvalInputs<'a>) -> Result<Self> {
        methods::check(&inputs.section.methods)?;
        let examples = StageReader::<Example>::open(inputs.examples)?;
        let labels = StageReader::<LabelRow>::open(inputs.labels)?;
        let features = FeatureSet::open(&inputs.features)?;
        ensure!(
            examples.len() == labels.len() && examples.len() == features.len(),
            hinted(
                format!(
                    "{} examples, {} labels and {} features do not belong together",
                    examples.len(),
                    labels.len(),
                    features.len()
                ),
                "run `label` and `extract` again on these examples"
            )
        );
        if !labels.is_empty() {
            check_shapes(inputs, &labels.get(0)?, &features.get(0)?)?;
        }
        let splits = examples.iter().map(|e| Ok(e?.split)).collect::<Result<Vec<_>>>()?;
        let range = |split| rows_of(&splits, split);
        let (train, test) = (range(Split::Train)?, range(Split::Test)?);
        let store = ContextStore::open(inputs.out.join("contexts"), inputs.context_fingerprint.hash())?;
        Ok(Self { inputs, examples, labels, features, train, test, store })
    }

    fn run(self, progress: &dyn Progress) -> Result<Results> {
        let _no_grad = tch::no_grad_guard();
        let i = self.inputs;
        let mut clock = Clock::new(i.target.device());
        let target = Target {
            model: i.target,
            prefix: i.tokenizer.prefix(),
            prefill_chunk_tokens: i.label.prefill_chunk_tokens,
        };
        let setup = Setup {
            target,
            mapper: i.mapper,
            channels: &i.extract.channels,
            pool: i.pool,
            training: TrainingSet {
                examples: &self.examples,
                labels: &self.labels,
                features: &self.features,
                rows: self.train.clone(),
            },
            seed: i.seed,
            scorers: &i.out.join("scorers"),
        };
        let methods = clock
            .time("baselines: fit", || Methods::prepare(methods::REGISTRY, &i.section.methods, &setup))
            .context("fitting baselines on the training examples")?;
        let notes = methods.notes().to_vec();
        let reader = Reader {
            target,
            scorer: Scorer::new(i.target, i.tokenizer, i.label)?.maxima_only(),
            extractor: i.extractors()?,
            methods,
            seed: i.seed,
        };
        let labels = self.labels(&reader, &mut clock, progress)?;
        let mut answers = AnswerTable::default();
        let facts = match i.section.tasks.contains(&Task::Facts) {
            true => Some(self.facts(&reader, &mut answers, &mut clock, progress)?),
            false => None,
        };
        let perplexity = match i.section.tasks.contains(&Task::Perplexity) {
            true => Some(self.perplexity(&reader, &mut clock, progress)?),
            false => None,
        };
        let mut benchmarks = Vec::new();
        for benchmark in i.benchmarks {
            benchmarks.extend(self.benchmark(benchmark, &reader, &mut answers, &mut clock, progress)?);
        }
        let worked_example = self.worked_example(&reader)?;
        let name = |shape: ModelShape, name: &str| ModelName {
            name: name.to_owned(),
            layers: shape.layers,
            kv_heads: shape.kv_heads,
        };
        let results = Results {
            schema_version: RESULTS_VERSION,
            fingerprint: i.fingerprint.hash(),
            seed: i.seed.0,
            mapper: i.mapper_source.clone(),
            target: name(i.target.shape(), &i.target_name),
            proxy: name(i.proxy_shape, &i.proxy_name),
            notes,
            labels,
            facts,
            perplexity,
            benchmarks,
            worked_example,
            timings: clock.into_timings(),
        };
        drop(reader);
        self.publish(results, answers)
    }

    /// Predictions against labels, over the test split.
    fn labels(&self, reader: &Reader, clock: &mut Clock, progress: &dyn Progress) -> Result<LabelResults> {
        let i = self.inputs;
        let plan = Plan::new(i.section)?;
        let total = (self.test.end - self.test.start) as usize;
        progress.start("test examples against their labels", total as u64, 0);
        let outcomes: Vec<LabelOutcome> =
            share(&self.store, "labels", total, progress, i.check_stop, |index| {
                let row = self.test.start + index as u64;
                let (label, features) = read_pair(&self.labels, &self.features, row)?;
                let label_lht = label_tensor(&label, i.target.device());
                let features = feature_tensors(&features, i.target.device());
                let draw = Draw { task: "labels", index: row };
                let tokens = self.examples.get(row)?.tokens;
                let scored = reader.score_stored(&tokens, &label_lht, &features, draw)?;
                clock.time("labels: metrics", || plan.compare(&scored, &label_lht))
            })?;
        progress.finish();
        let tokens = |row: u64| Ok(context_id(&self.examples.get(row)?.tokens));
        let ids = self.test.clone().map(tokens).collect::<Result<Vec<_>>>()?;
        {
            let _claim = self.publishing()?;
            agreement::write(&self.path(AGREEMENT_FILE), &plan, &ids, &outcomes)?;
        }
        let bootstrap = Bootstrap::new(outcomes.len(), i.section.bootstrap, i.seed);
        let shape = i.target.shape();
        Ok(plan.summarize(&outcomes, shape.layers, shape.kv_heads, &bootstrap))
    }

    /// Planted facts; every answer goes into `table`.
    fn facts(
        &self,
        reader: &Reader,
        table: &mut AnswerTable,
        clock: &mut Clock,
        progress: &dyn Progress,
    ) -> Result<FactsResults> {
        let i = self.inputs;
        ensure!(
            !i.fact_contexts.is_empty(),
            hinted(
                "there is no context for the `facts` task",
                "raise `eval.contexts`, or leave `facts` out of `eval.tasks`"
            )
        );
        let asking = Asking { target: i.target, tokenizer: i.tokenizer };
        let cells = facts::cells(i.section)?;
        let contexts = i.fact_contexts;
        progress.start("contexts asked for planted facts", contexts.len() as u64, 0);
        let outcomes: Vec<FactsOutcome> =
            share(&self.store, "facts", contexts.len(), progress, i.check_stop, |index| {
                let mut clock = Clock::new(i.target.device());
                let draw = Draw { task: "facts", index: index as u64 };
                let pruned = reader.read(&contexts[index].tokens, draw, &mut clock)?;
                let mut outcome = clock
                    .time("facts: questions", || asking.facts(&contexts[index], i.section, &pruned))
                    .with_context(|| format!("asking context {index} for its facts"))?;
                outcome.timings = clock.into_timings();
                Ok(outcome)
            })?;
        progress.finish();
        for (index, outcome) in outcomes.iter().enumerate() {
            outcome.timings.iter().for_each(|t| clock.add(t));
            table.of_context(&context_id(&contexts[index].tokens));
            for (q, asked) in outcome.asked.iter().enumerate() {
                table.push("facts", (index, q), asked, None, &outcome.full[q]);
                for (cell, answers) in cells.iter().zip(&outcome.cells) {
                    table.push("facts", (index, q), asked, Some(cell), &answers[q]);
                }
            }
        }
        let bootstrap = Bootstrap::new(outcomes.len(), i.section.bootstrap, i.seed);
        facts::summarize(i.section, &outcomes, &bootstrap)
    }

    /// One task of a benchmark; every answer goes into `table`.
    fn benchmark(
        &self,
        benchmark: &Benchmark,
        reader: &Reader,
        table: &mut AnswerTable,
        clock: &mut Clock,
        progress: &dyn Progress,
    ) -> Result<Vec<BenchmarkResults>> {
        let i = self.inputs;
        let asking = Asking { target: i.target, tokenizer: i.tokenizer };
        let cells = facts::cells(i.section)?;
        let name = format!("{}.{}", benchmark.suite, benchmark.task);
        // Outcomes of other settings lie beside each other.
        let identity = Fingerprint::new()
            .with("context", i.context_fingerprint.hash())
            .with("task", &benchmark.identity);
        let stored = format!("{name}-{}", &identity.hash()[..8]);
        progress.start(&format!("contexts of {name}"), benchmark.examples as u64, 0);
        let outcomes: Vec<BenchOutcome> =
            share(&self.store, &stored, benchmark.examples, progress, i.check_stop, |index| {
                let one = || -> Result<BenchOutcome> {
                    let example = (benchmark.example)(index)?;
                    let tokenized = bench::tokenize(&example, benchmark.prompt_tokens, i.tokenizer)?;
                    let mut clock = Clock::new(i.target.device());
                    let draw = Draw { task: &name, index: index as u64 };
                    let pruned = reader.read(&tokenized.context, draw, &mut clock)?;
                    let what = format!("{}: questions", benchmark.suite);
                    let mut outcome =
                        clock.time(&what, || asking.bench(&example, &tokenized, &cells, &pruned))?;
                    outcome.timings = clock.into_timings();
                    Ok(outcome)
                };
                one().with_context(|| format!("asking example {index} of `{name}`"))
            })?;
        progress.finish();
        for (index, outcome) in outcomes.iter().enumerate() {
            outcome.timings.iter().for_each(|t| clock.add(t));
            table.of_context(&outcome.context_id);
            for (q, asked) in outcome.asked.iter().enumerate() {
                table.push_benchmark(&name, (index, q), asked, None, &outcome.full[q]);
                for (cell, answers) in cells.iter().zip(&outcome.cells) {
                    table.push_benchmark(&name, (index, q), asked, Some(cell), &answers[q]);
                }
            }
        }
        let bootstrap = Bootstrap::new(outcomes.len(), i.section.bootstrap, i.seed);
        Ok(bench::summarize(benchmark, &cells, &outcomes, &bootstrap))
    }

    /// Write results and answers, by one process at a time.
    fn publish(self, results: Results, answers: AnswerTable) -> Result<Results> {
        let claim = self.publishing()?;
        if !answers.is_empty() {
            answers.write(&self.path(ANSWERS_FILE))?;
        }
        results.write(&self.path(RESULTS_FILE))?;
        drop(claim);
        // Benchmarks are widened (more examples, other methods back again); the other tasks' contexts have served.
        if self.inputs.benchmarks.is_empty() {
            self.store.clear()?;
        }
        Ok(results)
    }

    /// The right to write into the evaluation's folder, which one process has at a time.
    fn publishing(&self) -> Result<Claim> {
        loop {
            match self.store.claim("publish", 0)? {
                Some(claim) => return Ok(claim),
                None => std::thread::sleep(std::time::Duration::from_millis(100)),
            }
        }
    }

    /// Continuations of test examples, as many as `facts` has contexts.
    fn perplexity(
        &self,
        reader: &Reader,
        clock: &mut Clock,
        progress: &dyn Progress,
    ) -> Result<PerplexityResults> {
        let i = self.inputs;
        let cells = facts::cells(i.section)?;
        let rows: Vec<u64> = self.test.clone().take(i.section.contexts).collect();
        progress.start("continuations of test examples", rows.len() as u64, 0);
        let outcomes: Vec<Option<PerplexityOutcome>> =
            share(&self.store, "perplexity", rows.len(), progress, i.check_stop, |index| {
                let row = rows[index];
                let example = self.examples.get(row)?;
                let split = perplexity::split(&example.tokens, i.section.continuation_tokens);
                let Some((context, continuation)) = split else { return Ok(None) };
                let mut clock = Clock::new(i.target.device());
                let draw = Draw { task: "perplexity", index: row };
                let pruned = reader.read(context, draw, &mut clock)?;
                let (full, cells) = clock
                    .time("perplexity: continuations", || {
                        perplexity::read(i.target, continuation, &pruned, &cells)
                    })
                    .with_context(|| format!("reading the continuation of `{}`", example.id))?;
                Ok(Some(PerplexityOutcome { full, cells, timings: clock.into_timings() }))
            })?;
        let outcomes: Vec<PerplexityOutcome> = outcomes.into_iter().flatten().collect();
        outcomes.iter().flat_map(|o| &o.timings).for_each(|t| clock.add(t));
        progress.finish();
        let bootstrap = Bootstrap::new(outcomes.len(), i.section.bootstrap, i.seed);
        Ok(perplexity::summarize(i.section, &cells, &outcomes, &bootstrap))
    }

    /// The first context of the `facts` task, or the first test example without it.
    fn worked_example(&self, reader: &Reader) -> Result<Option<WorkedExample>> {
        let i = self.inputs;
        let (id, tokens, facts) = if let Some(context) = i.fact_contexts.first() {
            ("facts-0".to_owned(), context.tokens.clone(), facts_of(context))
        } else if !self.test.is_empty() {
            let example = self.examples.get(self.test.start)?;
            (example.id.clone(), example.tokens, example.facts.iter().map(span).collect())
        } else {
            return Ok(None);
        };
        let draw = Draw { task: "facts", index: 0 };
        let pruned = reader.read(&tokens, draw, &mut Clock::new(i.target.device()))?;
        work_example(id, &tokens, facts, &pruned, i.tokenizer, i.section).map(Some)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.inputs.out.join(file)
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
fn check_shapes(inputs: &EvalInputs, label: &LabelRow, feature: &FeatureRow) -> Result<()> {
    let (target, dims) = (inputs.target.shape(), inputs.mapper.dims());
    let found = (label.layers as usize, label.kv_heads as usize);
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
    let heads = layout.heads(&target, &inputs.proxy_shape);
    let found = ((feature.layers * feature.kv_heads) as usize, feature.channels as usize);
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
    let has = (found.0, found.1, feature.global_channels(), target.total_kv_heads());
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
fn rows_of(splits: &[Split], split: Split) -> Result<std::ops::Range<u64>> {
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
