//! Log norms of keys and values.

use anyhow::Result;
use pkv_core::Channel;
use pkv_gpu::log_norms;
use tch::Tensor;

use super::{Compute, Entry, NewPositions};

/// Values shorter than this have the same feature: proxies zero some out entirely.
const VALUE_NORM_FLOOR: f64 = 1e-4;

pub(super) const ENTRIES: &[Entry] = &[
    Entry {
        channel: Channel::KeyNorm,
        compute: Compute::Layer(|new, into_hs| norms(new.view.k_hkd, new, f64::MIN_POSITIVE, into_hs)),
    },
    Entry {
        channel: Channel::ValueNorm,
        compute: Compute::Layer(|new, into_hs| norms(new.view.v_hkd, new, VALUE_NORM_FLOOR, into_hs)),
    },
];

/// Of the new positions' `vectors_hkd`, `[h, k, d]`.
fn norms(vectors_hkd: &Tensor, new: &NewPositions, floor: f64, into_hs: &mut Tensor) -> Result<()> {
    let new_hsd = vectors_hkd.narrow(1, new.first() as i64, new.len() as i64);
    log_norms(&new_hsd, floor, into_hs)
}
