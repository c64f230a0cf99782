//! ProxyKV at inference (arXiv 2605.16360): the proxy prunes the target's cache while the target prefills.
//!
//! A [`ScoreSource`] reads the context and scores the target's KV pairs; [`ProxyMapper`] is the usual one:
//! proxy, features, mapper. A [`TargetSide`] takes features from the target's own prefill, with or without a
//! proxy's. A [`Regime`] lets it work before ([`Sequential`]) or beside the target ([`Parallel`]: two streams
//! of a GPU, or two devices), prunes once, and hands over a cache that answers any number of questions
//! ([`answer`]). If a source fails, the cache is not pruned, and answers come from the full cache. Printing,
//! files and models' names are left to `cli`.
//!
//! Dimension key: l layer, h KV head, t context position, o target KV head (l x h), b sequence.

mod answer;
mod fit;
mod keep;
mod lane;
mod proxy;
mod regime;
mod target_side;
mod text;
mod timeline;
mod worker;

pub use answer::{Answer, Finish, Question, QuestionRefused, answer};
pub use fit::{Side, check_fit};
pub use keep::{Budget, Keep, Kept};
pub use lane::Lane;
pub use proxy::{Given, NoProxy, ProxyMapper, ProxyParts, ScoreSource, Situation};
pub use regime::{Context, Parallel, Prefilled, Regime, RegimeName, Sequential, check_devices, check_length};
pub use target_side::TargetSide;
pub use text::TextStream;
pub use timeline::{Phase, PhaseTotal, Timeline};
pub use worker::{Pending, Worker};
