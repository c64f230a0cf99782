//! The source's own KVzip scores, in three forms. The repeat itself is `score`'s.

use anyhow::Context;
use pkv_core::Channel;

use super::{Compute, Entry};
use crate::statistics::{LOG_LIMIT, MEAN_FLOOR};

// [layers, KV heads, positions] flattened layer-major is p.

pub(super) const LOG: Entry = Entry {
    channel: Channel::ReconLog,
    compute: Compute::Replay {
        reads_means: false,
        values: |scores| Ok(scores.max_lht.flatten(0, 1).log().clamp(-LOG_LIMIT, 0.0)),
    },
};

pub(super) const LOG_ODDS: Entry = Entry {
    channel: Channel::ReconLogOdds,
    compute: Compute::Replay {
        reads_means: false,
        values: |scores| Ok(pkv_prune::log_odds(&scores.max_lht.flatten(0, 1))),
    },
};

pub(super) const MEAN: Entry = Entry {
    channel: Channel::ReconMean,
    compute: Compute::Replay {
        reads_means: true,
        values: |scores| {
            let mean_lht = scores.mean_lht.as_ref().context("the scorer left out the means")?;
            Ok((mean_lht.flatten(0, 1) + MEAN_FLOOR).log())
        },
    },
};
