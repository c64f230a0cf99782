//! Claims across machines, where no file system has locks: an object that is renewed for as long as its
//! process lives.
//!
//! A lease is made by a put that fails where one is, renewed four times in its term by a put that fails where
//! another has replaced it, and removed when it ends. One whose version has not changed for a whole term, by
//! the clock of the process that waits for it, is taken over. No two machines' clocks are compared. A process
//! that could not renew a lease for its term counts it as lost: of what it held alone, it puts nothing more.
//!
//! A piece that two processes make after all has the same bytes, so that a lost claim of a piece is only work
//! done twice.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use pkv_files::Claiming;
use serde_json::{Value, json};

use crate::store::{If, Put, Read, Store, Version};

/// Ending of the names of leases.
pub(crate) const ENDING: &str = ".lease";

/// A lease that another process has is looked at so often in its term.
const LOOKS: u32 = 20;

/// All leases of a process in one bucket.
#[derive(Debug)]
pub(crate) struct Leases {
    store: Store,
    term: Duration,
    /// Of the cache: a process that shares it, and has the lock that goes with a lease, may take the lease of
    /// one that has died.
    cache: String,
    held: Mutex<Vec<Weak<Inner>>>,
    seen: Mutex<HashMap<String, Seen>>,
    renews: AtomicBool,
}

/// A lease of another process, as it was when this one looked.
#[derive(Debug)]
struct Seen {
    version: Version,
    since: Instant,
    next: Instant,
}

#[derive(Debug)]
struct Inner {
    key: String,
    how: Claiming,
    state: Mutex<State>,
    lost: AtomicBool,
    ended: AtomicBool,
}

#[derive(Debug)]
struct State {
    version: Version,
    renewed: Instant,
    signature: String,
}

/// A lease that is held.
#[derive(Debug)]
pub(crate) struct Lease {
    inner: Arc<Inner>,
    leases: Arc<Leases>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Leases {
    pub fn new(store: Store, term: Duration, cache: String) -> Arc<Self> {
        let (held, seen) = (Mutex::default(), Mutex::default());
        Arc::new(Self { store, term, cache, held, seen, renews: AtomicBool::new(false) })
    }

    /// Whether this process has lost what it held alone.
    pub fn are_lost(&self) -> bool {
        let alone = |lease: Arc<Inner>| lease.how == Claiming::Alone && lease.lost.load(Ordering::Acquire);
        lock(&self.held).iter().filter_map(Weak::upgrade).any(alone)
    }

    /// Take the lease `key`; `None` while another process has it.
    pub fn take(self: &Arc<Self>, key: &str, how: Claiming) -> Result<Option<Lease>> {
        match how {
            Claiming::Piece => self.take_one(&format!("{key}{ENDING}"), how),
            Claiming::Alone => {
                let Some(lease) = self.wait_for(&format!("{key}{ENDING}"), how)? else { return Ok(None) };
                // Who shares it comes first, and sees this lease.
                for other in self.sharing(key)? {
                    if !self.has_ended(&other)? {
                        return Ok(None);
                    }
                }
                Ok(Some(lease))
            }
            Claiming::Shared => {
                let Some(lease) = self.take_one(&format!("{key}.{}.shared{ENDING}", id()), how)? else {
                    return Ok(None);
                };
                let alone = format!("{key}{ENDING}");
                Ok(self.has_ended(&alone)?.then_some(lease))
            }
        }
    }

    /// Keys of the leases of those who share `key`.
    fn sharing(&self, key: &str) -> Result<Vec<String>> {
        let folder = key.rsplit_once('/').map_or("", |(folder, _)| folder);
        let is_shared = |k: &str| {
            k.strip_prefix(key).is_some_and(|rest| rest.starts_with('.') && rest.ends_with(".shared.lease"))
        };
        Ok(self.store.list_flat(folder)?.into_iter().map(|meta| meta.key).filter(|k| is_shared(k)).collect())
    }

    /// Whether a lease is absent, or its process has died; it is then removed. Waits for as long as that is
    /// not clear: at most for its term.
    fn has_ended(&self, key: &str) -> Result<bool> {
        let Some((first, is_ours)) = self.look(key)? else { return Ok(true) };
        let begun = Instant::now();
        while !is_ours && begun.elapsed() < self.term {
            std::thread::sleep(self.term / LOOKS);
            match self.look(key)? {
                None => return Ok(true),
                Some((version, _)) if !version.is(&first) => return Ok(false),
                Some(_) => {}
            }
        }
        self.store.remove(key)?;
        Ok(true)
    }

    /// The version of a lease, and whether it is of a process that has died and shared this cache.
    fn look(&self, key: &str) -> Result<Option<(Version, bool)>> {
        let Read::New(meta, content) = self.store.read(key, None)? else { return Ok(None) };
        Ok(Some((meta.version, self.is_of_the_dead(&content))))
    }

    /// The process had the lock of this machine that the caller has now, or does not live any more.
    fn is_of_the_dead(&self, content: &[u8]) -> bool {
        let value: Value = serde_json::from_slice(content).unwrap_or_default();
        let lease = &value["lease"];
        let has_died =
            || lease["pid"].as_u64().is_some_and(|pid| !PathBuf::from(format!("/proc/{pid}")).exists());
        lease["cache"].as_str() == Some(&self.cache)
            && lease["boot"].as_str().is_some_and(|b| b != boot() || has_died())
    }

    /// [`Leases::take_one`], waiting for as long as it is not clear whether its process has died.
    fn wait_for(self: &Arc<Self>, key: &str, how: Claiming) -> Result<Option<Lease>> {
        match self.take_one(key, how)? {
            None if self.has_ended(key)? => self.take_one(key, how),
            taken => Ok(taken),
        }
    }

    fn take_one(self: &Arc<Self>, key: &str, how: Claiming) -> Result<Option<Lease>> {
        let now = Instant::now();
        if lock(&self.seen).get(key).is_some_and(|seen| now < seen.next) {
            return Ok(None);
        }
        let content = self.content("");
        if let Put::Done(version) = self.store.write(key, &content, &If::Absent)? {
            return Ok(Some(self.hold(key, how, version)));
        }
        let Some((version, is_dead)) = self.look(key)? else { return Ok(None) };
        let pause = self.term / LOOKS;
        let is_over = is_dead || {
            let mut seen = lock(&self.seen);
            let known = seen.entry(key.to_owned()).or_insert_with(|| Seen {
                version: version.clone(),
                since: now,
                next: now,
            });
            if !known.version.is(&version) {
                (known.version, known.since) = (version.clone(), now);
            }
            known.next = now + pause;
            known.since.elapsed() >= self.term
        };
        if !is_over {
            return Ok(None);
        }
        tracing::info!(
            "the process that had `{}` gives no sign of life: taking it over",
            self.store.shown(key)
        );
        Ok(match self.store.write(key, &content, &If::Is(version))? {
            Put::Done(version) => Some(self.hold(key, how, version)),
            Put::Changed => None,
        })
    }

    fn hold(self: &Arc<Self>, key: &str, how: Claiming, version: Version) -> Lease {
        lock(&self.seen).remove(key);
        let state = State { version, renewed: Instant::now(), signature: String::new() };
        let (lost, ended) = (AtomicBool::new(false), AtomicBool::new(false));
        let inner = Arc::new(Inner { key: key.to_owned(), how, state: Mutex::new(state), lost, ended });
        let mut held = lock(&self.held);
        held.retain(|lease| lease.strong_count() > 0);
        held.push(Arc::downgrade(&inner));
        drop(held);
        self.start();
        Lease { inner, leases: Arc::clone(self) }
    }

    /// What a lease holds: who has it, and that it is new.
    fn content(&self, signature: &str) -> Vec<u8> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let mut value: Value = serde_json::from_str(signature).unwrap_or_else(|_| json!({}));
        value["lease"] = json!({
            "cache": self.cache, "pid": std::process::id(), "boot": boot(), "id": id(),
            "renewal": COUNT.fetch_add(1, Ordering::Relaxed),
        });
        value.to_string().into_bytes()
    }

    /// Renew all that is held, for as long as anything uses the bucket.
    fn start(self: &Arc<Self>) {
        if self.renews.swap(true, Ordering::AcqRel) {
            return;
        }
        let (leases, pause) = (Arc::downgrade(self), self.term / 4);
        let renew = move || {
            loop {
                std::thread::sleep(pause);
                let Some(leases) = leases.upgrade() else { return };
                let held: Vec<_> = lock(&leases.held).iter().filter_map(Weak::upgrade).collect();
                held.iter().for_each(|lease| leases.renew(lease));
            }
        };
        if let Err(e) = std::thread::Builder::new().name("leases".to_owned()).spawn(renew) {
            tracing::warn!("claims in the bucket are not renewed, and end in {:.0?}: {e}", self.term);
        }
    }

    fn renew(&self, lease: &Inner) {
        let mut state = lock(&lease.state);
        if lease.lost.load(Ordering::Acquire) || lease.ended.load(Ordering::Acquire) {
            return;
        }
        let content = self.content(&state.signature);
        let renewed = self.store.write(&lease.key, &content, &If::Is(state.version.clone()));
        let is_lost = match renewed {
            Ok(Put::Done(version)) => {
                (state.version, state.renewed) = (version, Instant::now());
                false
            }
            Ok(Put::Changed) => true,
            Err(e) => {
                tracing::debug!("cannot renew a claim: {e:#}");
                state.renewed.elapsed() > self.term
            }
        };
        if is_lost {
            lease.lost.store(true, Ordering::Release);
            tracing::warn!(
                "`{}` is another process's: this one gave no sign of life for {:.0?}",
                self.store.shown(&lease.key),
                self.term
            );
        }
    }
}

impl pkv_files::Lease for Lease {
    fn sign(&self, text: &str) {
        lock(&self.inner.state).signature = text.to_owned();
        self.leases.renew(&self.inner);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let _state = lock(&self.inner.state);
        self.inner.ended.store(true, Ordering::Release);
        // It may be another process's.
        if !self.inner.lost.load(Ordering::Acquire)
            && let Err(e) = self.leases.store.remove(&self.inner.key)
        {
            tracing::debug!("a claim ends by itself: {e:#}");
        }
    }
}

/// A name that no other process has, nor this one twice.
fn id() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos());
    format!("{}-{nanos}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// The name of the machine's present start: numbers of processes mean nothing in another one.
fn boot() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// The name of a cache, made with it.
pub(crate) fn name_of(cache: &std::path::Path) -> Result<String> {
    let path = cache.join("name");
    let context = || format!("cannot use `{}`", path.display());
    match pkv_core::read_small_text(&path) {
        Ok(name) => return Ok(name.trim().to_owned()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e).with_context(context),
    }
    // Of two processes the first one's counts.
    let own = cache.join(format!("name.{}", id()));
    std::fs::write(&own, id()).with_context(context)?;
    let _ = std::fs::hard_link(&own, &path);
    let _ = std::fs::remove_file(&own);
    Ok(pkv_core::read_small_text(&path).with_context(context)?.trim().to_owned())
}
