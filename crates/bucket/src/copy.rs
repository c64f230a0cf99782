//! The working copy of a bucket: the files of its objects in a folder of this machine.
//!
//! | folder of the cache | holds |
//! |---|---|
//! | `files/` | the working copy; a path below it is an object's key |
//! | `records/` | for each file of which an object is known: its version, and size and time of the file then |
//! | `incoming/` | files that are on their way |
//!
//! The bucket is right: what differs from it here is brought anew, unless it was changed here since. Shards
//! are brought when they are opened, and the ones that were not used for longest go when there are too many.
//! Claims, temporary files and `log.jsonl` are of one machine, and are never put.

mod links;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use pkv_core::hinted;
use pkv_files::{Changed, Claiming, Origin, TEMPORARY, write_error};
use serde::{Deserialize, Serialize};

use crate::lease::{self, Leases};
use crate::options::Options;
use crate::store::{If, Meta, Put, Read, Store, Version};

/// Small files that are brought at a time.
const AT_ONCE: usize = 8;

/// Tries to fetch a file that changes meanwhile.
const TRIES: u32 = 6;

/// When the cache is too full, it is emptied to this part of its limit.
const EMPTIED_TO: f64 = 0.9;

/// What was known of a file when it and its object were the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    #[serde(flatten)]
    version: Version,
    bytes: u64,
    /// Nanoseconds since 1970.
    modified: u64,
}

#[derive(Debug)]
pub(crate) struct WorkingCopy {
    store: Store,
    leases: Arc<Leases>,
    files: PathBuf,
    records: PathBuf,
    incoming: PathBuf,
    limit: u64,
    /// Bytes of shards here, at most.
    cached: AtomicU64,
    /// Files that were put and have no name here yet.
    unnamed: Mutex<HashMap<String, Record>>,
    /// Sizes of shards in the bucket, and the folders that were listed for them.
    sizes: Mutex<(HashMap<String, u64>, BTreeSet<String>)>,
    /// One fetch of a file at a time.
    fetching: Mutex<HashMap<String, Arc<Mutex<()>>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl WorkingCopy {
    /// The working copy of a bucket in the folder `cache`.
    pub fn open(store: Store, cache: &Path, options: &Options) -> Result<Self> {
        let [files, records, incoming] = ["files", "records", "incoming"].map(|name| cache.join(name));
        for folder in [&files, &records, &incoming] {
            fs::create_dir_all(folder).with_context(|| {
                hinted(
                    format!("cannot make folder `{}` for the cache of a bucket", folder.display()),
                    format!("choose another place with {}", crate::options::CACHE),
                )
            })?;
        }
        let leases = Leases::new(store.clone(), options.lease, lease::name_of(cache)?);
        let (limit, cached) = (options.cache_bytes, AtomicU64::new(0));
        let (unnamed, sizes, fetching) = (Mutex::default(), Mutex::default(), Mutex::default());
        let this = Self { store, leases, files, records, incoming, limit, cached, unnamed, sizes, fetching };
        this.sweep();
        let shards: u64 = this.shards_here().iter().map(|(_, _, bytes)| bytes).sum();
        this.cached.store(shards, Ordering::Relaxed);
        Ok(this)
    }

    pub fn root(&self) -> &Path {
        &self.files
    }

    fn key(&self, path: &Path) -> Result<String> {
        let path = std::path::absolute(path)?;
        let relative = path.strip_prefix(&self.files).ok().map(|path| links::resolve(&self.files, path));
        let key = relative.as_deref().and_then(Path::to_str).map(str::to_owned);
        key.with_context(|| format!("`{}` cannot be in a bucket", path.display()))
    }

    fn path(&self, key: &str) -> PathBuf {
        self.files.join(key)
    }

    fn record_path(&self, key: &str) -> PathBuf {
        self.records.join(format!("{key}.json"))
    }

    fn record(&self, key: &str) -> Option<Record> {
        serde_json::from_slice(&fs::read(self.record_path(key)).ok()?).ok()
    }

    /// The record of a file that is here as it was then.
    fn current(&self, key: &str) -> Option<Record> {
        let record = self.record(key)?;
        (stat(&self.path(key)) == Some((record.bytes, record.modified))).then_some(record)
    }

    fn write_record(&self, key: &str, record: &Record) -> Result<()> {
        let path = self.record_path(key);
        make_folder(pkv_files::parent(&path))?;
        let own = self.on_its_way();
        let write = || {
            fs::write(&own, serde_json::to_vec(record)?)?;
            fs::rename(&own, &path)
        };
        write().map_err(|e| write_error(&path, e))
    }

    fn forget(&self, key: &str) {
        let _ = fs::remove_file(self.record_path(key));
    }

    /// A name for a file that no other has.
    fn on_its_way(&self) -> PathBuf {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos());
        let (pid, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        self.incoming.join(format!("{pid}-{nanos}-{count}{TEMPORARY}"))
    }

    /// Remove what processes left in `incoming/` that died a day ago.
    fn sweep(&self) {
        let is_old = |path: &Path| {
            let modified = fs::metadata(path).and_then(|m| m.modified()).ok();
            modified.and_then(|m| m.elapsed().ok()).is_some_and(|age| age.as_secs() > 86_400)
        };
        for entry in fs::read_dir(&self.incoming).into_iter().flatten().flatten() {
            if is_old(&entry.path()) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn check_lease(&self) -> Result<()> {
        if self.leases.are_lost() {
            bail!(
                hinted(
                    "another process has taken over what this one held: it gave no sign of life in time",
                    format!(
                        "run the same command again when the other has ended; {} is the time",
                        crate::options::LEASE
                    )
                )
                .environment()
            );
        }
        Ok(())
    }

    /// Let what `write` writes be the file of an object.
    fn bring(&self, meta: &Meta, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
        let (path, own) = (self.path(&meta.key), self.on_its_way());
        make_folder(pkv_files::parent(&path))?;
        let result = (|| {
            let file = File::options().read(true).write(true).create_new(true).open(&own);
            let mut file = file.map_err(|e| write_error(&path, e))?;
            write(&mut file)?;
            if meta.key.ends_with(lease::ENDING) {
                // Its time is the sign of life.
                let _ = file.set_modified(meta.modified);
            }
            let (bytes, modified) =
                stat(&own).with_context(|| format!("cannot write `{}`", path.display()))?;
            fs::rename(&own, &path).map_err(|e| write_error(&path, e))?;
            self.write_record(&meta.key, &Record { version: meta.version.clone(), bytes, modified })
        })();
        if result.is_err() {
            let _ = fs::remove_file(&own);
        }
        result
    }

    fn download(&self, meta: &Meta) -> Result<()> {
        self.bring(meta, |file| self.store.download(meta, file))?;
        if is_shard(&meta.key) {
            self.add(&meta.key, meta.bytes);
        }
        Ok(())
    }

    fn upload(&self, key: &str, content: &Path, sha256: &str, condition: &If) -> Result<Option<Record>> {
        self.check_lease()?;
        // Before it is sent: what changes meanwhile is sent again.
        let (bytes, modified) =
            stat(content).with_context(|| format!("`{}` is absent", content.display()))?;
        Ok(match self.store.upload(key, content, sha256, condition)? {
            Put::Done(version) => Some(Record { version, bytes, modified }),
            Put::Changed => None,
        })
    }

    /// Keys of the records below a key.
    fn known(&self, key: &str) -> Vec<String> {
        let below = files_below(&self.records.join(key)).into_iter().filter_map(|path| {
            let key = path.strip_prefix(&self.records).ok()?.to_str()?;
            Some(key.strip_suffix(".json")?.to_owned())
        });
        below.collect()
    }

    /// Shards here: when each was used last, its key, its bytes.
    fn shards_here(&self) -> Vec<(SystemTime, String, u64)> {
        let keys = self.known("").into_iter().filter(|key| is_shard(key));
        let found = keys.filter_map(|key| {
            let used = fs::metadata(self.record_path(&key)).and_then(|m| m.modified()).ok()?;
            let bytes = fs::metadata(self.path(&key)).ok()?.len();
            Some((used, key, bytes))
        });
        found.collect()
    }

    /// Count a shard, and let the oldest go if there are too many.
    fn add(&self, key: &str, bytes: u64) {
        if self.cached.fetch_add(bytes, Ordering::Relaxed) + bytes <= self.limit {
            return;
        }
        let mut shards = self.shards_here();
        // This one is about to be used, and may be on its way still.
        shards.retain(|(_, other, _)| other != key);
        shards.sort();
        let mut total: u64 = bytes + shards.iter().map(|(_, _, bytes)| bytes).sum::<u64>();
        for (_, other, bytes) in shards {
            if total as f64 <= self.limit as f64 * EMPTIED_TO {
                break;
            }
            let _ = fs::remove_file(self.path(&other));
            self.forget(&other);
            total -= bytes;
        }
        self.cached.store(total, Ordering::Relaxed);
    }

    /// Size of a shard in the bucket.
    fn size_there(&self, key: &str) -> Result<Option<u64>> {
        if let Some(bytes) = lock(&self.sizes).0.get(key) {
            return Ok(Some(*bytes));
        }
        // One listing says it of all shards of the folder.
        let folder = key.rsplit_once('/').map_or("", |(folder, _)| folder);
        if lock(&self.sizes).1.insert(folder.to_owned()) {
            let listed = self.store.list_flat(folder)?;
            let shards = listed.into_iter().filter(|meta| is_shard(&meta.key));
            lock(&self.sizes).0.extend(shards.map(|meta| (meta.key, meta.bytes)));
            if let Some(bytes) = lock(&self.sizes).0.get(key) {
                return Ok(Some(*bytes));
            }
        }
        let found = self.store.head(key)?.map(|meta| meta.bytes);
        if let Some(bytes) = found {
            lock(&self.sizes).0.insert(key.to_owned(), bytes);
        }
        Ok(found)
    }

    /// A new marker of a piece may be of a longer shard than the rows that were kept under its name.
    fn forget_size(&self, marker: &str) {
        let Some((folder, name)) = marker.rsplit_once("/pieces/") else { return };
        let Some(number) = name.strip_suffix(".json") else { return };
        let ending = format!("-{number}.parquet");
        lock(&self.sizes).0.retain(|key, _| !(key.starts_with(folder) && key.ends_with(&ending)));
    }

    /// Bring one object, unless its file is it.
    fn bring_if_other(&self, meta: &Meta) -> Result<()> {
        let known = self.record(&meta.key).filter(|record| record.version.is(&meta.version));
        // A file that was changed here since is newer.
        if known.is_some() && self.path(&meta.key).exists() {
            return Ok(());
        }
        if is_shard(&meta.key) {
            let _ = fs::remove_file(self.path(&meta.key));
            self.forget(&meta.key);
            return Ok(());
        }
        match self.download(meta) {
            // Another one has replaced it meanwhile.
            Err(e) if pkv_files::is_changed(&e) => self.refresh(&self.path(&meta.key)),
            done => done,
        }
    }

    /// Bring a folder, and what its links lead to; `depth` of them led here.
    fn pull_at(&self, folder: &Path, depth: usize) -> Result<()> {
        self.check_link(folder, depth)?;
        let key = self.key(folder)?;
        // Before the listing: what another process of this machine puts meanwhile is not missed in it.
        let known = self.known(&key);
        let there: BTreeMap<String, Meta> =
            self.store.list(&key)?.into_iter().map(|meta| (meta.key.clone(), meta)).collect();
        for gone in known.iter().filter(|known| !there.contains_key(*known)) {
            let _ = fs::remove_file(self.path(gone));
            self.forget(gone);
        }
        let shards = there.values().filter(|meta| is_shard(&meta.key));
        lock(&self.sizes).0.extend(shards.map(|meta| (meta.key.clone(), meta.bytes)));
        for at in self.links_in(folder, there.keys())? {
            self.pull_at(&at, depth + 1)?;
        }
        let wanted = there.values().filter(|meta| is_pulled(&meta.key)).collect::<Vec<_>>();
        let (next, failed) = (AtomicU64::new(0), Mutex::new(None));
        thread::scope(|scope| {
            for _ in 0..AT_ONCE.min(wanted.len()) {
                scope.spawn(|| {
                    while let Some(meta) = wanted.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                        if lock(&failed).is_some() {
                            return;
                        }
                        if let Err(e) = self.bring_if_other(meta) {
                            *lock(&failed) = Some(e);
                        }
                    }
                });
            }
        });
        failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }
}

impl Origin for WorkingCopy {
    fn put(&self, path: &Path, content: &Path, sha256: &str) -> Result<()> {
        let key = self.key(path)?;
        if !is_put(&key) {
            return Ok(());
        }
        let is_shard = is_shard(&key);
        let condition = match self.record(&key) {
            // A shard depends on its number alone: two that are put have the same bytes.
            _ if is_shard => If::Always,
            Some(record) => If::Is(record.version),
            None => If::Absent,
        };
        let Some(record) = self.upload(&key, content, sha256, &condition)? else { bail!(Changed) };
        if is_shard {
            lock(&self.sizes).0.insert(key.clone(), record.bytes);
            self.add(&key, record.bytes);
        }
        lock(&self.unnamed).insert(key, record);
        Ok(())
    }

    fn named(&self, path: &Path) {
        let Ok(key) = self.key(path) else { return };
        let record = lock(&self.unnamed).remove(&key);
        // Without a record it is brought again when it is next read.
        if let Some(Err(e)) = record.map(|record| self.write_record(&key, &record)) {
            tracing::debug!("{e:#}");
        }
    }

    fn refresh(&self, path: &Path) -> Result<()> {
        let key = self.key(path)?;
        if is_shard(&key) || !is_put(&key) {
            return Ok(());
        }
        let known = self.current(&key).map(|record| record.version);
        match self.store.read(&key, known.as_ref())? {
            Read::Same => Ok(()),
            Read::New(meta, content) => {
                self.forget_size(&key);
                self.bring(&meta, |file| {
                    std::io::Write::write_all(file, &content).map_err(|e| write_error(path, e))
                })
            }
            Read::Absent => {
                if self.record(&key).is_some() {
                    let _ = fs::remove_file(path);
                    self.forget(&key);
                }
                Ok(())
            }
        }
    }

    fn pull(&self, folder: &Path) -> Result<()> {
        self.pull_at(folder, 0)
    }

    fn names(&self, folder: &Path) -> Result<Vec<String>> {
        let listed = self.store.list_flat(&self.key(folder)?)?;
        let name = |meta: Meta| meta.key.rsplit('/').next().map(str::to_owned);
        Ok(listed.into_iter().filter_map(name).collect())
    }

    fn link(&self, at: &Path, target: &Path) -> Result<()> {
        self.make_link(at, target)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.move_folder(from, to)
    }

    fn push(&self, path: &Path) -> Result<()> {
        let key = self.key(path)?;
        let mut here = if path.is_file() { vec![path.to_owned()] } else { files_below(path) };
        // What names other files comes after them.
        let names_others = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            matches!(name, "state.json" | "config.json" | "index.json" | "results.json")
        };
        here.sort_by_key(|path| (names_others(path), path.clone()));
        for path in here {
            let key = self.key(&path)?;
            if is_put(&key) && self.current(&key).is_none() {
                let sha256 = pkv_files::sha256_here(&path)?;
                if let Some(record) = self.upload(&key, &path, &sha256, &If::Always)? {
                    self.write_record(&key, &record)?;
                }
            }
        }
        let own = self.record(&key).map(|_| key.clone());
        for key in self.known(&key).into_iter().chain(own) {
            let is_gone = !self.path(&key).exists() && is_put(&key) && !is_shard(&key);
            if is_gone {
                self.check_lease()?;
                self.store.remove(&key)?;
                self.forget(&key);
            }
        }
        Ok(())
    }

    fn fetch(&self, path: &Path) -> Result<()> {
        let key = self.key(path)?;
        let one = Arc::clone(lock(&self.fetching).entry(key.clone()).or_default());
        let _one = lock(&one);
        if !is_put(&key) || (!is_shard(&key) && path.exists()) {
            return Ok(());
        }
        if self.current(&key).is_some() {
            // It is used.
            let _ = File::open(self.record_path(&key)).and_then(|file| file.set_modified(SystemTime::now()));
            return Ok(());
        }
        let mut tries = 0;
        loop {
            tries += 1;
            let meta = self.store.head(&key)?;
            let meta = meta.ok_or_else(|| std::io::Error::from(ErrorKind::NotFound))?;
            match self.download(&meta) {
                // Put anew meanwhile, or so a server under load says.
                Err(e) if pkv_files::is_changed(&e) && tries < TRIES => {}
                done => return done,
            }
        }
    }

    fn len(&self, path: &Path) -> Result<Option<u64>> {
        let key = self.key(path)?;
        if let Some(record) = self.current(&key) {
            return Ok(Some(record.bytes));
        }
        if is_shard(&key) {
            return self.size_there(&key);
        }
        Ok(fs::metadata(path).ok().map(|m| m.len()))
    }

    fn remove(&self, path: &Path) -> Result<()> {
        self.check_lease()?;
        if path.is_symlink() {
            // What it leads to is others', too.
            return self.store.remove(&self.link_key(path)?);
        }
        let key = self.key(path)?;
        let is_folder = path.is_dir() || !path.exists();
        let below = if is_folder { self.store.list(&key)? } else { Vec::new() };
        let keys = below.into_iter().map(|meta| meta.key).filter(|key| is_pulled(key));
        for key in std::iter::once(key.clone()).filter(|key| is_put(key)).chain(keys) {
            self.store.remove(&key)?;
            self.forget(&key);
            lock(&self.sizes).0.remove(&key);
        }
        Ok(())
    }

    fn claim(&self, path: &Path, how: Claiming) -> Result<Option<Box<dyn pkv_files::Lease>>> {
        let lease = self.leases.take(&self.key(path)?, how)?;
        Ok(lease.map(|lease| Box::new(lease) as Box<dyn pkv_files::Lease>))
    }
}

/// Bytes, and nanoseconds since 1970 of the last change.
fn stat(path: &Path) -> Option<(u64, u64)> {
    let found = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    let modified = found.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some((found.len(), u64::try_from(modified.as_nanos()).ok()?))
}

fn make_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make folder `{}`", folder.display()))
}

/// Files below a folder, in any depth; links are passed over.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let (mut folders, mut files) = (vec![folder.to_owned()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                Ok(kind) if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    files.sort();
    files
}

/// A shard: `labels-00003.parquet`.
fn is_shard(key: &str) -> bool {
    let name = key.rsplit('/').next().unwrap_or_default();
    let number = name.strip_suffix(".parquet").and_then(|name| name.rsplit_once('-'));
    number.is_some_and(|(_, number)| number.len() >= 5 && number.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether a file is put into the bucket: not what is of one machine or one moment.
fn is_put(key: &str) -> bool {
    let name = key.rsplit('/').next().unwrap_or_default();
    let of_here = name == "log.jsonl"
        || name == links::NAME
        || [".lock", lease::ENDING].iter().any(|ending| name.ends_with(ending));
    !of_here && !key.is_empty() && !key.split('/').any(|part| part.ends_with(TEMPORARY))
}

/// Whether an object is brought with its folder: also who is at work on a piece.
fn is_pulled(key: &str) -> bool {
    let is_of_piece = key.ends_with(".lock.lease") && key.contains("/pieces/");
    is_of_piece || is_put(key)
}
