//! What tests of several crates share: paths of test data, checks of errors, hubs and an S3 server on the
//! loopback interface, reference arithmetic in f64; with the feature `tensors` that of attention, too.
//!
//! A dev-dependency only. Without the feature nothing here links libtorch.

#[cfg(feature = "tensors")]
pub mod attention;
pub mod bucket;
pub mod errors;
pub mod files;
mod http;
pub mod hub;
pub mod kill;
pub mod loops;
#[cfg(feature = "tensors")]
pub mod tensors;
