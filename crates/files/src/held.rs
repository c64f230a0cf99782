//! Folders and outputs held against other processes: on this machine by a lock, which the kernel releases
//! when the process dies, and where they are working copies by a lease as well.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use pkv_core::{Hinted, hinted};

use crate::claim::lock_file;
use crate::origin::{self, Claiming, Lease};
use crate::write_error;

/// What is held until this is dropped.
#[derive(Debug)]
pub struct Held {
    file: File,
    path: PathBuf,
    lease: Option<Box<dyn Lease>>,
}

/// Hold `dir` against other processes until what is returned is dropped.
///
/// The folder itself is locked, so that no lock file lies about.
///
/// # Errors
/// Another process holds it.
pub fn lock_dir(dir: &Path) -> Result<Held> {
    hold_dir(dir, false, File::try_lock)
}

/// As [`lock_dir`], together with all who hold it so. Where the file system has no locks none is held.
///
/// # Errors
/// Another process holds it alone.
pub fn share_dir(dir: &Path) -> Result<Held> {
    hold_dir(dir, true, |file| match file.try_lock_shared() {
        Err(TryLockError::Error(_)) => Ok(()),
        held => held,
    })
}

fn hold_dir(dir: &Path, shared: bool, lock: impl Fn(&File) -> Result<(), TryLockError>) -> Result<Held> {
    let file = File::open(dir).with_context(|| format!("cannot open folder `{}`", dir.display()))?;
    let elsewhere = || {
        hinted(
            format!("another process writes `{}`", dir.display()),
            "wait for it to end, or use another run name",
        )
        .environment()
    };
    match lock(&file) {
        Ok(()) => Held::new(file, dir.join("folder.lock"), shared, elsewhere),
        Err(TryLockError::WouldBlock) => bail!(elsewhere()),
        Err(TryLockError::Error(e)) => {
            Err(e).with_context(|| format!("cannot lock folder `{}`", dir.display()))
        }
    }
}

/// Hold the file `path`, made if absent, against other processes until what is returned is dropped: alone,
/// or together with all who hold it `shared`. For work whose folder is itself replaced or removed, and for a
/// file system without locks none is held.
///
/// # Errors
/// Another process holds it, `doing` what it holds it for; or the file cannot be made.
pub fn lock_work(path: &Path, shared: bool, doing: &str) -> Result<Held> {
    let file = lock_file(path).map_err(|e| write_error(path, e))?;
    let elsewhere = || {
        hinted(format!("another process {doing}"), "wait for it to end, or set another `name` in the recipe")
            .environment()
    };
    match if shared { file.try_lock_shared() } else { file.try_lock() } {
        Err(TryLockError::WouldBlock) => bail!(elsewhere()),
        Ok(()) | Err(TryLockError::Error(_)) => Held::new(file, path.to_owned(), shared, elsewhere),
    }
}

impl Held {
    fn new(file: File, path: PathBuf, shared: bool, elsewhere: impl Fn() -> Hinted) -> Result<Self> {
        let how = if shared { Claiming::Shared } else { Claiming::Alone };
        match origin::claim(&path, how)? {
            Some(lease) => Ok(Self { file, path, lease }),
            None => bail!(elsewhere()),
        }
    }

    /// Let others share what was held alone.
    ///
    /// # Errors
    /// The lease cannot be changed.
    pub fn share(&mut self) -> Result<()> {
        let _ = self.file.lock_shared();
        if let Some(lease) = self.lease.take() {
            drop(lease);
            self.lease = match origin::claim(&self.path, Claiming::Shared)? {
                Some(lease) => lease,
                None => bail!(
                    hinted(
                        format!("another process has taken `{}` alone meanwhile", self.path.display()),
                        "wait for it to end, and run the same command again"
                    )
                    .environment()
                ),
            };
        }
        Ok(())
    }
}
