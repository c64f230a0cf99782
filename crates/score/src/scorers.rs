//! The ways to score a context: a file for each, and [`REGISTRY`], which lists them.
//!
//! A preset of `recipe` names one, and `label.scorer` another. Most score the softmax weights of a repeat,
//! and may multiply them with factors of rows and columns ([`pkv_gpu::chunk_scores`]); some read the cache
//! alone.
//!
//! Dimension key: h KV head, g query heads per KV head, q query head (h x g), s new tokens (rows),
//! t position in the scoring chunk, d head_dim, m hidden.

mod kvzip_plus;
mod snapkv;
#[cfg(test)]
mod tests;

use anyhow::{Result, ensure};
use pkv_gpu::Weighting;
use pkv_lm::{KvCache, LanguageModel};
use pkv_recipe::plan::ScorerWork;
use pkv_recipe::{LabelSection, check_known};
use tch::{Kind, Tensor};

pub use kvzip_plus::kvzip_plus;
pub use snapkv::{WINDOW, window_scores};

/// Factors from the rows' attention inputs `[s, hidden]`, the values `[h, t, d]`, and W_O of the layer.
pub(crate) type Factors = fn(&Tensor, &Tensor, &Tensor) -> Result<Weighting>;

/// A context that a cache holds, the chat template's prefix before it, and nothing else.
pub(crate) struct CachedContext<'a> {
    pub model: &'a LanguageModel,
    pub cache: &'a KvCache,
    /// Positions of the prefix.
    pub prefix: usize,
    /// At least one token.
    pub tokens: &'a [u32],
}

/// What a score is computed of.
#[derive(Clone, Copy)]
pub(crate) enum Compute {
    /// The strongest softmax weight of a repeat, times factors if there are any.
    Repeat(Option<Factors>),
    /// Whatever a model gives that has read the context: f32 `[layers, KV heads, positions]`. There are no
    /// means.
    Cached(fn(&CachedContext) -> Result<Tensor>),
}

/// A way to score.
pub(crate) struct Entry {
    /// In recipes.
    pub name: &'static str,
    /// What its scores are, for the recipe reference.
    pub meaning: &'static str,
    pub compute: Compute,
    /// What it costs beside the prefill, for `plan`.
    pub work: ScorerWork,
    /// Its reference: a file, from the folder of all crates, that has this text.
    #[cfg(test)]
    pub held_by: (&'static str, &'static str),
}

/// KVzip's own score: the softmax weights as they are.
const PLAIN: Entry = Entry {
    name: "plain",
    meaning: "the strongest softmax weight of a repeat, as KVzip has it",
    compute: Compute::Repeat(None),
    work: ScorerWork::REPEAT,
    #[cfg(test)]
    held_by: ("gpu/src/ops/tests/scores.rs", "pub fn chunk_scores"),
};

/// All ways to score.
pub(crate) static REGISTRY: &[Entry] = &[PLAIN, kvzip_plus::ENTRY, snapkv::ENTRY];

/// The name of every way to score, and what its scores are.
pub fn scorers() -> impl Iterator<Item = (&'static str, &'static str)> {
    REGISTRY.iter().map(|entry| (entry.name, entry.meaning))
}

/// Refuse a recipe's `label.scorer` if it is unknown.
///
/// # Errors
/// It is unknown.
pub fn check(label: &LabelSection) -> Result<()> {
    find(label.scorer()).map(drop)
}

/// What a recipe's way to score costs beside the prefill; one that is unknown is refused elsewhere, and costs
/// a repeat.
pub fn work(label: &LabelSection) -> ScorerWork {
    let entry = REGISTRY.iter().find(|entry| entry.name == label.scorer());
    entry.map_or(ScorerWork::REPEAT, |entry| entry.work)
}

/// The way to score of that name.
///
/// # Errors
/// There is none.
pub(crate) fn find(name: &str) -> Result<Compute> {
    check_known("label.scorer", "scorer", name, REGISTRY.iter().map(|entry| entry.name))?;
    let entry = REGISTRY.iter().find(|entry| entry.name == name);
    Ok(entry.expect("it was checked").compute)
}

/// Norm of each value after the output projection, per query head.
///
/// # Shapes
/// - `v_htd`: `[kv_heads, t, head_dim]`, any floating kind
/// - `projection`: `[hidden, query_heads * head_dim]`, any floating kind, same device
/// - returns `[query_heads, t]`, f32
///
/// # Errors
/// The projection's width is no multiple of `kv_heads * head_dim`.
pub fn value_output_norms(v_htd: &Tensor, projection: &Tensor) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let (v, w) = (v_htd.size(), projection.size());
    ensure!(
        v.len() == 3 && w.len() == 2 && v[0] * v[2] > 0 && w[1] > 0 && w[1] % (v[0] * v[2]) == 0,
        "values {v:?} and output projection {w:?} do not fit: expected [KV heads, positions, head_dim] and \
         [hidden, query heads x head_dim]"
    );
    let (heads, head_dim) = (v[0], v[2]);
    let group = w[1] / (heads * head_dim);
    let v_htd = v_htd.to_kind(Kind::Float);
    // A query head at a time: [t, hidden] is held, never [query_heads, t, hidden].
    let norms: Vec<Tensor> = (0..heads * group)
        .map(|q| {
            let w_md = projection.narrow(1, q * head_dim, head_dim).to_kind(Kind::Float);
            l2_norm(&v_htd.get(q / group).matmul(&w_md.transpose(0, 1)))
        })
        .collect();
    Ok(Tensor::stack(&norms, 0))
}

/// Euclidean norm along the last dimension.
fn l2_norm(x: &Tensor) -> Tensor {
    x.norm_scalaropt_dim(2.0, [-1i64], false)
}
