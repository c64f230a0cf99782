//! The trained mapper.
//!
//! Dimension key: p proxy KV head, c channel, t position.

use anyhow::Result;
use pkv_mapper::Mapper;
use pkv_recipe::MethodName;
use tch::Tensor;

use super::method::{Method, Needs, Ready};

pub const METHOD: Method = Method {
    name: MethodName::MAPPER,
    meaning: "the trained network: from features of the proxy's or the target's prefill to the target's scores",
    needs: Needs::FEATURES,
    #[cfg(test)]
    held_by: ("../mapper/tests/goldens.rs", "fn the_forward_agrees"),
    start: |setup| {
        let mapper = setup.mapper;
        Ready::scores(move |view| {
            let features = view.features()?;
            predict(mapper, &features.heads_pct, &features.globals_ct)
        })
        .start()
    },
};

/// Positions of one forward of a mapper: bounds its activations on long contexts.
const WINDOW: usize = 16_384;

/// Scores of a context by a mapper, f32 `[target heads, positions]`, from its raw features.
///
/// # Errors
/// The features are not of the mapper's shape.
pub fn predict(mapper: &Mapper, heads_pct: &Tensor, globals_ct: &Tensor) -> Result<Tensor> {
    let (heads, globals) = (heads_pct.unsqueeze(0), globals_ct.unsqueeze(0));
    mapper.dims().check_features(&heads, &globals)?;
    Ok(mapper.forward_long(&heads, &globals, WINDOW).squeeze_dim(0))
}
