//! The optimization loop: from shards of labels and features to a trained mapper.
//!
//! Owns the loss, batching, schedule, validation, logging and exact resume. The network belongs to
//! `mapper`, the checkpoint format to `checkpoint`, metrics to `prune`. No language model is known
//! here.
//!
//! Random numbers are streams named by epoch or step, and everything else that later steps depend
//! on is in the checkpoint: a run that is killed and continued ends with the same bits on a CPU.
//!
//! Dimension key: b batch, p proxy KV head (layers x heads, layer-major), c channel, t position,
//! o target KV head (layers x heads, layer-major).

mod batches;
mod bench;
mod cache;
mod curve;
mod dataset;
mod diverged;
mod in_order;
mod journal;
mod learner;
mod loader;
mod loss;
mod optimizer;
mod run;
mod schedule;
mod start;
mod step;
mod step_clock;
mod tensorboard;
mod validate;

pub use batches::{Batch, Batches};
pub use bench::{BenchOptions, BenchReport, bench};
pub use dataset::{ContextTensors, Dataset};
pub use journal::METRICS_FILE;
pub use learner::Learner;
pub use loss::{HybridLoss, LossTerms};
pub use run::{TrainInputs, TrainSummary, is_complete, train};
pub use schedule::Schedule;
pub use validate::{Ranking, VALIDATION_RATIOS, Validation, Validator};
