//! ProxyKV at inference (arXiv 2605.16360): the proxy prunes the target's cache while the target prefills.
//!
//! A [`ScoreSource`] reads the context and scores the target's KV pairs; [`ProxyMapper`] is the usual one:
//! proxy, features, mapper. A [`TargetSide`] takes features from the target's own prefill, with or without a
//! proxy's. A [`Regime`] lets it work before ([`Sequential`]) or beside the target ([`Parallel`]: two streams
//! of a GPU, or two devices), prunes once, and hands over a cache that answers any number of questions
//! ([`answer`]). If a source fails, the cache is not pruned, and answers come from the full cache.
//!
//! For a user, [`Opened`] finds the models that an export was made for and checks that all fits,
//! [`read_context`] and [`read_questions`] read what they are asked, and [`Ready::answer_all`] answers.
//! Printing is left to `cli`.
//!
//! Dimension key: l layer, h KV head, t context position, o target KV head (l x h), b sequence.

mod answer;
mod converse;
mod fit;
mod input;
mod keep;
mod lane;
mod opened;
mod proxy;
mod regime;
mod summary;
mod target_side;
mod text;
mod timeline;
mod trace;
mod worker;

pub use answer::{Answer, Finish, Question, QuestionRefused, answer};
pub use converse::{Answering, Event};
pub use fit::check_fit;
pub use input::{ContextFile, InputLine, is_stdin, is_typed, read_context, read_questions};
pub use keep::{Budget, Keep, Kept};
pub use lane::Lane;
pub use opened::{Opened, Ready, Request};
pub use proxy::{Given, NoProxy, ProxyMapper, ProxyParts, ScoreSource, Situation};
pub use regime::{
    Parallel, PrefillInput, Prefilled, Regime, RegimeName, Sequential, check_devices, check_length,
};
pub use summary::{FullSummary, Summary};
pub use target_side::TargetSide;
pub use text::TextStream;
pub use timeline::{Phase, PhaseTotal, Timeline};
pub use trace::{Trace, write_traces};
pub use worker::{Pending, Worker};
