//! The mapper against an independent PyTorch implementation in f64 (`goldens/make_goldens.py`): forward, and
//! the gradients that the loss's gradient at the output gives. The loss and ten steps of both are held in
//! `train`'s tests.

use crate::fixtures::{CASES, Golden, device, max_difference, relative};

const OUTPUT_TOLERANCE: f64 = 1e-5;
/// Over the largest gradient of the tensor.
const GRADIENT_TOLERANCE: f64 = 2e-5;

fn within(what: &str, difference: f64, tolerance: f64) {
    println!("{what}: {difference:.1e} of {tolerance:.0e}");
    assert!(difference <= tolerance, "{what}: {difference:e}, tolerance {tolerance:e}");
}

#[test]
fn the_forward_agrees() {
    for case in CASES {
        let golden = Golden::read(case);
        let mapper = golden.mapper(device());
        let scores_bot = mapper.forward(&golden.get("input.heads"), &golden.get("input.globals"));
        let difference = max_difference(&scores_bot, &golden.get("output"));
        within(&format!("{case} output"), difference, OUTPUT_TOLERANCE);
    }
}

#[test]
fn every_gradient_agrees() {
    for case in CASES {
        let golden = Golden::read(case);
        let mapper = golden.mapper(device());
        let scores_bot = mapper.forward(&golden.get("input.heads"), &golden.get("input.globals"));
        let gradient_bot = golden.get("output_grad").to_device(scores_bot.device());
        (scores_bot * gradient_bot).sum(tch::Kind::Float).backward();
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
