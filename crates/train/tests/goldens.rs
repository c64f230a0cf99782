//! The loss, and ten steps of mapper and loss together, against an independent PyTorch implementation in f64:
//! the goldens of `crates/mapper/tests/goldens`, where one script makes both.

use std::path::PathBuf;

use pkv_core::Seed;
use pkv_gpu::{AdamW, AdamWOptions, DeviceChoice};
use pkv_mapper::{Mapper, MapperDims, Standardization};
use pkv_recipe::{LossSection, MapperSection};
use pkv_test_support::tensors::{difference, relative};
use pkv_train::{HybridLoss, Learner, LossTerms};
use tch::{Device, Kind, Tensor};

const CASES: [&str; 7] =
    ["hybrid-axial", "hybrid-axial-attention", "conv", "mlp", "linear", "two-positions", "one-position"];
const TERM_TOLERANCE: f64 = 2e-6;
/// Over the largest gradient of the tensor.
const GRADIENT_TOLERANCE: f64 = 2e-5;
const STEPS_TOLERANCE: f64 = 2e-5;

struct Golden {
    case: serde_json::Value,
    tensors: Vec<(String, Tensor)>,
    device: Device,
}

impl Golden {
    fn read(name: &str) -> Self {
        let device = pkv_gpu::device(DeviceChoice::Auto).unwrap();
        pkv_gpu::set_tf32(false).unwrap();
        tch::set_num_threads(1);
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../mapper/tests/goldens");
        let cases = std::fs::read_to_string(folder.join("cases.json")).unwrap();
        let case = serde_json::from_str::<serde_json::Value>(&cases).unwrap()[name].take();
        let tensors = Tensor::read_safetensors(folder.join(format!("{name}.safetensors"))).unwrap();
        Self { case, tensors, device }
    }

    fn get(&self, name: &str) -> Tensor {
        let found = self.tensors.iter().find(|(n, _)| n == name);
        found.unwrap_or_else(|| panic!("the golden has no `{name}`")).1.to_device(self.device)
    }

    /// A parameter of every name, from the golden's.
    fn load(&self, mine: &[(String, Tensor)]) {
        let named: Vec<_> = mine.iter().map(|(n, _)| (n.clone(), self.get(&format!("param.{n}")))).collect();
        pkv_mapper::load_parameters(mine, &named).unwrap();
    }

    fn stats(&self) -> Standardization {
        Standardization::from_buffers(&self.tensors).unwrap().to_device(self.device)
    }

    fn loss(&self) -> HybridLoss {
        let section: LossSection = serde_json::from_value(self.case["loss"].clone()).unwrap();
        let loss = HybridLoss::new(&section, &self.stats()).unwrap();
        self.load(loss.parameters());
        loss
    }

    fn learner(&self) -> Learner {
        let section: MapperSection = serde_json::from_value(self.case["mapper"].clone()).unwrap();
        let (heads, globals) = (self.get("input.heads").size(), self.get("input.globals").size());
        let dims = MapperDims {
            proxy_heads: heads[1] as usize,
            channels: heads[2] as usize,
            globals: globals[1] as usize,
            outputs: self.get("input.y").size()[1] as usize,
        };
        let mapper = Mapper::new(&section, dims, self.stats(), Seed(0), self.device).unwrap();
        self.load(mapper.parameters());
        let learner = Learner { mapper, loss: self.loss() };
        let golden = self.tensors.iter().filter(|(name, _)| name.starts_with("param.")).count();
        assert_eq!(learner.parameters().len(), golden, "as many parameters as the golden has");
        learner
    }

    fn terms(&self, loss: &HybridLoss, scores_bot: &Tensor) -> LossTerms {
        loss.of(scores_bot, &self.get("input.y"), self.case["pairs_seed"].as_u64().unwrap()).unwrap()
    }
}

fn within(what: &str, difference: f64, tolerance: f64) {
    println!("{what}: {difference:.1e} of {tolerance:.0e}");
    assert!(difference <= tolerance, "{what}: {difference:e}, tolerance {tolerance:e}");
}

/// The network is not there: its scores are the golden's.
#[test]
fn every_term_and_gradient_of_the_loss_agrees() {
    for case in CASES {
        let golden = Golden::read(case);
        let loss = golden.loss();
        let scores_bot = golden.get("output").set_requires_grad(true);
        let terms = golden.terms(&loss, &scores_bot);
        assert_eq!(terms.terms.len(), 5);
        for (name, term) in &terms.terms {
            let expected = golden.get(&format!("term.{name}"));
            within(&format!("{case} {name}"), relative(term, &expected, 1.0), TERM_TOLERANCE);
        }
        terms.total.backward();
        let gradient = relative(&scores_bot.grad(), &golden.get("output_grad"), 0.01);
        within(&format!("{case} gradient at the scores"), gradient, GRADIENT_TOLERANCE);
        for (name, parameter) in loss.parameters() {
            let expected = golden.get(&format!("grad.{name}"));
            let difference = relative(&parameter.grad(), &expected, 0.01);
            within(&format!("{case} gradient of {name}"), difference, GRADIENT_TOLERANCE);
        }
    }
}

#[test]
fn ten_steps_give_the_same_losses_and_weights() {
    for case in CASES {
        let golden = Golden::read(case);
        let learner = golden.learner();
        let number = |key: &str| golden.case["adamw"][key].as_f64().unwrap();
        let options = |weight_decay| AdamWOptions {
            lr: number("lr"),
            beta1: number("beta1"),
            beta2: number("beta2"),
            eps: number("eps"),
            weight_decay,
        };
        let parameters = learner.parameters();
        let (decayed, plain): (Vec<_>, Vec<_>) = parameters.iter().partition(|(_, x)| x.dim() >= 2);
        let tensors = |part: Vec<&(String, Tensor)>| part.iter().map(|(_, x)| x.shallow_clone()).collect();
        let mut matrices = AdamW::new(tensors(decayed)).unwrap();
        let mut vectors = AdamW::new(tensors(plain)).unwrap();
        let expected: Vec<f64> = Vec::try_from(golden.get("steps.total").to_kind(Kind::Double)).unwrap();
        let mut worst: f64 = 0.0;
        for expected in &expected {
            for (_, parameter) in &parameters {
                parameter.shallow_clone().zero_grad();
            }
            let scores_bot = learner.mapper.forward(&golden.get("input.heads"), &golden.get("input.globals"));
            let total = golden.terms(&learner.loss, &scores_bot).total;
            total.backward();
            worst = worst.max((total.double_value(&[]) - expected).abs() / expected);
            matrices.step(options(number("weight_decay"))).unwrap();
            vectors.step(options(0.0)).unwrap();
        }
        within(&format!("{case} ten losses"), worst, STEPS_TOLERANCE);
        let worst = parameters
            .iter()
            .map(|(name, x)| {
                // Queries and keys of a single position have no influence. AdamW makes whole steps of what
                // rounding leaves of a gradient that is zero.
                let counts = golden.get(&format!("grad.{name}")).ne(0.0);
                let expected = golden.get(&format!("final.{name}"));
                difference(&(x * &counts), &(expected * &counts))
            })
            .fold(0.0, f64::max);
        within(&format!("{case} final weights"), worst, STEPS_TOLERANCE);
    }
}
