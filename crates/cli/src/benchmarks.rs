//! The standard benchmarks that the recipe asks for: their files found, their tasks chosen, their examples at hand.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use pkv_core::{Fingerprint, hinted};
use pkv_eval::Benchmark;
use pkv_lm::TextTokenizer;
use pkv_recipe::{EvalSection, Manifest, SharedContext, Task};
use pkv_tasks::ruler::{CountTokens, Generator, QaSet, RulerTask, Sources};
use pkv_tasks::{longbench, scbench};
use serde_json::json;

use crate::session::{Session, benchmark_manifest_path};

/// Names that sources of the benchmarks' manifest may have.
const SOURCES: [&str; 6] = ["essays", "squad", "hotpotqa", "words", "longbench", "scbench"];

/// Whether the chosen tasks may need a source; others need not be on this machine.
fn is_needed(eval: &EvalSection, source: &str) -> bool {
    let asked = |task| eval.tasks.contains(&task);
    let of_ruler = |part: &str| {
        let named = &eval.benchmark.ruler_tasks;
        asked(Task::Ruler) && (named.is_empty() || named.iter().any(|n| n.starts_with(part)))
    };
    match source {
        "longbench" => asked(Task::Longbench),
        "scbench" => asked(Task::Scbench),
        "essays" => of_ruler("niah"),
        "squad" => of_ruler("qa_1"),
        "hotpotqa" => of_ruler("qa_2"),
        "words" => of_ruler("cwe"),
        _ => false,
    }
}

/// What benchmarks are made of, read once.
pub struct Material {
    files: Files,
    sources: Sources,
}

/// The files of the manifest, by the names of its sources.
struct Files {
    found: Vec<(String, Vec<PathBuf>)>,
    /// Content of the files, or commits of hub data sets.
    identity: Fingerprint,
}

impl Material {
    /// Find the files and read what RULER needs of them.
    ///
    /// # Errors
    /// The manifest or a file that it names is absent or damaged.
    pub fn open(s: &Session) -> Result<Self> {
        let tasks = &s.recipe.eval.tasks;
        let needed: Vec<&str> = SOURCES.into_iter().filter(|name| is_needed(&s.recipe.eval, name)).collect();
        let files = match benchmark_manifest_path(&s.recipe).filter(|_| !needed.is_empty()) {
            Some(path) => {
                let mut manifest = pkv_recipe::load_manifest(&path)?;
                manifest.sources.retain(|source| needed.contains(&source.name.as_str()));
                Files::open(&manifest, s)?
            }
            None => Files { found: Vec::new(), identity: Fingerprint::new() },
        };
        let mut sources = Sources::default();
        if tasks.contains(&Task::Ruler) {
            let one = |name| files.one(name).transpose();
            sources.essay = one("essays").map(|p| Sources::read_essay(p?)).transpose()?;
            sources.squad = one("squad").map(|p| QaSet::squad(p?)).transpose()?;
            sources.hotpotqa = one("hotpotqa").map(|p| QaSet::hotpotqa(p?)).transpose()?;
            sources.extra_words = one("words").map(|p| Sources::read_words(p?)).transpose()?;
        }
        Ok(Self { files, sources })
    }

    /// The tasks of every benchmark that `eval.tasks` names.
    ///
    /// # Errors
    /// A task is unknown, or what it needs is absent.
    pub fn benchmarks<'a>(
        &'a self,
        s: &Session,
        tokenizer: &TextTokenizer,
        count: &'a CountTokens<'a>,
    ) -> Result<Vec<Benchmark<'a>>> {
        let section = &s.recipe.eval.benchmark;
        let asked = |task| s.recipe.eval.tasks.contains(&task);
        let mut all = Vec::new();
        if asked(Task::Ruler) {
            let frame = tokenizer.prefix().len() + tokenizer.switch().len();
            for task in self.ruler_tasks(&section.ruler_tasks)? {
                let made =
                    Generator::new(task, section.ruler_tokens, frame, &self.sources, count, s.recipe.seed);
                let generator = made.with_context(|| format!("cannot make RULER's `{}`", task.name()))?;
                warn_if_short(task, generator.tokens(), section.ruler_tokens);
                all.push(Benchmark {
                    suite: "ruler",
                    task: task.name().to_owned(),
                    examples: generator.len().unwrap_or(usize::MAX).min(section.examples),
                    example: Box::new(move |index| generator.example(index as u64)),
                    prompt_tokens: None,
                    identity: self.identity(json!({"ruler": task, "tokens": section.ruler_tokens})),
                });
            }
        }
        let limit = section.examples;
        if asked(Task::Longbench) {
            let names: Vec<&str> = longbench::Task::all().iter().map(|t| t.name).collect();
            for (name, files) in self.files.of_suite("longbench", &names, &section.longbench_tasks)? {
                let task = longbench::Task::of_name(name).expect("it is one of LongBench's names");
                let examples = task.read(&files, limit)?;
                all.push(self.of_examples("longbench", name, examples, section.prompt_tokens, json!({})));
            }
        }
        if asked(Task::Scbench) {
            let (mode, mode_name) = match section.scbench_mode {
                SharedContext::MultiTurn => (scbench::Mode::MultiTurn, "multi-turn"),
                SharedContext::MultiRequest => (scbench::Mode::MultiRequest, "multi-request"),
            };
            let names = scbench::Task::ALL.map(scbench::Task::name);
            for (name, files) in self.files.of_suite("scbench", &names, &section.scbench_tasks)? {
                let task = scbench::Task::of_name(name).expect("it is one of SCBench's names");
                let examples = task.read(&files, mode, limit)?;
                let settings = json!({ "mode": mode_name });
                all.push(self.of_examples("scbench", name, examples, section.prompt_tokens, settings));
            }
        }
        if section.answer_tokens > 0 {
            all = all.into_iter().map(|b| shortened(b, section.answer_tokens)).collect();
        }
        Ok(all)
    }

    /// The tasks named, or all whose sources are there.
    fn ruler_tasks(&self, named: &[String]) -> Result<Vec<RulerTask>> {
        if named.is_empty() {
            let (mut made, mut left_out) = (Vec::new(), Vec::new());
            for task in RulerTask::ALL {
                if self.sources.can_make(task) { made.push(task) } else { left_out.push(task.name()) }
            }
            if !left_out.is_empty() {
                tracing::warn!(
                    "RULER without {}: `eval.benchmark.manifest` has no source for them",
                    left_out.join(", ")
                );
            }
            return Ok(made);
        }
        let names: Vec<&str> = RulerTask::ALL.iter().map(|t| t.name()).collect();
        let of_name = |name: &String| {
            RulerTask::ALL
                .into_iter()
                .find(|t| t.name() == name)
                .with_context(|| unknown("RULER", name, &names))
        };
        named.iter().map(of_name).collect()
    }

    fn of_examples<'a>(
        &self,
        suite: &'static str,
        task: &str,
        examples: Vec<pkv_tasks::Example>,
        prompt_tokens: usize,
        settings: serde_json::Value,
    ) -> Benchmark<'a> {
        warn_of_lost_turns(suite, task, &examples);
        Benchmark {
            suite,
            task: task.to_owned(),
            examples: examples.len(),
            example: Box::new(move |index| {
                examples.get(index).cloned().with_context(|| format!("there is no example {index}"))
            }),
            prompt_tokens: Some(prompt_tokens),
            identity: self.identity(json!({"settings": settings, "prompt_tokens": prompt_tokens})),
        }
    }

    fn identity(&self, settings: serde_json::Value) -> String {
        self.files.identity.clone().with("settings", settings).hash()
    }
}

/// RULER's lists and documents end; what is asked of a shorter context says nothing about the length in the recipe.
fn warn_if_short(task: RulerTask, tokens: usize, wanted: usize) {
    if 10 * tokens < 9 * wanted {
        let more = match task {
            RulerTask::Cwe => {
                "; a source `words` in the manifest of `eval.benchmark.manifest` makes longer ones"
            }
            _ => "",
        };
        tracing::warn!(
            "RULER's `{}`: contexts come out at about {tokens} tokens, `eval.benchmark.ruler_tokens` is {wanted}{more}",
            task.name()
        );
    }
}

/// Say which questions no answer can be right for: they would count as 0 for every method.
fn warn_of_lost_turns(suite: &str, task: &str, examples: &[pkv_tasks::Example]) {
    let lost: Vec<(&str, &str)> = examples
        .iter()
        .flat_map(|e| e.turns.iter().map(move |t| (e.id.as_str(), t)))
        .filter(|(_, turn)| !turn.can_score())
        .map(|(id, turn)| (id, turn.given.as_str()))
        .collect();
    if let Some((id, answer)) = lost.first() {
        tracing::warn!(
            "{suite}/{task}: {} questions score 0 whatever is answered: the metric reads nothing in the right answer, \
             such as {answer:?} of `{id}`",
            lost.len()
        );
    }
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

impl Files {
    fn open(manifest: &Manifest, s: &Session) -> Result<Self> {
        let mut found = Vec::new();
        for source in &manifest.sources {
            found.push((source.name.clone(), pkv_data::files(manifest, source, &s.hub)?));
        }
        Ok(Self { found, identity: pkv_data::inputs(manifest, &s.hub)? })
    }

    /// The one file of a source; `None` where the manifest has no such source.
    fn one(&self, name: &str) -> Result<Option<&Path>> {
        let Some((_, files)) = self.found.iter().find(|(n, _)| n == name) else { return Ok(None) };
        ensure!(
            files.len() == 1,
            hinted(
                format!("source `{name}` of the benchmarks has {} files, expected one", files.len()),
                "name a single file in the manifest of `eval.benchmark.manifest`"
            )
        );
        Ok(files.first().map(PathBuf::as_path))
    }

    /// The files of each of a suite's tasks: those in `named`, or all there are. A task's shards are in order.
    fn of_suite<'n>(
        &self,
        suite: &str,
        names: &[&'n str],
        named: &[String],
    ) -> Result<Vec<(&'n str, Vec<PathBuf>)>> {
        for name in named {
            ensure!(names.contains(&name.as_str()), unknown(suite, name, names));
        }
        let Some((_, files)) = self.found.iter().find(|(n, _)| n == suite) else {
            bail!(hinted(
                format!("`eval.tasks` asks for `{suite}`, whose files are not named"),
                format!("add a source `{suite}` to the manifest of `eval.benchmark.manifest`")
            ));
        };
        let mut of_tasks = Vec::new();
        for &name in names {
            if !named.is_empty() && !named.iter().any(|n| n == name) {
                continue;
            }
            let own: Vec<PathBuf> = files.iter().filter(|file| is_of_task(file, name)).cloned().collect();
            if own.is_empty() {
                ensure!(
                    named.is_empty(),
                    hinted(
                        format!("there is no file of `{name}` among the {} of source `{suite}`", files.len()),
                        format!(
                            "files are found by name: `{name}.jsonl`, or a folder `{name}` with Parquet files"
                        )
                    )
                );
                continue;
            }
            check_shards(&own)?;
            of_tasks.push((name, own));
        }
        let unknown: Vec<String> = files
            .iter()
            .filter(|file| !names.iter().any(|name| is_of_task(file, name)))
            .map(|file| format!("`{}`", file.display()))
            .collect();
        let some = unknown.iter().take(3).map(String::as_str).collect::<Vec<_>>().join(", ");
        ensure!(
            !of_tasks.is_empty(),
            hinted(
                format!(
                    "none of the {} files of source `{suite}` is named as one of its tasks: {some}",
                    files.len()
                ),
                format!(
                    "files are found by name: `{0}.jsonl`, or a folder `{0}`; the tasks are {1}",
                    names[0],
                    names.join(", ")
                )
            )
        );
        if named.is_empty() && !unknown.is_empty() {
            tracing::warn!(
                "{} files of source `{suite}` are named as none of its tasks and are not read: {some}",
                unknown.len()
            );
        }
        Ok(of_tasks)
    }
}

/// `trec.jsonl`, or `scbench_kv/test-00000-of-00001.parquet` as hub data sets are laid out.
fn is_of_task(file: &Path, name: &str) -> bool {
    let own = file.file_name().and_then(|n| n.to_str()).and_then(|n| n.split('.').next());
    own == Some(name) || file.parent().and_then(Path::file_name).is_some_and(|folder| folder == name)
}

/// # Errors
/// Files say that they are some of more shards than there are.
fn check_shards(files: &[PathBuf]) -> Result<()> {
    let total = |file: &PathBuf| {
        let stem = file.file_stem()?.to_str()?;
        stem.rsplit_once("-of-")?.1.parse::<usize>().ok()
    };
    let shards: Vec<usize> = files.iter().filter_map(total).collect();
    let Some(&total) = shards.first() else { return Ok(()) };
    ensure!(
        shards.len() == total,
        hinted(
            format!("`{}` is one of {total} shards, {} are named", files[0].display(), shards.len()),
            "name all shards of a task, and no other data set's, in the manifest of `eval.benchmark.manifest`"
        )
    );
    Ok(())
}

fn unknown(suite: &str, name: &str, names: &[&str]) -> pkv_core::Hinted {
    hinted(format!("`{name}` is no task of {suite}"), format!("its tasks are {}", names.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_asked_for_must_be_there() {
        let mut eval = EvalSection::default();
        let needed =
            |eval: &EvalSection| SOURCES.into_iter().filter(|s| is_needed(eval, s)).collect::<Vec<_>>();
        assert!(needed(&eval).is_empty());
        eval.tasks = vec![Task::Ruler];
        assert_eq!(needed(&eval), ["essays", "squad", "hotpotqa", "words"]);
        eval.benchmark.ruler_tasks = vec!["qa_2".to_owned(), "vt".to_owned()];
        assert_eq!(needed(&eval), ["hotpotqa"]);
        eval.tasks = vec![Task::Longbench, Task::Scbench];
        assert_eq!(needed(&eval), ["longbench", "scbench"]);
    }

    #[test]
    fn files_are_found_by_their_tasks_names() {
        let files = ["d/trec.jsonl", "d/trec_e.jsonl", "h/lcc/test-0.parquet", "d/other.jsonl"];
        let files = Files {
            found: vec![("longbench".to_owned(), files.map(PathBuf::from).to_vec())],
            identity: Fingerprint::new(),
        };
        let names = ["trec", "lcc", "vcsum"];
        let of = |named: &[&str]| {
            let named: Vec<String> = named.iter().map(|n| (*n).to_owned()).collect();
            files.of_suite("longbench", &names, &named).map_err(|e| e.to_string())
        };
        let all = vec![
            ("trec", vec![PathBuf::from("d/trec.jsonl")]),
            ("lcc", vec![PathBuf::from("h/lcc/test-0.parquet")]),
        ];
        assert_eq!(of(&[]).unwrap(), all);
        assert_eq!(of(&["lcc"]).unwrap(), all[1..]);
        assert!(of(&["vcsum"]).unwrap_err().contains("no file of `vcsum` among the 4"));
        assert!(of(&["trek"]).unwrap_err().contains("`trek` is no task of longbench"));
        assert!(
            files.of_suite("scbench", &names, &[]).unwrap_err().to_string().contains("files are not named")
        );
        let shards = |paths: &[&str]| {
            let paths = paths.iter().map(PathBuf::from).collect();
            let files = Files { found: vec![("longbench".to_owned(), paths)], identity: Fingerprint::new() };
            files.of_suite("longbench", &names, &[]).map(|found| found[0].1.len()).map_err(|e| e.to_string())
        };
        assert_eq!(shards(&["lcc/a-00000-of-00002.parquet", "lcc/a-00001-of-00002.parquet"]), Ok(2));
        assert_eq!(
            shards(&["lcc/a-00000-of-00002.parquet"]).unwrap_err(),
            "`lcc/a-00000-of-00002.parquet` is one of 2 shards, 1 are named"
        );
        assert!(
            shards(&["scbench_kv/a.parquet"])
                .unwrap_err()
                .contains("is named as one of its tasks: `scbench_kv/a")
        );
        // Read by name, and then refused by what it is.
        assert_eq!(shards(&["d/trec.jsonl.gz"]), Ok(1));
        assert!(files.one("longbench").is_err() && files.one("squad").unwrap().is_none());
    }
}
