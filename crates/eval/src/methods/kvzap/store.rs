//! Fitted scorers on disk, so that one process fits what all processes of an evaluation use.
//!
//! Fitting prefills the target on hundreds of contexts: minutes for a large one. A file carries the hash of all that it
//! depends on in its name; another hash is another file.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pkv_checkpoint::{read_tensors, write_tensors};
use pkv_core::Fingerprint;
use pkv_shard::durable::WriteBudget;
use tch::{Device, Tensor};

use super::{Kvzap, Linear, Mlp};
use crate::store::lock_file;

/// Changes when the same choices give other scorers.
const VERSION: u32 = 2;
const NAMES: [&str; 6] =
    ["linear.weight", "linear.bias", "mlp.up", "mlp.up_bias", "mlp.down", "mlp.down_bias"];
/// How many contexts and tokens they were fitted on.
const COST: &str = "fitted_on";

/// The place of one evaluation's scorers.
pub struct KvzapStore {
    path: PathBuf,
    /// Locked while this process looks for the file or makes it.
    _lock: Option<File>,
}

impl KvzapStore {
    /// In `folder`, made if absent, for scorers that depend on `choices`; waits while another process fits them.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn open(folder: &Path, choices: Fingerprint) -> Result<Self> {
        let hash = choices.with("scorers", VERSION).hash();
        let path = folder.join(format!("kvzap-{}.safetensors", &hash[..16]));
        let lock = path.with_extension("lock");
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make folder `{}`", folder.display()))?;
        let file = lock_file(&lock).with_context(|| format!("cannot make `{}`", lock.display()))?;
        // Without locks (some network folders have none) each process fits its own: the same, but for rounding.
        let held = file.lock().is_ok();
        Ok(Self { path, _lock: held.then_some(file) })
    }

    /// Scorers that were fitted before, and on how many contexts and tokens; a file that cannot be read is none.
    pub fn load(&self, device: Device) -> Option<(Kvzap, [usize; 2])> {
        let mut tensors = read_tensors(&self.path, device).ok()?;
        let mut take = |name: &str| {
            let at = tensors.iter().position(|(n, _)| n == name)?;
            Some(tensors.swap_remove(at).1)
        };
        let cost = take(COST)?;
        let [weight, bias, up, up_bias, down, down_bias] = NAMES.map(&mut take);
        let linear = weight.zip(bias).map(|(weight_lmh, bias_lh)| Linear { weight_lmh, bias_lh });
        let mlp = match (up, up_bias, down, down_bias) {
            (Some(up_lmw), Some(up_bias_l1w), Some(down_lwh), Some(down_bias_l1h)) => {
                Some(Mlp { up_lmw, up_bias_l1w, down_lwh, down_bias_l1h })
            }
            _ => None,
        };
        let [contexts, tokens] = [0, 1].map(|i| cost.int64_value(&[i]) as usize);
        Some((Kvzap { linear, mlp }, [contexts, tokens]))
    }

    /// # Errors
    /// The file cannot be written; one that was there stays.
    pub fn save(&self, kvzap: &Kvzap, cost: [usize; 2]) -> Result<()> {
        let mut tensors = vec![(COST.to_owned(), Tensor::from_slice(&cost.map(|n| n as i64)))];
        let linear = kvzap.linear.as_ref().map(|l| [&l.weight_lmh, &l.bias_lh]);
        let mlp = kvzap.mlp.as_ref().map(|m| [&m.up_lmw, &m.up_bias_l1w, &m.down_lwh, &m.down_bias_l1h]);
        let all = NAMES[..2].iter().zip(linear.into_iter().flatten());
        let all = all.chain(NAMES[2..].iter().zip(mlp.into_iter().flatten()));
        tensors.extend(all.map(|(name, t)| ((*name).to_owned(), t.to_device(Device::Cpu).contiguous())));
        write_tensors(&self.path, &tensors, &WriteBudget::from_env())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn scorers_come_back_to_those_who_ask_for_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let of = |n: i64| Tensor::arange(n, (Kind::Float, Device::Cpu)).view([1, 1, n]);
        let linear = || Linear { weight_lmh: of(3), bias_lh: of(2).squeeze_dim(0) };
        let mlp = || Mlp { up_lmw: of(4), up_bias_l1w: of(5), down_lwh: of(6), down_bias_l1h: of(7) };
        let choices = |what: &str| Fingerprint::new().with("labels", what);
        for (name, kvzap) in [
            ("both", Kvzap { linear: Some(linear()), mlp: Some(mlp()) }),
            ("linear", Kvzap { linear: Some(linear()), mlp: None }),
            ("mlp", Kvzap { linear: None, mlp: Some(mlp()) }),
        ] {
            let open = || KvzapStore::open(folder.path(), choices(name)).unwrap();
            assert!(open().load(Device::Cpu).is_none());
            open().save(&kvzap, [8, 9000]).unwrap();
            let (got, cost) = open().load(Device::Cpu).unwrap();
            assert_eq!(cost, [8, 9000]);
            assert_eq!(
                (got.linear.is_some(), got.mlp.is_some()),
                (kvzap.linear.is_some(), kvzap.mlp.is_some())
            );
            if let Some(got) = got.linear {
                assert!(got.weight_lmh.equal(&of(3)) && got.bias_lh.equal(&of(2).squeeze_dim(0)));
            }
            if let Some(got) = got.mlp {
                assert!(got.up_lmw.equal(&of(4)) && got.down_bias_l1h.equal(&of(7)));
            }
        }
        assert!(KvzapStore::open(folder.path(), choices("others")).unwrap().load(Device::Cpu).is_none());
    }

    #[test]
    fn a_damaged_file_is_no_scorer() {
        let folder = tempfile::tempdir().unwrap();
        let store = KvzapStore::open(folder.path(), Fingerprint::new()).unwrap();
        std::fs::write(&store.path, b"not tensors").unwrap();
        assert!(store.load(Device::Cpu).is_none());
    }
}
