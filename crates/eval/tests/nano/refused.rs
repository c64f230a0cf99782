//! Shards that do not belong together, and recipes that ask for what is not there.

use pkv_core::{Hinted, NoProgress};
use pkv_eval::evaluate;
use pkv_recipe::{MethodName, TaskName};
use pkv_shard::{LabelRow, StageReader};

use crate::fixture::{Nano, store};

#[test]
fn shards_that_do_not_belong_together_are_refused_with_a_hint() {
    let mut nano = Nano::new(1);
    nano.section.methods = vec![MethodName::KVZIP, MethodName::MAPPER];
    nano.section.tasks = Vec::new();
    let labels: Vec<LabelRow> =
        StageReader::open(&nano.stage("labels")).unwrap().iter().collect::<Result<_, _>>().unwrap();
    let refused = |name: &str, rows: Vec<LabelRow>| {
        store(&nano.stage(name), "label", rows);
        let mut stages = nano.stages();
        stages[1] = nano.stage(name);
        let error = evaluate(&nano.inputs(&stages, &[], &nano.stage("out")), &NoProgress).unwrap_err();
        let hint = error.downcast_ref::<Hinted>().map(|h| h.hint().to_owned());
        (format!("{error:#}"), hint.expect("the error has a hint"))
    };

    let (error, hint) = refused("fewer", labels[1..].to_vec());
    assert!(error.ends_with("fewer` has 11 rows for 12 examples"), "{error}");
    assert!(hint.contains("--redo label"), "{hint}");

    let mut swapped = labels.clone();
    swapped.swap(8, 9);
    let (error, hint) = refused("swapped", swapped);
    assert!(
        error.contains("labels of row 8 in") && error.contains("do not belong to example `example-8`"),
        "{error}"
    );
    assert!(error.contains("found `example-9` with 12 KV heads"), "{error}");
    assert!(hint.contains("--redo label"), "{hint}");

    let other: Vec<LabelRow> = labels
        .iter()
        .map(|r| LabelRow { layers: r.layers / 2, kv_heads: r.kv_heads * 2, ..r.clone() })
        .collect();
    let (error, hint) = refused("other", other);
    assert_eq!(error, "labels are 3 layers x 4 KV heads, the target is 6 x 2");
    assert!(hint.contains("another model"), "{hint}");

    let stages = nano.stages();
    nano.extract.channels.truncate(5);
    let out = nano.stage("out");
    let error = evaluate(&nano.inputs(&stages, &[], &out), &NoProgress).unwrap_err().to_string();
    assert_eq!(error, "features are of 3 KV heads x 8 channels, the recipe's sources have 3 x 5");
}

#[test]
fn facts_without_contexts_are_an_error() {
    let mut nano = Nano::new(1);
    nano.section.tasks = vec![TaskName::FACTS];
    nano.section.methods = vec![MethodName::KVZIP];
    let stages = nano.stages();
    let error = evaluate(&nano.inputs(&stages, &[], &nano.stage("out")), &NoProgress).unwrap_err();
    assert_eq!(error.to_string(), "there is no context for the `facts` task");
}

#[test]
fn an_unknown_method_is_refused_before_any_work() {
    let mut nano = Nano::new(1);
    nano.section.methods.push(MethodName::new("snapvk"));
    let (stages, out) = (nano.stages(), nano.stage("out"));
    let error = evaluate(&nano.inputs(&stages, &nano.contexts, &out), &NoProgress).unwrap_err();
    assert_eq!(error.to_string(), "`eval.methods` names `snapvk`, which is no method");
    assert!(error.downcast_ref::<Hinted>().unwrap().hint().starts_with("did you mean `snapkv`?"));
    assert!(!out.exists());
}
