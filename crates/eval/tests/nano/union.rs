//! Evaluations of other tasks, methods, ratios and limits add to what is there.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pkv_core::{Fingerprint, NoProgress, Policy};
use pkv_data::FactContext;
use pkv_eval::{Asked, EvalInputs, evaluate};
use pkv_recipe::{EvalSection, MethodName, TaskName};
use pkv_results::{AGREEMENT_FILE, ANSWERS_FILE, AnswerCell, Columns, LabelCell, RESULTS_FILE, Results};
use pkv_tasks::Benchmark;

use crate::benchmarks::ruler;
use crate::fixture::Nano;

/// What an evaluation with these inputs asks for; the nano pair has four test examples.
pub fn asked<'a>(inputs: &'a EvalInputs<'a>) -> Asked<'a> {
    Asked {
        section: inputs.section,
        base: &inputs.base,
        test_examples: 4,
        fact_contexts: inputs.fact_contexts,
        benchmarks: inputs.benchmarks,
    }
}

/// Every row of a table by what it is of.
fn rows(path: &Path) -> BTreeMap<String, String> {
    let t = Columns::read(path).unwrap();
    let (ids, methods, policies) =
        (t.text("context_id").unwrap(), t.text("method").unwrap(), t.text("policy").unwrap());
    let ratios = t.numbers("ratio").unwrap();
    let answers = t.has("answer").then(|| {
        let of = |name| t.counts(name).unwrap();
        let (context, question, flipped) = (of("context"), of("question"), of("flipped"));
        let (task, text) = (t.text("task").unwrap(), t.text("answer").unwrap());
        let (score, kl) = (t.numbers("score").unwrap(), t.numbers("kl").unwrap());
        let place = move |i: usize| format!("{} {} {}", task[i], context[i], question[i]);
        let value = move |i: usize| format!("{} {:?} {:?} {}", text[i], score[i], kl[i], flipped[i]);
        (place, value)
    });
    let recall = (answers.is_none()).then(|| (t.numbers("recall").unwrap(), t.numbers("mass").unwrap()));
    let mut out = BTreeMap::new();
    for i in 0..ids.len() {
        let (place, value) = match (&answers, &recall) {
            (Some((place, value)), _) => (place(i), value(i)),
            (None, Some((recall, mass))) => (String::new(), format!("{:?} {:?}", recall[i], mass[i])),
            (None, None) => unreachable!("one of the two was read"),
        };
        let key = format!("{} {place} {} {} {:?}", ids[i], methods[i], policies[i], ratios[i]);
        assert!(out.insert(key.clone(), value).is_none(), "two rows of {key}");
    }
    out
}

/// What an evaluation left.
struct Left {
    results: Results,
    answers: BTreeMap<String, String>,
    agreement: BTreeMap<String, String>,
}

impl Left {
    /// Every row of `before` is here, bit for bit.
    fn holds_rows(&self, before: &Self) {
        for (now, then) in [(&self.answers, &before.answers), (&self.agreement, &before.agreement)] {
            for (key, row) in then {
                assert_eq!(now.get(key), Some(row), "{key}");
            }
        }
    }

    /// Every row and every cell of `before` is here, bit for bit.
    fn holds(&self, before: &Self) {
        self.holds_rows(before);
        let (now, then) = (&self.results, &before.results);
        if let Some(facts) = &then.facts {
            let found = now.facts.as_ref().expect("facts stay");
            assert_eq!((found.contexts, found.full), (facts.contexts, facts.full));
            for cell in &facts.cells {
                let of_kvzip = found.cell(cell.method, cell.policy, cell.ratio).unwrap().of_kvzip;
                assert_eq!(
                    found.cell(cell.method, cell.policy, cell.ratio),
                    Some(&AnswerCell { of_kvzip, ..cell.clone() })
                );
            }
        }
        if let Some(perplexity) = &then.perplexity {
            for cell in &perplexity.cells {
                let found = now.perplexity.as_ref().expect("perplexity stays");
                assert_eq!(found.cell(cell.method, cell.policy, cell.ratio), Some(cell));
            }
        }
        for cell in &then.labels.cells {
            let found: Option<&LabelCell> = now.labels.cell(cell.method, cell.policy, cell.ratio);
            assert_eq!(found, Some(cell));
        }
        assert!(then.benchmarks.iter().all(|b| now.benchmarks.contains(b)));
    }
}

struct World<'a> {
    nano: &'a Nano,
    stages: &'a [PathBuf; 3],
    out: PathBuf,
    warnings: RefCell<Vec<String>>,
}

impl World<'_> {
    fn run(&self, section: &EvalSection, base: &str, benchmarks: &[Benchmark]) -> Left {
        let contexts = match section.tasks.contains(&TaskName::FACTS) {
            true => &self.nano.contexts[..section.contexts],
            false => &[],
        };
        let warn = |text: &str| self.warnings.borrow_mut().push(text.to_owned());
        let inputs = EvalInputs {
            section,
            benchmarks,
            base: Fingerprint::new().with("mapper", base),
            fingerprint: Fingerprint::new().with("mapper", base).with("eval", section),
            warn: &warn,
            ..self.nano.inputs(self.stages, contexts, &self.out)
        };
        let results = evaluate(&inputs, &NoProgress).unwrap();
        assert!(asked(&inputs).is_complete(&self.out, &inputs.fingerprint).unwrap());
        assert!(Results::read(&self.out.join(RESULTS_FILE)).unwrap() == results);
        Left {
            results,
            answers: rows(&self.out.join(ANSWERS_FILE)),
            agreement: rows(&self.out.join(AGREEMENT_FILE)),
        }
    }
}

#[test]
fn results_add_up_over_tasks_methods_ratios_and_limits() {
    let nano = Nano::new(3);
    let stages = nano.stages();
    let world = World { nano: &nano, stages: &stages, out: nano.stage("eval"), warnings: RefCell::default() };
    let (mapper, kvzip, random) = (MethodName::MAPPER, MethodName::KVZIP, MethodName::RANDOM);
    let full = EvalSection {
        methods: vec![mapper, kvzip],
        policies: vec![Policy::Pair],
        answer_ratios: vec![0.2],
        ratios: vec![0.2],
        ..nano.section.clone()
    };
    let first = world.run(&full, "a", &[]);
    assert_eq!(first.results.facts.as_ref().unwrap().contexts, 3);

    // A new method, asked of one context only, with the old ones fewer.
    let fewer = EvalSection {
        methods: vec![random, mapper],
        contexts: 1,
        tasks: vec![TaskName::FACTS],
        ..full.clone()
    };
    let second = world.run(&fewer, "a", &[]);
    second.holds(&first);
    let facts = second.results.facts.as_ref().unwrap();
    let cell = facts.cell(random, Policy::Pair, 0.2).unwrap();
    assert_eq!((facts.contexts, cell.contexts), (3, Some(1)));
    assert!(cell.of_kvzip.is_none_or(|v| v.low == v.high), "one context has no spread: {cell:?}");
    assert!(second.results.labels.cell(random, Policy::Pair, 0.2).unwrap().contexts.is_none());
    assert!(pkv_results::table::all_tables(&second.results).contains("random on 1 (at 20% kept)"));

    // Another task alone.
    let count = |text: &str| Ok(nano.tokenizer.encode(text)?.len());
    let other = EvalSection { tasks: vec![TaskName::of("ruler")], ..full.clone() };
    let third = world.run(&other, "a", &[ruler(&nano, 1, &count)]);
    third.holds(&second);
    assert_eq!(third.results.benchmarks.len(), 1);
    assert!(third.results.worked_example.as_ref().unwrap().id == "facts-0");

    // A new ratio and a new policy.
    let wider = EvalSection {
        answer_ratios: vec![0.05],
        ratios: vec![0.05],
        answer_policies: vec![Policy::Pair, Policy::PairUniform],
        tasks: vec![TaskName::FACTS, TaskName::PERPLEXITY],
        methods: vec![kvzip],
        ..full.clone()
    };
    let fourth = world.run(&wider, "a", &[]);
    fourth.holds(&third);
    let facts = fourth.results.facts.as_ref().unwrap();
    assert!(facts.cell(kvzip, Policy::PairUniform, 0.05).is_some());
    assert!(
        facts.cell(mapper, Policy::Pair, 0.05).is_none() && facts.cell(mapper, Policy::Pair, 0.2).is_some()
    );
    assert_eq!(
        fourth.results.labels.heads.as_ref().unwrap().methods.len(),
        3,
        "at 0.2, where most methods are"
    );

    // What was measured in parts is what is measured at once.
    let all = EvalSection { methods: vec![mapper, kvzip, random], ..full.clone() };
    let parts = world.run(&all, "a", &[]);
    parts.holds(&first);
    parts.holds_rows(&fourth);
    let whole = World { out: nano.stage("whole"), warnings: RefCell::default(), ..world };
    let whole_left = whole.run(&all, "a", &[]);
    for (key, row) in &whole_left.answers {
        assert_eq!(parts.answers[key], *row, "{key}");
    }
    for (key, row) in &whole_left.agreement {
        assert_eq!(parts.agreement[key], *row, "{key}");
    }
    assert!(world_warnings(&whole).is_empty());

    // Other intervals of the same outcomes, and other facts in contexts of the same number and length.
    let last = world.run(&full, "a", &[]);
    let wider = EvalSection { bootstrap: full.bootstrap + 50, ..full.clone() };
    let complete = |section: &EvalSection, contexts: &[FactContext]| {
        let inputs = EvalInputs {
            section,
            base: Fingerprint::new().with("mapper", "a"),
            ..nano.inputs(&stages, contexts, &world.out)
        };
        asked(&inputs).is_complete(&world.out, &inputs.fingerprint).unwrap()
    };
    assert!(complete(&full, &nano.contexts) && !complete(&wider, &nano.contexts));
    let mut others = nano.contexts.clone();
    others[0].questions[0].answer_text.push('s');
    assert!(!complete(&full, &others));
    let summed = world.run(&wider, "a", &[]);
    assert_eq!(summed.results.bootstrap, Some(wider.bootstrap));
    assert_eq!(summed.answers, last.answers);
}

fn world_warnings(world: &World) -> Vec<String> {
    world.warnings.borrow().clone()
}

#[test]
fn another_mapper_sets_the_results_aside_and_its_own_come_back() {
    let nano = Nano::new(1);
    let stages = nano.stages();
    let world = World { nano: &nano, stages: &stages, out: nano.stage("eval"), warnings: RefCell::default() };
    let section = EvalSection {
        methods: vec![MethodName::KVZIP, MethodName::RANDOM],
        policies: vec![Policy::Pair],
        answer_ratios: vec![0.2],
        ratios: vec![0.2],
        tasks: vec![TaskName::FACTS],
        ..nano.section.clone()
    };
    let first = world.run(&section, "a", &[]);
    let bytes = std::fs::read(world.out.join(RESULTS_FILE)).unwrap();
    assert!(world_warnings(&world).is_empty());

    let fewer = EvalSection { methods: vec![MethodName::KVZIP], ..section.clone() };
    let second = world.run(&fewer, "b", &[]);
    assert!(second.results.facts.unwrap().cells.iter().all(|c| c.method == MethodName::KVZIP));
    let warnings = world_warnings(&world);
    let aside = format!("results-{}.json", &first.results.fingerprint[..8]);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    for part in ["`labels`, `facts` measured with other choices", &aside] {
        assert!(warnings[0].contains(part), "{part} is not in {}", warnings[0]);
    }
    assert_eq!(std::fs::read(world.out.join(&aside)).unwrap(), bytes);

    let again = world.run(&fewer, "a", &[]);
    assert!(again.answers == first.answers && again.agreement == first.agreement);

    // Results of an earlier version say nothing of single tasks: they are read, and kept when new ones come.
    let text = std::fs::read_to_string(world.out.join(RESULTS_FILE)).unwrap();
    let mut old: serde_json::Value = serde_json::from_str(&text).unwrap();
    pkv_core::unseal(&mut old).unwrap();
    for task in ["labels", "facts"] {
        for key in ["fingerprint", "measured", "outcomes"] {
            old[task].as_object_mut().unwrap().remove(key);
        }
    }
    old["fingerprint"] = "0123456789".into();
    std::fs::write(world.out.join(RESULTS_FILE), old.to_string()).unwrap();
    let read = Results::read(&world.out.join(RESULTS_FILE)).unwrap();
    assert!(read.facts.unwrap().made.fingerprint.is_empty());
    let _ = world.run(&fewer, "c", &[]);
    let warnings = world_warnings(&world);
    assert!(warnings.last().unwrap().contains("of an earlier version"), "{warnings:?}");
    assert_eq!(std::fs::read_to_string(world.out.join("results-01234567.json")).unwrap(), old.to_string());
}
