//! LongBench (arXiv 2308.14508): 21 tasks read from the data set's own files.
//!
//! The hub keeps them in `data.zip` of `THUDM/LongBench`: one JSON-lines file per task, with `input`,
//! `context`, `answers`, `all_classes`. Prompts are cut at the context's end, so that the question is not
//! known while the cache is pruned; some tasks (summaries, counting, code) have no question in their own
//! words.

mod table;

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use pkv_core::hinted;
use pkv_recipe::EvalSection;
use pkv_recipe::plan::TaskWork;
use serde_json::{Value, json};

use crate::example::{Example, Turn};
use crate::metric::Metric;
use crate::rows;
use crate::suite::{Benchmark, Opening, Suite};

/// A task of LongBench.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    pub name: &'static str,
    /// The prompt before `{context}`, and after it with `{input}`.
    before: &'static str,
    after: &'static str,
    pub max_new_tokens: usize,
    pub metric: Metric,
    /// Whether a chat template is used: not for few-shot lists and code.
    chat: bool,
    /// Whether the answer ends with its first line.
    first_line: bool,
}

/// LongBench as a suite.
pub struct LongBench;

impl Suite for LongBench {
    fn name(&self) -> &'static str {
        "longbench"
    }

    fn tasks(&self) -> Vec<&'static str> {
        Task::all().iter().map(|task| task.name).collect()
    }

    fn open<'a>(&self, from: &Opening<'a>) -> Result<Vec<Benchmark<'a>>> {
        let read = |name: &str, files: &[PathBuf], limit| {
            Task::of_name(name).expect("it is one of LongBench's names").read(files, limit)
        };
        from.of_files(self, &json!({}), read)
    }

    fn work(&self, section: &EvalSection, named: &[&str]) -> Vec<TaskWork> {
        let work = |task: &Task| {
            let name = format!("{}.{}", self.name(), task.name);
            TaskWork::of_prompts(name, &section.benchmark, task.max_new_tokens)
        };
        let chosen = Task::all().iter().filter(|t| named.is_empty() || named.contains(&t.name));
        chosen.map(work).collect()
    }
}

impl Task {
    pub fn all() -> &'static [Self] {
        &table::TASKS
    }

    pub fn of_name(name: &str) -> Option<&'static Self> {
        table::TASKS.iter().find(|t| t.name == name)
    }

    /// The examples of a task's files, one after the other, at most `limit`.
    ///
    /// # Errors
    /// A file is absent or damaged, or a row is not one of this task: it lacks a column, or one is empty, of
    /// another type, or of a form that the metric cannot read.
    pub fn read(&self, paths: &[PathBuf], limit: usize) -> Result<Vec<Example>> {
        let mut examples: Vec<Example> = Vec::new();
        let mut seen: HashMap<String, String> = HashMap::new();
        for (i, row) in rows::read_all(paths, limit)?.into_iter().take(limit).enumerate() {
            let example = self.example(i, &row.value).with_context(|| {
                hinted(
                    format!("{} is none of LongBench's `{}`", row.place, self.name),
                    "give the files of `data.zip` of the hub's THUDM/LongBench: each row has `input`, `context`, \
                     `answers` (a list), `all_classes` (a list or null) and `_id`",
                )
            })?;
            if let Some(before) = seen.insert(example.id.clone(), row.place.clone()) {
                bail!(hinted(
                    format!("{} and {before} have the same `_id`, {:?}", row.place, example.id),
                    "name each row once: a task is given as one file, or as the shards of one folder"
                ));
            }
            examples.push(example);
        }
        Ok(examples)
    }

    fn example(&self, index: usize, row: &Value) -> Result<Example> {
        if let Some(of) = row.get("dataset").and_then(Value::as_str) {
            // LongBench-E's rows are of the same tasks.
            ensure!(of.trim_end_matches("_e") == self.name, "column `dataset` says that it is of `{of}`");
        }
        // Some tasks ask nothing in their own words.
        let input = if self.after.contains("{input}") { rows::filled } else { rows::text };
        let wanted = rows::texts(row, "answers")?;
        let others = match row.get("all_classes") {
            None | Some(Value::Null) if self.metric != Metric::Classification => Vec::new(),
            Some(Value::Array(none)) if none.is_empty() && self.metric != Metric::Classification => {
                Vec::new()
            }
            _ => rows::texts(row, "all_classes")?,
        };
        let turn = Turn {
            question: self.after.replace("{input}", input(row, "input")?),
            answer_prefix: String::new(),
            given: wanted[0].clone(),
            wanted,
            others,
            metric: self.metric,
            max_new_tokens: self.max_new_tokens,
            first_line: self.first_line,
            part: self.name.to_owned(),
        };
        turn.check_form("answers")?;
        Ok(Example {
            id: row.get("_id").map_or_else(|| format!("{}-{index}", self.name), rows::spell),
            context: format!("{}{}", self.before, rows::filled(row, "context")?),
            turns: vec![turn],
            conversation: false,
            chat: self.chat,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_examples() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trec.jsonl");
        let row = json!({
            "input": "Question: What is {context}?\nType:", "context": "Question: A?\nType: X", "answers": ["Y"],
            "length": 9, "dataset": "trec", "language": "en", "all_classes": ["X", "Y"], "_id": "abc",
        });
        let mut other = row.clone();
        other["_id"] = json!("abd");
        std::fs::write(&path, format!("{row}\n{other}\n")).unwrap();
        let trec = Task::of_name("trec").unwrap();
        let paths = [path.clone()];
        let examples = trec.read(&paths, 10).unwrap();
        assert_eq!(examples.len(), 2);
        assert_eq!(trec.read(&paths, 1).unwrap(), examples[..1]);
        let e = &examples[0];
        assert_eq!(
            format!("{}{}", e.context, e.turns[0].question),
            "Please determine the type of the question below. Here are some examples of questions.\n\n\
             Question: A?\nType: X\nQuestion: What is {context}?\nType:"
        );
        assert!(!e.chat && e.turns[0].first_line && e.id == "abc");
        assert_eq!(e.turns[0].score("\nY\nX"), 1.0, "the first line alone counts");
        assert_eq!(e.turns[0].score("X Y"), 0.5);
    }

    /// Read `rows` as a file of `task`, named as its hub folder has it.
    fn read(task: &str, rows: &[Value]) -> Result<Vec<Example>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, rows.iter().map(|r| format!("{r}\n")).collect::<String>()).unwrap();
        Task::of_name(task).unwrap().read(&[path], 10)
    }

    fn row(id: &str, answer: &str) -> Value {
        json!({"input": "Q?", "context": "C", "answers": [answer], "all_classes": null, "_id": id})
    }

    #[test]
    fn all_shards_of_a_task_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let shard = |n: usize| {
            let path = dir.path().join(format!("test-{n}.jsonl"));
            let rows: Vec<String> = (0..3).map(|i| row(&format!("{n}-{i}"), "x").to_string()).collect();
            std::fs::write(&path, rows.join("\n")).unwrap();
            path
        };
        let shards = [shard(0), shard(1)];
        let qasper = Task::of_name("qasper").unwrap();
        let ids = |limit| qasper.read(&shards, limit).unwrap().into_iter().map(|e| e.id).collect::<Vec<_>>();
        assert_eq!(ids(10), ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]);
        assert_eq!(ids(4), ["0-0", "0-1", "0-2", "1-0"]);
        let error = qasper.read(&[shards[0].clone(), shards[0].clone()], 10).unwrap_err().to_string();
        assert!(error.contains("have the same `_id`, \"0-0\""), "{error}");
    }

    #[test]
    fn rows_that_do_not_fit_are_named_in_every_task() {
        for task in Task::all() {
            let (answer, classes) = match task.metric {
                Metric::Retrieval => ("Paragraph 3", json!(null)),
                Metric::RetrievalZh => ("段落3", json!(null)),
                Metric::Count => ("3", json!([])),
                Metric::Classification => ("Y", json!(["X", "Y"])),
                _ => ("some answer", json!(null)),
            };
            let with = |column: &str, value: Value| {
                let mut row = row("b", answer);
                row["all_classes"] = classes.clone();
                if column == "none" {
                    row.as_object_mut().unwrap().remove(value.as_str().unwrap());
                } else {
                    row[column] = value;
                }
                let mut first = row.clone();
                for (c, v) in [
                    ("_id", json!("a")),
                    ("input", json!("Q?")),
                    ("context", json!("C")),
                    ("answers", json!([answer])),
                    ("all_classes", classes.clone()),
                ] {
                    first[c] = v;
                }
                first.as_object_mut().unwrap().remove("dataset");
                read(task.name, &[first, row])
            };
            let fitting = with("_id", json!("b")).unwrap();
            assert!(fitting.len() == 2 && fitting[0].turns[0].can_score(), "{}", task.name);
            let mut wrong = vec![
                ("answers", json!(null)),
                ("answers", json!([])),
                ("answers", json!("x")),
                ("answers", json!([""])),
                ("answers", json!([3])),
                ("answers", json!([null])),
                ("answers", json!(["x".repeat(200_000)])),
                ("none", json!("answers")),
                ("context", json!("")),
                ("context", json!(" \n")),
                ("context", json!(["C"])),
                ("none", json!("context")),
                ("input", json!(7)),
                ("none", json!("input")),
                ("dataset", json!("another")),
                ("all_classes", json!("X")),
                ("all_classes", json!([1])),
            ];
            if task.after.contains("{input}") {
                wrong.push(("input", json!("")));
            }
            if task.metric == Metric::Classification {
                wrong.extend([
                    ("all_classes", json!(null)),
                    ("all_classes", json!([])),
                    ("none", json!("all_classes")),
                    ("answers", json!(["Z"])),
                ]);
            }
            if matches!(task.metric, Metric::Retrieval | Metric::RetrievalZh | Metric::Count) {
                wrong.push(("answers", json!(["none"])));
            }
            for (column, value) in wrong {
                let named =
                    if column == "none" { value.as_str().unwrap().to_owned() } else { column.to_owned() };
                let error = with(column, value.clone())
                    .err()
                    .unwrap_or_else(|| panic!("{}: {column} = {value} was accepted", task.name));
                let text = format!("{error:#}");
                assert!(
                    text.contains("row 2 of `")
                        && text.contains("rows.jsonl")
                        && text.contains(&format!("column `{named}")),
                    "{text}"
                );
                assert!(error.downcast_ref::<pkv_core::Hinted>().unwrap().hint().contains("THUDM/LongBench"));
            }
        }
    }

    #[test]
    fn there_are_21_tasks() {
        let names: std::collections::HashSet<_> = Task::all().iter().map(|t| t.name).collect();
        assert_eq!(names.len(), 21);
        assert!(Task::of_name("nothing").is_none());
        // The prompt of every task has one place for the context and at most one for the input.
        assert!(
            Task::all().iter().all(|t| !t.before.contains('{') && t.after.matches("{input}").count() <= 1)
        );
    }
}
