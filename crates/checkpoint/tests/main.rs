//! Checkpoint folders and exports from the outside: written, broken, continued, read.

/// States and folders that the other files use.
mod common;
/// The frozen mapper: bit-exact, whole or absent, with its card.
mod export;
/// Training state: bit-exact, rotated, and never lost to a kill or a full disk.
mod store;
/// Checkpoints and exports that an earlier version wrote.
mod versions;
