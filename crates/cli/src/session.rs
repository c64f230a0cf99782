//! One invocation: the recipe, the run folder, the device, and the cancellation flag.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pkv_core::hinted;
use pkv_gpu::DeviceChoice;
use pkv_hub::{Hub, Lock};
use pkv_recipe::{DtypeName, Manifest, Origins, Override, Recipe};
use tch::{Device, Kind};

use crate::args::{Cli, RecipeArgs};
use crate::render::Interrupted;
use crate::run_folder::RunFolder;
use crate::terminal::{self, Bar};

/// Inputs of every stage, opened once.
pub struct Session {
    pub recipe: Recipe,
    pub manifest: Manifest,
    pub run: RunFolder,
    pub hub: Hub,
    pub device: Device,
    pub json: bool,
    pub bar: Bar,
    stop: Arc<AtomicBool>,
}

impl Session {
    /// Read the recipe and its manifest, make the run folder, choose the device.
    ///
    /// # Errors
    /// The recipe or manifest is invalid, CUDA was asked for and is absent, or the run folder cannot be made.
    pub fn open(cli: &Cli, args: &RecipeArgs, stop: Arc<AtomicBool>) -> Result<Self> {
        let recipe = load_recipe(&args.recipe, &args.overrides())?;
        let (manifest, manifest_path) = manifest(&recipe)?;
        let device = choose_device(cli)?;
        let mut lock = Lock::beside(&recipe.path)?;
        for path in manifest_path.into_iter().chain(benchmark_manifest_path(&recipe)) {
            lock = lock.merge(Lock::beside(&path)?)?;
        }
        let hub = Hub::from_env().with_lock(lock);
        let run = RunFolder::open(&cli.runs.join(&recipe.name))?;
        terminal::log_to(&run.log())?;
        run.record_start(&recipe, device)?;
        Ok(Self { recipe, manifest, run, hub, device, json: cli.json, bar: Bar::new(), stop })
    }

    /// # Errors
    /// [`Interrupted`] if the user asked to stop.
    pub fn check_stop(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) { Err(Interrupted.into()) } else { Ok(()) }
    }

    pub fn stop_flag(&self) -> &AtomicBool {
        &self.stop
    }

    /// The dtype a model computes in on this device.
    pub fn kind(&self, dtype: DtypeName) -> Kind {
        kind_on(self.device, dtype)
    }
}

/// Read a recipe, and refuse what it names and this program does not have, before any work.
///
/// # Errors
/// The recipe is invalid, or names an unknown method or task.
pub fn load_recipe(path: &Path, overrides: &[Override]) -> Result<Recipe> {
    Ok(load_with_origins(path, overrides)?.0)
}

/// As [`load_recipe`], and where each value was set.
///
/// # Errors
/// As of [`load_recipe`].
pub fn load_with_origins(path: &Path, overrides: &[Override]) -> Result<(Recipe, Origins)> {
    let (recipe, origins) = pkv_recipe::load_with_origins(path, overrides)?;
    pkv_eval::methods::check(&recipe.eval.methods)
        .and_then(|()| pkv_eval::tasks::check(&recipe.eval))
        .map_err(|e| origins.place(e, format!("invalid recipe `{}`", path.display())))?;
    Ok((recipe, origins))
}

/// The dtype a model computes in on `device`.
pub fn kind_on(device: Device, dtype: DtypeName) -> Kind {
    match (dtype, device) {
        (DtypeName::F32, _) | (DtypeName::Auto, Device::Cpu) => Kind::Float,
        _ => Kind::BFloat16,
    }
}

/// The manifest as the recipe names it, from the working directory or from the folder above the recipe's,
/// with its path; or that of the documents which the recipe names itself.
///
/// # Errors
/// It cannot be read, or names no documents.
pub fn manifest(recipe: &Recipe) -> Result<(Manifest, Option<PathBuf>)> {
    if !recipe.data.files.is_empty() {
        let manifest = Manifest::of_files(&recipe.data.files).context("cannot use `data.files`")?;
        return Ok((manifest, None));
    }
    let path = project_path(recipe, &recipe.data.manifest);
    Ok((pkv_recipe::load_manifest(&path)?, Some(path)))
}

/// The manifest of the benchmarks' files, found as [`manifest`]'s is; `None` if the recipe names none.
pub fn benchmark_manifest_path(recipe: &Recipe) -> Option<PathBuf> {
    let manifest = &recipe.eval.benchmark.manifest;
    (!manifest.is_empty()).then(|| project_path(recipe, manifest))
}

fn project_path(recipe: &Recipe, path: &str) -> PathBuf {
    let direct = PathBuf::from(path);
    if direct.exists() {
        return direct;
    }
    let beside = recipe_root(recipe).join(path);
    if beside.exists() { beside } else { direct }
}

/// The project that a recipe belongs to: the folder above the recipe's own.
pub fn recipe_root(recipe: &Recipe) -> PathBuf {
    let folder = recipe.path.parent().unwrap_or(std::path::Path::new(""));
    folder.join("..")
}

/// The device the user chose, said in the log: never a silent fallback.
pub fn choose_device(cli: &Cli) -> Result<Device> {
    if let Some(threads) = cli.threads {
        tch::set_num_threads(i32::try_from(threads).context("`--threads` is too large")?.max(1));
    }
    let device = pkv_gpu::device(cli.device)?;
    if cli.device == DeviceChoice::Auto && device == Device::Cpu {
        let why = pkv_gpu::cuda_absence().unwrap_or_default();
        tracing::info!("computing on the CPU with {} threads ({why})", tch::get_num_threads());
    } else {
        tracing::info!("computing on {}", device_name(device));
    }
    Ok(device)
}

/// Another GPU than this one, if there is one.
pub fn next_gpu(device: Device) -> Option<Device> {
    match device {
        Device::Cuda(gpu) if pkv_gpu::cuda_count() > 1 => {
            Some(Device::Cuda((gpu + 1) % pkv_gpu::cuda_count()))
        }
        _ => None,
    }
}

pub fn device_name(device: Device) -> String {
    match device {
        Device::Cuda(i) => format!("cuda:{i}"),
        _ => "cpu".to_owned(),
    }
}

/// The device as a reader elsewhere knows it: the GPU's model, or how many threads of a CPU.
pub fn device_in_words(device: Device) -> String {
    match device {
        Device::Cuda(i) => crate::doctor::gpu_model(i).unwrap_or_else(|| "a CUDA GPU".to_owned()),
        _ => format!("{} CPU threads", tch::get_num_threads()),
    }
}

/// A flag that Ctrl-C and SIGTERM raise; a second signal, given time to read the first one's answer,
/// ends the process at once.
pub fn stop_on_signal() -> Result<Arc<AtomicBool>> {
    /// `timeout` and some shells send one signal twice: to the process and to its group.
    const SAME: Duration = Duration::from_millis(500);
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let mut first = None;
    ctrlc::set_handler(move || {
        let begun = *first.get_or_insert_with(Instant::now);
        if flag.swap(true, Ordering::Relaxed) {
            if begun.elapsed() > SAME {
                // Not `exit`: libtorch's threads are at work, and its destructors would pull the ground from
                // under them.
                // SAFETY: `_exit` ends the process without running anything of it.
                unsafe { libc::_exit(crate::render::INTERRUPTED.into()) }
            }
            return;
        }
        tracing::warn!("stopping after the current example or step; once more to stop at once");
    })
    .with_context(|| {
        hinted("cannot catch Ctrl-C", "run outside of a sandbox that forbids signal handlers")
    })?;
    Ok(stop)
}
