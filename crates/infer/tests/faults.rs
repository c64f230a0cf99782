//! What goes wrong, and what is answered nevertheless.

use std::cell::Cell;
use std::time::Duration;

use anyhow::bail;
use pkv_core::{Hinted, Interrupted, Policy, Stop};
use pkv_infer::{Finish, Parallel, PrefillInput, Question, QuestionRefused, Regime, Sequential, answer};
use pkv_lm::NoTap;
use pkv_recipe::ExtractSection;

use crate::support::*;

const QUESTION: &str = "What does the keeper of the tower open?";

fn regimes(make: impl Fn() -> Misbehaving) -> Vec<Box<dyn Regime>> {
    vec![
        Box::new(Sequential::new(make())),
        Box::new(Parallel::streams(make()).unwrap()),
        Box::new(Parallel::dual(make()).unwrap()),
    ]
}

#[test]
fn a_source_that_fails_costs_the_pruning_not_the_answers() {
    let (target, tokenizer) = (load("target"), tokenizer());
    let tokens = text(150);
    let mut full = target.new_cache(400);
    let ids = [tokenizer.prefix(), &tokens].concat();
    let _ = target.prefill(&ids, &mut full, 128, &mut NoTap).unwrap();
    let asked = Question::new(QUESTION, &tokenizer, 12).unwrap();
    let expected = target.generate(&asked.tokens, &mut full, 12, tokenizer.stop_tokens()).unwrap();
    assert!(!expected.is_empty());

    let context = context(&target, tokenizer.prefix(), &tokens, keep(0.1, Policy::Pair));
    for (make, why) in [
        ((|| Misbehaving(Misbehaviour::Error)) as fn() -> Misbehaving, "fell off the bus"),
        (|| Misbehaving(Misbehaviour::Panic), "fell off the bus"),
        (|| Misbehaving(Misbehaviour::NotFinite), "1 of 1800 predicted scores"),
        (|| Misbehaving(Misbehaviour::WrongShape), "expected scores of shape [6, 2, 150]"),
    ] {
        for mut regime in regimes(make) {
            let mut prefilled = regime.prefill(&context).unwrap();
            let message = format!("{:#}", prefilled.fallback.as_ref().expect("a reason"));
            assert!(message.contains(why), "{message}");
            assert_eq!(prefilled.kept.pairs, prefilled.kept.of_pairs);
            for _ in 0..2 {
                assert_eq!(ask(&target, &mut prefilled, QUESTION).unwrap().tokens, expected, "{why}");
            }
        }
    }
}

/// A mapper that fails in its own thread, and one that cannot take the proxy's features.
#[test]
fn a_mapper_that_does_not_take_the_features_falls_back() {
    let (target, tokenizer) = (load("target"), tokenizer());
    let tokens = text(60);
    let fewer = ExtractSection {
        channels: ExtractSection::default().channels[..3].to_vec(),
        ..ExtractSection::default()
    };
    let context = context(&target, tokenizer.prefix(), &tokens, keep(0.1, Policy::Pair));
    let make = || source(random_mapper(&fewer), &ExtractSection::default(), 100);
    let mut regimes: [Box<dyn Regime>; 2] = [
        Box::new(Sequential::new(make())),
        Box::new(Parallel::streams(make().overlapped().unwrap()).unwrap()),
    ];
    for regime in &mut regimes {
        let prefilled = regime.prefill(&context).unwrap();
        let message = format!("{:#}", prefilled.fallback.expect("a reason"));
        assert!(message.contains("head features have shape"), "{message}");
    }
}

#[test]
fn a_slow_source_is_waited_for_and_said() {
    let (target, tokenizer) = (load("target"), tokenizer());
    let tokens = text(40);
    let context = context(&target, tokenizer.prefix(), &tokens, keep(0.5, Policy::Pair));
    let late = Misbehaving(Misbehaviour::Late(Duration::from_millis(700)));
    let prefilled = Parallel::streams(late).unwrap().prefill(&context).unwrap();
    assert!(prefilled.fallback.is_none());
    assert_eq!(prefilled.kept.pairs, 240);
    assert!(prefilled.waited_secs > 0.1, "{}", prefilled.waited_secs);
    let prefilled = Sequential::new(Misbehaving(Misbehaviour::Nothing)).prefill(&context).unwrap();
    assert!(prefilled.waited_secs == 0.0, "nothing waits where all is in order");
}

#[test]
fn stopping_is_no_fallback() {
    let (target, tokenizer) = (load("target"), tokenizer());
    let tokens = text(40);
    for mut regime in regimes(|| Misbehaving(Misbehaviour::Error)) {
        let stop = Stop::default();
        stop.request();
        let stopped =
            PrefillInput { stop, ..context(&target, tokenizer.prefix(), &tokens, keep(0.5, Policy::Pair)) };
        let error = regime.prefill(&stopped).err().expect("an error");
        assert!(error.downcast_ref::<Interrupted>().is_some(), "{error:#}");
        let plain = context(&target, tokenizer.prefix(), &tokens, keep(0.5, Policy::Pair));
        assert!(regime.prefill(&plain).unwrap().fallback.is_some(), "and it can be used again");
    }
}

#[test]
fn contexts_without_tokens_or_room_are_refused() {
    let (target, tokenizer) = (load("target"), tokenizer());
    for (tokens, part) in [(Vec::new(), "the context is empty"), (text(4096), "the target was made for 4096")]
    {
        for mut regime in regimes(|| Misbehaving(Misbehaviour::Error)) {
            let context = context(&target, tokenizer.prefix(), &tokens, keep(0.5, Policy::Pair));
            let error = regime.prefill(&context).err().expect("an error");
            assert!(error.to_string().contains(part), "{error}");
            assert!(error.downcast_ref::<Hinted>().is_some());
        }
    }
}

#[test]
fn questions_end_where_the_positions_end() {
    let (target, tokenizer) = (load("target"), tokenizer());
    let tokens = text(4000);
    let context = context(&target, tokenizer.prefix(), &tokens, keep(0.02, Policy::Pair));
    let slow = Misbehaving(Misbehaviour::Nothing);
    let mut prefilled = Sequential::new(slow).prefill(&context).unwrap();
    let left = 4096 - prefilled.cache.next_position(0);
    let mut ask = |tokens: usize, max_new_tokens| {
        let question = Question { tokens: text(tokens), max_new_tokens };
        answer(&target, &tokenizer, &mut prefilled.cache, &question, &Stop::default(), &mut |_| Ok(()))
    };
    for tokens in [left, left + 100] {
        let error = ask(tokens, 5).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(&format!("the question has {tokens} tokens")), "{message}");
        assert!(message.contains(&format!("{left} are left")), "{message}");
        assert!(error.downcast_ref::<QuestionRefused>().is_some());
        assert!(error.chain().any(|cause| cause.downcast_ref::<Hinted>().is_some()));
    }
    // The last position but one, then the last: an answer of two predictions at most.
    let near = ask(left - 1, 50).unwrap();
    assert!(near.tokens.len() <= 2, "{near:?}");
    assert!(near.finish == Finish::Positions || near.finish == Finish::Stop, "{near:?}");
    // And the cache can still be asked.
    assert!(ask(10, 1).unwrap().tokens.len() <= 1);
}

#[test]
fn an_answer_can_be_interrupted_and_asked_again() {
    let (target, tokenizer) = (load("target"), tokenizer());
    let tokens = text(120);
    let context = context(&target, tokenizer.prefix(), &tokens, keep(1.0, Policy::Pair));
    let slow = Misbehaving(Misbehaviour::Nothing);
    let mut prefilled = Sequential::new(slow).prefill(&context).unwrap();
    let question = Question { tokens: text(30), max_new_tokens: 20 };
    let pieces = Cell::new(0);
    let mut run = |most: usize| {
        pieces.set(0);
        let (mut text, stop) = (String::new(), Stop::default());
        let emit = &mut |piece: &str| {
            pieces.set(pieces.get() + 1);
            if pieces.get() >= most {
                stop.request();
            }
            text.push_str(piece);
            Ok(())
        };
        let a = answer(&target, &tokenizer, &mut prefilled.cache, &question, &stop, emit).unwrap();
        assert_eq!(a.text, text);
        a
    };
    let whole = run(1000);
    assert!(whole.tokens.len() > 4, "{whole:?}");
    let cut = run(3);
    assert_eq!(cut.finish, Finish::Interrupted);
    assert!(!cut.tokens.is_empty() && cut.tokens.len() < whole.tokens.len());
    assert_eq!(cut.tokens[..], whole.tokens[..cut.tokens.len()]);
    assert_eq!(run(1000).tokens, whole.tokens);
    // Who cannot take the text any more ends the answer with its own error.
    let emit = &mut |_: &str| bail!("closed");
    let error =
        answer(&target, &tokenizer, &mut prefilled.cache, &question, &Stop::default(), emit).unwrap_err();
    assert_eq!(error.to_string(), "closed");
}
