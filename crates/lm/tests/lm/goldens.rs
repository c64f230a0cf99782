//! Next-token logits against transformers 5.2.0, f32 on CPU, within 1e-3.
//!
//! `tests/goldens/make_goldens.py` made the numbers.

use std::collections::BTreeSet;
use std::io::Write;

use pkv_lm::{LmConfig, NoTap};

use crate::support::*;

/// Goldens of trained models hold every 97th logit.
const STRIDE: i64 = 97;

/// The last 8 positions' logits of a golden's whole sequence, prefilled in chunks.
fn check(name: &str, chunk: usize) {
    let Some(folder) = checkpoint(name) else {
        // Past the harness, which shows the output of failing tests only.
        let text = format!("SKIPPED: logits of {name}; set PKV_FAMILY to the folder that holds `{name}/`\n");
        let _ = std::io::stderr().write_all(text.as_bytes());
        return;
    };
    let (model, ids) = (load(&folder), golden_ids(name));
    let mut cache = model.new_cache(ids.len());
    let hidden = model.prefill(&ids, &mut cache, chunk, &mut NoTap).unwrap();
    let rows = hidden.size()[0];
    let logits = model.logits(&hidden.narrow(0, rows - 8, 8));
    let logits = if TRAINED.contains(&name) { logits.slice(1, None, None, STRIDE) } else { logits };
    assert_close(&format!("{name}, chunks of {chunk}"), &logits, &golden(name)("logits_tail"), 1e-3);
}

#[test]
fn every_family_has_a_golden() {
    let family = |name| LmConfig::from_folder(&goldens().join(name)).unwrap().family;
    let held: BTreeSet<&str> = architectures().map(family).collect();
    assert_eq!(held, pkv_lm::model_types().collect());
}

#[test]
fn logits_agree_with_transformers() {
    for name in architectures() {
        check(name, 4096);
    }
    for name in ["nano-llama-target", "nano-llama-proxy", "tiny-llama-target", "tiny-llama-proxy"] {
        check(name, 4096);
    }
}

#[test]
fn logits_of_trained_models_agree_with_transformers() {
    for name in TRAINED {
        check(name, 4096);
    }
}

#[test]
fn chunked_logits_agree_with_transformers() {
    // 417 tokens: the last chunk must hold 8 tokens at least, and be uneven.
    for name in architectures().chain(["nano-llama-target", "tiny-llama-target"]) {
        for chunk in [100, 64, 409] {
            check(name, chunk);
        }
    }
}
