//! `fetch`: downloads everything that a recipe or a manifest names into the cache, and writes the lock file
//! beside it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use pkv_core::{Progress, Stop, hinted};
use pkv_recipe::{Manifest, ModelSection, Recipe};

use crate::cache::{DatasetFiles, Hub, Kind, Resolved, select};
use crate::download::Wanted;
use crate::local;
use crate::lock::{Lock, Pin};

impl Hub {
    /// A model as [`Hub::model`] finds it, downloaded before if it is a hub model that the cache
    /// lacks. The pin is for the lock file; a local folder has none. A request to `stop`
    /// ends the download, and what has arrived is kept.
    pub fn fetch_model(
        &self,
        name: &str,
        revision: &str,
        bases: &[&Path],
        progress: &dyn Progress,
        stop: &Stop,
    ) -> Result<(Resolved, Option<Pin>)> {
        if local::find(name, bases).is_some() || local::must_be_local(name, bases) {
            return Ok((self.model(name, revision, bases)?, None));
        }
        let choose = |present: &[String]| {
            ensure!(!local::is_adapter(present), local::adapter_error(name));
            let wanted = local::model_files(present);
            for needed in ["config.json", "tokenizer.json"] {
                let (of, hint) = match self.options.offline {
                    true => (
                        " in the cache, and HF_HUB_OFFLINE is set",
                        "unset HF_HUB_OFFLINE, or copy the cache from a machine that reaches the hub",
                    ),
                    false => ("", "choose a repository in the transformers format, with a fast tokenizer"),
                };
                ensure!(
                    wanted.iter().any(|f| f == needed),
                    hinted(format!("hub model `{name}` has no `{needed}`{of}"), hint)
                );
            }
            ensure!(
                wanted.iter().any(|f| f.ends_with(".safetensors")),
                hinted(
                    format!("hub model `{name}` has no safetensors weights"),
                    "choose a repository or a revision that has them"
                )
            );
            Ok(wanted)
        };
        let wanted = Wanted { kind: Kind::Model, name, revision, progress, stop };
        let (snapshot, pin) = self.download(wanted, choose)?;
        local::check_whole(
            &snapshot.folder,
            "the hub's repository itself is incomplete; choose another revision",
        )?;
        Ok((Resolved { folder: snapshot.folder, revision: snapshot.commit }, Some(pin)))
    }

    /// The folder with a model's config.json: local, cached, or with that one file downloaded.
    ///
    /// # Errors
    /// There is no such model, it has no config.json, or the hub does not answer.
    pub fn fetch_config(
        &self,
        name: &str,
        revision: &str,
        bases: &[&Path],
        progress: &dyn Progress,
        stop: &Stop,
    ) -> Result<PathBuf> {
        const CONFIG: &str = "config.json";
        if let Some(folder) = local::find(name, bases) {
            return Ok(folder);
        }
        if local::must_be_local(name, bases) {
            return Ok(self.model(name, revision, bases)?.folder);
        }
        if let Ok(cached) = self.snapshot(Kind::Model, name, revision)
            && cached.folder.join(CONFIG).is_file()
        {
            return Ok(cached.folder);
        }
        self.fetch_files(name, revision, &[CONFIG], &[], progress, stop)
    }

    /// The folder with some files of a hub model's repository, downloaded where the cache lacks them: all of
    /// `needed`, and those of `optional` that there are.
    ///
    /// # Errors
    /// There is no such repository, it lacks a file, or the hub does not answer.
    pub fn fetch_files(
        &self,
        name: &str,
        revision: &str,
        needed: &[&str],
        optional: &[&str],
        progress: &dyn Progress,
        stop: &Stop,
    ) -> Result<PathBuf> {
        let choose = |present: &[String]| {
            let has = |file: &str| present.iter().any(|p| p == file);
            if let Some(file) = needed.iter().find(|file| !has(file)) {
                return Err(hinted(
                    format!("hub model `{name}` has no `{file}`"),
                    "check the name of the repository, and what it holds on its page",
                )
                .into());
            }
            let all = needed.iter().chain(optional.iter().filter(|file| has(file)));
            Ok(all.map(|file| (*file).to_owned()).collect())
        };
        let wanted = Wanted { kind: Kind::Model, name, revision, progress, stop };
        Ok(self.download(wanted, choose)?.0.folder)
    }

    /// Files of a hub data set as [`Hub::dataset_files`] finds them, downloaded before where the
    /// cache lacks them, and the pin for the lock file.
    pub fn fetch_dataset(
        &self,
        name: &str,
        revision: &str,
        patterns: &[String],
        progress: &dyn Progress,
        stop: &Stop,
    ) -> Result<(DatasetFiles, Pin)> {
        let choose = |present: &[String]| {
            select(name, present, patterns, || match self.lock.datasets.contains_key(name) {
                true => "the lock file names other files; delete it if the manifest was changed".to_owned(),
                false => {
                    format!("its files are listed at {}/datasets/{name}/tree/main", self.options.endpoint)
                }
            })
        };
        let wanted = Wanted { kind: Kind::Dataset, name, revision, progress, stop };
        let (snapshot, pin) = self.download(wanted, choose)?;
        let files = choose(&pin.files.keys().cloned().collect::<Vec<_>>())?;
        let files = files.iter().map(|f| snapshot.folder.join(f)).collect();
        Ok((DatasetFiles { folder: snapshot.folder, commit: snapshot.commit, files }, pin))
    }
}

/// The models that a recipe reads into the cache; writes `<recipe>.lock.toml` if one of them is a hub
/// model.
///
/// Returns the target's folder, and the proxy's if features come from it. What the lock file already holds is
/// kept.
pub fn fetch_recipe(
    hub: &Hub,
    recipe: &Recipe,
    bases: &[&Path],
    progress: &dyn Progress,
    stop: &Stop,
) -> Result<(Resolved, Option<Resolved>)> {
    let mut lock = Lock::beside(&recipe.path)?;
    let hub = hub.clone().with_lock(lock.clone());
    let mut one = |section: &str, model: &ModelSection| {
        let (name, revision) = (&model.model, &model.revision);
        let (resolved, pin) = hub
            .fetch_model(name, revision, bases, progress, stop)
            .with_context(|| format!("cannot fetch `{section}.model`"))?;
        if let Some(pin) = pin {
            lock.models.insert(name.clone(), pin);
            lock.write_beside(&recipe.path)?;
        }
        anyhow::Ok(resolved)
    };
    let target = one("target", &recipe.target)?;
    Ok((target, recipe.read_proxy().map(|proxy| one("proxy", proxy)).transpose()?))
}

/// All hub data sets of a manifest, read from `path`, into the cache; writes `<manifest>.lock.toml`
/// if there are any.
pub fn fetch_manifest(
    hub: &Hub,
    manifest: &Manifest,
    path: &Path,
    progress: &dyn Progress,
    stop: &Stop,
) -> Result<()> {
    let mut lock = Lock::beside(path)?;
    let hub = hub.clone().with_lock(lock.clone());
    // Two sources may read different files of one data set: one pin holds them all.
    let mut wanted: BTreeMap<&str, (&str, Vec<String>)> = BTreeMap::new();
    for source in &manifest.sources {
        let Some(name) = &source.hub else { continue };
        let (revision, patterns) = wanted.entry(name).or_insert((&source.revision, Vec::new()));
        ensure!(
            *revision == source.revision,
            hinted(
                format!(
                    "`{}` asks for `{name}` at revisions `{revision}` and `{}`",
                    path.display(),
                    source.revision
                ),
                "use one revision per data set"
            )
        );
        patterns.extend(source.hub_files.iter().cloned());
    }
    for (name, (revision, patterns)) in wanted {
        let (_, pin) = hub
            .fetch_dataset(name, revision, &patterns, progress, stop)
            .with_context(|| format!("cannot fetch what `{}` names", path.display()))?;
        lock.datasets.insert(name.to_owned(), pin);
        lock.write_beside(path)?;
    }
    Ok(())
}
