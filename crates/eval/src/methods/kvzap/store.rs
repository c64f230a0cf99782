//! Fitted scorers on disk, so that one process fits what all processes of an evaluation use.
//!
//! Fitting prefills the target on hundreds of contexts: minutes for a large one. A file carries the hash of
//! all that its scorer depends on in its name; another hash is another file. Files of earlier versions hold
//! both scorers, and are read too.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pkv_checkpoint::{read_tensors, write_tensors};
use pkv_core::Fingerprint;
use pkv_extract::HiddenProjection;
use pkv_files::{WriteBudget, lock_file};
use pkv_recipe::MethodName;
use tch::{Device, Tensor};

use super::{LINEAR_NAME, MLP_NAME, Scorer};

/// Changes when the same choices give another scorer.
const VERSION: u32 = 2;
/// Number of contexts and tokens that it was fitted on.
const COST: &str = "fitted_on";

/// The place of one scorer.
pub struct KvzapStore {
    method: MethodName,
    path: PathBuf,
    /// Path in earlier versions, which stored both scorers in one file.
    shared: Vec<PathBuf>,
    /// Locked while this process looks for the file or makes it.
    _lock: Option<File>,
}

impl KvzapStore {
    /// Of `method`, in `folder`, made if absent; waits while another process fits it. `choices` are those
    /// that scorers depend on which were fitted together under these names.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn open(folder: &Path, method: MethodName, choices: impl Fn(&[&str]) -> Fingerprint) -> Result<Self> {
        let path = |names: &[&str]| {
            let hash = choices(names).with("scorers", VERSION).hash();
            folder.join(format!("kvzap-{}.safetensors", &hash[..16]))
        };
        let [linear, mlp] = [LINEAR_NAME, MLP_NAME].map(MethodName::name);
        let (own, shared) = (path(&[method.name()]), vec![path(&[linear, mlp]), path(&[mlp, linear])]);
        let lock = own.with_extension("lock");
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make folder `{}`", folder.display()))?;
        let file = lock_file(&lock).with_context(|| format!("cannot make `{}`", lock.display()))?;
        // Without locks (some network folders have none) each process fits its own: the same, but for
        // rounding.
        let held = file.lock().is_ok();
        Ok(Self { method, path: own, shared, _lock: held.then_some(file) })
    }

    /// The scorer that was fitted before, and on how many contexts and tokens; a file that cannot be read is
    /// none.
    pub fn load(&self, device: Device) -> Option<(Scorer, [usize; 2])> {
        std::iter::once(&self.path).chain(&self.shared).find_map(|path| self.load_from(path, device))
    }

    fn load_from(&self, path: &Path, device: Device) -> Option<(Scorer, [usize; 2])> {
        let mut tensors = read_tensors(path, device).ok()?;
        let mut take = |name: &str| {
            let at = tensors.iter().position(|(n, _)| n == name)?;
            Some(tensors.swap_remove(at).1)
        };
        let cost = take(COST)?;
        let scorer = if self.method == LINEAR_NAME {
            Scorer::Linear(HiddenProjection::new(take("linear.weight")?, take("linear.bias")?))
        } else {
            Scorer::Mlp {
                up_lmw: take("mlp.up")?,
                up_bias_l1w: take("mlp.up_bias")?,
                down_lwh: take("mlp.down")?,
                down_bias_l1h: take("mlp.down_bias")?,
            }
        };
        Some((scorer, [0, 1].map(|i| cost.int64_value(&[i]) as usize)))
    }

    /// # Errors
    /// The file cannot be written; one that was there stays.
    pub fn save(&self, scorer: &Scorer, cost: [usize; 2]) -> Result<()> {
        let parts = match scorer {
            Scorer::Linear(projection) => {
                ["linear.weight", "linear.bias"].into_iter().zip(projection.parts()).collect()
            }
            Scorer::Mlp { up_lmw, up_bias_l1w, down_lwh, down_bias_l1h } => vec![
                ("mlp.up", up_lmw),
                ("mlp.up_bias", up_bias_l1w),
                ("mlp.down", down_lwh),
                ("mlp.down_bias", down_bias_l1h),
            ],
        };
        let mut tensors = vec![(COST.to_owned(), Tensor::from_slice(&cost.map(|n| n as i64)))];
        tensors.extend(
            parts.into_iter().map(|(name, t)| (name.to_owned(), t.to_device(Device::Cpu).contiguous())),
        );
        write_tensors(&self.path, &tensors, &WriteBudget::from_env())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    fn of(n: i64) -> Tensor {
        Tensor::arange(n, (Kind::Float, Device::Cpu)).view([1, 1, n])
    }

    fn linear() -> Scorer {
        Scorer::Linear(HiddenProjection::new(of(3), of(2).squeeze_dim(0)))
    }

    fn mlp() -> Scorer {
        Scorer::Mlp { up_lmw: of(4), up_bias_l1w: of(5), down_lwh: of(6), down_bias_l1h: of(7) }
    }

    fn open(folder: &Path, method: MethodName, labels: &str) -> KvzapStore {
        let choices = |names: &[&str]| Fingerprint::new().with("methods", names).with("labels", labels);
        KvzapStore::open(folder, method, choices).unwrap()
    }

    fn is_the_same(a: &Scorer, b: &Scorer) -> bool {
        match (a, b) {
            (Scorer::Linear(a), Scorer::Linear(b)) => {
                a.parts().iter().zip(b.parts()).all(|(a, b)| a.equal(b))
            }
            (Scorer::Mlp { up_lmw: u, down_bias_l1h: d, .. }, Scorer::Mlp { up_lmw, down_bias_l1h, .. }) => {
                u.equal(up_lmw) && d.equal(down_bias_l1h)
            }
            _ => false,
        }
    }

    #[test]
    fn a_scorer_comes_back_to_those_who_ask_for_the_same() {
        let folder = tempfile::tempdir().unwrap();
        for (method, scorer) in [(LINEAR_NAME, linear()), (MLP_NAME, mlp())] {
            assert!(open(folder.path(), method, "a").load(Device::Cpu).is_none());
            open(folder.path(), method, "a").save(&scorer, [8, 9000]).unwrap();
            let (got, cost) = open(folder.path(), method, "a").load(Device::Cpu).unwrap();
            assert_eq!(cost, [8, 9000]);
            assert!(is_the_same(&got, &scorer));
            assert!(open(folder.path(), method, "b").load(Device::Cpu).is_none());
        }
    }

    #[test]
    fn a_file_of_both_scorers_in_either_order_serves_each_of_them() {
        for order in [["kvzap-linear", "kvzap-mlp"], ["kvzap-mlp", "kvzap-linear"]] {
            let folder = tempfile::tempdir().unwrap();
            let choices = Fingerprint::new().with("methods", order).with("labels", "a");
            let hash = choices.with("scorers", VERSION).hash();
            let path = folder.path().join(format!("kvzap-{}.safetensors", &hash[..16]));
            let tensors: Vec<(String, Tensor)> = [
                (COST, Tensor::from_slice(&[8i64, 9000])),
                ("linear.weight", of(3)),
                ("linear.bias", of(2).squeeze_dim(0)),
                ("mlp.up", of(4)),
                ("mlp.up_bias", of(5)),
                ("mlp.down", of(6)),
                ("mlp.down_bias", of(7)),
            ]
            .map(|(name, t)| (name.to_owned(), t))
            .into();
            write_tensors(&path, &tensors, &WriteBudget::from_env()).unwrap();
            for (method, scorer) in [(LINEAR_NAME, linear()), (MLP_NAME, mlp())] {
                let (got, cost) = open(folder.path(), method, "a").load(Device::Cpu).unwrap();
                assert!(is_the_same(&got, &scorer) && cost == [8, 9000]);
            }
        }
    }

    #[test]
    fn a_damaged_file_is_no_scorer() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path(), LINEAR_NAME, "a");
        std::fs::write(&store.path, b"not tensors").unwrap();
        assert!(store.load(Device::Cpu).is_none());
    }
}
