//! Files of standard benchmarks.

use std::fs;
use std::path::Path;

use pkv_core::Seed;
use pkv_tasks::ruler::{Generator, QaSet, RulerTask, Sources};
use pkv_tasks::scbench::Mode;
use pkv_tasks::{Example, longbench, scbench};
use serde_json::{Value, json};

use crate::folder;
use crate::harness::Target;

fn lines(path: &Path, rows: &[Value]) {
    let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
    fs::write(path, text).unwrap();
}

/// What is accepted can be scored.
fn score(examples: &[Example]) {
    for turn in examples.iter().flat_map(|e| &e.turns) {
        // Models answer with some hundred tokens at most.
        let given: String = turn.given.chars().take(1000).collect();
        for answer in ["", "B", "```python\ndef f(x):\n    return x\n```", given.as_str()] {
            let score = turn.score(answer);
            assert!((0.0..=1.0).contains(&score), "{score} for {answer:?} to {turn:?}");
        }
    }
}

#[test]
fn ruler_rows() {
    let dir = folder("ruler");
    let paragraph = |n: usize| {
        json!({"context": format!("The lantern number {n} is in the harbour. ").repeat(9), "qas": [
        {"id": n, "question": format!("Where is lantern {n}?"), "answers": [{"text": "the harbour", "answer_start": 0}], "is_impossible": false}]})
    };
    let squad = json!({"version": "v2.0", "data": [{"title": "a", "paragraphs": [paragraph(1), paragraph(2)]}, {"title": "b", "paragraphs": [paragraph(3)]}]});
    fs::write(dir.join("squad.json"), squad.to_string()).unwrap();
    let hotpot = |n: usize| {
        json!({"_id": n.to_string(), "question": "Who?", "answer": "nobody", "context": [[format!("title {n}"), ["One. ", "Two."]], ["other", ["Three."]]],
        "supporting_facts": [[format!("title {n}"), 0]]})
    };
    fs::write(dir.join("hotpot.json"), json!([hotpot(1), hotpot(2)]).to_string()).unwrap();
    fs::write(dir.join("essay.json"), json!({"text": "Words of an essay. ".repeat(50)}).to_string()).unwrap();
    fs::write(dir.join("words.json"), json!({"0": "apple", "1": "pear"}).to_string()).unwrap();
    let read = |dir: &Path| {
        let sources = Sources {
            essay: Some(Sources::read_essay(&dir.join("essay.json"))?.into()),
            squad: Some(QaSet::squad(&dir.join("squad.json"))?.into()),
            hotpotqa: Some(QaSet::hotpotqa(&dir.join("hotpot.json"))?.into()),
            extra_words: Some(Sources::read_words(&dir.join("words.json"))?),
        };
        let count = |text: &str| Ok(text.split_whitespace().count());
        for task in [RulerTask::Qa1, RulerTask::Qa2, RulerTask::Cwe] {
            let generator = Generator::new(task, 600, 10, &sources, &count, Seed(1))?;
            score(&[generator.example(0)?]);
        }
        Ok(())
    };
    let files = ["squad.json", "hotpot.json", "essay.json", "words.json"];
    Target { name: "ruler", folder: &dir, files: &files, repair: None, read: &read }.fuzz();
}

#[test]
fn longbench_rows() {
    let dir = folder("longbench");
    let names: Vec<String> = longbench::Task::all().iter().map(|t| format!("{}.jsonl", t.name)).collect();
    for task in longbench::Task::all() {
        let answer = match task.name {
            "passage_retrieval_zh" => "段落3",
            "passage_retrieval_en" => "Paragraph 3",
            _ => "B",
        };
        let row = |id: &str| {
            json!({"input": "Question: B?", "context": "A long text. B is C.", "answers": [answer, "3"], "length": 9, "dataset": task.name,
            "language": "en", "all_classes": ["B", "C"], "_id": id})
        };
        lines(&dir.join(format!("{}.jsonl", task.name)), &[row("a"), row("b")]);
    }
    let read = |dir: &Path| {
        longbench::Task::all().iter().try_for_each(|task| {
            score(&task.read(&[dir.join(format!("{}.jsonl", task.name))], 10)?);
            Ok(())
        })
    };
    let files: Vec<&str> = names.iter().map(String::as_str).collect();
    Target { name: "longbench", folder: &dir, files: &files, repair: None, read: &read }.fuzz();
}

#[test]
fn scbench_rows() {
    let dir = folder("scbench");
    let names: Vec<String> = scbench::Task::ALL.iter().map(|t| format!("{}.jsonl", t.name())).collect();
    for (task, name) in scbench::Task::ALL.iter().zip(&names) {
        let parts = match task.name() {
            "scbench_summary_with_needles" => ["scbench_summary", "scbench_passkey"],
            "scbench_repoqa_and_kv" => ["scbench_repoqa", "scbench_kv"],
            other => [other; 2],
        };
        let turns = parts.map(|part| {
            let answer = match part {
                "scbench_mf" | "scbench_passkey" => json!("7"),
                "scbench_vt" => json!(["A", "B"]),
                "scbench_repoqa" => json!("def f(x):\n    return x\n"),
                _ => json!("B"),
            };
            json!({"task": part, "input": "The sum of all is", "answer": answer, "options": ["A", "B", "C", "D"], "name": "f"})
        });
        let row = json!({"id": 1, "repo": "r", "lang": "python", "context": "[3, 7] A long text.", "multi_turns": turns});
        lines(&dir.join(name), &[row.clone(), row]);
    }
    let read = |dir: &Path| {
        scbench::Task::ALL.into_iter().try_for_each(|task| {
            for mode in [Mode::MultiTurn, Mode::MultiRequest] {
                score(&task.read(&[dir.join(format!("{}.jsonl", task.name()))], mode, 10)?);
            }
            Ok(())
        })
    };
    let files: Vec<&str> = names.iter().map(String::as_str).collect();
    Target { name: "scbench", folder: &dir, files: &files, repair: None, read: &read }.fuzz();
}
