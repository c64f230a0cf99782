//! `compare`: runs side by side, and what cannot be compared.

use std::fs;

use serde_json::Value;

use crate::sandbox::{Ran, Sandbox};

fn compare(s: &Sandbox, args: &[&str]) -> Ran {
    let mut all = vec!["compare"];
    all.extend(args);
    Ran::new(s.command(&all).output().unwrap())
}

/// Train and evaluate under another name with other choices.
fn ablation(s: &Sandbox, name: &str, set: &[&str]) {
    let name = format!("name={name}");
    let mut choices = vec!["--set", &name];
    set.iter().for_each(|s| choices.extend(["--set", s]));
    for stage in ["prepare", "label", "extract", "train", "eval"] {
        s.run(&[&[stage], choices.as_slice()].concat()).ok();
    }
}

#[test]
fn runs_are_put_side_by_side() {
    let s = Sandbox::new();
    ablation(&s, "base", &[]);
    ablation(&s, "linear", &["mapper.variant=linear"]);
    // Half of the contexts, other lengths of training: still the same test documents.
    ablation(&s, "fewer", &["eval.contexts=1", "train.steps=12"]);
    let ran = compare(&s, &["base", "runs/linear", "runs/fewer", "--out", "page.html"]).ok();
    for part in [
        "3 runs for",
        "Answers from the pruned cache, facts",
        "Recovered accuracy (KVzip = 100",
        "Recall of KVzip's kept set",
        "Answers minus those of `base`",
        "2 of 2",
        "1 of 2",
        "| `mapper.variant`",
        "| `train.steps`",
        "Share of each layer's KV pairs kept at 5%",
    ] {
        assert!(ran.stdout.contains(part), "`{part}` is missing\n{}", ran.stdout);
    }
    assert!(!ran.stdout.contains("`data."), "{}", ran.stdout);
    let page = fs::read_to_string(s.path("page.html")).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.contains("linear (2 shared)"));

    // The numbers are those of each run's own results.
    let ran = compare(&s, &["runs/base", "runs/linear", "--json"]).ok();
    let printed: Value = serde_json::from_str(&ran.stdout).unwrap();
    for (i, run) in ["base", "linear"].iter().enumerate() {
        let text = fs::read_to_string(s.path("runs").join(run).join("eval/results.json")).unwrap();
        let results: Value = serde_json::from_str(&text).unwrap();
        for (metric, cells, key) in [
            ("answers", &results["facts"]["cells"], "accuracy"),
            ("recall", &results["labels"]["cells"], "recall"),
        ] {
            for (r, ratio) in printed[metric]["ratios"].as_array().unwrap().iter().enumerate() {
                let wanted =
                    |c: &&Value| c["method"] == "mapper" && c["policy"] == "pair" && c["ratio"] == *ratio;
                let own = &cells.as_array().unwrap().iter().find(wanted).unwrap()[key];
                for bound in ["mean", "low", "high"] {
                    let (a, b) = (
                        own[bound].as_f64().unwrap(),
                        printed[metric]["runs"][i][r][bound].as_f64().unwrap(),
                    );
                    assert!((a - b).abs() < 1e-12, "{run} {metric} {ratio} {bound}: {a} {b}");
                }
            }
        }
    }

    // Same target, other documents: nothing is shared.
    ablation(&s, "elsewhere", &["seed=11", "eval.context_tokens=120"]);
    compare(&s, &["base", "elsewhere"]).fails_with(&["share no context", "same documents"]);
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let s = Sandbox::new();
    ablation(&s, "base", &[]);
    compare(&s, &["base", "nowhere"]).fails_with(&["there is no run folder `nowhere`"]);
    compare(&s, &["base", "base"]).fails_with(&["named twice"]);
    assert_eq!(compare(&s, &["base"]).code, 2, "the command line asks for two");
    s.write("runs/young/run.json", "{}");
    compare(&s, &["base", "young"]).fails_with(&["has not been evaluated", "proxykv-train eval"]);
    // A copy whose results are of another target, of another version, or unreadable.
    fs::create_dir_all(s.path("runs/copy/eval")).unwrap();
    for file in ["run.json", "eval/results.json", "eval/answers.parquet", "eval/agreement.parquet"] {
        fs::copy(s.path("runs/base").join(file), s.path("runs/copy").join(file)).unwrap();
    }
    let ran = compare(&s, &["base", "runs/copy"]).ok();
    assert!(ran.stdout.contains("| runs/copy"), "runs of one name are called by folder\n{}", ran.stdout);
    s.edit("runs/copy/eval/results.json", "\"layers\":6", "\"layers\":8");
    compare(&s, &["base", "runs/copy"]).fails_with(&["its target is", "8 layers", "expected", "one target"]);
    s.edit("runs/copy/eval/results.json", "\"layers\":8", "\"layers\":6");
    s.write("runs/copy/eval/answers.parquet", "nonsense");
    compare(&s, &["base", "runs/copy"]).fails_with(&["answers.parquet", "--redo eval"]);
    s.edit("runs/copy/eval/results.json", "\"schema_version\":1", "\"schema_version\":9");
    compare(&s, &["base", "runs/copy"]).fails_with(&["schema version 9"]);
    let out = compare(&s, &["base", "copy", "--out", "no/such/folder/x.html"]);
    out.fails_with(&["schema version 9"]);
}
