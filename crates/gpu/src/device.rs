//! The choice of device, without a silent fallback.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail, ensure};
use pkv_core::{DtypeName, hinted};
use tch::{Device, Kind};

use crate::shim;

/// The device that the user requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU if CUDA is there, else the CPU; the caller says which.
    Auto,
    Cpu,
    /// A GPU by its index; an error if it is not available.
    Cuda(usize),
}

impl std::str::FromStr for DeviceChoice {
    type Err = pkv_core::Hinted;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let index = |n: &str| n.parse().ok();
        match text {
            "auto" => Some(Self::Auto),
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(0)),
            _ => text.strip_prefix("cuda:").and_then(index).map(Self::Cuda),
        }
        .ok_or_else(|| hinted(format!("`{text}` is no device"), "write `auto`, `cpu`, `cuda` or `cuda:1`"))
    }
}

impl std::fmt::Display for DeviceChoice {
    /// As [`FromStr`](std::str::FromStr) reads it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

/// The devices of one process, `cuda:0`; several of them, `cuda:0+cuda:1`, share the target's layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceGroup(Vec<DeviceChoice>);

impl DeviceGroup {
    /// A single device.
    pub fn one(choice: DeviceChoice) -> Self {
        Self(vec![choice])
    }

    /// The choice, if it is of a single device.
    pub fn single(&self) -> Option<DeviceChoice> {
        (self.0.len() == 1).then(|| self.0[0])
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// All of them, in order.
    ///
    /// # Errors
    /// As [`device`].
    pub fn devices(&self) -> Result<Vec<Device>> {
        self.0.iter().map(|&choice| device(choice)).collect()
    }
}

impl std::str::FromStr for DeviceGroup {
    type Err = pkv_core::Hinted;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let all = text.split('+').map(str::parse).collect::<Result<Vec<DeviceChoice>, _>>()?;
        let gpus = all.iter().filter(|choice| matches!(choice, DeviceChoice::Cuda(_))).count();
        let cpus = all.iter().filter(|choice| **choice == DeviceChoice::Cpu).count();
        if all.len() > 1 && gpus != all.len() && cpus != all.len() {
            return Err(hinted(
                format!("`{text}` does not name devices of one kind"),
                "layers go over GPUs alone, each by its number, such as `cuda:0+cuda:1`",
            ));
        }
        Ok(Self(all))
    }
}

impl std::fmt::Display for DeviceGroup {
    /// As [`FromStr`](std::str::FromStr) reads it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&names.join("+"))
    }
}

/// The device to compute on.
///
/// # Errors
/// CUDA was requested and is not available; the error says why.
pub fn device(choice: DeviceChoice) -> Result<Device> {
    let count = cuda_count();
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Auto if count > 0 => Ok(Device::Cuda(0)),
        DeviceChoice::Auto => Ok(Device::Cpu),
        DeviceChoice::Cuda(_) if count == 0 => bail!(
            hinted(
                format!("CUDA was asked for and is not available: {}", cuda_absence().unwrap_or_default()),
                "run `proxykv-train doctor`; `scripts/setup.sh --cuda` installs libtorch's CUDA libraries"
            )
            .environment()
        ),
        DeviceChoice::Cuda(i) => {
            ensure!(
                i < count,
                hinted(
                    format!("there is no GPU {i}; {count} found"),
                    "count GPUs from 0, or pass `--device cuda`"
                )
                .environment()
            );
            Ok(Device::Cuda(i))
        }
    }
}

/// The dtype a model computes in on `device`.
pub fn kind_on(device: Device, dtype: DtypeName) -> Kind {
    match (dtype, device) {
        (DtypeName::F32, _) | (DtypeName::Auto, Device::Cpu) => Kind::Float,
        _ => Kind::BFloat16,
    }
}

/// Another GPU than this one, if there is one.
pub fn next_gpu(device: Device) -> Option<Device> {
    match device {
        Device::Cuda(gpu) if cuda_count() > 1 => Some(Device::Cuda((gpu + 1) % cuda_count())),
        _ => None,
    }
}

/// As [`DeviceChoice`] spells it.
pub fn device_name(device: Device) -> String {
    match device {
        Device::Cuda(i) => format!("cuda:{i}"),
        _ => "cpu".to_owned(),
    }
}

/// As [`DeviceGroup`] spells them.
pub fn devices_name(devices: &[Device]) -> String {
    devices.iter().map(|&device| device_name(device)).collect::<Vec<_>>().join("+")
}

/// The device as a reader elsewhere knows it: the GPU's model, or how many threads of a CPU.
pub fn device_in_words(device: Device) -> String {
    match device {
        Device::Cuda(i) => crate::model_name(i).unwrap_or_else(|| "a CUDA GPU".to_owned()),
        _ => cpu_in_words(),
    }
}

/// `1 CPU thread`, `2 CPU threads`.
pub fn cpu_in_words() -> String {
    let threads = tch::get_num_threads();
    format!("{threads} CPU {}", if threads == 1 { "thread" } else { "threads" })
}

/// GPUs that libtorch can use.
pub fn cuda_count() -> usize {
    // SAFETY: no arguments; returns a count.
    unsafe { shim::pkv_cuda_count() }.max(0) as usize
}

/// Why there is no CUDA; `None` if there is.
pub fn cuda_absence() -> Option<String> {
    if cuda_count() > 0 {
        return None;
    }
    let reason = shim::boot_error();
    Some(if reason.is_empty() { "the driver reports no usable GPU".to_owned() } else { reason })
}

/// Wait until all work queued on `device` is done; nothing to wait for on a CPU.
///
/// # Errors
/// A kernel queued before failed.
pub fn synchronize(device: Device) -> Result<()> {
    match device {
        // SAFETY: a plain index.
        Device::Cuda(i) => shim::check(unsafe { shim::pkv_cuda_sync(i as i32) }),
        _ => Ok(()),
    }
}

/// Allow TF32 in f32 matrix products and convolutions on CUDA, process-wide.
pub fn set_tf32(on: bool) -> Result<()> {
    // SAFETY: a flag.
    shim::check(unsafe { shim::pkv_tf32(on.into()) })?;
    TF32.store(on, Ordering::Relaxed);
    Ok(())
}

static TF32: AtomicBool = AtomicBool::new(false);

/// Is TF32 allowed? For our own kernels, which must not be less exact than libtorch's.
pub(crate) fn tf32() -> bool {
    TF32.load(Ordering::Relaxed)
}

/// Work is queued on a GPU, and no other thread may change meanwhile whether TF32 is allowed: the choice is
/// the process's, and a mapper that learns and a model that reads contexts beside it choose differently.
///
/// A thread that holds one must not wait for a thread that wants one.
pub struct MathMode {
    before: bool,
    _alone: MutexGuard<'static, ()>,
}

impl MathMode {
    /// As it is. Nothing on a CPU, where there is no TF32.
    pub fn as_set(device: Device) -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        // The lock guards no data that a panic could leave in pieces.
        let lock = || ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        device.is_cuda().then(lock).map(|alone| Self { before: tf32(), _alone: alone })
    }

    /// Without TF32 until it is dropped. Nothing on a CPU.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn exact(device: Device) -> Result<Option<Self>> {
        let held = Self::as_set(device);
        if held.is_some() {
            set_tf32(false)?;
        }
        Ok(held)
    }
}

impl Drop for MathMode {
    fn drop(&mut self) {
        // It cannot fail: it sets two flags.
        let _ = set_tf32(self.before);
    }
}

/// The name that the driver gives GPU `i`, where all of them are visible.
pub fn model_name(i: usize) -> Option<String> {
    let mut folders: Vec<_> =
        std::fs::read_dir("/proc/driver/nvidia/gpus").ok()?.filter_map(|e| Some(e.ok()?.path())).collect();
    folders.sort();
    // Hidden GPUs shift the indices, so that a name could belong to another one.
    (folders.len() == cuda_count()).then_some(())?;
    let text = std::fs::read_to_string(folders.get(i)?.join("information")).ok()?;
    text.lines().find_map(|l| l.strip_prefix("Model:")).map(|m| m.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Flags and a lock alone: no GPU is needed.
    #[test]
    fn one_thread_at_a_time_chooses_how_exact_products_are() {
        let gpu = Device::Cuda(0);
        let held = MathMode::exact(gpu).unwrap().unwrap();
        let (to, done) = std::sync::mpsc::channel();
        let other = std::thread::spawn(move || {
            drop(MathMode::as_set(gpu));
            to.send(()).unwrap();
        });
        assert!(done.recv_timeout(std::time::Duration::from_millis(50)).is_err(), "two at a time");
        drop(held);
        done.recv().unwrap();
        other.join().unwrap();
        // A CPU's threads do not wait for each other.
        let cpu = MathMode::exact(Device::Cpu).unwrap();
        assert!(cpu.is_none() && MathMode::as_set(Device::Cpu).is_none());
    }

    #[test]
    fn devices_are_parsed() {
        assert_eq!("auto".parse::<DeviceChoice>().unwrap(), DeviceChoice::Auto);
        assert_eq!("cuda:3".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cuda(3));
        assert!("gpu".parse::<DeviceChoice>().is_err());
        assert!("cuda:x".parse::<DeviceChoice>().is_err());
        let group = "cuda:0+cuda:2".parse::<DeviceGroup>().unwrap();
        assert_eq!((group.single(), group.to_string().as_str()), (None, "cuda:0+cuda:2"));
        assert_eq!("cpu+cpu".parse::<DeviceGroup>().unwrap().devices().unwrap(), [Device::Cpu; 2]);
        assert_eq!("auto".parse::<DeviceGroup>().unwrap(), DeviceGroup::one(DeviceChoice::Auto));
        assert_eq!(devices_name(&[Device::Cuda(0), Device::Cuda(2)]), group.to_string());
        for odd in ["cuda:0+cpu", "auto+cuda:1", "cuda:0+", "+"] {
            assert!(odd.parse::<DeviceGroup>().is_err(), "{odd}");
        }
    }

    #[test]
    fn asking_for_absent_cuda_is_an_error_with_a_reason() {
        if cuda_count() == 0 {
            assert!(device(DeviceChoice::Cuda(0)).unwrap_err().to_string().contains("not available: "));
            assert_eq!(device(DeviceChoice::Auto).unwrap(), Device::Cpu);
        } else {
            assert_eq!(device(DeviceChoice::Auto).unwrap(), Device::Cuda(0));
            assert!(device(DeviceChoice::Cuda(cuda_count())).is_err());
        }
    }
}
