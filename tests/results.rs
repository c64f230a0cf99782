//! Results add up: evaluations of other tasks, methods, ratios and limits take nothing away.

use std::fs;
use std::time::Duration;

use serde_json::Value;

use crate::sandbox::{Ran, Sandbox};

const RUN: &str = "runs/small";

/// `eval` with a part of the recipe's choices.
fn eval(s: &Sandbox, choices: &[&str]) -> Ran {
    let mut args = vec!["eval"];
    for choice in choices {
        args.extend(["--set", choice]);
    }
    s.run(&args).ok()
}

fn results(s: &Sandbox) -> Value {
    let text = fs::read_to_string(s.path(RUN).join("eval/results.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Every cell of one task, as written.
fn cells(task: &Value) -> Vec<Value> {
    task["cells"].as_array().unwrap().clone()
}

/// The cells of `before` are in `now`, bit for bit.
fn assert_holds(now: &Value, before: &Value) {
    for task in ["labels", "facts", "perplexity"] {
        let found = cells(&now[task]);
        for cell in cells(&before[task]) {
            assert!(found.contains(&cell), "{task} lost or changed {cell}");
        }
    }
    for task in before["benchmarks"].as_array().unwrap() {
        assert!(now["benchmarks"].as_array().unwrap().contains(task), "{task} is lost or changed");
    }
}

#[test]
fn evaluations_add_up_until_they_are_made_anew() {
    let s = Sandbox::new();
    // Nothing is there, and asking for it makes nothing.
    s.run(&["report"]).fails_with(&["there is no run"]);
    Ran::new(s.command(&["inspect", RUN]).output().unwrap()).fails_with(&["there is no"]);
    assert!(!s.path(RUN).exists());
    // A folder that was there before stays, whatever fails in it.
    fs::create_dir_all(s.path(RUN)).unwrap();
    s.run(&["train"]).fails_with(&["`prepare` has not run"]);
    s.run(&["report"]).fails_with(&["no stage of", "has run"]);

    for stage in ["prepare", "label", "extract", "train"] {
        s.run(&[stage]).ok();
    }
    let full = ["eval.methods=[\"mapper\",\"kvzip\"]", "eval.policies=[\"pair\"]"];
    eval(&s, &full);
    let first = results(&s);
    for task in ["labels", "facts", "perplexity"] {
        assert_eq!(first[task]["fingerprint"].as_str().map(str::len), Some(64), "{task}");
        assert_eq!(first[task]["measured"].as_str().map(str::len), Some("2026-01-31".len()), "{task}");
    }

    // Another task, without the others.
    let ruler = [
        full[1],
        "eval.methods=[\"kvzip\"]",
        "eval.tasks=[\"ruler\"]",
        "eval.benchmark.ruler_tasks=[\"niah_single_1\"]",
        "eval.benchmark.ruler_tokens=480",
        "eval.benchmark.examples=1",
    ];
    eval(&s, &ruler);
    let second = results(&s);
    assert_holds(&second, &first);
    assert_eq!(second["benchmarks"].as_array().unwrap().len(), 1);

    // A new method and a new ratio on fewer contexts.
    let some = [
        full[1],
        "eval.methods=[\"random\",\"mapper\"]",
        "eval.tasks=[\"facts\"]",
        "eval.contexts=1",
        "eval.answer_ratios=[0.05,0.5]",
    ];
    eval(&s, &some);
    let third = results(&s);
    assert_holds(&third, &second);
    let random = cells(&third["facts"]).into_iter().filter(|c| c["method"] == "random").collect::<Vec<_>>();
    assert_eq!((random.len(), &random[0]["contexts"]), (2, &Value::from(1)));
    assert_eq!(third["facts"]["contexts"], 2);

    // What is there already is not asked again, whatever part of it is named.
    for choices in [&some[..], &ruler[..], &full[..]] {
        let again = eval(&s, choices);
        assert!(again.stderr.contains("skipped"), "{}", again.stderr);
    }
    assert_eq!(results(&s), third);

    s.run(&["export"]).ok();
    s.run(&["report"]).ok();
    let page = fs::read_to_string(s.path(RUN).join("report.html")).unwrap();
    for part in ["Questions answered, percent", "niah_single_1", "Likelihood lost", "random on 1 (at"] {
        assert!(page.contains(part), "{part} is not in the report");
    }
    assert!(s.path(RUN).join("answers.svg").exists());
    every_file_is_known(&s);

    // Only making them anew drops what was measured.
    s.run(&["eval", "--redo", "eval", "--set", full[1], "--set", "eval.tasks=[\"perplexity\"]"]).ok();
    let anew = results(&s);
    assert!(anew["facts"].is_null() && anew["benchmarks"].as_array().unwrap().is_empty());
    s.run(&["report"]).ok();
    assert!(!s.path(RUN).join("answers.svg").exists(), "a chart of results that are gone");
    processes_at_once_end_with_the_same_union(&s, full[1]);
}

/// Two evaluations of other methods into one folder, and one that is killed between.
fn processes_at_once_end_with_the_same_union(s: &Sandbox, policies: &str) {
    let start = |methods: &str| {
        let methods = format!("eval.methods=[{methods}]");
        s.start(&["eval", "--set", policies, "--set", &methods])
    };
    let (mapper, random, killed) =
        (start("\"mapper\",\"kvzip\""), start("\"random\",\"mapper\""), start("\"streaming-llm\""));
    killed.kill_after(Duration::from_millis(900));
    for child in [mapper, random] {
        child.end().ok();
    }
    let union = results(s);
    for task in ["labels", "facts", "perplexity"] {
        let methods: Vec<Value> = cells(&union[task]).into_iter().map(|c| c["method"].clone()).collect();
        for method in ["mapper", "kvzip", "random"] {
            assert!(methods.contains(&method.into()), "{task} has no {method}");
        }
    }
    let all = eval(s, &[policies, "eval.methods=[\"mapper\",\"kvzip\",\"random\",\"streaming-llm\"]"]);
    let whole = results(s);
    for task in ["labels", "facts", "perplexity"] {
        let found = cells(&whole[task]);
        assert!(found.iter().any(|c| c["method"] == "streaming-llm"), "{task}\n{}", all.stderr);
        assert!(found.iter().all(|c| c["contexts"].is_null()), "{task} was not measured on every context");
        // Of the one that was killed, a part may have been there.
        for cell in cells(&union[task]).into_iter().filter(|c| c["method"] != "streaming-llm") {
            assert!(found.contains(&cell), "{task} lost or changed {cell}");
        }
    }
}

/// `inspect` says something of every file and folder of the run.
fn every_file_is_known(s: &Sandbox) {
    let mut open = vec![s.path(RUN)];
    let mut known = 0;
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
        let ran = Ran::new(s.command(&["inspect", path.to_str().unwrap()]).output().unwrap()).ok();
        assert!(!ran.stdout.is_empty(), "{}", path.display());
        // What was asked and answered is shown.
        if path.ends_with("answers.parquet") {
            let shown = ["question", "right answer", "given"].map(|key| ran.stdout.matches(key).count());
            assert!(shown[0] > 1 && shown.iter().all(|n| *n == shown[0]), "{}", ran.stdout);
        }
        known += 1;
    }
    assert!(known > 40, "{known}");
}

#[test]
fn the_newest_tokens_may_stay_and_what_was_measured_without_them_comes_back() {
    let s = Sandbox::new();
    for stage in ["prepare", "label", "extract", "train", "eval"] {
        s.run(&[stage]).ok();
    }
    let first = results(&s);
    s.run(&["eval", "--keep-recent", "20"]).ok();
    let recent = results(&s);
    // Agreement is of the scores; what is read from the caches is another thing.
    assert_eq!(recent["labels"]["cells"], first["labels"]["cells"]);
    for task in ["facts", "perplexity"] {
        assert_ne!(recent[task]["fingerprint"], first[task]["fingerprint"], "{task}");
    }
    assert_ne!(cells(&recent["perplexity"]), cells(&first["perplexity"]));
    s.run(&["eval"]).ok();
    assert_eq!(cells(&results(&s)["perplexity"]), cells(&first["perplexity"]));
}
