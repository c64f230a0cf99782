//! A run killed at random moments ends with the same bytes as an unbroken one.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use pkv_test_support::files::files;

use crate::sandbox::{Sandbox, assert_same};

/// How often the run is killed before it may finish.
const KILLS: u32 = 20;

/// Every file that must not depend on how often a run was interrupted, by its path in the run folder.
pub fn results(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut out = BTreeMap::new();
    for stage in ["examples", "labels", "features"] {
        out.extend(
            files(&run.join(stage)).into_iter().map(|(name, bytes)| (format!("{stage}/{name}"), bytes)),
        );
    }
    for file in ["model.safetensors", "parity.safetensors"] {
        out.insert(format!("export/{file}"), fs::read(run.join("export").join(file)).unwrap());
    }
    for line in fs::read_to_string(run.join("train/metrics.jsonl")).unwrap().lines() {
        let json: serde_json::Value = serde_json::from_str(line).unwrap();
        let key = format!("metrics/{}/{}", json["kind"], json["step"]);
        let loss = json["loss"].to_string();
        assert!(out.insert(key.clone(), loss.into_bytes()).is_none(), "{key} was logged twice");
    }
    out
}

#[test]
fn twenty_kills_change_nothing() {
    let unbroken = Sandbox::new();
    let start = Instant::now();
    unbroken.run(&["run"]).ok();
    let whole = start.elapsed();

    let broken = Sandbox::new();
    let mut rng = pkv_core::Seed(20).stream("kill", 0);
    for _ in 0..KILLS {
        let run = broken.start(&["run"]);
        // Anywhere in the first half of an unbroken run's time: some attempts come far, some not.
        let share = f64::from(rand::Rng::random_range(&mut rng, 2..50u32)) / 100.0;
        run.kill_after(whole.mul_f64(share).max(Duration::from_millis(5)));
    }
    broken.run(&["run"]).ok();

    let (a, b) = (results(&unbroken.path("runs/small")), results(&broken.path("runs/small")));
    assert_same(&b, &a, "the killed run");
    assert!(a.len() > 15, "there is too little to compare: {:?}", a.keys());
}
