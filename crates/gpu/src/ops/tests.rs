//! Each operator against its portable form, and both against the definition in f64: on the CPU always, and on
//! a GPU where there is one.

mod attention;
mod elementwise;
mod scores;

use std::io::Write as _;

use tch::{Device, Kind, Tensor};

use crate::{cuda_count, set_tf32};
use pkv_test_support::attention::exact;

/// One computation three times.
pub(super) struct Compared {
    what: String,
    operator: Tensor,
    portable: Tensor,
    /// By the definition, in f64, from the same inputs.
    naive: Tensor,
    /// Most that either may be off: a number, and a share of the value.
    within: [f64; 2],
}

/// Cases on a device and in a kind; none where libtorch has no kernel for that kind.
type Cases = fn(Device, Kind) -> Vec<Compared>;

/// The operators by name.
const TABLE: [(&str, Cases); 14] = [
    ("gated_silu", elementwise::gated_silu),
    ("nats", elementwise::nats),
    ("log_norms", elementwise::log_norms),
    ("mean_cosines", elementwise::mean_cosines),
    ("FullWeights", elementwise::full_weights),
    ("rotate", elementwise::rotate),
    ("time_conv", elementwise::time_conv),
    ("attend", attention::attend),
    ("attend_segments", attention::attend_segments),
    ("add_attention", attention::add_attention),
    ("RaggedAttention", attention::ragged),
    ("chunk_scores", scores::chunk_scores),
    ("query_statistics", scores::query_statistics),
    ("replay_scores", scores::replay_scores),
];

/// What `ops.rs` exports beside operators with two forms, and why it is not in the table.
const BESIDE: [(&str, &str); 5] = [
    ("arranged", "a memory order"),
    (
        "attend_heads",
        "both forms are in `csrc/train.cpp`; `mapper.rs` holds each against f64, with gradients",
    ),
    ("logits", "one product of libtorch's, whose result is f32 where that costs nothing"),
    ("packs", "says whether gathering keys pays"),
    ("wants_lse", "says whether an input is wanted"),
];

#[test]
fn every_operator_is_held_by_its_portable_form_and_by_f64() {
    set_tf32(false).unwrap();
    let _no_grad = tch::no_grad_guard();
    let mut places: Vec<(Device, Kind)> =
        [Kind::Float, Kind::BFloat16, Kind::Half].map(|kind| (Device::Cpu, kind)).into();
    if cuda_count() > 0 {
        places.extend([Kind::Float, Kind::BFloat16, Kind::Half].map(|kind| (Device::Cuda(0), kind)));
    } else {
        writeln!(std::io::stderr(), "SKIPPED: operators on CUDA").unwrap();
    }
    for (name, cases) in TABLE {
        let mut seen = 0;
        for &(device, kind) in &places {
            for (number, compared) in cases(device, kind).into_iter().enumerate() {
                check(&format!("{name} on {device:?} in {kind:?}, case {number}"), &compared);
                seen += 1;
            }
        }
        assert!(seen > 2, "{name}: {seen} cases");
    }
}

fn check(place: &str, Compared { what, operator, portable, naive, within }: &Compared) {
    assert_eq!((operator.size(), operator.kind()), (portable.size(), portable.kind()), "{place}: {what}");
    assert_eq!(portable.size(), naive.size(), "{place}: {what}");
    if operator.device() == Device::Cpu {
        assert!(operator.equal(portable), "{place}: {what}: a CPU has the portable form");
    }
    for (form, got) in [("the operator", operator), ("its portable form", portable)] {
        let off = (exact(&got.to_device(naive.device())) - naive).abs() - naive.abs() * within[1];
        let worst = if off.numel() == 0 { 0.0 } else { off.max().double_value(&[]) };
        // NaN is not below anything.
        assert!(worst <= within[0], "{place}: {what}: {form} is off by {worst:e} beyond {within:?}");
    }
}

/// Every function that `ops.rs` exports is in the table, or is named as no operator.
#[test]
fn the_table_is_complete() {
    let exported = include_str!("../ops.rs").split("pub use ").skip(1).flat_map(|list| {
        let list = list.split(';').next().unwrap_or_default();
        let names = list.split_once("::").map_or(list, |(_, names)| names);
        names.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|name| !name.is_empty())
    });
    let held = |name: &str| TABLE.iter().any(|(n, _)| *n == name) || BESIDE.iter().any(|(n, _)| *n == name);
    let mut functions = 0;
    for name in exported.filter(|name| name.starts_with(char::is_lowercase)) {
        functions += 1;
        assert!(held(name), "`{name}` is held by nothing");
    }
    // Two operators are types: one has a workspace, the other keeps its weights in two forms.
    assert_eq!(functions + 2, TABLE.len() + BESIDE.len(), "the table names what is not exported");
}

/// Reproducible, from 0.5 to 1.5, f32.
fn positive(seed: i64, size: &[i64], device: Device) -> Tensor {
    tch::manual_seed(seed);
    (Tensor::rand(size, (Kind::Float, Device::Cpu)) + 0.5).to_device(device)
}

fn is_half(kind: Kind) -> bool {
    kind != Kind::Float
}

/// Share by which one rounding to `kind` changes a number, of f32 what a few operations change.
fn rounding(kind: Kind) -> f64 {
    match kind {
        Kind::BFloat16 => 1.01 / 256.0,
        Kind::Half => 1.01 / 2048.0,
        _ => 4e-6,
    }
}
