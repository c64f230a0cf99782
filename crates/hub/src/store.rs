//! Writing into one repository's folder of the cache, so that `huggingface_hub` and other processes find what
//! they expect.
//!
//! | path | holds |
//! |---|---|
//! | `blobs/<etag>` | a file's content, whole: it is renamed to that name when all of it is there |
//! | `blobs/<etag>.incomplete` | what has arrived of it |
//! | `snapshots/<commit>/<file>` | a relative link to the content |
//! | `refs/<branch>` | the commit of a branch |
//! | `../.locks/<repository>/<etag>.lock` | locked by who downloads that content |
//!
//! Nothing is written that is there already: a cache which may only be read serves what it holds. No write
//! and no look-up leaves the repository's folder, whatever links lie in it.

use std::fs::{self, File, TryLockError};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use pkv_core::hinted;

use crate::client::Client;
use crate::failure::Failure;

/// A process that holds a lock and receives nothing for so long is not waited for.
const LONGEST_SILENCE: Duration = Duration::from_secs(60);

pub(crate) struct Store {
    repository: PathBuf,
    locks: PathBuf,
}

/// The place of a download, and the lock on it for as long as this lives.
pub(crate) struct Held {
    pub part: PathBuf,
    _lock: Option<File>,
}

impl Store {
    /// `repository`: the folder `models--owner--name` of the cache.
    pub fn new(cache: &Path, repository: PathBuf) -> Self {
        let name = repository.file_name().unwrap_or_default();
        Self { locks: cache.join(".locks").join(name), repository }
    }

    /// Path of the content of that ETag, present or not.
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.repository.join("blobs").join(etag)
    }

    /// Whether the content is there, as a file of this repository's own and not as a link.
    pub fn has(&self, etag: &str, size: Option<u64>) -> bool {
        fs::symlink_metadata(self.blob(etag)).is_ok_and(|m| m.is_file() && size.is_none_or(|s| s == m.len()))
    }

    /// Make `folder` of the repository, if it is not there.
    fn make(&self, folder: &Path) -> Result<(), Failure> {
        fs::create_dir_all(folder).map_err(Failure::disk(folder))?;
        confined(&self.repository, folder).map(drop).map_err(|e| Failure::nonsense(e.to_string()))
    }

    /// The right to download the content of `etag`: one process at a time, where the disk knows locks.
    /// Without a lock, and beside a process that does not move, the part has a name of its own.
    pub fn hold(&self, etag: &str, client: &Client) -> Result<Held, Failure> {
        let blobs = self.repository.join("blobs");
        self.make(&blobs)?;
        let shared = blobs.join(format!("{etag}.incomplete"));
        let own = || Held { part: blobs.join(format!("{etag}.{}.incomplete", unique())), _lock: None };
        let Ok(file) = self.lock_file(etag) else { return Ok(own()) };
        let length = || fs::metadata(&shared).map_or(0, |m| m.len());
        let (mut since, mut seen, mut said) = (Instant::now(), length(), false);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Held { part: shared, _lock: Some(file) }),
                Err(TryLockError::Error(_)) => return Ok(own()),
                Err(TryLockError::WouldBlock) => {}
            }
            if !said {
                said = true;
                tracing::warn!("another process downloads `{}`; waiting for it", self.blob(etag).display());
            }
            if length() != seen {
                (since, seen) = (Instant::now(), length());
            } else if since.elapsed() > LONGEST_SILENCE {
                tracing::warn!(
                    "the other process has received nothing for {LONGEST_SILENCE:?}; going on without it"
                );
                return Ok(own());
            }
            client.check_stop()?;
            sleep(Duration::from_millis(200));
        }
    }

    fn lock_file(&self, etag: &str) -> io::Result<File> {
        fs::create_dir_all(&self.locks)?;
        let path = self.locks.join(format!("{etag}.lock"));
        // Made by another user of a shared cache, it may be read, which is enough for a lock.
        File::options().create(true).append(true).open(&path).or_else(|_| File::open(&path))
    }

    /// The whole content, under its name. A crash afterwards finds all of it on the disk.
    pub fn keep(&self, held: &Held, etag: &str) -> Result<(), Failure> {
        let blob = self.blob(etag);
        File::open(&held.part)
            .and_then(|f| f.sync_all())
            .and_then(|()| fs::rename(&held.part, &blob))
            .map_err(Failure::disk(&blob))
    }

    /// Let `file` of a snapshot be the content of `etag`.
    pub fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), Failure> {
        let place = self.repository.join("snapshots").join(commit).join(file);
        let folder = place.parent().unwrap_or(&self.repository);
        self.make(folder)?;
        let up = "../".repeat(2 + file.matches('/').count());
        // Beside it and renamed: another process never sees a place without its link.
        let new = folder.join(format!(".link-{}", unique()));
        let linked = symlink(&format!("{up}blobs/{etag}"), &new).and_then(|()| fs::rename(&new, &place));
        match linked {
            // A disk without links: the snapshot has the file itself, as on Windows.
            Err(e) if matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::Unsupported) => {
                fs::rename(self.blob(etag), &place).map_err(|_| e)
            }
            other => other,
        }
        .map_err(Failure::disk(&place))
    }

    /// Let the branch point at the commit, as `huggingface_hub` does once its files are there.
    pub fn note_branch(&self, branch: &str, commit: &str) -> Result<(), Failure> {
        let place = self.repository.join("refs").join(branch);
        if pkv_core::read_small_text(&place).is_ok_and(|c| c.trim() == commit) {
            return Ok(());
        }
        let write = || {
            let folder = place.parent().unwrap_or(&self.repository);
            self.make(folder)?;
            let new = folder.join(format!(".ref-{}", unique()));
            fs::write(&new, commit).and_then(|()| fs::rename(&new, &place)).map_err(Failure::disk(&place))
        };
        match write() {
            Err(Failure::Disk { path, error })
                if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) =>
            {
                // All files are there, and the lock file names the commit.
                tracing::warn!(
                    "cannot note in the cache that `{branch}` is {commit}: `{}`: {error}",
                    path.display()
                );
                Ok(())
            }
            other => other,
        }
    }
}

/// A part of a name that no other thread, process or container has.
fn unique() -> String {
    // The standard library's own random numbers: its hash maps are seeded with them.
    format!("{:016x}", RandomState::new().build_hasher().finish())
}

#[cfg(unix)]
fn symlink(to: &str, at: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(to, at)
}

#[cfg(not(unix))]
fn symlink(_: &str, _: &Path) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

/// `path` with links resolved, which must be in the folder `repository`.
///
/// # Errors
/// It is absent, or a link leads out.
pub(crate) fn confined(repository: &Path, path: &Path) -> Result<PathBuf> {
    let what = || format!("cannot open `{}`", path.display());
    let root = repository.canonicalize().with_context(what)?;
    let real = path.canonicalize().map_err(|e| match e.kind() {
        ErrorKind::NotFound => hinted(
            format!("`{}` is absent, or its content is", path.display()),
            "run `proxykv-train fetch`, which downloads what is missing",
        )
        .into(),
        _ => anyhow!(e).context(what()),
    })?;
    ensure!(
        real.starts_with(&root),
        hinted(
            format!("`{}` leads out of its repository in the cache, to `{}`", path.display(), real.display()),
            format!("delete `{}` and run `proxykv-train fetch`", repository.display())
        )
    );
    Ok(real)
}

#[cfg(test)]
mod tests {
    use pkv_core::Stop;

    use super::*;
    use crate::options::HubOptions;

    fn store(dir: &Path) -> Store {
        let store = Store::new(dir, dir.join("models--o--n"));
        fs::create_dir_all(dir.join("models--o--n/blobs")).unwrap();
        store
    }

    #[test]
    fn links_are_relative_and_replace_dangling_ones() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        fs::write(store.blob("e1"), "one").unwrap();
        let place = dir.path().join("models--o--n/snapshots/c/data/deep/x.json");
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        symlink("../nowhere", &place).unwrap();
        store.link("c", "data/deep/x.json", "e1").unwrap();
        assert_eq!(fs::read(&place).unwrap(), b"one");
        assert_eq!(fs::read_link(&place).unwrap(), Path::new("../../../../blobs/e1"));
        store.link("c", "y.json", "e1").unwrap();
        assert_eq!(fs::read(dir.path().join("models--o--n/snapshots/c/y.json")).unwrap(), b"one");
    }

    #[test]
    fn nothing_is_written_through_a_link_that_leads_out() {
        let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = store(dir.path());
        fs::write(store.blob("e1"), "one").unwrap();
        let repository = dir.path().join("models--o--n");
        fs::create_dir_all(repository.join("snapshots/c")).unwrap();
        symlink(out.path().to_str().unwrap(), &repository.join("snapshots/c/data")).unwrap();
        symlink(out.path().to_str().unwrap(), &repository.join("refs")).unwrap();
        let error = store.link("c", "data/x.json", "e1").unwrap_err();
        assert!(error.why().contains("leads out of its repository"), "{error:?}");
        store.note_branch("main", "c").unwrap_err();
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
        // The folder itself may be a link: a cache on another disk.
        let alias = dir.path().join("models--o--alias");
        symlink("models--o--n", &alias).unwrap();
        confined(&alias, &alias.join("blobs/e1")).unwrap();
    }

    #[test]
    fn a_branch_that_points_there_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        store.note_branch("refs/convert/parquet", "c1").unwrap();
        let place = dir.path().join("models--o--n/refs/refs/convert/parquet");
        assert_eq!(fs::read_to_string(&place).unwrap(), "c1");
        // As other programs leave it; it would be without its line break if it were written again.
        fs::write(&place, "c1\n").unwrap();
        store.note_branch("refs/convert/parquet", "c1").unwrap();
        assert_eq!(fs::read_to_string(&place).unwrap(), "c1\n");
        store.note_branch("refs/convert/parquet", "c2").unwrap();
        assert_eq!(fs::read_to_string(&place).unwrap(), "c2");
    }

    #[test]
    fn a_second_process_waits_for_the_lock_and_can_be_stopped_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let options = HubOptions::default();
        let never = Stop::default();
        let client = Client::new(&options, false, &never).unwrap();
        let held = store.hold("e1", &client).unwrap();
        assert!(held.part.ends_with("blobs/e1.incomplete"));
        let other = store.hold("e2", &client).unwrap();
        assert!(other.part.ends_with("blobs/e2.incomplete"));
        let stopped = Stop::default();
        stopped.request();
        let stopping = Client::new(&options, false, &stopped).unwrap();
        assert!(matches!(store.hold("e1", &stopping), Err(Failure::Stopped(_))));
        drop(held);
        store.hold("e1", &client).unwrap();
    }
}
