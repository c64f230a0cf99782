//! Features of the proxy: what its attention says about each KV pair of a context.
//!
//! [`Extractor`] prefills the proxy once and turns what its layers' taps show into channels per
//! (proxy KV head, position), and into global channels per position. [`QueryStatistics`] holds the
//! maths of the attention channels on tensors alone. A reconstruction channel, if chosen, makes
//! the proxy repeat its context as well; `score` does that. [`FeatureStream`] gives features as the
//! proxy reads, for whom cannot wait for the whole context.
//!
//! Features leave here raw. Standardizing them belongs to `mapper`, storing them to `shard`.

mod extractor;
mod globals;
mod statistics;
mod stream;
mod tap;

pub use extractor::{ContextFeatures, Extractor};
pub use statistics::QueryStatistics;
pub use stream::FeatureStream;
