//! The error of work that the user stopped.

/// The work was stopped by the user; what was done is on disk.
#[derive(Debug)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(
            "interrupted; whole shards and checkpoints are on disk, and the same command goes on from them",
        )
    }
}

impl std::error::Error for Interrupted {}
