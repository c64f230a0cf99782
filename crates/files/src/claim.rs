//! Claims: one process works on a thing at a time, and a claim ends with its process.

use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

use crate::origin::{self, Claiming, Lease};

/// Interval between checks for another process.
const PAUSE: Duration = Duration::from_millis(100);

/// The right to work on one thing, given back when dropped.
#[derive(Debug)]
pub struct Claim {
    file: File,
    locked: bool,
    was_signed: bool,
    /// In a working copy, against processes elsewhere.
    lease: Option<Box<dyn Lease>>,
}

impl Claim {
    /// Claim what the file `path` represents, made if absent; `None` while another process has it.
    ///
    /// The kernel releases the lock of a process that dies, so that no claim is ever stale. Where the file
    /// system has no locks the claim is given: two processes may then do the same work. In a working copy
    /// processes elsewhere are kept out by a lease, which ends some time after its process has died.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn take(path: &Path) -> Result<Option<Self>> {
        let file = lock_file(path).with_context(|| format!("cannot make `{}`", path.display()))?;
        let locked = match file.try_lock() {
            Ok(()) => true,
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(_)) => false,
        };
        let was_signed = file.metadata().is_ok_and(|file| file.len() > 0);
        Ok(origin::claim(path, Claiming::Piece)?.map(|lease| Self { file, locked, was_signed, lease }))
    }

    /// As [`Claim::take`], waiting while another process has it.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn wait_for(path: &Path) -> Result<Self> {
        loop {
            match Self::take(path)? {
                Some(claim) => return Ok(claim),
                None => std::thread::sleep(PAUSE),
            }
        }
    }

    /// Whether other processes are kept out: not where the file system has no locks.
    pub const fn is_exclusive(&self) -> bool {
        self.locked
    }

    /// Whether somebody had the claim before and signed it.
    pub const fn was_signed(&self) -> bool {
        self.was_signed
    }

    /// Say in the file who has the claim, for readers that cannot see the lock.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn sign(&mut self, text: &str) -> io::Result<()> {
        if let Some(lease) = &self.lease {
            lease.sign(text);
        }
        self.file.set_len(0)?;
        self.file.write_all(text.as_bytes())
    }

    /// Give the file the present time: a sign of life. Nothing depends on it.
    pub fn touch(&self) {
        let _ = self.file.set_modified(SystemTime::now());
    }
}

/// A file to be locked, made if absent.
///
/// # Errors
/// It cannot be made, or is no regular file: opening a pipe waits for its other end.
pub fn lock_file(path: &Path) -> io::Result<File> {
    match pkv_core::check_regular(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    File::options().read(true).write(true).create(true).truncate(false).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_had_once_and_is_signed() {
        let path = std::env::temp_dir().join(format!("pkv-claim-{}", std::process::id()));
        let mut held = Claim::take(&path).unwrap().unwrap();
        assert!(held.is_exclusive() && !held.was_signed() && Claim::take(&path).unwrap().is_none());
        held.sign("a long signature").unwrap();
        drop(held);
        let mut held = Claim::wait_for(&path).unwrap();
        assert!(held.was_signed());
        held.sign("short").unwrap();
        held.touch();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "short");
        std::fs::remove_file(&path).unwrap();
    }
}
