//! Folders that are working copies: their files are also somewhere else, such as in a bucket, where other
//! machines see them.
//!
//! The other place comes first: a file is put there before it has its name here, and removed there before it
//! goes here. So no file here is whole that is absent there, and a machine that is lost takes nothing with
//! it. What the other place is, and how it is reached, is its [`Origin`]'s. Folders that are mounted
//! nowhere, all of them by default, cost one atomic read.

use std::fmt::Debug;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::{Context, Result};

/// Where the files of a working copy also are. Paths are those of the working copy.
pub trait Origin: Debug + Send + Sync {
    /// Put the file `content` there, under the name of `path`.
    ///
    /// # Errors
    /// [`Changed`] if another process has put another file there since this one last saw it; or it cannot be
    /// reached.
    fn put(&self, path: &Path, content: &Path, sha256: &str) -> Result<()>;

    /// What was put as `path` has its name here now.
    fn named(&self, path: &Path);

    /// Bring one small file up to date; it goes if it is absent there.
    ///
    /// # Errors
    /// It cannot be reached, or the disk is full.
    fn refresh(&self, path: &Path) -> Result<()>;

    /// Bring all files below a folder up to date, but for shards: those come when they are opened.
    ///
    /// # Errors
    /// As of [`Origin::refresh`].
    fn pull(&self, folder: &Path) -> Result<()>;

    /// Put what is at or below `path` and has changed; remove there what was removed here.
    ///
    /// # Errors
    /// It cannot be reached, or this process has lost the right to write there.
    fn push(&self, path: &Path) -> Result<()>;

    /// Have the file here.
    ///
    /// # Errors
    /// As of [`Origin::refresh`]; it is absent.
    fn fetch(&self, path: &Path) -> Result<()>;

    /// Bytes of a file, here or there; `None` if it is absent.
    ///
    /// # Errors
    /// It cannot be reached.
    fn len(&self, path: &Path) -> Result<Option<u64>>;

    /// Remove what is at or below `path` there; of a link, the link alone.
    ///
    /// # Errors
    /// It cannot be reached, or this process has lost the right to write there.
    fn remove(&self, path: &Path) -> Result<()>;

    /// Names of the files right in a folder there, without their content.
    ///
    /// # Errors
    /// It cannot be reached.
    fn names(&self, folder: &Path) -> Result<Vec<String>>;

    /// Let the folder `at` be the folder `target` beside its own, there and here.
    ///
    /// # Errors
    /// It cannot be reached, or there is another file at `at`.
    fn link(&self, at: &Path, target: &Path) -> Result<()>;

    /// Move all files of the folder `from` to the folder `to`, there and here.
    ///
    /// # Errors
    /// It cannot be reached, or this process has lost the right to write there.
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;

    /// Claim what `path` represents against processes elsewhere: alone, or with all who share it. `None`
    /// while one of them has it.
    ///
    /// # Errors
    /// It cannot be reached.
    fn claim(&self, path: &Path, how: Claiming) -> Result<Option<Box<dyn Lease>>>;
}

/// How something is claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claiming {
    /// One of many: two processes that do the same work do no harm.
    Piece,
    /// What only one process may write. One that has lost the claim puts nothing any more.
    Alone,
    /// Together with all who share it, and without any who has it alone.
    Shared,
}

/// A claim that ends when it is dropped, or some time after the process that has it has died.
pub trait Lease: Debug + Send + Sync {
    /// Say in it who has it.
    fn sign(&self, text: &str);
}

/// Another process has changed a file since this one last saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changed;

impl std::fmt::Display for Changed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("another process has changed it meanwhile")
    }
}

impl std::error::Error for Changed {}

/// Whether an error says that another process has changed the file.
pub fn is_changed(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Changed>().is_some() || error.chain().any(|cause| cause.is::<Changed>())
}

/// An origin's failure on its way through an [`io::Error`].
#[derive(Debug)]
pub(crate) struct Elsewhere(pub anyhow::Error);

impl std::fmt::Display for Elsewhere {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

impl std::error::Error for Elsewhere {}

static MOUNTED: AtomicBool = AtomicBool::new(false);
static MOUNTS: RwLock<Vec<(PathBuf, Arc<dyn Origin>)>> = RwLock::new(Vec::new());

/// Let `root`, an absolute path, be a working copy of `origin` for the rest of the process.
pub fn mount(root: PathBuf, origin: Arc<dyn Origin>) {
    MOUNTS.write().unwrap_or_else(PoisonError::into_inner).push((root, origin));
    MOUNTED.store(true, Ordering::Release);
}

/// The origin of a path's working copy.
fn of(path: &Path) -> Option<Arc<dyn Origin>> {
    if !MOUNTED.load(Ordering::Acquire) {
        return None;
    }
    let path = std::path::absolute(path).ok()?;
    let mounts = MOUNTS.read().unwrap_or_else(PoisonError::into_inner);
    mounts.iter().find(|(root, _)| path.starts_with(root)).map(|(_, origin)| Arc::clone(origin))
}

/// Whether `path` is in a working copy.
pub fn is_mounted(path: &Path) -> bool {
    of(path).is_some()
}

/// [`Origin::named`], if `path` is in a working copy.
pub(crate) fn named(path: &Path) {
    if let Some(origin) = of(path) {
        origin.named(path);
    }
}

/// [`Origin::put`], if `path` is in a working copy.
pub(crate) fn put(path: &Path, content: &Path, sha256: &str) -> io::Result<()> {
    put_file(path, content, sha256).map_err(|e| io::Error::other(Elsewhere(e)))
}

/// Put a file that is here under another name; see [`Origin::put`].
///
/// # Errors
/// As of [`Origin::put`].
pub fn put_file(path: &Path, content: &Path, sha256: &str) -> Result<()> {
    of(path).map_or(Ok(()), |origin| origin.put(path, content, sha256))
}

/// [`Origin::claim`]; `Some(None)` if `path` is in no working copy.
pub(crate) fn claim(path: &Path, how: Claiming) -> Result<Option<Option<Box<dyn Lease>>>> {
    let Some(origin) = of(path) else { return Ok(Some(None)) };
    Ok(origin.claim(path, how)?.map(Some))
}

/// Bring a small file of a working copy up to date before it is read.
///
/// # Errors
/// As of [`Origin::refresh`].
pub fn refresh(path: &Path) -> Result<()> {
    of(path).map_or(Ok(()), |origin| {
        origin.refresh(path).with_context(|| format!("cannot read `{}`", path.display()))
    })
}

/// Bring a folder of a working copy up to date before it is read; see [`Origin::pull`].
///
/// # Errors
/// As of [`Origin::pull`].
pub fn pull(folder: &Path) -> Result<()> {
    of(folder).map_or(Ok(()), |origin| {
        origin.pull(folder).with_context(|| format!("cannot read folder `{}`", folder.display()))
    })
}

/// Put what was written below `path` without a [`crate::DurableFile`]; see [`Origin::push`].
///
/// # Errors
/// As of [`Origin::push`].
pub fn push(path: &Path) -> Result<()> {
    of(path).map_or(Ok(()), |origin| {
        origin.push(path).with_context(|| format!("cannot write `{}`", path.display()))
    })
}

/// Remove what is at or below `path` from where a working copy is of, before it is removed here.
///
/// # Errors
/// As of [`Origin::remove`].
pub fn remove_there(path: &Path) -> Result<()> {
    of(path).map_or(Ok(()), |origin| {
        origin.remove(path).with_context(|| format!("cannot remove `{}`", path.display()))
    })
}

/// Names of the files right in a folder of a working copy, by a listing there; `None` for any other folder,
/// where looking for a name costs as little.
///
/// # Errors
/// As of [`Origin::names`].
pub fn names(folder: &Path) -> Result<Option<Vec<String>>> {
    let names = |origin: Arc<dyn Origin>| origin.names(folder);
    of(folder).map(names).transpose().with_context(|| format!("cannot list folder `{}`", folder.display()))
}

/// Let `at` be a link to the folder `target`, which is relative to that of `at`; what was a link there before
/// is replaced. A working copy has the link where it is of, too.
///
/// # Errors
/// `at` is no link, the disk fails, or as of [`Origin::link`].
pub fn link(target: &Path, at: &Path) -> Result<()> {
    let context = || format!("cannot make the link `{}`", at.display());
    if let Some(origin) = of(at) {
        return origin.link(at, target).with_context(context);
    }
    link_here(target, at).with_context(context)
}

/// [`link`] on this machine alone.
///
/// # Errors
/// `at` is no link, or the disk fails.
pub fn link_here(target: &Path, at: &Path) -> io::Result<()> {
    if at.is_symlink() {
        fs::remove_file(at)?;
    }
    std::os::unix::fs::symlink(target, at)
}

/// Move a folder, with what a working copy has of it elsewhere.
///
/// # Errors
/// The disk fails, or as of [`Origin::rename`].
pub fn rename_folder(from: &Path, to: &Path) -> Result<()> {
    let context = || format!("cannot move `{}` to `{}`", from.display(), to.display());
    match of(from) {
        Some(origin) => origin.rename(from, to).with_context(context),
        None => fs::rename(from, to).with_context(context),
    }
}

/// Bytes of a file that may be a shard in no cache.
///
/// # Errors
/// It is absent or cannot be reached.
pub fn file_len(path: &Path) -> Result<u64> {
    let Some(origin) = of(path) else { return Ok(fs::metadata(path)?.len()) };
    origin.len(path)?.ok_or_else(|| io::Error::from(ErrorKind::NotFound).into())
}

/// Open a file that may be a shard in no cache; the open file stays, whatever becomes of the cache.
///
/// # Errors
/// It is absent or cannot be reached.
pub fn open_file(path: &Path) -> Result<File> {
    let Some(origin) = of(path) else { return Ok(File::open(path)?) };
    // The cache may have dropped it between the two.
    for _ in 0..3 {
        origin.fetch(path)?;
        match File::open(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            opened => return Ok(opened?),
        }
    }
    Ok(File::open(path)?)
}
