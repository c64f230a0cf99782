//! Features of a model, proxy or target: statistics of its attention for each KV pair of a context.
//!
//! [`Extractor`] prefills a model once and turns the data of its layers' taps into channels per (proxy KV
//! head, position), and into global channels per position. [`QueryStatistics`] holds the maths of the
//! attention channels on tensors alone. A reconstruction channel, if chosen, makes the proxy repeat its
//! context as well; `score` does that. [`FeatureStream`] gives features as the model reads;
//! [`SourceExtractors`] joins the features of several models.
//!
//! How each channel is computed is a file of `channels`, listed in a registry.
//!
//! Features are returned raw. Standardization is left to `mapper`, storage to `shard`.

mod channels;
mod extractor;
mod globals;
mod hidden;
mod sources;
mod statistics;
mod stream;
mod tap;

pub use channels::{key_diff, key_diff_of};
pub use extractor::{ContextFeatures, Extractor};
pub use hidden::{HiddenFit, HiddenProjection, of_context};
pub use sources::{SourceExtractors, join_features};
pub use statistics::QueryStatistics;
pub use stream::FeatureStream;
