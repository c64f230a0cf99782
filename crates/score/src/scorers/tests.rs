//! Every way to score has a name of its own and a reference; every preset has a golden.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use pkv_recipe::{LabelPreset, LabelSection};

use super::{REGISTRY, check};

#[test]
fn every_scorer_and_every_preset_is_held_by_a_reference() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let read = |file: &str| fs::read_to_string(crates.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
    let names: BTreeSet<&str> = REGISTRY.iter().map(|entry| entry.name).collect();
    assert_eq!(names.len(), REGISTRY.len(), "each is another's");
    let meanings: BTreeSet<&str> = REGISTRY.iter().map(|entry| entry.meaning).collect();
    assert_eq!(meanings.len(), REGISTRY.len(), "each is another's");
    for entry in REGISTRY {
        assert!(entry.meaning.len() > 20 && !entry.meaning.ends_with('.'), "`{}`", entry.name);
        let (file, what) = entry.held_by;
        assert!(read(file).contains(what), "`{}`: `{file}` has no {what}", entry.name);
    }
    // `goldens.rs` compares every preset; the script has to have written its scores.
    let script = read("lm/tests/goldens/make_goldens.py");
    for preset in LabelPreset::ALL {
        check(&LabelSection { preset, ..LabelSection::default() }).unwrap();
        assert!(script.contains(&format!("\"{}\"", preset.name())), "no golden of `{}`", preset.name());
    }
}

#[test]
fn an_unknown_scorer_is_refused_with_the_nearest() {
    let label = LabelSection { scorer: Some("snapvk".to_owned()), ..LabelSection::default() };
    let error = check(&label).unwrap_err();
    assert_eq!(error.to_string(), "`label.scorer` names `snapvk`, which is no scorer");
    let hint = error.downcast_ref::<pkv_core::Hinted>().unwrap().hint().to_owned();
    assert!(hint.starts_with("did you mean `snapkv`? scorers are plain, "), "{hint}");
}
