//! Everything that evaluations measured, the source of `results.json` and its tables: one folder per task and
//! choices, one file per context, `contexts/<task>-<hash>/<index>.json`.
//!
//! An outcome is kept under the [`Identity`] of its task: every choice that its numbers depend on. Which
//! methods, policies and ratios were asked is no such choice: their cells are added to the outcome, and none
//! is ever taken away. Outcomes of other choices lie in other folders and come back with those choices.
//! Several processes may work on one folder: the process that holds a context's [`Claim`] adds to it. A claim
//! is a locked file, which the system unlocks when its process ends, however it ends, so that no claim is
//! ever stale.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use pkv_core::{Fingerprint, seal, unseal};
use pkv_files::{Claim, WriteBudget, lock_file, write_file};
use pkv_recipe::AnswerMatch;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cell::{Cell, Cells};

/// Data of a task that the summary of its outcomes needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "task", rename_all = "kebab-case")]
pub enum About {
    /// Starting and fitting the methods; one outcome.
    Methods,
    Labels,
    Facts {
        answer_match: AnswerMatch,
    },
    Perplexity {
        continuation_tokens: usize,
    },
    Benchmark {
        suite: String,
        name: String,
    },
    /// The worked example; one outcome.
    Example {
        of_facts: bool,
    },
}

impl About {
    /// When answers count, of planted facts.
    pub fn answer_match(&self) -> Option<AnswerMatch> {
        match self {
            Self::Facts { answer_match } => Some(*answer_match),
            _ => None,
        }
    }

    /// As the table of answers and the folder have it.
    pub fn name(&self) -> String {
        match self {
            Self::Methods => "methods".to_owned(),
            Self::Labels => "labels".to_owned(),
            Self::Facts { .. } => "facts".to_owned(),
            Self::Perplexity { .. } => "perplexity".to_owned(),
            Self::Benchmark { suite, name } => format!("{suite}.{name}"),
            Self::Example { of_facts: true } => "example".to_owned(),
            Self::Example { of_facts: false } => "example-test".to_owned(),
        }
    }
}

/// A task with the choices that its numbers depend on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Hash of all of them.
    pub fingerprint: String,
    /// Hash of those that all tasks depend on, the mapper first of all.
    pub base: String,
    pub about: About,
}

impl Identity {
    /// `settings` are the task's own.
    pub fn new(base: &Fingerprint, about: About, settings: impl Serialize) -> Self {
        let base = base.hash();
        let all = Fingerprint::new().with("base", &base).with("about", &about).with("settings", settings);
        Self { fingerprint: all.hash(), base, about }
    }

    /// Name of its folder. A damaged file may hold a shorter fingerprint.
    fn folder(&self) -> String {
        format!("{}-{}", self.about.name(), self.fingerprint.get(..8).unwrap_or(&self.fingerprint))
    }
}

/// Outcome of one context, to which cells can be added.
pub trait Outcome: Serialize + DeserializeOwned {
    /// Add the cells of `new` that are not here.
    fn add(&mut self, new: Self);
}

/// A context that says nothing, whatever is asked, is `None`.
impl<T: Outcome> Outcome for Option<T> {
    fn add(&mut self, new: Self) {
        match (self.as_mut(), new) {
            (Some(old), Some(new)) => old.add(new),
            (None, new) => *self = new,
            (Some(_), None) => {}
        }
    }
}

/// The folder `contexts/` of an evaluation.
pub struct ContextStore {
    dir: PathBuf,
    /// Locked by all processes that use the folder together; the process that can lock it alone is the last.
    users: File,
}

/// The contexts of one task.
pub struct TaskStore {
    dir: PathBuf,
    identity: Identity,
}

#[derive(Serialize, Deserialize)]
struct Stored<T> {
    #[serde(flatten)]
    identity: Identity,
    /// Seconds since 1970, of the last addition.
    measured: u64,
    outcome: T,
}

/// As much of any outcome as tells which cells it has.
#[derive(Deserialize)]
struct CellsOf {
    cells: Cells<IgnoredAny>,
}

/// All outcomes of a task.
pub struct Outcomes<T> {
    /// With their contexts' indices, in order.
    pub all: Vec<(usize, T)>,
    /// `YYYY-MM-DD` of the last addition, UTC.
    pub measured: String,
}

impl ContextStore {
    /// # Errors
    /// The folder cannot be made.
    pub fn open(dir: PathBuf) -> Result<Self> {
        let opened = || format!("cannot make folder `{}`", dir.display());
        fs::create_dir_all(&dir).with_context(opened)?;
        let users = lock_file(&dir.join("users.lock")).with_context(opened)?;
        // Without locks (some network folders have none) every process counts as the only one.
        let _ = users.lock_shared();
        Ok(Self { dir, users })
    }

    /// # Errors
    /// The task's folder cannot be made.
    pub fn task(&self, identity: Identity) -> Result<TaskStore> {
        let task = TaskStore::at(&self.dir, identity);
        fs::create_dir_all(&task.dir)
            .with_context(|| format!("cannot make folder `{}`", task.dir.display()))?;
        Ok(task)
    }

    /// Every task that has an outcome, in the order of their folders' names.
    ///
    /// # Errors
    /// A folder cannot be listed, or an outcome not be read.
    pub fn tasks(&self) -> Result<Vec<Identity>> {
        bring(&self.dir);
        let mut folders = Vec::new();
        for path in entries(&self.dir)? {
            if pkv_core::look_for(&path)?.is_some_and(|found| found.is_dir()) {
                folders.push(path);
            }
        }
        folders.sort();
        let mut tasks = Vec::new();
        for dir in folders {
            let mut stored = None;
            for file in entries(&dir)?.iter().filter(|file| index_of(file).is_some()) {
                stored = read::<IgnoredAny>(file)?;
                if stored.is_some() {
                    break;
                }
            }
            // A damaged file may say that it is of another folder.
            let is_own = |i: &Identity| dir.file_name().is_some_and(|name| *name == *i.folder());
            tasks.extend(stored.map(|stored| stored.identity).filter(is_own));
        }
        Ok(tasks)
    }

    /// The right to write the results, which one process has at a time.
    ///
    /// # Errors
    /// Its file cannot be made.
    pub fn publishing(&self) -> Result<Claim> {
        Claim::wait_for(&self.dir.join("publish.lock"))
    }

    /// Remove what locked contexts, unless other processes still work here.
    pub fn close(self) {
        let _ = self.users.unlock();
        if matches!(self.users.try_lock(), Err(TryLockError::WouldBlock)) {
            return;
        }
        let listed = |dir: &Path| entries(dir).unwrap_or_default();
        for file in listed(&self.dir).iter().flat_map(|dir| listed(dir)) {
            if file.extension().is_some_and(|e| e == "lock") {
                let _ = fs::remove_file(file);
            }
        }
    }
}

impl TaskStore {
    /// To be read; nothing is made.
    pub fn at(contexts: &Path, identity: Identity) -> Self {
        let dir = contexts.join(identity.folder());
        Self { dir, identity }
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Claim a context; `None` while another process has it.
    ///
    /// Where the file system has no locks the claim is given: two processes may then do the same work, with
    /// the same outcome.
    ///
    /// # Errors
    /// The claim's file cannot be made.
    pub fn claim(&self, index: usize) -> Result<Option<Claim>> {
        Claim::take(&self.lock(index))
    }

    /// Claim a context, waiting while another process has it.
    ///
    /// # Errors
    /// As [`TaskStore::claim`].
    pub fn wait_for(&self, index: usize) -> Result<Claim> {
        Claim::wait_for(&self.lock(index))
    }

    /// The outcome of a context; damaged ones count as absent.
    ///
    /// # Errors
    /// It cannot be read, whatever is in it.
    pub fn get<T: DeserializeOwned>(&self, index: usize) -> Result<Option<T>> {
        Ok(self.stored(index)?.map(|stored| stored.outcome))
    }

    /// The cells of `asked` that a context lacks.
    ///
    /// # Errors
    /// As [`TaskStore::get`].
    pub fn missing(&self, index: usize, asked: &[Cell]) -> Result<Vec<Cell>> {
        Ok(match self.get::<Option<CellsOf>>(index)? {
            Some(Some(outcome)) => asked.iter().filter(|c| outcome.cells.get(c).is_none()).copied().collect(),
            Some(None) => Vec::new(),
            None => asked.to_vec(),
        })
    }

    /// Add to the outcome of a context, of which the caller has the claim. Reading it gives the same numbers
    /// to the last bit.
    ///
    /// # Errors
    /// What was there cannot be read, or the file not be written.
    pub fn add<T: Outcome>(&self, index: usize, new: T) -> Result<()> {
        let outcome = match self.get::<T>(index)? {
            Some(mut old) => {
                old.add(new);
                old
            }
            None => new,
        };
        let measured = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let stored = Stored { identity: self.identity.clone(), measured, outcome };
        let text = serde_json::to_string(&stored).context("an outcome has a number that JSON cannot hold")?;
        write_file(&self.path(index), seal(&text).as_bytes(), &WriteBudget::from_env()).map(drop)
    }

    /// Everything that was measured, in the order of contexts.
    ///
    /// # Errors
    /// The folder cannot be listed, or an outcome not be read.
    pub fn outcomes<T: DeserializeOwned>(&self) -> Result<Outcomes<T>> {
        bring(&self.dir);
        let mut indices: Vec<usize> = entries(&self.dir)?.iter().filter_map(|path| index_of(path)).collect();
        indices.sort_unstable();
        indices.dedup();
        let mut last = 0;
        let mut all = Vec::new();
        for index in indices {
            if let Some(stored) = self.stored(index)? {
                last = last.max(stored.measured);
                all.push((index, stored.outcome));
            }
        }
        let date = chrono::DateTime::from_timestamp(i64::try_from(last).unwrap_or_default(), 0);
        let measured = date.map(|d| d.format("%Y-%m-%d").to_string()).unwrap_or_default();
        Ok(Outcomes { all, measured })
    }

    /// Number of cells in all contexts.
    ///
    /// # Errors
    /// As [`TaskStore::outcomes`].
    pub fn count(&self) -> Result<usize> {
        let outcomes = self.outcomes::<Option<CellsOf>>()?;
        Ok(outcomes.all.iter().filter_map(|(_, o)| Some(o.as_ref()?.cells.cells().count())).sum())
    }

    fn stored<T: DeserializeOwned>(&self, index: usize) -> Result<Option<Stored<T>>> {
        let stored = read(&self.path(index))?;
        Ok(stored.filter(|stored: &Stored<T>| stored.identity.fingerprint == self.identity.fingerprint))
    }

    fn path(&self, index: usize) -> PathBuf {
        self.dir.join(format!("{index:05}.json"))
    }

    fn lock(&self, index: usize) -> PathBuf {
        self.path(index).with_extension("lock")
    }
}

/// The context of an outcome's file.
fn index_of(path: &Path) -> Option<usize> {
    path.file_stem()?.to_str()?.parse().ok()
}

/// An outcome, unless it is absent or damaged.
///
/// # Errors
/// The system cannot read it now: taken for absent, it would be written over.
fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<Stored<T>>> {
    pkv_files::refresh(path)?;
    let text = match pkv_core::read_small_text(path) {
        Ok(text) => text,
        Err(e) if e.raw_os_error().is_some() && e.kind() != ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("cannot read the outcome `{}`", path.display()));
        }
        Err(_) => return Ok(None),
    };
    let parse = || {
        let mut value: Value = serde_json::from_str(&text).ok()?;
        unseal(&mut value).ok()?;
        serde_json::from_value(value).ok()
    };
    Ok(parse())
}

/// Bring what other machines have put into a working copy.
fn bring(dir: &Path) {
    if let Err(e) = pkv_files::pull(dir) {
        tracing::warn!("what other machines measured counts as absent: {e:#}");
    }
}

/// Files and folders in a folder; none if it is absent.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let listed = match fs::read_dir(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed.and_then(|all| all.map(|entry| Ok(entry?.path())).collect()),
    };
    listed.with_context(|| format!("cannot list folder `{}`", dir.display()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use pkv_core::{Policy, RetentionRatio};
    use pkv_recipe::MethodName;

    /// An outcome with nothing but cells.
    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    pub struct Plain {
        pub cells: Cells<f64>,
    }

    impl Outcome for Plain {
        fn add(&mut self, new: Self) {
            self.cells.add(new.cells);
        }
    }

    pub fn cell(method: MethodName) -> Cell {
        Cell { method, policy: Policy::Pair, ratio: RetentionRatio::new(0.1 + 0.2).unwrap() }
    }

    pub fn plain(method: MethodName, value: f64) -> Plain {
        Plain { cells: [(cell(method), value)].into_iter().collect() }
    }

    pub fn task(dir: &Path, base: &str) -> (ContextStore, TaskStore) {
        let store = ContextStore::open(dir.join("c")).unwrap();
        let identity = Identity::new(&Fingerprint::new().with("b", base), About::Labels, ());
        let task = store.task(identity).unwrap();
        (store, task)
    }

    #[test]
    fn a_context_is_claimed_once_and_the_last_one_removes_the_locks() {
        let dir = tempfile::tempdir().unwrap();
        let ((one, a), (other, b)) = (task(dir.path(), "f"), task(dir.path(), "f"));
        let held = a.claim(0).unwrap();
        assert!(held.is_some());
        assert!(b.claim(0).unwrap().is_none());
        assert!(b.claim(1).unwrap().is_some());
        drop(held);
        assert!(b.claim(0).unwrap().is_some());
        a.add(0, plain(MethodName::MAPPER, 1.0)).unwrap();
        one.close();
        assert!(a.lock(0).exists(), "another process works here");
        other.close();
        assert!(!a.lock(0).exists() && a.path(0).exists());
    }

    #[test]
    fn cells_add_up_under_the_same_choices_and_lie_apart_under_others() {
        let dir = tempfile::tempdir().unwrap();
        let (store, a) = task(dir.path(), "a");
        let asked = [cell(MethodName::MAPPER), cell(MethodName::RANDOM)];
        assert_eq!((a.get::<Plain>(3).unwrap(), a.missing(3, &asked).unwrap().len()), (None, 2));
        let value = 0.1f64 + 0.2;
        a.add(3, plain(MethodName::MAPPER, value)).unwrap();
        assert_eq!(a.missing(3, &asked).unwrap(), asked[1..]);
        a.add(3, plain(MethodName::RANDOM, 1e-300)).unwrap();
        a.add(3, plain(MethodName::MAPPER, 7.0)).unwrap();
        let found: Plain = task(dir.path(), "a").1.get(3).unwrap().unwrap();
        assert_eq!((found.cells.get(&asked[0]), found.cells.get(&asked[1])), (Some(&value), Some(&1e-300)));
        let (_, b) = task(dir.path(), "b");
        assert_eq!(b.get::<Plain>(3).unwrap(), None, "another evaluation's");
        b.add(5, plain(MethodName::MAPPER, 1.0)).unwrap();
        let tasks = || store.tasks().unwrap();
        assert_eq!((a.count().unwrap(), b.count().unwrap(), tasks().len()), (2, 1, 2));
        assert_eq!(a.outcomes::<Plain>().unwrap().measured.len(), "2026-01-31".len());
        fs::write(a.path(3), "{\"finger").unwrap();
        assert_eq!((a.get::<Plain>(3).unwrap(), a.missing(3, &asked).unwrap().len()), (None, 2), "damaged");
        // A file that says that it is of another task, or of none.
        let text = fs::read_to_string(b.path(5)).unwrap();
        for fingerprint in ["", "short", "\u{e4}\u{f6}\u{fc}\u{df}\u{e4}\u{f6}", "../../../../x"] {
            fs::write(b.path(5), text.replace(&b.identity().fingerprint, fingerprint)).unwrap();
            assert!(tasks().iter().all(|i| i.fingerprint != fingerprint), "{fingerprint}");
        }
    }

    #[test]
    fn an_outcome_that_cannot_be_read_is_neither_absent_nor_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let (store, task) = task(dir.path(), "a");
        task.add(3, plain(MethodName::MAPPER, 1.0)).unwrap();
        // A link to itself can no more be opened than a file on a failing disk.
        let (path, kept) = (task.path(3), dir.path().join("kept"));
        fs::rename(&path, &kept).unwrap();
        std::os::unix::fs::symlink(&path, &path).unwrap();
        let said = [
            task.get::<Plain>(3).map(drop),
            task.missing(3, &[cell(MethodName::RANDOM)]).map(drop),
            task.add(3, plain(MethodName::RANDOM, 2.0)),
            task.outcomes::<Plain>().map(drop),
            task.count().map(drop),
            store.tasks().map(drop),
        ];
        for result in said {
            let text = format!("{:#}", result.unwrap_err());
            assert!(text.contains("cannot read the outcome") && text.contains("00003.json"), "{text}");
        }
        fs::rename(&kept, &path).unwrap();
        assert_eq!(task.get::<Plain>(3).unwrap(), Some(plain(MethodName::MAPPER, 1.0)));
    }
}
