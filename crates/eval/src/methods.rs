//! The methods that score KV pairs: the mapper, KVzip's own scores, and the baselines.
//!
//! All of them give one score per (target layer, KV head, position), higher means keep; turning scores into
//! masks is `prune`'s. Every method is a file with a [`Method`]; [`REGISTRY`] lists them, and everything else
//! (the help text, the report's labels and colours, the tables) is read from there.
//!
//! `docs/contributing.md` has the steps to add a method.

mod expected_attention;
mod head_prior;
mod iam;
mod keydiff;
mod knorm;
mod kvzap;
mod kvzip;
mod linear;
mod mapper;
mod method;
mod proxy_linear;
mod random;
mod ridge;
mod set;
mod snapkv;
mod streaming_llm;
#[cfg(test)]
mod tests;
mod training;
mod view;

use anyhow::Result;
use pkv_recipe::{MethodName, check_known};
use pkv_results::MethodInfo;

pub use method::{Method, Needs};

pub(crate) use mapper::predict;
pub(crate) use set::{Methods, Scored, Watches};
pub(crate) use training::{Setup, Target, TrainingSet, feature_tensors, label_tensor};
pub(crate) use view::{ContextView, Draw};

/// All methods, in the order of tables and charts.
pub static REGISTRY: &[Method] = &[
    mapper::METHOD,
    kvzip::RAW,
    kvzip::POOLED,
    kvzap::LINEAR,
    kvzap::MLP,
    linear::METHOD,
    proxy_linear::METHOD,
    iam::METHOD,
    head_prior::METHOD,
    streaming_llm::METHOD,
    snapkv::METHOD,
    expected_attention::METHOD,
    keydiff::METHOD,
    knorm::METHOD,
    random::METHOD,
];

/// The names of all methods, in the registry's order.
pub fn names() -> impl Iterator<Item = MethodName> {
    REGISTRY.iter().map(|method| method.name)
}

/// What readers of results must know of all methods, in the registry's order.
pub fn infos() -> Vec<MethodInfo> {
    REGISTRY.iter().map(Method::info).collect()
}

/// The method of that name; `None` if this version has none.
pub fn find(name: MethodName) -> Option<&'static Method> {
    REGISTRY.iter().find(|method| method.name == name)
}

/// Refuse a recipe's `eval.methods` if one of them is unknown.
///
/// # Errors
/// One of them is unknown.
pub fn check(methods: &[MethodName]) -> Result<()> {
    check_in(REGISTRY, methods)
}

fn check_in(registry: &[Method], methods: &[MethodName]) -> Result<()> {
    for &name in methods {
        let known = registry.iter().map(|method| method.name.name());
        check_known("eval.methods", "method", name.name(), known)?;
    }
    Ok(())
}
