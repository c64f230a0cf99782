//! Where a model's layers are: on one device, or spread over several.
//!
//! Everything that asks for "the model's device" asks a [`Placement`]. The embedding is on the first device,
//! the final norm and the head on the last, each layer's keys and values on the layer's. The last is called
//! home: hidden states, logits and everything that is gathered from all layers come out there.
//!
//! What is needed on every device is a [`PerPart`]; a tensor that has rows for every layer, and is written
//! where the layers are, is a [`LayerRows`].
//!
//! # The order of work
//!
//! One thread queues everything, chunk after chunk and layer after layer. A layer's keys and values are
//! written and read on its own device alone, so that the causal order of chunks, which the cache needs, is
//! the order of that device's stream. Hidden states cross by libtorch's copy between devices: it runs on the
//! source's current stream, first waits for what the destination's stream has queued, because that may still
//! read the memory it writes, and lets the destination's stream wait for it (`copy_device_to_device` in
//! `ATen/native/cuda/Copy.cu`). Nothing of this waits on the host. While the second device reads chunk `i`,
//! the first reads chunk `i + 1`; the copy then waits for the slower of both: a pipeline, of which only the
//! first chunk's first half and the last chunk's last half are alone. Memory is safe for the same reason: a
//! tensor's memory is given back to the stream that it was made on, and all of its users are on that stream
//! or are waited for by it.
//!
//! On a CPU, parts share the one device, and the same code runs: results have the same bits.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, ensure};
use pkv_core::{LayerNeeds, LayerSplit, hinted};
use pkv_gpu::{cuda_count, cuda_memory, device_name};
use tch::{Device, Tensor};

/// Devices of a model's layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// At least one, in order.
    parts: Arc<[Part]>,
}

/// Consecutive layers on one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub device: Device,
    pub layers: Range<usize>,
}

impl Placement {
    /// All layers on one device.
    pub fn whole(device: Device, layers: usize) -> Self {
        Self { parts: [Part { device, layers: 0..layers }].into() }
    }

    /// Each range of `split` on the device at its place in `devices`.
    ///
    /// # Errors
    /// Their numbers differ, or GPUs and CPUs are mixed.
    pub fn over(devices: &[Device], split: &LayerSplit) -> Result<Self> {
        let ranges = split.ranges();
        ensure!(
            devices.len() == ranges.len(),
            "the layers are split for {} devices, there are {}",
            ranges.len(),
            devices.len()
        );
        ensure!(
            devices.windows(2).all(|pair| pair[0].is_cuda() == pair[1].is_cuda()),
            hinted(
                format!("layers cannot be laid over a GPU and a CPU together: {devices:?}"),
                "name GPUs alone, such as `cuda:0+cuda:1`"
            )
        );
        let part = |(&device, layers): (&Device, &Range<usize>)| Part { device, layers: layers.clone() };
        Ok(Self { parts: devices.iter().zip(ranges).map(part).collect() })
    }

    /// The layers over `devices`: evenly, or as far as that the free memory of GPUs allows.
    ///
    /// # Errors
    /// As [`Placement::over`]; there are more devices than layers, or one of them is absent.
    pub fn fitting(devices: &[Device], layers: usize, needs: &LayerNeeds) -> Result<Self> {
        let split = match devices.iter().all(|device| device.is_cuda()) {
            true => LayerSplit::fitting(layers, needs, &free_bytes(devices)?)?,
            false => LayerSplit::even(layers, devices.len())?,
        };
        Self::over(devices, &split)
    }

    /// All parts, in order.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    pub fn is_split(&self) -> bool {
        self.parts.len() > 1
    }

    /// `0 to 31 on cuda:0, 32 to 63 on cuda:1`.
    pub fn in_words(&self) -> String {
        let part = |part: &Part| {
            let (first, last) = (part.layers.start, part.layers.end.saturating_sub(1));
            format!("{first} to {last} on {}", device_name(part.device))
        };
        self.parts.iter().map(part).collect::<Vec<_>>().join(", ")
    }

    /// Layers of all parts.
    pub fn layers(&self) -> usize {
        self.parts[self.parts.len() - 1].layers.end
    }

    /// Where token ids are read: the embedding's device.
    pub fn first(&self) -> Device {
        self.parts[0].device
    }

    /// Where results come out: the device of the final norm and the head.
    pub fn home(&self) -> Device {
        self.parts[self.parts.len() - 1].device
    }

    /// The device of a layer, and of its keys and values.
    pub fn of(&self, layer: usize) -> Device {
        self.parts[self.part_of(layer)].device
    }

    /// The part of a layer.
    pub(crate) fn part_of(&self, layer: usize) -> usize {
        // There are few, and the last has what no other has.
        self.parts.iter().position(|part| layer < part.layers.end).unwrap_or(self.parts.len() - 1)
    }

    /// A value made for each part.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn each<T>(&self, make: impl FnMut(&Part) -> Result<T>) -> Result<PerPart<T>> {
        let values = self.parts.iter().map(make).collect::<Result<_>>()?;
        Ok(PerPart { placement: self.clone(), values })
    }

    /// `tensors`, one for each layer, stacked at home.
    pub fn stack(&self, tensors: &[Tensor]) -> Tensor {
        let home: Vec<Tensor> = tensors.iter().map(|t| t.to_device(self.home())).collect();
        Tensor::stack(&home, 0)
    }
}

/// GPUs over which a model goes that `first` has no free memory for: the fewest, `first` and those that
/// follow it. `None` where `first` has, where there is no other, or all of them together have not.
///
/// # Errors
/// The driver refuses.
pub fn spread(first: Device, layers: usize, needs: &LayerNeeds) -> Result<Option<Vec<Device>>> {
    let Device::Cuda(gpu) = first else { return Ok(None) };
    let all = cuda_count();
    if all < 2 || needs.of(0, 1, layers) <= free_bytes(&[first])?[0] {
        return Ok(None);
    }
    let devices: Vec<Device> = (0..all).map(|i| Device::Cuda((gpu + i) % all)).collect();
    let split = LayerSplit::first_of(layers, needs, &free_bytes(&devices)?);
    Ok(split.map(|split| devices[..split.ranges().len()].to_vec()))
}

/// Free memory of GPUs, with what libtorch's allocator holds and does not use.
fn free_bytes(devices: &[Device]) -> Result<Vec<u64>> {
    let of = |device: &Device| match *device {
        Device::Cuda(gpu) => {
            let memory = cuda_memory(gpu)?;
            Ok((memory.free + memory.reserved - memory.allocated).max(0) as u64)
        }
        _ => Ok(u64::MAX),
    };
    devices.iter().map(of).collect()
}

/// A value for each part of a placement, found by the layer that it is for.
#[derive(Debug)]
pub struct PerPart<T> {
    placement: Placement,
    values: Vec<T>,
}

impl<T> PerPart<T> {
    /// The value of a layer's part.
    pub fn of(&self, layer: usize) -> &T {
        &self.values[self.placement.part_of(layer)]
    }

    pub fn iter(&self) -> impl Iterator<Item = (&Part, &T)> {
        self.placement.parts.iter().zip(&self.values)
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&Part, &mut T)> {
        self.placement.parts.iter().zip(&mut self.values)
    }

    pub const fn placement(&self) -> &Placement {
        &self.placement
    }

    /// A value made of each.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn map<U>(&self, make: impl FnMut(&T) -> Result<U>) -> Result<PerPart<U>> {
        let values = self.values.iter().map(make).collect::<Result<_>>()?;
        Ok(PerPart { placement: self.placement.clone(), values })
    }

    /// As [`PerPart::map`], where making changes it.
    ///
    /// # Errors
    /// Those of `make`.
    pub(crate) fn map_mut<U>(&mut self, make: impl FnMut(&mut T) -> Result<U>) -> Result<PerPart<U>> {
        let values = self.values.iter_mut().map(make).collect::<Result<_>>()?;
        Ok(PerPart { placement: self.placement.clone(), values })
    }

    /// A value made of each of two.
    ///
    /// # Errors
    /// Those of `make`.
    pub(crate) fn zip<U, V>(
        &self,
        other: &PerPart<U>,
        mut make: impl FnMut(&T, &U) -> Result<V>,
    ) -> Result<PerPart<V>> {
        let values = self.values.iter().zip(&other.values).map(|(a, b)| make(a, b)).collect::<Result<_>>()?;
        Ok(PerPart { placement: self.placement.clone(), values })
    }
}

/// A tensor at home whose first axis holds as many rows for every layer, layer-major. Layers of other devices
/// write into memory there, which [`LayerRows::collect`] copies home.
#[derive(Debug)]
pub struct LayerRows {
    home: Tensor,
    /// Rows of a layer.
    rows: i64,
    /// Rows of the layers of each part; those of the last part lie in `home` itself.
    parts: PerPart<Tensor>,
}

impl LayerRows {
    /// Into `home`, which is at home, on the placement's last device; other parts begin with zeros.
    ///
    /// # Errors
    /// Its first axis is no multiple of the layers, or a device has no memory left.
    pub fn new(placement: &Placement, home: Tensor) -> Result<Self> {
        let layers = placement.layers() as i64;
        let size = home.size();
        ensure!(
            size.first().is_some_and(|all| layers > 0 && all % layers == 0),
            "a tensor of shape {size:?} has no rows for each of {layers} layers"
        );
        let rows = size[0] / layers;
        let last = placement.part_of(placement.layers() - 1);
        let part = |part: &Part| {
            let (first, n) = (part.layers.start as i64 * rows, part.layers.len() as i64 * rows);
            if part == &placement.parts[last] {
                return Ok(home.narrow(0, first, n));
            }
            let mut size = size.clone();
            size[0] = n;
            Ok(Tensor::f_zeros(size, (home.kind(), part.device))?)
        };
        Ok(Self { parts: placement.each(part)?, home, rows })
    }

    /// The rows of a layer, on its device; written in place.
    pub fn layer(&self, layer: usize) -> Tensor {
        let part = self.parts.placement.part_of(layer);
        let first = (layer - self.parts.placement.parts[part].layers.start) as i64;
        self.parts.values[part].narrow(0, first * self.rows, self.rows)
    }

    /// The tensor at home. Rows of other devices are there as of the last [`LayerRows::collect`].
    pub const fn home(&self) -> &Tensor {
        &self.home
    }

    /// Copy `range` of the last axis home, of all layers.
    pub fn collect(&self, range: Range<usize>) {
        let _no_grad = tch::no_grad_guard();
        let (first, n) = (range.start as i64, range.len() as i64);
        let last = self.parts.values.len() - 1;
        for (part, rows) in self.parts.iter().take(last) {
            let here = self.home.narrow(0, part.layers.start as i64 * self.rows, rows.size()[0]);
            here.narrow(-1, first, n).copy_(&rows.narrow(-1, first, n));
        }
    }

    /// The tensor at home, complete.
    pub fn gather(self) -> Tensor {
        let positions = self.home.size().last().copied().unwrap_or(0);
        self.collect(0..positions as usize);
        self.home
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    fn over(devices: &[Device]) -> Placement {
        Placement::over(devices, &LayerSplit::even(5, devices.len()).unwrap()).unwrap()
    }

    #[test]
    fn every_layer_has_a_device() {
        let placement = over(&[Device::Cuda(3), Device::Cuda(1)]);
        let devices: Vec<_> = (0..5).map(|layer| placement.of(layer)).collect();
        assert_eq!(devices, [3, 3, 1, 1, 1].map(Device::Cuda));
        assert_eq!((placement.first(), placement.home()), (Device::Cuda(3), Device::Cuda(1)));
        assert!(placement.is_split() && placement.layers() == 5);
        let whole = Placement::whole(Device::Cpu, 5);
        assert!(!whole.is_split() && whole.of(4) == Device::Cpu && whole.first() == whole.home());
        assert_eq!(placement.in_words(), "0 to 1 on cuda:3, 2 to 4 on cuda:1");
        let names = placement.each(|part| Ok(part.layers.len())).unwrap();
        assert_eq!((*names.of(1), *names.of(2)), (2, 3));
    }

    #[test]
    fn odd_placements_are_refused() {
        let split = LayerSplit::even(5, 2).unwrap();
        let error = Placement::over(&[Device::Cpu], &split).unwrap_err();
        assert!(error.to_string().contains("for 2 devices, there are 1"), "{error}");
        let error = Placement::over(&[Device::Cpu, Device::Cuda(0)], &split).unwrap_err();
        assert!(error.to_string().contains("a GPU and a CPU"), "{error}");
    }

    #[test]
    fn rows_are_written_by_layer_and_collected_by_range() {
        let placement = over(&[Device::Cpu, Device::Cpu]);
        let rows = LayerRows::new(&placement, Tensor::zeros([10, 4], (Kind::Int64, Device::Cpu))).unwrap();
        for layer in 0..5 {
            let _ = rows.layer(layer).fill_(layer as i64 + 1);
        }
        let sums = |rows: &LayerRows| {
            let sums = rows.home().sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
            Vec::<i64>::try_from(sums).unwrap()
        };
        assert_eq!(sums(&rows), [0, 0, 0, 0, 12, 12, 16, 16, 20, 20]);
        rows.collect(1..3);
        assert_eq!(sums(&rows), [2, 2, 4, 4, 12, 12, 16, 16, 20, 20]);
        let all = rows.gather();
        assert_eq!(Vec::<i64>::try_from(all.select(1, 0)).unwrap(), [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]);
        assert!(LayerRows::new(&placement, Tensor::zeros([9, 4], (Kind::Int64, Device::Cpu))).is_err());
    }
}
