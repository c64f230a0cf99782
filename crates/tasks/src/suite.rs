//! The interface of a benchmark suite, and the registry of all suites.
//!
//! Everything else (the names that `--tasks` takes, their completion, `plan`, the order of results) is read
//! from [`REGISTRY`]; what is asked, and of which caches, is `eval`'s.
//!
//! `docs/contributing.md` has the steps to add a suite.
//!
//! `eval.tasks = ["<name>"]` asks all its tasks, `["<name>/<task>"]` one.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use pkv_core::{Seed, hinted};
use pkv_recipe::EvalSection;
use pkv_recipe::plan::TaskWork;
use serde_json::{Value, json};

use crate::REGISTRY;
use crate::example::Example;
use crate::files::Files;

/// A benchmark: several tasks, each with its own metric.
pub trait Suite: Sync {
    /// As recipes and tables have it: lower case, without `/`.
    fn name(&self) -> &'static str;

    /// The names of its tasks.
    fn tasks(&self) -> Vec<&'static str>;

    /// Names of the manifest's sources that the tasks `named` read; of all tasks if it is empty.
    fn sources(&self, named: &[&str]) -> Vec<&'static str> {
        let _ = named;
        vec![self.name()]
    }

    /// The tasks that the recipe asks for, their files read.
    ///
    /// # Errors
    /// A file that a task needs is absent or damaged.
    fn open<'a>(&self, from: &Opening<'a>) -> Result<Vec<Benchmark<'a>>>;

    /// Upper bound of the cost of the tasks `named`; of all tasks if it is empty.
    fn work(&self, section: &EvalSection, named: &[&str]) -> Vec<TaskWork>;
}

/// Inputs from which suites make examples.
pub struct Opening<'a> {
    pub section: &'a EvalSection,
    pub files: &'a Files,
    /// Length of a text in the model's tokens.
    pub count: &'a CountTokens<'a>,
    /// Tokens of the chat template around a prompt.
    pub frame_tokens: usize,
    pub seed: Seed,
    /// Gets a sentence about what is not as asked for.
    pub warn: &'a dyn Fn(&str),
}

/// Length of a text in the model's tokens.
pub type CountTokens<'a> = dyn Fn(&str) -> Result<usize> + 'a;

/// Makes example number `index` of a task; the same one whenever it is asked for.
pub type MakeExample<'a> = Box<dyn Fn(usize) -> Result<Example> + 'a>;

/// One task of a suite, its examples made when they are needed.
pub struct Benchmark<'a> {
    /// The suite's name.
    pub suite: &'static str,
    /// The task's name in its suite.
    pub task: String,
    pub examples: usize,
    pub example: MakeExample<'a>,
    /// Longest prompt in tokens; of longer ones the middle is cut out. `None` where examples have their
    /// length.
    pub prompt_tokens: Option<usize>,
    /// Inputs of the examples apart from their number: settings, files, versions. Key of stored outcomes.
    pub identity: String,
}

/// The suite of that name.
pub fn find(name: &str) -> Option<&'static dyn Suite> {
    REGISTRY.iter().copied().find(|suite| suite.name() == name)
}

/// The suites that the recipe asks for, each with the tasks that it names; none named are all.
pub fn asked(section: &EvalSection) -> impl Iterator<Item = (&'static dyn Suite, Vec<&str>)> {
    let of = |suite: &&'static dyn Suite| Some((*suite, section.named(suite.name())?));
    REGISTRY.iter().filter_map(of)
}

/// Names of the manifest's sources that the recipe's tasks read; others need not be on this machine.
pub fn sources(section: &EvalSection) -> Vec<&'static str> {
    asked(section).flat_map(|(suite, named)| suite.sources(&named)).collect()
}

/// The tasks of every suite that the recipe asks for.
///
/// # Errors
/// A task is unknown, or what it needs is absent or damaged.
pub fn open<'a>(from: &Opening<'a>) -> Result<Vec<Benchmark<'a>>> {
    let mut all = Vec::new();
    for (suite, named) in asked(from.section) {
        check_named(suite, &named)?;
        all.extend(suite.open(from)?);
    }
    let most = from.section.benchmark.answer_tokens;
    Ok(match most {
        0 => all,
        _ => all.into_iter().map(|b| shortened(b, most)).collect(),
    })
}

/// # Errors
/// A name is none of the suite's tasks.
pub fn check_named(suite: &dyn Suite, named: &[&str]) -> Result<()> {
    let tasks = suite.tasks();
    for name in named {
        ensure!(
            tasks.contains(name),
            hinted(
                format!("`{name}` is no task of {}", suite.name()),
                format!("its tasks are {}", tasks.join(", "))
            )
        );
    }
    Ok(())
}

/// The same task with answers of `most` tokens at most.
fn shortened(benchmark: Benchmark<'_>, most: usize) -> Benchmark<'_> {
    let Benchmark { example, identity, .. } = benchmark;
    Benchmark {
        example: Box::new(move |index| {
            let mut e = example(index)?;
            e.turns.iter_mut().for_each(|t| t.max_new_tokens = t.max_new_tokens.min(most));
            Ok(e)
        }),
        identity: format!("{identity}, answers of {most} tokens"),
        ..benchmark
    }
}

impl<'a> Opening<'a> {
    /// One task for each of the suite's that is asked for and has files; `read` makes their examples, at most
    /// the number given. `settings` are choices that the examples depend on.
    ///
    /// # Errors
    /// There are no files of a task, or `read` fails.
    pub fn of_files(
        &self,
        suite: &dyn Suite,
        settings: &Value,
        read: impl Fn(&str, &[PathBuf], usize) -> Result<Vec<Example>>,
    ) -> Result<Vec<Benchmark<'a>>> {
        let (name, section) = (suite.name(), &self.section.benchmark);
        let named = self.section.named(name).unwrap_or_default();
        let mut all = Vec::new();
        for (task, files) in self.files.of_suite(name, &suite.tasks(), &named, self.warn)? {
            let examples = read(task, &files, section.examples)?;
            self.warn_of_lost_turns(name, task, &examples);
            let identity = json!({"settings": settings, "prompt_tokens": section.prompt_tokens});
            all.push(Benchmark {
                suite: name,
                task: task.to_owned(),
                examples: examples.len(),
                example: Box::new(move |index| {
                    examples.get(index).cloned().with_context(|| format!("there is no example {index}"))
                }),
                prompt_tokens: Some(section.prompt_tokens),
                identity: self.files.identity_with(identity),
            });
        }
        Ok(all)
    }

    /// Say which questions no answer can be right for: they would count as 0 for every method.
    fn warn_of_lost_turns(&self, suite: &str, task: &str, examples: &[Example]) {
        let lost: Vec<(&str, &str)> = examples
            .iter()
            .flat_map(|e| e.turns.iter().map(move |t| (e.id.as_str(), t)))
            .filter(|(_, turn)| !turn.can_score())
            .map(|(id, turn)| (id, turn.given.as_str()))
            .collect();
        if let Some((id, answer)) = lost.first() {
            (self.warn)(&format!(
                "{suite}/{task}: {} questions score 0 whatever is answered: the metric reads nothing in the right answer, \
                 such as {answer:?} of `{id}`",
                lost.len()
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn section(tasks: &[&str]) -> EvalSection {
        let tasks = tasks.iter().map(|t| serde_json::from_value(json!(t)).unwrap()).collect();
        EvalSection { tasks, ..EvalSection::default() }
    }

    #[test]
    fn only_what_is_asked_for_must_be_there() {
        assert!(sources(&section(&[])).is_empty() && sources(&section(&["facts"])).is_empty());
        assert_eq!(sources(&section(&["ruler"])), ["essays", "squad", "hotpotqa", "words"]);
        assert_eq!(sources(&section(&["ruler/qa_2", "ruler/vt"])), ["hotpotqa"]);
        assert_eq!(sources(&section(&["scbench", "longbench"])), ["longbench", "scbench"]);
    }

    #[test]
    fn names_tell_suites_and_their_tasks_apart() {
        let mut seen = HashSet::new();
        for suite in REGISTRY {
            assert!(seen.insert(suite.name()) && !suite.name().contains('/'), "{}", suite.name());
            assert!(std::ptr::eq(
                find(suite.name()).map(|s| s.name().as_ptr()).unwrap(),
                suite.name().as_ptr()
            ));
            let tasks: HashSet<_> = suite.tasks().into_iter().collect();
            assert_eq!(tasks.len(), suite.tasks().len(), "{}", suite.name());
            assert!(check_named(*suite, &suite.tasks()).is_ok());
            let error = check_named(*suite, &["none"]).unwrap_err().to_string();
            assert_eq!(error, format!("`none` is no task of {}", suite.name()));
        }
        assert!(find("none").is_none());
    }

    #[test]
    fn every_task_has_a_cost() {
        for suite in REGISTRY {
            let asked = section(&[suite.name()]);
            let work = suite.work(&asked, &[]);
            assert!(!work.is_empty(), "{}", suite.name());
            for w in work {
                assert!(w.task.starts_with(&format!("{}.", suite.name())), "{w:?}");
                assert!(
                    w.contexts > 0 && w.context_tokens > 0 && w.questions > 0 && w.answer_tokens > 0,
                    "{w:?}"
                );
            }
            let one = suite.tasks()[0];
            assert_eq!(suite.work(&asked, &[one]).len(), 1, "{one}");
        }
    }
}
