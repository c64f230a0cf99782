//! The machine that a plan is for: its ceilings, and how near each stage comes to them.

use serde::{Deserialize, Serialize};

/// Ceilings of one device and the shares of them that stages reach.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// In a few words, for the table.
    pub name: String,
    /// Dense matrix products in the dtype used, 10^12 floating-point operations per second.
    pub tflops: f64,
    /// Copies within device memory, 10^9 bytes per second.
    pub copy_gb_per_sec: f64,
    /// Memory of the device, if a limit is known.
    pub memory_bytes: Option<u64>,
    /// A CPU computes in f32, a GPU in bf16, unless the recipe says otherwise.
    pub cpu: bool,
    pub efficiency: Efficiency,
}

/// Name, name for readers, and of NVIDIA's data sheets: dense bf16 products (10^12 per second), memory's 10^9
/// bytes per second, its 10^9 bytes. None was measured here.
const CARDS: [(&str, &str, f64, f64, u64); 4] = [
    ("h100", "H100 SXM", 989.0, 3350.0, 80),
    ("a100", "A100 SXM 80 GB", 312.0, 2039.0, 80),
    ("l40s", "L40S", 362.0, 864.0, 48),
    ("rtx4090", "RTX 4090", 165.2, 1008.0, 24),
];

/// Share of `tflops` that a stage reaches, in (0, 1].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Efficiency {
    pub label: f64,
    pub extract: f64,
    pub train: f64,
    pub answer: f64,
}

impl Machine {
    /// One H200: 790 TFLOP/s in bf16 and 4.3 TB/s, both measured.
    ///
    /// Labels: 0.76 of that, measured (8B, 8k to 131k; kvpress 0.5.5 reaches 0.36). Features:
    /// 0.6, measured (1B with surprisal, 8k and 32k). Training (f32 or TF32, small matrices) and
    /// answers (short forwards) are guesses.
    pub fn h200() -> Self {
        Self {
            name: "one H200, bf16".to_owned(),
            tflops: 790.0,
            copy_gb_per_sec: 4300.0,
            memory_bytes: Some(141_000_000_000),
            cpu: false,
            efficiency: Efficiency { label: 0.76, extract: 0.6, train: 0.05, answer: 0.2 },
        }
    }

    /// Cards that were not measured: their names, and those for readers.
    pub fn cards() -> impl Iterator<Item = (&'static str, &'static str)> {
        CARDS.iter().map(|card| (card.0, card.1))
    }

    /// A card by its name, one of [`Machine::cards`].
    ///
    /// Rates are those of its data sheet times what an H200 reached of its own: 0.8 of the products, 0.9 of
    /// the copies. Shares are the H200's.
    pub fn card(name: &str) -> Option<Self> {
        let &(_, title, tflops, copy_gb_per_sec, memory_gb) = CARDS.iter().find(|card| card.0 == name)?;
        Some(Self {
            name: format!("one {title}, bf16"),
            tflops: 0.8 * tflops,
            copy_gb_per_sec: 0.9 * copy_gb_per_sec,
            memory_bytes: Some(memory_gb * 1_000_000_000),
            ..Self::h200()
        })
    }

    /// `threads` cores with AVX2 or wider: 40 GFLOP/s and 5 GB/s each.
    ///
    /// Shares are those of the demo pair on two shared cores, whose matrices are small: labels 83 s,
    /// features 4 s, 300 steps 209 s.
    pub fn cpu(threads: usize) -> Self {
        let threads = threads.max(1);
        Self {
            name: format!("{threads} CPU {}, f32", if threads == 1 { "thread" } else { "threads" }),
            tflops: 0.040 * threads as f64,
            copy_gb_per_sec: 5.0 * threads as f64,
            memory_bytes: None,
            cpu: true,
            efficiency: Efficiency { label: 0.2, extract: 0.4, train: 0.6, answer: 0.3 },
        }
    }

    /// Compute time plus copy time: stages overlap them little.
    pub(super) fn secs(&self, flops: f64, efficiency: f64, moved_bytes: f64) -> f64 {
        flops / (self.tflops * 1e12 * efficiency) + moved_bytes / (self.copy_gb_per_sec * 1e9)
    }
}
