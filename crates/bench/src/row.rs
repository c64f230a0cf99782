//! One line of a benchmark: the work, and its time beside that of others.

use serde::Serialize;

/// A measurement at one length: its time, or that it did not fit.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub what: &'static str,
    /// What sets it apart from other rows of this name, in the log.
    #[serde(skip)]
    pub apart: String,
    /// Tokens.
    pub context: usize,
    /// Operations of one run, a multiply-add being two; counted, not measured.
    pub flops: f64,
    #[serde(flatten)]
    pub measured: Option<Measured>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<&'static str>,
    /// Time over that of the bare prefill at the same length.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub over_prefill: Option<f64>,
    /// The peer's time for the same work.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<PeerTime>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    pub repeats: usize,
    pub median_s: f64,
    pub min_s: f64,
    pub tokens_per_s: f64,
    /// `flops` per second of the median, over those of the matrix product.
    pub roofline_share: f64,
    /// Peak GPU memory of tensors, including the model; absent on a CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
    /// The same of each GPU, where the target's layers are over several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub device_peak_bytes: Vec<u64>,
}

/// The peer's best time for one of our rows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PeerTime {
    pub median_s: f64,
    pub attention: String,
    /// The peer's time over ours.
    pub ratio: f64,
}

impl Row {
    pub const OUT_OF_MEMORY: &'static str = "out of memory";

    pub fn new(what: &'static str, context: usize, flops: f64) -> Self {
        let apart = String::new();
        Self { what, apart, context, flops, measured: None, error: None, over_prefill: None, peer: None }
    }

    pub fn apart(self, apart: String) -> Self {
        Self { apart, ..self }
    }

    pub fn out_of_memory(self) -> Self {
        Self { error: Some(Self::OUT_OF_MEMORY), ..self }
    }

    /// Compare with the bare prefill at the same length.
    pub fn compared_with(mut self, prefill: &Row) -> Self {
        if let (Some(own), Some(bare)) = (&self.measured, &prefill.measured) {
            self.over_prefill = Some(own.median_s / bare.median_s);
        }
        self
    }
}
