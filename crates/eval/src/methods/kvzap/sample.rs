//! Evenly spaced positions of every training context: the attention's input in each layer, and the labels.
//!
//! On the host and in f16, so that tens of thousands of positions of a large target fit.
//!
//! Dimension key: as in [`super`]; n sampled position.

use std::ops::Range;

use anyhow::{Context, Result};
use pkv_core::ModelShape;
use pkv_gpu::host_memory;
use tch::{Device, Kind, Tensor};

/// Sampled positions of a layer, at most.
const MOST_ROWS: u64 = 65_536;
/// The part of the machine's free memory that those of all layers may take.
const SHARE: u64 = 4;

/// Pieces of contexts, per layer.
pub struct SampledPositions {
    /// Positions that are taken of a context.
    per_context: u64,
    /// f16 `[n, m]`; f32 `[n, h]`.
    layers: Vec<Vec<(Tensor, Tensor)>>,
}

impl SampledPositions {
    /// Of `contexts` contexts of a target.
    pub fn new(shape: ModelShape, contexts: u64) -> Self {
        let row_bytes = (shape.layers * (2 * shape.hidden + 4 * shape.kv_heads)) as u64;
        let budget = host_memory().map_or(8 << 30, |memory| memory.free) / SHARE;
        Self::of(shape.layers, (MOST_ROWS.min(budget / row_bytes.max(1)) / contexts.max(1)).max(1))
    }

    pub fn of(layers: usize, per_context: u64) -> Self {
        Self { per_context, layers: (0..layers).map(|_| Vec::new()).collect() }
    }

    /// Take what is sampled of the positions `of` a context of `positions`.
    ///
    /// # Shapes
    /// - `x_sm`, `y_sh`: f32 `[s, hidden]`, `[s, KV heads]`, a row for each of `of`
    ///
    /// # Errors
    /// There is no such layer.
    pub fn add(
        &mut self,
        layer: usize,
        of: Range<usize>,
        positions: usize,
        x_sm: &Tensor,
        y_sh: &Tensor,
    ) -> Result<()> {
        let rows = chosen(self.per_context, positions as u64, of);
        if rows.is_empty() {
            return Ok(());
        }
        let index = Tensor::from_slice(&rows);
        let pick = |all: &Tensor, kind| {
            all.index_select(0, &index.to_device(all.device()))
                .to_kind(kind)
                .to_device(Device::Cpu)
                .contiguous()
        };
        let pieces = self.layers.get_mut(layer).context("a layer that the target does not have")?;
        pieces.push((pick(x_sm, Kind::Half), pick(y_sh, Kind::Float)));
        Ok(())
    }

    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Positions of a layer.
    pub fn rows(&self) -> i64 {
        self.layers.first().map_or(0, |pieces| pieces.iter().map(|(x, _)| x.size()[0]).sum())
    }

    /// Layers `range` as f32 `[l, n, m]` and `[l, n, h]` on a device.
    pub fn tensors(&self, range: Range<usize>, device: Device) -> (Tensor, Tensor) {
        let all = |of: fn(&(Tensor, Tensor)) -> &Tensor| {
            let layers: Vec<Tensor> = self.layers[range.clone()]
                .iter()
                .map(|pieces| Tensor::cat(&pieces.iter().map(of).collect::<Vec<_>>(), 0))
                .collect();
            Tensor::stack(&layers, 0).to_device(device).to_kind(Kind::Float)
        };
        (all(|piece| &piece.0), all(|piece| &piece.1))
    }
}

/// Of `per_context` positions spread evenly over `positions`, those within `of`, counted from its start.
fn chosen(per_context: u64, positions: u64, of: Range<usize>) -> Vec<i64> {
    let n = per_context.min(positions);
    let at = |i: u64| ((2 * i + 1) * positions / (2 * n)) as usize;
    (0..n).map(at).filter(|p| of.contains(p)).map(|p| (p - of.start) as i64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_spread_evenly_whatever_the_chunks() {
        assert_eq!(chosen(4, 100, 0..100), [12, 37, 62, 87]);
        assert_eq!(chosen(9, 5, 0..5), [0, 1, 2, 3, 4]);
        for per_context in [1, 3, 17, 40] {
            let whole = chosen(per_context, 40, 0..40);
            assert_eq!(whole.len(), per_context as usize);
            let pieces = [0..7, 7..8, 8..33, 33..40].map(|of: Range<usize>| {
                chosen(per_context, 40, of.clone()).iter().map(|p| p + of.start as i64).collect::<Vec<_>>()
            });
            assert_eq!(pieces.concat(), whole);
        }
    }

    #[test]
    fn what_was_taken_comes_back() {
        let mut sample = SampledPositions::of(2, 3);
        let x = Tensor::arange(20, (Kind::Float, Device::Cpu)).view([10, 2]);
        for layer in 0..2 {
            for of in [0..4, 4..10] {
                let rows = x.narrow(0, of.start as i64, of.len() as i64);
                sample.add(layer, of, 10, &rows, &(rows.narrow(1, 0, 1) + layer as f64)).unwrap();
            }
        }
        assert_eq!((sample.layers(), sample.rows()), (2, 3));
        let (x_lnm, y_lnh) = sample.tensors(1..2, Device::Cpu);
        assert_eq!(Vec::<f32>::try_from(x_lnm.view([-1])).unwrap(), [2.0, 3.0, 10.0, 11.0, 16.0, 17.0]);
        assert_eq!(Vec::<f32>::try_from(y_lnh.view([-1])).unwrap(), [3.0, 11.0, 17.0]);
        assert!(sample.add(2, 0..10, 10, &x, &x).is_err());
    }
}
