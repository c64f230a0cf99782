//! The source's own KVzip scores, in three forms. The repeat itself is `score`'s.

use anyhow::Context;
use pkv_core::Channel;

use super::{Compute, Entry};
use crate::statistics::{LOG_LIMIT, MEAN_FLOOR};

// [layers, KV heads, positions] flattened layer-major is p.

pub(super) const ENTRIES: &[Entry] = &[
    Entry {
        channel: Channel::ReconLog,
        compute: Compute::Replay {
            reads_means: false,
            values: |scores| Ok(scores.max_lht.flatten(0, 1).log().clamp(-LOG_LIMIT, 0.0)),
        },
    },
    Entry {
        channel: Channel::ReconLogOdds,
        compute: Compute::Replay {
            reads_means: false,
            values: |scores| Ok(pkv_prune::log_odds(&scores.max_lht.flatten(0, 1))),
        },
    },
    Entry {
        channel: Channel::ReconMean,
        compute: Compute::Replay {
            reads_means: true,
            values: |scores| {
                let mean_lht = scores.mean_lht.as_ref().context("the scorer left out the means")?;
                Ok((mean_lht.flatten(0, 1) + MEAN_FLOOR).log())
            },
        },
    },
];
