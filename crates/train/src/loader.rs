//! Batches as tensors, made on another thread while the last one is learnt from.

use std::sync::mpsc::SyncSender;

use anyhow::Result;
use pkv_recipe::TargetPool;
use tch::{Device, Tensor};

use crate::batches::Batch;
use crate::dataset::Dataset;

/// Batches that may wait: one is enough to hide the disk, a second one evens out its moods.
pub const WAITING: usize = 2;

/// A batch on the training device.
#[derive(Debug)]
pub struct Loaded {
    /// Raw features, f32 `[b, proxy heads, channels, t]`.
    pub heads_bpct: Tensor,
    /// f32 `[b, global channels, t]`.
    pub globals_bct: Tensor,
    /// Pooled log-odds, f32 `[b, target heads, t]`.
    pub y_bot: Tensor,
}

impl Loaded {
    /// Positions of all contexts together.
    pub fn tokens(&self) -> u64 {
        let size = self.y_bot.size();
        (size[0] * size[2]) as u64
    }
}

/// Send every batch of `batches` until the receiver goes away; an error is sent too, and ends it.
pub fn load(
    dataset: &Dataset,
    batches: impl Iterator<Item = Batch>,
    pool: &TargetPool,
    device: Device,
    to: &SyncSender<Result<Loaded>>,
) {
    for batch in batches {
        let loaded = assemble(dataset, &batch, pool, device);
        let failed = loaded.is_err();
        if to.send(loaded).is_err() || failed {
            return;
        }
    }
}

/// Read a batch's windows. Labels are pooled before they are cropped: a window's neighbours count.
pub fn assemble(dataset: &Dataset, batch: &Batch, pool: &TargetPool, device: Device) -> Result<Loaded> {
    let (mut heads, mut globals, mut y) = (Vec::new(), Vec::new(), Vec::new());
    for &(row, start) in &batch.windows {
        let context = dataset.context(row)?;
        let window = |x: &Tensor| x.narrow(-1, start as i64, batch.length as i64);
        heads.push(window(&context.heads_pct));
        globals.push(window(&context.globals_ct));
        y.push(window(&context.targets(pool)));
    }
    let stack = |x: &[Tensor]| Tensor::stack(x, 0).to_device(device);
    Ok(Loaded { heads_bpct: stack(&heads), globals_bct: stack(&globals), y_bot: stack(&y) })
}
