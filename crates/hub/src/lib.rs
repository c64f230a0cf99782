//! From a hub name or a local folder to files on this machine, pinned by revision and sha256.
//!
//! [`Hub::model`] and [`Hub::dataset_files`] look at local folders and at the Hugging Face cache
//! and never touch the network; [`Hub::fetch_model`] and [`Hub::fetch_dataset`] fill that cache, and
//! [`fetch_recipe`] and [`fetch_manifest`] do it for all that a recipe or a manifest names and write
//! the lock file beside it. The cache is laid out as the Python package `huggingface_hub` lays it
//! out, so either side finds what the other downloaded. [`Hub::push`] goes the other way: files into a
//! repository, as one commit. The hub is not trusted: names that it gives stay in the cache, and what it is
//! sent as a secret is never printed. Reading models and documents is left to `lm` and `data`.

mod address;
mod cache;
mod client;
mod download;
mod failure;
mod fetch;
mod hash;
mod listing;
mod local;
mod lock;
mod names;
mod options;
mod push;
mod redact;
mod store;
mod transfer;

pub use cache::{DatasetFiles, Hub, Resolved};
pub use fetch::{fetch_manifest, fetch_recipe};
pub use hash::file_identity;
pub use lock::{Lock, Pin, PinnedFile, lock_path};
pub use options::{HubOptions, host_and_port};
pub use push::{Push, PushFile, Pushed};
