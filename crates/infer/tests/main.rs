//! Pruning at inference, on the small trained pair of the project.
//!
//! - `answers`: what is answered is what the evaluation says of the same mapper, ratio and policy
//! - `regimes`: all of them keep the same pairs; the mapper beside the proxy scores the same
//! - `faults`: failing, slow and broken sources, too long questions, interruptions
//! - `fit`: a mapper of another pair is refused
//! - `sources`: features of the target itself, alone and with a proxy's
//! - `text`: pieces of text add up
//! - `support`: the pair, its mapper, sources that misbehave

mod answers;
mod faults;
mod fit;
mod regimes;
mod sources;
mod support;
mod text;

/// Shards, mapper and contexts of the nano pair: the evaluation's tests share them.
#[path = "../../eval/tests/nano/fixture.rs"]
mod fixture;
