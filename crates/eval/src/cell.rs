//! The cells of a table: a method, a policy and a retention ratio.

use pkv_core::{Policy, RetentionRatio};
use pkv_recipe::MethodName;

/// One way to prune a cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cell {
    pub method: MethodName,
    pub policy: Policy,
    pub ratio: RetentionRatio,
}

impl Cell {
    /// Every combination: methods outermost, ratios innermost, each in the order given.
    pub fn all(methods: &[MethodName], policies: &[Policy], ratios: &[RetentionRatio]) -> Vec<Self> {
        let mut cells = Vec::with_capacity(methods.len() * policies.len() * ratios.len());
        for &method in methods {
            for &policy in policies {
                cells.extend(ratios.iter().map(|&ratio| Self { method, policy, ratio }));
            }
        }
        cells
    }
}

/// The ratio nearest to `wanted`, as factors go.
///
/// # Panics
/// There is none.
pub fn nearest(ratios: &[RetentionRatio], wanted: f64) -> RetentionRatio {
    let distance = |r: &RetentionRatio| (r.get() / wanted).ln().abs();
    *ratios.iter().min_by(|a, b| distance(a).total_cmp(&distance(b))).expect("a recipe names a ratio")
}
