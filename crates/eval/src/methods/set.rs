//! The requested methods: started, fitted in one pass over the training contexts, and run on each context.

use anyhow::{Context, Result, ensure};
use pkv_core::hinted;
use pkv_lm::{LayerView, Tap};
use pkv_recipe::MethodName;
use pkv_results::MethodNote;
use tch::Tensor;

use super::method::{Fit, Method, Needs, Ready, Scoring, Start, Watch};
use super::training::Setup;
use super::view::ContextView;
use crate::stopwatch::Stopwatch;

/// One method's scores of one context, `[layers, KV heads, positions]`.
pub struct Scored {
    pub method: MethodName,
    pub scores_lht: Tensor,
}

/// The chosen methods, ready to score.
pub struct Methods<'a> {
    chosen: Vec<(&'a Method, Scoring<'a>)>,
    notes: Vec<MethodNote>,
}

impl<'a> Methods<'a> {
    /// Those of `registry` that `names` names, in that order; the ones that learn are fitted.
    ///
    /// # Errors
    /// A name is unknown, there is no training example to learn from, or a method cannot be fitted.
    pub fn prepare(registry: &'a [Method], names: &[MethodName], setup: &Setup<'a>) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        super::check_in(registry, names)?;
        // In the registry's order: methods may lock files, and two processes must not wait for each other.
        let mut started = Vec::new();
        for method in registry.iter().filter(|m| names.contains(&m.name)) {
            started.push((method, (method.start)(setup).with_context(|| about("preparing", method))?));
        }
        fit(&mut started, setup)?;
        let (mut ready, mut notes) = (Vec::new(), Vec::new());
        for (method, start) in started {
            let Ready { scoring, note } = match start {
                Start::Ready(ready) => ready,
                Start::Fit(fit) => fit.finish().with_context(|| about("fitting", method))?,
            };
            notes.extend(note.map(|note| MethodNote { method: method.name, note }));
            ready.push((method, scoring));
        }
        ready.sort_by_key(|(method, _)| names.iter().position(|n| *n == method.name));
        Ok(Self { chosen: ready, notes })
    }

    /// Notes on single methods for readers of the results.
    pub fn notes(&self) -> &[MethodNote] {
        &self.notes
    }

    /// All that any of them needs of a context.
    pub fn needs(&self) -> Needs {
        self.chosen.iter().fold(Needs::NOTHING, |all, (method, _)| all.and(method.needs))
    }

    /// The methods that watch the target's prefill of one context.
    pub fn watches(&self) -> Watches<'a> {
        let watch = |(_, scoring): &(&Method, Scoring<'a>)| match scoring {
            Scoring::Watching(watch) => Some(watch()),
            Scoring::Afterwards(_) => None,
        };
        Watches(self.chosen.iter().map(watch).collect())
    }

    /// Scores of every chosen method, in the order chosen. `watches` have seen the context's prefill.
    ///
    /// # Errors
    /// A method lacks what it looks at.
    pub fn score(&self, view: &ContextView, watches: Watches, clock: &mut Stopwatch) -> Result<Vec<Scored>> {
        let _no_grad = tch::no_grad_guard();
        let one = |((method, scoring), watch): (&(&Method, Scoring), Option<Box<dyn Watch + '_>>)| {
            let score = || match (scoring, watch) {
                (Scoring::Afterwards(score), _) => score(view),
                (Scoring::Watching(_), Some(watch)) => watch.scores(view),
                (Scoring::Watching(_), None) => anyhow::bail!("it did not see the target's prefill"),
            };
            let scores = clock
                .time(&format!("scores: {}", method.name), score)
                .with_context(|| about("scoring by", method))?;
            ensure!(
                scores.numel() as i64 == view.size_lht.iter().product::<i64>(),
                "`{}` scored {:?} KV pairs, expected {:?}",
                method.name,
                scores.size(),
                view.size_lht
            );
            Ok(Scored {
                method: method.name,
                scores_lht: scores.to_device(view.device).reshape(view.size_lht),
            })
        };
        self.chosen.iter().zip(watches.0).map(one).collect()
    }
}

fn about(doing: &str, method: &Method) -> String {
    format!("{doing} `{}`", method.name)
}

/// Show every training context to those that learn.
fn fit<'a>(started: &mut [(&Method, Start<'a>)], setup: &Setup<'a>) -> Result<()> {
    let mut fits: Vec<(&Method, &mut Box<dyn Fit<'a> + 'a>)> = started
        .iter_mut()
        .filter_map(|(method, start)| match start {
            Start::Fit(fit) => Some((*method, fit)),
            Start::Ready(_) => None,
        })
        .collect();
    if fits.is_empty() {
        return Ok(());
    }
    ensure!(
        setup.training.contexts() > 0,
        hinted(
            "there is no training example to fit baselines on",
            "raise `data.train`, or leave the methods that learn out of `eval.methods`"
        )
    );
    for row in setup.training.chosen() {
        let context = setup.training_context(row)?;
        let mut taps = Taps(fits.iter_mut().filter_map(|(_, fit)| fit.tap(&context)).collect());
        if !taps.0.is_empty() {
            setup.target.prefill(&context.tokens, 0, &mut taps)?;
        }
        drop(taps);
        for (method, fit) in &mut fits {
            fit.add(&context).with_context(|| about("fitting", method))?;
        }
    }
    Ok(())
}

/// Several taps on one forward.
struct Taps<'t>(Vec<Box<dyn Tap + 't>>);

impl Tap for Taps<'_> {
    fn wants_lse(&self) -> bool {
        self.0.iter().any(|tap| tap.wants_lse())
    }

    fn layer(&mut self, view: &LayerView) -> Result<()> {
        self.0.iter_mut().try_for_each(|tap| tap.layer(view))
    }
}

/// One context's watches, a place for each chosen method; the tap of its prefill.
pub struct Watches<'a>(Vec<Option<Box<dyn Watch + 'a>>>);

impl Tap for Watches<'_> {
    fn wants_lse(&self) -> bool {
        self.0.iter().flatten().any(|watch| watch.wants_lse())
    }

    fn layer(&mut self, view: &LayerView) -> Result<()> {
        self.0.iter_mut().flatten().try_for_each(|watch| watch.layer(view))
    }
}
