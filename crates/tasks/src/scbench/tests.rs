//! Rows in the data set's form to examples with their turns.

use super::*;
use serde_json::json;

fn read(task: Task, mode: Mode, rows: &[Value]) -> Result<Vec<Example>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    std::fs::write(&path, rows.iter().map(|r| format!("{r}\n")).collect::<String>()).unwrap();
    task.read(&[path], mode, 10)
}

#[test]
fn turns_follow_the_context_or_each_other() {
    let row = json!({"id": 7, "context": "{\"a\": \"x\", \"b\": \"y\"}", "multi_turns": [
        {"input": "Key: \"a\"", "answer": "x"}, {"input": "Key: \"b\"", "answer": "y"}]});
    let made = read(Task::Kv, Mode::MultiTurn, std::slice::from_ref(&row)).unwrap();
    assert_eq!(
        made[0].context,
        "Extract the value corresponding to the specified key in the JSON object below.\n\n{\"a\": \"x\", \"b\": \"y\"}"
    );
    assert!(made[0].conversation && made[0].chat);
    let questions = |e: &Example| e.turns.iter().map(|t| t.question.clone()).collect::<Vec<_>>();
    assert_eq!(questions(&made[0]), ["\n\nKey: \"a\"", "Key: \"b\""]);
    assert_eq!(made[0].turns[1].score("The value is y."), 1.0);
    assert_eq!(made[0].turns[1].max_new_tokens, 150);
    let made = read(Task::Kv, Mode::MultiRequest, &[row]).unwrap();
    assert_eq!(questions(&made[0]), ["\n\nKey: \"a\"", "\n\nKey: \"b\""]);
    assert!(!made[0].conversation);
}

#[test]
fn choices_and_numbers() {
    let row = json!({"id": 1, "context": "C", "multi_turns": [
        {"input": "Who?", "answer": "Bo", "options": ["Al", "Bo", "Cy", "Di"]}]});
    let made = read(Task::ChoiceEng, Mode::MultiTurn, &[row]).unwrap();
    let turn = &made[0].turns[0];
    assert_eq!(turn.question, "\n\nQuestion: Who?\nA. Al\nB. Bo\nC. Cy\nD. Di\n\nThe the correct answer is");
    assert_eq!((turn.score("B. Bo"), turn.score("C"), turn.score("Bo")), (1.0, 0.0, 1.0));

    let row = json!({"id": 1, "context": "[3, 9]", "multi_turns": [
        {"input": "The largest number of the list is", "answer": 9}, {"input": "The median is", "answer": 6.5}]});
    let made = read(Task::Mf, Mode::MultiTurn, std::slice::from_ref(&row)).unwrap();
    assert_eq!(made[0].context, "What is the largest number of the list?\n\n[3, 9]");
    assert_eq!(made[0].turns[1].question, "What is the median?\n\nThe median is");
    assert_eq!(
        (made[0].turns[0].score(" 9."), made[0].turns[1].score("6.5"), made[0].turns[1].score("6")),
        (1.0, 1.0, 0.0)
    );
    let made = read(Task::Mf, Mode::MultiRequest, &[row]).unwrap();
    assert_eq!(made[0].context, "The largest number of the list is\n\n[3, 9]");
}

#[test]
fn mixed_tasks_have_parts() {
    let code = |name: &str| format!("def {name}(a, b):\n    c = a + b\n    return c * {name}_factor(a)");
    let row = |n: &str| {
        json!({"id": 1, "repo": "r", "lang": "python", "context": "C", "multi_turns": [
        {"task": "scbench_repoqa", "input": "Which?", "answer": code(n), "name": n},
        {"task": "scbench_kv", "input": "Key", "answer": "v"}]})
    };
    let made = read(Task::RepoqaAndKv, Mode::MultiTurn, &[row("f"), row("g")]).unwrap();
    let turns = &made[0].turns;
    assert_eq!((turns[0].part.as_str(), turns[1].part.as_str()), ("scbench_repoqa", "scbench_kv"));
    assert_eq!((turns[0].max_new_tokens, turns[1].max_new_tokens), (1024, 80));
    assert_eq!(turns[0].others, [code("f"), code("g")], "functions of the repository compete");
    assert_eq!(turns[0].score(&format!("```python\n{}\n```", code("f"))), 1.0);
    assert_eq!(turns[0].score(&code("g")), 0.0);
    let wrong = json!({"id": 1, "context": "C", "multi_turns": [{"task": "scbench_kv", "input": "Key", "answer": "v"}]});
    let error = format!("{:#}", read(Task::SummaryWithNeedles, Mode::MultiTurn, &[wrong]).unwrap_err());
    assert!(error.contains("row 1 of") && error.contains("column `task` says `scbench_kv`"), "{error}");
}

#[test]
fn every_task_has_room_and_a_metric() {
    for task in Task::ALL {
        assert_eq!(Task::named(task.name()), Some(task));
        let options = ["a", "b", "c", "d"];
        let turn = |part: &str| {
            // Passkeys and sums are numbers.
            let answer = if part == "scbench_passkey" || task == Task::Mf { "7" } else { "a" };
            json!({"task": part, "input": "The sum is", "answer": answer, "options": options, "name": "f"})
        };
        let parts: &[&str] = match task {
            Task::SummaryWithNeedles => &["scbench_summary", "scbench_passkey"],
            Task::RepoqaAndKv => &["scbench_repoqa", "scbench_kv"],
            _ => &[""],
        };
        let turns: Vec<Value> = parts.iter().map(|p| turn(p)).collect();
        let row = json!({"id": 1, "repo": "r", "context": "C", "multi_turns": turns});
        let made = read(task, Mode::MultiTurn, &[row]).unwrap();
        assert!(
            made[0].turns.iter().all(|t| t.max_new_tokens >= 5 && !t.wanted.is_empty()),
            "{}",
            task.name()
        );
    }
}

#[test]
fn rows_that_do_not_fit_are_named_in_every_task() {
    let turn = |task: Task| {
        let part = match task {
            Task::SummaryWithNeedles => "scbench_passkey",
            _ => "scbench_repoqa",
        };
        let answer = if matches!(task, Task::Mf | Task::SummaryWithNeedles) { "7" } else { "a" };
        json!({"task": part, "input": "The sum is", "answer": answer, "options": ["a", "b", "c", "d"]})
    };
    for task in Task::ALL {
        let row = json!({"id": 1, "repo": "r", "context": "C", "multi_turns": [turn(task), turn(task)]});
        let check = |row: Value, named: &str, what: &str| {
            let good = json!({"id": 0, "repo": "r", "context": "C", "multi_turns": [turn(task)]});
            let error = read(task, Mode::MultiTurn, &[good, row]).err();
            let error = error.unwrap_or_else(|| panic!("{}: {what} was accepted", task.name()));
            let text = format!("{error:#}");
            assert!(
                text.contains("row 2 of `")
                    && text.contains("rows.jsonl")
                    && text.contains(&format!("`{named}")),
                "{}: {what}: {text}",
                task.name()
            );
            assert!(error.downcast_ref::<pkv_core::Hinted>().unwrap().hint().contains("microsoft/SCBench"));
        };
        assert_eq!(
            read(task, Mode::MultiTurn, std::slice::from_ref(&row)).unwrap().len(),
            1,
            "{}",
            task.name()
        );
        let mut wrong = vec![
            ("context", json!("")),
            ("context", json!(["C"])),
            ("context", json!(null)),
            ("multi_turns", json!([])),
            ("multi_turns", json!(null)),
            ("multi_turns", json!("x")),
        ];
        if matches!(task, Task::Repoqa | Task::RepoqaAndKv) {
            wrong.extend([("repo", json!(null)), ("repo", json!(""))]);
        }
        for (column, value) in wrong {
            let mut row = row.clone();
            row[column] = value.clone();
            check(row, column, &format!("{column} = {value}"));
        }
        let mut of_turns = vec![
            ("input", json!("")),
            ("input", json!(null)),
            ("input", json!(3)),
            ("answer", json!(null)),
            ("answer", json!("")),
            ("answer", json!([])),
            ("answer", json!([null])),
            ("answer", json!(true)),
            ("answer", json!({"a": 1})),
        ];
        match task {
            Task::ChoiceEng => of_turns.extend([
                ("answer", json!("z")),
                ("options", json!(["a", "b"])),
                ("options", json!(null)),
                ("options", json!("abcd")),
            ]),
            Task::Mf => of_turns.extend([("answer", json!("seven")), ("input", json!("What?"))]),
            Task::SummaryWithNeedles => of_turns.extend([("answer", json!("seven")), ("task", json!(null))]),
            Task::RepoqaAndKv => of_turns.extend([("task", json!("scbench_mf")), ("task", json!(3))]),
            _ => {}
        }
        for (column, value) in of_turns {
            let mut row = row.clone();
            row["multi_turns"][1][column] = value.clone();
            check(row.clone(), column, &format!("turn's {column} = {value}"));
            check(row, "multi_turns[1]", column);
        }
    }
}
