//! Head budgets: learned from labels, given with an export, and what `pair-budget` keeps by them.

use pkv_core::{Fingerprint, NoProgress, Policy};
use pkv_eval::{Budgets, EvalInputs, evaluate, learn_budgets};
use pkv_prune::{BudgetFit, HeadBudgets};
use pkv_recipe::MethodName;
use pkv_shard::{LabelRow, StageReader};
use tch::{Device, Tensor};

use crate::fixture::Nano;

/// Of the labels of these rows.
fn of_rows(labels: &StageReader<LabelRow>, rows: &[u64]) -> HeadBudgets {
    let mut fit = BudgetFit::new(12);
    for &row in rows {
        let label = labels.get(row).unwrap();
        fit.add(&Tensor::from_slice(&label.scores).reshape([12, i64::from(label.positions)])).unwrap();
    }
    fit.finish().unwrap()
}

#[test]
fn head_budgets_are_of_training_contexts_alone_evenly_spread_or_of_an_export() {
    let mut nano = Nano::new(1);
    let stages = nano.stages();
    let labels = StageReader::<LabelRow>::open(&stages[1]).unwrap();
    let learned = |contexts| learn_budgets(&stages[0], &stages[1], contexts, Device::Cpu).unwrap();
    // Rows 0 to 7 are the training split, 8 to 11 the test split.
    assert_eq!(learned(50), of_rows(&labels, &[0, 1, 2, 3, 4, 5, 6, 7]));
    assert_eq!(learned(3), of_rows(&labels, &[0, 2, 5]));
    assert_ne!(learned(3), learned(50));
    assert_eq!(learned(3).contexts(), 3);

    nano.section.methods = vec![MethodName::KVZIP];
    nano.section.tasks.clear();
    nano.section.policies = vec![Policy::PairBudget];
    let held = |name: &str, budgets| {
        let out = nano.stage(name);
        let inputs = EvalInputs {
            budgets,
            base: Fingerprint::new().with("pair", name),
            ..nano.inputs(&stages, &[], &out)
        };
        let results = evaluate(&inputs, &NoProgress).unwrap();
        let cell = results.labels.cell(MethodName::KVZIP, Policy::PairBudget, 0.2).unwrap();
        assert!((cell.realised - 0.2).abs() < 1e-3, "{cell:?}");
        cell.recall_of_pair.unwrap().mean
    };
    // Equal budgets hold less of the best set than learned ones.
    let equal = HeadBudgets::new(1, vec![1_000_000], vec![vec![1_000_000; 12]]).unwrap();
    assert!(held("learned", Budgets::Learned(50)) > held("given", Budgets::Given(&equal)) + 0.1);
}
