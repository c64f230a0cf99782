//! The channels of attention statistics: the queries of each, and how it reduces their weights.
//!
//! `statistics` computes all of them in one pass.

use pkv_core::Channel;

use super::{Compute, Entry};
use crate::statistics::{Fold, Reach};

const fn entry(channel: Channel, reach: Reach, fold: Fold) -> Entry {
    Entry { channel, compute: Compute::Statistic(reach, fold) }
}

pub(super) const MAX_ALL: Entry = entry(Channel::MaxAll, Reach::All, Fold::Max);
pub(super) const MEAN_ALL: Entry = entry(Channel::MeanAll, Reach::All, Fold::Mean);
pub(super) const MAX_WINDOW: Entry = entry(Channel::MaxWindow, Reach::Window, Fold::Max);
pub(super) const MEAN_WINDOW: Entry = entry(Channel::MeanWindow, Reach::Window, Fold::Mean);
pub(super) const MAX_LAST: Entry = entry(Channel::MaxLast, Reach::Last, Fold::Max);
pub(super) const MEAN_LAST: Entry = entry(Channel::MeanLast, Reach::Last, Fold::Mean);
pub(super) const MEAN_LAST_LAYER: Entry = entry(Channel::MeanLastLayer, Reach::Last, Fold::LayerMean);
