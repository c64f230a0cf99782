//! The trained parameters: those of the network, and those of its loss.
//!
//! `start` initializes both, `checkpoint` stores them.

use anyhow::{Context as _, Result};
use pkv_checkpoint::{NamedTensors, TrainingState, restore_mapper};
use pkv_core::{Seed, hinted};
use pkv_mapper::{Mapper, MapperDims, Standardization, load_parameters};
use pkv_recipe::{LossSection, MapperSection};
use tch::{Device, Tensor};

use crate::loss::HybridLoss;

/// A mapper and the loss that it is trained by.
pub struct Learner {
    pub mapper: Mapper,
    pub loss: HybridLoss,
}

impl Learner {
    /// Both at their start.
    ///
    /// # Errors
    /// As [`Mapper::new`] and [`HybridLoss::new`].
    pub fn new(
        section: &MapperSection,
        loss: &LossSection,
        dims: MapperDims,
        stats: Standardization,
        seed: Seed,
        device: Device,
    ) -> Result<Self> {
        Self::with_loss(Mapper::new(section, dims, stats, seed, device)?, loss)
    }

    /// Both as a checkpoint holds them.
    ///
    /// # Errors
    /// The tensors are of another mapper or loss.
    pub fn resume(
        section: &MapperSection,
        loss: &LossSection,
        dims: MapperDims,
        state: &TrainingState,
        device: Device,
    ) -> Result<Self> {
        let resume = || -> Result<Self> {
            let network: NamedTensors = shallow(state.network.iter().chain(&state.buffers));
            let this = Self::with_loss(restore_mapper(section, dims, &network, device)?, loss)?;
            load_parameters(this.loss.parameters(), &state.loss)?;
            Ok(this)
        };
        resume().with_context(|| {
            hinted(
                format!("the checkpoint of step {} does not fit the recipe and its shards", state.step),
                "train again with `--redo train`",
            )
        })
    }

    fn with_loss(mapper: Mapper, loss: &LossSection) -> Result<Self> {
        let loss = HybridLoss::new(loss, mapper.standardization())?;
        Ok(Self { mapper, loss })
    }

    /// All that is trained, the network's first; tensors share memory with it.
    pub fn parameters(&self) -> NamedTensors {
        shallow(self.mapper.parameters().iter().chain(self.loss.parameters()))
    }

    /// Trained numbers.
    pub fn parameter_count(&self) -> usize {
        self.parameters().iter().map(|(_, x)| x.numel()).sum()
    }

    /// Overwrite all parameters by `tensors`, in the order of [`Self::parameters`].
    ///
    /// # Errors
    /// A shape differs.
    pub fn load(&self, tensors: &[Tensor]) -> Result<()> {
        let mine = self.parameters();
        let named: NamedTensors =
            mine.iter().zip(tensors).map(|((name, _), x)| (name.clone(), x.shallow_clone())).collect();
        load_parameters(&mine, &named)
    }
}

fn shallow<'a>(named: impl Iterator<Item = &'a (String, Tensor)>) -> NamedTensors {
    named.map(|(name, x)| (name.clone(), x.shallow_clone())).collect()
}
