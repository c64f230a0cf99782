//! The page of a run folder: whole, self-contained, and tolerant of what is missing.

mod run;

use std::fs;
use std::path::Path;

use pkv_core::Policy;
use pkv_results::Results;
use run::methods::ALL as METHODS;

fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    run::write(dir.path());
    dir
}

/// Change the results of `root` and render.
fn with_results(root: &Path, change: impl FnOnce(&mut Results)) -> String {
    let mut results = run::results();
    change(&mut results);
    results.write(&root.join("eval/results.json")).unwrap();
    pkv_report::render(root, &METHODS).unwrap()
}

/// The text between `<section id="…">` and its end.
fn section<'a>(page: &'a str, id: &str) -> &'a str {
    let start = page.find(&format!("<section id=\"{id}\">")).unwrap_or_else(|| panic!("no section `{id}`"));
    let end = page[start..].find("</section>").unwrap();
    &page[start..start + end]
}

/// Everything that would make a browser ask for another file.
fn assert_self_contained(page: &str) {
    for forbidden in ["http://", "https://", "src=", "<link", "@import", "url(", "<iframe", "fetch("] {
        // The namespace of a standalone picture is a name, not an address that is opened.
        let text = page.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
        assert!(!text.contains(forbidden), "the page contains `{forbidden}`");
    }
    for (at, _) in page.match_indices("href=\"") {
        assert_eq!(&page[at + 6..at + 7], "#", "a link leaves the page");
    }
}

fn assert_no_broken_numbers(page: &str) {
    let drawn: String = page.split("<script").next().unwrap().to_owned();
    for broken in ["NaN", ">inf", "\"inf", "-inf", "=\"\"\""] {
        assert!(!drawn.contains(broken), "the page contains `{broken}`");
    }
}

#[test]
fn a_whole_run_fills_every_section() {
    let dir = folder();
    let written = pkv_report::write(dir.path(), &METHODS).unwrap();
    let page = fs::read_to_string(&written.html).unwrap();
    // Kept, to be looked at in a browser.
    for made in [&written.html, written.svg.as_ref().unwrap()] {
        fs::copy(made, Path::new(env!("CARGO_TARGET_TMPDIR")).join(made.file_name().unwrap())).unwrap();
    }
    assert!(page.starts_with("<!doctype html>"), "{:?}", &page[..40]);
    assert_self_contained(&page);
    assert_no_broken_numbers(&page);
    assert!(!page.contains("class=\"missing\""));
    for id in [
        "answers",
        "likelihood",
        "recall",
        "heads",
        "example",
        "cost",
        "training",
        "stages",
        "choices",
        "limits",
    ] {
        assert!(section(&page, id).len() > 400, "section `{id}` is empty");
        assert!(page.contains(&format!("href=\"#{id}\"")), "no link to `{id}`");
    }
    // Of a method the one name that recipes and the command line have, too.
    assert!(section(&page, "answers").contains("</i>linear</dt><dd>ridge regression from all features</dd>"));
    assert_eq!(section(&page, "heads").matches("<figure").count(), 4, "three maps, and the budget by layer");
    assert!(
        section(&page, "heads").contains("kvzip, layer 11: ")
            && section(&page, "heads").contains("mapper, layer 11: ")
    );
    assert_eq!(section(&page, "training").matches("<figure").count(), 4);
    for id in ["answers", "likelihood", "recall", "heads", "example", "training", "stages"] {
        assert!(section(&page, id).contains("class=\"lead reading\""), "`{id}` says nothing");
    }
    assert!(section(&page, "training").contains("The checkpoint of step 1400 did best"));
    assert_eq!(
        section(&page, "recall").matches("<figure").count(),
        Policy::WITHOUT_KEYS.len(),
        "one chart per policy"
    );
    assert!(page.contains("prefers-color-scheme:dark") && page.contains("@media print"));
    assert!(section(&page, "stages").contains("20 min 10 s"));
    assert!(section(&page, "limits").contains("proxykv-train run --recipe recipes&#x2f;tiny-llama.toml"));
    assert!(section(&page, "choices").contains("preset original"));
    assert!(section(&page, "example").contains("data-method=\"mapper\" aria-pressed=\"true\""));
    assert!(section(&page, "example").contains("data-ratio=\"0.05\" aria-pressed=\"true\""));
    assert_eq!(
        fs::read_dir(dir.path())
            .unwrap()
            .filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|x| x == "tmp"))
            .count(),
        0
    );
}

#[test]
fn the_headline_says_what_was_measured() {
    let dir = folder();
    let page = pkv_report::render(dir.path(), &METHODS).unwrap();
    assert!(page.contains(
        "With 5% of the KV pairs kept, the mapper&#x27;s choice answers 97.9% of 480 questions about facts in the text. \
         Beside it: 100% with the full cache, 98.3% with KVzip&#x27;s own choice"
    ));
    assert!(page.contains("It is better than head-prior, which any method should beat"));
    let level = with_results(dir.path(), |r| {
        for c in &mut r.facts.as_mut().unwrap().cells {
            c.score.low = 0.0;
        }
    });
    assert!(level.contains("It is not clearly better than head-prior,"));
    assert!(!level.contains("Better here"));
    let beaten = with_results(dir.path(), |r| {
        let linear = |c: &&mut pkv_results::AnswerCell| c.method == pkv_recipe::MethodName::LINEAR;
        r.facts.as_mut().unwrap().cells.iter_mut().filter(linear).for_each(|c| c.score.mean = 0.999);
    });
    assert!(beaten.contains("Better here: linear, with 99.9%."));
}

#[test]
fn the_best_rival_is_bold_and_kvzip_is_a_reference() {
    let dir = folder();
    let page = pkv_report::render(dir.path(), &METHODS).unwrap();
    let answers = section(&page, "answers");
    let row = |name: &str| {
        let at = answers.find(&format!("</i>{name}</th>")).unwrap();
        &answers[at..at + answers[at..].find("</tr>").unwrap()]
    };
    assert!(row("mapper").contains("<td class=\"best\">97.9"));
    assert!(!row("kvzip").contains("best"));
    assert!(!row("random").contains("best"));
    // 93.8 / 87.1: better than what it learned from.
    assert!(answers.contains("107.7<small>"));
}

#[test]
fn bytes_stand_below_the_shares_kept() {
    let dir = folder();
    let page = pkv_report::render(dir.path(), &METHODS).unwrap();
    // 1,400 tokens x 12 layers x 3 KV heads x 2 x 64 numbers of 4 bytes.
    for id in ["answers", "recall"] {
        let section = section(&page, id);
        assert!(section.contains(">5% kept<small>1.29 MB</small></th>"), "{id}");
        assert!(section.contains("of 25.8 MB for a context of 1400 tokens"), "{id}");
    }
    fs::write(dir.path().join("run.json"), "{}").unwrap();
    let page = pkv_report::render(dir.path(), &METHODS).unwrap();
    assert!(section(&page, "answers").contains(">5% kept</th>"), "without the shape there are none");
}

#[test]
fn every_task_has_a_small_chart_and_all_share_a_legend() {
    let dir = folder();
    let page = with_results(dir.path(), |r| {
        let facts = r.facts.clone().unwrap();
        let task = |task: &str, less: f64| {
            let mut b = facts.clone();
            (b.suite, b.task, b.mean_context_tokens) = ("ruler".to_owned(), task.to_owned(), Some(4096.0));
            b.cells.iter_mut().for_each(|c| c.score.mean *= less);
            b
        };
        r.benchmarks = vec![task("vt", 0.9), task("cwe", 0.6), task("niah_multivalue", 0.8)];
        // What one task lacks leaves the others' lines where they are.
        r.benchmarks[1].cells.retain(|c| c.method != pkv_recipe::MethodName::KVZIP);
    });
    fs::write(Path::new(env!("CARGO_TARGET_TMPDIR")).join("tasks.html"), &page).unwrap();
    let benchmarks = section(&page, "benchmarks");
    let charts: Vec<&str> = benchmarks.split("<svg class=\"chart small\"").skip(1).collect();
    assert_eq!(charts.len(), 4, "facts and three tasks");
    assert_eq!(benchmarks.matches("<fieldset class=\"legend\"").count(), 1);
    let mapper = |chart: &str| {
        let at = chart.find(" p0\"").expect("the mapper's line");
        chart[..at].rsplit("series ").next().unwrap().to_owned()
    };
    for chart in &charts {
        assert_eq!(mapper(chart), mapper(charts[0]), "the legend's box is of this line in every chart");
        assert!(!chart.contains("class=\"name\""), "axes of small charts have no names");
    }
    assert!(charts[0].contains("mapper, 5% kept: score 97.9%"));
    assert!(!charts[2].split("</svg>").next().unwrap().contains(">kvzip, 5% kept"));
    assert_no_broken_numbers(&page);
}

#[test]
fn a_mapper_of_the_target_alone_has_no_proxy_on_its_page() {
    let dir = folder();
    let path = dir.path().join("run.json");
    let mut run: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    run["recipe"]["extract"]["from"] = serde_json::json!(["target"]);
    fs::write(&path, run.to_string()).unwrap();
    let page = pkv_report::render(dir.path(), &METHODS).unwrap();
    for part in ["by its own attention", "no second model is needed", "One model (tiny-llama-target)"] {
        assert!(page.contains(part), "`{part}` is missing");
    }
    assert!(!page.contains("proxy <b>") && !page.contains("local:7d793037"));
}

#[test]
fn missing_parts_are_named_and_the_rest_is_there() {
    let dir = folder();
    fs::remove_dir_all(dir.path().join("eval")).unwrap();
    let page = pkv_report::render(dir.path(), &METHODS).unwrap();
    for id in ["answers", "recall", "heads", "example"] {
        assert!(section(&page, id).contains("class=\"missing\""), "{id}");
        assert!(section(&page, id).contains("proxykv-train eval"), "{id}");
    }
    assert!(section(&page, "training").contains("<svg"));
    assert!(pkv_report::answers_svg(dir.path(), &METHODS).unwrap().is_none());
    assert!(pkv_report::write(dir.path(), &METHODS).unwrap().svg.is_none());

    fs::remove_dir_all(dir.path().join("train")).unwrap();
    fs::remove_file(dir.path().join("run.json")).unwrap();
    let page = pkv_report::render(dir.path(), &METHODS).unwrap();
    assert!(section(&page, "training").contains("proxykv-train train"));
    assert!(section(&page, "choices").contains("holds no recipe"));
    assert_self_contained(&page);

    let nothing = tempfile::tempdir().unwrap();
    let page = pkv_report::render(nothing.path(), &METHODS).unwrap();
    assert!(section(&page, "stages").contains("No stage has run yet"));
    assert!(pkv_report::render(&nothing.path().join("nowhere"), &METHODS).is_err());
}

#[test]
fn an_evaluation_without_tasks_or_mapper_is_shown_as_far_as_it_goes() {
    let dir = folder();
    let page = with_results(dir.path(), |r| {
        r.facts = None;
        r.perplexity = None;
        r.worked_example = None;
        r.labels.heads = None;
        r.labels.cells.retain(|c| c.method == pkv_recipe::MethodName::RANDOM && c.ratio == 0.05);
    });
    assert!(section(&page, "answers").contains("No answers have been measured yet"));
    assert_eq!(section(&page, "recall").matches("<figure").count(), Policy::WITHOUT_KEYS.len());
    assert_no_broken_numbers(&page);
    let page = with_results(dir.path(), |r| {
        r.labels = pkv_results::LabelResults::default();
        r.facts.as_mut().unwrap().cells.clear();
    });
    assert!(section(&page, "recall").contains("class=\"missing\""));
    assert!(section(&page, "answers").contains("class=\"missing\""));
}

#[test]
fn an_unreadable_part_is_told_on_the_page() {
    let dir = folder();
    fs::write(dir.path().join("eval/results.json"), "{\"schema_version\": 99}").unwrap();
    let page = pkv_report::render(dir.path(), &METHODS).unwrap();
    assert!(page.contains("class=\"problem\"") && page.contains("has schema version 99"));
}

#[test]
fn text_of_documents_and_names_stays_text() {
    let dir = folder();
    let evil = "</script><script>alert(1)</script>\"'&";
    let page = with_results(dir.path(), |r| {
        let example = r.worked_example.as_mut().unwrap();
        example.tokens[4] = evil.to_owned();
        example.id = evil.to_owned();
        example.facts[0].question = evil.to_owned();
        r.mapper = evil.to_owned();
        r.notes[0].note = evil.to_owned();
    });
    assert!(!page.contains("alert(1)</script>"));
    assert_eq!(page.matches("&lt;&#x2f;script&gt;&lt;script&gt;alert(1)").count(), 5);
    assert_eq!(
        page.matches("<script").count(),
        3,
        "the example's data, its selector, and tables and figures"
    );
}

#[test]
fn the_picture_stands_alone() {
    let dir = folder();
    let svg = pkv_report::answers_svg(dir.path(), &METHODS).unwrap().unwrap();
    assert!(svg.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\""));
    assert!(svg.contains("<style>") && svg.ends_with("</svg>"));
    assert_self_contained(&svg);
    for name in ["mapper", "kvzip", "head-prior", "random", "full cache 100%"] {
        assert!(svg.contains(&format!(">{name}</text>")), "{name}");
    }
}

#[test]
fn the_same_folder_gives_the_same_page() {
    let dir = folder();
    assert_eq!(
        pkv_report::render(dir.path(), &METHODS).unwrap(),
        pkv_report::render(dir.path(), &METHODS).unwrap()
    );
}
