//! Benchmarks: the time of stages, of inference and of decoding, and the machine's peak rates.
//!
//! Models of a recipe's shapes may have random weights (time does not depend on their values), and tokens are
//! random, so that nothing is downloaded and no run folder is made. The timed functions are those that the
//! stages call; shards are not written. Running out of memory is reported as a row. What is measured is
//! returned as a report: values for programs, and a table ([`Report`]).

mod decode;
mod features;
mod peer;
mod prefill;
mod roofline;
mod row;
mod stage;
mod subject;
mod table;
mod timer;
mod train;

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use pkv_core::Stop;
use pkv_gpu::device_name;
use pkv_recipe::Recipe;
use serde::Serialize;
use tch::{Device, Kind};

use peer::Peer;
use roofline::Roofline;
use subject::Subject;
use timer::Timer;

pub use decode::{DecodeReport, decode};
pub use features::FeatureSet;
pub use prefill::{PrefillReport, prefill};
pub use row::{Measured, PeerTime, Row};
pub use stage::{StageReport, extract, label};
pub use train::{TrainReport, train};

/// What every benchmark is given.
#[derive(Clone, Copy)]
pub struct Setting<'a> {
    pub recipe: &'a Recipe,
    /// Lengths in tokens, none of them 0.
    pub contexts: &'a [usize],
    pub device: Device,
    /// Those of the target's layers in `label`, of which `device` is the last; elsewhere `device` alone.
    pub target_devices: &'a [Device],
    /// Timed runs after the first, which warms up.
    pub repeats: usize,
    /// Time limit of a measurement; at least two runs are made.
    pub most: Duration,
    pub stop: &'a Stop,
}

/// What benchmarks of models are given in addition.
#[derive(Clone, Copy)]
pub struct Models<'a> {
    /// Random weights instead of the models' files.
    pub random_weights: bool,
    /// Figures of `scripts/peer/time_kvpress.py`.
    pub peer: Option<&'a Path>,
}

/// Measurements, for programs and for people.
pub trait Report: Serialize {
    /// As a table that ends in a line break.
    fn text(&self) -> String;
}

/// What every report of models begins with.
#[derive(Clone, Debug, Serialize)]
struct Head {
    stage: &'static str,
    recipe: String,
    device: String,
    dtype: &'static str,
    random_weights: bool,
    roofline: Roofline,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<String>,
}

impl Head {
    fn weights(&self) -> &'static str {
        if self.random_weights { "random weights" } else { "the models' own weights" }
    }
}

/// A benchmark of models, ready to measure.
struct Bench<'a> {
    setting: Setting<'a>,
    timer: Timer<'a>,
    peer: Option<Peer>,
    head: Head,
}

impl<'a> Bench<'a> {
    /// Read the peer's figures and measure the device's peak rates in the dtype of `subject`.
    fn new(stage: &'static str, setting: Setting<'a>, models: Models, subject: &Subject) -> Result<Self> {
        let Setting { recipe, device, .. } = setting;
        let peer = models.peer.map(|path| Peer::read(path, subject, &recipe.path)).transpose()?;
        let roofline = roofline::measure(device, subject.kind)?;
        let head = Head {
            stage,
            recipe: recipe.name.clone(),
            device: device_name(device),
            dtype: dtype_name(subject.kind),
            random_weights: models.random_weights,
            roofline,
            peer: peer.as_ref().map(Peer::title),
        };
        Ok(Self { setting, timer: Timer::new(setting, roofline.flops_per_s), peer, head })
    }
}

/// As PyTorch and the peer's script spell it.
fn dtype_name(kind: Kind) -> &'static str {
    if kind == Kind::BFloat16 { "bfloat16" } else { "float32" }
}
