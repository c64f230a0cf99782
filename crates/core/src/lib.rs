//! Plain values that all other crates share: shapes, ratios, channels, seeds, hints.
//!
//! No IO but the reading of small files, and no tensors, live here. Recipes are read by `recipe`; tensors
//! belong to `lm` and the crates that depend on it.

mod channel;
mod dtype;
mod failure;
mod fingerprint;
mod foreign;
mod guard;
mod hint;
mod json;
mod layers;
mod named;
mod neutral;
mod policy;
mod progress;
mod ratio;
mod seal;
mod seed;
mod sentence;
mod shape;
mod small_file;
mod source;
mod split;
mod stop;
mod store;
mod task;

pub use channel::{Channel, Final, GlobalChannel, Pass, PassLengths};
pub use dtype::DtypeName;
pub use failure::{ClosedPipe, FailureKind};
pub use fingerprint::Fingerprint;
pub use foreign::{check_json, foreign};
pub use guard::refuse_panics;
pub use hint::{Hinted, hinted};
pub use json::{json_kind, parse_json};
pub use layers::{LayerNeeds, LayerSplit};
pub use neutral::{markdown, markdown_code, neutral, short_line};
pub use policy::{HEAD_PLACES, Policy, key_diff_weight};
pub use progress::{NoProgress, Progress, SHOWN_BY_BARS};
pub use ratio::{RatioError, RetentionRatio};
pub use seal::{seal, unseal};
pub use seed::{Rng, Seed, sha256_hex};
pub use sentence::{sentence_gaps, sentences};
pub use shape::ModelShape;
pub use small_file::{
    MOST_BYTES, check_regular, look_for, read_at_most, read_settings, read_small, read_small_text,
};
pub use source::{FeatureLayout, Source, SourceLayout};
pub use split::Split;
pub use stop::{Interrupted, Stop};
pub use store::StoreDtype;
pub use task::Task;
