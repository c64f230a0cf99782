//! The mapper and its loss against an independent PyTorch implementation in f64
//! (`goldens/make_goldens.py`): forward, terms, gradients, ten steps of AdamW.

use crate::fixtures::{CASES, Golden, device, max_difference, relative};
use pkv_gpu::{AdamW, AdamWOptions};
use pkv_mapper::{LossTerms, Mapper, hybrid_loss};
use tch::Tensor;

const OUTPUT_TOLERANCE: f64 = 1e-5;
const TERM_TOLERANCE: f64 = 2e-6;
/// Over the largest gradient of the tensor.
const GRADIENT_TOLERANCE: f64 = 2e-5;
const STEPS_TOLERANCE: f64 = 2e-5;

fn loss_of(golden: &Golden, mapper: &Mapper) -> (Tensor, LossTerms) {
    let scores_bot = mapper.forward(&golden.get("input.heads"), &golden.get("input.globals"));
    let seed = golden.case["pairs_seed"].as_u64().unwrap();
    let loss = hybrid_loss(mapper, &scores_bot, &golden.get("input.y"), &golden.loss, seed).unwrap();
    (scores_bot, loss)
}

fn within(what: &str, difference: f64, tolerance: f64) {
    println!("{what}: {difference:.1e} of {tolerance:.0e}");
    assert!(difference <= tolerance, "{what}: {difference:e}, tolerance {tolerance:e}");
}

#[test]
fn forward_and_every_term_agree() {
    for case in CASES {
        let golden = Golden::read(case);
        let (scores_bot, loss) = loss_of(&golden, &golden.mapper(device()));
        within(
            &format!("{case} output"),
            max_difference(&scores_bot, &golden.get("output")),
            OUTPUT_TOLERANCE,
        );
        assert_eq!(loss.terms.len(), 5);
        for (name, term) in &loss.terms {
            let expected = golden.get(&format!("term.{name}"));
            within(&format!("{case} {name}"), relative(term, &expected, 1.0), TERM_TOLERANCE);
        }
    }
}

#[test]
fn every_gradient_agrees() {
    for case in CASES {
        let golden = Golden::read(case);
        let mapper = golden.mapper(device());
        loss_of(&golden, &mapper).1.total.backward();
        let mut worst = (String::new(), 0.0);
        for (name, parameter) in mapper.parameters() {
            let expected = golden.get(&format!("grad.{name}"));
            let difference = relative(&parameter.grad(), &expected, 0.01);
            assert!(difference <= GRADIENT_TOLERANCE, "{case} {name}: {difference:e}");
            if difference >= worst.1 {
                worst = (name.clone(), difference);
            }
        }
        within(&format!("{case} gradients, worst `{}`", worst.0), worst.1, GRADIENT_TOLERANCE);
    }
}

#[test]
fn ten_steps_give_the_same_losses_and_weights() {
    for case in CASES {
        let golden = Golden::read(case);
        let mapper = golden.mapper(device());
        let number = |key: &str| golden.case["adamw"][key].as_f64().unwrap();
        let options = |weight_decay| AdamWOptions {
            lr: number("lr"),
            beta1: number("beta1"),
            beta2: number("beta2"),
            eps: number("eps"),
            weight_decay,
        };
        let (decayed, plain): (Vec<_>, Vec<_>) =
            mapper.parameters().iter().partition(|(name, _)| mapper.decayed(name));
        let tensors = |part: Vec<&(String, Tensor)>| part.iter().map(|(_, x)| x.shallow_clone()).collect();
        let mut matrices = AdamW::new(tensors(decayed)).unwrap();
        let mut vectors = AdamW::new(tensors(plain)).unwrap();
        let expected: Vec<f64> = Vec::try_from(golden.get("steps.total").to_kind(tch::Kind::Double)).unwrap();
        let mut worst: f64 = 0.0;
        for expected in &expected {
            for (_, parameter) in mapper.parameters() {
                parameter.shallow_clone().zero_grad();
            }
            let total = loss_of(&golden, &mapper).1.total;
            total.backward();
            worst = worst.max((total.double_value(&[]) - expected).abs() / expected);
            matrices.step(options(number("weight_decay"))).unwrap();
            vectors.step(options(0.0)).unwrap();
        }
        within(&format!("{case} ten losses"), worst, STEPS_TOLERANCE);
        let worst = mapper
            .parameters()
            .iter()
            .map(|(name, x)| {
                // Queries and keys of a single position have no influence. AdamW makes whole steps of what rounding leaves of
                // a gradient that is zero.
                let counts = golden.get(&format!("grad.{name}")).ne(0.0).to_device(x.device());
                let expected = golden.get(&format!("final.{name}")).to_device(x.device());
                max_difference(&(x * &counts), &(expected * &counts))
            })
            .fold(0.0, f64::max);
        within(&format!("{case} final weights"), worst, STEPS_TOLERANCE);
    }
}
