//! Files that are whole or absent: written under a temporary name, fsynced, renamed, folder fsynced. Beside
//! them locks of folders and hashes of files.
//!
//! Also the one place where a full disk can be simulated, and where a folder may be the working copy of a
//! bucket (`origin`). What the files hold is left to the callers.

mod claim;
mod held;
mod origin;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use pkv_core::hinted;
use sha2::{Digest, Sha256};

pub use self::claim::{Claim, lock_file};
pub use self::held::{Held, lock_dir, lock_work, share_dir};
use self::origin::Elsewhere;
pub use self::origin::{Changed, Claiming, Lease, Origin};
pub use self::origin::{
    file_len, is_changed, is_mounted, link, link_here, mount, names, open_file, pull, push, put_file,
    refresh, remove_there, rename_folder,
};

/// Ending of files that are not whole yet.
pub const TEMPORARY: &str = ".tmp";

/// Bytes that may still be written before the disk counts as full.
///
/// Unlimited unless a test gives a number or the environment has `PKV_FAIL_WRITES_AFTER_BYTES`,
/// which counts over all files of the process.
#[derive(Clone, Debug, Default)]
pub struct WriteBudget(Option<Arc<Mutex<u64>>>);

impl WriteBudget {
    pub fn unlimited() -> Self {
        Self(None)
    }

    pub fn bytes(n: u64) -> Self {
        Self(Some(Arc::new(Mutex::new(n))))
    }

    /// The budget of the process.
    pub fn from_env() -> Self {
        static BUDGET: OnceLock<WriteBudget> = OnceLock::new();
        let read = || {
            let bytes = std::env::var("PKV_FAIL_WRITES_AFTER_BYTES").ok()?.parse().ok()?;
            Some(Self::bytes(bytes))
        };
        BUDGET.get_or_init(|| read().unwrap_or_default()).clone()
    }

    /// Take `n` bytes.
    fn take(&self, n: u64) -> io::Result<()> {
        let Some(left) = &self.0 else { return Ok(()) };
        let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
        *left = left.checked_sub(n).ok_or(io::ErrorKind::StorageFull)?;
        Ok(())
    }
}

/// A file that appears under its name only when it is whole; it counts and hashes what it is given.
///
/// Dropped before [`DurableFile::publish`], it removes its temporary file.
#[derive(Debug)]
pub struct DurableFile {
    path: PathBuf,
    temporary: PathBuf,
    file: File,
    hash: Sha256,
    bytes: u64,
    budget: WriteBudget,
    failure: WriteFailure,
    published: bool,
}

/// Kind of a file's first failed write.
///
/// Encoders between the caller and the file may turn an IO error into text; this keeps its kind.
#[derive(Clone, Debug, Default)]
pub struct WriteFailure(Arc<OnceLock<io::ErrorKind>>);

impl WriteFailure {
    pub fn kind(&self) -> Option<io::ErrorKind> {
        self.0.get().copied()
    }
}

/// Size and hash of a published file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    pub bytes: u64,
    pub sha256: String,
}

impl DurableFile {
    /// # Errors
    /// The temporary file cannot be created.
    pub fn create(path: &Path, budget: WriteBudget) -> io::Result<Self> {
        let mut temporary = OsString::from(path);
        temporary.push(TEMPORARY);
        Self::create_as(path, PathBuf::from(temporary), budget)
    }

    /// As [`DurableFile::create`], under a temporary name of the caller's choice on the same file system; see
    /// [`own_temporary`].
    ///
    /// # Errors
    /// The temporary file cannot be created.
    pub fn create_as(path: &Path, temporary: PathBuf, budget: WriteBudget) -> io::Result<Self> {
        let file = File::create(&temporary)?;
        Ok(Self {
            path: path.to_path_buf(),
            temporary,
            file,
            hash: Sha256::new(),
            bytes: 0,
            budget,
            failure: WriteFailure::default(),
            published: false,
        })
    }

    /// To ask after an error of the code that writes through this file.
    pub fn failure(&self) -> WriteFailure {
        self.failure.clone()
    }

    fn write_hashed(&mut self, data: &[u8]) -> io::Result<usize> {
        self.budget.take(data.len() as u64)?;
        let n = self.file.write(data)?;
        self.hash.update(&data[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    /// Make the file whole on disk and give it its name; in a working copy, there first.
    ///
    /// # Errors
    /// The disk is full or fails; the name is then as it was before.
    pub fn publish(mut self) -> io::Result<Published> {
        self.file.sync_all()?;
        let published = Published { bytes: self.bytes, sha256: hex(self.hash.clone()) };
        origin::put(&self.path, &self.temporary, &published.sha256)?;
        fs::rename(&self.temporary, &self.path)?;
        self.published = true;
        origin::named(&self.path);
        sync_dir(parent(&self.path))?;
        Ok(published)
    }
}

impl Write for DurableFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.write_hashed(data).inspect_err(|e| {
            // Only the first failure is the cause.
            let _ = self.failure.0.set(e.kind());
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for DurableFile {
    fn drop(&mut self) {
        if !self.published {
            // Nothing to do if it fails: the next process that opens the folder removes it.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Replace the file at `path` by `data`, whole or not at all.
///
/// ```
/// use pkv_files::{WriteBudget, sha256_file, write_file};
///
/// let path = std::env::temp_dir().join(format!("pkv-files-{}", std::process::id()));
/// let published = write_file(&path, b"whole", &WriteBudget::unlimited())?;
/// assert_eq!(published.bytes, 5);
/// assert_eq!(published.sha256, sha256_file(&path)?);
/// assert!(write_file(&path, b"never whole", &WriteBudget::bytes(4)).is_err(), "as on a full disk");
/// assert_eq!(std::fs::read(&path)?, b"whole");
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), anyhow::Error>(())
/// ```
///
/// # Errors
/// Named with the path, and with a hint when the disk is full.
pub fn write_file(path: &Path, data: &[u8], budget: &WriteBudget) -> Result<Published> {
    let write = || {
        let mut file = DurableFile::create(path, budget.clone())?;
        file.write_all(data)?;
        file.publish()
    };
    write().map_err(|e| write_error(path, e))
}

/// As [`write_file`], for a file that several processes may write at once: each under a temporary name of its
/// own in `folder`, and the last one counts.
///
/// # Errors
/// As of [`write_file`].
pub fn write_file_among(path: &Path, folder: &Path, data: &[u8], budget: &WriteBudget) -> Result<Published> {
    let write = || {
        let mut file = DurableFile::create_as(path, own_temporary(folder, path), budget.clone())?;
        file.write_all(data)?;
        file.publish()
    };
    write().map_err(|e| write_error(path, e))
}

/// A temporary name in `folder` for the file `path` that no other process has, on this machine or another:
/// `<name>.<process>-<time>.tmp`.
pub fn own_temporary(folder: &Path, path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos());
    folder.join(format!("{name}.{}-{nanos}{TEMPORARY}", std::process::id()))
}

/// The error for a failed write of `path`, with a hint.
pub fn write_error(path: &Path, error: io::Error) -> anyhow::Error {
    let kind = error.kind();
    match error.downcast::<Elsewhere>() {
        // It has its own hint.
        Ok(elsewhere) => elsewhere.0.context(format!("cannot write `{}`", path.display())),
        Err(error) => write_error_of_kind(path, kind, error.into()),
    }
}

/// As [`write_error`], for an error that came through an encoder: `kind` is the file's.
pub fn write_error_of_kind(path: &Path, kind: io::ErrorKind, error: anyhow::Error) -> anyhow::Error {
    let what = format!("cannot write `{}`", path.display());
    let hint = match kind {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some space and run the same command again; what is whole is kept"
        }
        io::ErrorKind::NotFound => {
            "its folder was removed meanwhile: keep other programs out of it, and run the same command again"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "let this user write its folder, or choose another place"
        }
        io::ErrorKind::InvalidInput | io::ErrorKind::IsADirectory | io::ErrorKind::NotADirectory => {
            "move away what lies there, and run the same command again"
        }
        _ => "check the disk, and run the same command again; what is whole is kept",
    };
    error.context(hinted(what, hint))
}

/// Remove what `path` names, if anything: a folder with all that is in it, of a link the link alone.
///
/// # Errors
/// It cannot be removed.
pub fn remove_whole(path: &Path) -> io::Result<()> {
    let gone = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    gone.or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) })
}

/// Make renames and removals inside `dir` survive a power cut.
///
/// # Errors
/// The folder cannot be opened or synced.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// SHA-256 of the file at `path`, in lower-case hexadecimal.
///
/// # Errors
/// It cannot be read.
pub fn sha256_file(path: &Path) -> Result<String> {
    if is_mounted(path) {
        open_file(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    }
    sha256_here(path)
}

/// As [`sha256_file`], of a file that is here.
///
/// # Errors
/// It cannot be read.
pub fn sha256_here(path: &Path) -> Result<String> {
    let read = || {
        // A device never ends.
        pkv_core::check_regular(path)?;
        let mut hash = Sha256::new();
        io::copy(&mut BufReader::with_capacity(1 << 20, File::open(path)?), &mut hash)?;
        Ok(hex(hash))
    };
    read()
        .map_err(|e: io::Error| anyhow::Error::new(e))
        .with_context(|| format!("cannot read `{}`", path.display()))
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// The folder of `path`.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}
