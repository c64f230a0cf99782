//! The binary, run as a user runs it.
//!
//! - `pipeline`: a recipe in, a trained, evaluated and exported mapper out; stages are skipped when complete
//! - `kill`: a run killed at random moments ends with the same bytes as an unbroken one
//! - `bad_input`: what is wrong is said, with a hint, without a panic, and nothing written before is lost
//! - `stdout`: a reader that goes away ends a command quietly, a full disk with an error; neither with a
//!   panic
//! - `beside`: labels and the target's features from one prefill, or from two, have the same bytes
//! - `infer`: answers from a pruned cache are those of `eval`; regimes agree; faults end as they are said to
//! - `compare`: runs side by side have their own numbers and paired differences; what is not comparable is
//!   refused
//! - `completion`: TAB in bash, zsh and fish offers what may come next
//! - `pieces`: a stage by several tasks, killed or not, has the bytes of one process; no row is lost silently
//! - `devices`: a worker on each device; those that die are replaced once, then named; signals reach them
//! - `bench`: a benchmark needs no files, and says what it needs where it does
//! - `fetch`: models from a hub on the loopback interface, interrupted and taken up; no secret is shown
//! - `feature_workers`: processes that make features beside training, and may be killed, change no byte
//! - `generated`: a mapper from features that are made when they are read is the one from shards
//! - `launch`: jobs of Slurm and Kubernetes as they are printed, refused and applied
//! - `layers`: a target whose layers are over two devices makes the bytes of one
//! - `workers`: workers of Kubernetes' Jobs, ended in the middle, make the bytes of one process
//! - `slurm`: a chain of jobs on a real Slurm of one machine, with workers and the controller killed
//! - `docs`: every command block of README and guide runs as it is written
//! - `recipes`: schema, reference, `recipes ls | show | init`, documents without a manifest, `--show`
//! - `push`: an export into a hub on the loopback interface: nothing without `--yes`, all of it or nothing
//!   with it
//! - `results`: evaluations of other tasks, methods, ratios and limits add up
//! - `sources`: features of the target, alone and beside the proxy's
//! - `sweep`: variants share what is the same, and each ends as it would alone
//! - `buckets`: a run in a bucket, by several machines and through faults, has the bytes of one on disk
//! - `faults`: files that never end, two processes in one folder, outputs that vanish, markup of others
//! - `trained`: a finished run, shared or a copy of a test's own
//! - `sandbox`: the folder, the small recipe and the command that the others share

mod bad_input;
mod bench;
mod beside;
mod buckets;
mod compare;
mod completion;
mod devices;
mod docs;
mod faults;
mod feature_workers;
mod fetch;
mod generated;
mod infer;
mod kill;
mod launch;
mod layers;
mod pieces;
mod pipeline;
mod push;
mod recipes;
mod results;
mod sandbox;
mod slurm;
mod sources;
mod start_from;
mod stdout;
mod sweep;
mod trained;
mod workers;
