//! Checks of the machine: libtorch, GPUs, threads, memory, disk.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use pkv_gpu::LIBTORCH;
use pkv_recipe::plan::{Plan, human_bytes};
use tch::Device;

use super::Check;

/// Free space that a run of unknown size should find.
const SPARE_DISK: u64 = 5_000_000_000;

/// The library that is loaded, not the one that should be.
pub fn libtorch() -> Check {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let Some(library) = mapped(&maps, "libtorch_cpu.so") else {
        return Check::warn("libtorch", "its place is not in `/proc/self/maps`", "");
    };
    // `torch/lib/libtorch_cpu.so` has `torch/version.py` in a wheel, `torch/build-version` in the archive.
    let root = library.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
    let version = fs::read_to_string(root.join("version.py"))
        .ok()
        .and_then(|text| python_string(&text, "__version__"))
        .or_else(|| fs::read_to_string(root.join("build-version")).ok().map(|t| t.trim().to_owned()));
    let place = library.display();
    match version {
        None => {
            Check::warn("libtorch", format!("of unknown version, `{place}`"), format!("expected {LIBTORCH}"))
        }
        Some(v) if v.starts_with(LIBTORCH) => Check::ok("libtorch", format!("{v}, `{place}`")),
        Some(v) => Check::fail(
            "libtorch",
            format!("{v}, expected {LIBTORCH}, `{place}`"),
            "run `scripts/setup.sh`, then build again",
        ),
    }
}

/// Path of the first mapped file named `name`.
fn mapped(maps: &str, name: &str) -> Option<PathBuf> {
    let path = |line: &str| line.find('/').map(|at| PathBuf::from(line[at..].trim_end()));
    maps.lines().filter_map(path).find(|p| p.file_name().is_some_and(|f| f == name))
}

/// The string that a line `key = '…'` of a Python file assigns.
fn python_string(text: &str, key: &str) -> Option<String> {
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.trim_start().strip_prefix('='))?;
    let text = line.trim().trim_matches(['\'', '"']);
    (!text.is_empty() && text != "None").then(|| text.to_owned())
}

pub fn gpus() -> Vec<Check> {
    if let Some(reason) = pkv_gpu::cuda_absence() {
        let driver = Path::new("/proc/driver/nvidia/version").exists();
        return vec![if driver {
            Check::warn(
                "gpu",
                format!("there is an NVIDIA driver, but no CUDA: {reason}"),
                "`scripts/setup.sh --cuda` installs libtorch's CUDA libraries",
            )
        } else {
            Check::ok("gpu", format!("none, everything runs on the CPU ({reason})"))
        }];
    }
    let gpu = |i: usize| {
        let name = format!("gpu {i}");
        match pkv_gpu::cuda_memory(i) {
            Ok(m) => {
                let model = pkv_gpu::model_name(i).map_or_else(String::new, |model| format!("{model}, "));
                let bytes = |n: i64| human_bytes(n.max(0) as u64);
                Check::ok(&name, format!("{model}{} free of {}", bytes(m.free), bytes(m.total)))
            }
            Err(e) => Check::fail(&name, format!("{e:#}"), "another process may hold it; see `nvidia-smi`"),
        }
    };
    (0..pkv_gpu::cuda_count()).map(gpu).collect()
}

pub fn cpu() -> Check {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = tch::get_num_threads();
    let plural = |n: usize| if n == 1 { "" } else { "s" };
    let detail = format!("{threads} thread{} for {cores} core{}", plural(threads as usize), plural(cores));
    if threads as usize > cores {
        Check::warn("cpu", detail, "more threads than cores slow each other down; pass `--threads`")
    } else {
        Check::ok("cpu", detail)
    }
}

/// The memory that the plan's largest stage needs, on the device it runs on.
pub fn memory(device: Device, plan: Option<&Plan>) -> Check {
    let (free, total) = match device {
        Device::Cuda(i) => match pkv_gpu::cuda_memory(i) {
            Ok(m) => (m.free.max(0) as u64, m.total.max(0) as u64),
            Err(e) => return Check::error("memory", &e),
        },
        _ => {
            let Some(memory) = pkv_gpu::host_memory() else {
                return Check::warn("memory", "`/proc/meminfo` cannot be read", "");
            };
            (memory.free, memory.total)
        }
    };
    let detail = format!("{} free of {}", human_bytes(free), human_bytes(total));
    let Some(stage) = plan.and_then(|p| p.stages.iter().max_by_key(|s| s.peak_bytes)) else {
        return Check::ok("memory", detail);
    };
    let detail = format!("{detail}; `{}` needs about {}", stage.stage, human_bytes(stage.peak_bytes));
    let hint = if stage.stage == "train" {
        "a smaller `train.batch` or shorter `data.window_tokens` need less"
    } else {
        "shorter `data.window_tokens` or a smaller pair need less; another device may have more"
    };
    match stage.peak_bytes {
        n if n > total => Check::fail("memory", detail, hint),
        n if n > free => {
            Check::warn("memory", detail, "close what else runs there, or see `plan` for what needs it")
        }
        _ => Check::ok("memory", detail),
    }
}

pub fn disk(runs: &Path, plan: Option<&Plan>) -> Check {
    let there = existing(runs);
    let free = match rustix::fs::statvfs(&there) {
        Ok(s) => s.f_bavail.saturating_mul(s.f_frsize),
        Err(e) => {
            return Check::warn(
                "disk",
                format!("`{}` cannot be asked for free space: {e}", there.display()),
                "",
            );
        }
    };
    let mut detail = format!("{} free for `{}`", human_bytes(free), runs.display());
    let hint = "choose another place with `--runs`, or make room";
    if rustix::fs::access(&there, rustix::fs::Access::WRITE_OK).is_err() {
        return Check::fail("disk", format!("`{}` cannot be written to", there.display()), hint);
    }
    let Some(plan) = plan else {
        return if free < SPARE_DISK { Check::warn("disk", detail, hint) } else { Check::ok("disk", detail) };
    };
    let needed = plan.run_bytes();
    let _ = write!(detail, "; a run needs at most {}", human_bytes(needed));
    if free < needed { Check::fail("disk", detail, hint) } else { Check::ok("disk", detail) }
}

/// `path` or the nearest folder above it that exists.
fn existing(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    absolute.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/")).to_path_buf()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;

    #[test]
    fn the_loaded_library_is_found_and_of_the_right_version() {
        let _ = pkv_gpu::device(pkv_gpu::DeviceChoice::Auto);
        let check = libtorch();
        assert_eq!(check.status, Status::Ok, "{check:?}");
        assert!(check.detail.starts_with(LIBTORCH), "{}", check.detail);
    }

    #[test]
    fn system_files_are_parsed() {
        let maps =
            "7f00-7f01 r-xp 00000000 08:01 5   /opt/my torch/lib/libtorch_cpu.so\n7f02 rw-p 0 0 0 [heap]\n";
        assert_eq!(mapped(maps, "libtorch_cpu.so"), Some(PathBuf::from("/opt/my torch/lib/libtorch_cpu.so")));
        assert_eq!(mapped(maps, "libcuda.so.1"), None);
        let version =
            "from typing import Optional\n__version__ = '2.11.0+cu130'\ncuda: Optional[str] = None\n";
        assert_eq!(python_string(version, "__version__").as_deref(), Some("2.11.0+cu130"));
    }

    #[test]
    fn a_place_that_does_not_exist_yet_has_the_disk_above_it() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(existing(&dir.path().join("a/b")), dir.path());
        let check = disk(&dir.path().join("a/b"), None);
        assert!(check.detail.contains("free for"), "{check:?}");
    }
}
