//! LongBench (arXiv 2308.14508): 21 tasks read from the data set's own files.
//!
//! The hub keeps them in `data.zip` of `THUDM/LongBench`: one JSON-lines file per task, with `input`, `context`,
//! `answers`, `all_classes`. Prompts are cut at the context's end, so that the question is not known while the cache
//! is pruned; some tasks (summaries, counting, code) have no question in their own words.

mod table;

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::example::{Example, Turn};
use crate::metric::Metric;
use crate::rows;

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

impl Task {
    pub fn all() -> &'static [Self] {
        &table::TASKS
    }

    pub fn of_name(name: &str) -> Option<&'static Self> {
        table::TASKS.iter().find(|t| t.name == name)
    }

    /// The examples of a task's file, at most `limit`.
    ///
    /// # Errors
    /// The file is absent, damaged, or lacks a column.
    pub fn read(&self, path: &Path, limit: usize) -> Result<Vec<Example>> {
        let rows = rows::read(path)?;
        let example = |(i, row): (usize, &Value)| {
            self.example(i, row).with_context(|| format!("row {} of `{}`", i + 1, path.display()))
        };
        rows.iter().take(limit).enumerate().map(example).collect()
    }

    fn example(&self, index: usize, row: &Value) -> Result<Example> {
        let texts = |column| rows::list(row, column).iter().map(rows::spell).collect::<Vec<_>>();
        let wanted = texts("answers");
        let turn = Turn {
            question: self.after.replace("{input}", rows::text(row, "input")?),
            answer_prefix: String::new(),
            given: wanted.first().cloned().unwrap_or_default(),
            wanted,
            others: texts("all_classes"),
            metric: self.metric,
            max_new_tokens: self.max_new_tokens,
            first_line: self.first_line,
            part: self.name.to_owned(),
        };
        Ok(Example {
            id: row.get("_id").map_or_else(|| format!("{}-{index}", self.name), rows::spell),
            context: format!("{}{}", self.before, rows::text(row, "context")?),
            turns: vec![turn],
            conversation: false,
            chat: self.chat,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rows_become_examples() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trec.jsonl");
        let row = json!({
            "input": "Question: What is {context}?\nType:", "context": "Question: A?\nType: X", "answers": ["Y"],
            "length": 9, "dataset": "trec", "language": "en", "all_classes": ["X", "Y"], "_id": "abc",
        });
        std::fs::write(&path, format!("{row}\n{row}\n")).unwrap();
        let trec = Task::of_name("trec").unwrap();
        let examples = trec.read(&path, 10).unwrap();
        assert_eq!(examples.len(), 2);
        assert_eq!(trec.read(&path, 1).unwrap(), examples[..1]);
        let e = &examples[0];
        assert_eq!(
            format!("{}{}", e.context, e.turns[0].question),
            "Please determine the type of the question below. Here are some examples of questions.\n\n\
             Question: A?\nType: X\nQuestion: What is {context}?\nType:"
        );
        assert!(!e.chat && e.turns[0].first_line && e.id == "abc");
        assert_eq!(e.turns[0].score("\nY\nX"), 1.0, "the first line alone counts");
        assert_eq!(e.turns[0].score("X Y"), 0.5);
        std::fs::write(&path, "{\"input\": \"a\"}\n").unwrap();
        let error = format!("{:#}", trec.read(&path, 10).unwrap_err());
        assert!(error.contains("row 1 of") && error.contains("column `context` is absent"), "{error}");
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
