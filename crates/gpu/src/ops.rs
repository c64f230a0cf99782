//! Operators: each is one function that chooses between a fused kernel and its portable form.
//!
//! A caller never asks which kernels a device has. Where the fused form serves (kinds, shapes, GPU), the
//! operator takes it; everywhere else the portable form, in libtorch's operators, gives the same numbers but
//! for rounding. A few operators have an input that only their fused form reads and that costs something to
//! make; those have a function that says whether it is wanted, as [`wants_lse`].
//!
//! The portable form is the definition. `tests` holds both: in one table, each operator against its portable
//! form, and that against plain loops in f64.

mod attention;
mod gate;
mod mapper;
mod nats;
mod norms;
mod ragged;
mod replay;
mod rotary;
mod scores;
mod statistics;
#[cfg(test)]
mod tests;
mod unit_mean;
mod weights;

use tch::Kind;

pub use attention::{
    Attention, AttentionPolicy, Part, Rectangle, Segments, add_attention, arranged, attend, attend_segments,
    logits,
};
pub use gate::gated_silu;
pub use mapper::{attend_heads, time_conv};
pub use nats::nats;
pub use norms::log_norms;
pub use ragged::{RaggedAttention, RaggedShape, packs};
pub use replay::{ReplayScores, replay_scores};
pub use rotary::{Movement, Projected, Rotation, rotate};
pub use scores::{Repeats, Weighting, WeightingOf, chunk_scores, wants_lse};
pub use statistics::query_statistics;
pub use unit_mean::mean_cosines;
pub use weights::FullWeights;

/// Dtype in which values of `kind` are computed between two roundings: bf16 and f16 in f32, as on a GPU.
fn exact_kind(kind: Kind) -> Kind {
    if matches!(kind, Kind::BFloat16 | Kind::Half) { Kind::Float } else { kind }
}
