//! The tasks that recipes can name: their names, the check of a recipe's names, how they are opened, and
//! their cost.
//!
//! Two are this crate's own; the others are suites of `pkv-tasks`.

use anyhow::{Result, ensure};
use pkv_core::hinted;
use pkv_recipe::plan::TaskWork;
use pkv_recipe::{EvalSection, Recipe, TaskName, check_known};
use pkv_tasks::{REGISTRY, suite};

use crate::asked::Asked;
use crate::perplexity::Perplexity;
use crate::task::{BenchmarkTask, Facts, Task};

/// A task that is no suite.
struct Own {
    name: TaskName,
    open: for<'a> fn(&Asked<'a>) -> Result<Box<dyn Task + 'a>>,
    work: fn(&Recipe) -> TaskWork,
}

static OWN: [Own; 2] = [
    Own {
        name: TaskName::FACTS,
        open: |asked| Ok(Box::new(Facts::new(asked.section, asked.fact_contexts)?)),
        work: Facts::work,
    },
    Own {
        name: TaskName::PERPLEXITY,
        open: |asked| Ok(Box::new(Perplexity::new(asked.section, asked.test_examples))),
        work: Perplexity::work,
    },
];

/// Names of whole tasks and suites for `eval.tasks`, in the order of results.
pub fn names() -> impl Iterator<Item = &'static str> {
    OWN.iter().map(|own| own.name.name()).chain(suites())
}

fn suites() -> impl Iterator<Item = &'static str> {
    REGISTRY.iter().map(|suite| suite.name())
}

/// Single tasks of suites, as `eval.tasks` spells them.
pub fn singles() -> impl Iterator<Item = String> {
    REGISTRY.iter().flat_map(|suite| {
        let name = suite.name();
        suite.tasks().into_iter().map(move |task| format!("{name}/{task}"))
    })
}

/// Refuse a recipe's `eval.tasks` if one of them is unknown.
///
/// # Errors
/// One of them is unknown.
pub fn check(section: &EvalSection) -> Result<()> {
    for task in &section.tasks {
        let (name, single) = task.parts();
        check_known("eval.tasks", "task", name, names())?;
        ensure!(
            single.is_none() || suites().any(|suite| suite == name),
            hinted(
                format!("`eval.tasks` names `{task}`, but `{name}` has no single tasks"),
                format!("single tasks are of {}", suites().collect::<Vec<_>>().join(", "))
            )
        );
    }
    suite::asked(section).try_for_each(|(suite, named)| suite::check_named(suite, &named))
}

/// The tasks of an evaluation, in the order of the work.
///
/// # Errors
/// A file that a task needs is absent.
pub(crate) fn open<'a>(asked: &Asked<'a>) -> Result<Vec<Box<dyn Task + 'a>>> {
    let own = OWN.iter().filter(|own| asked.section.tasks.contains(&own.name)).map(|own| (own.open)(asked));
    let of_suites = asked.benchmarks.iter().map(|b| Ok(Box::new(BenchmarkTask(b)) as Box<dyn Task + 'a>));
    own.chain(of_suites).collect()
}

/// Upper bound of the cost of a recipe's tasks, for `plan`.
pub fn work(recipe: &Recipe) -> Vec<TaskWork> {
    let section = &recipe.eval;
    let own = OWN.iter().filter(|own| section.tasks.contains(&own.name)).map(|own| (own.work)(recipe));
    own.chain(suite::asked(section).flat_map(|(suite, named)| suite.work(section, &named))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(tasks: &[&str]) -> EvalSection {
        let tasks = tasks.iter().map(|name| TaskName::new(name)).collect();
        EvalSection { tasks, ..EvalSection::default() }
    }

    #[test]
    fn every_name_that_is_offered_is_known_and_others_are_refused_with_a_hint() {
        let all: Vec<String> = names().map(str::to_owned).chain(singles()).collect();
        assert!(all.len() > 40 && all.contains(&"facts".to_owned()) && all.contains(&"ruler/vt".to_owned()));
        check(&section(&all.iter().map(String::as_str).collect::<Vec<_>>())).unwrap();
        let hint = |task: &str| {
            let error = check(&section(&[task])).unwrap_err();
            let hint = error.downcast_ref::<pkv_core::Hinted>().map(|h| h.hint().to_owned());
            (error.to_string(), hint.unwrap())
        };
        let (error, text) = hint("rulr");
        assert!(error.contains("`eval.tasks` names `rulr`, which is no task"), "{error}");
        assert!(text.contains("did you mean `ruler`?") && text.contains("perplexity"), "{text}");
        assert_eq!(hint("ruler/none").0, "`none` is no task of ruler");
        assert!(hint("facts/one").0.contains("`facts` has no single tasks"));
    }
}
