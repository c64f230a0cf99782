//! A bucket's objects by key: read, put under a condition, list, remove. Blocking, and without secrets in its
//! errors.

use std::fs::File;
use std::future::Future;
use std::io::{self, Read as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt, TryStreamExt};
use object_store::path::Path as Key;
use object_store::{
    Attribute, Attributes, Error as StoreError, GetOptions, GetRange, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutResult, UpdateVersion,
};
use pkv_core::hinted;
use sha2::{Digest, Sha256};
use tokio::runtime::Handle;

use crate::address::{Address, Scheme};
use crate::credentials::connect;
use crate::http::{HOT, Sink};
use crate::options::Options;
use crate::redact::Secrets;

/// Size of a range or part that is on its way, and of the largest object that is put at once. S3 wants 5 MiB
/// at least; 8 MiB hide the time of a request at 100 MB/s and more.
pub(crate) const PART: u64 = 8 << 20;

/// Parts on their way at a time: they bound the memory that a transfer takes.
const AT_ONCE: usize = 4;

/// S3 takes 10,000 parts of an object.
const MOST_PARTS: u64 = 9_000;

/// The name under which an object's hash is kept with it.
const SHA256: &str = "sha256";

/// Tries of a put under a condition, whose answer may be lost.
const TRIES: u32 = 6;

/// A version of an object.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Version {
    pub e_tag: Option<String>,
    /// Google's generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

impl Version {
    /// Whether both are of the same bytes. Of a generation it is not asked: a listing knows none, and a put
    /// of the same bytes makes another one.
    pub fn is(&self, other: &Self) -> bool {
        self.e_tag == other.e_tag
    }
}

/// What a bucket says of an object.
#[derive(Clone, Debug)]
pub(crate) struct Meta {
    pub key: String,
    pub bytes: u64,
    pub version: Version,
    pub modified: SystemTime,
}

/// The condition of a put.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum If {
    Always,
    Absent,
    /// The object is still this one.
    Is(Version),
}

/// What became of a put under a condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Put {
    Done(Version),
    /// The condition was not met.
    Changed,
}

/// One bucket.
#[derive(Clone)]
pub(crate) struct Store {
    inner: Arc<dyn ObjectStore>,
    root: String,
    secrets: Secrets,
    /// Google: a put under a condition names the generation that it replaces.
    by_generation: bool,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({})", self.root)
    }
}

/// The runtime, on a thread of its own for as long as the process lives.
fn runtime() -> Result<&'static Handle> {
    static HANDLE: OnceLock<Option<Handle>> = OnceLock::new();
    let start = || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .max_blocking_threads(32)
            .build()
            .ok()?;
        let handle = runtime.handle().clone();
        let drive = move || runtime.block_on(std::future::pending::<()>());
        thread::Builder::new().name("bucket".to_owned()).spawn(drive).ok()?;
        Some(handle)
    };
    HANDLE.get_or_init(start).as_ref().context("cannot start the thread that speaks to buckets")
}

impl Store {
    pub fn open(address: &Address, options: &Options) -> Result<Self> {
        let (inner, secrets) = connect(address, options)?;
        let by_generation = address.scheme == Scheme::Google;
        Ok(Self { inner, root: address.root(), secrets, by_generation })
    }

    fn wait<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        Ok(runtime()?.block_on(work))
    }

    /// The address of an object, for messages.
    pub fn shown(&self, key: &str) -> String {
        format!("{}/{key}", self.root)
    }

    /// `None` for what is not there.
    fn found<T>(&self, doing: &str, key: &str, result: Result<T, StoreError>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(e) => Err(self.error(doing, key, &e)),
        }
    }

    fn error(&self, doing: &str, key: &str, error: &StoreError) -> anyhow::Error {
        let what = format!("cannot {doing} `{}`", self.shown(key));
        let hint = match error {
            StoreError::PermissionDenied { .. } | StoreError::Unauthenticated { .. } => {
                let hint =
                    "check the credentials, and that they may read, write, list and remove in this bucket";
                return anyhow::anyhow!(self.secrets.redact(&error.to_string())).context(hinted(what, hint));
            }
            StoreError::NotFound { .. } => "check the name of the bucket, the region and the endpoint",
            StoreError::NotImplemented { .. } | StoreError::NotSupported { .. } => {
                "this server lacks what claims need: puts under a condition (If-Match, If-None-Match)"
            }
            _ => "check the network and the endpoint, and run the same command again; what is whole is kept",
        };
        anyhow::anyhow!(self.secrets.redact(&error.to_string())).context(hinted(what, hint).environment())
    }

    fn key(key: &str) -> Result<Key> {
        Key::parse(key).with_context(|| format!("`{key}` cannot be the name of an object"))
    }

    /// A small object, unless it is still `known`.
    pub fn read(&self, key: &str, known: Option<&Version>) -> Result<Read> {
        let options =
            GetOptions { if_none_match: known.and_then(|v| v.e_tag.clone()), ..GetOptions::default() };
        let path = Self::key(key)?;
        let read = async {
            let found = self.inner.get_opts(&path, options).await?;
            let meta = meta(&found.meta);
            Ok((meta, found.bytes().await?))
        };
        match self.wait(read)? {
            Err(StoreError::NotModified { .. }) => Ok(Read::Same),
            // No answer to a read of what has changed, and seen of servers under load: all of it then.
            Err(StoreError::Precondition { .. }) if known.is_some() => self.read(key, None),
            other => Ok(match self.found("read", key, other)? {
                Some((meta, content)) => Read::New(meta, content),
                None => Read::Absent,
            }),
        }
    }

    pub fn head(&self, key: &str) -> Result<Option<Meta>> {
        let path = Self::key(key)?;
        let found = self.wait(self.inner.head(&path))?;
        Ok(self.found("find", key, found)?.map(|found| meta(&found)))
    }

    /// Objects below a folder, in any depth.
    pub fn list(&self, folder: &str) -> Result<Vec<Meta>> {
        let prefix = (!folder.is_empty()).then(|| Self::key(folder)).transpose()?;
        let all = self.wait(self.inner.list(prefix.as_ref()).try_collect::<Vec<_>>())?;
        let all = self.found("list", folder, all)?.unwrap_or_default();
        Ok(all.iter().map(meta).collect())
    }

    /// Objects right in a folder.
    pub fn list_flat(&self, folder: &str) -> Result<Vec<Meta>> {
        let prefix = (!folder.is_empty()).then(|| Self::key(folder)).transpose()?;
        let all = self.wait(self.inner.list_with_delimiter(prefix.as_ref()))?;
        Ok(self
            .found("list", folder, all)?
            .map(|all| all.objects.iter().map(meta).collect())
            .unwrap_or_default())
    }

    /// Remove an object, which may be absent.
    pub fn remove(&self, key: &str) -> Result<()> {
        let path = Self::key(key)?;
        let mut tries = 0;
        loop {
            tries += 1;
            match self.wait(self.inner.delete(&path))? {
                // Its answer was lost.
                Err(StoreError::Generic { .. }) if tries < TRIES => pause(tries),
                removed => return self.found("remove", key, removed).map(drop),
            }
        }
    }

    /// Copy an object within the bucket, with its hash.
    pub fn copy(&self, from: &str, to: &str) -> Result<()> {
        let (source, target) = (Self::key(from)?, Self::key(to)?);
        let mut tries = 0;
        loop {
            tries += 1;
            match self.wait(self.inner.copy(&source, &target))? {
                Err(error @ StoreError::Generic { .. }) if tries < TRIES => {
                    self.wait_to_send_again(to, &error, tries);
                }
                copied => {
                    return copied
                        .map_err(|e| self.error(&format!("copy `{}` to", self.shown(from)), to, &e));
                }
            }
        }
    }

    /// Put a small object.
    pub fn write(&self, key: &str, content: &[u8], condition: &If) -> Result<Put> {
        self.put(key, Bytes::copy_from_slice(content), condition, Attributes::new())
    }

    /// Put a file, in parts if it is large; those have no condition.
    pub fn upload(&self, key: &str, content: &Path, sha256: &str, condition: &If) -> Result<Put> {
        let context = || format!("cannot read `{}`", content.display());
        let mut file = File::open(content).with_context(context)?;
        let bytes = file.metadata().with_context(context)?.len();
        let mut attributes = Attributes::new();
        attributes.insert(Attribute::Metadata(SHA256.into()), sha256.to_owned().into());
        if bytes > PART {
            drop(file);
            return self.upload_parts(key, content, bytes, attributes).map(Put::Done);
        }
        let mut all = Vec::with_capacity(bytes as usize);
        file.read_to_end(&mut all).with_context(context)?;
        self.put(key, all.into(), condition, attributes)
    }

    fn put(&self, key: &str, content: Bytes, condition: &If, attributes: Attributes) -> Result<Put> {
        let path = Self::key(key)?;
        let (mut condition, mut tries) = (condition.clone(), 0);
        loop {
            tries += 1;
            let mode = match &condition {
                If::Always => Some(PutMode::Overwrite),
                If::Absent => Some(PutMode::Create),
                // Known by a listing: its generation is asked for.
                If::Is(known) if self.by_generation && known.version.is_none() => None,
                If::Is(Version { e_tag, version }) => {
                    Some(PutMode::Update(UpdateVersion { e_tag: e_tag.clone(), version: version.clone() }))
                }
            };
            let error = if let Some(mode) = mode {
                let options = PutOptions { mode, attributes: attributes.clone(), ..PutOptions::default() };
                match self.wait(self.inner.put_opts(&path, content.clone().into(), options))? {
                    Ok(result) => return Ok(Put::Done(version(&result))),
                    Err(e) => Some(e),
                }
            } else {
                None
            };
            let may_be_done = match &error {
                None | Some(StoreError::Precondition { .. } | StoreError::AlreadyExists { .. }) => true,
                Some(StoreError::NotFound { .. }) => matches!(condition, If::Is(_)),
                Some(StoreError::Generic { .. }) => condition != If::Always,
                Some(_) => false,
            };
            if let Some(error) = error.as_ref().filter(|_| !may_be_done) {
                return Err(self.error("write", key, error));
            }
            // The answer to a put that was done may have been lost, and a server under load may refuse one
            // whose condition is met.
            match (self.read(key, None)?, &condition) {
                (Read::New(meta, found), _) if found == content => return Ok(Put::Done(meta.version)),
                (Read::New(meta, _), If::Is(known)) if known.is(&meta.version) => {
                    condition = If::Is(meta.version);
                }
                (_, If::Always) | (Read::Absent, If::Absent) => {}
                _ => return Ok(Put::Changed),
            }
            match error {
                Some(error) if tries < TRIES => self.wait_to_send_again(key, &error, tries),
                Some(error) => return Err(self.error("write", key, &error)),
                None => ensure!(
                    tries < TRIES,
                    hinted(
                        format!("cannot write `{}`: the server says no generation of it", self.shown(key)),
                        "use a server that answers with `x-goog-generation`, as Google's own does"
                    )
                ),
            }
        }
    }

    fn wait_to_send_again(&self, key: &str, error: &StoreError, tries: u32) {
        let why = self.secrets.redact(&error.to_string());
        tracing::debug!("sending `{}` again: {why}", self.shown(key));
        pause(tries);
    }

    fn upload_parts(&self, key: &str, content: &Path, bytes: u64, attributes: Attributes) -> Result<Version> {
        let mut tries = 0;
        loop {
            tries += 1;
            let error = match self.wait(self.send_all(&Self::key(key)?, content, bytes, &attributes))? {
                Ok(Ok(result)) => return Ok(version(&result)),
                Ok(Err(e)) => return Err(e).with_context(|| format!("cannot read `{}`", content.display())),
                Err(e) => e,
            };
            // The answer that it is complete may have been lost.
            let is_passing = matches!(error, StoreError::Generic { .. } | StoreError::NotFound { .. });
            if is_passing && let Some(there) = self.is_there(key, &attributes)? {
                return Ok(there);
            }
            if !is_passing || tries >= TRIES {
                return Err(self.error("write", key, &error));
            }
            self.wait_to_send_again(key, &error, tries);
        }
    }

    /// The version of an object, if it has these attributes.
    fn is_there(&self, key: &str, attributes: &Attributes) -> Result<Option<Version>> {
        let path = Self::key(key)?;
        let options = GetOptions { head: true, ..GetOptions::default() };
        let found = self.wait(self.inner.get_opts(&path, options))?;
        let hash = Attribute::Metadata(SHA256.into());
        let same =
            |found: &Attributes| found.get(&hash).is_some() && found.get(&hash) == attributes.get(&hash);
        let found = self.found("find", key, found)?.filter(|found| same(&found.attributes));
        Ok(found.map(|found| meta(&found.meta).version))
    }

    /// Send a file in parts. The inner error is of the file.
    async fn send_all(
        &self,
        path: &Key,
        content: &Path,
        bytes: u64,
        attributes: &Attributes,
    ) -> Result<Result<PutResult>, StoreError> {
        let mut file = match File::open(content) {
            Ok(file) => file,
            Err(e) => return Ok(Err(e.into())),
        };
        let part = PART.max(bytes.div_ceil(MOST_PARTS).next_multiple_of(1 << 20));
        let options =
            PutMultipartOptions { attributes: attributes.clone(), ..PutMultipartOptions::default() };
        let mut upload = self.inner.put_multipart_opts(path, options).await?;
        let sent = send_parts(&mut *upload, &mut file, bytes, part).await;
        if !matches!(sent, Ok(Ok(()))) {
            // What a bucket keeps of it never counts; its rules remove it.
            let _ = upload.abort().await;
        }
        match sent? {
            Ok(()) => upload.complete().await.map(Ok),
            Err(e) => Ok(Err(e)),
        }
    }

    /// Have an object's bytes in a file that is open for reading and writing; what is read is one version of
    /// it, and the one that was written.
    pub fn download(&self, meta: &Meta, into: &File) -> Result<()> {
        let context = || format!("cannot read `{}`", self.shown(&meta.key));
        let starts = (0..meta.bytes.div_ceil(PART)).map(|n| n * PART);
        let ranges = starts.map(|start| start..(start + PART).min(meta.bytes));
        let (path, failed) = (Self::key(&meta.key)?, Arc::default());
        let file = Arc::new(into.try_clone().with_context(context)?);
        let (fetched, found) = thread::scope(|scope| {
            let (arrived, hashed) = channel();
            let hash = scope.spawn(move || sha256(into, &hashed));
            let get = |range: Range<u64>| {
                let (at, bytes) = (range.start, range.end - range.start);
                let mut options = GetOptions {
                    if_match: meta.version.e_tag.clone(),
                    range: Some(GetRange::Bounded(range.clone())),
                    ..GetOptions::default()
                };
                options.extensions.insert(Sink {
                    file: file.clone(),
                    at,
                    bytes,
                    failed: Arc::clone(&failed),
                });
                let path = &path;
                async move {
                    let found = self.inner.get_opts(path, options).await?;
                    let of = found.attributes.get(&Attribute::Metadata(SHA256.into())).map(|v| v.to_string());
                    Ok::<_, StoreError>((range, of))
                }
            };
            let work = async move {
                let mut parts = futures_util::stream::iter(ranges.map(get)).buffered(AT_ONCE);
                let mut expected = None::<String>;
                while let Some((range, of)) = parts.try_next().await? {
                    expected = expected.take().or(of);
                    // Who has gone has failed, and says why.
                    let _ = arrived.send(range);
                }
                Ok(expected)
            };
            (self.wait(work), hash.join().unwrap_or_else(|panic| resume_unwind(panic)))
        });
        let expected = match fetched? {
            Ok(expected) => expected,
            // Or it was removed.
            Err(StoreError::Precondition { .. } | StoreError::NotFound { .. }) => {
                bail!(anyhow::Error::from(pkv_files::Changed).context(context()))
            }
            Err(e) => {
                let of_file = failed.lock().unwrap_or_else(PoisonError::into_inner).take();
                return Err(of_file.map_or_else(
                    || self.error("read", &meta.key, &e),
                    |e| anyhow::Error::from(e).context(context()),
                ));
            }
        };
        let found = found.with_context(context)?;
        ensure!(
            expected.as_ref().is_none_or(|expected| *expected == found),
            anyhow::anyhow!("expected SHA-256 {}, found {found}", expected.unwrap_or_default()).context(hinted(
                context(),
                "its bytes were changed on the way or in the bucket: run the same command again, or make it again"
            ))
        );
        Ok(())
    }
}

/// The hash of a file whose ranges arrive in order.
fn sha256(file: &File, arrived: &Receiver<Range<u64>>) -> io::Result<String> {
    let (mut hash, mut piece) = (Sha256::new(), vec![0; HOT]);
    for range in arrived {
        for at in range.clone().step_by(HOT) {
            let n = (range.end - at).min(HOT as u64) as usize;
            file.read_exact_at(&mut piece[..n], at)?;
            hash.update(&piece[..n]);
        }
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// What [`Store::read`] found.
#[derive(Debug)]
pub(crate) enum Read {
    Absent,
    /// Still the known version.
    Same,
    New(Meta, Bytes),
}

/// Send a file's parts, a few at a time. The inner error is of the file.
async fn send_parts(
    upload: &mut dyn MultipartUpload,
    file: &mut File,
    bytes: u64,
    part: u64,
) -> Result<Result<()>, StoreError> {
    let mut left = bytes;
    let mut sending = FuturesUnordered::new();
    while left > 0 || !sending.is_empty() {
        while left > 0 && sending.len() < AT_ONCE {
            let n = left.min(part);
            let mut content = vec![0; n as usize];
            if let Err(e) = file.read_exact(&mut content) {
                return Ok(Err(e.into()));
            }
            left -= n;
            sending.push(upload.put_part(Bytes::from(content).into()));
        }
        sending.next().await.transpose()?;
    }
    Ok(Ok(()))
}

/// Longer after each try.
fn pause(tries: u32) {
    thread::sleep(Duration::from_millis(200) * tries);
}

fn version(result: &PutResult) -> Version {
    Version { e_tag: result.e_tag.clone().map(quoted), version: result.version.clone() }
}

/// A tag as the conditions of requests have it. Azure's listings leave the quotes out.
fn quoted(tag: String) -> String {
    if tag.ends_with('"') { tag } else { format!("\"{tag}\"") }
}

fn meta(found: &ObjectMeta) -> Meta {
    Meta {
        key: found.location.to_string(),
        bytes: found.size,
        version: Version { e_tag: found.e_tag.clone().map(quoted), version: found.version.clone() },
        modified: found.last_modified.into(),
    }
}
