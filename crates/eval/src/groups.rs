//! How many pruned caches are asked at once: as many as memory holds, and fewer where it runs out all the same.

use anyhow::{Result, bail};
use pkv_core::hinted;
use pkv_gpu::unless_exhausted;
use pkv_lm::{LanguageModel, spare_bytes};
use tch::Device;

use crate::cell::Cell;
use crate::forced::Batch;

/// How much memory the largest intermediates of a forward over many masks may take.
pub fn forward_bytes(device: Device) -> usize {
    match device {
        Device::Cpu => 256 << 20,
        _ => 4 << 30,
    }
}

/// What one batch of questions takes of memory, cell by cell.
pub struct Groups<'a> {
    pub model: &'a LanguageModel,
    pub batch: &'a Batch,
    /// Positions of the full cache.
    pub cached: usize,
    /// Own tokens of each row.
    pub capacity: usize,
}

impl Groups<'_> {
    /// `work` on all of `cells`, in order, a group at a time; one result for each cell.
    ///
    /// A group that memory does not hold is halved and done over: `work` must leave nothing half done.
    ///
    /// # Errors
    /// Those of `work`; memory does not even hold one cell.
    pub fn run<T>(&self, cells: &[Cell], mut work: impl FnMut(&[Cell]) -> Result<Vec<T>>) -> Result<Vec<T>> {
        let mut done = Vec::with_capacity(cells.len());
        let mut most = usize::MAX;
        while done.len() < cells.len() {
            let rest = &cells[done.len()..];
            let n = self.fitting(rest)?.min(most);
            match unless_exhausted(|| work(&rest[..n]))? {
                Some(found) => done.extend(found),
                None if n == 1 => bail!(hinted(
                    format!(
                        "there is no memory to ask {} questions of one pruned cache of {} positions",
                        self.batch.continuations(),
                        self.cached
                    ),
                    "ask fewer questions of a context, take shorter contexts, or free memory of the device"
                )),
                None => most = n / 2,
            }
        }
        Ok(done)
    }

    /// Cells of `rest` to ask together; at least one.
    fn fitting(&self, rest: &[Cell]) -> Result<usize> {
        let device = self.model.device();
        // The masks themselves, and the prefix, which is kept whole, come on top.
        let (spare, forward) = (spare_bytes(device)? / 4 * 3, forward_bytes(device));
        let pairs = (self.model.shape().total_kv_heads() * self.cached) as f64;
        let (mut copies, mut activations) = (0, 0);
        let fits = rest.iter().take_while(|cell| {
            let kept = (cell.ratio.get() * pairs).ceil() as usize;
            copies += self.model.branch_bytes(kept, self.batch.continuations(), self.capacity);
            activations += self.batch.mask_bytes(self.model);
            copies <= spare && activations <= forward
        });
        Ok(fits.count().max(1))
    }
}
