//! `doctor`: what this machine has, and whether it is what a recipe needs.
//!
//! Looks and never changes anything: no folder is made, nothing is downloaded. Each check says what
//! it found and, where something is amiss, the command or edit that repairs it. Needs of a recipe
//! come from `plan`, which knows them without opening a model.

use std::fmt::Write;
use std::fs;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::Error;
use pkv_core::Hinted;
use pkv_hub::{Hub, Lock};
use pkv_lm::{LmConfig, TextTokenizer};
use pkv_recipe::plan::{Machine, Plan, human_bytes, human_secs};
use pkv_recipe::{ModelSection, Recipe};
use serde::Serialize;
use tch::Device;

use crate::session::{manifest_path, recipe_root};

/// The libtorch that this program was built against; another one may crash.
const LIBTORCH: &str = "2.11.0";
/// Time for the hub to accept a connection, name look-up included.
const CONNECT_WITHIN: Duration = Duration::from_secs(4);
/// Free space that a run of unknown size should find.
const SPARE_DISK: u64 = 5_000_000_000;
/// A plan that takes longer than this on a CPU was hardly meant for one.
const LONG_SECS: f64 = 12.0 * 3600.0;

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: String,
    pub status: Status,
    /// What was found.
    pub detail: String,
    /// What repairs it; empty where nothing is amiss.
    pub hint: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Ok,
    /// It works, but slower or with less than one may expect.
    Warn,
    /// A stage would fail.
    Fail,
}

/// Look at everything; with a recipe also at its models, its data, and whether its plan fits.
///
/// `runs` is the folder that run folders are made in; it need not exist.
pub fn checks(recipe: Option<&Recipe>, device: Device, runs: &Path) -> Vec<Check> {
    let plan = recipe.map(|r| Plan::new(r, machine(device)));
    let mut out = vec![libtorch()];
    out.extend(gpus());
    out.push(cpu());
    out.push(memory(device, plan.as_ref()));
    out.push(disk(runs, plan.as_ref()));
    let hub = Hub::from_env();
    out.push(hub_access(&hub));
    if let (Some(recipe), Some(plan)) = (recipe, &plan) {
        out.extend(needs(recipe, hub));
        out.push(time(device, plan));
    }
    out
}

/// No check failed.
pub fn all_well(checks: &[Check]) -> bool {
    checks.iter().all(|c| c.status != Status::Fail)
}

/// The checks as lines for a terminal, ending in a line break.
pub fn table(checks: &[Check]) -> String {
    let width = checks.iter().map(|c| c.name.len()).max().unwrap_or(0);
    let mut out = String::new();
    for c in checks {
        let status = match c.status {
            Status::Ok => "ok  ",
            Status::Warn => "warn",
            Status::Fail => "FAIL",
        };
        let _ = writeln!(out, "{status}  {:width$}  {}", c.name, c.detail);
        if !c.hint.is_empty() {
            let _ = writeln!(out, "      {:width$}  hint: {}", "", c.hint);
        }
    }
    out
}

impl Check {
    fn ok(name: &str, detail: impl Into<String>) -> Self {
        Self { name: name.to_owned(), status: Status::Ok, detail: detail.into(), hint: String::new() }
    }

    fn warn(name: &str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name: name.to_owned(), status: Status::Warn, detail: detail.into(), hint: hint.into() }
    }

    fn fail(name: &str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { status: Status::Fail, ..Self::warn(name, detail, hint) }
    }

    /// A failure with the hint that the error carries.
    fn error(name: &str, e: &Error) -> Self {
        let hinted =
            e.downcast_ref::<Hinted>().or_else(|| e.chain().find_map(|c| c.downcast_ref::<Hinted>()));
        Self::fail(name, format!("{e:#}"), hinted.map_or("", Hinted::hint))
    }
}

fn machine(device: Device) -> Machine {
    match device {
        Device::Cpu => Machine::cpu(tch::get_num_threads().max(1) as usize),
        _ => Machine::h200(),
    }
}

/// The library that is loaded, not the one that should be.
fn libtorch() -> Check {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let Some(library) = mapped(&maps, "libtorch_cpu.so") else {
        return Check::warn("libtorch", "its place cannot be told from `/proc/self/maps`", "");
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

fn gpus() -> Vec<Check> {
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
                let model = gpu_model(i).map_or_else(String::new, |model| format!("{model}, "));
                let bytes = |n: i64| human_bytes(n.max(0) as u64);
                Check::ok(&name, format!("{model}{} free of {}", bytes(m.free), bytes(m.total)))
            }
            Err(e) => Check::fail(&name, format!("{e:#}"), "another process may hold it; see `nvidia-smi`"),
        }
    };
    (0..pkv_gpu::cuda_count()).map(gpu).collect()
}

/// The name that the driver gives GPU `i`, where all of them are visible.
fn gpu_model(i: usize) -> Option<String> {
    let mut folders: Vec<_> =
        fs::read_dir("/proc/driver/nvidia/gpus").ok()?.filter_map(|e| Some(e.ok()?.path())).collect();
    folders.sort();
    // Hidden GPUs shift the indices, so that a name could belong to another one.
    (folders.len() == pkv_gpu::cuda_count()).then_some(())?;
    let text = fs::read_to_string(folders.get(i)?.join("information")).ok()?;
    text.lines().find_map(|l| l.strip_prefix("Model:")).map(|m| m.trim().to_owned())
}

fn cpu() -> Check {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = tch::get_num_threads();
    let detail = format!("{threads} threads for {cores} cores");
    if threads as usize > cores {
        Check::warn("cpu", detail, "more threads than cores slow each other down; pass `--threads`")
    } else {
        Check::ok("cpu", detail)
    }
}

/// The memory that the plan's largest stage needs, on the device it runs on.
fn memory(device: Device, plan: Option<&Plan>) -> Check {
    let (free, total) = match device {
        Device::Cuda(i) => match pkv_gpu::cuda_memory(i) {
            Ok(m) => (m.free.max(0) as u64, m.total.max(0) as u64),
            Err(e) => return Check::error("memory", &e),
        },
        _ => {
            let Some(memory) = host_memory() else {
                return Check::warn("memory", "`/proc/meminfo` cannot be read", "");
            };
            memory
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

/// Free and total memory of this machine, or of the container if that has less.
fn host_memory() -> Option<(u64, u64)> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let (mut free, mut total) = (meminfo(&text, "MemAvailable")?, meminfo(&text, "MemTotal")?);
    let read =
        |file: &str| fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?.trim().parse::<u64>().ok();
    if let Some(limit) = read("memory.max") {
        total = total.min(limit);
        free = free.min(limit.saturating_sub(read("memory.current").unwrap_or(0)));
    }
    Some((free, total))
}

/// Bytes of a line `key:   123 kB`.
fn meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

fn disk(runs: &Path, plan: Option<&Plan>) -> Check {
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

fn hub_access(hub: &Hub) -> Check {
    let options = hub.options();
    let cache = options.cache.display();
    if options.offline {
        return Check::ok("hub", format!("offline by HF_HUB_OFFLINE; cache `{cache}`"));
    }
    let proxy =
        ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"].iter().find_map(|v| std::env::var(v).ok());
    let address = proxy.filter(|p| !p.is_empty()).unwrap_or_else(|| options.endpoint.clone());
    match authority(&address).map(connect) {
        Some(Ok(())) => Check::ok("hub", format!("`{}` answers; cache `{cache}`", options.endpoint)),
        Some(Err(why)) => Check::warn(
            "hub",
            format!("`{}` is out of reach ({why}); cache `{cache}`", options.endpoint),
            "what is in the cache or named by a local path works; `HF_ENDPOINT` names a mirror",
        ),
        None => Check::fail(
            "hub",
            format!("HF_ENDPOINT is `{}`, which is no address", options.endpoint),
            "write it as `https://huggingface.co`",
        ),
    }
}

/// Host and port of an address.
fn authority(address: &str) -> Option<(String, u16)> {
    let (scheme, rest) = address.split_once("://")?;
    let host = rest.split(['/', '?']).next()?;
    let host = host.rsplit_once('@').map_or(host, |(_, h)| h);
    let default = if scheme == "https" { 443 } else { 80 };
    let (host, port) = match host.rsplit_once(':') {
        Some((h, port)) if !port.ends_with(']') => (h, port.parse().ok()?),
        _ => (host, default),
    };
    (!host.is_empty()).then(|| (host.trim_matches(['[', ']']).to_owned(), port))
}

/// Open a connection and close it; the look-up of the name has no time limit of its own, so all of it
/// happens on another thread.
fn connect(to: (String, u16)) -> Result<(), String> {
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        let attempt = || -> std::io::Result<()> {
            let address = to.to_socket_addrs()?.next().ok_or(std::io::ErrorKind::NotFound)?;
            TcpStream::connect_timeout(&address, CONNECT_WITHIN).map(drop)
        };
        // Nobody listens any more once the time is up.
        let _ = send.send(attempt().map_err(|e| e.to_string()));
    });
    receive.recv_timeout(CONNECT_WITHIN).unwrap_or_else(|_| Err("no answer in time".to_owned()))
}

/// Models and data of the recipe: there, of the stated shape, of one vocabulary.
fn needs(recipe: &Recipe, hub: Hub) -> Vec<Check> {
    let manifest_path = manifest_path(recipe);
    let lock = Lock::beside(&recipe.path).and_then(|l| l.merge(Lock::beside(&manifest_path)?));
    let hub = match lock {
        Ok(lock) => hub.with_lock(lock),
        Err(e) => return vec![Check::error("lock", &e)],
    };
    let (target, proxy) =
        (model("target", &recipe.target, recipe, &hub), model("proxy", &recipe.proxy, recipe, &hub));
    let vocabulary = match (&target, &proxy) {
        (Ok((_, a)), Ok((_, b))) => Some(vocabulary(a, b)),
        _ => None,
    };
    let mut out: Vec<Check> = [target, proxy].map(|found| found.map_or_else(|c| c, |(c, _)| c)).into();
    out.extend(vocabulary);
    out.push(
        match pkv_recipe::load_manifest(&manifest_path).and_then(|m| Ok((pkv_data::inputs(&m, &hub)?, m))) {
            Ok((_, m)) => Check::ok(
                "data",
                format!("{} sources of `{}` are there", m.sources.len(), manifest_path.display()),
            ),
            Err(e) => Check::error("data", &e),
        },
    );
    out
}

/// One of the recipe's models, and its folder.
fn model(role: &str, section: &ModelSection, recipe: &Recipe, hub: &Hub) -> Result<(Check, PathBuf), Check> {
    let look = || -> anyhow::Result<PathBuf> {
        let found = hub.model(&section.model, &section.revision, &[Path::new(""), &recipe_root(recipe)])?;
        LmConfig::from_folder(&found.folder)?.check_shape(&section.shape, role)?;
        Ok(found.folder)
    };
    match look() {
        Ok(folder) => {
            let detail = format!("`{}`, {}, in `{}`", section.model, section.shape, folder.display());
            Ok((Check::ok(role, detail), folder))
        }
        Err(e) => Err(Check::error(role, &e)),
    }
}

/// Labels and features meet position by position, so both models must tokenize alike.
fn vocabulary(target: &Path, proxy: &Path) -> Check {
    let compare = || -> anyhow::Result<usize> {
        let target = TextTokenizer::open(target)?;
        target.same_vocab(&TextTokenizer::open(proxy)?)?;
        Ok(target.vocab_size())
    };
    match compare() {
        Ok(n) => Check::ok("vocabulary", format!("shared by target and proxy, {n} tokens")),
        Err(e) => Check::error("vocabulary", &e),
    }
}

fn time(device: Device, plan: &Plan) -> Check {
    let detail =
        format!("about {} on {} (`plan` shows the stages)", human_secs(plan.secs()), plan.machine.name);
    if device == Device::Cpu && plan.secs() > LONG_SECS {
        Check::warn(
            "time",
            detail,
            "this pair is meant for a GPU; `recipes/demo-nano.toml` runs on a CPU in minutes",
        )
    } else {
        Check::ok("time", detail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let memory = "MemTotal:       24000000 kB\nMemAvailable:    1000 kB\n";
        assert_eq!((meminfo(memory, "MemAvailable"), meminfo(memory, "Mem")), (Some(1_024_000), None));
    }

    #[test]
    fn addresses_have_hosts_and_ports() {
        let of = |a: &str| authority(a).map(|(h, p)| format!("{h} {p}"));
        assert_eq!(of("https://huggingface.co").as_deref(), Some("huggingface.co 443"));
        assert_eq!(of("http://user:word@mirror:8080/hf").as_deref(), Some("mirror 8080"));
        assert_eq!(of("http://[::1]:9/x").as_deref(), Some("::1 9"));
        assert_eq!(of("http://[::1]").as_deref(), Some("::1 80"));
        assert_eq!((of("huggingface.co"), of("https://"), of("http://x:port")), (None, None, None));
    }

    #[test]
    fn only_failures_count_and_hints_have_a_line() {
        let checks = [Check::ok("cpu", "2 threads"), Check::warn("hub", "out of reach", "use a mirror")];
        assert!(all_well(&checks));
        assert_eq!(
            table(&checks),
            "ok    cpu  2 threads\nwarn  hub  out of reach\n           hint: use a mirror\n"
        );
        assert!(!all_well(&[Check::fail("disk", "full", "")]));
        let e = Error::from(pkv_core::hinted("no model", "fetch it")).context("cannot look");
        let check = Check::error("target", &e);
        assert_eq!((check.detail.as_str(), check.hint.as_str()), ("cannot look: no model", "fetch it"));
    }

    #[test]
    fn a_place_that_does_not_exist_yet_has_the_disk_above_it() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(existing(&dir.path().join("a/b")), dir.path());
        let check = disk(&dir.path().join("a/b"), None);
        assert!(check.detail.contains("free for"), "{check:?}");
    }

    #[test]
    fn a_machine_without_a_recipe_is_looked_at_whole() {
        let device = pkv_gpu::device(pkv_gpu::DeviceChoice::Cpu).unwrap();
        let found = checks(None, device, Path::new("."));
        for name in ["libtorch", "cpu", "memory", "disk", "hub"] {
            assert!(found.iter().any(|c| c.name == name), "{name}");
        }
        assert!(found.iter().any(|c| c.name.starts_with("gpu")));
    }
}
