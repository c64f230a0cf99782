//! The target's hidden states through the fitted map of `hidden`.

use anyhow::Context;
use pkv_core::Channel;

use super::{Compute, Entry};
use crate::hidden::of_context;

pub(super) const ENTRIES: &[Entry] = &[Entry {
    channel: Channel::HiddenLinear,
    compute: Compute::Layer(|new, into_hs| {
        let hidden = new.hidden.context("the projection of hidden states is absent")?;
        if let Some(x_sm) = of_context(new.view, new.prefix) {
            into_hs.copy_(&hidden.layer(new.view.layer, &x_sm));
        }
        Ok(())
    }),
}];
