//! One target at a time: a folder that is right, one of its files damaged, what reads it, and what must then
//! hold.
//!
//! What reads it returns a value or an error: no panic, no more than [`MOST_BYTES`], and soon. A damaged file
//! that does otherwise is a finding: it is kept where the message says, and belongs into
//! `findings/TARGET/NAME/`, from where it is tried before all others from then on.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::Result;
use pkv_core::Seed;
use rand::Rng as _;

use crate::mutate::{damage, pick};

/// Most memory that reading a damaged file may take at once, of this program's own; the files have a few MB.
const MOST_BYTES: usize = 400 << 20;
/// Longest time: a file is read in milliseconds, and tests of other targets are at work beside.
const LONGEST: Duration = Duration::from_secs(20);
/// What takes longer is taken for endless, and ends the process.
const ENDLESS: Duration = Duration::from_secs(120);

pub struct Target<'a> {
    pub name: &'a str,
    /// Where everything is right.
    pub folder: &'a Path,
    /// Files of it that are damaged, one at a time.
    pub files: &'a [&'a str],
    /// Write into other files what the damaged one is expected to be, such as its hash; done every second
    /// time, so that damage comes further than that.
    pub repair: Option<fn(&Path, &str)>,
    pub read: &'a dyn Fn(&Path) -> Result<()>,
}

/// Seconds for each target: 5, or `FUZZ_SECONDS`.
fn time() -> Duration {
    let given = std::env::var("FUZZ_SECONDS").ok().and_then(|s| s.parse().ok());
    Duration::from_secs_f64(given.unwrap_or(5.0))
}

/// `FUZZ_SEED`, or 1.
pub fn seed() -> u64 {
    std::env::var("FUZZ_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1)
}

impl Target<'_> {
    /// Findings of before, then damaged files until the time is up.
    pub fn fuzz(&self) {
        (self.read)(self.folder).unwrap_or_else(|e| panic!("{}: what is right is refused: {e:#}", self.name));
        let whole: Vec<Vec<u8>> =
            self.files.iter().map(|f| fs::read(self.folder.join(f)).expect("it was read just now")).collect();
        let repaired = snapshot(self.folder);
        for case in entries(&findings().join(self.name)) {
            for name in files_below(&case) {
                fs::copy(case.join(&name), self.folder.join(&name)).expect("a finding lies in the tree");
            }
            self.hold(&case.display().to_string());
            restore(self.folder, &repaired);
        }
        let mut rng = Seed(seed()).stream(self.name, 0);
        let (begun, mut tried, mut refused) = (Instant::now(), 0u64, 0u64);
        while begun.elapsed() < time() {
            let i = rng.random_range(0..self.files.len());
            let name = *pick(&mut rng, &self.files[i..=i]);
            let path = self.folder.join(name);
            fs::write(&path, damage(&mut rng, name, &whole[i])).expect("the folder can be written");
            if let (Some(repair), true) = (self.repair, rng.random()) {
                repair(self.folder, name);
            }
            refused += u64::from(self.hold(name));
            tried += 1;
            restore(self.folder, &repaired);
        }
        println!("{}: {tried} tried, {refused} refused", self.name);
        assert!(tried > 0, "{}: the time was over before the first", self.name);
    }

    /// Read the folder as it is. True if it was refused.
    fn hold(&self, what: &str) -> bool {
        let (ended, end) = channel();
        let (name, folder) = (self.name.to_owned(), self.folder.display().to_string());
        let watch = std::thread::spawn(move || {
            if end.recv_timeout(ENDLESS) == Err(RecvTimeoutError::Timeout) {
                eprintln!("{name}: reading `{folder}` does not end");
                std::process::abort();
            }
        });
        let (begun, before) = (Instant::now(), in_use());
        let result = catch_unwind(AssertUnwindSafe(|| (self.read)(self.folder)));
        let (took, bytes) = (begun.elapsed(), peak().saturating_sub(before));
        let _ = ended.send(());
        watch.join().expect("the watch ends");
        let fault = match &result {
            Err(_) => Some("it panics".to_owned()),
            Ok(Err(e)) if format!("{e:#}").trim().is_empty() => Some("its error says nothing".to_owned()),
            Ok(_) if bytes > MOST_BYTES => Some(format!("it takes {} MB", bytes >> 20)),
            Ok(_) if took > LONGEST => Some(format!("it takes {} s", took.as_secs())),
            Ok(_) => None,
        };
        if let Some(fault) = fault {
            let kept = self.folder.with_extension("finding");
            let _ = fs::remove_dir_all(&kept);
            for name in self.files {
                let to = kept.join(name);
                fs::create_dir_all(to.parent().expect("it lies in a folder")).expect("folders can be made");
                fs::copy(self.folder.join(name), to).expect("files can be copied");
            }
            panic!("{}: {fault}, of `{what}`; the files are in `{}`", self.name, kept.display());
        }
        matches!(result, Ok(Err(_)))
    }
}

/// Findings of before, a folder for each, with the files that it has in place of the right ones.
fn findings() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/findings")
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    all.sort();
    all
}

/// Every file below `dir`, by its path from there.
fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    let mut look = vec![dir.to_path_buf()];
    while let Some(next) = look.pop() {
        for path in entries(&next) {
            if path.is_dir() {
                look.push(path);
            } else if let Ok(name) = path.strip_prefix(dir) {
                out.push(name.to_path_buf());
            }
        }
    }
    out
}

type Snapshot = Vec<(PathBuf, Vec<u8>)>;

/// Every file of the folder: reading may change some.
fn snapshot(dir: &Path) -> Snapshot {
    let read = |name: PathBuf| {
        let data = fs::read(dir.join(&name)).expect("files can be read");
        (name, data)
    };
    files_below(dir).into_iter().map(read).collect()
}

fn restore(dir: &Path, whole: &Snapshot) {
    for (name, data) in whole {
        let path = dir.join(name);
        if fs::metadata(&path).is_ok_and(|m| m.len() == data.len() as u64)
            && fs::read(&path).is_ok_and(|found| found == *data)
        {
            continue;
        }
        fs::create_dir_all(path.parent().expect("it lies in a folder")).expect("folders can be made");
        fs::write(path, data).expect("files can be written");
    }
}

/// The system's allocator, which counts what each thread has.
struct Counting;

thread_local! {
    static IN_USE: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

fn count(more: usize, less: usize) {
    // Gone while a thread ends.
    let _ = IN_USE.try_with(|c| {
        let now = (c.get().0 + more).saturating_sub(less);
        c.set((now, c.get().1.max(now)));
    });
}

/// Bytes of this thread now; its peak is counted from here.
fn in_use() -> usize {
    IN_USE.with(|c| {
        c.set((c.get().0, c.get().0));
        c.get().0
    })
}

fn peak() -> usize {
    IN_USE.with(|c| c.get().1)
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;
