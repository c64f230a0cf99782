//! Arguments of `bench`: a subcommand for each benchmark, with the flags that it uses.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use pkv_bench::FeatureSet;

use super::{RecipeFile, choice};

#[derive(Clone, Debug, Subcommand)]
pub enum BenchCommand {
    /// Target: prefill, and prefill with KVzip scoring.
    Label(StageBench),
    /// Proxy, or the target if no feature comes from a proxy: prefill, and feature extraction by cost.
    Extract(StageBench),
    /// Mapper: steps through the loader, and on a batch that is on the device already.
    ///
    /// Of each, `--repeats` steps are timed five times.
    Train {
        #[command(flatten)]
        lengths: Lengths,
        /// Figures of `scripts/peer/mapper_compile.py`, a line per run, to print beside our own.
        #[arg(long, value_name = "FILE")]
        peer: Option<PathBuf>,
    },
    /// Both models: from a context to a pruned cache, with the target alone, with KVzip, and with ProxyKV in
    /// every regime.
    Prefill {
        #[command(flatten)]
        lengths: Lengths,
        #[command(flatten)]
        models: Models,
        #[command(flatten)]
        peer: Peer,
        /// Feature set to measure; a list is allowed [default: `recipe`; if it reads a proxy, `window` and
        /// `reconstruction` as well].
        #[arg(long, value_name = "SET", value_delimiter = ',',
            value_parser = choice(&FeatureSet::ALL, FeatureSet::name, FeatureSet::meaning))]
        features: Vec<FeatureSet>,
        /// Write the phases of each regime as a trace for ui.perfetto.dev.
        #[arg(long, value_name = "FILE")]
        trace: Option<PathBuf>,
    },
    /// Target: tokens per second from full and from pruned caches.
    Decode {
        #[command(flatten)]
        lengths: Lengths,
        #[command(flatten)]
        models: Models,
        /// Batch size, in sequences; a list is allowed.
        #[arg(long, default_value = "1", value_name = "N", value_delimiter = ',')]
        batch: Vec<NonZeroUsize>,
    },
}

/// Arguments of `label` and `extract`.
#[derive(Clone, Debug, Args)]
pub struct StageBench {
    #[command(flatten)]
    pub lengths: Lengths,
    #[command(flatten)]
    pub models: Models,
    #[command(flatten)]
    pub peer: Peer,
}

/// What all benchmarks have.
#[derive(Clone, Debug, Args)]
pub struct Lengths {
    #[command(flatten)]
    pub recipe: RecipeFile,
    /// Context lengths in tokens [default: the recipe's windows].
    #[arg(long, value_name = "TOKENS", value_delimiter = ',')]
    pub context: Vec<NonZeroUsize>,
    /// Number of timed runs after one warm-up run.
    #[arg(long, default_value = "5", value_name = "N")]
    pub repeats: NonZeroUsize,
}

/// Benchmarks of language models.
#[derive(Clone, Copy, Debug, Args)]
pub struct Models {
    /// Use models of the recipe's shapes with random weights, created on the device; no file is needed.
    #[arg(long)]
    pub random_weights: bool,
    /// Time limit per measurement; at least two runs are made.
    #[arg(long, default_value_t = 20.0, value_name = "SECONDS")]
    pub max_seconds: f64,
}

/// Benchmarks that kvpress has, too.
#[derive(Clone, Debug, Args)]
pub struct Peer {
    /// Figures of `scripts/peer/time_kvpress.py` for the same shape, to print beside our own.
    #[arg(long, value_name = "FILE")]
    pub peer: Option<PathBuf>,
}

impl Peer {
    pub fn path(&self) -> Option<&Path> {
        self.peer.as_deref()
    }
}
