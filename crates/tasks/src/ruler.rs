//! RULER (arXiv 2404.06654): 13 tasks whose examples are generated, at any length.
//!
//! Parameters, prompts and scoring are those of NVIDIA/RULER at commit c3f5e3b, the version of the
//! published tables: `scripts/synthetic.yaml`, `scripts/data/synthetic/constants.py` and the generators
//! beside it, `scripts/eval/synthetic/constants.py`. Each constant names its file. Random numbers are ours,
//! so examples differ from the reference's in what is drawn, not in what it is drawn from.
//!
//! Differs everywhere: the reference looks for one size per task and shortens single examples by large
//! steps; here an example is shortened in steps of 1/64, so lengths lie closer to the wanted one. The
//! reference shuffles with one fixed seed per run; here every example shuffles on its own.

mod cwe;
mod fwe;
mod niah;
mod qa;
mod sources;
mod vt;

use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};
use pkv_core::{Rng, Seed, hinted};
use pkv_recipe::EvalSection;
use pkv_recipe::plan::TaskWork;
use serde_json::json;

pub use qa::{QaSet, Question};
pub use sources::Sources;

use crate::example::{Example, Turn};
use crate::fit::largest;
use crate::metric::Metric;
use crate::suite::{Benchmark, CountTokens, Opening, Suite};
use crate::words::Words;

pkv_core::named! {
    /// A task of RULER.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
    pub enum RulerTask {
        /// One needle (word to number) in repeated noise.
        NiahSingle1 = "niah_single_1";
        /// One needle in essays.
        NiahSingle2 = "niah_single_2";
        /// One needle in essays, its value a UUID.
        NiahSingle3 = "niah_single_3";
        /// Four needles in essays, one asked for.
        NiahMultikey1 = "niah_multikey_1";
        /// A needle among needles.
        NiahMultikey2 = "niah_multikey_2";
        /// A needle among needles, keys and values UUIDs.
        NiahMultikey3 = "niah_multikey_3";
        /// Four values of one key in essays.
        NiahMultivalue = "niah_multivalue";
        /// Four keys asked for at once, in essays.
        NiahMultiquery = "niah_multiquery";
        /// Variable tracking: a chain of assignments in noise.
        Vt = "vt";
        /// Common words extraction.
        Cwe = "cwe";
        /// Frequent words extraction.
        Fwe = "fwe";
        /// Questions of SQuAD among its paragraphs.
        Qa1 = "qa_1";
        /// Questions of HotpotQA among its paragraphs.
        Qa2 = "qa_2";
    }
}

impl RulerTask {
    /// Tokens that an answer may have (`tokens_to_generate` in `constants.py`); they count towards the
    /// length.
    pub const fn max_new_tokens(self) -> usize {
        match self {
            Self::Vt => 30,
            Self::Cwe => 120,
            Self::Fwe => 50,
            Self::Qa1 | Self::Qa2 => 32,
            _ => 128,
        }
    }

    /// How answers are scored (`eval/synthetic/constants.py`).
    pub const fn metric(self) -> Metric {
        match self {
            Self::Qa1 | Self::Qa2 => Metric::StringMatchPart,
            _ => Metric::StringMatchAll,
        }
    }
}

/// RULER as a suite.
pub struct Ruler;

impl Suite for Ruler {
    fn name(&self) -> &'static str {
        "ruler"
    }

    fn tasks(&self) -> Vec<&'static str> {
        RulerTask::ALL.map(RulerTask::name).to_vec()
    }

    fn sources(&self, named: &[&str]) -> Vec<&'static str> {
        let parts = [("essays", "niah"), ("squad", "qa_1"), ("hotpotqa", "qa_2"), ("words", "cwe")];
        let is_needed = |part: &str| named.is_empty() || named.iter().any(|n| n.starts_with(part));
        parts.into_iter().filter(|(_, part)| is_needed(part)).map(|(source, _)| source).collect()
    }

    fn open<'a>(&self, from: &Opening<'a>) -> Result<Vec<Benchmark<'a>>> {
        let section = &from.section.benchmark;
        let sources = Sources::open(from.files)?;
        let named = from.section.named(self.name()).unwrap_or_default();
        let of_name = |name: &&str| RulerTask::named(name);
        let (can_make, left_out) = match named.as_slice() {
            [] => RulerTask::ALL.into_iter().partition(|task| sources.can_make(*task)),
            named => (named.iter().filter_map(of_name).collect::<Vec<_>>(), Vec::new()),
        };
        let mut all = Vec::new();
        for task in can_make {
            let (tokens, frame) = (section.ruler_tokens, from.frame_tokens);
            let generator = Generator::new(task, tokens, frame, &sources, from.count, from.seed)
                .with_context(|| format!("cannot make RULER's `{}`", task.name()))?;
            if let Some(warning) = generator.shortness(tokens) {
                (from.warn)(&warning);
            }
            all.push(Benchmark {
                suite: self.name(),
                task: task.name().to_owned(),
                examples: generator.len().unwrap_or(usize::MAX).min(section.examples),
                example: Box::new(move |index| generator.example(index as u64)),
                prompt_tokens: None,
                identity: from.files.identity_with(json!({"ruler": task.name(), "tokens": tokens})),
            });
        }
        if !left_out.is_empty() {
            (from.warn)(&format!(
                "RULER without {}: `eval.benchmark.manifest` has no source for them",
                left_out.into_iter().map(RulerTask::name).collect::<Vec<_>>().join(", ")
            ));
        }
        Ok(all)
    }

    /// Without a manifest only tasks that need no file are made.
    fn work(&self, section: &EvalSection, named: &[&str]) -> Vec<TaskWork> {
        let none = Sources::default();
        let b = &section.benchmark;
        RulerTask::ALL
            .into_iter()
            .filter(|task| match named {
                [] => !b.manifest.is_empty() || none.can_make(*task),
                _ => named.contains(&task.name()),
            })
            .map(|task| TaskWork {
                context_tokens: b.ruler_tokens.saturating_sub(task.max_new_tokens()).max(1),
                ..TaskWork::of_prompts(format!("{}.{}", self.name(), task.name()), b, task.max_new_tokens())
            })
            .collect()
    }
}

/// Makes the examples of one task at one length.
pub struct Generator<'a> {
    task: RulerTask,
    kind: Kind,
    /// Most tokens of context, question and answer prefix together.
    limit: usize,
    count: &'a CountTokens<'a>,
    seed: Seed,
    /// Size that fits an example drawn for the purpose.
    size: usize,
    /// Tokens that this example takes, the answer's room and the frame included.
    tokens: usize,
}

/// The generators; each turns a size (sentences, words, documents) into text.
enum Kind {
    Niah(niah::Niah),
    Vt(vt::Vt),
    Cwe(cwe::Cwe),
    Fwe(fwe::Fwe),
    Qa(Rc<QaSet>),
}

/// An example's parts; `context + question + answer_prefix` is the reference's prompt.
pub(crate) struct Draft {
    pub context: String,
    pub question: String,
    pub answer_prefix: String,
    pub answers: Vec<String>,
}

impl<'a> Generator<'a> {
    /// Prepare `task` for examples of `tokens` tokens, the answer's room and `frame_tokens` of chat template
    /// included.
    ///
    /// # Errors
    /// The task's sources are absent, a text cannot be counted, or the length has no room for the smallest
    /// example.
    pub fn new(
        task: RulerTask,
        tokens: usize,
        frame_tokens: usize,
        sources: &Sources,
        count: &'a CountTokens<'a>,
        seed: Seed,
    ) -> Result<Self> {
        let short = || {
            hinted(
                format!("`{}` does not fit {tokens} tokens", task.name()),
                "raise `eval.benchmark.ruler_tokens`, or leave the task out of `eval.benchmark.ruler_tasks`",
            )
        };
        let limit = tokens.checked_sub(task.max_new_tokens() + frame_tokens).with_context(short)?;
        let mut g =
            Self { task, kind: Kind::of(task, tokens, limit, sources)?, limit, count, seed, size: 0, tokens };
        if let Kind::Vt(vt) = &mut g.kind {
            vt.make_example(count, &mut seed.stream("ruler vt example", 0))?;
        }
        // A failing count is reported by the example that is drawn next.
        let draw = |size| {
            let mut rng = seed.stream(&format!("ruler {} size", task.name()), 0);
            g.draft(size, 0, &mut rng).and_then(|d| g.length(&d)).unwrap_or(usize::MAX)
        };
        let (least, most) = g.sizes();
        let size = largest(least, most, limit, draw);
        if size.is_none() {
            let mut rng = seed.stream(&format!("ruler {} size", task.name()), 0);
            g.length(&g.draft(least, 0, &mut rng)?)?;
        }
        g.size = size.with_context(short)?;
        let mut rng = seed.stream(&format!("ruler {} size", task.name()), 0);
        g.tokens = tokens - limit + g.length(&g.draft(g.size, 0, &mut rng)?)?;
        Ok(g)
    }

    /// About how many tokens an example takes, the answer's room and the chat template's included. Less than
    /// was asked for where there is not enough to make a longer one of.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// RULER's lists and documents end: what is asked of a context shorter than `wanted` says nothing about
    /// that length.
    fn shortness(&self, wanted: usize) -> Option<String> {
        let more = match self.task {
            RulerTask::Cwe => {
                "; a source `words` in the manifest of `eval.benchmark.manifest` makes longer ones"
            }
            _ => "",
        };
        (10 * self.tokens < 9 * wanted).then(|| {
            format!(
                "RULER's `{}`: contexts come out at about {} tokens, `eval.benchmark.ruler_tokens` is {wanted}{more}",
                self.task.name(),
                self.tokens
            )
        })
    }

    /// Example number `index`; the same one whatever was made before.
    ///
    /// # Errors
    /// No size fits, or a QA set has no such question.
    pub fn example(&self, index: u64) -> Result<Example> {
        let name = self.task.name();
        let (least, _) = self.sizes();
        let mut size = self.size;
        let draft = loop {
            let mut rng = self.seed.stream(&format!("ruler {name}"), index);
            let draft = self.draft(size, index, &mut rng)?;
            let length = self.length(&draft)?;
            if length <= self.limit {
                break draft;
            }
            ensure!(
                size > least,
                hinted(
                    format!(
                        "example {index} of `{name}` takes {length} tokens, {} are left for it",
                        self.limit
                    ),
                    "raise `eval.benchmark.ruler_tokens`"
                )
            );
            size = (size - (size / 64).max(1)).max(least);
        };
        let turn = Turn {
            question: draft.question,
            answer_prefix: draft.answer_prefix,
            given: draft.answers.join(", "),
            wanted: draft.answers,
            others: Vec::new(),
            metric: self.task.metric(),
            max_new_tokens: self.task.max_new_tokens(),
            first_line: false,
            part: name.to_owned(),
        };
        let id = format!("{name}-{index}");
        Ok(Example { id, context: draft.context, turns: vec![turn], conversation: false, chat: true })
    }

    /// Number of examples: QA sets are finite.
    pub fn len(&self) -> Option<usize> {
        match &self.kind {
            Kind::Qa(set) => Some(set.questions.len()),
            _ => None,
        }
    }

    /// Whether there is no example.
    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    fn draft(&self, size: usize, index: u64, rng: &mut Rng) -> Result<Draft> {
        Ok(match &self.kind {
            Kind::Niah(niah) => niah.draft(size, rng),
            Kind::Vt(vt) => vt.draft(size, rng),
            Kind::Cwe(cwe) => cwe.draft(size, rng),
            Kind::Fwe(fwe) => fwe.draft(size, rng),
            Kind::Qa(set) => set.draft(size, index as usize, rng)?,
        })
    }

    fn length(&self, draft: &Draft) -> Result<usize> {
        let parts = [&draft.context, &draft.question, &draft.answer_prefix];
        parts.into_iter().map(|text| (self.count)(text)).sum()
    }

    /// The smallest and the largest size there can be.
    fn sizes(&self) -> (usize, usize) {
        match &self.kind {
            Kind::Niah(niah) => (niah.least(), usize::MAX / 4),
            Kind::Vt(vt) => (vt.least(), usize::MAX / 4),
            Kind::Cwe(cwe) => (cwe.least(), cwe.most()),
            Kind::Fwe(_) => (1, usize::MAX / 4),
            Kind::Qa(set) => (set.least(), set.most()),
        }
    }
}

impl Kind {
    fn of(task: RulerTask, tokens: usize, limit: usize, sources: &Sources) -> Result<Self> {
        let essay = || {
            sources.essay.clone().with_context(|| {
                hinted(
                    format!("`{}` hides its needles in essays, and there are none", task.name()),
                    "name a text `essays` in the manifest of `eval.benchmark.manifest`, or leave the task out of `eval.benchmark.ruler_tasks`",
                )
            })
        };
        let set = |set: &Option<Rc<QaSet>>, key: &str| match set {
            Some(set) => Ok(Self::Qa(Rc::clone(set))),
            None => bail!(hinted(
                format!("`{}` needs a file of questions", task.name()),
                format!(
                    "name one `{key}` in the manifest of `eval.benchmark.manifest`, or leave the task out of `eval.benchmark.ruler_tasks`"
                )
            )),
        };
        match task {
            RulerTask::Vt => Ok(Self::Vt(vt::Vt::default())),
            RulerTask::Cwe => Ok(Self::Cwe(cwe::Cwe::new(tokens, sources.extra_words.as_deref()))),
            RulerTask::Fwe => Ok(Self::Fwe(fwe::Fwe::new(limit)?)),
            RulerTask::Qa1 => set(&sources.squad, "squad"),
            RulerTask::Qa2 => set(&sources.hotpotqa, "hotpotqa"),
            _ => {
                let p = niah::Parameters::of(task).expect("every other task hides needles");
                let essay = if p.haystack == niah::Haystack::Essay { essay()? } else { Rc::default() };
                Ok(Self::Niah(niah::Niah::new(p, essay, Words::built_in())))
            }
        }
    }
}

#[cfg(test)]
mod tests;
