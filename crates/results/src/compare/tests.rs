//! Comparisons of synthetic runs with known differences.

use std::path::Path;

use pkv_core::{Policy, RetentionRatio};
use pkv_recipe::MethodName;
use serde_json::json;

use super::*;
use crate::answered::{Answer, Asked};
use crate::answers::AnswerTable;
use crate::cell::Cell;
use crate::results::{
    AnswerCell, AnswerResults, HeadRecall, LabelCell, LabelResults, MethodHeads, ModelName, RESULTS_VERSION,
};

const RATIOS: [f64; 2] = [0.1, 0.05];
const QUESTIONS: usize = 4;

/// Number of a context's questions that the mapper answers at [`RATIOS`].
type Right = [usize; 2];

fn results(target: &str) -> Results {
    let exact = Interval::exact(0.5);
    let label = |ratio| LabelCell {
        contexts: None,
        method: MethodName::MAPPER,
        policy: Policy::Pair,
        ratio,
        recall: exact,
        recall_of_pair: None,
        mass: exact,
        realised: ratio,
    };
    let fact = |ratio| AnswerCell {
        contexts: None,
        method: MethodName::MAPPER,
        policy: Policy::Pair,
        ratio,
        score: exact,
        exact_match: None,
        f1: None,
        kl: exact,
        flips: exact,
        of_kvzip: None,
        of_full: None,
    };
    Results {
        schema_version: RESULTS_VERSION,
        fingerprint: "f".to_owned(),
        seed: 3,
        bootstrap: Some(400),
        mapper: "checkpoint of step 9".to_owned(),
        target: ModelName { name: target.to_owned(), layers: 2, kv_heads: 2 },
        proxy: Some(ModelName { name: "p".to_owned(), layers: 1, kv_heads: 1 }),
        notes: Vec::new(),
        labels: LabelResults {
            made: Default::default(),
            contexts: 7,
            cells: RATIOS.map(label).to_vec(),
            heads: Some(HeadRecall {
                policy: Policy::Pair,
                ratio: 0.05,
                kvzip_kept: vec![vec![0.1, 0.3], vec![0.0, 0.0]],
                methods: vec![MethodHeads {
                    method: MethodName::MAPPER,
                    recall: Vec::new(),
                    kept: vec![vec![0.2, 0.0], vec![0.1, 0.1]],
                }],
            }),
            ..LabelResults::default()
        },
        facts: Some(AnswerResults {
            made: Default::default(),
            suite: String::new(),
            task: String::new(),
            contexts: 7,
            questions: 28,
            answer_match: Some(Default::default()),
            mean_context_tokens: None,
            cut: None,
            full: exact,
            full_exact_match: None,
            full_f1: None,
            cells: RATIOS.map(fact).to_vec(),
        }),
        perplexity: None,
        benchmarks: Vec::new(),
        worked_example: None,
        timings: Vec::new(),
    }
}

fn recipe(lr: f64) -> Value {
    json!({"name": "x", "seed": 3, "train": {"lr": lr, "batch": 4}, "label": {"preset": "original"}, "eval": {"bootstrap": 400}})
}

/// A run whose mapper answered `right` of the questions of each named context; KVzip answers half of them.
fn run(dir: &Path, name: &str, tasks: &[(&str, Vec<(&str, Right)>)]) -> Run {
    let mut table = AnswerTable::default();
    let answer = |right| Answer {
        text: String::new(),
        score: f64::from(right),
        kl: 0.0,
        flipped: 0,
        tokens: 1,
        squad: None,
        kept: None,
    };
    for (task, contexts) in tasks {
        for (c, (id, right)) in contexts.iter().enumerate() {
            table.of_context(id, 100);
            for q in 0..QUESTIONS {
                let asked = Asked {
                    question: format!("question {q} of {id}"),
                    wanted: vec!["yes".to_owned()],
                    part: String::new(),
                    fact: None,
                };
                table.push(task, (c, q), &asked, None, &answer(true));
                for (r, ratio) in RATIOS.iter().enumerate() {
                    for (method, right) in
                        [(MethodName::MAPPER, right[r]), (MethodName::KVZIP, QUESTIONS / 2)]
                    {
                        let ratio = RetentionRatio::new(*ratio).unwrap();
                        let cell = Cell { method, policy: Policy::Pair, ratio };
                        table.push(task, (c, q), &asked, Some(&cell), &answer(q < right));
                    }
                }
            }
        }
    }
    let path = dir.join(format!("{name}.parquet"));
    table.write(&path).unwrap();
    Run {
        name: name.to_owned(),
        folder: dir.join(name),
        results: results("target"),
        answers: Some(Answers::read(&path).unwrap()),
        recall: None,
        recipe: recipe(1e-3),
        revision: None,
    }
}

fn ids(n: usize) -> Vec<String> {
    (0..n).map(|i| format!("c{i}")).collect()
}

/// Contexts of uneven difficulty, with `more` questions answered above the easy part.
fn contexts(ids: &[String], more: usize) -> Vec<(&str, Right)> {
    ids.iter().enumerate().map(|(i, id)| (id.as_str(), [i % 3 + more, i % 2 + more])).collect()
}

fn said(result: Result<Comparison>) -> (String, String) {
    let error = result.unwrap_err();
    let hint = error.downcast_ref::<pkv_core::Hinted>().expect("a hint").hint().to_owned();
    (error.to_string(), hint)
}

#[test]
fn a_run_differs_from_itself_by_nothing() {
    let (dir, ids) = (tempfile::tempdir().unwrap(), ids(12));
    let one = || run(dir.path(), "a", &[("facts", contexts(&ids, 0))]);
    let c = compare(&[one(), Run { name: "b".to_owned(), ..one() }]).unwrap();
    let answers = c.answers.unwrap();
    assert_eq!((answers.contexts, &answers.ratios), (vec![12, 12], &RATIOS.to_vec()));
    assert_eq!(
        answers.differences,
        [Difference { run: 1, contexts: 12, values: vec![Interval::exact(0.0); 2] }]
    );
    assert_eq!(answers.runs[0], answers.runs[1]);
    assert!(c.recipe.is_empty());
}

#[test]
fn pairing_removes_what_contexts_have_in_common() {
    let (dir, ids) = (tempfile::tempdir().unwrap(), ids(30));
    let a = run(dir.path(), "a", &[("facts", contexts(&ids, 0))]);
    let b = run(dir.path(), "b", &[("facts", contexts(&ids, 1))]);
    let c = compare(&[a, b]).unwrap();
    let answers = c.answers.unwrap();
    // One question of four more in every context: no spread, though each run's own numbers have one.
    let more = answers.differences[0].values[0];
    assert!((more.mean - 0.25).abs() < 1e-12 && more.high - more.low < 1e-12, "{more:?}");
    let own = answers.runs[0][0];
    assert!((own.mean - 0.25).abs() < 1e-12 && own.high - own.low > 0.05, "{own:?}");
    // KVzip answers half: a quarter is 50, a half 100.
    let recovered = c.recovered.unwrap();
    assert!((recovered.runs[0][0].mean - 0.5).abs() < 1e-12, "{recovered:?}");
    assert!((recovered.runs[1][0].mean - 1.0).abs() < 1e-12);
    assert_eq!(
        answers.references.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(),
        ["full cache", "kvzip"]
    );
    assert_eq!(answers.references[0].values[0], Interval::exact(1.0));
}

#[test]
fn an_interval_covers_a_true_difference_as_often_as_it_says() {
    // Differences of -1, 0 and 2 questions with mean 1/3: standard error known.
    let (dir, ids) = (tempfile::tempdir().unwrap(), ids(90));
    let a: Vec<(&str, Right)> = ids.iter().map(|id| (id.as_str(), [1, 1])).collect();
    let b: Vec<(&str, Right)> =
        ids.iter().enumerate().map(|(i, id)| (id.as_str(), [[0, 1, 3][i % 3], 1])).collect();
    let c = compare(&[run(dir.path(), "a", &[("facts", a)]), run(dir.path(), "b", &[("facts", b)])]).unwrap();
    let d = c.answers.unwrap().differences[0].values[0];
    let deviation = (((1.0f64 + 4.0) / 3.0 - 1.0 / 9.0) / 90.0).sqrt() / 4.0;
    assert!((d.mean - 1.0 / 12.0).abs() < 1e-12, "{d:?}");
    assert!(((d.high - d.low) / (2.0 * 1.96 * deviation) - 1.0).abs() < 0.15, "{d:?} {deviation}");
}

#[test]
fn only_shared_contexts_are_paired() {
    let (dir, all) = (tempfile::tempdir().unwrap(), ids(10));
    let a = run(dir.path(), "a", &[("facts", contexts(&all[..6], 0))]);
    // Shares c4 and c5, in another order.
    let mut other = contexts(&all[4..], 2);
    other.reverse();
    let b = run(dir.path(), "b", &[("facts", other)]);
    let c = compare(&[a, b]).unwrap();
    let answers = c.answers.as_ref().unwrap();
    assert_eq!((answers.contexts.clone(), answers.differences[0].contexts), (vec![6, 6], 2));
    // c4 had 1 and has 2, c5 had 2 and has 3: places in their lists decide, as `contexts` counts them.
    let d = answers.differences[0].values[0].mean;
    assert!((d - ((2.0 - 1.0) + (3.0 - 2.0)) / 8.0).abs() < 1e-12, "{d}");
    assert!(text(&c).contains("2 of 6"), "{}", text(&c));
}

#[test]
fn nothing_shared_is_refused() {
    let (dir, all) = (tempfile::tempdir().unwrap(), ids(8));
    let a = run(dir.path(), "a", &[("facts", contexts(&all[..4], 0))]);
    let b = run(dir.path(), "b", &[("facts", contexts(&all[4..], 0))]);
    let (text, hint) = said(compare(&[a, b]));
    assert!(text.contains("share no context") && hint.contains("same documents"), "{text} {hint}");
    // The same texts, but other questions: no pair either.
    let a = run(dir.path(), "a", &[("facts", contexts(&all[..4], 0))]);
    let mut b = run(dir.path(), "b", &[("facts", contexts(&all[..4], 0))]);
    for context in &mut b.answers.as_mut().unwrap().tasks[0].1 {
        context.id = Some("asked otherwise".to_owned());
    }
    assert!(said(compare(&[a, b])).0.contains("share no context"));
}

#[test]
fn other_targets_policies_and_ratios_are_refused() {
    let (dir, all) = (tempfile::tempdir().unwrap(), ids(4));
    let one = |name: &str| run(dir.path(), name, &[("facts", contexts(&all, 0))]);
    assert!(said(compare(&[one("a")])).0.contains("single run"));
    let mut b = one("b");
    b.results.target.name = "another".to_owned();
    let (text, hint) = said(compare(&[one("a"), b]));
    assert!(text.contains("its target is `another` (2 layers x 2 KV heads), expected `target`"), "{text}");
    assert!(hint.contains("one target"));
    // One folder under two names is one target; two commits under one name are not.
    let with = |name: &str, target: &str, revision: &str| {
        let mut run = one(name);
        run.results.target.name = target.to_owned();
        Run { revision: Some(revision.to_owned()), ..run }
    };
    compare(&[with("a", "x/target", "local:1"), with("b", "y/target", "local:1")]).unwrap();
    let (text, _) = said(compare(&[with("a", "t", "c1"), with("b", "t", "c2")]));
    assert!(text.contains("at revision `c2`"), "{text}");

    // Where all have it, the policy that `infer` uses by default.
    let both = |name: &str| {
        let mut run = one(name);
        let cells = &mut run.results.facts.as_mut().unwrap().cells;
        cells.extend(cells.clone().into_iter().map(|c| AnswerCell { policy: Policy::PairKeydiff, ..c }));
        run
    };
    assert_eq!(common_policy(&[both("a"), both("b")]).unwrap(), Policy::PairKeydiff);
    assert_eq!(common_policy(&[both("a"), one("b")]).unwrap(), Policy::Pair);

    let mut b = one("b");
    b.results.facts.as_mut().unwrap().cells.iter_mut().for_each(|c| c.policy = Policy::Token);
    b.results.labels.cells.iter_mut().for_each(|c| c.policy = Policy::Token);
    assert!(said(compare(&[one("a"), b])).0.contains("different policies"));
    let mut b = one("b");
    b.results.labels.cells.iter_mut().for_each(|c| {
        c.method = MethodName::LINEAR;
    });
    let (text, hint) = said(compare(&[one("a"), b]));
    assert!(text.contains("without its mapper") && hint.contains("eval.methods"), "{text}");
}

#[test]
fn tasks_count_alike_and_those_that_one_run_lacks_are_left_out() {
    let (dir, few, many) = (tempfile::tempdir().unwrap(), ids(3), ids(9));
    fn each(ids: &[String], right: usize) -> Vec<(&str, Right)> {
        ids.iter().map(|id| (id.as_str(), [right; 2])).collect()
    }
    let (vt, cwe) = (|| ("ruler.vt", each(&many, 2)), ("ruler.cwe", each(&many, 2)));
    let a = run(dir.path(), "a", &[("facts", each(&few, 4)), vt(), cwe]);
    let b = run(dir.path(), "b", &[("facts", each(&few, 0)), vt()]);
    let c = compare(&[a, b]).unwrap();
    assert_eq!(c.tasks.iter().map(|t| t.task.as_str()).collect::<Vec<_>>(), ["facts", "ruler.vt"]);
    let answers = c.answers.as_ref().unwrap();
    assert_eq!(answers.runs[0][0].mean, 0.75, "the mean of 1 and 1/2, not of 12 contexts");
    assert_eq!(answers.differences[0].values[0], Interval::exact(-0.5));
    assert!(c.notes.iter().any(|n| n.contains("`ruler.cwe`")), "{:?}", c.notes);
    let text = text(&c);
    assert!(text.contains("mean of 2 tasks") && text.contains("Answers by task at 5% kept"), "{text}");
    assert!(text.contains("By questions answered with 5% kept, b is below a (-50.0 points"), "{text}");
    // The better one is first, references have no rank.
    let cells = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(&format!("| {name} "))).unwrap();
        line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(cells("run")[3], "rank at 5%");
    assert_eq!(
        [cells("a")[3].as_str(), cells("b")[3].as_str(), cells("full cache")[3].as_str()],
        ["1", "2", "-"]
    );
}

#[test]
fn tables_keep_the_shares_near_the_one_that_is_spoken_of() {
    let (dir, ids) = (tempfile::tempdir().unwrap(), ids(12));
    let one = |name: &str| run(dir.path(), name, &[("facts", contexts(&ids, 0))]);
    let mut c = compare(&[one("a"), one("b")]).unwrap();
    let wide = |m: &mut Metric| {
        m.ratios = vec![0.5, 0.4, 0.3, 0.2, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01];
        let same = |values: &mut Vec<Interval>| *values = vec![values[0]; 10];
        m.runs.iter_mut().for_each(same);
        m.references.iter_mut().for_each(|r| same(&mut r.values));
        m.differences.iter_mut().for_each(|d| same(&mut d.values));
    };
    wide(c.answers.as_mut().unwrap());
    let text = text(&c);
    let rows: Vec<&str> = text.lines().filter(|line| line.starts_with('|')).collect();
    assert!(rows.iter().all(|row| row.chars().count() <= 120), "{text}");
    assert!(rows.iter().any(|row| row.contains(" 5% ") && !row.contains(" 50% ")), "{text}");
    assert!(text.contains("no room are in `--json`"), "{text}");
}

#[test]
fn a_task_of_which_nothing_is_shared_says_nothing_about_the_difference() {
    let (dir, all) = (tempfile::tempdir().unwrap(), ids(8));
    let run = |name, more, vt: &[String]| {
        run(dir.path(), name, &[("facts", contexts(&all, more)), ("ruler.vt", contexts(vt, 0))])
    };
    let c = compare(&[run("a", 0, &all[..4]), run("b", 1, &all[4..])]).unwrap();
    let d = &c.answers.as_ref().unwrap().differences[0];
    assert_eq!((d.contexts, d.values[0].mean), (8, 0.25));
    assert!(
        c.notes.iter().any(|n| n.contains("`b` shares no context of `ruler.vt` with `a`: its difference is")),
        "{:?}",
        c.notes
    );
}

#[test]
fn runs_that_share_labels_alone_are_not_compared_by_their_answers() {
    let (dir, all) = (tempfile::tempdir().unwrap(), ids(8));
    let of = |id: &String| ContextScores {
        id: Some(id.clone()),
        weight: 1.0,
        full: 1.0,
        cells: RATIOS.map(|ratio| (MethodName::MAPPER, Policy::Pair, ratio, 0.5)).to_vec(),
    };
    let recall = Some(all.iter().map(of).collect::<Vec<_>>());
    let run = |name, ids: &[String]| Run {
        recall: recall.clone(),
        ..run(dir.path(), name, &[("facts", contexts(ids, 0))])
    };
    let c = compare(&[run("a", &all[..4]), run("b", &all[4..])]).unwrap();
    let said = "`b` shares no context of `facts` with `a`: their answers are to different questions.";
    assert!(c.notes.iter().any(|n| n == said), "{:?}", c.notes);
}

#[test]
fn evaluations_of_earlier_versions_are_shown_without_differences() {
    let (dir, all) = (tempfile::tempdir().unwrap(), ids(4));
    let mut b = run(dir.path(), "b", &[("facts", contexts(&all, 0))]);
    b.answers.as_mut().unwrap().tasks[0].1.iter_mut().for_each(|c| c.id = None);
    b.results.labels.heads.as_mut().unwrap().methods[0].kept.clear();
    let c = compare(&[run(dir.path(), "a", &[("facts", contexts(&all, 0))]), b]).unwrap();
    assert!(c.answers.as_ref().unwrap().differences.is_empty());
    assert_eq!(c.recall.as_ref().unwrap().runs[1][0].mean, 0.5, "from the results");
    assert!(c.notes.iter().filter(|n| n.contains("--redo eval")).count() == 2, "{:?}", c.notes);
    assert!(c.budgets.as_ref().unwrap().runs[1].is_none());
    text(&c);
}

#[test]
fn recipes_are_told_apart_by_their_keys_and_choices_that_matter_are_noted() {
    let (dir, all) = (tempfile::tempdir().unwrap(), ids(6));
    let one = |name, recipe| Run { recipe, ..run(dir.path(), name, &[("facts", contexts(&all, 0))]) };
    let mut other = recipe(2e-3);
    other["name"] = json!("y");
    other["label"]["preset"] = json!("kvpress");
    other["mapper"] = json!({"dilations": [1, 2]});
    // Of the last evaluation alone.
    other["eval"]["tasks"] = json!(["longbench"]);
    let c = compare(&[one("a", recipe(1e-3)), one("b", other)]).unwrap();
    let found: Vec<_> = c.recipe.iter().map(|k| (k.key.as_str(), k.values.clone())).collect();
    assert_eq!(
        found,
        [
            ("label.preset", vec![json!("original"), json!("kvpress")]),
            ("mapper.dilations", vec![json!(null), json!([1, 2])]),
            ("train.lr", vec![json!(1e-3), json!(2e-3)]),
        ]
    );
    assert!(c.notes.iter().any(|n| n.contains("its own KVzip scores")), "{:?}", c.notes);
    let budgets = c.budgets.as_ref().unwrap();
    assert_eq!((&budgets.kvzip, &budgets.runs[1]), (&vec![0.2, 0.0], &Some(vec![0.1, 0.1])));
    let text = text(&c);
    assert!(text.contains("| `train.lr`         |    0.001 |   0.002 |"), "{text}");
    assert!(text.contains("| 0     |  20.0 | 10.0 | 10.0 |"), "{text}");
}

#[test]
fn where_kvzip_answers_little_nothing_is_recovered() {
    let (dir, all) = (tempfile::tempdir().unwrap(), ids(4));
    let mut b = run(dir.path(), "b", &[("facts", contexts(&all, 0))]);
    for context in &mut b.answers.as_mut().unwrap().tasks[0].1 {
        context.cells.iter_mut().filter(|c| (c.0, c.2) == (MethodName::KVZIP, 0.05)).for_each(|c| c.3 = 0.0);
    }
    let c = compare(&[run(dir.path(), "a", &[("facts", contexts(&all, 0))]), b]).unwrap();
    assert_eq!(c.recovered.unwrap().ratios, [0.1]);
    assert!(c.notes.iter().any(|n| n.contains("at 5% kept")), "{:?}", c.notes);
}

#[test]
fn the_mapper_leads_or_trails_in_pairs() {
    let (dir, all) = (tempfile::tempdir().unwrap(), ids(8));
    let a = run(dir.path(), "a", &[("facts", contexts(&all, 2))]);
    let lead = mapper_lead(a.answers.as_ref().unwrap(), "facts", Policy::Pair, Seed(1), 200);
    assert_eq!(
        lead.iter().map(|l| (l.0, l.1)).collect::<Vec<_>>(),
        [(MethodName::KVZIP, 0.1), (MethodName::KVZIP, 0.05)]
    );
    // Mapper: i % 3 + 2 of four, KVzip two of four.
    let expected = [0, 1, 2, 0, 1, 2, 0, 1].iter().sum::<usize>() as f64 / 32.0;
    assert!(
        (lead[0].2.mean - expected).abs() < 1e-12 && lead[0].2.low < expected && lead[0].2.high > expected
    );
    assert!(mapper_lead(a.answers.as_ref().unwrap(), "ruler.vt", Policy::Pair, Seed(1), 200).is_empty());
}
