//! Filling the cache from the hub: resumable, verified, retried.
//!
//! hf-hub speaks the protocol and keeps `blobs/<etag>.part` files; what it leaves open is decided
//! here: a broken transfer is taken up where it stopped, and a file is only believed when its size
//! and hash are those that the hub and the lock file name.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::Path;
use std::thread::sleep;

use anyhow::{Context, Result, anyhow, bail, ensure};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::api::{RepoInfo, Siblings};
use hf_hub::{Cache, Repo};
use pkv_core::{Hinted, Progress, hinted};

use crate::cache::{Hub, Kind, Snapshot, differs, files_below};
use crate::hash::sha256_file;
use crate::lock::{Pin, PinnedFile};

/// What a request is about.
#[derive(Clone, Copy)]
struct Repository<'a> {
    kind: Kind,
    name: &'a str,
    revision: &'a str,
}

impl Hub {
    /// Download the files of a repository that `choose` picks from its listing, or take them from
    /// the cache, and verify them.
    ///
    /// A locked repository keeps its commit and its files; `choose` then sees the locked files.
    pub(crate) fn download(
        &self,
        kind: Kind,
        name: &str,
        revision: &str,
        choose: impl Fn(&[String]) -> Result<Vec<String>>,
        progress: &dyn Progress,
    ) -> Result<(Snapshot, Pin)> {
        let pin = kind.pin(&self.lock, name);
        if let Some(pin) = &pin {
            pin.check_asked(name, revision)?;
        }
        let listing = match (&pin, self.options.offline) {
            // Nothing to ask the hub for if all locked files are here.
            (Some(pin), _) if self.has_all(kind, name, pin) => {
                RepoInfo { siblings: Vec::new(), sha: pin.commit.clone() }
            }
            (_, true) => self.cached_listing(kind, name, revision)?,
            _ => {
                let asked = Repository { kind, name, revision: pin.as_ref().map_or(revision, |p| &p.commit) };
                self.retry(|| self.repo(asked)?.info()).map_err(|e| self.explain(asked, e))?
            }
        };
        let present: Vec<String> = match &pin {
            Some(pin) => pin.files.keys().cloned().collect(),
            None => listing.siblings.iter().map(|s| s.rfilename.clone()).collect(),
        };
        let wanted = choose(&present)?;

        let folder = self.repository_folder(kind, name).join("snapshots").join(&listing.sha);
        let repository = Repository { kind, name, revision: &listing.sha };
        let mut files = BTreeMap::new();
        for file in &wanted {
            let locked = pin.as_ref().and_then(|p| p.files.get(file));
            let found = self
                .file(repository, &folder.join(file), file, locked, progress)
                .with_context(|| format!("cannot fetch `{file}` of {} `{name}`", kind.noun()))?;
            files.insert(file.clone(), found);
        }
        // As `huggingface_hub` does: the branch points at the commit once its files are there. A
        // locked commit may be an older one, which is nobody else's business.
        if pin.is_none() && listing.sha != revision {
            let repo = Repo::with_revision(name.to_owned(), kind.repo_type(), revision.to_owned());
            Cache::new(self.options.cache.clone())
                .repo(repo)
                .create_ref(&listing.sha)
                .with_context(|| format!("cannot write into the cache `{}`", self.options.cache.display()))?;
        }
        let pin = Pin {
            asked: pin.map_or_else(|| revision.to_owned(), |p| p.asked),
            commit: listing.sha.clone(),
            files,
        };
        Ok((Snapshot { folder, commit: listing.sha }, pin))
    }

    fn has_all(&self, kind: Kind, name: &str, pin: &Pin) -> bool {
        let folder = self.repository_folder(kind, name).join("snapshots").join(&pin.commit);
        pin.files.iter().all(|(f, p)| fs::metadata(folder.join(f)).is_ok_and(|m| m.len() == p.bytes))
    }

    /// What the cache has of a repository, when the hub must not be asked.
    fn cached_listing(&self, kind: Kind, name: &str, revision: &str) -> Result<RepoInfo> {
        let snapshot = self.snapshot(kind, name, revision).with_context(|| {
            hinted(
                format!("HF_HUB_OFFLINE is set, and {} `{name}` is not whole on this machine", kind.noun()),
                "unset HF_HUB_OFFLINE, or copy the cache from a machine that reaches the hub",
            )
        })?;
        let siblings =
            files_below(&snapshot.folder)?.into_iter().map(|rfilename| Siblings { rfilename }).collect();
        Ok(RepoInfo { siblings, sha: snapshot.commit })
    }

    /// One file at its place `path` in the snapshot, downloaded if need be; its verified length and hash.
    fn file(
        &self,
        from: Repository,
        path: &Path,
        file: &str,
        locked: Option<&PinnedFile>,
        progress: &dyn Progress,
    ) -> Result<PinnedFile> {
        if !path.is_file() {
            let blobs = self.repository_folder(from.kind, from.name).join("blobs");
            let transferred = self
                .retry(|| transfer(&self.api()?, &self.repo(from)?, &blobs, file, progress))
                .map_err(|e| self.explain(from, e));
            progress.finish();
            transferred?;
        }
        progress.start(&format!("verifying {file}"), fs::metadata(path)?.len(), 0);
        let found = sha256_file(path, |n| progress.advance(n));
        progress.finish();
        let (bytes, sha256) = found?;
        // A blob of a large file is named by its SHA-256.
        let blob = fs::read_link(path).ok().and_then(|p| Some(p.file_name()?.to_str()?.to_owned()));
        if let Some(expected) = blob.filter(|b| b.len() == 64 && *b != sha256) {
            fs::remove_file(fs::canonicalize(path)?)?;
            fs::remove_file(path)?;
            bail!(hinted(
                format!("the transfer was damaged: expected sha256 {expected}, found {sha256}"),
                "run `proxykv-train fetch` again; the damaged file was deleted"
            ));
        }
        if let Some(locked) = locked {
            ensure!(
                bytes == locked.bytes,
                differs(path, &format!("{} bytes", locked.bytes), &bytes.to_string())
            );
            ensure!(sha256 == locked.sha256, differs(path, &format!("sha256 {}", locked.sha256), &sha256));
        }
        Ok(PinnedFile { bytes, sha256 })
    }

    fn api(&self) -> Result<Api, ApiError> {
        ApiBuilder::from_cache(Cache::new(self.options.cache.clone()))
            .with_endpoint(self.options.endpoint.clone())
            .with_token(self.options.token.clone())
            .with_progress(false)
            // hf-hub's own retries start an appended file from byte 0; ours go on where it ends.
            .with_retries(0)
            .with_user_agent("proxykv-train", env!("CARGO_PKG_VERSION"))
            .build()
    }

    fn repo(&self, Repository { kind, name, revision }: Repository) -> Result<ApiRepo, ApiError> {
        let repo = Repo::with_revision(name.to_owned(), kind.repo_type(), revision.to_owned());
        Ok(self.api()?.repo(repo))
    }

    /// Try until it works, the hub says no, or the attempts are used up.
    fn retry<T>(&self, attempt: impl Fn() -> Result<T, ApiError>) -> Result<T, ApiError> {
        let mut wait = self.options.retry_after;
        for n in 1.. {
            match attempt() {
                Err(e) if n < self.options.attempts && is_passing(&e) => {
                    tracing::warn!("attempt {n} of {} failed, waiting {wait:?}: {e}", self.options.attempts);
                    sleep(wait);
                    wait *= 2;
                }
                result => return result,
            }
        }
        unreachable!("the loop returns in its last round")
    }

    /// What an error means for the user.
    fn explain(&self, Repository { kind, name, revision }: Repository, error: ApiError) -> anyhow::Error {
        if is_disk(&error) {
            return anyhow!(error).context(hinted(
                format!("cannot write into the Hugging Face cache `{}`", self.options.cache.display()),
                "make room there, or let HF_HUB_CACHE name a folder on a larger disk",
            ));
        }
        let (noun, endpoint) = (kind.noun(), &self.options.endpoint);
        let page = if kind == Kind::Dataset { "/datasets/" } else { "/" };
        let context: Hinted = match status(&error) {
            Some(code @ (401 | 403)) => hinted(
                format!("the hub refuses {noun} `{name}` (status {code})"),
                format!(
                    "check the name; if it is gated, accept its licence at {endpoint}{page}{name} and set HF_TOKEN"
                ),
            ),
            Some(404) => hinted(
                format!("the hub `{endpoint}` has no {noun} `{name}` at revision `{revision}`"),
                "check name and revision, or name a local folder",
            ),
            _ => hinted(
                format!("cannot reach {noun} `{name}` on the hub `{endpoint}`"),
                "check the network (HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy) and run `proxykv-train fetch` \
                 again; it goes on where it stopped. Or name a local folder",
            ),
        };
        anyhow!(error).context(context)
    }
}

/// Download one file into the cache, going on with what an earlier attempt left.
fn transfer(
    api: &Api,
    repo: &ApiRepo,
    blobs: &Path,
    file: &str,
    progress: &dyn Progress,
) -> Result<(), ApiError> {
    let metadata = api.metadata(&repo.url(file))?;
    let (blob, size) = (blobs.join(metadata.etag()), metadata.size() as u64);
    let part = blob.with_extension("part");
    let had = fs::metadata(&part).map_or(0, |m| m.len());
    if had > size {
        fs::remove_file(&part)?;
    } else if had == size && size > 0 {
        // Whole but never renamed: ask for the last byte again, since an empty range is refused.
        OpenOptions::new().write(true).open(&part)?.set_len(size - 1)?;
    }
    progress.start(&format!("downloading {file}"), size, had.min(size));
    repo.download_with_progress(file, Meter { progress, done: had.min(size), seen: 0 })?;
    let got = fs::metadata(&blob)?.len();
    if got != size {
        // Too long if a server ignored the range, too short if it hung up early. Keep nothing.
        fs::remove_file(&blob)?;
        let text = format!("`{file}` has {got} bytes, the hub announced {size}");
        return Err(ApiError::IoError(io::Error::new(ErrorKind::UnexpectedEof, text)));
    }
    Ok(())
}

/// hf-hub's progress on ours: it counts a resumed file's old bytes, ours have been told of them.
struct Meter<'a> {
    progress: &'a dyn Progress,
    done: u64,
    seen: u64,
}

impl hf_hub::api::Progress for Meter<'_> {
    fn init(&mut self, _: usize, _: &str) {
        self.seen = 0;
    }

    fn update(&mut self, bytes: usize) {
        self.seen += bytes as u64;
        if self.seen > self.done {
            self.progress.advance(self.seen - self.done);
            self.done = self.seen;
        }
    }

    fn finish(&mut self) {}
}

/// The HTTP status, if the hub answered at all.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(e) => match **e {
            ureq::Error::StatusCode(code) => Some(code),
            _ => None,
        },
        _ => None,
    }
}

/// Whether the cache's disk is at fault, and not the network.
fn is_disk(error: &ApiError) -> bool {
    use ErrorKind::{
        AlreadyExists, NotADirectory, NotFound, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem,
        StorageFull,
    };
    const DISK: [ErrorKind; 7] = [
        AlreadyExists,
        NotADirectory,
        NotFound,
        PermissionDenied,
        QuotaExceeded,
        ReadOnlyFilesystem,
        StorageFull,
    ];
    matches!(error, ApiError::IoError(e) if DISK.contains(&e.kind()))
}

/// Whether waiting may help: lost connections, busy servers.
fn is_passing(error: &ApiError) -> bool {
    match (error, status(error)) {
        (_, Some(status)) => status == 408 || status == 429 || status >= 500,
        (ApiError::RequestError(e), None) => {
            !matches!(**e, ureq::Error::HostNotFound | ureq::Error::BadUri(_))
        }
        (ApiError::IoError(_), None) => !is_disk(error),
        (ApiError::LockAcquisition(_), None) => true,
        _ => false,
    }
}
