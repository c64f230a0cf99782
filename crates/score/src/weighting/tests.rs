//! Every kind of weighting has a way to its factors, and a reference; every preset has a golden.

use std::fs;
use std::path::Path;

use pkv_recipe::{LabelPreset, LabelWeighting};

use super::REGISTRY;

/// Reference of each kind: the test's file, and the test in it.
const HELD_BY: [(LabelWeighting, &str, &str); 2] = [
    (LabelWeighting::Plain, "gpu/src/ops/tests/scores.rs", "pub fn chunk_scores"),
    (LabelWeighting::KvzipPlus, "score/tests/score/naive.rs", "fn kvzip_plus_factors_match_loops_in_f64"),
];

#[test]
fn every_weighting_and_every_preset_is_held_by_a_reference() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let read = |file: &str| fs::read_to_string(crates.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
    for weighting in LabelWeighting::ALL {
        let computed = REGISTRY.iter().filter(|e| e.weighting == weighting).count();
        assert_eq!(computed, 1, "{weighting:?} is in the registry {computed} times");
        let held: Vec<_> = HELD_BY.iter().filter(|h| h.0 == weighting).collect();
        let [(_, file, what)] = held[..] else { panic!("nothing holds {weighting:?}") };
        assert!(read(file).contains(what), "`{file}` has no {what}");
    }
    assert_eq!((REGISTRY.len(), HELD_BY.len()), (LabelWeighting::ALL.len(), LabelWeighting::ALL.len()));
    // `goldens.rs` compares every preset; the script has to have written its scores.
    let script = read("lm/tests/goldens/make_goldens.py");
    for preset in LabelPreset::ALL {
        assert!(script.contains(&format!("\"{}\"", preset.name())), "no golden of `{}`", preset.name());
    }
}
