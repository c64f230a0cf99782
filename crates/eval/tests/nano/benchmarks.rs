//! Tasks of standard benchmarks on the nano pair: generated contexts, conversations, more of either.

use std::cell::RefCell;

use pkv_core::{Fingerprint, NoProgress, Policy, Seed};
use pkv_eval::evaluate;
use pkv_recipe::{MethodName, TaskName};
use pkv_results::AnswerResults;
use pkv_tasks::ruler::{Generator, RulerTask, Sources};
use pkv_tasks::{Benchmark, CountTokens, Example, Metric, Turn};

use crate::fixture::Nano;

/// A conversation about two facts, in words that the small models know.
fn conversation(index: usize) -> Example {
    let turn = |first: bool, noun: &str, digits: usize| Turn {
        question: format!("{}What is the access code for the {noun}?", if first { "\n\n" } else { "" }),
        answer_prefix: String::new(),
        wanted: vec![digits.to_string()],
        given: digits.to_string(),
        others: Vec::new(),
        metric: Metric::Contains,
        max_new_tokens: 8,
        first_line: false,
        part: noun.to_owned(),
    };
    let (a, b) = (4000 + 37 * index, 7001 + 53 * index);
    let page = include_str!("text.txt");
    let piece = |n: usize| page.chars().skip(600 * (2 * index + n)).take(500).collect::<String>();
    Example {
        id: format!("c{index}"),
        context: format!(
            "{}. The access code for the silver lantern is {a}. {}. The access code for the old tower is {b}. ",
            piece(0),
            piece(1)
        ),
        turns: vec![turn(true, "silver lantern", a), turn(false, "old tower", b)],
        conversation: true,
        chat: true,
    }
}

/// Needles of RULER in a few hundred tokens.
pub fn ruler<'a>(nano: &Nano, examples: usize, count: &'a CountTokens<'a>) -> Benchmark<'a> {
    let frame = nano.tokenizer.prefix().len() + nano.tokenizer.switch().len();
    let task = RulerTask::NiahSingle1;
    let generator = Generator::new(task, 480, frame, &Sources::default(), count, Seed(3)).unwrap();
    Benchmark {
        suite: "ruler",
        task: task.name().to_owned(),
        examples,
        example: Box::new(move |i| generator.example(i as u64)),
        prompt_tokens: None,
        identity: "a".to_owned(),
    }
}

#[test]
fn benchmarks_are_answered_from_the_same_caches_and_continued() {
    let mut nano = Nano::new(2);
    nano.section.methods = vec![MethodName::KVZIP, MethodName::RANDOM];
    nano.section.policies = vec![Policy::Pair];
    nano.section.tasks = vec![TaskName::of("ruler"), TaskName::of("scbench")];
    let stages = nano.stages();
    let count = |text: &str| Ok(nano.tokenizer.encode(text)?.len());
    let made = RefCell::new(Vec::new());
    let benchmarks = |n: usize| {
        let made = &made;
        let talk = Benchmark {
            suite: "scbench",
            task: "talk".to_owned(),
            examples: n,
            example: Box::new(move |i| {
                made.borrow_mut().push(i);
                Ok(conversation(i))
            }),
            prompt_tokens: Some(260),
            identity: "b".to_owned(),
        };
        [ruler(&nano, n, &count), talk]
    };
    let out = nano.stage("eval");
    let run = |n: usize| {
        let benchmarks = benchmarks(n);
        let mut inputs = nano.inputs(&stages, &[], &out);
        inputs.benchmarks = &benchmarks;
        inputs.fingerprint = Fingerprint::new().with("n", n);
        evaluate(&inputs, &NoProgress).unwrap()
    };
    let results = run(2);
    let of = |task: &str| results.benchmarks.iter().find(|b| b.task == task).unwrap();
    let ruler: &AnswerResults = of("niah_single_1");
    assert_eq!((ruler.contexts, ruler.questions, ruler.cut), (2, 2, Some(0)));
    assert!(ruler.mean_context_tokens.is_some_and(|n| n > 200.0 && n < 352.0), "{ruler:?}");
    // Parts of a task are scored apart, and the second turn is answered after the first.
    let (first, second) = (of("talk/silver lantern"), of("talk/old tower"));
    assert_eq!((first.questions, second.questions, first.cut), (2, 2, Some(2)));
    for b in &results.benchmarks {
        for method in [MethodName::KVZIP, MethodName::RANDOM] {
            let whole = b.cell(method, Policy::Pair, 1.0).unwrap();
            assert_eq!(whole.score, b.full, "{}", b.task);
            assert!(whole.exact_match.is_some(), "one short answer is wanted");
            assert_eq!((whole.exact_match, whole.f1), (b.full_exact_match, b.full_f1), "{}", b.task);
            assert!(whole.kl.mean < 1e-6 && whole.flips.mean == 0.0, "{}: {whole:?}", b.task);
        }
        let kl = |m, r| b.cell(m, Policy::Pair, r).unwrap().kl.mean;
        assert!(kl(MethodName::KVZIP, 0.2) < kl(MethodName::RANDOM, 0.2), "{}", b.task);
    }
    let tables = pkv_results::table::all_tables(&results);
    assert!(
        tables.contains("scbench talk/old tower, pair (score in %, 2 questions in 2 contexts"),
        "{tables}"
    );

    // A third example adds to the two that are there, and the first two stay as they were.
    made.borrow_mut().clear();
    let more = run(3);
    assert_eq!(*made.borrow(), [2]);
    assert_eq!(more.benchmarks[0].contexts, 3);
    // Fewer ask nothing, and take nothing away.
    made.borrow_mut().clear();
    assert_eq!(run(2).benchmarks, more.benchmarks);
    assert!(made.borrow().is_empty());
}
