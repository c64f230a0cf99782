//! One run at work: the recipe, the run folder, the models, the device, and the cancellation flag.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};
use pkv_core::{Fingerprint, Hinted, Progress, Source, Stop, hinted};
use pkv_gpu::{DeviceChoice, DeviceGroup, device_name, devices_name};
use pkv_hub::{Hub, Lock};
use pkv_lm::spread;
use pkv_recipe::plan::{Machine, TargetMemory, human_bytes};
use pkv_recipe::{DtypeName, Manifest, Origins, Override, Recipe};
use pkv_score::ModelFiles;
use pkv_shard::{RunJson, Stage};
use tch::{Device, Kind};

use crate::RunFolder;
use crate::feature_workers::FeatureWorkers;
use crate::stages::Part;

/// Choices of a session that no recipe makes.
pub struct Choices<'a> {
    /// The run folder's parent.
    pub runs: &'a Path,
    pub devices: Devices,
    pub bar: Box<dyn Progress>,
    pub stop: Stop,
    pub part: Part,
}

/// Inputs of every stage, opened once.
pub struct Session {
    pub recipe: Recipe,
    pub manifest: Manifest,
    pub run: RunFolder,
    pub hub: Hub,
    /// Where everything computes but the target's layers; where they are on several devices, the last of
    /// these.
    pub device: Device,
    /// Those of the target's layers.
    pub target_devices: Vec<Device>,
    pub bar: Box<dyn Progress>,
    pub stop: Stop,
    pub part: Part,
    /// Who makes features while the mapper is trained on them, if not this process.
    pub feature_workers: Option<FeatureWorkers>,
    /// Whether what is found out is written to `run.json`; a session that only plans writes nothing.
    records: bool,
    /// The run folder was absent, and is this session's own.
    made: bool,
    target: OnceLock<Arc<ModelFiles>>,
    proxy: OnceLock<Arc<ModelFiles>>,
    documents: OnceLock<Fingerprint>,
}

impl Session {
    /// Read the manifest of `recipe`, make the run folder.
    ///
    /// # Errors
    /// The manifest is invalid, or the run folder cannot be made.
    pub fn open(recipe: Recipe, choices: Choices) -> Result<Self> {
        let mut session = Self::planned(recipe, choices)?;
        // Tasks of a stage start together: the folder is no one's own.
        let is_own = session.part.task.is_none() && !pkv_files::is_mounted(session.run.root());
        session.made = is_own && !session.run.root().exists();
        session.run.make()?;
        session.run.record_start(&session.recipe, &session.target_devices)?;
        session.records = true;
        Ok(session)
    }

    /// As [`Session::open`], to find out what a run would do: nothing is written.
    ///
    /// # Errors
    /// The manifest is invalid.
    pub fn planned(recipe: Recipe, choices: Choices) -> Result<Self> {
        let (manifest, manifest_path) = manifest(&recipe)?;
        let mut lock = Lock::beside(&recipe.path)?;
        for path in manifest_path.into_iter().chain(benchmark_manifest_path(&recipe)) {
            lock = lock.merge(Lock::beside(&path)?)?;
        }
        let hub = Hub::from_env().with_lock(lock);
        let run = RunFolder::new(&choices.runs.join(&recipe.name));
        let Choices { devices, bar, stop, part, .. } = choices;
        let target_devices = devices.of_target(&recipe)?;
        let device = target_devices.last().copied().unwrap_or(Device::Cpu);
        let (target, proxy, documents) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
        let (records, made, feature_workers) = (false, false, None);
        Ok(Self {
            recipe,
            manifest,
            run,
            hub,
            device,
            target_devices,
            bar,
            stop,
            part,
            feature_workers,
            records,
            made,
            target,
            proxy,
            documents,
        })
    }

    /// Change `run.json`, unless this session only plans.
    ///
    /// # Errors
    /// `run.json` cannot be written.
    pub(crate) fn record(&self, change: impl Fn(&mut RunJson)) -> Result<()> {
        if self.records { self.run.record(change) } else { Ok(()) }
    }

    /// The place of a model that is found once in a session.
    pub(crate) fn found(&self, role: Source) -> &OnceLock<Arc<ModelFiles>> {
        match role {
            Source::Target => &self.target,
            Source::Proxy => &self.proxy,
        }
    }

    /// Identity of the manifest's documents; their files are hashed once in a session.
    ///
    /// # Errors
    /// A file is absent or cannot be read.
    pub fn documents(&self) -> Result<&Fingerprint> {
        if let Some(known) = self.documents.get() {
            return Ok(known);
        }
        let found = pkv_data::inputs(&self.manifest, &self.hub)?;
        Ok(self.documents.get_or_init(|| found))
    }

    /// Devices that a stage works on.
    pub(crate) fn devices_of(&self, stage: Stage) -> &[Device] {
        match stage {
            Stage::Label | Stage::Extract | Stage::Eval => &self.target_devices,
            _ => std::slice::from_ref(&self.device),
        }
    }

    /// The recipe's dtype of a model.
    pub(crate) fn dtype(&self, role: Source) -> DtypeName {
        let proxy = self.recipe.proxy.as_ref().filter(|_| role == Source::Proxy);
        proxy.unwrap_or(&self.recipe.target).dtype
    }

    /// The dtype a model computes in on this device.
    pub fn kind(&self, role: Source) -> Kind {
        pkv_gpu::kind_on(self.device, self.dtype(role))
    }
}

impl Drop for Session {
    /// A run that failed before it made anything leaves no folder.
    fn drop(&mut self) {
        if self.made && self.run.is_bare() {
            // What cannot be removed does no harm.
            let _ = pkv_files::remove_whole(self.run.root());
        }
    }
}

/// Read a recipe, and refuse what it names and this program does not have, before any work.
///
/// # Errors
/// The recipe is invalid, or names an unknown scorer, method or task.
pub fn load_recipe(path: &Path, overrides: &[Override]) -> Result<Recipe> {
    Ok(load_with_origins(path, overrides)?.0)
}

/// As [`load_recipe`], and where each value was set.
///
/// # Errors
/// As of [`load_recipe`].
pub fn load_with_origins(path: &Path, overrides: &[Override]) -> Result<(Recipe, Origins)> {
    let (recipe, origins) = pkv_recipe::load_with_origins(path, overrides)?;
    pkv_score::check(&recipe.label)
        .and_then(|()| pkv_eval::methods::check(&recipe.eval.methods))
        .and_then(|()| pkv_eval::tasks::check(&recipe.eval))
        .map_err(|e| origins.place(e, format!("invalid recipe `{}`", path.display())))?;
    Ok((recipe, origins))
}

/// The manifest as the recipe names it, from the working directory or from the folder above the recipe's,
/// or beside the recipe, with its path; or that of the documents which the recipe names itself.
///
/// # Errors
/// It cannot be read, or names no documents.
pub fn manifest(recipe: &Recipe) -> Result<(Manifest, Option<PathBuf>)> {
    if !recipe.data.files.is_empty() {
        let manifest = Manifest::of_files(&recipe.data.files).context("cannot use `data.files`")?;
        return Ok((manifest, None));
    }
    let path = project_path(recipe, &recipe.data.manifest);
    let manifest = pkv_recipe::load_manifest(&path);
    let manifest = if path.exists() { manifest } else { manifest.with_context(|| nowhere(recipe, &path)) };
    Ok((manifest?, Some(path)))
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
    above_and_beside(recipe, path).into_iter().find(|place| place.exists()).unwrap_or(direct)
}

/// Other places where a recipe's file may be than the working directory.
fn above_and_beside(recipe: &Recipe, path: &str) -> [PathBuf; 2] {
    [recipe.root().join(path), recipe.path.with_file_name(path)]
}

fn nowhere(recipe: &Recipe, path: &Path) -> Hinted {
    let [above, beside] = above_and_beside(recipe, &path.to_string_lossy());
    hinted(
        format!(
            "`data.manifest` is in none of three places: `{}`, `{}`, `{}`",
            path.display(),
            above.display(),
            beside.display()
        ),
        "check `data.manifest`; manifests live in `data-manifests/`; `--data 'my/*.txt'` needs none",
    )
}

/// The devices that a user chose for one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Devices {
    /// These; several share the target's layers.
    Named(Vec<Device>),
    /// This one, and others where it has no room for the target.
    From(Device),
}

impl Devices {
    /// Those that were chosen, before any is added.
    pub fn list(self) -> Vec<Device> {
        match self {
            Self::Named(devices) => devices,
            Self::From(device) => vec![device],
        }
    }

    /// Those of the target's layers, on the recipe's longest contexts.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn of_target(self, recipe: &Recipe) -> Result<Vec<Device>> {
        let first = match self {
            Self::Named(devices) => return Ok(devices),
            Self::From(device) => device,
        };
        let memory = target_memory(recipe, first);
        let Some(devices) = spread(first, recipe.target.shape.layers, &memory.needs())? else {
            return Ok(vec![first]);
        };
        tracing::info!(
            "the target needs {} with its cache, more than {} has free: its layers go over {}",
            human_bytes(memory.on_one()),
            device_name(first),
            devices_name(&devices)
        );
        Ok(devices)
    }
}

/// What the target needs in `label`.
pub(crate) fn target_memory(recipe: &Recipe, device: Device) -> TargetMemory {
    let machine = if device.is_cuda() { Machine::h200() } else { Machine::cpu(1) };
    TargetMemory::of_label(recipe, recipe.data.longest_window(), &machine, pkv_score::work(&recipe.label))
}

/// The devices that the user chose, said in the log: never a silent fallback.
///
/// # Errors
/// As of [`devices`].
pub fn choose_devices(group: &DeviceGroup, threads: Option<u32>) -> Result<Devices> {
    let devices = devices(group, threads)?;
    match &devices {
        Devices::From(Device::Cpu) => {
            let why = pkv_gpu::cuda_absence().unwrap_or_default();
            tracing::info!("computing on the CPU, {} ({why})", pkv_gpu::cpu_in_words());
        }
        Devices::From(device) => tracing::info!("computing on {}", device_name(*device)),
        Devices::Named(all) if all.len() == 1 => tracing::info!("computing on {}", device_name(all[0])),
        Devices::Named(all) => {
            tracing::info!("computing on {}, which share the target's layers", devices_name(all))
        }
    }
    Ok(devices)
}

/// The same for what only asks about them. Sets the number of threads, too.
///
/// # Errors
/// CUDA was asked for and is absent, or there are too many threads.
pub fn devices(group: &DeviceGroup, threads: Option<u32>) -> Result<Devices> {
    if let Some(threads) = threads {
        tch::set_num_threads(i32::try_from(threads).context("`--threads` is too large")?.max(1));
    }
    Ok(match group.single() {
        Some(DeviceChoice::Auto) => Devices::From(pkv_gpu::device(DeviceChoice::Auto)?),
        _ => Devices::Named(group.devices()?),
    })
}
