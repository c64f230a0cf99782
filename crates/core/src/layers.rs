//! Which of a model's layers go to which device, where one device does not hold them all.
//!
//! Layers stay in order and together, because a hidden state passes from each to the next: with the embedding
//! before the first and the head after the last, it crosses to another device once for each further device.

use std::ops::Range;

use crate::{Hinted, hinted};

/// Consecutive layers of each device, in order; at least one of each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerSplit {
    ranges: Vec<Range<usize>>,
}

/// Memory that a model needs, by where it is needed: bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerNeeds {
    /// Of every layer: its weights, and its keys and values.
    pub layer: u64,
    /// On the first device beside its layers: the embedding.
    pub first: u64,
    /// On the last: the head, and what is gathered there.
    pub last: u64,
    /// On every device: what is alive while a layer works.
    pub each: u64,
}

impl LayerNeeds {
    /// Beside its layers, of device `at` of `devices`.
    fn beside(&self, at: usize, devices: usize) -> u64 {
        let first = if at == 0 { self.first } else { 0 };
        let last = if at + 1 == devices { self.last } else { 0 };
        self.each + first + last
    }

    /// Of device `at` of `devices` with as many layers.
    pub fn of(&self, at: usize, devices: usize, layers: usize) -> u64 {
        self.beside(at, devices) + layers as u64 * self.layer
    }

    /// Layers that device `at` of `devices` holds in `free` bytes.
    fn holds(&self, at: usize, devices: usize, free: u64) -> usize {
        let left = free.saturating_sub(self.beside(at, devices));
        usize::try_from(left / self.layer.max(1)).unwrap_or(usize::MAX)
    }
}

impl LayerSplit {
    /// All layers on one device.
    pub fn whole(layers: usize) -> Self {
        Self { ranges: std::iter::once(0..layers).collect() }
    }

    /// As many for each device as for any other, or one more for the later ones: the last layer of a prefill
    /// ends early.
    ///
    /// # Errors
    /// There are fewer layers than devices, or no device.
    pub fn even(layers: usize, devices: usize) -> Result<Self, Hinted> {
        check(layers, devices)?;
        Ok(Self::of_counts((0..devices).map(|at| (at + 1) * layers / devices - at * layers / devices)))
    }

    /// As even as the devices' `free` bytes allow; where they do not hold the model, even all the same: what
    /// runs out of memory then says so.
    ///
    /// # Errors
    /// As [`LayerSplit::even`].
    pub fn fitting(layers: usize, needs: &LayerNeeds, free: &[u64]) -> Result<Self, Hinted> {
        check(layers, free.len())?;
        let n = free.len();
        let most: Vec<usize> =
            free.iter().enumerate().map(|(at, &free)| needs.holds(at, n, free).min(layers)).collect();
        // Every device has a layer, whether it fits or not.
        let most: Vec<usize> = most.into_iter().map(|most| most.max(1)).collect();
        if most.iter().sum::<usize>() < layers {
            return Self::even(layers, n);
        }
        // One layer at a time to the device that has fewest of those with room, the last of equals.
        let mut counts = vec![1; n];
        for _ in n..layers {
            let open = (0..n).rev().filter(|&at| counts[at] < most[at]);
            if let Some(at) = open.min_by_key(|&at| counts[at]) {
                counts[at] += 1;
            }
        }
        Ok(Self::of_counts(counts.into_iter()))
    }

    /// Over the fewest devices of `free` bytes each that hold the model; `None` where `most` of them do not.
    pub fn fewest(layers: usize, needs: &LayerNeeds, free: u64, most: usize) -> Option<Self> {
        Self::first_of(layers, needs, &vec![free; most])
    }

    /// Over the fewest of the first devices of these `free` bytes that hold the model.
    pub fn first_of(layers: usize, needs: &LayerNeeds, free: &[u64]) -> Option<Self> {
        (1..=free.len().min(layers)).find_map(|n| {
            let split = Self::fitting(layers, needs, &free[..n]).ok()?;
            let fits = |(at, range): (usize, &Range<usize>)| needs.of(at, n, range.len()) <= free[at];
            split.ranges.iter().enumerate().all(fits).then_some(split)
        })
    }

    fn of_counts(counts: impl Iterator<Item = usize>) -> Self {
        let mut end = 0;
        let range = |n| {
            end += n;
            end - n..end
        };
        Self { ranges: counts.map(range).collect() }
    }

    /// Of each device.
    pub fn ranges(&self) -> &[Range<usize>] {
        &self.ranges
    }

    /// Of all devices together.
    pub fn layers(&self) -> usize {
        self.ranges.last().map_or(0, |range| range.end)
    }
}

fn check(layers: usize, devices: usize) -> Result<(), Hinted> {
    if devices == 0 {
        return Err(hinted("there is no device for the layers", "name one, such as `cuda:0`"));
    }
    if devices > layers {
        return Err(hinted(
            format!("{layers} layers cannot be laid over {devices} devices: each needs at least one"),
            format!("name at most {layers} devices"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(split: &LayerSplit) -> Vec<usize> {
        let ranges = split.ranges();
        assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start) && ranges[0].start == 0);
        ranges.iter().map(|range| range.len()).collect()
    }

    #[test]
    fn layers_are_spread_evenly() {
        for (layers, devices, expected) in [
            (6, 1, vec![6]),
            (6, 2, vec![3, 3]),
            (7, 2, vec![3, 4]),
            (64, 3, vec![21, 21, 22]),
            (3, 3, vec![1; 3]),
        ] {
            assert_eq!(counts(&LayerSplit::even(layers, devices).unwrap()), expected);
        }
        assert_eq!(LayerSplit::even(6, 1).unwrap(), LayerSplit::whole(6));
        let error = LayerSplit::even(2, 3).unwrap_err();
        assert_eq!(error.to_string(), "2 layers cannot be laid over 3 devices: each needs at least one");
        assert!(LayerSplit::even(2, 0).is_err());
    }

    #[test]
    fn a_device_with_less_memory_gets_fewer_layers() {
        let needs = LayerNeeds { layer: 10, first: 5, last: 7, each: 3 };
        let fitting = |free: &[u64]| counts(&LayerSplit::fitting(8, &needs, free).unwrap());
        assert_eq!(fitting(&[1000, 1000]), [4, 4]);
        // 3 layers, 5 and 3 beside them.
        assert_eq!(fitting(&[38, 1000]), [3, 5]);
        assert_eq!(fitting(&[47, 1000]), [3, 5]);
        assert_eq!(fitting(&[1000, 30]), [6, 2]);
        assert_eq!(fitting(&[1000, 23, 1000]), [3, 2, 3]);
        // Too little for all: even, so that both are as full as they can be.
        assert_eq!(fitting(&[38, 30]), [4, 4]);
        assert_eq!(fitting(&[0, 1000]), [1, 7]);
    }

    #[test]
    fn the_fewest_devices_that_hold_the_model_are_taken() {
        let needs = LayerNeeds { layer: 10, first: 5, last: 7, each: 3 };
        let over = |free| LayerSplit::fewest(8, &needs, free, 4).map(|split| counts(&split));
        // 80 of layers, 15 beside them.
        assert_eq!(over(95), Some(vec![8]));
        assert_eq!(over(94), Some(vec![4, 4]));
        assert_eq!(over(50), Some(vec![4, 4]));
        assert_eq!(over(49), Some(vec![2, 3, 3]));
        assert_eq!(over(29), None);
        let first_of = |free: &[u64]| LayerSplit::first_of(8, &needs, free).map(|split| counts(&split));
        assert_eq!(first_of(&[38, 60, 1000]), Some(vec![3, 5]));
        assert_eq!(first_of(&[38, 30]), None);
        assert_eq!(needs.of(0, 2, 4), 48);
        assert_eq!(needs.of(1, 2, 4), 50);
        assert_eq!(needs.of(0, 1, 8), 95);
    }
}
