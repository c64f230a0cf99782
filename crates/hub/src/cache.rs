//! [`Hub`]: from names to files that are already on this machine.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use glob::{MatchOptions, Pattern};
use pkv_core::hinted;

use crate::hash::sha256_file;
use crate::local;
use crate::lock::{Lock, Pin};
use crate::names;
use crate::options::HubOptions;
use crate::store::confined;

/// Files up to this size are hashed each time they are looked up; larger ones only by `fetch`.
const HASHED_EACH_TIME: u64 = 32 << 20;

/// The Hugging Face cache, the hub that it mirrors, and the revisions that are locked.
#[derive(Clone, Debug)]
pub struct Hub {
    pub(crate) options: HubOptions,
    pub(crate) lock: Lock,
}

/// A model on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    pub folder: PathBuf,
    /// Commit of a hub model, `local:<sha256>` of a folder.
    pub revision: String,
}

/// Files of a data set on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatasetFiles {
    /// Root of the snapshot.
    pub folder: PathBuf,
    pub commit: String,
    /// In the order of the patterns, then of their names.
    pub files: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Model,
    Dataset,
}

impl Kind {
    pub(crate) const fn noun(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Dataset => "data set",
        }
    }

    pub(crate) const fn repo_type(self) -> hf_hub::RepoType {
        match self {
            Self::Model => hf_hub::RepoType::Model,
            Self::Dataset => hf_hub::RepoType::Dataset,
        }
    }

    pub(crate) fn pin(self, lock: &Lock, name: &str) -> Option<Pin> {
        match self {
            Self::Model => lock.models.get(name).cloned(),
            Self::Dataset => lock.datasets.get(name).cloned(),
        }
    }
}

/// One commit of a repository in the cache.
pub(crate) struct Snapshot {
    pub folder: PathBuf,
    pub commit: String,
}

impl Hub {
    /// The hub and cache that the environment names, nothing locked.
    pub fn from_env() -> Self {
        Self::new(HubOptions::from_env())
    }

    pub fn new(options: HubOptions) -> Self {
        Self { options, lock: Lock::default() }
    }

    /// The same hub; revisions in `lock` win over branches.
    pub fn with_lock(self, lock: Lock) -> Self {
        Self { lock, ..self }
    }

    pub fn options(&self) -> &HubOptions {
        &self.options
    }

    pub fn lock(&self) -> &Lock {
        &self.lock
    }

    /// A model on this machine: the folder `name`, absolute or below one of `bases`, or else the
    /// snapshot of the hub model `name` in the cache, at the locked commit or at `revision`.
    ///
    /// # Errors
    /// It is neither; or files are absent; or they differ from the lock. No network is tried.
    pub fn model(&self, name: &str, revision: &str, bases: &[&Path]) -> Result<Resolved> {
        if let Some(folder) = local::find(name, bases) {
            local::check_whole(&folder, "copy the missing files there, or check the path of the model")?;
            return Ok(Resolved { revision: local::revision(&folder)?, folder });
        }
        ensure!(!local::must_be_local(name, bases), local::no_folder(name, bases));
        let snapshot = self.snapshot(Kind::Model, name, revision)?;
        local::check_whole(&snapshot.folder, "run `proxykv-train fetch`, which downloads what is missing")?;
        let repository = self.repository_folder(Kind::Model, name);
        for file in files_below(&snapshot.folder)?.iter().filter(|f| local::is_model_file(f)) {
            confined(&repository, &snapshot.folder.join(file))?;
        }
        Ok(Resolved { folder: snapshot.folder, revision: snapshot.commit })
    }

    /// Files of the hub data set `name` in the cache that match one of `patterns`: `*` matches within
    /// a file or folder name, `**` any number of folders.
    ///
    /// # Errors
    /// The data set is not cached, or no file matches a pattern, or files differ from the lock. No
    /// network is tried.
    pub fn dataset_files(&self, name: &str, revision: &str, patterns: &[String]) -> Result<DatasetFiles> {
        let snapshot = self.snapshot(Kind::Dataset, name, revision)?;
        let mut present = files_below(&snapshot.folder)?;
        if let Some(pin) = Kind::Dataset.pin(&self.lock, name) {
            // Other files of the data set may have been cached by another program.
            present.retain(|f| pin.files.contains_key(f));
        }
        let chosen = select(name, &present, patterns, || {
            "run `proxykv-train fetch`, which downloads what is missing".to_owned()
        })?;
        let repository = self.repository_folder(Kind::Dataset, name);
        let files: Vec<_> = chosen.iter().map(|f| snapshot.folder.join(f)).collect();
        for file in &files {
            confined(&repository, file)?;
        }
        Ok(DatasetFiles { folder: snapshot.folder, commit: snapshot.commit, files })
    }

    /// The cached snapshot of `name` at the locked commit, or at `revision` if nothing is locked.
    pub(crate) fn snapshot(&self, kind: Kind, name: &str, revision: &str) -> Result<Snapshot> {
        let pin = self.sound_pin(kind, name, revision)?;
        let repository = self.repository_folder(kind, name);
        let commit = match &pin {
            Some(pin) => pin.commit.clone(),
            None => pkv_core::read_small_text(&repository.join("refs").join(revision))
                .map_or_else(|_| revision.to_owned(), |c| c.trim().to_owned()),
        };
        names::check_revision(&commit).with_context(|| format!("`{}` is damaged", repository.display()))?;
        let folder = repository.join("snapshots").join(&commit);
        if !folder.is_dir() {
            let cache = self.options.cache.display();
            let local = match kind {
                Kind::Model => format!("`{name}` is no folder, and the hub model of that name"),
                Kind::Dataset => format!("hub data set `{name}`"),
            };
            bail!(hinted(
                format!("{local} (revision `{commit}`) is not in the Hugging Face cache `{cache}`"),
                "run `proxykv-train fetch` on a machine that reaches the hub, or name a local copy"
            ));
        }
        if let Some(pin) = &pin {
            check_locked(kind, name, &folder, pin)?;
        }
        Ok(Snapshot { folder, commit })
    }

    /// The lock's entry of a repository; its names become paths, and so must be plain.
    ///
    /// # Errors
    /// A name is not, or another revision is asked for than the locked one.
    pub(crate) fn sound_pin(&self, kind: Kind, name: &str, revision: &str) -> Result<Option<Pin>> {
        names::check_repository(name)?;
        names::check_revision(revision)?;
        let pin = kind.pin(&self.lock, name);
        if let Some(pin) = &pin {
            pin.check_asked(name, revision)?;
            names::check_commit(&pin.commit)
                .and_then(|()| pin.files.keys().try_for_each(|f| names::check_file(f)))
                .with_context(|| format!("the lock file of `{name}` is unsound"))?;
        }
        Ok(pin)
    }

    pub(crate) fn repository_folder(&self, kind: Kind, name: &str) -> PathBuf {
        let repo = hf_hub::Repo::new(name.to_owned(), kind.repo_type());
        self.options.cache.join(repo.folder_name())
    }
}

/// Names out of `present` that match one of `patterns`, in the order of the patterns, then of their names.
///
/// # Errors
/// A pattern is malformed or matches nothing.
pub(crate) fn select(
    name: &str,
    present: &[String],
    patterns: &[String],
    hint: impl Fn() -> String,
) -> Result<Vec<String>> {
    let rules = MatchOptions { require_literal_separator: true, ..MatchOptions::default() };
    let mut chosen: Vec<String> = Vec::new();
    let mut seen = HashSet::new();
    for text in patterns {
        let pattern = Pattern::new(text).with_context(|| format!("`{text}` is no file pattern"))?;
        let mut matching: Vec<_> = present.iter().filter(|f| pattern.matches_with(f, rules)).collect();
        ensure!(
            !matching.is_empty(),
            hinted(format!("no file of data set `{name}` matches `{text}`"), hint())
        );
        matching.sort();
        for file in matching {
            if seen.insert(file) {
                chosen.push(file.clone());
            }
        }
    }
    Ok(chosen)
}

/// # Errors
/// A locked file is absent or has another size or, where hashing takes no noticeable time, another hash.
fn check_locked(kind: Kind, name: &str, folder: &Path, pin: &Pin) -> Result<()> {
    for (file, locked) in &pin.files {
        let path = folder.join(file);
        let bytes = fs::metadata(&path).map(|m| m.len()).map_err(|_| {
            hinted(
                format!(
                    "{} `{name}` is incomplete in the cache: `{}` is absent",
                    kind.noun(),
                    path.display()
                ),
                "run `proxykv-train fetch`, which downloads what is missing",
            )
        })?;
        ensure!(
            bytes == locked.bytes,
            differs(&path, &format!("{} bytes", locked.bytes), &format!("{bytes}"))
        );
        if bytes <= HASHED_EACH_TIME {
            let (_, sha256) = sha256_file(&path, |_| ())?;
            ensure!(sha256 == locked.sha256, differs(&path, &format!("sha256 {}", locked.sha256), &sha256));
        }
    }
    Ok(())
}

pub(crate) fn differs(path: &Path, expected: &str, found: &str) -> pkv_core::Hinted {
    hinted(
        format!("`{}` differs from the lock file: expected {expected}, found {found}", path.display()),
        "delete that file and run `proxykv-train fetch`; if the change is wanted, delete the lock file instead",
    )
}

/// All files below `folder`, as paths with `/`, sorted within each folder. A link to a folder is not
/// followed: it may lead anywhere, or in a circle, and the cache has none.
pub(crate) fn files_below(folder: &Path) -> Result<Vec<String>> {
    let mut out = Vec::new();
    list(folder, "", &mut out)?;
    Ok(out)
}

fn list(folder: &Path, prefix: &str, out: &mut Vec<String>) -> Result<()> {
    let what = || format!("cannot list `{}`", folder.display());
    let mut entries =
        fs::read_dir(folder).with_context(what)?.collect::<Result<Vec<_>, _>>().with_context(what)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = entry.path();
        let kind = entry.file_type().with_context(what)?;
        if kind.is_dir() {
            list(&path, &format!("{prefix}{name}/"), out)?;
        } else if !path.is_dir() {
            out.push(format!("{prefix}{name}"));
        }
    }
    Ok(())
}
