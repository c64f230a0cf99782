//! The channels of attention statistics: the queries of each, and how it reduces their weights.
//!
//! `statistics` computes all of them in one pass.

use pkv_core::Channel;

use super::{Compute, Entry};
use crate::statistics::{Fold, Reach};

const fn entry(channel: Channel, reach: Reach, fold: Fold) -> Entry {
    Entry { channel, compute: Compute::Statistic(reach, fold) }
}

pub(super) const ENTRIES: &[Entry] = &[
    entry(Channel::MaxAll, Reach::All, Fold::Max),
    entry(Channel::MeanAll, Reach::All, Fold::Mean),
    entry(Channel::MaxWindow, Reach::Window, Fold::Max),
    entry(Channel::MeanWindow, Reach::Window, Fold::Mean),
    entry(Channel::MaxLast, Reach::Last, Fold::Max),
    entry(Channel::MeanLast, Reach::Last, Fold::Mean),
    entry(Channel::MeanLastLayer, Reach::Last, Fold::LayerMean),
];
