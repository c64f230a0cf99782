//! What a method is: its entry in the registry, and the three steps from there to scores (start, fit, score).

use anyhow::Result;
use pkv_lm::Tap;
use pkv_recipe::MethodName;
use pkv_results::MethodInfo;
use tch::Tensor;

use super::training::{Setup, TrainingContext};
use super::view::ContextView;

pub use pkv_results::Needs;

/// A way to score KV pairs, as the registry has it.
#[derive(Debug)]
pub struct Method {
    /// In recipes, files, tables and charts.
    pub name: MethodName,
    /// Its meaning, in a sentence without its name.
    pub meaning: &'static str,
    pub needs: Needs,
    /// Its reference: a file, from this crate's folder, that has this text. The authors' scores, or a test
    /// with a naive version or a property that defines it.
    #[cfg(test)]
    pub(crate) held_by: (&'static str, &'static str),
    /// Get ready to score, or to learn from the training contexts first.
    ///
    /// # Errors
    /// Its inputs are not available.
    pub(crate) start: for<'a> fn(&Setup<'a>) -> Result<Start<'a>>,
}

impl Method {
    /// Does it look at KVzip's own scores?
    pub const fn is_oracle(&self) -> bool {
        self.info().is_oracle()
    }

    /// What readers of its results must know.
    pub const fn info(&self) -> MethodInfo {
        MethodInfo { name: self.name, meaning: self.meaning, needs: self.needs }
    }
}

/// A method that was asked for.
pub(crate) enum Start<'a> {
    Ready(Ready<'a>),
    /// It learns from the training contexts first.
    Fit(Box<dyn Fit<'a> + 'a>),
}

impl<'a> Start<'a> {
    pub fn fit(fit: impl Fit<'a> + 'a) -> Result<Self> {
        Ok(Self::Fit(Box::new(fit)))
    }
}

/// A method that learns. Every training context is given once, first to [`Fit::tap`], then to [`Fit::add`].
pub(crate) trait Fit<'a> {
    /// Looks on while the target prefills the context; without one, the target does not.
    fn tap<'t>(&'t mut self, _: &'t TrainingContext) -> Option<Box<dyn Tap + 't>> {
        None
    }

    /// # Errors
    /// The context does not have the shape of the others.
    fn add(&mut self, context: &TrainingContext) -> Result<()>;

    /// # Errors
    /// There is no solution.
    fn finish(self: Box<Self>) -> Result<Ready<'a>>;
}

/// A method that can score contexts.
pub(crate) struct Ready<'a> {
    pub scoring: Scoring<'a>,
    /// Note for readers of its results, such as the data it was fitted on.
    pub note: Option<String>,
}

/// From what there is once both models have read a context to its scores.
type Score<'a> = dyn Fn(&ContextView) -> Result<Tensor> + 'a;
/// One context's watch.
type StartWatch<'a> = dyn Fn() -> Box<dyn Watch + 'a> + 'a;

/// How a method scores a context: `[layers, KV heads, positions]` or `[heads, positions]`, higher means keep.
pub(crate) enum Scoring<'a> {
    /// After both models have read the context.
    Afterwards(Box<Score<'a>>),
    /// Beginning when the target does.
    Watching(Box<StartWatch<'a>>),
}

/// Looks on while the target prefills one context, and scores it afterwards.
///
/// What it keeps should not grow with the context's queries: those of all positions are many times the cache.
pub(crate) trait Watch: Tap {
    /// # Errors
    /// There was no prefill to look at.
    fn scores(self: Box<Self>, view: &ContextView) -> Result<Tensor>;
}

impl<'a> Ready<'a> {
    pub fn scores(score: impl Fn(&ContextView) -> Result<Tensor> + 'a) -> Self {
        Self { scoring: Scoring::Afterwards(Box::new(score)), note: None }
    }

    pub fn watches<W: Watch + 'a>(watch: impl Fn() -> W + 'a) -> Self {
        Self { scoring: Scoring::Watching(Box::new(move || Box::new(watch()))), note: None }
    }

    pub fn noted(self, note: Option<String>) -> Self {
        Self { note, ..self }
    }

    pub fn start(self) -> Result<Start<'a>> {
        Ok(Start::Ready(self))
    }
}
