//! The page of a comparison: whole, self-contained, and true to its numbers.

mod run;

use pkv_core::Policy;
use pkv_results::Interval;
use pkv_results::compare::{
    Budgets, Comparison, Difference, Metric, RecipeKey, Reference, RunName, TaskScores,
};
use run::methods::ALL as METHODS;
use serde_json::json;

fn around(mean: f64) -> Interval {
    Interval { mean, low: mean - 0.02, high: mean + 0.03 }
}

fn metric(first: f64, second: f64, references: Vec<Reference>) -> Metric {
    Metric {
        ratios: vec![0.1, 0.05],
        contexts: vec![60, 40],
        runs: vec![vec![around(first), around(first - 0.1)], vec![around(second), around(second - 0.1)]],
        references,
        differences: vec![Difference {
            run: 1,
            contexts: 37,
            values: vec![around(second - first), Interval { mean: 0.001, low: -0.01, high: 0.012 }],
        }],
    }
}

fn comparison() -> Comparison {
    let run = |name: &str| RunName {
        name: name.to_owned(),
        folder: format!("runs/{name}"),
        proxy: Some("small".to_owned()),
        mapper: "checkpoint of step 9".to_owned(),
    };
    let reference = |name: &str, v| Reference { name: name.to_owned(), values: vec![around(v); 2] };
    Comparison {
        target: "owner/large".to_owned(),
        policy: Policy::Pair,
        runs: vec![run("base"), run("without <skip> & co")],
        notes: vec!["`eval.answer_match` differs".to_owned()],
        answers: Some(metric(0.9, 0.8, vec![reference("full cache", 0.97), reference("kvzip", 0.95)])),
        recovered: Some(Metric { differences: Vec::new(), ..metric(0.947, 0.842, Vec::new()) }),
        recall: Some(metric(0.7, 0.75, Vec::new())),
        tasks: ["facts", "ruler.vt"]
            .map(|t| TaskScores { task: t.to_owned(), metric: metric(0.9, 0.8, Vec::new()) })
            .to_vec(),
        budgets: Some(Budgets {
            policy: Policy::Pair,
            ratio: 0.05,
            kvzip: vec![0.01, 0.2],
            runs: vec![Some(vec![0.02, 0.18]), None],
        }),
        recipe: vec![RecipeKey {
            key: "mapper.linear_skip".to_owned(),
            values: vec![json!(true), json!(null)],
        }],
        same: vec![RecipeKey { key: "train.lr".to_owned(), values: vec![json!(0.002); 2] }],
    }
}

fn page(c: &Comparison) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("comparison.html");
    pkv_report::write_comparison(c, &METHODS, &path).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
    let page = std::fs::read_to_string(&path).unwrap();
    // Kept, to be looked at in a browser.
    std::fs::write(std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("comparison.html"), &page).unwrap();
    page
}

fn section<'a>(page: &'a str, id: &str) -> &'a str {
    let start = page.find(&format!("<section id=\"{id}\">")).unwrap_or_else(|| panic!("no section `{id}`"));
    &page[start..start + page[start..].find("</section>").unwrap()]
}

#[test]
fn a_comparison_fills_every_section_and_needs_no_other_file() {
    let page = page(&comparison());
    assert!(page.starts_with("<!doctype html>"), "{:?}", &page[..40]);
    for forbidden in ["http://", "https://", "src=", "<link", "@import", "url(", "NaN", ">inf"] {
        assert!(!page.contains(forbidden), "the page contains `{forbidden}`");
    }
    assert!(!page.contains("class=\"missing\""));
    assert!(!page.contains("<skip>") && page.contains("without &lt;skip&gt; &amp; co"));
    let answers = section(&page, "answers");
    assert_eq!(answers.matches("<figure").count(), 3, "all tasks together, and a small chart for each");
    assert_eq!(answers.matches("class=\"chart small\"").count(), 2);
    assert_eq!(answers.matches("<fieldset class=\"legend\"").count(), 2, "one for all small charts");
    for part in [
        "90.0<small>88.0–93.0",
        "Recovered accuracy",
        "(37 shared)",
        "<td class=\"best\">-10.0<small>-12.0 to -7.0",
        "<td>+0.1<small>-1.0 to +1.2",
        "60, 40 in the order of the runs",
        "Answers by task at 5% kept",
        ">ruler.vt</th>",
        "mean of 2 tasks",
    ] {
        assert!(answers.contains(part), "`{part}` is missing\n{answers}");
    }
    assert!(section(&page, "recall").contains("<svg"));
    let relation = section(&page, "relation");
    for part in [
        "base, 5% kept: recall 60.0%, answers 80.0%",
        "With 5% kept, the run of higher recall also answers more in 0 of 1 pair of runs.",
        "series s0 c-run1 dots",
    ] {
        assert!(relation.contains(part), "`{part}` is missing\n{relation}");
    }
    let layers = section(&page, "layers");
    assert!(layers.contains("base, layer 1: 18.0% kept") && layers.contains("kvzip, layer 1: 20.0% kept"));
    let recipes = section(&page, "recipes");
    assert!(recipes.contains("<code>mapper.linear_skip</code></th><td>true</td><td>-</td>"), "{recipes}");
    assert!(recipes.contains("<tr class=\"same\"><th scope=\"row\"><code>train.lr</code>"), "{recipes}");
    let verdict = &page[page.find("id=\"verdict\"").expect("a verdict")..][..400];
    assert!(
        verdict.contains(
            "By questions answered with 5% kept, without &lt;skip&gt; &amp; co is level with base (+0.1 points"
        ),
        "{verdict}"
    );
}

#[test]
fn what_is_not_there_is_said() {
    let bare = Comparison {
        answers: None,
        recovered: None,
        tasks: Vec::new(),
        budgets: None,
        recipe: Vec::new(),
        same: Vec::new(),
        recall: Some(Metric { differences: Vec::new(), ..metric(0.7, 0.75, Vec::new()) }),
        ..comparison()
    };
    let page = page(&bare);
    for (id, said) in
        [("answers", "share no task"), ("layers", "--redo eval"), ("recipes", "Nothing but their names")]
    {
        assert!(section(&page, id).contains(said), "{id}");
    }
    assert!(!section(&page, "recall").contains("minus"));
    assert!(!page.contains("id=\"relation\""), "without answers there is none");
    let nowhere = std::path::Path::new("/nonexistent/folder/x.html");
    assert!(pkv_report::write_comparison(&bare, &METHODS, nowhere).is_err());
}

#[test]
fn curves_times_and_likelihoods_come_from_the_run_folders() {
    let dir = tempfile::tempdir().unwrap();
    run::write(dir.path());
    let mut c = comparison();
    c.runs.iter_mut().for_each(|r| r.folder = dir.path().display().to_string());
    let page = page(&c);
    let training = section(&page, "training");
    assert_eq!(training.matches("<figure").count(), 2, "validation loss and recall");
    assert!(training.contains("base, validation loss"), "both runs are named in tooltips");
    let cost = section(&page, "cost");
    assert!(cost.contains("20 min 10 s") && cost.contains(">label</th>"), "{cost}");
    let likelihood = section(&page, "likelihood");
    assert_eq!(likelihood.matches("<table").count(), 2, "{likelihood}");
    for id in ["answers", "recall", "likelihood", "training", "cost", "layers", "recipes"] {
        assert!(page.contains(&format!("href=\"#{id}\"")), "no link to `{id}`");
    }
}
