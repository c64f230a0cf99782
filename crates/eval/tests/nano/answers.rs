//! What is written as an answer is what greedy decoding on the pruned cache says.

use std::collections::BTreeMap;
use std::path::Path;

use arrow::array::AsArray;
use arrow::datatypes::{Float64Type, UInt32Type};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use pkv_core::{NoProgress, Policy, RetentionRatio};
use pkv_data::FactContext;
use pkv_eval::evaluate;
use pkv_lm::{Branches, NoTap};
use pkv_prune::keep_mask;
use pkv_recipe::{AnswerMatch, MethodName};
use pkv_results::ANSWERS_FILE;
use pkv_score::Scorer;
use tch::{Kind, Tensor};

use crate::fixture::Nano;

/// Text and verdict by context, question and cell.
type Answers = BTreeMap<(u32, u32, String), (String, bool)>;

#[test]
fn answers_equal_greedy_decoding_one_question_at_a_time() {
    let mut nano = Nano::new(2);
    nano.section.methods = vec![MethodName::KVZIP, MethodName::of("streaming-llm")];
    nano.section.policies = vec![Policy::Pair];
    nano.section.answer_policies = Policy::OF_SCORES.to_vec();
    nano.section.answer_ratios = vec![1.0, 0.3, 0.2, 0.1, 0.05];
    nano.section.tasks.truncate(1);
    let found = answers(&nano, "exact");
    assert_eq!(found.len(), 2 * 3 * (1 + 2 * Policy::OF_SCORES.len() * 5));
    let mut wrong = 0;
    for (c, context) in nano.contexts.iter().enumerate() {
        let ratios = &nano.section.answer_ratios;
        let pruned =
            Policy::OF_SCORES.into_iter().flat_map(|policy| ratios.iter().map(move |&r| Some((policy, r))));
        for keep in [None].into_iter().chain(pruned) {
            let cell = match keep {
                Some((policy, ratio)) => format!("kvzip {} {ratio}", policy.name()),
                None => "full".to_owned(),
            };
            for (q, text) in greedy(&nano, context, keep).into_iter().enumerate() {
                let (written, correct) = &found[&(c as u32, q as u32, cell.clone())];
                let gold = &context.questions[q].answer_text;
                assert_eq!(*written, text, "context {c}, question {q}, {cell}");
                assert_eq!(*correct, text == *gold, "context {c}, question {q}, {cell}: {text:?}");
                wrong += usize::from(!correct);
            }
        }
    }
    assert!(wrong > 0, "no answer was wrong, so no answer was decoded");

    // Judged by what an answer contains, at least as many are right, and texts stay.
    nano.section.answer_match = AnswerMatch::Contains;
    let contains = answers(&nano, "contains");
    for (key, (text, correct)) in &found {
        assert_eq!(contains[key].0, *text);
        assert!(contains[key].1 || !correct);
    }
}

/// Everything that an evaluation into `out` writes.
fn answers(nano: &Nano, out: &str) -> Answers {
    let out = nano.stage(out);
    evaluate(&nano.inputs(&nano.stages(), &nano.contexts, &out), &NoProgress).unwrap();
    read(&out.join(ANSWERS_FILE))
}

fn read(path: &Path) -> Answers {
    let file = std::fs::File::open(path).unwrap();
    let mut out = Answers::new();
    for batch in ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap() {
        let batch = batch.unwrap();
        let column = |name: &str| batch.column_by_name(name).unwrap();
        let number = |name: &str, i: usize| column(name).as_primitive::<UInt32Type>().value(i);
        let text = |name: &str, i: usize| column(name).as_string::<i32>().value(i).to_owned();
        for i in 0..batch.num_rows() {
            let ratio = column("ratio").as_primitive::<Float64Type>().value(i);
            let cell = match text("method", i).as_str() {
                "full" => "full".to_owned(),
                method => format!("{method} {} {ratio}", text("policy", i)),
            };
            let verdict = column("correct").as_boolean().value(i);
            out.insert((number("context", i), number("question", i), cell), (text("answer", i), verdict));
        }
    }
    out
}

/// Answers of the cache as KVzip prunes it, each question in a cache of its own.
fn greedy(nano: &Nano, context: &FactContext, keep: Option<(Policy, f64)>) -> Vec<String> {
    let _no_grad = tch::no_grad_guard();
    let (model, tokenizer) = (&nano.target, &nano.tokenizer);
    let prefix = tokenizer.prefix().len();
    let ids = [tokenizer.prefix(), &context.tokens].concat();
    let scorer = Scorer::new(model, tokenizer, &nano.label).unwrap();
    let mut cache = model.new_cache(scorer.cache_capacity(context.tokens.len()));
    let _ = model.prefill(&ids, &mut cache, 16_000, &mut NoTap).unwrap();
    let scores_lht = scorer.score_cached(&context.tokens, &cache).unwrap().max_lht;
    let keep = keep.map(|(policy, ratio)| {
        let keep_lht = keep_mask(&scores_lht, policy, RetentionRatio::new(ratio).unwrap());
        let size = keep_lht.size();
        let all = Tensor::ones([size[0], size[1], prefix as i64], (Kind::Bool, model.device()));
        Tensor::cat(&[all, keep_lht], -1).unsqueeze(0)
    });
    let answer = |q: &pkv_data::FactQuestion| {
        let question = [q.question.as_slice(), tokenizer.switch()].concat();
        let new = nano.section.max_answer_tokens;
        let mut branches = Branches::new(&cache, keep.as_ref(), 1, question.len() + new).unwrap();
        let tokens =
            model.generate_branches(&[&question], &mut branches, new, tokenizer.stop_tokens()).unwrap();
        tokenizer.decode(&tokens[0]).unwrap()
    };
    context.questions.iter().map(answer).collect()
}
