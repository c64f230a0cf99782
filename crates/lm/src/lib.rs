//! Target and proxy: decoder-only language models in tch, with the taps that scoring needs.
//!
//! Owns `config.json`, weights, the KV cache, the forward pass and greedy generation; text is tokens already
//! (`pkv-text`). Which KV pairs matter is left to `score` and `prune`; this crate gives them access to the
//! forward pass ([`Tap`], [`RepeatTap`]), reads a cache with some of its pairs hidden ([`Branches`]), and
//! shrinks it to the kept pairs ([`RaggedCache`]). A model that one device does not hold is spread over
//! several by its [`Placement`].
//!
//! Dimension key: l layer, h KV head, g query heads per KV head, q query head, s new token of a
//! forward, t context position, k key attended to, d head_dim, m hidden.

mod architecture;
mod branches;
mod cache;
mod config;
mod family;
mod forward;
mod full;
mod generate;
mod kept;
mod layer;
mod model;
mod placement;
mod prefill;
mod ragged;
mod repeats;
mod rope;
mod tap;
mod weights;

pub use architecture::Architecture;
pub use branches::{Branches, Storage, spare_bytes};
pub use cache::KvCache;
pub use config::LmConfig;
pub use family::model_types;
pub use model::LanguageModel;
pub use placement::{LayerRows, Part, PerPart, Placement, spread};
pub use prefill::{Chunks, prefill_chunk};
pub use ragged::RaggedCache;
pub use repeats::{RepeatTap, RepeatView};
pub use rope::{RopeConfig, RopeScaling};
pub use tap::{LayerView, NoTap, Tap};
