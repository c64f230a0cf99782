//! Batch size of pruned caches: as many as the memory estimate allows, and fewer if memory still runs out.

use anyhow::{Context, Result};
use pkv_core::hinted;
use pkv_gpu::unless_exhausted;
use pkv_lm::{LanguageModel, spare_bytes};
use pkv_results::cell::Cell;
use tch::Device;

use crate::forced::Batch;

/// Memory limit of the largest intermediates of a forward over many masks.
pub fn forward_bytes(device: Device) -> usize {
    match device {
        Device::Cpu => 256 << 20,
        _ => 4 << 30,
    }
}

/// Memory of one batch of questions, by cell.
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
    pub fn run<T>(&self, cells: &[Cell], work: impl FnMut(&[Cell]) -> Result<Vec<T>>) -> Result<Vec<T>> {
        let done = in_groups(cells, |rest| self.fitting(rest), work)?;
        done.with_context(|| {
            hinted(
                format!(
                    "there is no memory to ask {} questions of one pruned cache of {} positions",
                    self.batch.continuations(),
                    self.cached
                ),
                "ask fewer questions of a context, take shorter contexts, or free memory of the device",
            )
            .environment()
        })
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

/// `work` on all of `cells`, at most `fitting` of the rest at a time, half as many after memory ran out;
/// `None` if it does not hold a single one.
fn in_groups<T>(
    cells: &[Cell],
    fitting: impl Fn(&[Cell]) -> Result<usize>,
    mut work: impl FnMut(&[Cell]) -> Result<Vec<T>>,
) -> Result<Option<Vec<T>>> {
    let mut done = Vec::with_capacity(cells.len());
    let mut most = usize::MAX;
    while done.len() < cells.len() {
        let rest = &cells[done.len()..];
        let n = fitting(rest)?.min(most);
        match unless_exhausted(|| work(&rest[..n]))? {
            Some(found) => done.extend(found),
            None if n == 1 => return Ok(None),
            None => most = n / 2,
        }
    }
    Ok(Some(done))
}

#[cfg(test)]
mod tests {
    use anyhow::{bail, ensure};
    use pkv_core::{Policy, RetentionRatio};
    use pkv_recipe::MethodName;

    use super::*;

    #[test]
    fn groups_are_halved_until_memory_holds_them_and_stay_in_order() {
        let ratios: Vec<_> = (1..=11).map(|i| RetentionRatio::new(f64::from(i) / 20.0).unwrap()).collect();
        let cells = Cell::all(&[MethodName::MAPPER], &[Policy::Pair], &ratios);
        let mut sizes = Vec::new();
        let mut ask = |holds: usize, group: &[Cell]| -> Result<Vec<f64>> {
            sizes.push(group.len());
            ensure!(group.len() <= holds, "CUDA out of memory. Tried to allocate 2 GiB");
            Ok(group.iter().map(|cell| cell.ratio.get()).collect())
        };
        let found = in_groups(&cells, |rest| Ok(rest.len().min(9)), |group| ask(2, group)).unwrap().unwrap();
        assert_eq!(found, ratios.iter().map(|r| r.get()).collect::<Vec<_>>());
        assert_eq!(sizes, [9, 4, 2, 2, 2, 2, 2, 1]);
        let none =
            in_groups(&cells, |_| Ok(4), |_| -> Result<Vec<f64>> { bail!("CUDA out of memory") }).unwrap();
        assert!(none.is_none(), "not even one cell fits");
        let other = in_groups(&cells, |_| Ok(4), |_| -> Result<Vec<f64>> { bail!("bad mask") });
        assert_eq!(other.unwrap_err().to_string(), "bad mask");
    }
}
