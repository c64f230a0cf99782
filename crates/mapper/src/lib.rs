//! The HybridAxialMapper: from features of the proxy, the target or both to the target's scores.
//!
//! Owns the network and its variants, and the ridge solution that training starts from. The loss, batching
//! and the optimization loop are left to `train`, checkpoints to `checkpoint`; the meaning of features to
//! `extract`.
//!
//! Time and heads are processed separately: stages 1 and 2 work along time, stage 3 along heads. All stages
//! keep channels last, because normalization and matrix products need them there; only the features that come
//! in and the scores that go out have positions last.
//!
//! Dimension key: b batch, p proxy KV head (layers x heads, layer-major), c channel, g global
//! channel, t position, o target KV head (layers x heads, layer-major), f flat input (p x c, then
//! g), d width of stage 1, m width of stage 2, n attention head, e width of an attention head.

mod attention;
mod cross;
mod encoder;
mod layers;
mod long;
mod mapper;
mod params;
mod ridge;
mod standardize;
mod temporal;

pub use long::StitchedScores;
pub use mapper::{ForwardOptions, Mapper};
pub use params::load_parameters;
pub use ridge::RidgeAccumulator;
pub use standardize::{FEATURE_LIMIT, MapperDims, Standardization, StandardizationAccumulator};
