//! An evaluation that is interrupted and started again.

use pkv_core::{NoProgress, Policy};
use pkv_eval::evaluate;
use pkv_recipe::MethodName;
use pkv_results::{ANSWERS_FILE, Results};

use crate::fixture::Nano;

#[test]
fn an_interrupted_evaluation_continues_and_ends_with_the_same_numbers() {
    let mut nano = Nano::new(3);
    nano.section.methods = vec![MethodName::KVZIP, MethodName::HEAD_PRIOR, MethodName::RANDOM];
    nano.section.policies = vec![Policy::Pair];
    let stages = nano.stages();
    let run =
        |contexts: &[_], out: &std::path::Path| evaluate(&nano.inputs(&stages, contexts, out), &NoProgress);
    let whole = nano.stage("whole");
    let expected = run(&nano.contexts, &whole).unwrap();

    // The last context has no question, which ends the evaluation after the others were stored.
    let mut cut = nano.contexts.clone();
    cut[2].questions.clear();
    let broken = nano.stage("broken");
    let error = format!("{:#}", run(&cut, &broken).unwrap_err());
    assert!(error.contains("asking context 2") && error.contains("no continuation to read"), "{error}");
    let stored = |task: &str, index: &str| {
        let folders = std::fs::read_dir(broken.join("contexts")).unwrap().map(|f| f.unwrap().path());
        let mut of_task =
            folders.filter(|f| f.file_name().unwrap().to_string_lossy().starts_with(&format!("{task}-")));
        of_task.any(|f| f.join(index).exists())
    };
    assert!(stored("facts", "00001.json") && !stored("facts", "00002.json"));
    assert!(!broken.join("results.json").exists());
    let continued = run(&nano.contexts, &broken).unwrap();

    let timeless = |mut r: Results| {
        r.timings.clear();
        r
    };
    assert!(timeless(continued) == timeless(expected), "the continued evaluation found other numbers");
    let bytes = |dir: &std::path::Path| std::fs::read(dir.join(ANSWERS_FILE)).unwrap();
    assert_eq!(bytes(&broken), bytes(&whole));
}
