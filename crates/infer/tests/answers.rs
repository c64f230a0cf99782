//! The evaluation prunes by hiding, in batches of masks; inference by compaction, question by question.
//! Both must answer alike.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use arrow::array::AsArray;
use arrow::datatypes::{Float64Type, UInt32Type};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use pkv_core::{Policy, Stop};
use pkv_eval::evaluate;
use pkv_infer::{Keep, Parallel, Question, Regime, Sequential, answer};
use pkv_recipe::{MethodName, TaskName};
use pkv_results::ANSWERS_FILE;

use crate::fixture::Nano;
use crate::support::{copy, keep, source};

/// The mapper's answers by context, question, policy and ratio.
fn evaluated(path: &Path) -> BTreeMap<(u32, u32, String, String), String> {
    let mut all = BTreeMap::new();
    for batch in ParquetRecordBatchReaderBuilder::try_new(File::open(path).unwrap()).unwrap().build().unwrap()
    {
        let batch = batch.unwrap();
        let text = |name: &str| batch.column_by_name(name).unwrap().as_string::<i32>().clone();
        let number = |name: &str| batch.column_by_name(name).unwrap().as_primitive::<UInt32Type>().clone();
        let ratios = batch.column_by_name("ratio").unwrap().as_primitive::<Float64Type>().clone();
        let (method, policy, said) = (text("method"), text("policy"), text("answer"));
        let (context, question) = (number("context"), number("question"));
        for row in 0..batch.num_rows() {
            if method.value(row) == "mapper" {
                let key = (
                    context.value(row),
                    question.value(row),
                    policy.value(row).to_owned(),
                    ratios.value(row).to_string(),
                );
                all.insert(key, said.value(row).to_owned());
            }
        }
    }
    all
}

struct Silent;

impl pkv_core::Progress for Silent {
    fn start(&self, _: &str, _: u64, _: u64) {}
    fn advance(&self, _: u64) {}
    fn note(&self, _: &str) {}
    fn finish(&self) {}
}

#[test]
fn answers_are_those_of_the_evaluation() {
    let mut nano = Nano::new(3);
    nano.section.methods = vec![MethodName::MAPPER];
    nano.section.tasks = vec![TaskName::FACTS];
    nano.section.answer_policies = Policy::ALL.to_vec();
    nano.section.answer_ratios = vec![1.0, 0.3, 0.1, 0.05];
    let (stages, out) = (nano.stages(), tempfile::tempdir().unwrap());
    evaluate(&nano.inputs(&stages, &nano.contexts, out.path()), &Silent).unwrap();
    let expected = evaluated(&out.path().join(ANSWERS_FILE));
    assert_eq!(expected.len(), 3 * 3 * Policy::ALL.len() * 4);
    let budgets = pkv_eval::learn_budgets(&stages[0], &stages[1], 50, nano.target.device()).unwrap();
    let mut different: Vec<&String> = expected.values().collect();
    different.sort();
    different.dedup();
    assert!(different.len() > 9, "answers that do not differ show nothing: {different:?}");

    let make = || source(copy(&nano.mapper), &nano.extract, 16_384);
    let mut regimes: [Box<dyn Regime>; 2] = [
        Box::new(Sequential::new(make())),
        Box::new(Parallel::streams(make().overlapped().unwrap()).unwrap()),
    ];
    for (c, context) in nano.contexts.iter().enumerate() {
        for policy in Policy::ALL {
            for ratio in &nano.section.answer_ratios {
                let job = crate::support::context(
                    &nano.target,
                    nano.tokenizer.prefix(),
                    &context.tokens,
                    Keep { budgets: Some(&budgets), ..keep(*ratio, policy) },
                );
                // The second regime keeps the same pairs, as another test shows: a part of it suffices.
                let n = if policy == Policy::Pair { 2 } else { 1 };
                for regime in &mut regimes[..n] {
                    let mut prefilled = regime.prefill(&job).unwrap();
                    for (q, asked) in context.questions.iter().enumerate() {
                        let question = Question::new(
                            &asked.question_text,
                            &nano.tokenizer,
                            nano.section.max_answer_tokens,
                        )
                        .unwrap();
                        assert!(question.tokens.starts_with(&asked.question));
                        let cache = &mut prefilled.cache;
                        let never = &Stop::default();
                        let a =
                            answer(&nano.target, &nano.tokenizer, cache, &question, never, &mut |_| Ok(()))
                                .unwrap();
                        let key = (c as u32, q as u32, policy.name().to_owned(), ratio.to_string());
                        assert_eq!(a.text, expected[&key], "{} {key:?}", regime.name());
                    }
                }
            }
        }
    }
}
