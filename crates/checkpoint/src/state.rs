//! The training state of a checkpoint, and its folder.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use pkv_core::{Fingerprint, seal, unseal};
use pkv_files::{Published, WriteBudget, sync_dir, write_file};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Device, Tensor};

use crate::tensors::{NamedTensors, check_file, pick, read_tensors, same_count, write_tensors};

/// Version of the checkpoint folder's format. 1, which is read too, had the names of both groups in one list.
pub const CHECKPOINT_VERSION: u32 = 2;

/// The names of the numbers that a loss learns begin so, in checkpoints and in exports of version 2.
pub const LOSS_PREFIX: &str = "loss.";

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

/// Everything that the rest of training depends on. Random numbers need no place here: their
/// streams are named by step and epoch.
#[derive(Debug)]
pub struct TrainingState {
    /// Optimizer steps taken.
    pub step: u64,
    /// The mapper's trainable tensors, in its order.
    pub network: NamedTensors,
    /// Learned parameters of the loss, in its order; names begin with [`LOSS_PREFIX`].
    pub loss: NamedTensors,
    /// The mapper's other tensors (standardization).
    pub buffers: NamedTensors,
    /// AdamW's moments, in the order of the parameters: the network's, then the loss's.
    pub first_moments: Vec<Tensor>,
    pub second_moments: Vec<Tensor>,
    /// Moving average of the parameters, in their order; empty if the recipe has none.
    pub ema: Vec<Tensor>,
    /// Validation score at this step, which decides the best checkpoint; higher is better.
    pub validation: Option<f64>,
    /// Data of the training loop; returned unchanged.
    pub extra: Value,
}

impl TrainingState {
    /// All that is trained, the network's first.
    fn parameters(&self) -> impl Iterator<Item = &(String, Tensor)> {
        self.network.iter().chain(&self.loss)
    }

    /// The parameters that are validated: the moving average if there is one. The network's are exported.
    pub fn weights(&self) -> NamedTensors {
        let averaged = |i: usize, t: &Tensor| self.ema.get(i).unwrap_or(t).shallow_clone();
        self.parameters().enumerate().map(|(i, (n, t))| (n.clone(), averaged(i, t))).collect()
    }

    /// Every number of every tensor is finite: nothing could be learned from, or done with, others. Waits for
    /// the device.
    ///
    /// # Errors
    /// One is not; the error names its tensor.
    pub fn check_finite(&self) -> Result<()> {
        let named = |(name, t)| (format!("`{name}`"), t);
        let of = |what: &'static str, tensors| {
            let names = self.parameters().map(|(name, _)| name);
            names.zip(tensors).map(move |(name, t)| (format!("the {what} of `{name}`"), t))
        };
        let all: Vec<(String, &Tensor)> = (self.parameters().map(|(n, t)| (n, t)).map(named))
            .chain(self.buffers.iter().map(|(n, t)| (n, t)).map(named))
            .chain(of("first moment", &self.first_moments))
            .chain(of("second moment", &self.second_moments))
            .chain(of("moving average", &self.ema))
            .collect();
        if all.is_empty() {
            return Ok(());
        }
        let device = all[0].1.device();
        // One answer for all, so that the device is asked once.
        let flags: Vec<Tensor> = all.iter().map(|(_, t)| t.isfinite().all().to_device(device)).collect();
        let flags = Vec::<bool>::try_from(Tensor::stack(&flags, 0)).context("cannot read the weights")?;
        match flags.iter().position(|finite| !finite) {
            Some(i) => bail!("{} holds numbers that are not finite", all[i].0),
            None => Ok(()),
        }
    }
}

/// `state.json`: all of a checkpoint but its tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointInfo {
    pub schema_version: u32,
    pub step: u64,
    pub validation: Option<f64>,
    /// Names of the mapper's trainable tensors, in its order.
    pub network: Vec<String>,
    /// Names of the loss's, in its order.
    pub loss: Vec<String>,
    pub buffers: Vec<String>,
    /// A moving average is kept.
    pub ema: bool,
    /// Every choice that the weights depend on.
    pub fingerprint: Fingerprint,
    /// Size and hash of the other files.
    pub files: BTreeMap<String, FileHash>,
    pub extra: Value,
}

/// Pairs of a step and a factor in the fingerprint: the learning rate from that step on.
pub(crate) const LR_CUTS: &str = "train.lr_cuts";

/// Those of `cuts` that the first `steps` steps were taken with.
fn taken(cuts: &Value, steps: u64) -> Vec<&Value> {
    let is_taken = |cut: &&Value| cut[0].as_u64().is_none_or(|from| from < steps);
    cuts.as_array().into_iter().flatten().filter(is_taken).collect()
}

/// Size and hash of a file in the folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileHash {
    pub bytes: u64,
    pub sha256: String,
}

impl From<Published> for FileHash {
    fn from(p: Published) -> Self {
        Self { bytes: p.bytes, sha256: p.sha256 }
    }
}

impl CheckpointInfo {
    /// # Errors
    /// `state.json` is absent, damaged or of another version.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(STATE);
        let context = || format!("cannot read `{}`", path.display());
        let text = pkv_core::read_small_text(&path).with_context(context)?;
        let mut value: Value = serde_json::from_str(&text).with_context(context)?;
        match value["schema_version"].as_u64() {
            Some(1) => apart(&mut value).with_context(context)?,
            found => ensure!(
                found == Some(CHECKPOINT_VERSION.into()),
                "expected checkpoint version 1 or {CHECKPOINT_VERSION}, found {} in `{}`",
                value["schema_version"],
                path.display()
            ),
        }
        unseal(&mut value).with_context(context)?;
        serde_json::from_value(value).with_context(context)
    }

    fn parameters(&self) -> impl Iterator<Item = &String> {
        self.network.iter().chain(&self.loss)
    }

    /// Choices of this checkpoint that differ from `now`, as [`Fingerprint::difference`] names them. Cuts of
    /// the learning rate after its step are none: it does not depend on them.
    pub fn differences(&self, now: &Fingerprint) -> Vec<(String, Value, Value)> {
        let mut all = self.fingerprint.difference(now);
        all.retain(|(key, a, b)| key != LR_CUTS || taken(a, self.step) != taken(b, self.step));
        all
    }

    /// Every file of `folder` has the size and hash that were written down.
    ///
    /// # Errors
    /// One has not, or cannot be read.
    pub fn check_files(&self, folder: &Path) -> Result<()> {
        self.files.iter().try_for_each(|(name, file)| check_file(folder, name, file.bytes, &file.sha256))
    }
}

/// The `parameters` of version 1 as the groups of version 2.
fn apart(value: &mut Value) -> Result<()> {
    let state = value.as_object_mut().context("expected an object")?;
    let names = state.remove("parameters").context("`parameters` is missing")?;
    let names: Vec<String> = serde_json::from_value(names).context("`parameters` is no list of names")?;
    let (loss, network): (Vec<String>, Vec<String>) =
        names.into_iter().partition(|name| name.starts_with(LOSS_PREFIX));
    state.insert("network".to_owned(), network.into());
    state.insert("loss".to_owned(), loss.into());
    Ok(())
}

/// Write `state` to the new folder `folder`, and make it durable there.
pub(crate) fn write(
    folder: &Path,
    state: &TrainingState,
    fingerprint: &Fingerprint,
    budget: &WriteBudget,
) -> Result<()> {
    let n = state.parameters().count();
    same_count("first moments", state.first_moments.len(), n)?;
    same_count("second moments", state.second_moments.len(), n)?;
    ensure!(
        state.ema.is_empty() || state.ema.len() == n,
        "{} averaged tensors for {n} parameters",
        state.ema.len()
    );
    // As the newest, it would be the one from which training resumes.
    state.check_finite()?;
    let names = |group: &NamedTensors| group.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    let of = |kind: &str, tensors: &[Tensor]| -> NamedTensors {
        let named = state.parameters().zip(tensors);
        named.map(|((name, _), t)| (format!("{kind}.{name}"), t.shallow_clone())).collect()
    };
    let model: NamedTensors =
        state.parameters().chain(&state.buffers).map(|(name, t)| (name.clone(), t.shallow_clone())).collect();
    let mut optimizer = of("m", &state.first_moments);
    optimizer.extend(of("v", &state.second_moments));
    optimizer.extend(of("ema", &state.ema));

    let mut files = BTreeMap::new();
    for (name, tensors) in [(MODEL, &model), (OPTIMIZER, &optimizer)] {
        files.insert(name.to_owned(), write_tensors(&folder.join(name), tensors, budget)?.into());
    }
    let info = CheckpointInfo {
        schema_version: CHECKPOINT_VERSION,
        step: state.step,
        validation: state.validation,
        network: names(&state.network),
        loss: names(&state.loss),
        buffers: names(&state.buffers),
        ema: !state.ema.is_empty(),
        fingerprint: fingerprint.clone(),
        files,
        extra: state.extra.clone(),
    };
    let text = serde_json::to_string_pretty(&info).context("cannot write the state as JSON")?;
    let text = seal(&text) + "\n";
    write_file(&folder.join(STATE), text.as_bytes(), budget)?;
    sync_dir(folder).with_context(|| format!("cannot sync `{}`", folder.display()))
}

/// Read the whole of `folder`, checking every file against its hash.
pub(crate) fn read(folder: &Path, device: Device) -> Result<(CheckpointInfo, TrainingState)> {
    let info = CheckpointInfo::read(folder)?;
    info.check_files(folder)?;
    let model = read_tensors(&folder.join(MODEL), device)?;
    let optimizer = read_tensors(&folder.join(OPTIMIZER), device)?;
    let of = |kind: &str| -> Result<Vec<Tensor>> {
        let names: Vec<String> = info.parameters().map(|name| format!("{kind}.{name}")).collect();
        Ok(pick(&optimizer, names.iter().map(String::as_str))?.into_iter().map(|(_, t)| t).collect())
    };
    let group = |names: &[String]| pick(&model, names.iter().map(String::as_str));
    let state = TrainingState {
        step: info.step,
        network: group(&info.network)?,
        loss: group(&info.loss)?,
        buffers: group(&info.buffers)?,
        first_moments: of("m")?,
        second_moments: of("v")?,
        ema: if info.ema { of("ema")? } else { Vec::new() },
        validation: info.validation,
        extra: info.extra.clone(),
    };
    state.check_finite()?;
    Ok((info, state))
}
