//! Run folders in buckets: `s3://`, `gs://`, `az://` wherever a run folder is named.
//!
//! [`place`] mounts a bucket and gives the path of its working copy, in which everything goes on as in any
//! folder: `pkv-files` puts each file into the bucket before it is whole here, and asks for files before they
//! are read (`copy`). Claims are objects that are renewed (`lease`); folders that runs share are objects that
//! name them (`copy::links`). What fails on the way is sent again by
//! object_store, with the time limits of our HTTP client (`http`); what a file needs in memory is four parts
//! of 8 MiB (`store`). Keys are never shown (`redact`).

mod address;
mod copy;
mod credentials;
mod endpoint;
mod http;
mod lease;
mod options;
mod redact;
mod store;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use sha2::{Digest, Sha256};

pub use self::address::{Address, Scheme, is_address};
pub use self::credentials::is_credential;
pub use self::options::{CACHE, CACHE_GB, LEASE, Options, TIMEOUT};

use self::copy::WorkingCopy;
use self::store::Store;

/// The path to work with: of the working copy where `path` is an address, and `path` itself otherwise. The
/// bucket stays mounted for the rest of the process.
///
/// # Errors
/// It is no address of a bucket, or the bucket cannot be used.
pub fn place(path: &Path) -> Result<PathBuf> {
    if !is_address(path) {
        return Ok(path.to_owned());
    }
    let address = Address::parse(&path.to_string_lossy())?;
    static MOUNTED: Mutex<Vec<(String, PathBuf)>> = Mutex::new(Vec::new());
    let mut mounted = MOUNTED.lock().unwrap_or_else(PoisonError::into_inner);
    let root = address.root();
    if let Some((_, files)) = mounted.iter().find(|(mounted, _)| *mounted == root) {
        return Ok(files.join(&address.prefix));
    }
    let files = mount(&address, &Options::from_env()?)?;
    mounted.push((root, files.clone()));
    Ok(files.join(&address.prefix))
}

/// As [`place`], and bring what is there, but for its shards: to be read.
///
/// # Errors
/// As of [`place`]; or it cannot be read.
pub fn brought(path: &Path) -> Result<PathBuf> {
    let place = place(path)?;
    if is_address(path) {
        pkv_files::pull(&place)?;
        pkv_files::refresh(&place)?;
        if !place.exists()
            && let Err(e) = pkv_files::open_file(&place)
            && e.downcast_ref::<std::io::Error>().is_none_or(|e| e.kind() != std::io::ErrorKind::NotFound)
        {
            return Err(e.context(format!("cannot read `{}`", path.display())));
        }
    }
    Ok(place)
}

/// Mount the bucket of an address: the root of its working copy.
///
/// # Errors
/// It has no credentials, or there is no place for the cache.
pub fn mount(address: &Address, options: &Options) -> Result<PathBuf> {
    let copy = WorkingCopy::open(
        Store::open(address, options)?,
        &options.cache.join(name(address, options)),
        options,
    )?;
    let root = copy.root().to_owned();
    pkv_files::mount(root.clone(), Arc::new(copy));
    tracing::debug!("`{}` has its working copy in `{}`", address.root(), root.display());
    Ok(root)
}

/// Name of a bucket's folder in the cache: two servers may have buckets of one name.
fn name(address: &Address, options: &Options) -> String {
    let is_place =
        |name: &str| ["ENDPOINT", "ACCOUNT_NAME", "BASE_URL"].iter().any(|part| name.contains(part));
    let mut variables = options.variables.clone();
    endpoint::resolve(address.scheme, &mut variables);
    let mut hash = Sha256::new();
    for (name, value) in variables.iter().filter(|(name, _)| is_place(name)) {
        hash.update(format!("{name}={value}\n"));
    }
    let hash: String = hash.finalize().iter().take(4).map(|b| format!("{b:02x}")).collect();
    format!("{}-{}-{hash}", address.scheme.name(), address.bucket)
}
